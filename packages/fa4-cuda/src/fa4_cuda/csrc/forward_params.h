// What a forward launch hands to the kernel.
#pragma once

#include <cuda.h>
#include <stdint.h>

namespace fa4 {

// A tensor [batch, seq, heads, head_dim] in memory; strides in elements, the last one is 1. Packed
// sequences ([total, heads, head_dim]) have no batch stride.
struct TensorView {
  void* data;
  int64_t stride_batch;
  int64_t stride_seq;
  int64_t stride_head;
};

// The order in which tiles are handed out (scheduler.cuh). "Heads" are query heads, or key heads
// where the query heads of a group are packed into one tile.
struct Schedule {
  int tiles;         // of the launch; 0 if sequences are packed: the table knows
  int tile_queries;  // query rows a tile covers
  int heads;         // of a sequence
  int sequences;
  int section_keys;  // keys, of all heads worked on side by side, whose K and V are to stay in L2
  int dynamic;       // tiles are drawn from a counter, not dealt out
  int* state;  // counter, and for packed sequences the table of prepare_packed; null if neither is
               // needed
};

struct ForwardParams {
  CUtensorMap q_map, k_map, v_map;
  TensorView q, k, v, out;
  float* lse;
  int64_t lse_stride_batch, lse_stride_head;
  const int* cu_seqlens_q;  // [batch + 1], null if dense
  const int* cu_seqlens_k;
  const int* seqused_k;  // [batch] or null
  int seq_q, seq_k;      // of every sequence, if dense
  int head_dim;          // of the tensors: at most the tile's
  int heads_per_group;   // tiles' heads per key head
  int packed_heads;  // query heads in one tile: row i of a slab is query i / packed_heads, head i %
                     // packed_heads
  float inverse_packed_heads;
  int slab_queries;  // queries of a warp group's 64 rows: 64 / packed_heads
  int window_left, window_right;
  float scale;       // magnitude
  float scale_log2;  // scale * log2(e), never zero
  int negate_q;      // the scale was negative: Q is negated instead
  float empty_lse;   // lse of rows that see no key
  Schedule schedule;
};

}  // namespace fa4

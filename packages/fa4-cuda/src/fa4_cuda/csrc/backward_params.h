// What a backward launch hands to its kernels.
#pragma once

#include "forward_params.h"

namespace fa4 {

struct BackwardParams {
  CUtensorMap q_map, k_map, v_map, grad_out_map;
  TensorView q, k, v, out, grad_out, dq, dk, dv;
  const float* lse;  // of the forward
  int64_t lse_stride_batch, lse_stride_head;
  // The workspace: sequences begin at multiples of kRowAlignment rows (workspace_row).
  float* negative_lse;  // -log2(e) * lse; -inf for rows without keys and behind the last
  float* delta;         // row sums of dO * O
  float* dq_sums;       // in the order of accumulators (dq_panel)
  int* turns;           // of every block of dQ: how many thread blocks have added; or null
  int* nan_keys;        // whether a row of dK or dV came out NaN; of use where dQ is summed
  int64_t workspace_rows;  // of a head of a sequence; of all sequences if they are packed
  const int* cu_seqlens_q;  // [batch + 1], null if dense
  const int* cu_seqlens_k;
  int seq_q, seq_k;  // of every sequence; of the longest if they are packed
  int batch;         // sequences
  int heads_q, heads_k;
  int heads_per_group;
  int head_dim;  // of the tensors: at most the tile's
  int window_left, window_right;
  float scale;
  float scale_log2;  // scale * log2(e), never zero
  // The order of tiles: blocks of keys; of queries in dQ's own kernel.
  int n_blocks;  // of the longest sequence
  int section;   // heads whose blocks are worked on side by side
  int last_block_first;
  int tiles;       // blocks of all heads of all sequences
  int* next_tile;  // drawn so far, maybe beyond the first of each thread block; null: dealt out
  int* next_query_tile;  // the same of dQ's own kernel
  // Zeros by the main kernel (backward_zeros.cuh). Of every key head of every sequence: how many
  // warps have zeroed their share of its sums; null where the kernel before zeroes all.
  int* zeroed;
  int zero_lead;  // tiles between one and that whose share of sums it zeroes: whole sections
};

}  // namespace fa4

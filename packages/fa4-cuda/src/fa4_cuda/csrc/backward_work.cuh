// What a thread block of the backward works on, tile by tile: a block of keys and the queries that
// see them; or, where dQ has a kernel of its own, a block of queries and the keys that they see.
#pragma once

#include "backward_params.h"
#include "backward_tiles.h"

namespace fa4 {

// First row of a sequence in the workspaces. Packed sequences keep the room between them that
// rounding up takes.
__device__ __forceinline__ int64_t workspace_row(const BackwardParams& params, int sequence,
                                                 int head, int q_start) {
  if (params.cu_seqlens_q != nullptr) {
    return head * params.workspace_rows +
           (q_start + sequence * kRowAlignment) / kRowAlignment * kRowAlignment;
  }
  return (static_cast<int64_t>(sequence) * params.heads_q + head) * params.workspace_rows;
}

// Sums of dQ lie in panels of 64 rows and up to 64 columns, each in the order of the accumulators
// of a [64, 64] product: four by four of a thread, thread by thread.
__device__ __forceinline__ int64_t dq_panel(int64_t workspace_row, int head_dim, int panel) {
  return workspace_row * head_dim + panel * (64 * kPanelColumns);
}

// Where a tile lies in the order in which they are worked on: of a section's heads first all of one
// block, then all of the next.
struct TilePlace {
  int flat_head;  // of those of all sequences
  int sequence;
  int head;  // of the sequence
  int block;

  __device__ __forceinline__ TilePlace(const BackwardParams& params, int tile, int sequence_heads) {
    const int heads = sequence_heads * params.batch;
    const int index = tile / (params.section * params.n_blocks);
    const int rest = tile - index * params.section * params.n_blocks;
    const int wide = min(params.section, heads - index * params.section);
    const int from_first = rest / wide;
    flat_head = index * params.section + rest - from_first * wide;
    block = params.last_block_first ? params.n_blocks - 1 - from_first : from_first;
    sequence = flat_head / sequence_heads;
    head = flat_head - sequence * sequence_heads;
  }
};

// Where a sequence lies in the tensors.
struct Sequence {
  int number;
  int batch;  // 0 if sequences are packed
  int q_start, k_start, seq_q, seq_k;

  __device__ __forceinline__ Sequence(const BackwardParams& params, int number)
      : number(number),
        batch(number),
        q_start(0),
        k_start(0),
        seq_q(params.seq_q),
        seq_k(params.seq_k) {
    if (params.cu_seqlens_q != nullptr) {
      batch = 0;
      q_start = params.cu_seqlens_q[number];
      k_start = params.cu_seqlens_k[number];
      seq_q = params.cu_seqlens_q[number + 1] - q_start;
      seq_k = params.cu_seqlens_k[number + 1] - k_start;
    }
  }

  __device__ __forceinline__ uint16_t* row(const TensorView& tensor, int64_t row, int head) const {
    return static_cast<uint16_t*>(tensor.data) + batch * tensor.stride_batch +
           row * tensor.stride_seq + head * tensor.stride_head;
  }
  __device__ __forceinline__ uint16_t* query(const TensorView& tensor, int query, int head) const {
    return row(tensor, q_start + query, head);
  }
  __device__ __forceinline__ uint16_t* key(const TensorView& tensor, int key, int head) const {
    return row(tensor, k_start + key, head);
  }
};

// A block of keys.
struct BackwardWork : Sequence {
  int key_head;
  int n_block;

  __device__ __forceinline__ BackwardWork(const BackwardParams& params, int tile)
      : BackwardWork(params, TilePlace(params, tile, params.heads_k)) {}

 private:
  __device__ __forceinline__ BackwardWork(const BackwardParams& params, const TilePlace& place)
      : Sequence(params, place.sequence), key_head(place.head), n_block(place.block) {}
};

// A block of queries, for dQ's own kernel.
struct QueryWork : Sequence {
  int head;  // of the queries
  int key_head;
  int first_query;

  __device__ __forceinline__ QueryWork(const BackwardParams& params, int tile)
      : QueryWork(params, TilePlace(params, tile, params.heads_q)) {}

 private:
  __device__ __forceinline__ QueryWork(const BackwardParams& params, const TilePlace& place)
      : Sequence(params, place.sequence),
        head(place.head),
        key_head(place.head / params.heads_per_group),
        first_query(place.block * BackwardTile::kQueryRows) {}
};

// Whether the main kernel zeroes the sums of a key head, counted over all sequences; those of the
// first zero_lead tiles are zeroed before it.
__device__ __forceinline__ bool are_zeroed_ahead(const BackwardParams& params, int key_head) {
  return params.zeroed != nullptr && key_head * params.n_blocks >= params.zero_lead;
}

// Queries [begin, end) that see a key.
template <Mask kMask>
struct SeeingQueries {
  int begin, end;

  __device__ __forceinline__ SeeingQueries(const BackwardParams& params, const BackwardWork& work,
                                           int key) {
    const int diagonal = key - (work.seq_k - work.seq_q);
    begin = key < work.seq_k ? max(0, diagonal - params.window_right) : work.seq_q;
    end = kMask == Mask::kWindow ? min(work.seq_q, diagonal + params.window_left + 1) : work.seq_q;
  }
};

// Keys [begin, end) that a query sees.
template <Mask kMask>
struct SeenKeys {
  int begin, end;

  __device__ __forceinline__ SeenKeys(const BackwardParams& params, const Sequence& sequence,
                                      int query) {
    const int diagonal = query + sequence.seq_k - sequence.seq_q;
    begin = kMask == Mask::kWindow ? max(0, diagonal - params.window_left) : 0;
    end = min(sequence.seq_k, diagonal + params.window_right + 1);
  }
};

// Blocks of queries [begin, end) that see a key of the thread block; those in [clean_begin,
// clean_end) see all of them. Rows behind the last query are no matter: their lse makes P zero.
template <BackwardTile const& kTile>
struct QueryBlocks {
  int begin, end, clean_begin, clean_end;

  __device__ __forceinline__ QueryBlocks(const BackwardParams& params, const BackwardWork& work) {
    using Seeing = SeeingQueries<kTile.mask>;
    constexpr int kM = kTile.block_m;
    const int first_key = work.n_block * kTile.block_n, last_key = first_key + kTile.block_n - 1;
    const Seeing first(params, work, first_key);
    const Seeing last(params, work, min(last_key, work.seq_k - 1));
    begin = first.begin / kM;
    end = first_key < work.seq_k && first.begin < last.end ? (last.end + kM - 1) / kM : begin;
    clean_begin = last_key < work.seq_k ? (last.begin + kM - 1) / kM : end;
    clean_end = first.end == work.seq_q ? end : first.end / kM;
  }

  __device__ __forceinline__ int count() const { return end - begin; }
  __device__ __forceinline__ bool masked(int block) const {
    return block < clean_begin || block >= clean_end;
  }
};

// Blocks of keys [begin, end) that one of `rows` queries sees; those in [clean_begin, clean_end)
// are seen by all of them. Rows behind the last query are no matter: they are not stored.
template <BackwardTile const& kTile>
struct KeyBlocks {
  int begin = 0, end = 0, clean_begin = 0, clean_end = 0;

  __device__ __forceinline__ KeyBlocks(const BackwardParams& params, const Sequence& sequence,
                                       int first_query, int rows) {
    using Seen = SeenKeys<kTile.mask>;
    constexpr int kN = kTile.block_n;
    if (first_query >= sequence.seq_q) return;
    const Seen first(params, sequence, first_query);
    const Seen last(params, sequence, min(first_query + rows, sequence.seq_q) - 1);
    if (first.begin >= last.end) return;
    begin = first.begin / kN;
    end = (last.end + kN - 1) / kN;
    clean_begin = (last.begin + kN - 1) / kN;
    clean_end = max(first.end, 0) / kN;
  }

  __device__ __forceinline__ bool empty() const { return begin == end; }
  __device__ __forceinline__ bool masked(int block) const {
    return block < clean_begin || block >= clean_end;
  }
};

// How many thread blocks add to a block of dQ before the one of n_block: all thread blocks take
// their turns in this order. Under a mask the block of the last keys, which begins with these
// queries, comes first.
template <BackwardTile const& kTile>
__device__ __forceinline__ int turn_of(const BackwardParams& params, const BackwardWork& work,
                                       int m_block) {
  if (!params.last_block_first) return work.n_block;
  const int last_query = min((m_block + 1) * kTile.block_m, work.seq_q) - 1;
  const int last_key =
      min(last_query + work.seq_k - work.seq_q + params.window_right, work.seq_k - 1);
  return last_key / kTile.block_n - work.n_block;
}

// The queries of a thread block's steps: those of one head of the group after those of another.
template <BackwardTile const& kTile>
struct QuerySteps {
  static constexpr int kUnits = kTile.block_m / 64;
  int head;  // of the queries
  int block;
  int left;     // steps, with this one
  int unit;     // of 64 rows of the workspaces

  __device__ __forceinline__ QuerySteps(const BackwardParams& params, const BackwardWork& work,
                                        const QueryBlocks<kTile>& blocks)
      : head(work.key_head * params.heads_per_group),
        block(blocks.begin),
        left(blocks.count() * params.heads_per_group),
        unit(static_cast<int>(workspace_row(params, work.number, head, work.q_start) / 64) +
             block * kUnits) {}

  // From behind a head's last unit to the next head's first.
  static __device__ __forceinline__ int gap(const BackwardParams& params,
                                            const QueryBlocks<kTile>& blocks) {
    return static_cast<int>(params.workspace_rows / 64) - blocks.count() * kUnits;
  }

  __device__ __forceinline__ void advance(const BackwardParams& params,
                                          const QueryBlocks<kTile>& blocks) {
    --left;
    unit += kUnits;
    if (++block == blocks.end) {
      unit += gap(params, blocks);
      block = blocks.begin;
      ++head;
    }
  }
};

}  // namespace fa4

// Which keys a query sees.
#pragma once

#include <limits.h>

#include "columns.cuh"
#include "forward_params.h"
#include "scheduler.cuh"
#include "tiles.h"

namespace fa4 {

// Keys [begin, end) that a query row sees.
template <Mask kMask>
struct VisibleKeys {
  int begin, end;

  __device__ __forceinline__ VisibleKeys(const ForwardParams& params, const Work& work, int query) {
    const int diagonal = query + work.seq_k - work.seq_q;
    begin = kMask == Mask::kWindow ? max(0, diagonal - params.window_left) : 0;
    end = kMask == Mask::kFull ? work.seq_k : min(work.seq_k, diagonal + params.window_right + 1);
  }
};

// Blocks of kBlockN keys that a run of queries needs: at least one, so that rows without keys have
// a block in which everything is masked. [clean_begin, clean_end) are seen by all of them and need
// no mask.
template <Mask kMask, int kBlockN>
struct BlockRange {
  int begin, end, clean_begin, clean_end;

  __device__ __forceinline__ BlockRange(const ForwardParams& params, const Work& work,
                                        int first_query, int last_query) {
    const VisibleKeys<kMask> first(params, work, first_query), last(params, work, last_query);
    begin = first.begin / kBlockN;
    end = max(begin + 1, (last.end + kBlockN - 1) / kBlockN);
    clean_begin = (last.begin + kBlockN - 1) / kBlockN;
    clean_end = max(0, first.end) / kBlockN;
  }
};

// S[64, N] of a warp group, keys from first_key on; bounds are counted from the thread's first
// column of key 0. Bits of a register become predicates seven at a time (R2P): half the
// instructions of a comparison per element.
template <Mask kMask, int kBlockN>
__device__ __forceinline__ void apply_mask(float (&s)[kBlockN / 2], const int (&begin)[2],
                                           const int (&end)[2], int first_key) {
  constexpr int kColumns = kBlockN / 4;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int word = 0; 32 * word < kColumns; ++word) {
      uint32_t seen = columns_before(end[row] - first_key, word);
      if constexpr (kMask == Mask::kWindow) seen &= ~columns_before(begin[row] - first_key, word);
#pragma unroll
      for (int i = 0; i < 32 && 32 * word + i < kColumns; ++i) {
        const int column = 32 * word + i;
        if (!(seen >> i & 1)) s[4 * (column / 2) + 2 * row + column % 2] = -INFINITY;
      }
    }
  }
}

}  // namespace fa4

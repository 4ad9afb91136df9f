// Which keys a query sees.
#pragma once

#include <limits.h>

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

// Blocks of kBlockN keys that a run of queries needs: at least one, so that rows without keys have a block in which
// everything is masked. [clean_begin, clean_end) are seen by all of them and need no mask.
template <Mask kMask, int kBlockN>
struct BlockRange {
  int begin, end, clean_begin, clean_end;

  __device__ __forceinline__ BlockRange(const ForwardParams& params, const Work& work, int first_query,
                                        int last_query) {
    const VisibleKeys<kMask> first(params, work, first_query), last(params, work, last_query);
    begin = first.begin / kBlockN;
    end = max(begin + 1, (last.end + kBlockN - 1) / kBlockN);
    clean_begin = (last.begin + kBlockN - 1) / kBlockN;
    clean_end = max(0, first.end) / kBlockN;
  }
};

// S[64, N] of a warp group: a thread holds columns 8 j and 8 j + 1, counted from its first, of two rows. Bounds are
// counted from there too.
template <Mask kMask, int kBlockN>
__device__ __forceinline__ void apply_mask(float (&s)[kBlockN / 2], const int (&begin)[2], const int (&end)[2],
                                           int first_key) {
#pragma unroll
  for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i >> 1, column = 8 * j + (i & 1);
      const bool seen = column < end[row] - first_key &&
                        (kMask != Mask::kWindow || column >= begin[row] - first_key);
      if (!seen) s[4 * j + i] = -INFINITY;
    }
  }
}

}  // namespace fa4

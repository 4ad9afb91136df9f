// Scores of pairs of a query and a key that do not see each other.
#pragma once

#include "backward_work.cuh"
#include "columns.cuh"

namespace fa4 {

// Of a thread's two rows the columns that count, [begin, end), from the thread's first column on; a
// side may be open.
template <bool kBegins, bool kEnds>
struct SeenColumns {
  int begin[2], end[2];

  // X[64, C], columns from `first` on: `value` in those that do not count.
  template <int kColumns>
  __device__ __forceinline__ void apply(float (&x)[kColumns / 2], int first, float value) const {
    static_assert(kColumns <= 128, "a thread's columns are the bits of one word");
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t unseen = 0;
      if constexpr (kBegins) unseen = columns_before(begin[r] - first, 0);
      if constexpr (kEnds) unseen |= ~columns_before(end[r] - first, 0);
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) {
        if (unseen >> i & 1) x[4 * (i / 2) + 2 * r + i % 2] = value;
      }
    }
  }
};

// Of S^T the queries that see a thread's two keys.
template <Mask kMask>
struct ColumnMask : SeenColumns<true, kMask == Mask::kWindow> {
  __device__ __forceinline__ ColumnMask(const BackwardParams& params, const BackwardWork& work,
                                        int first_key, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const SeeingQueries<kMask> queries(params, work, first_key + 8 * r);
      this->begin[r] = queries.begin - 2 * (lane & 3);
      this->end[r] = queries.end - 2 * (lane & 3);
    }
  }
};

// Of S the keys that a thread's two queries see.
template <Mask kMask>
struct RowMask : SeenColumns<kMask == Mask::kWindow, true> {
  __device__ __forceinline__ RowMask(const BackwardParams& params, const Sequence& sequence,
                                     int first_query, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const SeenKeys<kMask> keys(params, sequence, first_query + 8 * r);
      this->begin[r] = keys.begin - 2 * (lane & 3);
      this->end[r] = keys.end - 2 * (lane & 3);
    }
  }
};

}  // namespace fa4

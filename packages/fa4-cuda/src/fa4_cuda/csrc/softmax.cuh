// Online softmax over blocks of keys (Milakov and Gimelshein, 2018), in base 2.
#pragma once

#include "ptx.cuh"

namespace fa4 {

// State of a thread's two rows. Each row belongs to the four lanes of a quad; row_max is the row's,
// row_sum this thread's part until total() adds the parts up.
template <int kBlockN>
struct OnlineSoftmax {
  float row_max[2], row_sum[2];
  float rescale[2];  // what O and row_sum of earlier blocks are to be multiplied with

  __device__ __forceinline__ void reset() {
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.f;
    rescale[0] = rescale[1] = 1.f;
  }

  // S becomes P = exp2(scale_log2 * (S - row_max)). kMasked: rows may have seen no key yet.
  template <bool kMasked>
  __device__ __forceinline__ void update(float (&s)[kBlockN / 2], float scale_log2) {
    // Four partial maxima and sums break the dependency chains.
    float part[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int j = 1; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) part[i] = fmaxf(part[i], s[4 * j + i]);
    }
    float scaled_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = fmaxf(part[2 * r], part[2 * r + 1]);
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      m = fmaxf(m, row_max[r]);
      scaled_max[r] = m * scale_log2;
      if (kMasked && m == -INFINITY) scaled_max[r] = 0.f;  // -inf - -inf would be NaN
      rescale[r] = ptx::exp2(fmaf(row_max[r], scale_log2, -scaled_max[r]));
      row_max[r] = m;
    }
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[4 * j + i] = ptx::exp2(fmaf(s[4 * j + i], scale_log2, -scaled_max[i >> 1]));
        part[i] = j == 0 ? s[i] : part[i] + s[4 * j + i];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      row_sum[r] = fmaf(row_sum[r], rescale[r], part[2 * r] + part[2 * r + 1]);
  }

  // O *= rescale, element (j, i) of O as of S.
  template <int kCount>
  __device__ __forceinline__ void rescale_output(float (&o)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) o[i] *= rescale[(i >> 1) & 1];
  }

  __device__ __forceinline__ void total() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
    }
  }
};

// P in the accumulator layout of S is, rounded to elements, the A operand of P V.
template <Element kElement, int kBlockN>
__device__ __forceinline__ void to_operand(uint32_t (&p)[kBlockN / 4],
                                           const float (&s)[kBlockN / 2]) {
#pragma unroll
  for (int i = 0; i < kBlockN / 4; ++i) p[i] = ptx::pack<kElement>(s[2 * i], s[2 * i + 1]);
}

}  // namespace fa4

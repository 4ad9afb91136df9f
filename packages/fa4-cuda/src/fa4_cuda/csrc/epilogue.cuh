// From a finished row block to global memory.
#pragma once

#include "mask.cuh"
#include "pipeline.cuh"
#include "quad.cuh"
#include "scheduler.cuh"
#include "softmax.cuh"

namespace fa4 {

// Rows of a warp group's slab: query heads that share their keys may be packed, row by row, into
// one slab.
struct SlabRow {
  int query;  // within the sequence
  int head;   // within the query heads
  bool valid;

  __device__ __forceinline__ SlabRow(const ForwardParams& params, const Work& work, int warpgroup,
                                     int row) {
    // row < 64 and packed_heads <= 64: the reciprocal's error stays far from the next integer.
    const int slab_query = static_cast<int>((row + 0.5f) * params.inverse_packed_heads);
    query = work.first_query + warpgroup * params.slab_queries + slab_query;
    head = work.head * params.packed_heads + row - slab_query * params.packed_heads;
    valid = slab_query < params.slab_queries && query < work.seq_q;
  }

  template <class T>
  __device__ __forceinline__ T* data(const TensorView& tensor, const Work& work) const {
    return static_cast<T*>(tensor.data) + work.batch * tensor.stride_batch +
           static_cast<int64_t>(work.q_start + query) * tensor.stride_seq +
           head * tensor.stride_head;
  }
};

// A thread's part of the O tile as 16-bit pairs: output[2 * g + r] are two columns of its row r
// within columns 8 g to 8 g + 7.
template <int kHeadDim>
using PackedOutput = uint32_t[kHeadDim / 4];

// O / row_sum, rounded. A row without keys is zero, whatever P = 0 was multiplied with.
template <Element kElement, int kHeadDim, int kBlockN>
__device__ __forceinline__ void normalize(PackedOutput<kHeadDim>& output, float (&o)[kHeadDim / 2],
                                          const OnlineSoftmax<kBlockN>& softmax) {
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) inverse[r] = ptx::reciprocal(softmax.row_sum[r]);
  const bool empty_row = softmax.row_sum[0] == 0.f || softmax.row_sum[1] == 0.f;
  if (__any_sync(~0u, empty_row)) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      if (softmax.row_sum[(i >> 1) & 1] == 0.f) o[i] = 0.f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) inverse[r] = softmax.row_sum[r] == 0.f ? 1.f : inverse[r];
  }
#pragma unroll
  for (int i = 0; i < kHeadDim / 4; ++i) {
    output[i] = ptx::pack<kElement>(o[2 * i] * inverse[i & 1], o[2 * i + 1] * inverse[i & 1]);
  }
}

template <int kBlockN>
__device__ __forceinline__ void store_lse(const ForwardParams& params, const Work& work,
                                          const SlabRow (&rows)[2],
                                          const OnlineSoftmax<kBlockN>& softmax, int lane) {
  if ((lane & 3) != 0) return;  // one of the row's quad
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float lse = softmax.row_sum[r] == 0.f
                          ? params.empty_lse
                          : softmax.row_max[r] * params.scale + __logf(softmax.row_sum[r]);
    if (rows[r].valid) {
      params.lse[work.batch * params.lse_stride_batch + rows[r].head * params.lse_stride_head +
                 work.q_start + rows[r].query] = lse;
    }
  }
}

// Straight from registers, 16 bytes a lane, 64 of each row together; rows and columns are clipped.
// Through shared memory and the copy engine O takes fewer instructions, but a fence, a barrier and
// the room of a second Q: 5 to 7% slower at S = 1024.
template <int kHeadDim>
__device__ __forceinline__ void store_registers(const ForwardParams& params, const Work& work,
                                                const SlabRow (&rows)[2],
                                                const PackedOutput<kHeadDim>& output, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint16_t* row = rows[r].data<uint16_t>(params.out, work);
#pragma unroll
    for (int g = 0; g < kHeadDim / 32; ++g) {
      uint32_t quad[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) quad[i] = output[8 * g + 2 * i + r];
      transpose_quad(quad, lane);
      const int column = 32 * g + 8 * (lane & 3);
      if (rows[r].valid && column < params.head_dim) {
        *reinterpret_cast<uint4*>(row + column) = make_uint4(quad[0], quad[1], quad[2], quad[3]);
      }
    }
  }
}

template <Element kElement>
__device__ __forceinline__ float to_float(uint16_t bits) {
  float value;
  if constexpr (kElement == Element::kHalf) {
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  } else {
    value = __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  return value;
}

// One row of O from the keys that it sees and nothing else, by a whole warp.
template <Element kElement, Mask kMask, int kHeadDim>
__device__ __forceinline__ void recompute_row(const ForwardParams& params, const Work& work,
                                              const SlabRow& row, float row_max, float row_sum,
                                              int lane) {
  constexpr int kColumns = kHeadDim / 32;
  const VisibleKeys<kMask> keys(params, work, row.query);
  const int64_t key_head = work.head / params.heads_per_group;
  const auto* q = row.data<const uint16_t>(params.q, work);
  const auto key_row = [&](const TensorView& tensor, int key) {
    return static_cast<const uint16_t*>(tensor.data) + work.batch * tensor.stride_batch +
           static_cast<int64_t>(work.k_start + key) * tensor.stride_seq +
           key_head * tensor.stride_head;
  };
  const float scale_log2 = params.negate_q ? -params.scale_log2 : params.scale_log2;
  float sum[kColumns] = {};
#pragma unroll 1
  for (int first = keys.begin; first < keys.end; first += 32) {
    float p = 0.f;
    if (first + lane < keys.end) {
      const uint16_t* k = key_row(params.k, first + lane);
      float s = 0.f;
#pragma unroll 1
      for (int d = 0; d < params.head_dim; ++d)
        s = fmaf(to_float<kElement>(q[d]), to_float<kElement>(k[d]), s);
      p = ptx::exp2(fmaf(s, scale_log2, -row_max * params.scale_log2));
    }
#pragma unroll 1
    for (int i = 0; i < min(32, keys.end - first); ++i) {
      const uint16_t* v = key_row(params.v, first + i);
      const float weight = __shfl_sync(~0u, p, i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c * 32 + lane < params.head_dim)
          sum[c] = fmaf(weight, to_float<kElement>(v[c * 32 + lane]), sum[c]);
      }
    }
  }
  uint16_t* out = row.data<uint16_t>(params.out, work);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (c * 32 + lane < params.head_dim) {
      out[c * 32 + lane] = static_cast<uint16_t>(ptx::pack<kElement>(sum[c] / row_sum, 0.f));
    }
  }
}

// Whether a thread's part of row r holds a NaN; of both rows: kBothRows.
constexpr int kBothRows = -1;
template <Element kElement, int kHeadDim, int r>
__device__ __forceinline__ bool has_nan(const PackedOutput<kHeadDim>& output) {
  constexpr int kFirst = r == kBothRows ? 0 : r, kStep = r == kBothRows ? 1 : 2;
  uint32_t worst[4] = {};  // four chains, so that their latencies overlap
#pragma unroll
  for (int i = kFirst; i < kHeadDim / 4; i += kStep)
    worst[i / kStep % 4] = ptx::max_nan<kElement>(worst[i / kStep % 4], output[i]);
  const uint32_t all = ptx::max_nan<kElement>(ptx::max_nan<kElement>(worst[0], worst[1]),
                                              ptx::max_nan<kElement>(worst[2], worst[3]));
  // NaN: exponent all ones and mantissa not zero.
  constexpr uint32_t kInfinity = kElement == Element::kHalf ? 0x7C00 : 0x7F80;
  return (all & 0x7FFF) > kInfinity || (all >> 16 & 0x7FFF) > kInfinity;
}

// Writes rows with a NaN again.
//
// A tile multiplies whole blocks of V, masked keys with P = 0. Where such a V is Inf or NaN, the
// row becomes NaN though it does not see it. Nothing short of reading all of V can tell before, and
// it happens to nobody without Inf or NaN in V: so rows that came out NaN are computed again,
// slowly. Rows that see a NaN come out NaN again.
//
template <Element kElement, Mask kMask, int kHeadDim>
__device__ __forceinline__ void recompute_nan_rows(const ForwardParams& params, const Work& work,
                                                   int warpgroup, int warp, int lane,
                                                   const SlabRow (&rows)[2],
                                                   const PackedOutput<kHeadDim>& output,
                                                   const float (&row_max)[2],
                                                   const float (&row_sum)[2]) {
  if (!__any_sync(~0u, has_nan<kElement, kHeadDim, kBothRows>(output))) return;
  const bool nan[2] = {has_nan<kElement, kHeadDim, 0>(output),
                       has_nan<kElement, kHeadDim, 1>(output)};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // A row whose sum is NaN saw a NaN or Inf in Q or K: it stays. A row without keys is zero
    // already.
    const bool again = rows[r].valid && row_sum[r] > 0.f && nan[r];
    uint32_t quads = __ballot_sync(~0u, again);
    __syncwarp();
#pragma unroll 1
    while (quads != 0) {
      const int quad = (__ffs(quads) - 1) >> 2;
      quads &= ~(0xFu << (4 * quad));
      recompute_row<kElement, kMask, kHeadDim>(
          params, work, SlabRow(params, work, warpgroup, warp * 16 + quad + 8 * r),
          __shfl_sync(~0u, row_max[r], 4 * quad), __shfl_sync(~0u, row_sum[r], 4 * quad), lane);
    }
  }
}

}  // namespace fa4

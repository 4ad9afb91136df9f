// Matrix products of a warp group: tiles in shared memory, descriptors, S = Q K^T and O += P V.
//
// A tile of R rows and D columns lies in shared memory as D / kColumns panels of [R, kColumns], one after another, each
// row of a panel as wide as the swizzle: 128 bytes, or 64 where D is no multiple of 64. The copy engine writes panels
// in this form, the tensor cores read them so, as K-major (Q, K) and as MN-major operands (V).
#pragma once

#include "ptx.cuh"
#include "wgmma_instructions.cuh"

namespace fa4 {

template <int kHeadDim>
struct Panel {
  static constexpr int kSwizzleBytes = kHeadDim % 64 == 0 ? 128 : 64;
  static constexpr int kColumns = kSwizzleBytes / kElementBytes;
  static constexpr int kCount = kHeadDim / kColumns;
  static_assert(kHeadDim % kColumns == 0);
  static constexpr int bytes(int rows) { return rows * kSwizzleBytes; }

  // Address of 16-byte chunk `chunk` of `row`. The swizzle exchanges chunks by bits of the row.
  static __device__ __forceinline__ uint32_t address(uint32_t panel, int row, int chunk) {
    const int key = kSwizzleBytes == 128 ? row & 7 : (row >> 1) & 3;
    return panel + row * kSwizzleBytes + ((chunk ^ key) << 4);
  }
};

// Descriptor of a swizzled operand. `leading_bytes`: from panel to panel of an MN-major operand (K-major ones do not
// use it). Groups of eight rows follow each other at once.
template <class PanelT>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes) {
  constexpr uint64_t kLayout = PanelT::kSwizzleBytes == 128 ? 1 : 2;
  constexpr uint64_t kStride = 8 * PanelT::kSwizzleBytes;
  return (static_cast<uint64_t>(address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(leading_bytes >> 4) << 16) |
         ((kStride >> 4) << 32) | (kLayout << 62);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler does not know that a wait writes accumulators: this keeps their uses behind it.
template <int kCount>
__device__ __forceinline__ void pin(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// S[64, N] = Q[64, D] K[N, D]^T, Q in shared memory. Sixteen columns of D a step.
template <Element kElement, int kHeadDim, int kBlockN>
__device__ __forceinline__ void issue_qk(float (&s)[kBlockN / 2], uint64_t q, uint64_t k) {
  using P = Panel<kHeadDim>;
  constexpr int kSteps = P::kColumns / 16;
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    const uint32_t column = (d % kSteps) * 32;
    WgmmaInstruction<kElement, kBlockN>::ss(s, q + ((d / kSteps * P::bytes(64) + column) >> 4),
                                            k + ((d / kSteps * P::bytes(kBlockN) + column) >> 4), d != 0);
  }
}

// The same with Q in registers, as load_a_fragments leaves it.
template <Element kElement, int kHeadDim, int kBlockN>
__device__ __forceinline__ void issue_qk(float (&s)[kBlockN / 2], const uint32_t (&q)[kHeadDim / 4], uint64_t k) {
  using P = Panel<kHeadDim>;
  constexpr int kSteps = P::kColumns / 16;
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    WgmmaInstruction<kElement, kBlockN>::rs(
        s, q + 4 * d, k + ((d / kSteps * P::bytes(kBlockN) + (d % kSteps) * 32) >> 4), d != 0);
  }
}

// O[64, D] += P[64, N] V[N, D], P in registers. Sixteen keys a step.
template <Element kElement, int kHeadDim, int kBlockN>
__device__ __forceinline__ void issue_pv(float (&o)[kHeadDim / 2], const uint32_t (&p)[kBlockN / 4], uint64_t v) {
  using P = Panel<kHeadDim>;
#pragma unroll
  for (int n = 0; n < kBlockN / 16; ++n) {
    WgmmaInstruction<kElement, kHeadDim>::rs_mn(o, p + 4 * n, v + n * (P::bytes(16) >> 4), 1);
  }
}

// This thread's part of a [64, D] tile in shared memory, as the A operand of its warp's sixteen rows.
template <int kHeadDim>
__device__ __forceinline__ void load_a_fragments(uint32_t (&a)[kHeadDim / 4], uint32_t tile, int warp, int lane) {
  using P = Panel<kHeadDim>;
  constexpr int kSteps = P::kColumns / 16;
  const int row = warp * 16 + (lane & 15);
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, P::address(tile + d / kSteps * P::bytes(64), row, d % kSteps * 2 + (lane >> 4)));
#pragma unroll
    for (int i = 0; i < 4; ++i) a[4 * d + i] = r[i];
  }
}

}  // namespace fa4

// Matrix products of a warp group: tiles in shared memory, descriptors, S = Q K^T and O += P V.
//
// A tile of R rows and D columns lies in shared memory as panels of [R, 64], one after another. A
// row of a panel is 128 bytes, swizzled. The copy engine writes panels in this form, the tensor
// cores read them so, as K-major (Q, K) and as MN-major operands (V). If D is no multiple of 64 the
// last panel is partly zeros: it costs room, but every box that the copy engine fetches has rows as
// long as it likes best.
#pragma once

#include "ptx.cuh"
#include "tiles.h"
#include "wgmma_instructions.cuh"

namespace fa4 {

constexpr int kPanelRowBytes = kPanelColumns * kElementBytes;
constexpr int kPanelSteps = kPanelColumns / 16;  // of wgmma, which takes 16 columns at a time

constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }

// Address of 16-byte chunk `chunk` of `row`: the swizzle exchanges chunks by the last bits of the
// row.
__device__ __forceinline__ uint32_t panel_address(uint32_t panel, int row, int chunk) {
  return panel + row * kPanelRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Descriptor of a swizzled operand. `leading_bytes`: from panel to panel of an MN-major operand
// (K-major ones do not use it). Groups of eight rows follow each other at once.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return (static_cast<uint64_t>(address & 0x3FFFF) >> 4) |
         (static_cast<uint64_t>(leading_bytes >> 4) << 16) |
         (static_cast<uint64_t>(panel_bytes(8) >> 4) << 32) | (kSwizzle128 << 62);
}

// The same where registers are short: made anew at every use. What the compiler can see of a
// descriptor it computes once for all its uses in a loop and keeps, then spills.
__device__ __forceinline__ uint64_t fresh_descriptor(uint32_t address, uint32_t leading_bytes) {
  asm volatile("" : "+r"(address));
  return matrix_descriptor(address, leading_bytes);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

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
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    const uint32_t column = (d % kPanelSteps) * 32;
    WgmmaInstruction<kElement, kBlockN>::ss(
        s, q + ((d / kPanelSteps * panel_bytes(64) + column) >> 4),
        k + ((d / kPanelSteps * panel_bytes(kBlockN) + column) >> 4), d != 0);
  }
}

// The same with Q in registers, as load_a_fragments leaves it.
template <Element kElement, int kHeadDim, int kBlockN>
__device__ __forceinline__ void issue_qk(float (&s)[kBlockN / 2], const uint32_t (&q)[kHeadDim / 4],
                                         uint64_t k) {
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    WgmmaInstruction<kElement, kBlockN>::rs(
        s, q + 4 * d, k + ((d / kPanelSteps * panel_bytes(kBlockN) + (d % kPanelSteps) * 32) >> 4),
        d != 0);
  }
}

// O[64, D] += P[64, N] V[N, D], P in registers. Sixteen keys a step.
template <Element kElement, int kHeadDim, int kBlockN>
__device__ __forceinline__ void issue_pv(float (&o)[kHeadDim / 2], const uint32_t (&p)[kBlockN / 4],
                                         uint64_t v) {
#pragma unroll
  for (int n = 0; n < kBlockN / 16; ++n) {
    WgmmaInstruction<kElement, kHeadDim>::rs_mn(o, p + 4 * n, v + n * (panel_bytes(16) >> 4), 1);
  }
}

// This thread's part of a [64, D] tile in shared memory, as the A operand of its warp's sixteen
// rows.
template <int kHeadDim>
__device__ __forceinline__ void load_a_fragments(uint32_t (&a)[kHeadDim / 4], uint32_t tile,
                                                 int warp, int lane) {
  const int row = warp * 16 + (lane & 15);
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, panel_address(tile + d / kPanelSteps * panel_bytes(64), row,
                                      d % kPanelSteps * 2 + (lane >> 4)));
#pragma unroll
    for (int i = 0; i < 4; ++i) a[4 * d + i] = r[i];
  }
}

}  // namespace fa4

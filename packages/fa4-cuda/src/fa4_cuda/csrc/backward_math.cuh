// The arithmetic of a backward step between its products, and the ways of dS, dQ, dK and dV.
//
// Scores are held transposed: a row is a key, a column a query; in dQ's own kernel they are not. A
// thread has rows `row` and `row + 8` of its warp's sixteen, and columns 8 j and 8 j + 1 from its
// first, 2 (lane % 4).
#pragma once

#include "backward_mask.cuh"
#include "backward_pipeline.cuh"
#include "epilogue.cuh"
#include "nan_watch.cuh"

namespace fa4 {

// P^T = exp2(scale_log2 * S^T - log2(e) * lse), rounded: the A operand of P^T dO.
template <Element kElement, int kBlockM>
__device__ __forceinline__ void probabilities(uint32_t (&p)[kBlockM / 4],
                                              const float (&s)[kBlockM / 2], float scale_log2,
                                              uint32_t negative_lse, int lane) {
#pragma unroll
  for (int j = 0; j < kBlockM / 8; ++j) {
    const float2 l = ptx::load_shared_float2(negative_lse + 32 * j + 8 * (lane & 3));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      p[2 * j + r] =
          ptx::pack<kElement>(ptx::exp2(fmaf(s[4 * j + 2 * r], scale_log2, l.x)),
                              ptx::exp2(fmaf(s[4 * j + 2 * r + 1], scale_log2, l.y)));
    }
  }
  __syncwarp();  // all lanes have read, before one of them lets go of the stage
}

// dS^T = P^T * (dP^T - delta), rounded: the A operand of dS^T Q.
template <Element kElement, int kBlockM>
__device__ __forceinline__ void score_gradients(uint32_t (&ds)[kBlockM / 4],
                                                const uint32_t (&p)[kBlockM / 4],
                                                const float (&dp)[kBlockM / 2], uint32_t delta,
                                                int lane) {
#pragma unroll
  for (int j = 0; j < kBlockM / 8; ++j) {
    const float2 d = ptx::load_shared_float2(delta + 32 * j + 8 * (lane & 3));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 weights = ptx::unpack<kElement>(p[2 * j + r]);
      ds[2 * j + r] = ptx::pack<kElement>(weights.x * (dp[4 * j + 2 * r] - d.x),
                                          weights.y * (dp[4 * j + 2 * r + 1] - d.y));
    }
  }
  __syncwarp();  // as above
}

// 64 rows of a warp group into panels [kPanelRows, 64] from first_row on: both swizzled and as
// operands are.
template <int kColumns, int kPanelRows>
__device__ __forceinline__ void store_operand(uint32_t tile, const uint32_t (&a)[kColumns / 4],
                                              int first_row, int warp, int lane) {
  const int row = first_row + warp * 16 + (lane & 15);
#pragma unroll
  for (int j = 0; j < kColumns / 8; j += 2) {
    ptx::stmatrix_x4(panel_address(tile + j / 8 * panel_bytes(kPanelRows), row,
                                   j % 8 + (lane >> 4)),
                     a[2 * j], a[2 * j + 1], a[2 * j + 2], a[2 * j + 3]);
  }
}

// Rows of a tile that belong to the next of packed sequences become zero, so that no NaN of theirs
// is multiplied with a zero of ours.
template <int kRows, int kPanels, int kThreads>
__device__ __forceinline__ void clear_rows(uint32_t tile, int first_row, int thread) {
#pragma unroll 1
  for (int i = thread; i < (kRows - first_row) * kPanels * 8; i += kThreads) {
    const int panel = i / (8 * (kRows - first_row)), rest = i - panel * 8 * (kRows - first_row);
    ptx::store_shared(tile + panel * panel_bytes(kRows) + first_row * kPanelRowBytes + 16 * rest,
                      {0, 0, 0, 0});
  }
  ptx::fence_proxy_async();
}

// S^T[64, M] = K[64, D] Q[M, D]^T, both in shared memory; K of kKeys rows. Or S = Q K^T.
template <Element kElement, int kHeadDim, int kKeys, int kBlockM>
__device__ __forceinline__ void issue_scores(float (&s)[kBlockM / 2], uint64_t k, uint64_t q) {
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    const uint32_t column = (d % kPanelSteps) * 32;
    WgmmaInstruction<kElement, kBlockM>::ss(
        s, k + ((d / kPanelSteps * panel_bytes(kKeys) + column) >> 4),
        q + ((d / kPanelSteps * panel_bytes(kBlockM) + column) >> 4), d != 0);
  }
}

// dQ[64, 64] = dS[64, N] K[N, 64] from a panel of dS^T [N, 64] and one of K.
template <Element kElement, int kBlockN>
__device__ __forceinline__ void issue_dq(float (&dq)[32], uint64_t ds, uint64_t k) {
#pragma unroll
  for (int n = 0; n < kBlockN / 16; ++n) {
    WgmmaInstruction<kElement, kPanelColumns>::ss_mn_mn(
        dq, ds + n * (panel_bytes(16) >> 4), k + n * (panel_bytes(16) >> 4), n != 0);
  }
}

// A panel of dQ to where a warp takes it away from, in the order of its sums.
template <int kTileIndex>
__device__ __forceinline__ void hand_over_dq(const BackwardLayout<kTileIndex>& layout,
                                             const float (&dq)[32], int warpgroup, int thread) {
  ptx::named_barrier_sync(kDqEmptyBarrier + warpgroup, kDqThreads);
  const uint32_t place = layout.dq + warpgroup * BackwardTile::kDqPanelBytes + thread * 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    ptx::store_shared(place + i * (128 * 16),
                      {__float_as_int(dq[4 * i]), __float_as_int(dq[4 * i + 1]),
                       __float_as_int(dq[4 * i + 2]), __float_as_int(dq[4 * i + 3])});
  }
  ptx::fence_proxy_async();
  ptx::named_barrier_arrive(kDqFullBarrier + warpgroup, kDqThreads);
}

// Row r of a thread's two of a gradient: rounded, 16 bytes a lane, if it is `there`.
template <Element kElement, int kHeadDim>
__device__ __forceinline__ void store_row(uint16_t* row, bool there, const float (&x)[kHeadDim / 2],
                                          int r, float scale, int head_dim, int lane,
                                          NanWatch<kElement>& watch) {
#pragma unroll
  for (int g = 0; g < kHeadDim / 32; ++g) {
    uint32_t quad[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * (4 * g + i) + 2 * r;
      quad[i] = ptx::pack<kElement>(x[at] * scale, x[at + 1] * scale);
      watch.see(quad[i]);
    }
    transpose_quad(quad, lane);
    const int column = 32 * g + 8 * (lane & 3);
    if (there && column < head_dim)
      *reinterpret_cast<uint4*>(row + column) = make_uint4(quad[0], quad[1], quad[2], quad[3]);
  }
}

// dK or dV of a warp group's rows. Whether there is a NaN among them is noted for those who come
// after.
template <Element kElement, int kHeadDim>
__device__ __forceinline__ void store_gradient(const BackwardParams& params,
                                               const BackwardWork& work, const TensorView& tensor,
                                               const float (&x)[kHeadDim / 2], float scale,
                                               int first_key, int lane) {
  NanWatch<kElement> watch;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = first_key + 8 * r;
    store_row<kElement, kHeadDim>(work.key(tensor, key, work.key_head), key < work.seq_k, x, r,
                                  scale, params.head_dim, lane, watch);
  }
  if (watch.found()) *params.nan_keys = 1;
}

}  // namespace fa4

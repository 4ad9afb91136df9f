// The backward's main kernel: one producer warp group, two consumers, as many thread blocks as
// multiprocessors. Where dQ has a kernel of its own this one computes dK and dV alone.
#pragma once

#include "backward_by_columns.cuh"
#include "backward_by_keys.cuh"
#include "backward_upkeep.cuh"
#include "backward_wide_keys.cuh"
#include "overlap.cuh"

namespace fa4 {

// By a warp, for one of the warp groups.
template <int kTileIndex, Element kElement>
__device__ __forceinline__ void take_dq_away(const BackwardParams& params,
                                             const BackwardLayout<kTileIndex>& layout,
                                             int warpgroup) {
  constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  const auto take = [&](auto taker) {
    if (params.turns == nullptr) {
      taker.run(SumsUpkeep<kBackwardTiles[kTileIndex], kElement>(
          params, warpgroup, layout.upkeep + warpgroup * kTile.upkeep_bytes_of_a_warp()));
    } else {
      taker.run_in_turns();
    }
  };
  if constexpr (kTile.splits_rows()) {
    take(DqTaker<kTileIndex, 1>(params, layout, warpgroup, 0, warpgroup));
  } else if constexpr (kTile.tends_sums()) {
    static_assert(kTile.panels() == 2);
    take(DqTaker<kTileIndex, 1>(params, layout, warpgroup, warpgroup, 0));
  } else {
    constexpr int kFirst = (kTile.panels() + 1) / 2, kSecond = kTile.panels() - kFirst;
    if (warpgroup == 0) {
      take(DqTaker<kTileIndex, kFirst>(params, layout, 0, 0, 0));
    } else {
      take(DqTaker<kTileIndex, kSecond>(params, layout, 1, kFirst, 0));
    }
  }
}

template <int kTileIndex, Element kElement>
__global__ void __launch_bounds__(kBackwardTiles[kTileIndex].threads(), 1)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  extern __shared__ uint8_t dynamic_shared[];
  const BackwardLayout<kTileIndex> layout(ptx::shared_address(dynamic_shared));
  if (threadIdx.x == 0) layout.init_barriers();
  __syncthreads();
  await_earlier_kernel();
  // Behind that: dQ's own kernel, if it comes next, needs the one before this to have ended.
  let_next_kernel_begin();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_decrease<kTile.producer_registers()>();
    if (threadIdx.x == 0) {
      produce_backward<Supply::kQueries>(params, layout);
    } else if (threadIdx.x == 32) {
      produce_backward<Supply::kGradients>(params, layout);
    } else if (threadIdx.x >= 64) {
      if constexpr (!kTile.has_dq_kernel())
        take_dq_away<kTileIndex, kElement>(params, layout, (threadIdx.x >> 5) - 2);
    }
  } else {
    ptx::setmaxnreg_increase<kTile.consumer_registers()>();
    if constexpr (kTile.split == Split::kKeys) {
      consume_by_keys<kTileIndex, kElement>(params, layout, warpgroup - 1);
    } else if constexpr (kTile.split == Split::kColumns) {
      if (warpgroup == 1) {
        consume_by_columns<kTileIndex, kElement, 0>(params, layout);
      } else {
        consume_by_columns<kTileIndex, kElement, 1>(params, layout);
      }
    } else if (warpgroup == 1) {
      compute_dv<kTileIndex, kElement>(params, layout);
    } else {
      compute_dk<kTileIndex, kElement>(params, layout);
    }
  }
}

}  // namespace fa4

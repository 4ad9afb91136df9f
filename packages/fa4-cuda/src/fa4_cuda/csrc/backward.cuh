// The backward's main kernel: one producer warp group, two consumers, as many thread blocks as
// multiprocessors.
#pragma once

#include "backward_by_columns.cuh"
#include "backward_by_keys.cuh"

namespace fa4 {

template <int kTileIndex, Element kElement>
__global__ void __launch_bounds__(kBackwardTiles[kTileIndex].threads(), 1)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  extern __shared__ uint8_t dynamic_shared[];
  const BackwardLayout<kTileIndex> layout(ptx::shared_address(dynamic_shared));
  if (threadIdx.x == 0) layout.init_barriers();
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_decrease<kTile.producer_registers()>();
    if (threadIdx.x == 0) {
      produce_backward<Supply::kQueries>(params, layout);
    } else if (threadIdx.x == 32) {
      produce_backward<Supply::kGradients>(params, layout);
    } else if (threadIdx.x >= 64) {
      const int owner = (threadIdx.x >> 5) - 2;
      constexpr int kFirst = (kTile.panels() + 1) / 2;
      if constexpr (kTile.splits_rows()) {
        take_dq_away<kTileIndex>(params, layout, owner, 0, 1, owner);
      } else {
        take_dq_away<kTileIndex>(params, layout, owner, owner * kFirst,
                                 owner == 0 ? kFirst : kTile.panels() - kFirst, 0);
      }
    }
  } else {
    ptx::setmaxnreg_increase<kTile.consumer_registers()>();
    if constexpr (kTile.split == Split::kKeys) {
      consume_by_keys<kTileIndex, kElement>(params, layout, warpgroup - 1);
    } else if (warpgroup == 1) {
      consume_by_columns<kTileIndex, kElement, 0>(params, layout);
    } else {
      consume_by_columns<kTileIndex, kElement, 1>(params, layout);
    }
  }
}

}  // namespace fa4

// The backward's main kernel: one producer warp group, two consumers, as many thread blocks as
// multiprocessors. Where dQ has a kernel of its own this one computes dK and dV alone.
#pragma once

#include "backward_by_keys.cuh"
#include "backward_wide_keys.cuh"

namespace fa4 {

template <int kTileIndex, Element kElement>
__global__ void __launch_bounds__(kBackwardTiles[kTileIndex].threads(), 1)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  extern __shared__ uint8_t dynamic_shared[];
  const BackwardLayout<kTileIndex> layout(ptx::shared_address(dynamic_shared));
  if (threadIdx.x == 0) layout.init_barriers();
  if constexpr (!kTile.has_dq_kernel()) {
    if (threadIdx.x < 128) layout.fill_zeros(threadIdx.x);
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_decrease<kTile.producer_registers()>();
    if (threadIdx.x == 0) {
      produce_backward<Supply::kQueries>(params, layout);
    } else if (threadIdx.x == 32) {
      produce_backward<Supply::kGradients>(params, layout);
    } else if (threadIdx.x >= 64) {
      if constexpr (!kTile.has_dq_kernel()) {
        DqTaker<kTileIndex> taker(params, layout, (threadIdx.x >> 5) - 2);
        params.turns == nullptr ? taker.run() : taker.run_in_turns();
      }
    }
  } else {
    ptx::setmaxnreg_increase<kTile.consumer_registers()>();
    if constexpr (kTile.split == Split::kKeys) {
      consume_by_keys<kTileIndex, kElement>(params, layout, warpgroup - 1);
    } else if (warpgroup == 1) {
      compute_dv<kTileIndex, kElement>(params, layout);
    } else {
      compute_dk<kTileIndex, kElement>(params, layout);
    }
  }
}

}  // namespace fa4

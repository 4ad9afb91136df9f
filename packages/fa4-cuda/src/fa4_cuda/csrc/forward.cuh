// The forward kernel: one producer warp group, two or three consumers, as many thread blocks as
// multiprocessors.
#pragma once

#include "consumer.cuh"
#include "producer.cuh"

namespace fa4 {

template <int kTileIndex, Element kElement>
__global__ void __launch_bounds__(kForwardTiles[kTileIndex].threads(), 1)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  constexpr ForwardTile kTile = kForwardTiles[kTileIndex];
  extern __shared__ uint8_t dynamic_shared[];
  const SharedLayout<kTileIndex> layout(ptx::shared_address(dynamic_shared));
  if (threadIdx.x == 0) layout.init_barriers();
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_decrease<kTile.producer_registers()>();
    if (threadIdx.x == 0) produce<kTileIndex>(params, layout);
  } else {
    ptx::setmaxnreg_increase<kTile.consumer_registers()>();
    consume<kTileIndex, kElement>(params, layout, warpgroup - 1);
  }
}

}  // namespace fa4

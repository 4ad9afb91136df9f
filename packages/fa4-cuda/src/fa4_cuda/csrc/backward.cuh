// The backward's main kernel: one producer warp group, two consumers, a thread block for every
// block of keys.
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
  // Packed sequences: as many blocks as the longest has.
  const BackwardWork work(params);
  if (work.n_block * kTile.block_n >= work.seq_k) return;
  if (threadIdx.x == 0) layout.init_barriers();
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_decrease<kTile.producer_registers()>();
    if (threadIdx.x == 0) {
      produce_backward<Supply::kQueries>(params, work, layout);
    } else if (threadIdx.x == 32) {
      produce_backward<Supply::kGradients>(params, work, layout);
    } else if (kTile.copies_dq() && threadIdx.x >= 64) {
      take_dq_away<kTileIndex>(params, work, layout, (threadIdx.x >> 5) - 2);
    }
  } else {
    ptx::setmaxnreg_increase<kTile.consumer_registers()>();
    if constexpr (kTile.split == Split::kKeys) {
      consume_by_keys<kTileIndex, kElement>(params, work, layout, warpgroup - 1);
    } else if (warpgroup == 1) {
      consume_by_columns<kTileIndex, kElement, 0>(params, work, layout);
    } else {
      consume_by_columns<kTileIndex, kElement, 1>(params, work, layout);
    }
  }
}

}  // namespace fa4

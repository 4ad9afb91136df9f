// Instantiates the backward kernels of a head dim. Included by backward_d*.cu.
#pragma once

#include <utility>

#include "backward.cuh"
#include "backward_launch.h"

namespace fa4 {

template <int kTileIndex, Element kElement>
cudaError_t launch_backward(const BackwardParams& params, int grid, cudaStream_t stream) {
  constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  const auto kernel = backward_kernel<kTileIndex, kElement>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTile.shared_bytes());
  if (error != cudaSuccess) return error;
  kernel<<<grid, kTile.threads(), kTile.shared_bytes(), stream>>>(params);
  return cudaGetLastError();
}

template <int kHeadDim, int... kTileIndices>
BackwardLauncher find_backward_launcher(int tile, Element element,
                                        std::integer_sequence<int, kTileIndices...>) {
  BackwardLauncher found = nullptr;
  const auto consider = [&]<int kTileIndex>() {
    if constexpr (kBackwardTiles[kTileIndex].head_dim == kHeadDim) {
      if (tile == kTileIndex) {
        found = element == Element::kHalf ? launch_backward<kTileIndex, Element::kHalf>
                                          : launch_backward<kTileIndex, Element::kBfloat16>;
      }
    }
  };
  (consider.template operator()<kTileIndices>(), ...);
  return found;
}

template <int kHeadDim>
BackwardLauncher backward_launcher(int tile, Element element) {
  return find_backward_launcher<kHeadDim>(tile, element,
                                          std::make_integer_sequence<int, kBackwardTileCount>());
}

}  // namespace fa4

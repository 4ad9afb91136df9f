// Instantiates the kernels of a head dim. Included by forward_d*.cu, which compile side by side.
#pragma once

#include <utility>

#include "forward.cuh"
#include "launch.h"

namespace fa4 {

template <int kTileIndex, Element kElement>
cudaError_t launch_forward(const ForwardParams& params, int grid, cudaStream_t stream) {
  constexpr ForwardTile kTile = kForwardTiles[kTileIndex];
  const auto kernel = forward_kernel<kTileIndex, kElement>;
  // Once per device would do; it takes less time than remembering which devices were seen.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           kTile.shared_bytes());
  if (error != cudaSuccess) return error;
  kernel<<<grid, kTile.threads(), kTile.shared_bytes(), stream>>>(params);
  return cudaGetLastError();
}

template <int kHeadDim, int... kTileIndices>
ForwardLauncher find_launcher(int tile, Element element,
                              std::integer_sequence<int, kTileIndices...>) {
  ForwardLauncher found = nullptr;
  const auto consider = [&]<int kTileIndex>() {
    if constexpr (kForwardTiles[kTileIndex].head_dim == kHeadDim) {
      if (tile == kTileIndex) {
        found = element == Element::kHalf ? launch_forward<kTileIndex, Element::kHalf>
                                          : launch_forward<kTileIndex, Element::kBfloat16>;
      }
    }
  };
  (consider.template operator()<kTileIndices>(), ...);
  return found;
}

template <int kHeadDim>
ForwardLauncher forward_launcher(int tile, Element element) {
  return find_launcher<kHeadDim>(tile, element,
                                 std::make_integer_sequence<int, kForwardTileCount>());
}

}  // namespace fa4

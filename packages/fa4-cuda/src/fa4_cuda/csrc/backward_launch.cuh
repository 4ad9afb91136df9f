// Instantiates the backward kernels of a head dim. Included by backward_d*.cu.
#pragma once

#include <utility>

#include "backward.cuh"
#include "backward_launch.h"
#include "backward_wide_queries.cuh"

namespace fa4 {

inline cudaError_t launch_with_room(void (*kernel)(BackwardParams), const BackwardParams& params,
                                    int grid, int threads, int shared_bytes, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

template <int kTileIndex, Element kElement>
cudaError_t launch_backward(const BackwardParams& params, int grid, cudaStream_t stream) {
  constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  return launch_with_room(backward_kernel<kTileIndex, kElement>, params, grid, kTile.threads(),
                          kTile.shared_bytes(), stream);
}

template <int kTileIndex, Element kElement>
cudaError_t launch_backward_queries(const BackwardParams& params, int grid, cudaStream_t stream) {
  constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  return launch_with_room(backward_query_kernel<kTileIndex, kElement>, params, grid,
                          kTile.threads(), kTile.query_shared_bytes(), stream);
}

template <int kTileIndex, Element kElement>
BackwardKernels kernels_of() {
  BackwardKernels kernels{.main = launch_backward<kTileIndex, kElement>};
  if constexpr (kBackwardTiles[kTileIndex].has_dq_kernel())
    kernels.queries = launch_backward_queries<kTileIndex, kElement>;
  return kernels;
}

template <int kHeadDim, int... kTileIndices>
BackwardKernels find_backward_kernels(int tile, Element element,
                                      std::integer_sequence<int, kTileIndices...>) {
  BackwardKernels found;
  const auto consider = [&]<int kTileIndex>() {
    if constexpr (kBackwardTiles[kTileIndex].head_dim == kHeadDim) {
      if (tile == kTileIndex) {
        found = element == Element::kHalf ? kernels_of<kTileIndex, Element::kHalf>()
                                          : kernels_of<kTileIndex, Element::kBfloat16>();
      }
    }
  };
  (consider.template operator()<kTileIndices>(), ...);
  return found;
}

template <int kHeadDim>
BackwardKernels backward_kernels(int tile, Element element) {
  return find_backward_kernels<kHeadDim>(tile, element,
                                         std::make_integer_sequence<int, kBackwardTileCount>());
}

}  // namespace fa4

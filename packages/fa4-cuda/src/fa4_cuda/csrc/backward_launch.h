// Between the backward's plan and its kernels.
#pragma once

#include <cuda_runtime.h>

#include "backward_params.h"
#include "element.h"

namespace fa4 {

using BackwardLauncher = cudaError_t (*)(const BackwardParams& params, int grid,
                                         cudaStream_t stream);

struct BackwardKernels {
  BackwardLauncher main = nullptr;
  BackwardLauncher queries = nullptr;  // dQ's own; null where the main kernel sums dQ
};

// The kernels of one head dim, compiled in backward_d<head_dim>.cu; null for tiles of others.
template <int kHeadDim>
BackwardKernels backward_kernels(int tile, Element element);

// Before the main kernel: row sums of dO * O, lse in base 2, zeros where that does not make them.
cudaError_t launch_backward_prepare(const BackwardParams& params, int tile_head_dim,
                                    Element element, cudaStream_t stream);
// After it, where dQ has no kernel of its own: dQ from its sums.
cudaError_t launch_backward_finish(const BackwardParams& params, int tile_head_dim, Element element,
                                   cudaStream_t stream);

}  // namespace fa4

// Between the plan and the kernels: one launcher per row of the tile table and element type.
#pragma once

#include <cuda_runtime.h>

#include "element.h"
#include "forward_params.h"

namespace fa4 {

using ForwardLauncher = cudaError_t (*)(const ForwardParams& params, int grid, cudaStream_t stream);

// The kernels of one head dim, compiled in forward_d<head_dim>.cu; null for tiles of others.
template <int kHeadDim>
ForwardLauncher forward_launcher(int tile, Element element);

cudaError_t launch_prepare_packed(const ForwardParams& params, cudaStream_t stream);

}  // namespace fa4

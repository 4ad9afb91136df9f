// Kernels of a stream that may begin before the one ahead of them has ended (kOverlapLaunches):
// what lies before `await_earlier_kernel` runs under the end of that one. Without, both sides of
// this are ordinary launches.
#pragma once

#include <cuda_runtime.h>

#include "backward_tiles.h"
#include "ptx.cuh"

namespace fa4 {

// Until all kernels that this one was launched behind have ended, and what they wrote is there.
// Before it nothing may be read that they write, nor written that they read.
__device__ __forceinline__ void await_earlier_kernel() {
  if constexpr (kOverlapLaunches) ptx::griddepcontrol_wait();
}

// Lets the next kernel of the stream begin when all thread blocks have come here, or ended.
__device__ __forceinline__ void let_next_kernel_begin() {
  if constexpr (kOverlapLaunches) ptx::griddepcontrol_launch_dependents();
}

// Behind a kernel of this library, which calls let_next_kernel_begin; `kernel` calls
// await_earlier_kernel. The first of a call is launched as usual: who comes before it is unknown.
template <class Params>
cudaError_t launch_behind(void (*kernel)(Params), int grid, int threads, int shared_bytes,
                          cudaStream_t stream, const Params& params) {
  if constexpr (kOverlapLaunches) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, params);
  } else {
    kernel<<<grid, threads, shared_bytes, stream>>>(params);
    return cudaGetLastError();
  }
}

}  // namespace fa4

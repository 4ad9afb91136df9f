// Which CUDA the driver and the runtime in this library are of; asked before anything that would
// fail without.
#include <cuda_runtime.h>

// Versions as CUDA writes them: 13000 is 13.0; the driver's is 0 where there is none. Returns
// CUDA's status.
extern "C" __attribute__((visibility("default"))) int fa4_driver_version(int* driver,
                                                                         int* runtime) {
  const cudaError_t error = cudaDriverGetVersion(driver);
  const cudaError_t second = cudaRuntimeGetVersion(runtime);
  return error != cudaSuccess ? error : second;
}

// What compute-sanitizer's synccheck makes of a named barrier at which two warps meet, each at a
// place of its own in the code, which PTX allows. `one` lets them meet at one place.
//
//     nvcc -gencode=arch=compute_90a,code=sm_90a -o two_places two_places.cu
//     compute-sanitizer --tool synccheck ./two_places [one]
#include <cstdio>

__global__ void meet(int* out, bool one_place) {
  __shared__ int x;
  if (threadIdx.x == 0) x = 7;
  if (one_place) {
    asm volatile("bar.sync 1, 64;" ::: "memory");
  } else if (threadIdx.x < 32) {
    asm volatile("bar.sync 1, 64;" ::: "memory");
    out[64 + threadIdx.x] = 1;
  } else {
    out[96 + threadIdx.x] = 2;
    asm volatile("bar.sync 1, 64;" ::: "memory");
    out[160 + threadIdx.x] = 3;
  }
  out[threadIdx.x] = x;
}

int main(int argc, char**) {
  int *out, found[64];
  cudaMalloc(&out, 1024);
  meet<<<1, 64>>>(out, argc > 1);
  cudaMemcpy(found, out, sizeof found, cudaMemcpyDeviceToHost);
  std::printf("%s: %d, %s\n", argc > 1 ? "one place" : "two places", found[63],
              cudaGetErrorString(cudaGetLastError()));
  return found[63] != 7;
}

// What compute-sanitizer's racecheck makes of cp.async.bulk: a ring of two buffers, filled by plain
// bulk copies and read by one warp, which lets go of a buffer when all its lanes have read it and
// used what they read: every lane arrives, or (`elected`) one does, behind __syncwarp. Nothing
// races. For comparison: `plain` copies by ordinary stores of one thread, `handed` by those of a
// warp, of which one lane arrives for all, behind __syncwarp.
//
//     nvcc -gencode=arch=compute_90a,code=sm_90a -o bulk_copies bulk_copies.cu
//     compute-sanitizer --tool racecheck ./bulk_copies [plain | elected | handed]
#include <cstdint>
#include <cstdio>
#include <cstring>

constexpr int kWords = 64, kRounds = 64;

__device__ void init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void wait(uint32_t barrier, int parity) {
  int done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

enum class Way { kBulk, kPlain, kElected, kHanded };

__global__ void ring(const float* source, float* sums, Way way) {
  __shared__ alignas(128) float buffers[2][kWords];
  __shared__ alignas(8) uint64_t barriers[4];  // full, full, empty, empty
  const auto address = [](const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  };
  if (threadIdx.x == 0) {
    const int readers = way == Way::kElected ? 1 : 32;
    for (int i = 0; i < 2; ++i) {
      init(address(&barriers[i]), 1);
      init(address(&barriers[2 + i]), readers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (way == Way::kHanded && threadIdx.x < 32) {
    for (int round = 0; round < kRounds; ++round) {
      const int at = round & 1, phase = round >> 1 & 1;
      wait(address(&barriers[2 + at]), phase ^ 1);
      for (int i = threadIdx.x; i < kWords; i += 32)
        buffers[at][i] = source[round * kWords + i];
      __syncwarp();
      if (threadIdx.x == 0) arrive(address(&barriers[at]));
    }
  } else if (threadIdx.x == 0) {
    for (int round = 0; round < kRounds; ++round) {
      const int at = round & 1, phase = round >> 1 & 1;
      const uint32_t full = address(&barriers[at]);
      wait(address(&barriers[2 + at]), phase ^ 1);
      if (way == Way::kPlain) {
        for (int i = 0; i < kWords; ++i) buffers[at][i] = source[round * kWords + i];
        arrive(full);
        continue;
      }
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full),
                   "r"(kWords * 4)
                   : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
          ::"r"(address(buffers[at])), "l"(source + round * kWords), "r"(kWords * 4), "r"(full)
          : "memory");
    }
  } else if (threadIdx.x >= 32) {
    const int lane = threadIdx.x - 32;
    for (int round = 0; round < kRounds; ++round) {
      const int at = round & 1, phase = round >> 1 & 1;
      wait(address(&barriers[at]), phase);
      atomicAdd(sums + round, buffers[at][lane] + buffers[at][32 + lane]);
      if (way == Way::kElected) __syncwarp();
      if (way != Way::kElected || lane == 0) arrive(address(&barriers[2 + at]));
    }
  }
}

int main(int argc, char** argv) {
  static float values[kRounds * kWords], found[kRounds];
  for (int i = 0; i < kRounds * kWords; ++i) values[i] = static_cast<float>(i % 7);
  float *source, *sums;
  cudaMalloc(&source, sizeof values);
  cudaMalloc(&sums, sizeof found);
  cudaMemcpy(source, values, sizeof values, cudaMemcpyHostToDevice);
  cudaMemset(sums, 0, sizeof found);
  const char* name = argc > 1 ? argv[1] : "bulk";
  const Way way = !std::strcmp(name, "plain")     ? Way::kPlain
                  : !std::strcmp(name, "elected") ? Way::kElected
                  : !std::strcmp(name, "handed")  ? Way::kHanded
                                                  : Way::kBulk;
  ring<<<1, 64>>>(source, sums, way);
  cudaMemcpy(found, sums, sizeof found, cudaMemcpyDeviceToHost);
  int wrong = 0;
  for (int round = 0; round < kRounds; ++round) {
    float expected = 0;
    for (int i = 0; i < kWords; ++i) expected += values[round * kWords + i];
    wrong += found[round] != expected;
  }
  std::printf("%s: %d of %d rounds wrong, %s\n", name, wrong, kRounds,
              cudaGetErrorString(cudaGetLastError()));
  return wrong != 0;
}

// Exchange among the four lanes that share a row of accumulators.
#pragma once

#include <stdint.h>

namespace fa4 {

// Exchanges four registers among the four lanes of a quad: afterwards r[i] is what lane i had in
// r[own lane].
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t received = __shfl_xor_sync(~0u, odd ? r[i] : r[i + 1], 1);
    r[i] = odd ? received : r[i];
    r[i + 1] = odd ? r[i + 1] : received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = __shfl_xor_sync(~0u, upper ? r[i] : r[i + 2], 2);
    r[i] = upper ? received : r[i];
    r[i + 2] = upper ? r[i + 2] : received;
  }
}

}  // namespace fa4

// Which columns of a row of scores count, among those that a thread holds.
#pragma once

#include <stdint.h>

namespace fa4 {

// A thread holds columns 8 j and 8 j + 1, counted from its first, of a row of S: one bit each, in
// 32-bit words. Those before `end` are set.
__device__ __forceinline__ uint32_t columns_before(int end, int word) {
  const int bits = min(32, max(0, 2 * (end >> 3) + min(end & 7, 2) - 32 * word));
  return bits == 32 ? ~0u : (1u << bits) - 1;
}

}  // namespace fa4

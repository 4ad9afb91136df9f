// Whether results hold a NaN.
#pragma once

#include "element.h"
#include "ptx.cuh"

namespace fa4 {

// Looks at pairs of rounded results, one instruction each.
template <Element kElement>
struct NanWatch {
  uint32_t worst = 0;

  __device__ __forceinline__ void see(uint32_t pair) {
    worst = ptx::max_nan<kElement>(worst, pair);
  }
  // NaN: exponent all ones and mantissa not zero.
  __device__ __forceinline__ bool found() const {
    constexpr uint32_t kInfinity = kElement == Element::kHalf ? 0x7C00 : 0x7F80;
    return (worst & 0x7FFF) > kInfinity || (worst >> 16 & 0x7FFF) > kInfinity;
  }
};

}  // namespace fa4

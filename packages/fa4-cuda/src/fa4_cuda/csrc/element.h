// The element types of Q, K, V and O.
#pragma once

namespace fa4 {

enum class Element : int { kHalf = 0, kBfloat16 = 1 };

constexpr int kElementBytes = 2;

}  // namespace fa4

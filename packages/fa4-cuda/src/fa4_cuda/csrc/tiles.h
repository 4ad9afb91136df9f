// The tile table: which kernels exist. Host, device and (through fa4_forward_tile) Python read this one.
//
// A tile is block_m = 64 * warpgroups query rows against block_n keys at a time. What bounds it, per multiprocessor:
//   shared memory  227 KB: q_stages * block_m * D + 2 * kv_stages * block_n * D elements of 2 bytes
//   registers      240 a thread with two consumer warp groups, 160 with three; O takes D / 2 of them, S block_n / 2,
//                  P block_n / 4, Q (if it stays in registers) D / 4, and about 25 are for everything else
// None of this changes what is computed, only how fast.
#pragma once

#include "element.h"

namespace fa4 {

enum class Mask : int {
  kFull = 0,    // every key of the sequence
  kCausal = 1,  // keys up to row + (seq_k - seq_q) + window_right
  kWindow = 2,  // and from row + (seq_k - seq_q) - window_left
};

struct ForwardTile {
  int head_dim;
  Mask mask;
  int warpgroups;  // consumers; one more produces
  int block_n;
  int q_stages;          // 2: O leaves through the stage its Q came in. 1: O leaves from registers
  int kv_stages;         // of K, and as many of V
  bool ping_pong;        // warp groups take turns to issue products, so that the softmax of one hides under the other's
  bool rescale_under_qk; // O *= exp2(old max - new max) while the next S = Q K^T runs, not before it is issued
  bool q_in_registers;

  constexpr int block_m() const { return 64 * warpgroups; }
  constexpr int threads() const { return 128 * (warpgroups + 1); }
  constexpr int q_bytes() const { return block_m() * head_dim * kElementBytes; }
  constexpr int kv_bytes() const { return block_n * head_dim * kElementBytes; }
  // 1024: alignment of swizzled tiles; 512: barriers and the ring of work.
  constexpr int shared_bytes() const {
    return 1024 + q_stages * q_bytes() + 2 * kv_stages * kv_bytes() + 512;
  }
  // setmaxnreg: 65536 registers in all, multiples of 8.
  constexpr int producer_registers() const { return warpgroups == 2 ? 40 : 32; }
  constexpr int consumer_registers() const { return warpgroups == 2 ? 232 : 160; }
};

inline constexpr int kMaxSharedBytes = 227 * 1024;

// Within a head dim and mask, the first row is the planner's default for long sequences.
inline constexpr ForwardTile kForwardTiles[] = {
    {.head_dim = 64, .mask = Mask::kFull, .warpgroups = 3, .block_n = 128, .q_stages = 2, .kv_stages = 3,
     .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 96, .mask = Mask::kFull, .warpgroups = 2, .block_n = 128, .q_stages = 2, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 128, .mask = Mask::kFull, .warpgroups = 2, .block_n = 128, .q_stages = 2, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 192, .mask = Mask::kFull, .warpgroups = 2, .block_n = 112, .q_stages = 1, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    {.head_dim = 256, .mask = Mask::kFull, .warpgroups = 2, .block_n = 80, .q_stages = 1, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    {.head_dim = 64, .mask = Mask::kCausal, .warpgroups = 3, .block_n = 128, .q_stages = 2, .kv_stages = 3,
     .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 96, .mask = Mask::kCausal, .warpgroups = 2, .block_n = 128, .q_stages = 2, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 128, .mask = Mask::kCausal, .warpgroups = 2, .block_n = 128, .q_stages = 2, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 192, .mask = Mask::kCausal, .warpgroups = 2, .block_n = 112, .q_stages = 1, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    {.head_dim = 256, .mask = Mask::kCausal, .warpgroups = 2, .block_n = 80, .q_stages = 1, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    {.head_dim = 64, .mask = Mask::kWindow, .warpgroups = 3, .block_n = 128, .q_stages = 2, .kv_stages = 3,
     .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 96, .mask = Mask::kWindow, .warpgroups = 2, .block_n = 128, .q_stages = 2, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 128, .mask = Mask::kWindow, .warpgroups = 2, .block_n = 128, .q_stages = 2, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 192, .mask = Mask::kWindow, .warpgroups = 2, .block_n = 96, .q_stages = 1, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    {.head_dim = 256, .mask = Mask::kWindow, .warpgroups = 2, .block_n = 64, .q_stages = 1, .kv_stages = 2,
     .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
};
inline constexpr int kForwardTileCount = sizeof(kForwardTiles) / sizeof(kForwardTiles[0]);

}  // namespace fa4

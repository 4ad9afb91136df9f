// The tile table: which kernels exist. Host, device and (through fa4_forward_tile_at) Python read
// this one.
//
// A tile is block_m = 64 * warpgroups query rows against block_n keys at a time. What bounds it,
// per multiprocessor:
//   shared memory  227 KB, for (q_stages * block_m + 2 * kv_stages * block_n) * D elements
//   registers      232 a thread with two consumer warp groups, 160 with three. O takes D / 2,
//                  S block_n / 2, P block_n / 4, Q (if it stays there) D / 4, all else about 25
// None of this changes what is computed, only how fast. Measurements are in the lab notebook,
// docs/kernels/fa4-cuda-forward.md.
#pragma once

#include "element.h"

namespace fa4 {

enum class Mask : int {
  kFull = 0,    // every key of the sequence
  kCausal = 1,  // keys up to row + (seq_k - seq_q) + window_right
  kWindow = 2,  // and from row + (seq_k - seq_q) - window_left
};

// Columns of a tile that lie together in shared memory (wgmma.cuh).
constexpr int kPanelColumns = 64;

struct ForwardTile {
  int head_dim;
  Mask mask;
  int warpgroups;  // consumers; one more produces
  int block_n;
  int q_stages;
  int kv_stages;  // of K, and as many of V
  // Warp groups take turns to issue products: the softmax of one hides under the other's.
  bool ping_pong;
  // O *= exp2(old max - new max) while the next S = Q K^T runs, not before it is issued.
  bool rescale_under_qk;
  // Q's room in shared memory is free again as soon as it was read.
  bool q_in_registers;

  constexpr int block_m() const { return 64 * warpgroups; }
  constexpr int threads() const { return 128 * (warpgroups + 1); }
  constexpr int panels() const { return (head_dim + kPanelColumns - 1) / kPanelColumns; }
  constexpr int q_bytes() const { return block_m() * panels() * kPanelColumns * kElementBytes; }
  constexpr int kv_bytes() const { return block_n * panels() * kPanelColumns * kElementBytes; }
  // 1024: alignment of swizzled tiles; 512: barriers and the ring of work.
  constexpr int shared_bytes() const {
    return 1024 + q_stages * q_bytes() + 2 * kv_stages * kv_bytes() + 512;
  }
  // setmaxnreg: 65536 registers in all, multiples of 8.
  constexpr int producer_registers() const { return warpgroups == 2 ? 40 : 32; }
  constexpr int consumer_registers() const { return warpgroups == 2 ? 232 : 160; }
};

inline constexpr int kMaxSharedBytes = 227 * 1024;

// A table: clang-format would make a column of it.
// clang-format off
inline constexpr ForwardTile kForwardTiles[] = {
    // head_dim 64: exponentials cost as much as products, so three warp groups rather than two
    // (+20% at S = 4096), in turns (+8%). S takes so many registers that Q must stay in shared
    // memory; a second stage of Q hides its way there. Stages of K and V: four are counted in one
    // register.
    {.head_dim = 64, .mask = Mask::kFull, .warpgroups = 3, .block_n = 128, .q_stages = 2,
     .kv_stages = 4, .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    {.head_dim = 64, .mask = Mask::kCausal, .warpgroups = 3, .block_n = 128, .q_stages = 2,
     .kv_stages = 4, .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    // Blocks of 112 keys, which do not align with 64 rows, are 4 to 7% slower at windows of 1024.
    {.head_dim = 64, .mask = Mask::kWindow, .warpgroups = 3, .block_n = 128, .q_stages = 2,
     .kv_stages = 4, .ping_pong = true, .rescale_under_qk = false, .q_in_registers = false},
    // head_dim 96: as 128. Three warp groups of 192 x 96 lose a tenth at S = 1024.
    {.head_dim = 96, .mask = Mask::kFull, .warpgroups = 2, .block_n = 128, .q_stages = 1,
     .kv_stages = 3, .ping_pong = true, .rescale_under_qk = false, .q_in_registers = true},
    {.head_dim = 96, .mask = Mask::kCausal, .warpgroups = 2, .block_n = 128, .q_stages = 1,
     .kv_stages = 3, .ping_pong = true, .rescale_under_qk = false, .q_in_registers = true},
    {.head_dim = 96, .mask = Mask::kWindow, .warpgroups = 2, .block_n = 128, .q_stages = 1,
     .kv_stages = 3, .ping_pong = true, .rescale_under_qk = false, .q_in_registers = true},
    // head_dim 128: Q in registers takes a fifth of the reads off shared memory, and power with
    // them: +2% at S = 16384, +5% causal. It leaves room for a third stage of K and V. A block of
    // 176 keys without it is as fast in long sequences and 5% slower at 1024.
    {.head_dim = 128, .mask = Mask::kFull, .warpgroups = 2, .block_n = 128, .q_stages = 1,
     .kv_stages = 3, .ping_pong = true, .rescale_under_qk = false, .q_in_registers = true},
    {.head_dim = 128, .mask = Mask::kCausal, .warpgroups = 2, .block_n = 128, .q_stages = 1,
     .kv_stages = 3, .ping_pong = true, .rescale_under_qk = false, .q_in_registers = true},
    {.head_dim = 128, .mask = Mask::kWindow, .warpgroups = 2, .block_n = 128, .q_stages = 1,
     .kv_stages = 3, .ping_pong = true, .rescale_under_qk = false, .q_in_registers = true},
    // head_dim 192: what fits. O is rescaled while scores are computed, not between products.
    {.head_dim = 192, .mask = Mask::kFull, .warpgroups = 2, .block_n = 112, .q_stages = 1,
     .kv_stages = 2, .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    {.head_dim = 192, .mask = Mask::kCausal, .warpgroups = 2, .block_n = 112, .q_stages = 1,
     .kv_stages = 2, .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    // Fewer keys a block: less of the first and the last is masked.
    {.head_dim = 192, .mask = Mask::kWindow, .warpgroups = 2, .block_n = 96, .q_stages = 1,
     .kv_stages = 2, .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    // head_dim 256: as 192. With 64 keys Q is read too often: -8% causal at S = 16384.
    {.head_dim = 256, .mask = Mask::kFull, .warpgroups = 2, .block_n = 80, .q_stages = 1,
     .kv_stages = 2, .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    {.head_dim = 256, .mask = Mask::kCausal, .warpgroups = 2, .block_n = 80, .q_stages = 1,
     .kv_stages = 2, .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
    // Two bounds in registers: 80 keys spill.
    {.head_dim = 256, .mask = Mask::kWindow, .warpgroups = 2, .block_n = 64, .q_stages = 1,
     .kv_stages = 2, .ping_pong = true, .rescale_under_qk = true, .q_in_registers = false},
};
// clang-format on
inline constexpr int kForwardTileCount = sizeof(kForwardTiles) / sizeof(kForwardTiles[0]);

}  // namespace fa4

// The tile table of the backward: which kernels exist. Host, device and (through
// fa4_backward_tile_at) Python read this one.
//
// A thread block keeps block_n keys and goes over the queries that see them, block_m at a time:
//   S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q,  dQ = dS K
// What bounds a tile, per multiprocessor:
//   shared memory  227 KB, for K, V, the stages of Q and dO, and what the two consumer warp groups
//                  exchange: dS and dQ on its way out, or P
//   registers      232 or 240 a thread. dK and dV take D / 2 each, both or one of them; S^T and
//                  dP^T block_m / 2, dQ 32
// Where dQ has a kernel of its own, that one keeps 128 queries and goes over the keys they see.
//
// None of this changes what is computed, only how fast. Measurements are in the lab notebook,
// docs/kernels/fa4-cuda-backward.md.
#pragma once

#include "tiles.h"

namespace fa4 {

// How the two consumer warp groups divide the work.
enum class Split : int {
  // Half of the keys each: P^T and dS^T stay in registers as operands of dV and dK.
  kKeys = 0,
  // A gradient each: one computes P and dV, the other dS and dK. P goes through shared memory, dS
  // nowhere: dQ has a kernel of its own, which computes both anew.
  kGradients = 1,
};

struct BackwardTile {
  int head_dim;
  Mask mask;  // kCausal also serves calls without a mask
  Split split;
  int block_m;
  int block_n;
  int q_stages;
  int do_stages;  // of dO
  // Of K and V, block_n keys each, in dQ's own kernel; none if the main kernel sums dQ.
  int k_stages = 0;
  int v_stages = 0;

  static constexpr int kWarpgroups = 2;
  // Rows of dQ's own kernel: 64 a warp group.
  static constexpr int kQueryRows = 64 * kWarpgroups;
  constexpr bool has_dq_kernel() const { return split == Split::kGradients; }
  constexpr int threads() const { return 128 * (kWarpgroups + 1); }
  constexpr int panels() const { return (head_dim + kPanelColumns - 1) / kPanelColumns; }
  constexpr int columns() const { return panels() * kPanelColumns; }
  // Warp groups that share keys divide dQ: rows if one panel holds all columns, else panels.
  constexpr bool splits_rows() const { return panels() == 1; }
  constexpr int kv_bytes() const { return block_n * columns() * kElementBytes; }
  constexpr int q_bytes() const { return block_m * columns() * kElementBytes; }
  constexpr int score_bytes() const { return block_m * block_n * kElementBytes; }
  // Two of dS, or one of P for each stage of Q.
  constexpr int exchange_slots() const { return has_dq_kernel() ? q_stages : 2; }
  constexpr int exchange_bytes() const { return exchange_slots() * score_bytes(); }
  // Each warp group's panel of dQ, 64 rows, on its way out through the copy engine; and zeros for
  // the sums that it is added to.
  static constexpr int kDqPanelBytes = 64 * kPanelColumns * 4;
  static constexpr int kZeroBytes = 2048;
  constexpr int dq_bytes() const { return has_dq_kernel() ? 0 : kWarpgroups * kDqPanelBytes; }
  constexpr int zero_bytes() const { return has_dq_kernel() ? 0 : kZeroBytes; }
  constexpr int row_bytes() const { return (q_stages + do_stages) * block_m * 4; }
  // 1024: alignment of swizzled tiles; 256: barriers.
  constexpr int shared_bytes() const {
    return 1024 + 2 * kv_bytes() + (q_stages + do_stages) * q_bytes() + exchange_bytes() +
           dq_bytes() + zero_bytes() + row_bytes() + 256;
  }
  // Of dQ's own kernel: Q and dO with lse and delta, and the stages of K and V.
  constexpr int query_shared_bytes() const {
    if (!has_dq_kernel()) return 0;
    return 1024 + 2 * (kQueryRows * columns() * kElementBytes + kQueryRows * 4) +
           (k_stages + v_stages) * kv_bytes() + 256;
  }
  // setmaxnreg: 168 a thread at launch is what there is to share out, multiples of 8.
  constexpr int producer_registers() const { return head_dim == 128 ? 24 : 40; }
  constexpr int consumer_registers() const { return head_dim == 128 ? 240 : 232; }
};

// Rows of a sequence that workspaces hold: a multiple of every block_m.
constexpr int kRowAlignment = 128;

// clang-format off
inline constexpr BackwardTile kBackwardTiles[] = {
    // head_dim 64: S and dP of 128 queries fit beside dK and dV, and the operands that are read
    // from shared memory serve twice as many products as with 64.
    {.head_dim = 64, .mask = Mask::kCausal, .split = Split::kKeys, .block_m = 128, .block_n = 128,
     .q_stages = 3, .do_stages = 2},
    {.head_dim = 64, .mask = Mask::kWindow, .split = Split::kKeys, .block_m = 128, .block_n = 128,
     .q_stages = 3, .do_stages = 2},
    // head_dim 96: as 128; the last panel is half empty.
    {.head_dim = 96, .mask = Mask::kCausal, .split = Split::kKeys, .block_m = 64, .block_n = 128,
     .q_stages = 3, .do_stages = 2},
    {.head_dim = 96, .mask = Mask::kWindow, .split = Split::kKeys, .block_m = 64, .block_n = 128,
     .q_stages = 3, .do_stages = 2},
    // head_dim 128: dK and dV leave room for the scores of 64 queries, which makes shared memory as
    // busy as the products. A fourth stage of Q loses 1 to 2%; a part of dQ from registers 4%.
    {.head_dim = 128, .mask = Mask::kCausal, .split = Split::kKeys, .block_m = 64, .block_n = 128,
     .q_stages = 3, .do_stages = 2},
    {.head_dim = 128, .mask = Mask::kWindow, .split = Split::kKeys, .block_m = 64, .block_n = 128,
     .q_stages = 3, .do_stages = 2},
    // head_dim 192: what fits. Every stage more lets one warp group run further ahead of the other.
    {.head_dim = 192, .mask = Mask::kCausal, .split = Split::kGradients, .block_m = 64,
     .block_n = 64, .q_stages = 3, .do_stages = 3, .k_stages = 3, .v_stages = 2},
    {.head_dim = 192, .mask = Mask::kWindow, .split = Split::kGradients, .block_m = 64,
     .block_n = 64, .q_stages = 3, .do_stages = 3, .k_stages = 3, .v_stages = 2},
    // head_dim 256: what fits. V needs one stage less than K, which is read by two products a step
    // apart.
    {.head_dim = 256, .mask = Mask::kCausal, .split = Split::kGradients, .block_m = 64,
     .block_n = 64, .q_stages = 2, .do_stages = 2, .k_stages = 2, .v_stages = 1},
    {.head_dim = 256, .mask = Mask::kWindow, .split = Split::kGradients, .block_m = 64,
     .block_n = 64, .q_stages = 2, .do_stages = 2, .k_stages = 2, .v_stages = 1},
};
// clang-format on
inline constexpr int kBackwardTileCount = sizeof(kBackwardTiles) / sizeof(kBackwardTiles[0]);

// One of a head dim's, for what is the same in all of them: how the work is divided.
constexpr BackwardTile any_tile_of(int tile_head_dim) {
  for (const BackwardTile& tile : kBackwardTiles) {
    if (tile.head_dim == tile_head_dim) return tile;
  }
  return {};
}

}  // namespace fa4

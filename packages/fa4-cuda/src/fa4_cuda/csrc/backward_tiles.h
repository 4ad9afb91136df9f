// The tile table of the backward: which kernels exist. Host, device and (through
// fa4_backward_tile_at) Python read this one.
//
// A thread block keeps block_n keys and goes over the queries that see them, block_m at a time:
//   S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q,  dQ = dS K
// What bounds a tile, per multiprocessor:
//   shared memory  227 KB, for K, V, the stages of Q and dO, and what the two consumer warp groups
//                  exchange: dS, and P where they share columns, and dQ on its way out
//   registers      232 or 240 a thread. dK and dV take D / 2 each where the warp groups share keys,
//                  half of it where they share columns; S^T and dP^T block_m / 2, dQ 32
// None of this changes what is computed, only how fast. Measurements are in the lab notebook,
// docs/kernels/fa4-cuda-backward.md.
#pragma once

#include "tiles.h"

namespace fa4 {

// How the two consumer warp groups divide the work.
enum class Split : int {
  // Half of the keys each: P^T and dS^T stay in registers as operands of dV and dK.
  kKeys = 0,
  // Half of the columns of dQ, dK and dV each, which would not fit into registers otherwise. One
  // computes P, the other dS, and both go through shared memory.
  kColumns = 1,
};

struct BackwardTile {
  int head_dim;
  Mask mask;  // kCausal also serves calls without a mask
  Split split;
  int block_m;
  int block_n;
  int q_stages;
  int do_stages;  // of dO
  // Of the eight chunks of a panel of dQ, how many are added to their sums from registers. The rest
  // goes through the copy engine, which is faster, but takes shared memory.
  int dq_direct;
  // Chunks that there is room for on that way. Where the order of additions matters all take it.
  int dq_staged;

  static constexpr int kWarpgroups = 2;
  constexpr int threads() const { return 128 * (kWarpgroups + 1); }
  constexpr int panels() const { return (head_dim + kPanelColumns - 1) / kPanelColumns; }
  constexpr int columns() const { return panels() * kPanelColumns; }
  // Warp groups that share keys divide dQ: rows if one panel holds all columns, else panels.
  constexpr bool splits_rows() const { return panels() == 1; }
  constexpr int kv_bytes() const { return block_n * columns() * kElementBytes; }
  constexpr int q_bytes() const { return block_m * columns() * kElementBytes; }
  constexpr int score_bytes() const { return block_m * block_n * kElementBytes; }
  // Two of dS, or one of dS and one of P.
  constexpr int exchange_bytes() const { return 2 * score_bytes(); }
  static constexpr int kDqChunkBytes = 128 * 16;  // 64 rows, 8 columns: 16 bytes a thread
  static constexpr int kDqChunks = kPanelColumns / 8;
  // Room for each warp group's chunks on their way out through the copy engine.
  constexpr int dq_bytes() const { return kWarpgroups * dq_staged * kDqChunkBytes; }
  constexpr int row_bytes() const { return (q_stages + do_stages) * block_m * 4; }
  // 1024: alignment of swizzled tiles; 256: barriers.
  constexpr int shared_bytes() const {
    return 1024 + 2 * kv_bytes() + (q_stages + do_stages) * q_bytes() + exchange_bytes() +
           dq_bytes() + row_bytes() + 256;
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
     .q_stages = 3, .do_stages = 2, .dq_direct = 0, .dq_staged = 8},
    {.head_dim = 64, .mask = Mask::kWindow, .split = Split::kKeys, .block_m = 128, .block_n = 128,
     .q_stages = 3, .do_stages = 2, .dq_direct = 0, .dq_staged = 8},
    // head_dim 96: as 128; the last panel is half empty.
    {.head_dim = 96, .mask = Mask::kCausal, .split = Split::kKeys, .block_m = 64, .block_n = 128,
     .q_stages = 3, .do_stages = 2, .dq_direct = 0, .dq_staged = 8},
    {.head_dim = 96, .mask = Mask::kWindow, .split = Split::kKeys, .block_m = 64, .block_n = 128,
     .q_stages = 3, .do_stages = 2, .dq_direct = 0, .dq_staged = 8},
    // head_dim 128: dK and dV leave room for the scores of 64 queries, which makes shared memory as
    // busy as the products. A fourth stage of Q loses 1 to 2%; a part of dQ from registers 4%.
    {.head_dim = 128, .mask = Mask::kCausal, .split = Split::kKeys, .block_m = 64, .block_n = 128,
     .q_stages = 3, .do_stages = 2, .dq_direct = 0, .dq_staged = 8},
    {.head_dim = 128, .mask = Mask::kWindow, .split = Split::kKeys, .block_m = 64, .block_n = 128,
     .q_stages = 3, .do_stages = 2, .dq_direct = 0, .dq_staged = 8},
    // head_dim 192: as 256, and there is room for more of everything.
    {.head_dim = 192, .mask = Mask::kCausal, .split = Split::kColumns, .block_m = 64,
     .block_n = 64, .q_stages = 3, .do_stages = 2, .dq_direct = 0, .dq_staged = 8},
    {.head_dim = 192, .mask = Mask::kWindow, .split = Split::kColumns, .block_m = 64,
     .block_n = 64, .q_stages = 3, .do_stages = 2, .dq_direct = 0, .dq_staged = 8},
    // head_dim 256: what fits. With two stages of Q and all of dQ through the copy engine 14%
    // slower; the additions to dQ are the limit, twice as many bytes a product as at 128.
    {.head_dim = 256, .mask = Mask::kCausal, .split = Split::kColumns, .block_m = 64,
     .block_n = 64, .q_stages = 3, .do_stages = 1, .dq_direct = 4, .dq_staged = 4},
    {.head_dim = 256, .mask = Mask::kWindow, .split = Split::kColumns, .block_m = 64,
     .block_n = 64, .q_stages = 3, .do_stages = 1, .dq_direct = 4, .dq_staged = 4},
};
// clang-format on
inline constexpr int kBackwardTileCount = sizeof(kBackwardTiles) / sizeof(kBackwardTiles[0]);

}  // namespace fa4

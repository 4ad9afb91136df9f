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
// Where dQ has a kernel of its own, that one keeps 128 queries and goes over the keys they see.
//
// None of this changes what is computed, only how fast. Measurements are in the lab notebook,
// docs/kernels/fa4-cuda-backward.md.
#pragma once

#include "tiles.h"

// Choices that have not been measured yet, to be made where the kernels are compiled
// (build_kernels.py --define NAME) until they have been.
#ifndef FA4_WIDE_DQ_KERNEL
#define FA4_WIDE_DQ_KERNEL 0
#endif
#ifndef FA4_OVERLAP_LAUNCHES
#define FA4_OVERLAP_LAUNCHES 0
#endif
#ifndef FA4_ZERO_DQ_AHEAD
#define FA4_ZERO_DQ_AHEAD 0
#endif
#ifndef FA4_CONVERT_DQ_BEHIND
#define FA4_CONVERT_DQ_BEHIND 0
#endif

namespace fa4 {

// Whether dQ of wide heads (over 128) has a kernel of its own.
inline constexpr bool kWideDqKernel = FA4_WIDE_DQ_KERNEL;
// Whether a kernel of the backward may begin before the one ahead of it has ended.
inline constexpr bool kOverlapLaunches = FA4_OVERLAP_LAUNCHES;
// Whether the main kernel zeroes the sums of dQ of heads that come later, and whether it makes dQ
// of those that are complete, both under its products, where its warp groups share keys.
inline constexpr bool kZeroDqAhead = FA4_ZERO_DQ_AHEAD;
inline constexpr bool kConvertDqBehind = FA4_CONVERT_DQ_BEHIND;

// How the two consumer warp groups divide the work.
enum class Split : int {
  // Half of the keys each: P^T and dS^T stay in registers as operands of dV and dK.
  kKeys = 0,
  // Half of the columns of dQ, dK and dV each, which would not fit into registers otherwise. One
  // computes P, the other dS, and both go through shared memory.
  kColumns = 1,
  // A gradient each: one computes P and dV, the other dS and dK. P goes through shared memory, dS
  // nowhere: dQ has a kernel of its own, which computes both anew.
  kGradients = 2,
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
  // Of K and V, block_n keys each, in dQ's own kernel; none if the main kernel sums dQ.
  int k_stages = 0;
  int v_stages = 0;

  static constexpr int kWarpgroups = 2;
  // Rows of dQ's own kernel: 64 a warp group.
  static constexpr int kQueryRows = 64 * kWarpgroups;
  constexpr bool has_dq_kernel() const { return split == Split::kGradients; }
  constexpr bool zeroes_ahead() const { return kZeroDqAhead && split == Split::kKeys; }
  constexpr bool converts_behind() const { return kConvertDqBehind && split == Split::kKeys; }
  constexpr bool tends_sums() const { return zeroes_ahead() || converts_behind(); }
  constexpr int threads() const { return 128 * (kWarpgroups + 1); }
  constexpr int panels() const { return (head_dim + kPanelColumns - 1) / kPanelColumns; }
  constexpr int columns() const { return panels() * kPanelColumns; }
  // Warp groups that share keys divide dQ: rows if one panel holds all columns, else panels.
  constexpr bool splits_rows() const { return panels() == 1; }
  constexpr int kv_bytes() const { return block_n * columns() * kElementBytes; }
  constexpr int q_bytes() const { return block_m * columns() * kElementBytes; }
  constexpr int score_bytes() const { return block_m * block_n * kElementBytes; }
  // Two of dS, or one of dS and one of P; or one of P for each stage of Q.
  constexpr int exchange_slots() const { return has_dq_kernel() ? q_stages : 2; }
  constexpr int exchange_bytes() const { return exchange_slots() * score_bytes(); }
  static constexpr int kDqChunkBytes = 128 * 16;  // 64 rows, 8 columns: 16 bytes a thread
  static constexpr int kDqChunks = kPanelColumns / 8;
  // Room for each warp group's chunks on their way out through the copy engine.
  constexpr int dq_bytes() const { return kWarpgroups * dq_staged * kDqChunkBytes; }
  // Of each warp that takes dQ away: what it has to remember and its barriers, zeros to copy from,
  // and slices of sums that it converts.
  static constexpr int kNoteBytes = 80;
  static constexpr int kZeroBytes = 2048;
  static constexpr int kSliceBytes = 16 * 32 * 4;  // 16 rows, 32 columns
  static constexpr int kSlicesAtOnce = 2;
  constexpr int upkeep_bytes_of_a_warp() const {
    return (tends_sums() ? kNoteBytes : 0) + (zeroes_ahead() ? kZeroBytes : 0) +
           (converts_behind() ? kSlicesAtOnce * kSliceBytes : 0);
  }
  constexpr int upkeep_bytes() const { return kWarpgroups * upkeep_bytes_of_a_warp(); }
  constexpr int row_bytes() const { return (q_stages + do_stages) * block_m * 4; }
  // 1024: alignment of swizzled tiles; 256: barriers.
  constexpr int shared_bytes() const {
    return 1024 + 2 * kv_bytes() + (q_stages + do_stages) * q_bytes() + exchange_bytes() +
           dq_bytes() + upkeep_bytes() + row_bytes() + 256;
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
constexpr BackwardTile wide_tile(int head_dim, Mask mask) {
  if (kWideDqKernel) {
    return head_dim == 192
        // What fits: every stage more lets one warp group run further ahead of the other.
        ? BackwardTile{.head_dim = 192, .mask = mask, .split = Split::kGradients, .block_m = 64,
                       .block_n = 64, .q_stages = 3, .do_stages = 3, .dq_direct = 0,
                       .dq_staged = 0, .k_stages = 3, .v_stages = 2}
        // What fits. V needs one stage less than K, which is read by two products a step apart.
        : BackwardTile{.head_dim = 256, .mask = mask, .split = Split::kGradients, .block_m = 64,
                       .block_n = 64, .q_stages = 2, .do_stages = 2, .dq_direct = 0,
                       .dq_staged = 0, .k_stages = 2, .v_stages = 1};
  }
  return head_dim == 192
      // As 256, and there is room for more of everything.
      ? BackwardTile{.head_dim = 192, .mask = mask, .split = Split::kColumns, .block_m = 64,
                     .block_n = 64, .q_stages = 3, .do_stages = 2, .dq_direct = 0, .dq_staged = 8}
      // What fits. With two stages of Q and all of dQ through the copy engine 14% slower; the
      // additions to dQ are the limit, twice as many bytes a product as at 128.
      : BackwardTile{.head_dim = 256, .mask = mask, .split = Split::kColumns, .block_m = 64,
                     .block_n = 64, .q_stages = 3, .do_stages = 1, .dq_direct = 4, .dq_staged = 4};
}

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
    wide_tile(192, Mask::kCausal),
    wide_tile(192, Mask::kWindow),
    wide_tile(256, Mask::kCausal),
    wide_tile(256, Mask::kWindow),
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

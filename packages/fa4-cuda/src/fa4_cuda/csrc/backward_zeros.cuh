// Zeros for the sums of dQ, under the products, by the warps that take dQ away: the sums of a head
// are zeroed a few tiles before they are added to, so that they are in L2 when they are.
//
// Every tile has a share in the sums of the key head whose tiles come zero_lead later: units of 64
// rows, of all query heads of the group. All tiles of a head together have all of them, and a
// counter of each head says how many have zeroed theirs. The kernel before zeroes the sums of the
// first zero_lead tiles.
//
// Both functions are for one thread of such a warp, where a tile begins: the warp group that shares
// it has a step to make before there is anything to add.
#pragma once

#include "backward_work.cuh"
#include "ptx.cuh"

namespace fa4 {

// Warps that share a share, unit by unit.
constexpr int kZeroingWarps = BackwardTile::kWarpgroups;

// Zeroes the share that falls to a tile, and says so. `zeros`: kZeroBytes of them in shared memory.
template <BackwardTile const& kTile>
__device__ __forceinline__ void zero_ahead(const BackwardParams& params, int tile, uint32_t zeros,
                                           int warp) {
  constexpr int kUnitBytes = 64 * kTile.head_dim * 4;
  static_assert(kUnitBytes % BackwardTile::kZeroBytes == 0 && kZeroingWarps == 2);
  const int later = tile + params.zero_lead;
  if (later >= params.tiles) return;
  const TilePlace place(params, later, params.heads_k);
  const Sequence sequence(params, place.sequence);
  const int units = (sequence.seq_q + 63) / 64;
  const int share = (units + params.n_blocks - 1) / params.n_blocks;
  const int end = min(units, (place.block + 1) * share);
  const int64_t first_row = workspace_row(params, sequence.number,
                                          place.head * params.heads_per_group, sequence.q_start);
  // A share may be a single unit: not always the same warp's.
  const int begin = place.block * share + (warp ^ (tile & 1));
#pragma unroll 1
  for (int unit = begin; unit < end; unit += kZeroingWarps) {
    float* sums = params.dq_sums + dq_panel(first_row + unit * 64, kTile.head_dim, 0);
#pragma unroll 1
    for (int head = 0; head < params.heads_per_group; ++head) {
#pragma unroll
      for (int byte = 0; byte < kUnitBytes; byte += BackwardTile::kZeroBytes)
        ptx::bulk_store(sums + byte / 4, zeros, BackwardTile::kZeroBytes);
      sums += params.workspace_rows * kTile.head_dim;
    }
  }
  if (begin < end) {
    ptx::bulk_commit();
    ptx::bulk_wait();
  }
  // The wait was for this thread's eyes only: hence the release.
  ptx::add_release(params.zeroed + place.flat_head, 1);
}

// Until the sums of a tile's head are zero. They are zeroed where earlier tiles begin, and every
// thread block, each of which runs, since tiles are drawn, takes its tiles in ascending order: so
// the first tile of those that wait has its zeros.
__device__ __forceinline__ void await_zeros(const BackwardParams& params, int tile) {
  if (tile < params.zero_lead) return;
  const int* const zeroed = params.zeroed + TilePlace(params, tile, params.heads_k).flat_head;
  while (ptx::load_acquire(zeroed) != kZeroingWarps * params.n_blocks) {
  }
  ptx::fence_proxy_async_global();
}

}  // namespace fa4

// Shared memory of a thread block of the backward, its barriers, and who fills it.
#pragma once

#include "backward_work.cuh"
#include "pipeline.cuh"

namespace fa4 {

template <int kTileIndex>
struct BackwardLayout {
  static constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  static constexpr int kRowBytes = kTile.block_m * 4;  // of negative_lse and of delta

  using QRing = Ring<kTile.q_stages>;
  using DoRing = Ring<kTile.do_stages>;
  using OnceRing = Ring<1>;

  uint32_t k, v, q, grad_out, exchange, dq, negative_lse, delta, barriers;

  __device__ __forceinline__ explicit BackwardLayout(uint32_t dynamic_shared) {
    k = (dynamic_shared + 1023) & ~1023u;
    v = k + kTile.kv_bytes();
    q = v + kTile.kv_bytes();
    grad_out = q + kTile.q_stages * kTile.q_bytes();
    exchange = grad_out + kTile.do_stages * kTile.q_bytes();
    dq = exchange + kTile.exchange_bytes();
    negative_lse = dq + kTile.dq_bytes();
    delta = negative_lse + kTile.q_stages * kRowBytes;
    barriers = delta + kTile.do_stages * kRowBytes;
  }

  __device__ __forceinline__ QRing q_ring() const { return QRing(barriers); }
  __device__ __forceinline__ DoRing do_ring() const { return DoRing(barriers + QRing::kBytes); }
  __device__ __forceinline__ OnceRing k_once() const {
    return OnceRing(barriers + QRing::kBytes + DoRing::kBytes);
  }
  __device__ __forceinline__ OnceRing v_once() const {
    return OnceRing(k_once().full + OnceRing::kBytes);
  }

  static_assert(QRing::kBytes + DoRing::kBytes + 2 * OnceRing::kBytes <= 256);
  static_assert(kTile.shared_bytes() <= kMaxSharedBytes);
  static_assert(kRowAlignment % kTile.block_m == 0);

  // By one thread, before anyone else looks.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kWarps = 4 * BackwardTile::kWarpgroups;
    q_ring().init(kWarps);
    do_ring().init(kWarps);
    k_once().init(kWarps);
    v_once().init(kWarps);
    ptx::fence_mbarrier_init();
    ptx::fence_proxy_async();
  }
};

// Named barriers of the backward, both warp groups' unless said otherwise. 0 is __syncthreads.
constexpr int kScoresBarrier = 1;   // P is in shared memory
constexpr int kDsBarrier = 2;       // dS is in shared memory
constexpr int kClearedBarrier = 3;  // rows of others are zero
constexpr int kOwnBarrier = 4;      // + warp group: its own threads
constexpr int kDqFullBarrier = 6;   // + warp group: a panel of its dQ is in shared memory
constexpr int kDqEmptyBarrier = 8;  // + warp group: and may be overwritten
constexpr int kDqThreads = 128 + 32;  // a warp group and the warp that takes its dQ away

// What one thread keeps coming: K and then Q and lse, or V and then dO and delta.
enum class Supply { kQueries, kGradients };

template <Supply kSupply, int kTileIndex>
__device__ __forceinline__ void produce_backward(const BackwardParams& params,
                                                 const BackwardWork& work,
                                                 const BackwardLayout<kTileIndex>& layout) {
  using Layout = BackwardLayout<kTileIndex>;
  static constexpr BackwardTile kTile = Layout::kTile;
  constexpr bool kQueries = kSupply == Supply::kQueries;
  constexpr int kM = kTile.block_m, kStages = kQueries ? kTile.q_stages : kTile.do_stages;

  const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params, work);
  QuerySteps<kBackwardTiles[kTileIndex]> step(params, work, blocks);
  if (step.left == 0) return;
  const CUtensorMap* const key_map = kQueries ? &params.k_map : &params.v_map;
  const CUtensorMap* const query_map = kQueries ? &params.q_map : &params.grad_out_map;
  ptx::prefetch_tensor_map(key_map);
  ptx::prefetch_tensor_map(query_map);

  const auto load_panels = [&](const CUtensorMap* map, uint32_t tile, int rows, uint32_t barrier,
                               int row, int head) {
#pragma unroll 1  // few registers rather than few instructions
    for (int c = 0; c < kTile.panels(); ++c) {
      ptx::tma_load_4d(tile + c * panel_bytes(rows), map, barrier, c * kPanelColumns, row, head,
                       work.batch, ptx::kEvictLast);
    }
  };
  const auto once = kQueries ? layout.k_once() : layout.v_once();
  ptx::mbarrier_arrive_expect_tx(once.full, kTile.kv_bytes());
  load_panels(key_map, kQueries ? layout.k : layout.v, kTile.block_n, once.full,
              work.k_start + work.n_block * kTile.block_n, work.key_head);

  const Ring<kStages> ring(kQueries ? layout.q_ring().full : layout.do_ring().full);
  RingPosition<kStages> at;
#pragma unroll 1
  for (; step.left > 0; step.advance(params, blocks)) {
    const uint32_t full = ring.full_barrier(at);
    ring.wait_empty(at);
    ptx::mbarrier_arrive_expect_tx(full, kTile.q_bytes() + Layout::kRowBytes);
    load_panels(query_map,
                (kQueries ? layout.q : layout.grad_out) + at.stage() * kTile.q_bytes(), kM, full,
                work.q_start + step.block * kM, step.head);
    ptx::bulk_load((kQueries ? layout.negative_lse : layout.delta) + at.stage() * Layout::kRowBytes,
                   (kQueries ? params.negative_lse : params.delta) + step.row, Layout::kRowBytes, full);
    at.advance();
  }
}

// Of a panel of dQ: how many thread blocks have added to it.
template <int kTileIndex>
__device__ __forceinline__ int* turns_of(const BackwardParams& params, int64_t row, int panel) {
  return params.turns + row / 64 * kBackwardTiles[kTileIndex].panels() + panel;
}

__device__ __forceinline__ void wait_turn(const int* turns, int turn) {
  while (ptx::load_acquire(turns) != turn) {
  }
}

// A warp that takes away one warp group's panels of dQ, one of every step, by adding them to their
// sums. Through the copy engine: a warp group that adds by itself waits until its requests are on
// their way, a third of the time at head_dim 128.
template <int kTileIndex>
__device__ __forceinline__ void take_dq_away(const BackwardParams& params, const BackwardWork& work,
                                             const BackwardLayout<kTileIndex>& layout,
                                             int warpgroup) {
  static constexpr BackwardTile kTile = BackwardLayout<kTileIndex>::kTile;
  const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params, work);
  QuerySteps<kBackwardTiles[kTileIndex]> step(params, work, blocks);
  const uint32_t source = layout.dq + warpgroup * kTile.kDqPanelBytes;
  const int panel = kTile.splits_rows() ? 0 : warpgroup;
  const uint32_t bytes = min(kPanelColumns, kTile.head_dim - panel * kPanelColumns) * 64 * 4;
  const bool elected = (threadIdx.x & 31) == 0;
#pragma unroll 1
  for (; step.left > 0; step.advance(params, blocks)) {
    ptx::named_barrier_arrive(kDqEmptyBarrier + warpgroup, kDqThreads);
    ptx::named_barrier_sync(kDqFullBarrier + warpgroup, kDqThreads);
    if (elected) {
      const int64_t row = step.row + (kTile.splits_rows() ? 64 * warpgroup : 0);
      float* sums = params.dq_sums + dq_panel(row, kTile.head_dim, panel);
      if (params.turns == nullptr) {
        ptx::bulk_reduce_add(sums, source, bytes);
        ptx::bulk_wait_read();
      } else {
        int* turns = turns_of<kTileIndex>(params, row, panel);
        wait_turn(turns, turn_of<kBackwardTiles[kTileIndex]>(params, work, step.block));
        ptx::bulk_reduce_add(sums, source, bytes);
        ptx::bulk_wait();
        ptx::add_release(turns, 1);
      }
    }
    __syncwarp();
  }
  if (elected) ptx::bulk_wait();
}

}  // namespace fa4

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
  using KeyRing = Ring<1>;
  using TileRing = Ring<2>;
  using DsRing = Ring<2>;

  uint32_t k, v, q, grad_out, exchange, dq, negative_lse, delta, tiles, barriers;

  __device__ __forceinline__ explicit BackwardLayout(uint32_t dynamic_shared) {
    k = (dynamic_shared + 1023) & ~1023u;
    v = k + kTile.kv_bytes();
    q = v + kTile.kv_bytes();
    grad_out = q + kTile.q_stages * kTile.q_bytes();
    exchange = grad_out + kTile.do_stages * kTile.q_bytes();
    dq = exchange + kTile.exchange_bytes();
    negative_lse = dq + kTile.dq_bytes();
    delta = negative_lse + kTile.q_stages * kRowBytes;
    tiles = delta + kTile.do_stages * kRowBytes;
    barriers = tiles + 16;
  }

  __device__ __forceinline__ QRing q_ring() const { return QRing(barriers); }
  __device__ __forceinline__ DoRing do_ring() const { return DoRing(barriers + QRing::kBytes); }
  __device__ __forceinline__ KeyRing k_ring() const {
    return KeyRing(barriers + QRing::kBytes + DoRing::kBytes);
  }
  __device__ __forceinline__ KeyRing v_ring() const {
    return KeyRing(k_ring().full + KeyRing::kBytes);
  }

  // Numbers of the tiles to work on, -1 after the last.
  __device__ __forceinline__ TileRing tile_ring() const {
    return TileRing(v_ring().full + KeyRing::kBytes);
  }

  // Of dS where the warp groups share keys. Who writes knows by its own dQ that a place is free.
  __device__ __forceinline__ DsRing ds_ring() const {
    return DsRing(tile_ring().full + TileRing::kBytes);
  }

  static_assert(16 + QRing::kBytes + DoRing::kBytes + 2 * KeyRing::kBytes + TileRing::kBytes +
                    DsRing::kBytes <=
                256);
  static_assert(kTile.shared_bytes() <= kMaxSharedBytes);
  static_assert(kRowAlignment % kTile.block_m == 0);

  // By one thread, before anyone else looks.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kWarps = 4 * BackwardTile::kWarpgroups;
    q_ring().init(kWarps);
    do_ring().init(kWarps);
    k_ring().init(kWarps);
    v_ring().init(kWarps);
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(ds_ring().full + 8 * i, kWarps);
    // Who reads them: the consumers, who fetches dO, and who takes dQ away.
    tile_ring().init(kWarps + 1 + BackwardTile::kWarpgroups);
    ptx::fence_mbarrier_init();
    ptx::fence_proxy_async();
  }
};

// Named barriers of the backward, both warp groups' unless said otherwise. 0 is __syncthreads.
constexpr int kScoresBarrier = 1;   // P is in shared memory
constexpr int kDsBarrier = 2;       // dS is, where the warp groups share columns
constexpr int kClearedBarrier = 3;  // rows of others are zero
constexpr int kOwnBarrier = 4;      // + warp group: its own threads
constexpr int kDqFullBarrier = 6;   // + warp group: a panel of its dQ is in shared memory
constexpr int kDqEmptyBarrier = 8;  // + warp group: and may be overwritten
constexpr int kDqThreads = 128 + 32;  // a warp group and the warp that takes its dQ away

// The next tile to work on, as the thread that fetches Q has drawn it. For a warp, or for the one
// thread of it that runs.
template <int kTileIndex>
class TileReader {
 public:
  using Layout = BackwardLayout<kTileIndex>;

  __device__ __forceinline__ int next(const Layout& layout) {
    const auto ring = layout.tile_ring();
    ring.wait_full(at_);
    const int tile = ptx::load_shared_int(layout.tiles + 4 * at_.stage());
    // Every tile is -1 at least: whoever arrives has it.
    ptx::mbarrier_arrive_if(ring.empty_barrier(at_), (threadIdx.x & 31) == 0 && tile >= -1);
    at_.advance();
    return tile;
  }

 private:
  RingPosition<2> at_;
};

// What one thread keeps coming: K and then Q and lse, or V and then dO and delta.
enum class Supply { kQueries, kGradients };

template <Supply kSupply, int kTileIndex>
__device__ __forceinline__ void produce_backward(const BackwardParams& params,
                                                 const BackwardLayout<kTileIndex>& layout) {
  using Layout = BackwardLayout<kTileIndex>;
  static constexpr BackwardTile kTile = Layout::kTile;
  constexpr bool kQueries = kSupply == Supply::kQueries;
  constexpr int kM = kTile.block_m, kStages = kQueries ? kTile.q_stages : kTile.do_stages;

  const CUtensorMap* const key_map = kQueries ? &params.k_map : &params.v_map;
  const CUtensorMap* const query_map = kQueries ? &params.q_map : &params.grad_out_map;
  if (params.seq_q > 0) {
    ptx::prefetch_tensor_map(key_map);
    ptx::prefetch_tensor_map(query_map);
  }
  const auto load_panels = [&](const CUtensorMap* map, uint32_t tile, int rows, uint32_t barrier,
                               int row, int head, int batch) {
#pragma unroll 1  // few registers rather than few instructions
    for (int c = 0; c < kTile.panels(); ++c) {
      ptx::tma_load_4d(tile + c * panel_bytes(rows), map, barrier, c * kPanelColumns, row, head,
                       batch, ptx::kEvictLast);
    }
  };

  const auto key_ring = kQueries ? layout.k_ring() : layout.v_ring();
  const Ring<kStages> ring(kQueries ? layout.q_ring().full : layout.do_ring().full);
  RingPosition<1> key_at;
  RingPosition<kStages> at;
  const auto load_tile = [&](int tile) {
    const BackwardWork work(params, tile);
    const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params, work);
    QuerySteps step(params, work, blocks);
    if (step.left == 0) return;
    key_ring.wait_empty(key_at);
    ptx::mbarrier_arrive_expect_tx(key_ring.full, kTile.kv_bytes());
    load_panels(key_map, kQueries ? layout.k : layout.v, kTile.block_n, key_ring.full,
                work.k_start + work.n_block * kTile.block_n, work.key_head, work.batch);
    key_at.advance();
    // As QuerySteps goes, in fewer registers.
    int unit = step.unit;
    const int gap = step.gap(params, blocks);
    const int first_row = work.q_start + blocks.begin * kM;
    const int end_row = work.q_start + blocks.end * kM;
    const int end_head = step.head + params.heads_per_group;
#pragma unroll 1
    for (int head = step.head; head < end_head; ++head, unit += gap) {
#pragma unroll 1
      for (int row = first_row; row < end_row; row += kM, unit += step.kUnits) {
        const uint32_t full = ring.full_barrier(at);
        ring.wait_empty(at);
        ptx::mbarrier_arrive_expect_tx(full, kTile.q_bytes() + Layout::kRowBytes);
        load_panels(query_map,
                    (kQueries ? layout.q : layout.grad_out) + at.stage() * kTile.q_bytes(), kM,
                    full, row, head, work.batch);
        ptx::bulk_load(
            (kQueries ? layout.negative_lse : layout.delta) + at.stage() * Layout::kRowBytes,
            (kQueries ? params.negative_lse : params.delta) + int64_t{unit} * 64,
            Layout::kRowBytes, full);
        at.advance();
      }
    }
  };

  if constexpr (kQueries) {
    const auto tile_ring = layout.tile_ring();
    RingPosition<2> tile_at;
    // Where thread blocks wait for each other's turns, who is not there yet must own no tile: others
    // may hold its multiprocessor until it is done.
    const bool deals_first = params.turns == nullptr || params.next_tile == nullptr;
    const int dealt = deals_first ? gridDim.x : 0;
    int tile = deals_first ? blockIdx.x : atomicAdd(params.next_tile, 1);
#pragma unroll 1
    while (true) {
      const bool done = tile >= params.tiles;
      tile_ring.wait_empty(tile_at);
      ptx::store_shared_int(layout.tiles + 4 * tile_at.stage(), done ? -1 : tile);
      ptx::mbarrier_arrive(tile_ring.full_barrier(tile_at));
      tile_at.advance();
      if (done) break;
      load_tile(tile);
      tile = params.next_tile == nullptr ? tile + gridDim.x
                                         : atomicAdd(params.next_tile, 1) + dealt;
    }
  } else {
    TileReader<kTileIndex> tiles;
#pragma unroll 1
    for (int tile = tiles.next(layout); tile >= 0; tile = tiles.next(layout)) load_tile(tile);
  }
}

__device__ __forceinline__ void wait_turn(const int* turns, int turn) {
  while (ptx::load_acquire(turns) != turn) {
  }
}

// A warp that takes one warp group's dQ away, panels [first_panel, first_panel + panels) of every
// step, by adding it to its sums through the copy engine, in turns if there are any.
template <int kTileIndex>
__device__ __forceinline__ void take_dq_away(const BackwardParams& params,
                                             const BackwardLayout<kTileIndex>& layout,
                                             int warpgroup, int first_panel, int panels,
                                             int first_unit) {
  static constexpr BackwardTile kTile = BackwardLayout<kTileIndex>::kTile;
  constexpr int kChunkBytes = BackwardTile::kDqChunkBytes;
  const uint32_t source = layout.dq + warpgroup * kTile.dq_staged * kChunkBytes;
  const bool elected = (threadIdx.x & 31) == 0;
  const bool in_turns = params.turns != nullptr;
  const int first_chunk = in_turns ? 0 : kTile.dq_direct;

  const auto take_panel = [&](int tile, int unit, int block, int panel) {
    const int chunks = min(kPanelColumns, kTile.head_dim - panel * kPanelColumns) / 8;
    float* sums = params.dq_sums + dq_panel(int64_t{unit} * 64, kTile.head_dim, panel);
    int* turns = params.turns + int64_t{unit} * kTile.panels() + panel;
    if (in_turns && elected) {
      // What a turn depends on is read again rather than kept.
      const BackwardWork work(params, tile);
      wait_turn(turns, turn_of<kBackwardTiles[kTileIndex]>(params, work, block));
    }
    __syncwarp();  // bar.arrive below is for whole warps
#pragma unroll 1
    for (int chunk = first_chunk; chunk < kTile.kDqChunks; chunk += kTile.dq_staged) {
      ptx::named_barrier_arrive(kDqEmptyBarrier + warpgroup, kDqThreads);
      ptx::named_barrier_sync(kDqFullBarrier + warpgroup, kDqThreads);
      if (elected && chunk < chunks) {
        const int count = min(chunks - chunk, kTile.dq_staged);
        ptx::bulk_reduce_add(sums + chunk * (kChunkBytes / 4), source, count * kChunkBytes);
        ptx::bulk_wait_read();
      }
      __syncwarp();
    }
    if (in_turns && elected) {
      ptx::bulk_wait();
      ptx::add_release(turns, 1);
    }
  };

  TileReader<kTileIndex> tiles;
#pragma unroll 1
  for (int tile = tiles.next(layout); tile >= 0; tile = tiles.next(layout)) {
    const BackwardWork work(params, tile);
    const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params, work);
    const QuerySteps first(params, work, blocks);
    const int gap = first.gap(params, blocks);
    int unit = first.unit + first_unit;
#pragma unroll 1
    for (int head = first.left == 0 ? params.heads_per_group : 0; head < params.heads_per_group;
         ++head, unit += gap) {
#pragma unroll 1
      for (int block = blocks.begin; block < blocks.end; ++block, unit += first.kUnits) {
#pragma unroll 1
        for (int panel = first_panel; panel < first_panel + panels; ++panel)
          take_panel(tile, unit, block, panel);
      }
    }
  }
  if (elected) ptx::bulk_wait();
}

}  // namespace fa4

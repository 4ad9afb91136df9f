// Shared memory of a thread block of the backward, its barriers, and who fills it.
#pragma once

#include "backward_zeros.cuh"
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
  using ExchangeRing = Ring<kTile.exchange_slots()>;

  uint32_t k, v, q, grad_out, exchange, dq, zeros, negative_lse, delta, tiles, barriers;

  __device__ __forceinline__ explicit BackwardLayout(uint32_t dynamic_shared) {
    k = (dynamic_shared + 1023) & ~1023u;
    v = k + kTile.kv_bytes();
    q = v + kTile.kv_bytes();
    grad_out = q + kTile.q_stages * kTile.q_bytes();
    exchange = grad_out + kTile.do_stages * kTile.q_bytes();
    dq = exchange + kTile.exchange_bytes();
    zeros = dq + kTile.dq_bytes();
    negative_lse = zeros + kTile.zero_bytes();
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

  // Of dS where the warp groups share keys: who writes knows by its own dQ that a place is free. Of
  // P where they have a gradient each: it is free when the stage of Q is that P is made of.
  __device__ __forceinline__ ExchangeRing exchange_ring() const {
    return ExchangeRing(tile_ring().full + TileRing::kBytes);
  }

  static_assert(16 + QRing::kBytes + DoRing::kBytes + 2 * KeyRing::kBytes + TileRing::kBytes +
                    ExchangeRing::kBytes <=
                256);
  static_assert(kTile.shared_bytes() <= kMaxSharedBytes);
  static_assert(kRowAlignment % kTile.block_m == 0);

  // By one thread, before anyone else looks.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kWarps = 4 * BackwardTile::kWarpgroups;
    // Where each warp group has a gradient one reads K and writes P, the other reads V.
    constexpr int kSharers = kTile.has_dq_kernel() ? kWarps / 2 : kWarps;
    q_ring().init(kWarps);
    do_ring().init(kWarps);
    k_ring().init(kSharers);
    v_ring().init(kSharers);
    for (int i = 0; i < kTile.exchange_slots(); ++i)
      ptx::mbarrier_init(exchange_ring().full + 8 * i, kSharers);
    // Who reads them: the consumers, who fetches dO, and who takes dQ away.
    tile_ring().init(kWarps + 1 + (kTile.has_dq_kernel() ? 0 : BackwardTile::kWarpgroups));
    ptx::fence_mbarrier_init();
    ptx::fence_proxy_async();
  }

  // By as many threads as there are in a warp group, before anyone else looks.
  __device__ __forceinline__ void fill_zeros(int thread) const {
    static_assert(kTile.zero_bytes() == 128 * 16);
    ptx::store_shared(zeros + thread * 16, {0, 0, 0, 0});
    ptx::fence_proxy_async();
  }
};

// Named barriers of the backward, both warp groups' unless said otherwise. 0 is __syncthreads.
constexpr int kClearedBarrier = 1;  // rows of others are zero
constexpr int kOwnBarrier = 2;      // of the warp group that makes P where each has a gradient
constexpr int kDqFullBarrier = 4;   // + warp group: a panel of its dQ is in shared memory
constexpr int kDqEmptyBarrier = 6;  // + warp group: and may be overwritten
constexpr int kDqThreads = 128 + 32;  // a warp group and the warp that takes its dQ away

// The next tile to work on, as the thread that fetches Q has drawn it. For a warp, or for the one
// thread of it that runs.
class TileReader {
 public:
  template <class Layout>
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

// What the thread that fetches Q does besides: it draws tiles, for everybody. Calls load(tile).
template <class Layout, class Load>
__device__ __forceinline__ void deal_tiles(const BackwardParams& params, const Layout& layout,
                                           const Load& load) {
  const auto tile_ring = layout.tile_ring();
  RingPosition<2> tile_at;
  // Where thread blocks wait for each other's turns or zeros, who is not there yet must own no
  // tile: others may hold its multiprocessor until it is done.
  const bool waits_for_others = params.turns != nullptr || params.zeroed != nullptr;
  const bool deals_first = !waits_for_others || params.next_tile == nullptr;
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
    load(tile);
    tile = params.next_tile == nullptr ? tile + gridDim.x
                                       : atomicAdd(params.next_tile, 1) + dealt;
  }
}

// A tile of `rows` rows, panel by panel.
template <int kPanels>
__device__ __forceinline__ void load_panels(const CUtensorMap* map, uint32_t tile, int rows,
                                            uint32_t barrier, int row, int head, int batch) {
#pragma unroll 1  // few registers rather than few instructions
  for (int c = 0; c < kPanels; ++c) {
    ptx::tma_load_4d(tile + c * panel_bytes(rows), map, barrier, c * kPanelColumns, row, head,
                     batch, ptx::kEvictLast);
  }
}

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
    load_panels<kTile.panels()>(key_map, kQueries ? layout.k : layout.v, kTile.block_n,
                                key_ring.full, work.k_start + work.n_block * kTile.block_n,
                                work.key_head, work.batch);
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
        load_panels<kTile.panels()>(
            query_map, (kQueries ? layout.q : layout.grad_out) + at.stage() * kTile.q_bytes(), kM,
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
    deal_tiles(params, layout, load_tile);
  } else {
    TileReader tiles;
#pragma unroll 1
    for (int tile = tiles.next(layout); tile >= 0; tile = tiles.next(layout)) load_tile(tile);
  }
}

// A warp that takes one warp group's dQ away, a panel of 64 rows in every step, by adding it to its
// sums through the copy engine.
//
// Where the order of additions matters, thread blocks take turns: each adds to a block of queries
// when all that come before it have. A turn is passed on when the additions are complete, which
// takes long; meanwhile the warp group fills the buffer anew.
template <int kTileIndex>
class DqTaker {
 public:
  using Layout = BackwardLayout<kTileIndex>;

  __device__ __forceinline__ DqTaker(const BackwardParams& params, const Layout& layout,
                                     int warpgroup)
      : params_(params),
        layout_(layout),
        warpgroup_(warpgroup),
        elected_((threadIdx.x & 31) == 0) {}

  __device__ __forceinline__ void run() {
    for_each_tile([&](int tile) {
      if (elected_ && params_.zeroed != nullptr) {
        zero_ahead<kBackwardTiles[kTileIndex]>(params_, tile, layout_.zeros, warpgroup_);
        await_zeros(params_, tile);
      }
      __syncwarp();
      with_steps(tile, [&](const BackwardWork&, const Blocks& blocks, int unit, int gap) {
        for_each_step(blocks, unit, gap, [&](int unit, int) { take(unit, [] {}); });
      });
    });
    if (elected_) ptx::bulk_wait();
  }

  __device__ __forceinline__ void run_in_turns() {
    for_each_tile([&](int tile) {
      with_steps(tile, [&](const BackwardWork& work, const Blocks& blocks, int unit, int gap) {
        int* taken = nullptr;  // the last turn
        // The wait is for this thread's eyes only: without the release others were seen to add too
        // early where processes share the GPU.
        const auto pass_on = [&] {
          if (taken == nullptr) return;
          ptx::bulk_wait();
          ptx::add_release(taken, 1);
        };
        for_each_step(blocks, unit, gap, [&](int unit, int block) {
          int* const turns = params_.turns + int64_t{unit} * kTile.panels() + panel();
          take(unit, [&] {
            pass_on();
            const int turn = turn_of<kBackwardTiles[kTileIndex]>(params_, work, block);
            while (ptx::load_acquire(turns) != turn) {
            }
            ptx::fence_proxy_async_global();
          });
          taken = turns;
        });
        if (elected_) pass_on();  // before anyone waits for the next tile
      });
    });
  }

 private:
  static constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  using Blocks = QueryBlocks<kBackwardTiles[kTileIndex]>;
  using Steps = QuerySteps<kBackwardTiles[kTileIndex]>;

  // Of a step's dQ the warp group has all columns of 64 rows, or a panel of them.
  __device__ __forceinline__ int first_unit() const { return kTile.splits_rows() ? warpgroup_ : 0; }
  __device__ __forceinline__ int panel() const { return kTile.splits_rows() ? 0 : warpgroup_; }

  template <class Use>
  __device__ __forceinline__ void for_each_tile(const Use& use) {
    TileReader tiles;
#pragma unroll 1
    for (int tile = tiles.next(layout_); tile >= 0; tile = tiles.next(layout_)) use(tile);
  }

  // use(work, blocks, first unit, units between heads), if there are any
  template <class Use>
  __device__ __forceinline__ void with_steps(int tile, const Use& use) {
    const BackwardWork work(params_, tile);
    const Blocks blocks(params_, work);
    const Steps first(params_, work, blocks);
    if (first.left > 0) use(work, blocks, first.unit + first_unit(), first.gap(params_, blocks));
  }

  // As QuerySteps goes, in fewer registers: use(unit, block of queries).
  template <class Use>
  __device__ __forceinline__ void for_each_step(const Blocks& blocks, int unit, int gap,
                                                const Use& use) {
#pragma unroll 1
    for (int head = 0; head < params_.heads_per_group; ++head, unit += gap) {
#pragma unroll 1
      for (int block = blocks.begin; block < blocks.end; ++block, unit += Steps::kUnits)
        use(unit, block);
    }
  }

  // One thread adds; what is to be done before that, by it, is done while the warp group fills the
  // buffer.
  template <class Before>
  __device__ __forceinline__ void take(int unit, const Before& before) {
    const int columns = min(kPanelColumns, kTile.head_dim - panel() * kPanelColumns);
    ptx::named_barrier_arrive(kDqEmptyBarrier + warpgroup_, kDqThreads);
    if (elected_) before();
    __syncwarp();  // barriers are for whole warps
    ptx::named_barrier_sync(kDqFullBarrier + warpgroup_, kDqThreads);
    if (elected_) {
      ptx::bulk_reduce_add(
          params_.dq_sums + dq_panel(int64_t{unit} * 64, kTile.head_dim, panel()),
          layout_.dq + warpgroup_ * BackwardTile::kDqPanelBytes, 64 * columns * 4);
      ptx::bulk_wait_read();
    }
    __syncwarp();
  }

  const BackwardParams& params_;
  const Layout& layout_;
  int warpgroup_;
  bool elected_;
};

}  // namespace fa4

// The producer: one thread that keeps Q, K and V coming through the copy engine.
#pragma once

#include "mask.cuh"
#include "pipeline.cuh"
#include "scheduler.cuh"

namespace fa4 {

template <int kTileIndex>
__device__ __forceinline__ void produce(const ForwardParams& params,
                                        const SharedLayout<kTileIndex>& layout) {
  using Layout = SharedLayout<kTileIndex>;
  static constexpr ForwardTile kTile = Layout::kTile;

  ptx::prefetch_tensor_map(&params.q_map);
  ptx::prefetch_tensor_map(&params.k_map);
  ptx::prefetch_tensor_map(&params.v_map);

  RingPosition<kTile.q_stages> q_at;
  RingPosition<kTile.kv_stages> k_at, v_at;
  RingPosition<Layout::kWorkSlots> work_at;
  TileSource source(params);
  const int slab_bytes =
      params.slab_queries * params.packed_heads * kPanelRowBytes * kTile.panels();

  while (true) {
    const Work work = source.current();
    publish_work(layout, work_at, work);
    work_at.advance();
    if (work.done()) break;

    const int last_query = min(work.first_query + params.schedule.tile_queries, work.seq_q) - 1;
    const BlockRange<kTile.mask, kTile.block_n> blocks(params, work, work.first_query, last_query);
    const int key_head = work.head / params.heads_per_group;

    const auto load_block = [&](const CUtensorMap* map, const typename Layout::KvRing& ring,
                                uint32_t tiles, RingPosition<kTile.kv_stages>& at, int block) {
      ring.wait_empty(at);
      ptx::mbarrier_arrive_expect_tx(ring.full_barrier(at), kTile.kv_bytes());
#pragma unroll
      for (int c = 0; c < kTile.panels(); ++c) {
        ptx::tma_load_4d(tiles + at.stage() * kTile.kv_bytes() + c * panel_bytes(kTile.block_n),
                         map, ring.full_barrier(at), c * kPanelColumns,
                         work.k_start + block * kTile.block_n, key_head, work.batch,
                         ptx::kEvictLast);
      }
      at.advance();
    };
    const auto load_k = [&](int block) {
      load_block(&params.k_map, layout.k_ring(), layout.k, k_at, block);
    };
    const auto load_v = [&](int block) {
      load_block(&params.v_map, layout.v_ring(), layout.v, v_at, block);
    };
    const auto load_q = [&] {
#pragma unroll 1
      for (int w = 0; w < kTile.warpgroups; ++w) {
        const auto ring = layout.q_ring(w);
        ring.wait_empty(q_at);
        ptx::mbarrier_arrive_expect_tx(ring.full_barrier(q_at), slab_bytes);
#pragma unroll
        for (int c = 0; c < kTile.panels(); ++c) {
          ptx::tma_load_5d(layout.q_slab(q_at.stage(), w) + c * panel_bytes(64), &params.q_map,
                           ring.full_barrier(q_at), c * kPanelColumns, 0,
                           work.q_start + work.first_query + w * params.slab_queries, work.head,
                           work.batch, ptx::kEvictFirst);
        }
      }
      q_at.advance();
    };

    // With one stage the old Q is read until late in its tile: fetch the first K meanwhile.
    if constexpr (kTile.q_stages == 1) load_k(blocks.end - 1);
    load_q();
    if constexpr (kTile.q_stages != 1) load_k(blocks.end - 1);
#pragma unroll 1
    for (int block = blocks.end - 1; block > blocks.begin; --block) {
      load_k(block - 1);
      load_v(block);
    }
    source.advance();  // before the last V: the counter answers while that waits for room
    load_v(blocks.begin);
  }
  source.finish();
}

}  // namespace fa4

// The consumer warp groups of the backward for wide heads: each keeps some of the columns of dK and
// dV for all keys of the thread block, whole panels: of three, two and one.
//
// S^T and dP^T are needed whole by both. The first warp group computes S^T and P^T, the second dP^T
// and dS^T; they exchange them through shared memory, from where both multiply.
#pragma once

#include "backward_math.cuh"

namespace fa4 {

template <int kTileIndex, Element kElement, int kWarpgroup>
__device__ __forceinline__ void consume_by_columns(const BackwardParams& params,
                                                   const BackwardLayout<kTileIndex>& layout) {
  using Layout = BackwardLayout<kTileIndex>;
  static constexpr BackwardTile kTile = Layout::kTile;
  constexpr int kM = kTile.block_m, kN = kTile.block_n, kPanels = kTile.panels();
  constexpr int kFirstPanel = kWarpgroup == 0 ? 0 : (kPanels + 1) / 2;
  constexpr int kOwnPanels = kWarpgroup == 0 ? (kPanels + 1) / 2 : kPanels / 2;
  constexpr int kColumns = kOwnPanels * kPanelColumns;
  constexpr bool kMakesP = kWarpgroup == 0;  // the other makes dS
  static_assert(kM == 64 && kN == 64 && kTile.head_dim % kPanelColumns == 0 && kOwnPanels <= 2);

  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, thread >> 5, 0);
  const float masked_score = params.scale_log2 < 0 ? INFINITY : -INFINITY;
  const float scale_log2 = params.scale_log2;

  const auto q_ring = layout.q_ring();
  const auto do_ring = layout.do_ring();
  TileReader tiles;
  RingPosition<kTile.q_stages> q_at;
  RingPosition<kTile.do_stages> do_at;
  RingPosition<1> key_at;

#pragma unroll 1
  for (int tile = tiles.next(layout); tile >= 0; tile = tiles.next(layout)) {
    const BackwardWork work(params, tile);
    const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params, work);
    QuerySteps step(params, work, blocks);
    const int first_key = work.n_block * kN + warp * 16 + (lane >> 2);
    const ColumnMask<kTile.mask> mask(params, work, first_key, lane);

    float s[kM / 2], dq[32], dk[kColumns / 2], dv[kColumns / 2];  // s: S^T, or dP^T
    uint32_t p[kM / 4], ds[kM / 4];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) dk[i] = dv[i] = 0.f;
    pin(dk);  // so that the zeros are made here, not between products
    pin(dv);

    if (step.left > 0) {
      const uint32_t p_panel = layout.exchange, ds_panel = layout.exchange + kTile.score_bytes();
      const auto q_tile = [&](RingPosition<kTile.q_stages> at) {
        return layout.q + at.stage() * kTile.q_bytes();
      };
      const auto do_tile = [&] { return layout.grad_out + do_at.stage() * kTile.q_bytes(); };
      // This warp group's columns of a tile [kRows, D], as an operand whose columns are contiguous.
      const auto own_columns = [&](uint32_t tile, int rows, int panel = 0) {
        return fresh_descriptor(tile + (kFirstPanel + panel) * panel_bytes(rows),
                                panel_bytes(rows));
      };

      const auto clear_tail = [&](uint32_t tile, int valid) {
        if (params.cu_seqlens_q != nullptr && valid < 64) {
          clear_rows<64, kPanels, 128>(tile, max(valid, 0), thread);
          ptx::named_barrier_sync(kOwnBarrier + kWarpgroup, 128);
        }
      };
      const auto issue_dq_panel = [&](int panel) {
        issue_dq<kElement, kN>(dq, fresh_descriptor(ds_panel, 16),
                               own_columns(layout.k, kN, panel));
        wgmma_commit();
      };
      // S^T by the one, dP^T by the other.
      const auto issue_s = [&] {
        q_ring.wait_full(q_at);
        clear_tail(q_tile(q_at), work.seq_q - step.block * kM);
        wgmma_fence();
        issue_scores<kElement, kTile.head_dim, kN, kM>(
            s, fresh_descriptor(layout.k, 16), fresh_descriptor(q_tile(q_at), 16));
        wgmma_commit();
      };
      const auto issue_dp = [&] {
        do_ring.wait_full(do_at);
        clear_tail(do_tile(), work.seq_q - step.block * kM);
        wgmma_fence();
        issue_scores<kElement, kTile.head_dim, kN, kM>(
            s, fresh_descriptor(layout.v, 16), fresh_descriptor(do_tile(), 16));
        wgmma_commit();
      };
      const auto make_p = [&](bool masked) {
        pin(s);
        if (masked) mask.template apply<kM>(s, step.block * kM, masked_score);
        probabilities<kElement, kM>(p, s, scale_log2,
                                    layout.negative_lse + q_at.stage() * Layout::kRowBytes, lane);
        store_operand<kM, kN>(p_panel, p, 0, warp, lane);
        ptx::fence_proxy_async();
      };
      const auto make_ds = [&](bool masked) {
        load_operand<kM, kN>(p, p_panel, 0, warp, lane);
        wgmma_wait<1>();
        pin(s);
        if (masked) mask.template apply<kM>(s, step.block * kM, 0.f);
        score_gradients<kElement, kM>(ds, p, s, layout.delta + do_at.stage() * Layout::kRowBytes,
                                      lane);
        store_operand<kM, kN>(ds_panel, ds, 0, warp, lane);
        ptx::fence_proxy_async();
      };
      // dV += P^T dO, and under it dS.
      const auto multiply_dv = [&](bool masked) {
        ptx::named_barrier_sync(kScoresBarrier, 256);
        do_ring.wait_full(do_at);
        wgmma_fence();
        issue_from_panel<kElement, kColumns, kM>(dv, fresh_descriptor(p_panel, 16),
                                                 own_columns(do_tile(), kM));
        wgmma_commit();
        if constexpr (!kMakesP) make_ds(masked);
        wgmma_wait<0>();
        pin(dv);
        ptx::mbarrier_arrive_if(do_ring.empty_barrier(do_at), lane == 0);
        do_at.advance();
      };
      const auto issue_dq_dk = [&](const RingPosition<kTile.q_stages>& at) {
        ptx::named_barrier_sync(kDsBarrier, 256);
        q_ring.wait_full(at);
        wgmma_fence();
        issue_dq_panel(0);
        issue_from_panel<kElement, kColumns, kM>(dk, fresh_descriptor(ds_panel, 16),
                                                 own_columns(q_tile(at), kM));
        wgmma_commit();
      };
      // The first panel of dQ; the second takes its place.
      const auto add_panel = [&](int panel, int unit) {
        add_dq<kTileIndex>(params, layout, dq, unit, kFirstPanel + panel, 64, kWarpgroup, thread);
      };
      const auto add_first = [&](int unit) {
        wgmma_wait<1>();
        pin(dq);
        add_panel(0, unit);
        if constexpr (kOwnPanels > 1) {
          wgmma_fence();
          issue_dq_panel(1);
        }
      };
      const auto add_second = [&](int unit) {
        pin(dq);
        pin(dk);
        if constexpr (kOwnPanels > 1) add_panel(1, unit);
      };

      // ---- the first step, to dS
      layout.k_ring().wait_full(key_at);
      layout.v_ring().wait_full(key_at);
      bool masked = blocks.masked(step.block);
      if constexpr (kMakesP) {
        clear_tail(layout.k, work.seq_k - work.n_block * kN);
        issue_s();
        wgmma_wait<0>();
        make_p(masked);
      } else {
        issue_dp();
      }
      multiply_dv(masked);

      // ---- steps: what is left of one, and the next to its dS
#pragma unroll 1
      while (step.left > 1) {
        const int unit = step.unit;
        const auto q_done = q_at;
        step.advance(params, blocks);
        q_at.advance();
        masked = blocks.masked(step.block);

        if constexpr (kMakesP) issue_s();  // before anyone waits for dS
        issue_dq_dk(q_done);
        add_first(unit);
        if constexpr (kMakesP) {
          make_p(masked);
          wgmma_wait<0>();
        } else {
          issue_dp();
          wgmma_wait<1>();
        }
        add_second(unit);
        ptx::mbarrier_arrive_if(q_ring.empty_barrier(q_done), lane == 0);
        multiply_dv(masked);
      }

      // ---- what is left of the last step
      issue_dq_dk(q_at);
      add_first(step.unit);
      wgmma_wait<0>();
      add_second(step.unit);
      // The next tile's keys and queries come while dK and dV are stored.
      ptx::mbarrier_arrive_if(q_ring.empty_barrier(q_at), lane == 0);
      ptx::mbarrier_arrive_if(layout.k_ring().empty_barrier(key_at), lane == 0);
      ptx::mbarrier_arrive_if(layout.v_ring().empty_barrier(key_at), lane == 0);
      q_at.advance();
      key_at.advance();
    }

    constexpr int kFirstColumn = kFirstPanel * kPanelColumns;
    store_gradient<kElement, kColumns>(params, work, params.dk, dk, params.scale, first_key,
                                       kFirstColumn, lane);
    store_gradient<kElement, kColumns>(params, work, params.dv, dv, 1.f, first_key, kFirstColumn,
                                       lane);
  }
}

}  // namespace fa4

// A consumer warp group of the backward that keeps half of the thread block's keys.
//
// P^T and dS^T never leave its registers but for dS, which both warp groups need: dQ sums over all
// keys, and each warp group computes a part of its columns (or of its rows, if one panel holds all
// columns). Products are issued so that one is always in flight: under those of dQ and dK runs the
// softmax of the next block, under that of dV the gradient of this one.
#pragma once

#include "backward_math.cuh"

namespace fa4 {

template <int kTileIndex, Element kElement>
__device__ __forceinline__ void consume_by_keys(const BackwardParams& params,
                                                const BackwardLayout<kTileIndex>& layout,
                                                int warpgroup) {
  using Layout = BackwardLayout<kTileIndex>;
  static constexpr BackwardTile kTile = Layout::kTile;
  constexpr int kHeadDim = kTile.head_dim, kM = kTile.block_m, kN = kTile.block_n;
  constexpr bool kSplitsRows = kTile.splits_rows();
  static_assert(kN == 128 && (kSplitsRows ? kM == 128 : kM == 64 && kTile.panels() == 2));

  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, thread >> 5, 0);
  // What scaling makes minus infinity.
  const float masked_score = params.scale_log2 < 0 ? INFINITY : -INFINITY;
  const float scale_log2 = params.scale_log2;

  const auto q_ring = layout.q_ring();
  const auto do_ring = layout.do_ring();
  TileReader tiles;
  RingPosition<kTile.q_stages> q_at;
  RingPosition<kTile.do_stages> do_at;
  RingPosition<1> key_at;
  RingPosition<2> ds_at;

#pragma unroll 1
  for (int tile = tiles.next(layout); tile >= 0; tile = tiles.next(layout)) {
    const BackwardWork work(params, tile);
    const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params, work);
    QuerySteps step(params, work, blocks);
    const int first_key = work.n_block * kN + warpgroup * 64 + warp * 16 + (lane >> 2);
    const ColumnMask<kTile.mask> mask(params, work, first_key, lane);

    float s[kM / 2], dp[kM / 2], dq[32], dk[kHeadDim / 2], dv[kHeadDim / 2];
    uint32_t p[kM / 4], ds[kM / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
    pin(dk);  // so that the zeros are made here, not between products
    pin(dv);

    if (step.left > 0) {
      // Operands: K and V of this warp group, as rows; and what it multiplies by columns, whose
      // panels follow each other.
      const uint32_t own_keys = warpgroup * panel_bytes(64);
      const uint32_t k_panel = layout.k + (kSplitsRows ? 0 : warpgroup * panel_bytes(kN));
      const uint32_t ds_panel = layout.exchange + (kSplitsRows ? warpgroup * panel_bytes(kN) : 0);
      const auto q_tile = [&](RingPosition<kTile.q_stages> at) {
        return layout.q + at.stage() * kTile.q_bytes();
      };
      const auto ds_place = [&] { return ds_at.stage() * kTile.score_bytes(); };
      const auto do_tile = [&] { return layout.grad_out + do_at.stage() * kTile.q_bytes(); };

      // Rows of Q or dO behind a packed sequence's last.
      const auto clear_tail = [&](uint32_t tile, int block) {
        const int rows = work.seq_q - block * kM;
        if (params.cu_seqlens_q != nullptr && rows < kM) {
          clear_rows<kM, kTile.panels(), 256>(tile, rows, warpgroup * 128 + thread);
          ptx::named_barrier_sync(kClearedBarrier, 256);
        }
      };
      const auto issue_s = [&] {
        q_ring.wait_full(q_at);
        clear_tail(q_tile(q_at), step.block);
        wgmma_fence();
        issue_scores<kElement, kHeadDim, kN, kM>(s, fresh_descriptor(layout.k + own_keys, 16),
                                                 fresh_descriptor(q_tile(q_at), 16));
        wgmma_commit();
      };
      const auto issue_dq_dk = [&](RingPosition<kTile.q_stages> at) {
        layout.exchange_ring().wait_full(ds_at);
        wgmma_fence();
        issue_dq<kElement, kN>(dq, fresh_descriptor(ds_panel + ds_place(), 16),
                               fresh_descriptor(k_panel, 16));
        wgmma_commit();
        issue_pv<kElement, kHeadDim, kM>(dk, ds, fresh_descriptor(q_tile(at), panel_bytes(kM)));
        wgmma_commit();
        ds_at.advance();
      };
      const auto make_p = [&](bool masked) {
        pin(s);
        if (masked) mask.template apply<kM>(s, step.block * kM, masked_score);
        probabilities<kElement, kM>(p, s, scale_log2,
                                    layout.negative_lse + q_at.stage() * Layout::kRowBytes, lane);
      };
      const auto issue_dp_dv = [&] {
        do_ring.wait_full(do_at);
        clear_tail(do_tile(), step.block);
        wgmma_fence();
        issue_scores<kElement, kHeadDim, kN, kM>(dp, fresh_descriptor(layout.v + own_keys, 16),
                                                 fresh_descriptor(do_tile(), 16));
        wgmma_commit();
        issue_pv<kElement, kHeadDim, kM>(dv, p, fresh_descriptor(do_tile(), panel_bytes(kM)));
        wgmma_commit();
        wgmma_wait<1>();
        pin(dp);
      };
      const auto make_ds = [&](bool masked) {
        if (masked) mask.template apply<kM>(dp, step.block * kM, 0.f);
        score_gradients<kElement, kM>(ds, p, dp, layout.delta + do_at.stage() * Layout::kRowBytes,
                                      lane);
        store_operand<kM, kN>(layout.exchange + ds_place(), ds, 64 * warpgroup, warp, lane);
        ptx::fence_proxy_async();
        __syncwarp();
        ptx::mbarrier_arrive_if(layout.exchange_ring().full_barrier(ds_at), lane == 0);
        wgmma_wait<0>();
        pin(dv);
        ptx::mbarrier_arrive_if(do_ring.empty_barrier(do_at), lane == 0);
        do_at.advance();
      };

      // ---- the first step, to dS
      layout.k_ring().wait_full(key_at);
      const int keys = work.seq_k - work.n_block * kN;
      if (params.cu_seqlens_k != nullptr && keys < kN) {
        clear_rows<kN, kTile.panels(), 256>(layout.k, keys, warpgroup * 128 + thread);
        ptx::named_barrier_sync(kClearedBarrier, 256);
      }
      issue_s();
      layout.v_ring().wait_full(key_at);
      wgmma_wait<0>();
      make_p(blocks.masked(step.block));
      issue_dp_dv();
      make_ds(blocks.masked(step.block));

      // ---- steps: what is left of one, and the next to its dS
#pragma unroll 1
      while (step.left > 1) {
        const auto q_done = q_at;
        step.advance(params, blocks);
        q_at.advance();
        const bool masked = blocks.masked(step.block);

        issue_s();  // before anyone waits for the other's dS
        issue_dq_dk(q_done);
        wgmma_wait<2>();
        make_p(masked);
        wgmma_wait<1>();
        pin(dq);
        hand_over_dq<kTileIndex>(layout, dq, warpgroup, thread);
        issue_dp_dv();
        pin(dk);
        ptx::mbarrier_arrive_if(q_ring.empty_barrier(q_done), lane == 0);
        make_ds(masked);
      }

      // ---- what is left of the last step
      issue_dq_dk(q_at);
      wgmma_wait<0>();
      pin(dq);
      pin(dk);
      hand_over_dq<kTileIndex>(layout, dq, warpgroup, thread);
      // The next tile's keys and queries come while dK and dV are stored.
      ptx::mbarrier_arrive_if(q_ring.empty_barrier(q_at), lane == 0);
      ptx::mbarrier_arrive_if(layout.k_ring().empty_barrier(key_at), lane == 0);
      ptx::mbarrier_arrive_if(layout.v_ring().empty_barrier(key_at), lane == 0);
      q_at.advance();
      key_at.advance();
    }

    store_gradient<kElement, kHeadDim>(params, work, params.dk, dk, params.scale, first_key, lane);
    store_gradient<kElement, kHeadDim>(params, work, params.dv, dv, 1.f, first_key, lane);
  }
}

}  // namespace fa4

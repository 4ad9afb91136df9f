// The consumer warp groups of the backward for wide heads where dQ has a kernel of its own: one
// keeps dV, the other dK, of all keys of the thread block and all columns.
//
// The first computes S^T, P^T and dV, the second dP^T, dS^T and dK. Only P goes from the one to the
// other; both P^T and dS^T are operands in registers. The first issues S of the next block of
// queries before dV of this one, and makes P under dV. The second has one product after the other:
// the first's run meanwhile, and Q is wanted back for the block after the next.
//
// No product is under way where a loop turns.
#pragma once

#include "backward_math.cuh"
#include "backward_repair.cuh"

namespace fa4 {

// P^T of a step from one warp group to the other. What a thread has of it the same thread of the
// other needs, so it lies in shared memory as threads have it, sixteen bytes at a time.
template <int kCount>
__device__ __forceinline__ void hand_over(uint32_t place, const uint32_t (&p)[kCount], int thread) {
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    ptx::store_shared(place + (i * 128 + thread) * 16,
                      {static_cast<int>(p[4 * i]), static_cast<int>(p[4 * i + 1]),
                       static_cast<int>(p[4 * i + 2]), static_cast<int>(p[4 * i + 3])});
  }
}

template <int kCount>
__device__ __forceinline__ void take_over(uint32_t (&p)[kCount], uint32_t place, int thread) {
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const int4 quad = ptx::load_shared(place + (i * 128 + thread) * 16);
    p[4 * i] = quad.x, p[4 * i + 1] = quad.y, p[4 * i + 2] = quad.z, p[4 * i + 3] = quad.w;
  }
}

// dK or dV of a warp group's 64 keys, rows with a NaN computed again at once: nobody else has them.
template <Element kElement, int kHeadDim>
__device__ __forceinline__ void store_whole_gradient(const BackwardParams& params,
                                                     const BackwardWork& work, bool is_dk,
                                                     const float (&x)[kHeadDim / 2], int first_key,
                                                     int warp_key, int lane) {
  const TensorView& tensor = is_dk ? params.dk : params.dv;
  const float scale = is_dk ? params.scale : 1.f;
  NanWatch<kElement> watch[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = first_key + 8 * r;
    store_row<kElement, kHeadDim>(work.key(tensor, key, work.key_head), key < work.seq_k, x, r,
                                  scale, params.head_dim, lane, watch[r]);
  }
  const auto has_nan = [&](int r) { return first_key + 8 * r < work.seq_k && watch[r].found(); };
  repair_rows(has_nan, warp_key, [&](int key) {
    repair_key<kElement>(params, work, work.key_head, key, is_dk, lane);
  });
}

// Where the stages of Q, dO and P lie, which both warp groups go through in step: there are as many
// of each, so one position serves for all.
template <int kTileIndex>
struct WideStages {
  static constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  static_assert(kTile.block_m == 64 && kTile.block_n == 64);
  static_assert(kTile.head_dim % kPanelColumns == 0);
  static_assert(kTile.q_stages == kTile.do_stages && kTile.q_stages == kTile.exchange_slots());
  // Rows of others in dO of the next step are cleared before dO of this one has been read.
  static_assert(kTile.q_stages >= 2);
  using Position = RingPosition<kTile.q_stages>;

  const BackwardLayout<kTileIndex>& layout;

  __device__ __forceinline__ uint32_t q(Position at) const {
    return layout.q + at.stage() * kTile.q_bytes();
  }
  __device__ __forceinline__ uint32_t grad_out(Position at) const {
    return layout.grad_out + at.stage() * kTile.q_bytes();
  }
  __device__ __forceinline__ uint32_t p(Position at) const {
    return layout.exchange + at.stage() * kTile.score_bytes();
  }
};

// Whether a block of queries reaches behind the end of a packed sequence.
template <BackwardTile const& kTile>
__device__ __forceinline__ bool has_rows_of_others(const BackwardParams& params,
                                                   const BackwardWork& work, int block) {
  return params.cu_seqlens_q != nullptr && work.seq_q - block * kTile.block_m < kTile.block_m;
}

// The warp group that makes P.
template <int kTileIndex, Element kElement>
__device__ __forceinline__ void compute_dv(const BackwardParams& params,
                                           const BackwardLayout<kTileIndex>& layout) {
  using Layout = BackwardLayout<kTileIndex>;
  static constexpr BackwardTile kTile = Layout::kTile;
  constexpr int kHeadDim = kTile.head_dim, kM = kTile.block_m, kN = kTile.block_n;

  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, thread >> 5, 0);
  // What scaling makes minus infinity.
  const float masked_score = params.scale_log2 < 0 ? INFINITY : -INFINITY;
  const float scale_log2 = params.scale_log2;

  const auto q_ring = layout.q_ring();
  const auto do_ring = layout.do_ring();
  const auto p_ring = layout.exchange_ring();
  const WideStages<kTileIndex> memory{layout};
  TileReader tiles;
  RingPosition<kTile.q_stages> at;
  RingPosition<1> key_at;

#pragma unroll 1
  for (int tile = tiles.next(layout); tile >= 0; tile = tiles.next(layout)) {
    const BackwardWork work(params, tile);
    const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params, work);
    QuerySteps step(params, work, blocks);
    const int warp_key = work.n_block * kN + warp * 16;
    const int first_key = warp_key + (lane >> 2);
    const ColumnMask<kTile.mask> mask(params, work, first_key, lane);

    float s[kM / 2], dv[kHeadDim / 2];
    // By turns: one is an operand of dV while the next is made in the other. If it was made in one
    // place and moved, ptxas would make it in the other after all, and run all products one by one
    // (C7513).
    uint32_t p[kM / 4], next_p[kM / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dv[i] = 0.f;
    pin(dv);  // so that the zeros are made here, not between products

    if (step.left > 0) {
      // Rows of Q and dO behind a packed sequence's last, for both warp groups: the other waits for
      // P before it reads them.
      const auto clear_tails = [&] {
        if (!has_rows_of_others<kBackwardTiles[kTileIndex]>(params, work, step.block)) return;
        const int rows = work.seq_q - step.block * kM;
        do_ring.wait_full(at);
        clear_rows<kM, kTile.panels(), 128>(memory.q(at), rows, thread);
        clear_rows<kM, kTile.panels(), 128>(memory.grad_out(at), rows, thread);
        ptx::named_barrier_sync(kOwnBarrier, 128);
      };
      const auto issue_s = [&] {
        q_ring.wait_full(at);
        clear_tails();
        wgmma_fence();
        issue_scores<kElement, kHeadDim, kN, kM>(s, fresh_descriptor(layout.k, 16),
                                                 fresh_descriptor(memory.q(at), 16));
        wgmma_commit();
      };
      // There is room for P: the other has let go of this stage's last Q, which it does when it has
      // read P of that.
      const auto make_p = [&](uint32_t (&made)[kM / 4]) {
        pin(s);
        if (blocks.masked(step.block)) mask.template apply<kM>(s, step.block * kM, masked_score);
        probabilities<kElement, kM>(made, s, scale_log2,
                                    layout.negative_lse + at.stage() * Layout::kRowBytes, lane);
        ptx::mbarrier_arrive_if(q_ring.empty_barrier(at), lane == 0);
        hand_over(memory.p(at), made, thread);
        __syncwarp();
        ptx::mbarrier_arrive_if(p_ring.full_barrier(at), lane == 0);
      };
      const auto issue_dv = [&](const uint32_t (&weights)[kM / 4],
                                RingPosition<kTile.q_stages> from) {
        do_ring.wait_full(from);
        wgmma_fence();
        issue_pv<kElement, kHeadDim, kM>(dv, weights,
                                         fresh_descriptor(memory.grad_out(from), panel_bytes(kM)));
        wgmma_commit();
      };
      const auto finish_dv = [&](RingPosition<kTile.q_stages> from) {
        wgmma_wait<0>();
        pin(dv);
        ptx::mbarrier_arrive_if(do_ring.empty_barrier(from), lane == 0);
      };
      // dV of this step, P of the next.
      const auto go_on = [&](const uint32_t (&weights)[kM / 4], uint32_t (&next)[kM / 4]) {
        const auto from = at;
        step.advance(params, blocks);
        at.advance();
        issue_s();
        issue_dv(weights, from);
        wgmma_wait<1>();
        make_p(next);
        finish_dv(from);
      };
      const auto end = [&](const uint32_t (&weights)[kM / 4]) {
        ptx::mbarrier_arrive_if(layout.k_ring().empty_barrier(key_at), lane == 0);
        issue_dv(weights, at);
        finish_dv(at);
      };

      layout.k_ring().wait_full(key_at);
      issue_s();
      wgmma_wait<0>();
      make_p(p);
#pragma unroll 1
      while (step.left > 2) {
        go_on(p, next_p);
        go_on(next_p, p);
      }
      if (step.left > 1) {
        go_on(p, next_p);
        end(next_p);
      } else {
        end(p);
      }
      at.advance();
      key_at.advance();
    }
    store_whole_gradient<kElement, kHeadDim>(params, work, false, dv, first_key, warp_key, lane);
  }
}

// The warp group that makes dS.
template <int kTileIndex, Element kElement>
__device__ __forceinline__ void compute_dk(const BackwardParams& params,
                                           const BackwardLayout<kTileIndex>& layout) {
  using Layout = BackwardLayout<kTileIndex>;
  static constexpr BackwardTile kTile = Layout::kTile;
  constexpr int kHeadDim = kTile.head_dim, kM = kTile.block_m, kN = kTile.block_n;

  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, thread >> 5, 0);

  const auto q_ring = layout.q_ring();
  const auto do_ring = layout.do_ring();
  const auto p_ring = layout.exchange_ring();
  const WideStages<kTileIndex> memory{layout};
  TileReader tiles;
  RingPosition<kTile.q_stages> at;
  RingPosition<1> key_at;

#pragma unroll 1
  for (int tile = tiles.next(layout); tile >= 0; tile = tiles.next(layout)) {
    const BackwardWork work(params, tile);
    const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params, work);
    QuerySteps step(params, work, blocks);
    const int warp_key = work.n_block * kN + warp * 16;
    const int first_key = warp_key + (lane >> 2);
    const ColumnMask<kTile.mask> mask(params, work, first_key, lane);

    float dp[kM / 2], dk[kHeadDim / 2];
    uint32_t p[kM / 4], ds[kM / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = 0.f;
    pin(dk);

    if (step.left > 0) {
      layout.v_ring().wait_full(key_at);
#pragma unroll 1
      while (step.left > 0) {
        // Rows of others are zero when P is there.
        if (has_rows_of_others<kBackwardTiles[kTileIndex]>(params, work, step.block))
          p_ring.wait_full(at);
        do_ring.wait_full(at);
        wgmma_fence();
        issue_scores<kElement, kHeadDim, kN, kM>(dp, fresh_descriptor(layout.v, 16),
                                                 fresh_descriptor(memory.grad_out(at), 16));
        wgmma_commit();
        q_ring.wait_full(at);
        p_ring.wait_full(at);
        take_over(p, memory.p(at), thread);
        wgmma_wait<0>();
        pin(dp);
        if (blocks.masked(step.block)) mask.template apply<kM>(dp, step.block * kM, 0.f);
        score_gradients<kElement, kM>(ds, p, dp, layout.delta + at.stage() * Layout::kRowBytes,
                                      lane);
        ptx::mbarrier_arrive_if(do_ring.empty_barrier(at), lane == 0);
        wgmma_fence();
        issue_pv<kElement, kHeadDim, kM>(dk, ds, fresh_descriptor(memory.q(at), panel_bytes(kM)));
        wgmma_commit();
        wgmma_wait<0>();
        pin(dk);
        ptx::mbarrier_arrive_if(q_ring.empty_barrier(at), lane == 0);
        at.advance();
        step.advance(params, blocks);
      }
      ptx::mbarrier_arrive_if(layout.v_ring().empty_barrier(key_at), lane == 0);
      key_at.advance();
    }
    store_whole_gradient<kElement, kHeadDim>(params, work, true, dk, first_key, warp_key, lane);
  }
}

}  // namespace fa4

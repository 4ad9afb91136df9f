// dQ of wide heads in a kernel of its own: nothing is summed in global memory, so nothing is zeroed
// before and converted after, and gradients are the same bits every time.
//
// A thread block keeps Q and dO of 128 queries, each of its two consumer warp groups 64 of them,
// and goes over the keys that they see. S = Q K^T and dP = dO V^T are computed again; dS stays in
// registers as an operand of dQ += dS K. S of the next block is issued before dQ of this one, and P
// made under it.
//
// No product is under way where a loop turns.
#pragma once

#include "backward_math.cuh"
#include "backward_repair.cuh"

namespace fa4 {

// Shared memory and barriers. Q and dO lie in slabs of 64 rows, one of each for a warp group, with
// barriers of their own: it may be done with them before the other is.
template <int kTileIndex>
struct QueryLayout {
  static constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  static constexpr int kSlabRows = 64;
  static constexpr int kSlabBytes = kTile.panels() * panel_bytes(kSlabRows);
  static constexpr int kRowBytes = kSlabRows * 4;  // of negative_lse and of delta

  using SlabRing = Ring<1>;
  using KRing = Ring<kTile.k_stages>;
  using VRing = Ring<kTile.v_stages>;
  using TileRing = Ring<2>;

  uint32_t q, grad_out, k, v, negative_lse, delta, tiles, barriers;

  __device__ __forceinline__ explicit QueryLayout(uint32_t dynamic_shared) {
    q = (dynamic_shared + 1023) & ~1023u;
    grad_out = q + kWarpgroups * kSlabBytes;
    k = grad_out + kWarpgroups * kSlabBytes;
    v = k + kTile.k_stages * kTile.kv_bytes();
    negative_lse = v + kTile.v_stages * kTile.kv_bytes();
    delta = negative_lse + kWarpgroups * kRowBytes;
    tiles = delta + kWarpgroups * kRowBytes;
    barriers = tiles + 16;
  }

  __device__ __forceinline__ SlabRing q_ring(int warpgroup) const {
    return SlabRing(barriers + warpgroup * SlabRing::kBytes);
  }
  __device__ __forceinline__ SlabRing do_ring(int warpgroup) const {
    return q_ring(kWarpgroups + warpgroup);
  }
  __device__ __forceinline__ KRing k_ring() const { return KRing(q_ring(2 * kWarpgroups).full); }
  __device__ __forceinline__ VRing v_ring() const { return VRing(k_ring().full + KRing::kBytes); }
  // Numbers of the tiles to work on, -1 after the last.
  __device__ __forceinline__ TileRing tile_ring() const {
    return TileRing(v_ring().full + VRing::kBytes);
  }

  static constexpr int kBarrierBytes = 2 * BackwardTile::kWarpgroups * SlabRing::kBytes +
                                       KRing::kBytes + VRing::kBytes + TileRing::kBytes;
  static_assert(16 + kBarrierBytes <= 256);
  static_assert(kTile.query_shared_bytes() <= kMaxSharedBytes);
  static_assert(kRowAlignment % BackwardTile::kQueryRows == 0);

  // By one thread, before anyone else looks.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kWarps = 4 * kWarpgroups;
    for (int w = 0; w < kWarpgroups; ++w) {
      q_ring(w).init(4);
      do_ring(w).init(4);
    }
    k_ring().init(kWarps);
    v_ring().init(kWarps);
    tile_ring().init(kWarps + 1);  // the consumers, and who fetches dO
    ptx::fence_mbarrier_init();
    ptx::fence_proxy_async();
  }

 private:
  static constexpr int kWarpgroups = BackwardTile::kWarpgroups;
};

// What one thread keeps coming: blocks of K, and Q and lse; or V, and dO and delta.
template <Supply kSupply, int kTileIndex>
__device__ __forceinline__ void produce_for_dq(const BackwardParams& params,
                                               const QueryLayout<kTileIndex>& layout) {
  using Layout = QueryLayout<kTileIndex>;
  static constexpr BackwardTile kTile = Layout::kTile;
  constexpr bool kQueries = kSupply == Supply::kQueries;
  constexpr int kStages = kQueries ? kTile.k_stages : kTile.v_stages;

  const CUtensorMap* const key_map = kQueries ? &params.k_map : &params.v_map;
  const CUtensorMap* const query_map = kQueries ? &params.q_map : &params.grad_out_map;
  if (params.seq_k > 0) {
    ptx::prefetch_tensor_map(key_map);
    ptx::prefetch_tensor_map(query_map);
  }

  const Ring<kStages> key_ring(kQueries ? layout.k_ring().full : layout.v_ring().full);
  RingPosition<kStages> key_at;
  RingPosition<1> slab_at;
  const auto load_slabs = [&](const QueryWork& work) {
    const int unit =  // of 64 rows of the workspaces
        static_cast<int>(workspace_row(params, work.number, work.head, work.q_start) / 64) +
        work.first_query / 64;
#pragma unroll 1
    for (int w = 0; w < BackwardTile::kWarpgroups; ++w) {
      const auto ring = kQueries ? layout.q_ring(w) : layout.do_ring(w);
      ring.wait_empty(slab_at);
      ptx::mbarrier_arrive_expect_tx(ring.full, Layout::kSlabBytes + Layout::kRowBytes);
      load_panels<kTile.panels()>(
          query_map, (kQueries ? layout.q : layout.grad_out) + w * Layout::kSlabBytes,
          Layout::kSlabRows, ring.full, work.q_start + work.first_query + w * Layout::kSlabRows,
          work.head, work.batch);
      ptx::bulk_load((kQueries ? layout.negative_lse : layout.delta) + w * Layout::kRowBytes,
                     (kQueries ? params.negative_lse : params.delta) + int64_t{unit + w} * 64,
                     Layout::kRowBytes, ring.full);
    }
    slab_at.advance();
  };
  const auto load_tile = [&](int tile) {
    const QueryWork work(params, tile);
    const KeyBlocks<kBackwardTiles[kTileIndex]> blocks(params, work, work.first_query,
                                                       BackwardTile::kQueryRows);
    if (blocks.empty()) return;
    const auto load_keys = [&](int row) {
      const uint32_t full = key_ring.full_barrier(key_at);
      key_ring.wait_empty(key_at);
      ptx::mbarrier_arrive_expect_tx(full, kTile.kv_bytes());
      load_panels<kTile.panels()>(
          key_map, (kQueries ? layout.k : layout.v) + key_at.stage() * kTile.kv_bytes(),
          kTile.block_n, full, row, work.key_head, work.batch);
      key_at.advance();
    };
    // The first keys have room before the last tile's queries have been used up.
    int row = work.k_start + blocks.begin * kTile.block_n;
    const int end_row = work.k_start + blocks.end * kTile.block_n;
    load_keys(row);
    load_slabs(work);
#pragma unroll 1
    for (row += kTile.block_n; row < end_row; row += kTile.block_n) load_keys(row);
  };

  if constexpr (kQueries) {
    deal_tiles(params, layout, load_tile);
  } else {
    TileReader tiles;
#pragma unroll 1
    for (int tile = tiles.next(layout); tile >= 0; tile = tiles.next(layout)) load_tile(tile);
  }
}

// P = exp2(scale_log2 * S - log2(e) * lse), rounded. The lse of a thread's two rows is read for
// every block: as registers go, two are dear.
template <Element kElement, int kColumns>
__device__ __forceinline__ void row_probabilities(uint32_t (&p)[kColumns / 4],
                                                  const float (&s)[kColumns / 2], float scale_log2,
                                                  uint32_t negative_lse_of_rows) {
  const float negative_lse[2] = {ptx::load_shared_float(negative_lse_of_rows),
                                 ptx::load_shared_float(negative_lse_of_rows + 8 * 4)};
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    p[i] = ptx::pack<kElement>(ptx::exp2(fmaf(s[2 * i], scale_log2, negative_lse[i & 1])),
                               ptx::exp2(fmaf(s[2 * i + 1], scale_log2, negative_lse[i & 1])));
  }
}

// dS = P * (dP - delta), rounded: the A operand of dS K.
template <Element kElement, int kColumns>
__device__ __forceinline__ void row_score_gradients(uint32_t (&ds)[kColumns / 4],
                                                    const uint32_t (&p)[kColumns / 4],
                                                    const float (&dp)[kColumns / 2],
                                                    uint32_t delta_of_rows) {
  const float delta[2] = {ptx::load_shared_float(delta_of_rows),
                          ptx::load_shared_float(delta_of_rows + 8 * 4)};
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    const float2 weights = ptx::unpack<kElement>(p[i]);
    ds[i] = ptx::pack<kElement>(weights.x * (dp[2 * i] - delta[i & 1]),
                                weights.y * (dp[2 * i + 1] - delta[i & 1]));
  }
  __syncwarp();  // all lanes have read, before one of them lets go of the rows
}

template <int kTileIndex, Element kElement>
__device__ __forceinline__ void compute_dq(const BackwardParams& params,
                                           const QueryLayout<kTileIndex>& layout, int warpgroup) {
  using Layout = QueryLayout<kTileIndex>;
  static constexpr BackwardTile kTile = Layout::kTile;
  constexpr int kHeadDim = kTile.head_dim, kM = Layout::kSlabRows, kN = kTile.block_n;
  static_assert(kN == 64 && kHeadDim % kPanelColumns == 0);
  // K of the next block is there while K of this one is read.
  static_assert(kTile.k_stages >= 2);

  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, thread >> 5, 0);
  // What scaling makes minus infinity.
  const float masked_score = params.scale_log2 < 0 ? INFINITY : -INFINITY;
  const float scale_log2 = params.scale_log2;

  const auto q_ring = layout.q_ring(warpgroup);
  const auto do_ring = layout.do_ring(warpgroup);
  const auto k_ring = layout.k_ring();
  const auto v_ring = layout.v_ring();
  const uint32_t q = layout.q + warpgroup * Layout::kSlabBytes;
  const uint32_t grad_out = layout.grad_out + warpgroup * Layout::kSlabBytes;
  // Of a thread's first row, among numbers of rows.
  const int row_bytes = warpgroup * Layout::kRowBytes + (warp * 16 + (lane >> 2)) * 4;
  TileReader tiles;
  RingPosition<1> slab_at;
  RingPosition<kTile.k_stages> k_at;
  RingPosition<kTile.v_stages> v_at;

#pragma unroll 1
  for (int tile = tiles.next(layout); tile >= 0; tile = tiles.next(layout)) {
    const QueryWork work(params, tile);
    const int slab_query = work.first_query + warpgroup * kM;
    const int warp_query = slab_query + warp * 16;
    const int first_query = warp_query + (lane >> 2);
    const KeyBlocks<kBackwardTiles[kTileIndex]> brought(params, work, work.first_query,
                                                        BackwardTile::kQueryRows);
    const KeyBlocks<kBackwardTiles[kTileIndex]> own(params, work, slab_query, kM);
    const RowMask<kTile.mask> mask(params, work, first_query, lane);

    float s[kN / 2], dq[kHeadDim / 2];  // s: S, then dP
    uint32_t p[kN / 4], ds[kN / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dq[i] = 0.f;
    pin(dq);  // so that the zeros are made here, not between products

    const auto k_tile = [&](RingPosition<kTile.k_stages> at) {
      return layout.k + at.stage() * kTile.kv_bytes();
    };
    // K of a block is there; rows behind a packed sequence's last become zero, by both warp groups.
    const auto wait_for_k = [&](int block) {
      k_ring.wait_full(k_at);
      const int rows = work.seq_k - block * kN;
      if (params.cu_seqlens_k != nullptr && rows < kN) {
        clear_rows<kN, kTile.panels(), 256>(k_tile(k_at), rows, warpgroup * 128 + thread);
        ptx::named_barrier_sync(kClearedBarrier, 256);
      }
    };
    // Blocks that the other warp group's rows see, and none of these.
    const auto pass_by = [&](int begin, int end) {
#pragma unroll 1
      for (int block = begin; block < end; ++block) {
        wait_for_k(block);
        ptx::mbarrier_arrive_if(k_ring.empty_barrier(k_at), lane == 0);
        k_at.advance();
        v_ring.wait_full(v_at);
        ptx::mbarrier_arrive_if(v_ring.empty_barrier(v_at), lane == 0);
        v_at.advance();
      }
    };
    const auto let_go_of_queries = [&] {
      ptx::mbarrier_arrive_if(q_ring.empty_barrier(slab_at), lane == 0);
      ptx::mbarrier_arrive_if(do_ring.empty_barrier(slab_at), lane == 0);
      slab_at.advance();
    };

    if (!own.empty()) {
      const auto issue_s = [&] {
        issue_scores<kElement, kHeadDim, kM, kN>(s, fresh_descriptor(q, 16),
                                                 fresh_descriptor(k_tile(k_at), 16));
        wgmma_commit();
      };
      const auto issue_dp = [&] {
        v_ring.wait_full(v_at);
        wgmma_fence();
        issue_scores<kElement, kHeadDim, kM, kN>(
            s, fresh_descriptor(grad_out, 16),
            fresh_descriptor(layout.v + v_at.stage() * kTile.kv_bytes(), 16));
        wgmma_commit();
      };
      const auto issue_dq = [&](RingPosition<kTile.k_stages> from) {
        issue_pv<kElement, kHeadDim, kN>(dq, ds, fresh_descriptor(k_tile(from), panel_bytes(kN)));
        wgmma_commit();
      };
      const auto make_p = [&](int block) {
        pin(s);
        if (own.masked(block)) mask.template apply<kN>(s, block * kN, masked_score);
        row_probabilities<kElement, kN>(p, s, scale_log2, layout.negative_lse + row_bytes);
      };
      const auto make_ds = [&](int block) {
        pin(s);
        ptx::mbarrier_arrive_if(v_ring.empty_barrier(v_at), lane == 0);
        v_at.advance();
        if (own.masked(block)) mask.template apply<kN>(s, block * kN, 0.f);
        row_score_gradients<kElement, kN>(ds, p, s, layout.delta + row_bytes);
      };

      pass_by(brought.begin, own.begin);
      int block = own.begin;
      wait_for_k(block);
      q_ring.wait_full(slab_at);
      wgmma_fence();
      issue_s();
      do_ring.wait_full(slab_at);
      wgmma_wait<0>();
      make_p(block);
      issue_dp();
      wgmma_wait<0>();
      make_ds(block);
#pragma unroll 1
      while (++block < own.end) {
        const auto before = k_at;
        k_at.advance();
        wait_for_k(block);
        wgmma_fence();
        issue_s();
        issue_dq(before);
        wgmma_wait<1>();
        make_p(block);
        issue_dp();
        wgmma_wait<1>();
        pin(dq);
        ptx::mbarrier_arrive_if(k_ring.empty_barrier(before), lane == 0);
        wgmma_wait<0>();
        make_ds(block);
      }
      let_go_of_queries();
      wgmma_fence();
      issue_dq(k_at);
      wgmma_wait<0>();
      pin(dq);
      ptx::mbarrier_arrive_if(k_ring.empty_barrier(k_at), lane == 0);
      k_at.advance();
      pass_by(own.end, brought.end);
    } else if (!brought.empty()) {
      pass_by(brought.begin, brought.end);
      q_ring.wait_full(slab_at);
      do_ring.wait_full(slab_at);
      let_go_of_queries();
    }

    NanWatch<kElement> watch[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_query + 8 * r;
      store_row<kElement, kHeadDim>(work.query(params.dq, query, work.head), query < work.seq_q, dq,
                                    r, params.scale, params.head_dim, lane, watch[r]);
    }
    const auto has_nan = [&](int r) {
      return first_query + 8 * r < work.seq_q && watch[r].found();
    };
    repair_rows(has_nan, warp_query, [&](int query) {
      const int64_t row = workspace_row(params, work.number, work.head, work.q_start) + query;
      repair_query<kElement>(params, work.number, work.head, query, row, lane);
    });
  }
}

// As many thread blocks as multiprocessors, of one producer warp group and two consumers.
template <int kTileIndex, Element kElement>
__global__ void __launch_bounds__(kBackwardTiles[kTileIndex].threads(), 1)
    backward_query_kernel(const __grid_constant__ BackwardParams params) {
  constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  extern __shared__ uint8_t dynamic_shared[];
  const QueryLayout<kTileIndex> layout(ptx::shared_address(dynamic_shared));
  if (threadIdx.x == 0) layout.init_barriers();
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_decrease<kTile.producer_registers()>();
    if (threadIdx.x == 0) {
      produce_for_dq<Supply::kQueries>(params, layout);
    } else if (threadIdx.x == 32) {
      produce_for_dq<Supply::kGradients>(params, layout);
    }
  } else {
    ptx::setmaxnreg_increase<kTile.consumer_registers()>();
    compute_dq<kTileIndex, kElement>(params, layout, warpgroup - 1);
  }
}

}  // namespace fa4

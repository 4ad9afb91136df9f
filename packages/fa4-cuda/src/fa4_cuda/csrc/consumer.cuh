// A consumer warp group: 64 rows of the tile, from scores to O.
//
// In a steady step the products S = Q K(n)^T and O += P V(n + 1) are in flight together, and the
// softmax of S runs while the other warp groups' products do. A tile's last product runs together
// with the first of the next tile.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "mask.cuh"
#include "pipeline.cuh"
#include "scheduler.cuh"
#include "softmax.cuh"

namespace fa4 {

// The blocks of a warp group's rows, within those of the tile: the producer loads the latter, so
// what a warp group does not need it lets go unread.
template <ForwardTile const& kTile>
struct ConsumerBlocks {
  int begin, end, clean_begin, clean_end;
  int skip_first, skip_last;  // in the order of work, from the last block to the first

  __device__ __forceinline__ ConsumerBlocks(const ForwardParams& params, const Work& work,
                                            int warpgroup) {
    using Range = BlockRange<kTile.mask, kTile.block_n>;
    const int tile_last = min(work.first_query + params.schedule.tile_queries, work.seq_q) - 1;
    const Range tile(params, work, work.first_query, tile_last);
    const int first = work.first_query + warpgroup * params.slab_queries;
    const Range mine(params, work, first, min(first + params.slab_queries - 1, tile_last));
    clean_begin = mine.clean_begin;
    clean_end = mine.clean_end;
    if (first > tile_last) {  // no rows of the sequence: one block, for the sake of order
      end = tile.end;
      begin = end - 1;
    } else {
      // Skipping more first blocks than there are stages would wait for blocks whose room is not
      // free yet.
      end = max(max(min(mine.end, tile.end), tile.begin + 1), tile.end - (kTile.kv_stages - 1));
      begin = max(min(mine.begin, end - 1), tile.begin);
    }
    skip_first = tile.end - end;
    skip_last = begin - tile.begin;
  }
};

template <int kTileIndex, Element kElement>
__device__ __forceinline__ void consume(const ForwardParams& params,
                                        const SharedLayout<kTileIndex>& layout, int warpgroup) {
  using Layout = SharedLayout<kTileIndex>;
  static constexpr ForwardTile kTile = Layout::kTile;
  constexpr int kHeadDim = kTile.head_dim, kBlockN = kTile.block_n;
  using Blocks = ConsumerBlocks<kForwardTiles[kTileIndex]>;

  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, thread >> 5, 0);
  const int row = warp * 16 + (lane >> 2);  // and row + 8
  const float scale_log2 = params.scale_log2;

  const auto q_ring = layout.q_ring(warpgroup);
  const auto k_ring = layout.k_ring(), v_ring = layout.v_ring();
  const auto work_ring = layout.work_ring();
  RingPosition<kTile.q_stages> q_at;
  RingPosition<kTile.kv_stages> k_at, v_at;
  RingPosition<Layout::kWorkSlots> work_at;

  float s[kBlockN / 2], o[kHeadDim / 2];
  uint32_t p[kBlockN / 4];
  uint32_t q_registers[kTile.q_in_registers ? kHeadDim / 4 : 1];
  OnlineSoftmax<kBlockN> softmax;

  const uint64_t q_descriptor = matrix_descriptor(layout.q_slab(0, warpgroup), 16);
  const uint64_t k_descriptor = matrix_descriptor(layout.k, 16);
  const uint64_t v_descriptor = matrix_descriptor(layout.v, panel_bytes(kBlockN));

  const auto issue_scores = [&] {
    const uint64_t k = k_descriptor + k_at.stage() * (kTile.kv_bytes() >> 4);
    if constexpr (kTile.q_in_registers) {
      issue_qk<kElement, kHeadDim, kBlockN>(s, q_registers, k);
    } else {
      issue_qk<kElement, kHeadDim, kBlockN>(s, q_descriptor + q_at.stage() * (kTile.q_bytes() >> 4),
                                            k);
    }
    wgmma_commit();
  };
  const auto issue_output = [&] {
    issue_pv<kElement, kHeadDim, kBlockN>(o, p,
                                          v_descriptor + v_at.stage() * (kTile.kv_bytes() >> 4));
    wgmma_commit();
  };
  const auto free_k = [&] {
    ptx::mbarrier_arrive_if(k_ring.empty_barrier(k_at), lane == 0);
    k_at.advance();
  };
  const auto free_v = [&] {
    ptx::mbarrier_arrive_if(v_ring.empty_barrier(v_at), lane == 0);
    v_at.advance();
  };

  // Turns: a warp group issues its products between wait_turn and pass_turn, one turn a block of
  // the tile.
  const int my_turn = kTurnBarrier + warpgroup;
  const int next_turn = kTurnBarrier + (warpgroup + 1 == kTile.warpgroups ? 0 : warpgroup + 1);
  const auto wait_turn = [&] {
    if constexpr (kTile.ping_pong) ptx::named_barrier_sync(my_turn, 256);
  };
  const auto pass_turn = [&] {
    if constexpr (kTile.ping_pong) ptx::named_barrier_arrive(next_turn, 256);
  };
  if (warpgroup == kTile.warpgroups - 1) pass_turn();  // the first turn is the first group's

  // Q of the tile at q_at, ready to be multiplied.
  const auto wait_q = [&] {
    q_ring.wait_full(q_at);
    const uint32_t slab = layout.q_slab(q_at.stage(), warpgroup);
    if (params.negate_q) {
#pragma unroll 1
      for (int i = thread; i < Layout::kSlabBytes / 16; i += 128) {
        int4 eight = ptx::load_shared(slab + 16 * i);
        eight.x ^= 0x80008000, eight.y ^= 0x80008000, eight.z ^= 0x80008000, eight.w ^= 0x80008000;
        ptx::store_shared(slab + 16 * i, eight);
      }
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kSlabBarrier + warpgroup, 128);
    }
    if constexpr (kTile.q_in_registers) {
      load_a_fragments<kHeadDim>(q_registers, slab, warp, lane);
      __syncwarp();
      ptx::mbarrier_arrive_if(q_ring.empty_barrier(q_at), lane == 0);
    }
  };
  // K of the first block that matters, past those that do not.
  const auto wait_first_k = [&](int skip) {
    k_ring.wait_full(k_at);
    if constexpr (kTile.mask != Mask::kFull) {
#pragma unroll 1
      for (; skip > 0; --skip) {
        free_k();
        k_ring.wait_full(k_at);
      }
    }
  };

  work_ring.wait_full(work_at);
  const Work first_work = read_work(layout, work_at);
  if (first_work.done()) return;
  Blocks blocks(params, first_work, warpgroup);
  wait_q();
  wait_first_k(blocks.skip_first);
  wgmma_fence();
  issue_scores();

#pragma unroll 1
  while (true) {
    // ---- the first block: its scores are on their way to s
    // Where there are no registers for them, the rows' bounds are computed for every masked block.
    constexpr bool kKeepBounds = kTile.warpgroups == 2 || kTile.mask != Mask::kWindow;
    int key_begin[2], key_end[2];
    const auto find_bounds = [&] {
      const Work work = read_work(layout, work_at);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const SlabRow slab_row(params, work, warpgroup, row + 8 * r);
        const VisibleKeys<kTile.mask> keys(params, work, slab_row.query);
        key_begin[r] = keys.begin - 2 * (lane & 3);
        key_end[r] = keys.end - 2 * (lane & 3);
      }
    };
    if constexpr (kKeepBounds) find_bounds();
    const auto mask = [&](int block) {
      if constexpr (!kKeepBounds) find_bounds();
      apply_mask<kTile.mask, kBlockN>(s, key_begin, key_end, block * kBlockN);
    };
    const int begin = blocks.begin, clean_begin = blocks.clean_begin, clean_end = blocks.clean_end;
    const int skip_first = blocks.skip_first, skip_last = blocks.skip_last;
    const auto free_q_after = [&](int block) {
      if (!kTile.q_in_registers)
        ptx::mbarrier_arrive_if(q_ring.empty_barrier(q_at), lane == 0 && block == begin);
    };
    int block = blocks.end - 1;

#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.f;
    softmax.reset();
    wgmma_wait<0>();
    pin(s);
    free_k();
    if (block >= clean_end || block < clean_begin) mask(block);
    softmax.template update<true>(s, scale_log2);
    to_operand<kElement, kBlockN>(p, s);
    softmax.rescale[0] = softmax.rescale[1] = 1.f;  // O is zero

    free_q_after(block);
    if constexpr (kTile.mask != Mask::kFull) {
#pragma unroll 1
      for (int i = 0; i < skip_first; ++i) {
        v_ring.wait_full(v_at);
        free_v();
        wait_turn();
        pass_turn();
      }
    }

    // ---- steps: S = Q K(block)^T and O += P V(block + 1)
    const auto step = [&](auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      k_ring.wait_full(k_at);
      wait_turn();
      wgmma_fence();
      issue_scores();
      if constexpr (kTile.rescale_under_qk) softmax.rescale_output(o);
      v_ring.wait_full(v_at);
      wgmma_fence();
      issue_output();
      pass_turn();
      wgmma_wait<1>();
      pin(s);
      free_k();
      free_q_after(block);
      if constexpr (kMasked) mask(block);
      softmax.template update<kMasked>(s, scale_log2);
      // Left alone, ptxas waits for O before, between or after the maxima, as the code elsewhere
      // has it: up to 5% of a launch. Where scores hide the rescaling of O it does as it should.
      if constexpr (!kTile.rescale_under_qk)
        ptx::order_after(softmax.row_max[0], softmax.row_max[1]);
      wgmma_wait<0>();
      pin(o);
      free_v();
      to_operand<kElement, kBlockN>(p, s);
      if constexpr (!kTile.rescale_under_qk) softmax.rescale_output(o);
    };
    --block;
    if constexpr (kTile.mask != Mask::kFull) {
#pragma unroll 1
      for (; block >= max(begin, clean_end); --block) step(std::true_type{});
    }
    const int steady_begin = kTile.mask == Mask::kWindow ? max(begin, clean_begin) : begin;
#pragma unroll 1
    for (; block >= steady_begin; --block) step(std::false_type{});
    if constexpr (kTile.mask == Mask::kWindow) {
#pragma unroll 1
      for (; block >= begin; --block) step(std::true_type{});
    }

    // ---- the last O += P V, and beside it the first S = Q K^T of the next tile
    if constexpr (kTile.rescale_under_qk) softmax.rescale_output(o);
    v_ring.wait_full(v_at);
    wait_turn();
    wgmma_fence();
    issue_output();
    pass_turn();  // the others need not wait until the next tile is known and its Q has come
    const bool skips_last = skip_last > 0;
    if (skips_last) {
      wgmma_wait<0>();
      pin(o);
      free_v();
#pragma unroll 1
      for (int i = 0; i < skip_last; ++i) {
        k_ring.wait_full(k_at);
        free_k();
        wait_turn();
        pass_turn();
        v_ring.wait_full(v_at);
        free_v();
      }
    }
    // The producer names the next tile when it has loaded all of this one: whoever asks must have
    // let go, or be using, every block before the last.
    q_at.advance();
    work_at.advance();
    work_ring.wait_full(work_at);
    const Work next = read_work(layout, work_at);
    const bool more = !next.done();
    blocks = Blocks(params, next, warpgroup);
    if (more) {
      wait_q();
      wait_first_k(blocks.skip_first);
    }
    wgmma_fence();
    issue_scores();  // after the last tile this multiplies what happens to lie there, for nobody
    wgmma_wait<1>();
    pin(o);
    if (!skips_last) free_v();

    // ---- O and lse of the finished tile
    const auto stored_at = work_at.previous();
    const Work stored = read_work(layout, stored_at);
    softmax.total();
    PackedOutput<kHeadDim> output;
    normalize<kElement, kHeadDim>(output, o, softmax);
    const SlabRow rows[2] = {SlabRow(params, stored, warpgroup, row),
                             SlabRow(params, stored, warpgroup, row + 8)};
    store_registers<kHeadDim>(params, stored, rows, output, lane);
    // Blocks hold keys that nobody or not everybody sees if there is a mask, the next sequence
    // follows in memory, or the cache is longer than it is full.
    const bool unseen_keys =
        kTile.mask != Mask::kFull || params.cu_seqlens_k != nullptr || params.seqused_k != nullptr;
    if (unseen_keys) {
      recompute_nan_rows<kElement, kTile.mask, kHeadDim>(
          params, stored, warpgroup, warp, lane, rows, output, softmax.row_max, softmax.row_sum);
    }
    store_lse(params, stored, rows, softmax, lane);
    __syncwarp();
    ptx::mbarrier_arrive_if(work_ring.empty_barrier(stored_at), lane == 0);
    if (!more) break;
  }
  wgmma_wait<0>();
}

}  // namespace fa4

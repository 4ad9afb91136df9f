// Which tile a thread block works on next.
//
// The producer draws tiles and publishes them in a ring in shared memory; the consumers only read
// there. A tile is named by its number; numbers run through sections of heads whose K and V fit in
// L2 together, and within a section from the last row block, the longest under a causal mask, to
// the first.
#pragma once

#include "forward_params.h"
#include "pipeline.cuh"

namespace fa4 {

// One tile: queries from first_query on, of one head of one sequence.
struct Work {
  int first_query;  // -1: there is no more work
  int head;
  int batch;  // 0 if sequences are packed
  int seq_q;
  int seq_k;
  int q_start;  // first row of the sequence in the packed tensors
  int k_start;

  __device__ __forceinline__ bool done() const { return first_query < 0; }
};

template <class Layout>
__device__ __forceinline__ void publish_work(const Layout& layout,
                                             RingPosition<Layout::kWorkSlots> at,
                                             const Work& work) {
  const uint32_t slot = layout.work + at.stage() * Layout::kWorkBytes;
  layout.work_ring().wait_empty(at);
  ptx::store_shared(slot, {work.first_query, work.head, work.batch, work.seq_q});
  ptx::store_shared(slot + 16, {work.seq_k, work.q_start, work.k_start, 0});
  ptx::mbarrier_arrive(layout.work_ring().full_barrier(at));
}

// Read twice, when a tile begins and when it is stored, so that it takes no registers in between.
template <class Layout>
__device__ __forceinline__ Work read_work(const Layout& layout,
                                          RingPosition<Layout::kWorkSlots> at) {
  const uint32_t slot = layout.work + at.stage() * Layout::kWorkBytes;
  const int4 a = ptx::load_shared(slot), b = ptx::load_shared(slot + 16);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z};
}

// The scheduler's memory (Schedule::state).
struct ScheduleState {
  static constexpr int kNextTile = 0;  // tiles drawn so far, beyond the first of each thread block
  static constexpr int kFinished = 1;  // thread blocks that found no more work
  static constexpr int kTiles = 2;
  static constexpr int kTable =
      4;  // packed: first tile of the i-th longest sequence [sequences + 1], its number [sequences]
};

class TileSource {
 public:
  __device__ __forceinline__ explicit TileSource(const ForwardParams& params)
      : params_(params), schedule_(params.schedule), tile_(blockIdx.x) {
    tiles_ = packed() ? schedule_.state[ScheduleState::kTiles] : schedule_.tiles;
  }

  __device__ __forceinline__ Work current() const {
    if (tile_ >= tiles_) return {-1, 0, 0, 0, 0, 0, 0};
    return packed() ? packed_work() : dense_work();
  }

  __device__ __forceinline__ void advance() {
    tile_ = schedule_.dynamic ? atomicAdd(schedule_.state + ScheduleState::kNextTile, 1) + gridDim.x
                              : tile_ + gridDim.x;
  }

  // The last thread block leaves the counters as it found them, zero.
  __device__ __forceinline__ void finish() const {
    if (!schedule_.dynamic) return;
    __threadfence();
    if (atomicAdd(schedule_.state + ScheduleState::kFinished, 1) ==
        static_cast<int>(gridDim.x) - 1) {
      schedule_.state[ScheduleState::kNextTile] = 0;
      schedule_.state[ScheduleState::kFinished] = 0;
    }
  }

 private:
  __device__ __forceinline__ bool packed() const { return params_.cu_seqlens_q != nullptr; }

  __device__ __forceinline__ void locate(Work& work, int tile, int heads) const {
    const int m_blocks = (work.seq_q + schedule_.tile_queries - 1) / schedule_.tile_queries;
    const int section = min(heads, max(1, schedule_.section_keys / max(1, work.seq_k)));
    const int index = tile / (section * m_blocks);
    const int rest = tile - index * section * m_blocks;
    const int wide = min(section, heads - index * section);
    const int row = rest / wide;
    work.head = index * section + rest - row * wide;
    work.first_query = (m_blocks - 1 - row) * schedule_.tile_queries;
  }

  __device__ __forceinline__ Work dense_work() const {
    Work work{0, 0, 0, params_.seq_q, params_.seq_k, 0, 0};
    locate(work, tile_, schedule_.heads * schedule_.sequences);
    work.batch = work.head / schedule_.heads;
    work.head -= work.batch * schedule_.heads;
    if (params_.seqused_k != nullptr) work.seq_k = params_.seqused_k[work.batch];
    return work;
  }

  __device__ __forceinline__ Work packed_work() const {
    const int* first_tile = schedule_.state + ScheduleState::kTable;
    int low = 0, high = schedule_.sequences;  // first_tile[low] <= tile < first_tile[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_tile[middle] <= tile_ ? low : high) = middle;
    }
    const int sequence = first_tile[schedule_.sequences + 1 + low];
    Work work;
    work.batch = 0;
    work.q_start = params_.cu_seqlens_q[sequence];
    work.k_start = params_.cu_seqlens_k[sequence];
    work.seq_q = params_.cu_seqlens_q[sequence + 1] - work.q_start;
    work.seq_k = params_.seqused_k != nullptr ? params_.seqused_k[sequence]
                                              : params_.cu_seqlens_k[sequence + 1] - work.k_start;
    locate(work, tile_ - first_tile[low], schedule_.heads);
    return work;
  }

  const ForwardParams& params_;
  const Schedule& schedule_;
  int tile_;
  int tiles_;
};

}  // namespace fa4

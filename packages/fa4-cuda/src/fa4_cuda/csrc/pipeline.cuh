// Shared memory of a thread block and its barriers: who waits for whom.
#pragma once

#include "ptx.cuh"
#include "tiles.h"
#include "wgmma.cuh"

namespace fa4 {

// Position in a ring of kStages buffers. The phase flips with every round. For one, two or four
// stages both are bits of one counter, which saves a register.
template <int kStages, bool kIsPowerOfTwo = (kStages & (kStages - 1)) == 0>
class RingPosition {
 public:
  __device__ __forceinline__ int stage() const { return count_ & (kStages - 1); }
  __device__ __forceinline__ uint32_t phase() const { return count_ / kStages & 1; }
  __device__ __forceinline__ void advance() { ++count_; }
  __device__ __forceinline__ RingPosition previous() const {
    RingPosition position = *this;
    --position.count_;
    return position;
  }

 private:
  uint32_t count_ = 0;
};

template <int kStages>
class RingPosition<kStages, false> {
 public:
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t phase() const { return phase_; }
  __device__ __forceinline__ void advance() {
    if (++stage_ == kStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  uint32_t phase_ = 0;
};

// A ring of kStages buffers: `full` completes when the bytes are in, `empty` when every reader has
// let go.
template <int kStages>
struct Ring {
  uint32_t full;  // shared memory address of kStages barriers
  uint32_t empty;

  static constexpr int kBytes = 2 * kStages * 8;

  __device__ __forceinline__ explicit Ring(uint32_t barriers)
      : full(barriers), empty(barriers + kStages * 8) {}

  __device__ __forceinline__ void init(int readers) const {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, readers);
    }
  }
  __device__ __forceinline__ void wait_full(RingPosition<kStages> at) const {
    ptx::mbarrier_wait(full + 8 * at.stage(), at.phase());
  }
  // The first round finds every buffer empty: the phase before the first counts as complete.
  __device__ __forceinline__ void wait_empty(RingPosition<kStages> at) const {
    ptx::mbarrier_wait(empty + 8 * at.stage(), at.phase() ^ 1);
  }
  __device__ __forceinline__ uint32_t full_barrier(RingPosition<kStages> at) const {
    return full + 8 * at.stage();
  }
  __device__ __forceinline__ uint32_t empty_barrier(RingPosition<kStages> at) const {
    return empty + 8 * at.stage();
  }
};

// Shared memory addresses. Q comes in slabs of 64 rows, one per consumer warp group, each with its
// own barriers: a warp group may go on to its next tile while another still reads.
template <int kTileIndex>
struct SharedLayout {
  static constexpr ForwardTile kTile = kForwardTiles[kTileIndex];
  static constexpr int kSlabBytes = panel_bytes(64) * kTile.panels();
  static constexpr int kWorkSlots = 4;
  static constexpr int kWorkBytes = 32;

  using QRing = Ring<kTile.q_stages>;
  using KvRing = Ring<kTile.kv_stages>;
  using WorkRing = Ring<kWorkSlots>;

  uint32_t q, k, v, work, barriers;

  __device__ __forceinline__ explicit SharedLayout(uint32_t dynamic_shared) {
    q = (dynamic_shared + 1023) & ~1023u;
    k = q + kTile.q_stages * kTile.q_bytes();
    v = k + kTile.kv_stages * kTile.kv_bytes();
    work = v + kTile.kv_stages * kTile.kv_bytes();
    barriers = work + kWorkSlots * kWorkBytes;
  }

  __device__ __forceinline__ QRing q_ring(int warpgroup) const {
    return QRing(barriers + warpgroup * QRing::kBytes);
  }
  __device__ __forceinline__ KvRing k_ring() const {
    return KvRing(barriers + kTile.warpgroups * QRing::kBytes);
  }
  __device__ __forceinline__ KvRing v_ring() const {
    return KvRing(k_ring().full + KvRing::kBytes);
  }
  __device__ __forceinline__ WorkRing work_ring() const {
    return WorkRing(v_ring().full + KvRing::kBytes);
  }

  static constexpr int kBarrierBytes =
      kTile.warpgroups * QRing::kBytes + 2 * KvRing::kBytes + WorkRing::kBytes;
  static_assert(kWorkSlots * kWorkBytes + kBarrierBytes <= 512);
  static_assert(kTile.shared_bytes() <= kMaxSharedBytes);

  __device__ __forceinline__ uint32_t q_slab(int stage, int warpgroup) const {
    return q + stage * kTile.q_bytes() + warpgroup * kSlabBytes;
  }

  // By one thread, before anyone else looks.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kWarps = 4 * kTile.warpgroups;
    for (int w = 0; w < kTile.warpgroups; ++w) q_ring(w).init(4);
    k_ring().init(kWarps);
    v_ring().init(kWarps);
    work_ring().init(kWarps);
    ptx::fence_mbarrier_init();
    ptx::fence_proxy_async();
  }
};

// Named barriers. 0 is __syncthreads.
constexpr int kTurnBarrier = 1;  // + warp group: its turn to issue products
constexpr int kSlabBarrier = 4;  // + warp group: its Q was changed in shared memory

}  // namespace fa4

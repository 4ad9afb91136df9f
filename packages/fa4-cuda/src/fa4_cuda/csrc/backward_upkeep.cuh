// Upkeep of the sums of dQ, under the products, by the warps that take dQ away: sums of heads that
// come later are zeroed, and dQ is made of those that are complete, while both are in L2.
//
// Every tile has a share (SumsShare) in the sums of two heads: of that whose tiles come zero_lead
// later, which it zeroes, and of that whose tiles came convert_lag earlier, which it converts when
// all of that head's tiles have been added. Counters of each head say how far it is. The kernels
// before and after do what nobody does here: the sums of the first zero_lead tiles are zeroed
// before, and what has not been converted, or came out NaN, is converted after.
//
// A tile waits for its zeros alone, which earlier tiles of thread blocks that run have under way,
// since tiles are drawn; for nothing that is to be converted does anyone wait.
#pragma once

#include "backward_work.cuh"
#include "nan_watch.cuh"
#include "quad.cuh"

namespace fa4 {

template <BackwardTile const& kTile, Element kElement>
class SumsUpkeep {
 public:
  // By one of the thread block's warps that do so, with shared memory of its own.
  __device__ __forceinline__ SumsUpkeep(const BackwardParams& params, int warp, uint32_t memory)
      : params_(params), memory_(memory) {
    if constexpr (kTile.tends_sums()) {
      if constexpr (kTile.converts_behind()) {
        if (ptx::lane_id() == 0) {
          for (int i = 0; i < kRingSlices; ++i) ptx::mbarrier_init(slice_barrier(i), 1);
          ptx::fence_mbarrier_init();
        }
      }
      if constexpr (kTile.zeroes_ahead()) {
#pragma unroll 1
        for (int i = ptx::lane_id() * 16; i < kTile.kZeroBytes; i += 32 * 16)
          ptx::store_shared(zeros() + i, {0, 0, 0, 0});
      }
      ptx::fence_proxy_async();
      if (ptx::lane_id() == 0) {
        for (const Note each : {kZeroed, kShareTile, kNextTile, kSlice}) note(each, kNone);
        note(kWarp, warp);
        note(kStage, kTileBegins);
        note(kIsComplete, false);
      }
      __syncwarp();
    }
  }

  // While the warp group fills its buffer, before each of a tile's additions.
  __device__ __forceinline__ void meanwhile(int tile) const {
    if constexpr (kTile.tends_sums()) {
      if (!is_asked_for()) return;
      const int stage = noted(kStage);
      __syncwarp();  // all have looked
      if (stage == kTileBegins) {
        if (ptx::lane_id() == 0) {
          zero(tile + params_.zero_lead);
          take_share(tile - params_.convert_lag);
          await_zeros(tile);
          note(kStage, noted(kZeroed) == kNone ? kZerosAreThere : kZerosCome);
        }
        __syncwarp();
        return;
      }
      if (stage == kZerosCome) {
        if (ptx::lane_id() == 0) {
          ptx::bulk_wait_but_one();  // an addition was asked for after them
          ptx::fence_gpu();          // the wait was for this thread's eyes only
          tell_zeros();
          note(kStage, kZerosAreThere);
        }
        __syncwarp();
      }
      if constexpr (kTile.converts_behind()) convert_some();
    }
  }

  // Behind the last addition of a tile, if there was any.
  __device__ __forceinline__ void end(int tile) const {
    if constexpr (kTile.tends_sums()) {
      if (!is_asked_for()) return;
      if (ptx::lane_id() == 0) {
        bool waits = true;
        if (noted(kStage) == kTileBegins) {
          waits = zero(tile + params_.zero_lead);
          take_share(tile - params_.convert_lag);
        }
        if (waits) {
          ptx::bulk_wait();
          ptx::fence_gpu();
        }
        tell_zeros();
        if constexpr (kTile.converts_behind()) ptx::add_relaxed(params_.added + head_of(tile), 1);
        note(kStage, kTileBegins);
      }
      __syncwarp();
    }
  }

  // Behind the last tile. Loads may be under way.
  __device__ __forceinline__ void finish() const {
    if constexpr (kTile.converts_behind()) {
#pragma unroll 1
      while (noted(kSlice) != kNone) convert_slice();
    }
  }

 private:
  static constexpr int kWarps = BackwardTile::kWarpgroups;  // that share a share, unit by unit
  static constexpr int kUnitBytes = 64 * kTile.head_dim * 4;
  // Of a unit: 16 rows of 32 columns each, by the order of accumulators four runs of 512 bytes.
  static constexpr int kSlices = kTile.head_dim / 32 * 4;
  static constexpr int kRunBytes = BackwardTile::kSliceBytes / 4;
  static constexpr int kRingSlices = BackwardTile::kSlicesAtOnce;
  static_assert(kUnitBytes % BackwardTile::kZeroBytes == 0 && kWarps == 2);
  // Each unit finds every barrier in its first phase.
  static_assert(kSlices % (2 * kRingSlices) == 0);

  // What a warp has to remember, in shared memory: registers are few where it runs.
  enum Note {
    kWarp,        // of the two
    kStage,       // how far it is with a tile's zeros
    kZeroed,      // the head whose sums it is zeroing
    kShareTile,   // the share that it converts: of which tile, or kNone,
    kUnit,        // which unit,
    kEnd,         // and where it ends
    kNextTile,    // the share that comes after
    kIsComplete,  // whether the sums of the head are
    kSlice,       // of the unit, or kNone if that has not been begun
    kWorkspaceUnit,
    kRows,     // of the unit that exist
    kIsClean,  // whether no NaN has been among them
    kOut,      // the unit's first row of dQ, in two words
    kNotes = kOut + 2
  };
  enum Stage { kTileBegins, kZerosCome, kZerosAreThere };
  static constexpr int kNone = -1;
  static constexpr int kBarriers = (4 * kNotes + 7) / 8 * 8;  // behind them: of slices
  static_assert(kBarriers + 8 * kRingSlices <= BackwardTile::kNoteBytes);

  __device__ __forceinline__ int noted(int note) const {
    return ptx::load_shared_int(memory_ + 4 * note);
  }
  // By one thread, between a __syncwarp behind which nobody looks and one before which nobody does.
  __device__ __forceinline__ void note(int note, int value) const {
    ptx::store_shared_int(memory_ + 4 * note, value);
  }
  __device__ __forceinline__ uint32_t zeros() const { return memory_ + BackwardTile::kNoteBytes; }
  __device__ __forceinline__ uint32_t slice_place(int slice) const {
    return zeros() + (kTile.zeroes_ahead() ? BackwardTile::kZeroBytes : 0) +
           slice % kRingSlices * BackwardTile::kSliceBytes;
  }
  __device__ __forceinline__ uint32_t slice_barrier(int slice) const {
    return memory_ + kBarriers + 8 * (slice % kRingSlices);
  }
  // Of all sequences' key heads.
  __device__ __forceinline__ int head_index(const TilePlace& place) const {
    return place.sequence * params_.heads_k + place.head;
  }
  __device__ __forceinline__ int head_of(int tile) const {
    return head_index(TilePlace(params_, tile, params_.heads_k));
  }
  // All warps that have a part in it.
  __device__ __forceinline__ bool all_have(const int* counter) const {
    return ptx::load_acquire(counter) == kWarps * params_.n_blocks;
  }

  // A unit of a head's sums.
  struct Unit {
    int head;  // of the queries
    int first_row;
    int64_t workspace_row;

    __device__ __forceinline__ Unit(const BackwardParams& params, const Sequence& sequence,
                                    int key_head, int units, int unit) {
      const int head_of_group = unit / units;
      head = key_head * params.heads_per_group + head_of_group;
      first_row = (unit - head_of_group * units) * 64;
      workspace_row =
          fa4::workspace_row(params, sequence.number, head, sequence.q_start) + first_row;
    }
  };

  // Without queries there are no sums.
  __device__ __forceinline__ bool is_asked_for() const { return params_.added != nullptr; }

  // What follows is by one thread, but for the conversion.

  // Whether there is anything to wait for.
  __device__ __forceinline__ bool zero(int tile) const {
    if (!kTile.zeroes_ahead() || tile >= params_.tiles) return false;
    const TilePlace place(params_, tile, params_.heads_k);
    const Sequence sequence(params_, place.sequence);
    const SumsShare share(params_, sequence, place.block);
    note(kZeroed, head_index(place));
#pragma unroll 1
    for (int i = share.begin + (noted(kWarp) ^ (tile & 1)); i < share.end; i += kWarps) {
      const Unit unit(params_, sequence, place.head, share.units, i);
      auto* const sums = reinterpret_cast<char*>(
          params_.dq_sums + dq_panel(unit.workspace_row, kTile.head_dim, 0));
#pragma unroll 1
      for (int byte = 0; byte < kUnitBytes; byte += BackwardTile::kZeroBytes)
        ptx::bulk_store(sums + byte, zeros(), BackwardTile::kZeroBytes);
    }
    ptx::bulk_commit();
    return share.begin < share.end;
  }

  __device__ __forceinline__ void await_zeros(int tile) const {
    if (!kTile.zeroes_ahead() || tile < params_.zero_lead) return;
    const int* const zeroed = params_.zeroed + head_of(tile);
    while (!all_have(zeroed)) {
    }
    ptx::fence_proxy_async_global();
  }

  // Once they are there for everybody; if that has not been said.
  __device__ __forceinline__ void tell_zeros() const {
    if constexpr (kTile.zeroes_ahead()) {
      if (const int head = noted(kZeroed); head != kNone)
        ptx::add_relaxed(params_.zeroed + head, 1);
      note(kZeroed, kNone);
    }
  }

  // Behind the one that is being converted, instead of the one that waits.
  __device__ __forceinline__ void take_share(int tile) const {
    if (!kTile.converts_behind() || tile < 0) return;
    note(kNextTile, tile);
    if (noted(kShareTile) == kNone) begin_share();
  }

  __device__ __forceinline__ void begin_share() const {
    const int tile = noted(kNextTile);
    note(kNextTile, kNone);
    note(kShareTile, kNone);
    note(kIsComplete, false);
    if (tile == kNone) return;
    const TilePlace place(params_, tile, params_.heads_k);
    const SumsShare share(params_, Sequence(params_, place.sequence), place.block);
    const int first = share.begin + (noted(kWarp) ^ (tile & 1));  // a share may be a single unit
    if (first >= share.end) return;
    note(kShareTile, tile);
    note(kUnit, first);
    note(kEnd, share.end);
  }

  __device__ __forceinline__ void convert_some() const {
    constexpr int kAtOnce = 3;  // keeps up where causal tiles have half of the steps
#pragma unroll 1
    for (int i = 0; i < kAtOnce && noted(kShareTile) != kNone; ++i) {
      if (noted(kSlice) == kNone) {
        begin_unit();
        break;  // its first slices are on their way
      }
      convert_slice();
    }
  }

  // Once all that is to be added to the head has been.
  __device__ __forceinline__ void begin_unit() const {
    __syncwarp();  // all have seen that it has not been begun
    if (ptx::lane_id() == 0) {
      const TilePlace place(params_, noted(kShareTile), params_.heads_k);
      const Sequence sequence(params_, place.sequence);
      if (noted(kIsComplete) || all_have(params_.added + head_index(place))) {
        note(kIsComplete, true);
        const Unit unit(params_, sequence, place.head, SumsShare::units_of(sequence),
                        noted(kUnit));
        note(kWorkspaceUnit, static_cast<int>(unit.workspace_row / 64));
        const auto out = reinterpret_cast<uint64_t>(
            sequence.query(params_.dq, unit.first_row, unit.head));
        note(kOut, static_cast<int>(out));
        note(kOut + 1, static_cast<int>(out >> 32));
        note(kRows, sequence.seq_q - unit.first_row);
        note(kIsClean, true);
        note(kSlice, 0);
        ptx::fence_proxy_async_global();
#pragma unroll 1
        for (int i = 0; i < kRingSlices; ++i) load_slice(i);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void load_slice(int slice) const {
    const int run = (slice >> 2) * (4 * 4 * kRunBytes) + (slice & 3) * kRunBytes;
    const auto* const source =
        reinterpret_cast<const char*>(params_.dq_sums +
                                      dq_panel(int64_t{noted(kWorkspaceUnit)} * 64,
                                               kTile.head_dim, 0)) +
        run;
    ptx::mbarrier_arrive_expect_tx(slice_barrier(slice), BackwardTile::kSliceBytes);
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      ptx::bulk_load_last(slice_place(slice) + i * kRunBytes, source + i * 4 * kRunBytes,
                          kRunBytes, slice_barrier(slice));
    }
  }

  __device__ __forceinline__ void convert_slice() const {
    const int slice = noted(kSlice);
    ptx::mbarrier_wait(slice_barrier(slice), slice / kRingSlices & 1);
    const int lane = ptx::lane_id(), rows = noted(kRows);
    const int first_row = (slice & 3) * 16 + (lane >> 2);
    const int column = (slice >> 2) * 32 + 8 * (lane & 3);
    NanWatch<kElement> watch;
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      uint32_t quad[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 sum =
            ptx::load_shared_float2(slice_place(slice) + i * kRunBytes + lane * 16 + r * 8);
        quad[i] = ptx::pack<kElement>(sum.x * params_.scale, sum.y * params_.scale);
        if (row < rows) watch.see(quad[i]);
      }
      transpose_quad(quad, lane);
      if (row < rows && column < params_.head_dim) {
        const uint64_t out = static_cast<uint32_t>(noted(kOut)) |
                             static_cast<uint64_t>(noted(kOut + 1)) << 32;
        *reinterpret_cast<uint4*>(reinterpret_cast<uint16_t*>(out) +
                                  row * params_.dq.stride_seq + column) =
            make_uint4(quad[0], quad[1], quad[2], quad[3]);
      }
    }
    const bool has_nan = __any_sync(~0u, watch.found());
    __syncwarp();  // all have read
    if (lane == 0) {
      if (has_nan) note(kIsClean, false);
      if (slice + kRingSlices < kSlices) load_slice(slice + kRingSlices);
      note(kSlice, slice + 1);
      if (slice + 1 == kSlices) {
        params_.converted[noted(kWorkspaceUnit)] = noted(kIsClean);
        const int next = noted(kUnit) + kWarps;
        note(kSlice, kNone);
        note(kUnit, next);
        if (next >= noted(kEnd)) begin_share();
      }
    }
    __syncwarp();
  }

  const BackwardParams& params_;
  uint32_t memory_;
};

}  // namespace fa4

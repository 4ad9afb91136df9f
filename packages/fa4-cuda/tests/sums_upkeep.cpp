// The upkeep of dQ's sums (backward_upkeep.cuh) by the host compiler, between additions as the
// warps make them that take dQ away: every sum begins with zero, and every row of dQ that is said
// to be made of them is.
//
// Reads calls from its input, a line each, and says of each what was wrong, or "right" and how many
// units of how many were converted.
#define __device__
#define __forceinline__ inline

#include <algorithm>
#include <cstring>
#include <limits>

using std::max, std::min;

#include "backward_call.h"
#include "backward_upkeep.cuh"

using namespace fa4;

namespace {

struct Call : SizedCall {
  int seed, head_dim;
  int blocks, section, lead, lag;  // thread blocks; sections by which sums are zeroed ahead; tiles
  int with_nan;
};

constexpr uint16_t kUntouched = 0xABCD;
constexpr float kScale = 0.5f;

// What a tile adds to a number of a unit's sums: small integers, whose sums are exact.
float part(int tile, int64_t unit, int i) {
  return static_cast<float>((tile * 7 + unit * 5 + i * 3) % 31 + 1);
}

template <int kTileIndex>
class Launch {
 public:
  static constexpr const BackwardTile& kTile = kBackwardTiles[kTileIndex];
  static constexpr int kUnitSums = 64 * kTile.head_dim;

  explicit Launch(const Call& call) : call_(call), params_(call_.params()) {
    params_.head_dim = call.head_dim;
    params_.scale = kScale;
    params_.n_blocks = (params_.seq_k + kTile.block_n - 1) / kTile.block_n;
    params_.section = call.section;
    params_.tiles = params_.n_blocks * params_.heads_k * params_.batch;
    params_.zero_lead = call.lead * params_.section * params_.n_blocks;
    params_.convert_lag = call.lag;

    const bool packed = call.is_packed();
    const int64_t heads = packed ? call.heads_q : int64_t{call.batch} * call.heads_q;
    units_ = params_.workspace_rows * heads / 64;
    sums_.assign(units_ * kUnitSums, std::numeric_limits<float>::quiet_NaN());
    expected_.assign(units_ * kUnitSums, 0.f);
    exists_.assign(units_, false);
    zeroed_.assign(params_.batch * params_.heads_k, 0);
    added_ = zeroed_;
    converted_.assign(units_, 0);
    const int tensor_rows = packed ? call.q_starts.back() : params_.batch * params_.seq_q;
    dq_.assign(static_cast<size_t>(tensor_rows) * call.heads_q * call.head_dim, kUntouched);
    params_.dq.data = dq_.data();
    params_.dq.stride_head = call.head_dim;
    params_.dq.stride_seq = static_cast<int64_t>(call.heads_q) * call.head_dim;
    params_.dq.stride_batch = packed ? 0 : params_.seq_q * params_.dq.stride_seq;
    params_.dq_sums = sums_.data();
    if (params_.seq_q > 0) {  // or nothing is prepared
      params_.zeroed = zeroed_.data();
      params_.added = added_.data();
      params_.converted = converted_.data();
    }
    prepare();
  }

  void run() {
    host::Machine machine;
    host::machine = &machine;
    machine.may_tell_while_adding = [this](const int* counter) {
      return counter >= zeroed_.data() && counter < zeroed_.data() + zeroed_.size();
    };
    machine.chance.seed(call_.seed);
    // Thread blocks draw tiles; both warps of one go through the same.
    int next = 0;
    std::vector<std::vector<int>> drawn(call_.blocks);
    constexpr int kBytes = kTile.upkeep_bytes_of_a_warp();
    for (int block = 0; block < call_.blocks; ++block) {
      machine.shared.emplace_back(2 * kBytes, '\xAA');
      machine.barriers.emplace_back();
      for (int warp = 0; warp < 2; ++warp) {
        machine.warps.emplace_back();
        for (int lane = 0; lane < 32; ++lane) {
          machine.start(block, 2 * block + warp, lane, [&, block, warp] {
            SumsUpkeep<kBackwardTiles[kTileIndex], Element::kBfloat16> upkeep(
                params_, warp, warp * kBytes);
            for (size_t i = 0;; ++i) {
              if (i == drawn[block].size()) drawn[block].push_back(next++);
              const int tile = drawn[block][i];
              if (tile >= params_.tiles) break;
              add_tile(tile, warp, upkeep);
              upkeep.end(tile);
            }
            upkeep.finish();
            ptx::bulk_wait();
          });
        }
      }
    }
    machine.run();
  }

  // What is wrong, or nullptr.
  const char* verdict() {
    for (size_t i = 0; i < zeroed_.size(); ++i) {
      const int warps = 2 * params_.n_blocks;
      const bool ahead = is_zeroed_ahead(static_cast<int>(i));
      const bool counts = kTile.converts_behind() && params_.added != nullptr;
      if (zeroed_[i] != (ahead ? warps : 0)) return "a head is not said to be zeroed";
      if (added_[i] != (counts ? warps : 0)) return "a head is not said to be added";
    }
    for_each_unit([&](const Sequence& sequence, int head, int row, int64_t unit) {
      for (int r = 0; r < 64 && row + r < sequence.seq_q; ++r) {
        for (int c = 0; c < call_.head_dim; ++c) {
          const uint16_t made = sequence.query(params_.dq, row + r, head)[c];
          const float sum = expected_[unit * kUnitSums + place_of(r, c)];
          // What is not said to be made may be, up to where it was found to be NaN.
          const bool may_be_untouched = converted_[unit] == 0 && made == kUntouched;
          if (!may_be_untouched && made != ptx::rounded(sum * kScale)) wrong_ = "dQ is wrong";
          if (converted_[unit] != 0 && std::isnan(sum)) wrong_ = "a NaN was let through";
        }
      }
      for (int i = 0; i < kUnitSums; ++i) {
        const int row_of_sum = i % 512 / 128 * 16 + i % 128 / 16 + i % 4 / 2 * 8;
        if (row + row_of_sum >= sequence.seq_q) continue;  // of nobody
        const float sum = sums_[unit * kUnitSums + i], right = expected_[unit * kUnitSums + i];
        if (sum != right && !(std::isnan(sum) && std::isnan(right))) wrong_ = "a sum is wrong";
      }
    });
    return wrong_;
  }

  long converted() const { return std::count(converted_.begin(), converted_.end(), 1); }
  long units() const { return std::count(exists_.begin(), exists_.end(), true); }

 private:
  // Row and column of dQ in the order of accumulators: panels of 64 columns, in these eights of
  // them, in these four by four of a thread.
  static int place_of(int row, int column) {
    const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
    return column / 64 * (64 * 64) + column % 64 / 8 * 512 + thread * 4 + row % 16 / 8 * 2 +
           column % 2;
  }

  // use(sequence, query head, first row, unit of the workspace)
  template <class Use>
  void for_each_unit(const Use& use) {
    for (int number = 0; number < params_.batch; ++number) {
      const Sequence sequence(params_, number);
      for (int head = 0; head < params_.heads_q; ++head) {
        for (int row = 0; row < sequence.seq_q; row += 64)
          use(sequence, head, row,
              (workspace_row(params_, number, head, sequence.q_start) + row) / 64);
      }
    }
  }

  bool is_zeroed_ahead(int key_head) const {
    return kTile.zeroes_ahead() && are_zeroed_ahead(params_, key_head);
  }

  // As backward_prepare does.
  void prepare() {
    for_each_unit([&](const Sequence& sequence, int head, int, int64_t unit) {
      exists_[unit] = true;
      const int key_head = sequence.number * params_.heads_k + head / params_.heads_per_group;
      if (is_zeroed_ahead(key_head)) return;
      std::fill_n(&sums_[unit * kUnitSums], kUnitSums, 0.f);
    });
  }

  // As DqTaker goes.
  template <class Upkeep>
  void add_tile(int tile, int warp, Upkeep& upkeep) {
    const BackwardWork work(params_, tile);
    const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params_, work);
    QuerySteps<kBackwardTiles[kTileIndex]> step(params_, work, blocks);
    for (; step.left > 0; step.advance(params_, blocks)) {
      upkeep.meanwhile(tile);
      __syncwarp();
      if (ptx::lane_id() != 0) continue;
      const int64_t unit = step.unit + (kTile.splits_rows() ? warp : 0);
      const int first = kTile.splits_rows() ? 0 : warp * 64 * 64;
      const int count = min(kUnitSums - first, 64 * 64);
      std::vector<float> values;
      for (int i = first; i < first + count; ++i) values.push_back(part(tile, unit, i));
      if (call_.with_nan && (unit + tile) % 5 == 0)
        values[call_.seed % values.size()] = std::numeric_limits<float>::quiet_NaN();
      // Nothing is added to rows behind a sequence's end in the kernel either, but zeros.
      if (unit >= units_ || !exists_[unit]) continue;
      for (int i = 0; i < count; ++i) expected_[unit * kUnitSums + first + i] += values[i];
      ptx::bulk_reduce_add(&sums_[unit * kUnitSums + first], values);
      while (host::machine->chance() % 2) host::machine->yield();
    }
  }

  Call call_;
  BackwardParams params_;
  int64_t units_;
  std::vector<float> sums_, expected_;
  std::vector<bool> exists_;
  std::vector<int> zeroed_, added_, converted_;
  std::vector<uint16_t> dq_;
  const char* wrong_ = nullptr;
};

template <int kTileIndex>
void attempt(const Call& call) {
  Launch<kTileIndex> launch(call);
  const char* wrong;
  try {
    launch.run();
    wrong = launch.verdict();
  } catch (const host::Error& error) {
    wrong = error.what;
  }
  if (wrong != nullptr) {
    std::printf("%s\n", wrong);
  } else {
    std::printf("right %ld %ld\n", launch.converted(), launch.units());
  }
}

}  // namespace

int main() {
  Call call;
  while (std::scanf("%d %d %d %d %d %d %d %d %d %d %d %d %d", &call.seed, &call.head_dim,
                    &call.batch, &call.heads_q, &call.heads_k, &call.window_left,
                    &call.window_right, &call.is_windowed, &call.blocks, &call.section, &call.lead,
                    &call.lag, &call.with_nan) == 13) {
    if (!call.read_lengths()) return 1;
    static_assert(kBackwardTiles[0].head_dim == 64 && kBackwardTiles[2].head_dim == 96 &&
                  kBackwardTiles[5].head_dim == 128 && kBackwardTiles[5].mask == Mask::kWindow);
    const int tile = (call.head_dim <= 64 ? 0 : call.head_dim <= 96 ? 2 : 4) + call.is_windowed;
    switch (tile) {
      case 0: attempt<0>(call); break;
      case 1: attempt<1>(call); break;
      case 2: attempt<2>(call); break;
      case 3: attempt<3>(call); break;
      case 4: attempt<4>(call); break;
      default: attempt<5>(call); break;
    }
  }
}

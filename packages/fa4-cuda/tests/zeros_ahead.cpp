// Zeros for dQ's sums (backward_zeros.cuh) by the host compiler, between additions by the warps that
// take dQ away: every sum begins with zero, and nothing is zeroed that has been added to.
//
// Reads calls from its input, a line each, and says of each what was wrong, or "right" and how many
// heads of how many were zeroed ahead.
#define __device__
#define __forceinline__ inline

#include <algorithm>
#include <cmath>
#include <limits>

using std::max, std::min;

#include "backward_call.h"
#include "backward_zeros.cuh"

using namespace fa4;

namespace {

struct Call : SizedCall {
  int seed, head_dim;
  int blocks, section, lead;  // thread blocks; sections by which sums are zeroed ahead
};

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
    params_.n_blocks = (params_.seq_k + kTile.block_n - 1) / kTile.block_n;
    params_.section = call.section;
    params_.tiles = params_.n_blocks * params_.heads_k * params_.batch;
    params_.zero_lead = call.lead * params_.section * params_.n_blocks;

    const int64_t heads = call.is_packed() ? call.heads_q : int64_t{call.batch} * call.heads_q;
    units_ = params_.workspace_rows * heads / 64;
    sums_.assign(units_ * kUnitSums, std::numeric_limits<float>::quiet_NaN());
    expected_.assign(units_ * kUnitSums, 0.f);
    exists_.assign(units_, false);
    zeroed_.assign(params_.batch * params_.heads_k, 0);
    params_.dq_sums = sums_.data();
    params_.zeroed = zeroed_.data();
    prepare();
  }

  void run() {
    host::Machine machine;
    host::machine = &machine;
    machine.chance.seed(call_.seed);
    // Thread blocks draw tiles; both warps of one go through the same.
    int next = 0;
    std::vector<std::vector<int>> drawn(call_.blocks);
    for (int block = 0; block < call_.blocks; ++block) {
      for (int warp = 0; warp < 2; ++warp) {
        machine.start([&, block, warp] {
          for (size_t i = 0;; ++i) {
            if (i == drawn[block].size()) drawn[block].push_back(next++);
            const int tile = drawn[block][i];
            if (tile >= params_.tiles) break;
            zero_ahead<kBackwardTiles[kTileIndex]>(params_, tile, 0, warp);
            await_zeros(params_, tile);
            add_tile(tile, warp);
          }
          ptx::bulk_wait();
        });
      }
    }
    machine.run();
  }

  // What is wrong, or nullptr.
  const char* verdict() {
    for (int i = 0; i < heads(); ++i) {
      const int warps = are_zeroed_ahead(params_, i) ? 2 * params_.n_blocks : 0;
      if (zeroed_[i] != warps) return "a head is not said to be zeroed";
    }
    for_each_unit([&](const Sequence& sequence, int, int row, int64_t unit) {
      for (int i = 0; i < kUnitSums; ++i) {
        const int row_of_sum = i % 512 / 128 * 16 + i % 128 / 16 + i % 4 / 2 * 8;
        if (row + row_of_sum >= sequence.seq_q) continue;  // of nobody
        if (sums_[unit * kUnitSums + i] != expected_[unit * kUnitSums + i])
          wrong_ = "a sum is wrong";
      }
    });
    for (int64_t unit = 0; unit < units_; ++unit) {
      if (!exists_[unit] && !std::isnan(sums_[unit * kUnitSums])) return "zeroes what is nobody's";
    }
    return wrong_;
  }

  int heads() const { return static_cast<int>(zeroed_.size()); }
  int ahead() const {
    int count = 0;
    for (int i = 0; i < heads(); ++i) count += are_zeroed_ahead(params_, i);
    return count;
  }

 private:
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

  // As backward_prepare does.
  void prepare() {
    for_each_unit([&](const Sequence& sequence, int head, int, int64_t unit) {
      exists_[unit] = true;
      const int key_head = sequence.number * params_.heads_k + head / params_.heads_per_group;
      if (are_zeroed_ahead(params_, key_head)) return;
      std::fill_n(&sums_[unit * kUnitSums], kUnitSums, 0.f);
    });
  }

  // As DqTaker goes.
  void add_tile(int tile, int warp) {
    const BackwardWork work(params_, tile);
    const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params_, work);
    QuerySteps<kBackwardTiles[kTileIndex]> step(params_, work, blocks);
    for (; step.left > 0; step.advance(params_, blocks)) {
      const int64_t unit = step.unit + (kTile.splits_rows() ? warp : 0);
      const int first = kTile.splits_rows() ? 0 : warp * 64 * 64;
      const int count = min(kUnitSums - first, 64 * 64);
      std::vector<float> values;
      for (int i = first; i < first + count; ++i) values.push_back(part(tile, unit, i));
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
  std::vector<int> zeroed_;
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
    std::printf("right %d %d\n", launch.ahead(), launch.heads());
  }
}

}  // namespace

int main() {
  Call call;
  while (std::scanf("%d %d %d %d %d %d %d %d %d %d %d", &call.seed, &call.head_dim, &call.batch,
                    &call.heads_q, &call.heads_k, &call.window_left, &call.window_right,
                    &call.is_windowed, &call.blocks, &call.section, &call.lead) == 11) {
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

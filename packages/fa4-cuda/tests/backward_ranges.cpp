// What tiles, masks and rows of the workspace the backward's kernels go through, by the host
// compiler, against the definition: every pair of a query and a key that see each other counts
// once, in the registers of the thread that has it, and no other pair does.
//
// Reads calls from its input, a line each, and says of each how many pairs were wrong.
#define __device__
#define __forceinline__ inline

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <set>
#include <tuple>
#include <vector>

using std::max, std::min;

#include "backward_call.h"
#include "backward_mask.cuh"

using namespace fa4;

namespace {

// Accumulators [64, 64] of a warp group: register i of a lane.
int row_of(int warp, int lane, int i) { return warp * 16 + (lane >> 2) + i / 2 % 2 * 8; }
int column_of(int lane, int i) { return i / 4 * 8 + (lane & 3) * 2 + i % 2; }

// Of a [64, 64] block of scores, those that are left by a mask of a thread: use(row, column).
template <class MaskOf, class Use>
void for_each_left(bool masked, int first_column, const MaskOf& mask_of, const Use& use) {
  for (int warp = 0; warp < 4; ++warp) {
    for (int lane = 0; lane < 32; ++lane) {
      float s[32];
      std::fill(s, s + 32, 1.f);
      if (masked) mask_of(row_of(warp, lane, 0), lane).template apply<64>(s, first_column, 0.f);
      for (int i = 0; i < 32; ++i) {
        if (s[i] != 0.f) use(row_of(warp, lane, i), first_column + column_of(lane, i));
      }
    }
  }
}

class Pairs {
 public:
  explicit Pairs(const Sequence& sequence)
      : sequence_(sequence), counts_(static_cast<size_t>(sequence.seq_q) * sequence.seq_k) {}

  void count(int query, int key) {
    if (query < sequence_.seq_q && key < sequence_.seq_k)
      ++counts_[static_cast<size_t>(query) * sequence_.seq_k + key];
  }

  int wrong(const BackwardParams& params) const {
    int found = 0;
    for (int query = 0; query < sequence_.seq_q; ++query) {
      for (int key = 0; key < sequence_.seq_k; ++key) {
        const int distance = key - (query + sequence_.seq_k - sequence_.seq_q);
        const int sees = -params.window_left <= distance && distance <= params.window_right;
        found += counts_[static_cast<size_t>(query) * sequence_.seq_k + key] != sees;
      }
    }
    return found;
  }

 private:
  Sequence sequence_;
  std::vector<int> counts_;
};

// All pairs of a head, by the tiles of dQ's own kernel or by those of dK and dV.
using PairsOfHeads = std::vector<Pairs>;

int wrong_in(const PairsOfHeads& heads, const BackwardParams& params) {
  int found = 0;
  for (const Pairs& pairs : heads) found += pairs.wrong(params);
  return found;
}

PairsOfHeads all_heads(const BackwardParams& params) {
  PairsOfHeads heads;
  for (int number = 0; number < params.batch; ++number) {
    for (int head = 0; head < params.heads_q; ++head) heads.emplace_back(Sequence(params, number));
  }
  return heads;
}

template <int kTileIndex>
int wrong_of_queries(BackwardParams params) {
  static constexpr const BackwardTile& kTile = kBackwardTiles[kTileIndex];
  constexpr int kRows = BackwardTile::kQueryRows;
  params.n_blocks = (params.seq_q + kRows - 1) / kRows;
  params.tiles = params.n_blocks * params.heads_q * params.batch;
  params.section = min(params.section * params.heads_per_group, params.heads_q * params.batch);
  PairsOfHeads heads = all_heads(params);
  std::set<int64_t> rows;  // of the workspace, by 64
  int found = 0;
  for (int tile = 0; tile < params.tiles; ++tile) {
    const QueryWork work(params, tile);
    const KeyBlocks<kBackwardTiles[kTileIndex]> brought(params, work, work.first_query, kRows);
    found += work.key_head != work.head / params.heads_per_group;
    for (int slab = 0; slab < 2; ++slab) {
      const int first_query = work.first_query + 64 * slab;
      const KeyBlocks<kBackwardTiles[kTileIndex]> own(params, work, first_query, 64);
      if (!brought.empty()) {
        const int64_t row =
            workspace_row(params, work.number, work.head, work.q_start) + first_query;
        found += !rows.insert(row / 64).second;
      }
      if (own.empty()) continue;
      found += own.begin < brought.begin || own.end > brought.end;
      for (int block = own.begin; block < own.end; ++block) {
        for_each_left(
            own.masked(block), block * 64,
            [&](int row, int lane) {
              return RowMask<kTile.mask>(params, work, first_query + row, lane);
            },
            [&](int row, int key) {
              heads[work.number * params.heads_q + work.head].count(first_query + row, key);
            });
      }
    }
  }
  return found + wrong_in(heads, params);
}

template <int kTileIndex>
int wrong_of_keys(BackwardParams params) {
  static constexpr const BackwardTile& kTile = kBackwardTiles[kTileIndex];
  params.n_blocks = (params.seq_k + 63) / 64;
  params.tiles = params.n_blocks * params.heads_k * params.batch;
  PairsOfHeads heads = all_heads(params);
  int found = 0;
  for (int tile = 0; tile < params.tiles; ++tile) {
    const BackwardWork work(params, tile);
    const QueryBlocks<kBackwardTiles[kTileIndex]> blocks(params, work);
    QuerySteps<kBackwardTiles[kTileIndex]> step(params, work, blocks);
    for (; step.left > 0; step.advance(params, blocks)) {
      const int64_t row = workspace_row(params, work.number, step.head, work.q_start);
      found += step.unit != row / 64 + step.block;
      for_each_left(
          blocks.masked(step.block), step.block * 64,
          [&](int row, int lane) {
            return ColumnMask<kTile.mask>(params, work, work.n_block * 64 + row, lane);
          },
          [&](int row, int query) {
            heads[work.number * params.heads_q + step.head].count(query, work.n_block * 64 + row);
          });
    }
  }
  return found + wrong_in(heads, params);
}

// Of the tiles for head dim 256, causal (which are for no mask as well) or windowed.
int wrong(const SizedCall& call) {
  BackwardParams params = call.params();
  params.section = 2;
  params.last_block_first = call.batch % 2;
  constexpr int kCausal = kBackwardTileCount - 2, kWindow = kBackwardTileCount - 1;
  static_assert(kBackwardTiles[kCausal].has_dq_kernel() &&
                kBackwardTiles[kCausal].mask == Mask::kCausal &&
                kBackwardTiles[kWindow].mask == Mask::kWindow);
  return call.is_windowed ? wrong_of_queries<kWindow>(params) + wrong_of_keys<kWindow>(params)
                          : wrong_of_queries<kCausal>(params) + wrong_of_keys<kCausal>(params);
}

}  // namespace

int main() {
  SizedCall call;
  while (std::scanf("%d %d %d %d %d %d", &call.batch, &call.heads_q, &call.heads_k,
                    &call.window_left, &call.window_right, &call.is_windowed) == 6) {
    if (!call.read_lengths()) return 1;
    std::printf("%d\n", wrong(call));
  }
}

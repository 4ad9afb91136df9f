// How a backward call is served: decided from sizes alone, on the host, without a GPU.
#include "backward_plan.h"

#include <algorithm>

#include "plan.h"

namespace fa4 {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t aligned(int64_t bytes) {
  constexpr int64_t kAlignment = 128;
  return ceil_div(bytes, kAlignment) * kAlignment;
}

// The row for a mask with the smallest head dim that holds the call's.
int choose_tile(int head_dim, Mask mask) {
  int best = -1;
  for (int i = 0; i < kBackwardTileCount; ++i) {
    const BackwardTile& tile = kBackwardTiles[i];
    if (tile.mask != mask || tile.head_dim < head_dim) continue;
    if (best < 0 || tile.head_dim < kBackwardTiles[best].head_dim) best = i;
  }
  return best;
}

}  // namespace

int64_t workspace_rows(const fa4_backward_args& args) {
  // Packed sequences begin at multiples of kRowAlignment rows, each up to so many later than in
  // the tensors.
  const int64_t rows = args.cu_seqlens_q != nullptr
                           ? args.total_q + int64_t{args.batch} * kRowAlignment
                           : args.seq_q;
  return ceil_div(rows, kRowAlignment) * kRowAlignment;
}

BackwardWorkspace lay_out_workspace(const fa4_backward_args& args, const fa4_backward_plan& plan) {
  const BackwardTile& tile = kBackwardTiles[plan.tile];
  const bool packed = args.cu_seqlens_q != nullptr;
  const int64_t rows = workspace_rows(args) * args.heads_q * (packed ? 1 : args.batch);
  BackwardWorkspace workspace;
  workspace.negative_lse = tile.has_dq_kernel() ? 0 : aligned(rows * tile.head_dim * 4);
  workspace.delta = workspace.negative_lse + aligned(rows * 4);
  workspace.next_tile = workspace.delta + aligned(rows * 4);
  workspace.nan_keys = workspace.next_tile + 4;
  workspace.next_query_tile = workspace.next_tile + 8;
  workspace.turns = workspace.next_tile + (rows > 0 ? aligned(12) : 0);
  workspace.zeroed =
      workspace.turns + (takes_turns(plan) ? aligned(rows / 64 * tile.panels() * 4) : 0);
  const bool counts = rows > 0 && zeroes_ahead(args, plan);
  const int64_t heads = counts ? int64_t{args.heads_k} * args.batch : 0;
  workspace.bytes = workspace.zeroed + aligned(heads * 4);
  return workspace;
}

bool takes_turns(const fa4_backward_plan& plan) {
  return plan.deterministic && !kBackwardTiles[plan.tile].has_dq_kernel();
}

bool zeroes_ahead(const fa4_backward_args& args, const fa4_backward_plan& plan) {
  // Of longer sequences zeros are 1% of the time at most, and fewer heads would be side by side.
  constexpr int kMostKeys = 8192;
  return !kBackwardTiles[plan.tile].has_dq_kernel() && !plan.deterministic && plan.grid > 0 &&
         args.seq_k <= kMostKeys;
}

fa4_backward_plan plan_backward(const fa4_backward_args& args, int multiprocessors) {
  const Window window = window_of(args);
  fa4_backward_plan plan{};
  plan.tile =
      choose_tile(args.head_dim, window.mask == Mask::kWindow ? Mask::kWindow : Mask::kCausal);
  plan.deterministic = args.deterministic != 0;
  const BackwardTile& tile = kBackwardTiles[plan.tile];
  const auto grid = [&](int64_t tiles) {
    return static_cast<int32_t>(std::min<int64_t>(tiles, multiprocessors));
  };
  plan.grid = grid(ceil_div(args.seq_k, tile.block_n) * args.heads_k * args.batch);
  if (tile.has_dq_kernel()) {
    plan.query_grid =
        grid(ceil_div(args.seq_q, BackwardTile::kQueryRows) * args.heads_q * args.batch);
  }
  plan.workspace_bytes = lay_out_workspace(args, plan).bytes;
  return plan;
}

}  // namespace fa4

extern "C" int fa4_plan_backward(const fa4_backward_args* args, int multiprocessors,
                                 fa4_backward_plan* plan) {
  const int status = fa4::check_backward(*args);
  if (status == FA4_OK) *plan = fa4::plan_backward(fa4::without_excess(*args), multiprocessors);
  return status;
}

extern "C" int fa4_backward_tile_at(int tile, fa4_backward_tile* result) {
  if (tile < 0 || tile >= fa4::kBackwardTileCount) return FA4_INVALID_ARGUMENT;
  const fa4::BackwardTile& row = fa4::kBackwardTiles[tile];
  *result = {row.head_dim,
             static_cast<int32_t>(row.mask),
             static_cast<int32_t>(row.split),
             row.block_m,
             row.block_n,
             row.q_stages,
             row.do_stages,
             row.k_stages,
             row.v_stages,
             row.shared_bytes(),
             row.query_shared_bytes()};
  return FA4_OK;
}

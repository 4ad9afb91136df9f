// The backward's part of the C ABI that needs CUDA: from arguments and plan to launches.
#include <algorithm>

#include "api.h"
#include "backward_launch.h"
#include "backward_plan.h"
#include "plan.h"
#include "tensor_map.h"

namespace fa4 {
namespace {

BackwardKernels kernels_of(int tile, Element element) {
  switch (kBackwardTiles[tile].head_dim) {
    case 64:
      return backward_kernels<64>(tile, element);
    case 96:
      return backward_kernels<96>(tile, element);
    case 128:
      return backward_kernels<128>(tile, element);
    case 192:
      return backward_kernels<192>(tile, element);
    default:
      return backward_kernels<256>(tile, element);
  }
}

int make_tensor_maps(BackwardParams& params, const fa4_backward_args& args,
                     const BackwardTile& tile) {
  const bool packed = args.cu_seqlens_q != nullptr;
  const TensorMapBuilder builder{static_cast<Element>(args.element), args.head_dim};
  const int64_t batch = packed ? 1 : args.batch;
  const auto encode = [&](CUtensorMap* map, const fa4_tensor& tensor, int rows, int heads,
                          int block) {
    return builder.encode<3>(map, tensor.data, {rows, heads, batch},
                             {tensor.stride_seq, tensor.stride_head, tensor.stride_batch},
                             {block, 1, 1});
  };
  const int rows_q = packed ? args.total_q : args.seq_q;
  const int rows_k = packed ? args.total_k : args.seq_k;
  if (rows_q == 0 || rows_k == 0) return FA4_OK;  // nothing will be loaded
  int status = encode(&params.q_map, args.q, rows_q, args.heads_q, tile.block_m);
  if (status == FA4_OK)
    status = encode(&params.grad_out_map, args.grad_out, rows_q, args.heads_q, tile.block_m);
  if (status == FA4_OK)
    status = encode(&params.k_map, args.k, rows_k, args.heads_k, tile.block_n);
  if (status == FA4_OK)
    status = encode(&params.v_map, args.v, rows_k, args.heads_k, tile.block_n);
  return status;
}

// How many heads have what all blocks of one share in L2 (50 MB).
int heads_in_l2(int64_t head_bytes) {
  constexpr int64_t kSectionBytes = 32 << 20, kSectionHeads = 16;
  return static_cast<int>(std::clamp<int64_t>(kSectionBytes / head_bytes, 1, kSectionHeads));
}

int group_of(const fa4_backward_args& args) {
  return args.heads_k == 0 ? 1 : args.heads_q / args.heads_k;
}

// Key heads whose blocks are worked on side by side, longest first: as many as have Q, dO and the
// sums of dQ in L2. Without a mask blocks are equal, and those of one head follow each other.
//
// Where they take turns, a block of a head can only begin when the one before it has done its first
// step, so there are as many heads as it takes for all thread blocks to begin at once.
int section_of(const fa4_backward_args& args, const BackwardTile& tile, Mask mask,
               const fa4_backward_plan& plan) {
  if (mask == Mask::kFull) {
    const int n_blocks = (args.seq_k + tile.block_n - 1) / tile.block_n;
    return takes_turns(plan) ? (plan.grid + n_blocks - 1) / n_blocks : 1;
  }
  const int sum_bytes = tile.has_dq_kernel() ? 0 : 4;
  const int64_t head_bytes = int64_t{std::max(1, args.seq_q)} * std::max(1, group_of(args)) *
                             tile.head_dim * (2 * kElementBytes + sum_bytes);
  // Zeros are there a section earlier, so there is room for half as many.
  return heads_in_l2(zeroes_ahead(args, plan) ? 2 * head_bytes : head_bytes);
}

// The same of query heads in dQ's own kernel, whose blocks share K and V, as do those of a group.
int query_section_of(const fa4_backward_args& args, const BackwardTile& tile, Mask mask) {
  if (mask == Mask::kFull) return 1;
  const int64_t heads = int64_t{group_of(args)} * heads_in_l2(int64_t{std::max(1, args.seq_k)} *
                                                              tile.head_dim * 2 * kElementBytes);
  return static_cast<int>(std::min(heads, int64_t{args.heads_q} * args.batch));
}

// What dQ's own kernel is launched with: its tiles are blocks of queries.
BackwardParams for_queries(BackwardParams params, const fa4_backward_args& args,
                           const BackwardTile& tile, Mask mask) {
  constexpr int kRows = BackwardTile::kQueryRows;
  params.n_blocks = (args.seq_q + kRows - 1) / kRows;
  params.section = query_section_of(args, tile, mask);
  params.last_block_first = mask != Mask::kFull;
  params.tiles = params.n_blocks * args.heads_q * args.batch;
  params.next_tile = params.next_query_tile;
  return params;
}

int launch(const fa4_backward_args& args, const fa4_backward_plan& plan) {
  const bool packed = args.cu_seqlens_q != nullptr;
  const bool queries =
      args.heads_q > 0 && args.batch > 0 && (packed ? args.total_q : args.seq_q) > 0;
  if (!queries && plan.grid == 0) return FA4_OK;
  const BackwardWorkspace workspace = lay_out_workspace(args, plan);
  if (workspace.bytes > 0 && (args.workspace == nullptr ||
                              args.workspace_bytes < static_cast<size_t>(workspace.bytes))) {
    return FA4_WORKSPACE_TOO_SMALL;
  }
  if (encode_tiled() == nullptr) return FA4_DRIVER_WITHOUT_TENSOR_MAP;
  if (const cudaError_t error = enter_context(); error != cudaSuccess) return -error;

  const BackwardTile& tile = kBackwardTiles[plan.tile];
  const auto element = static_cast<Element>(args.element);
  const Window window = window_of(args);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  auto* const memory = static_cast<char*>(args.workspace);

  BackwardParams params{};
  params.q = view_of(args.q, packed);
  params.k = view_of(args.k, packed);
  params.v = view_of(args.v, packed);
  params.out = view_of(args.out, packed);
  params.grad_out = view_of(args.grad_out, packed);
  params.dq = view_of(args.dq, packed);
  params.dk = view_of(args.dk, packed);
  params.dv = view_of(args.dv, packed);
  params.lse = args.lse;
  params.lse_stride_batch = packed ? 0 : args.lse_stride_batch;
  params.lse_stride_head = args.lse_stride_head;
  params.dq_sums = reinterpret_cast<float*>(memory);
  params.negative_lse = reinterpret_cast<float*>(memory + workspace.negative_lse);
  params.delta = reinterpret_cast<float*>(memory + workspace.delta);
  params.nan_keys = reinterpret_cast<int*>(memory + workspace.nan_keys);
  params.turns = takes_turns(plan) ? reinterpret_cast<int*>(memory + workspace.turns) : nullptr;
  params.workspace_rows = workspace_rows(args);
  params.cu_seqlens_q = args.cu_seqlens_q;
  params.cu_seqlens_k = args.cu_seqlens_k;
  params.seq_q = args.seq_q;
  params.seq_k = args.seq_k;
  params.batch = args.batch;
  params.heads_q = args.heads_q;
  params.heads_k = args.heads_k;
  params.heads_per_group = group_of(args);
  params.head_dim = args.head_dim;
  params.window_left = window.left;
  params.window_right = window.right;
  params.scale = args.scale;
  params.scale_log2 = scale_log2_of(args.scale);
  if (plan.grid > 0) {
    params.n_blocks = (args.seq_k + tile.block_n - 1) / tile.block_n;
    params.section = section_of(args, tile, window.mask, plan);
    params.tiles = params.n_blocks * args.heads_k * args.batch;
    const bool zeroes = queries && zeroes_ahead(args, plan);
    if (zeroes) {
      params.zeroed = reinterpret_cast<int*>(memory + workspace.zeroed);
      // Zeros are asked for where a tile begins: a grid and a half ahead is time enough. In whole
      // sections, so that all tiles that zero a head's sums come before the first that adds to them.
      const int section = params.section * params.n_blocks;
      params.zero_lead = (plan.grid + plan.grid / 2 + section - 1) / section * section;
    }
    // Tiles differ in length under a mask: whoever is free draws the next, as where thread blocks
    // wait for each other. The counter is zeroed with the rows of the queries.
    const bool draws = zeroes || (queries && (packed || window.mask != Mask::kFull ||
                                              takes_turns(plan)));
    const auto counter = [&](int64_t place) {
      return draws ? reinterpret_cast<int*>(memory + place) : nullptr;
    };
    params.next_tile = counter(workspace.next_tile);
    params.next_query_tile = counter(workspace.next_query_tile);
    params.last_block_first = takes_turns(plan) && window.mask != Mask::kFull;
    const int status = make_tensor_maps(params, args, tile);
    if (status != FA4_OK) return status;
  }

  const BackwardKernels kernels = kernels_of(plan.tile, element);
  cudaError_t error = cudaSuccess;
  if (queries) error = launch_backward_prepare(params, tile.head_dim, element, stream);
  if (error == cudaSuccess && plan.grid > 0) error = kernels.main(params, plan.grid, stream);
  if (error == cudaSuccess && queries) {
    error = tile.has_dq_kernel()
                ? kernels.queries(for_queries(params, args, tile, window.mask), plan.query_grid,
                                  stream)
                : launch_backward_finish(params, tile.head_dim, element, stream);
  }
  return -error;
}

}  // namespace
}  // namespace fa4

extern "C" int fa4_backward_with_plan(const fa4_backward_args* args,
                                      const fa4_backward_plan* plan) {
  const int status = fa4::check_backward(*args);
  if (status != FA4_OK) return status;
  if (plan->tile < 0 || plan->tile >= fa4::kBackwardTileCount) return FA4_INVALID_ARGUMENT;
  return fa4::launch(fa4::without_excess(*args), *plan);
}

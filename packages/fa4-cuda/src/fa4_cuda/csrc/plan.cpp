#include "plan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

namespace fa4 {
namespace {

constexpr int64_t kMaxRows =
    std::numeric_limits<int32_t>::max() / 4;  // sums of two lengths and a window stay in range
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;  // cuTensorMapEncodeTiled

// Heads whose tiles are handed out together, longest first. As many as have K and V in L2 (50 MB)
// side by side; but no more than sixteen, for their first tiles read all of K and V from memory,
// and at S = 1024 those of 128 heads (D 64) are a phase of the launch that only waits for memory:
// sixteen are 9% faster there, 5% at D 128.
constexpr int64_t kSectionBytes = 32 << 20;
constexpr int64_t kSectionHeads = 16;
constexpr int64_t kTilesUnderWay = 8;  // of a head at a time

bool tensor_map_takes(const fa4_tensor& tensor, const fa4_forward_args& args, int seq, int heads) {
  const bool packed = args.cu_seqlens_q != nullptr;
  const auto takes = [](int64_t stride, int64_t size) {
    const int64_t bytes = stride * kElementBytes;
    return size <= 1 || (bytes >= 0 && bytes % 16 == 0 && bytes < kMaxStrideBytes);
  };
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && takes(tensor.stride_seq, seq) &&
         takes(tensor.stride_head, heads) && takes(tensor.stride_batch, packed ? 1 : args.batch);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Share of a tile's rows that hold a query, for `rows` rows in tiles of `tile`.
double efficiency(int64_t rows, int64_t tile) {
  return rows / static_cast<double>(ceil_div(rows, tile) * tile);
}

// The row for a mask with the smallest head dim that holds the call's.
int choose_tile(int head_dim, Mask mask) {
  int best = -1;
  for (int i = 0; i < kForwardTileCount; ++i) {
    const ForwardTile& tile = kForwardTiles[i];
    if (tile.mask != mask || tile.head_dim < head_dim) continue;
    if (best < 0 || tile.head_dim < kForwardTiles[best].head_dim) best = i;
  }
  return best;
}

}  // namespace

Window window_of(const fa4_forward_args& args) {
  const int right = args.causal ? 0 : args.window_right;
  const bool left_bounded = args.window_left >= 0 && args.window_left < args.seq_k - 1;
  const bool right_bounded = right >= 0 && right < args.seq_q - 1;
  const int everything = args.seq_q + args.seq_k;
  Window window{Mask::kFull, everything, everything};
  if (right_bounded) {
    window.mask = Mask::kCausal;
    window.right = right;
  }
  if (left_bounded) {
    window.mask = Mask::kWindow;
    window.left = args.window_left;
  }
  return window;
}

int check_forward(const fa4_forward_args& args) {
  const bool packed = args.cu_seqlens_q != nullptr;
  if ((args.element != FA4_HALF && args.element != FA4_BFLOAT16) ||
      packed != (args.cu_seqlens_k != nullptr)) {
    return FA4_INVALID_ARGUMENT;
  }
  for (int size : {args.batch, args.heads_q, args.heads_k, args.seq_q, args.seq_k}) {
    if (size < 0) return FA4_INVALID_ARGUMENT;
  }
  if (packed && (args.total_q < 0 || args.total_k < 0)) return FA4_INVALID_ARGUMENT;
  if (args.heads_q > 0 && (args.heads_k == 0 || args.heads_q % args.heads_k != 0))
    return FA4_INVALID_ARGUMENT;
  if (args.head_dim < 8 || args.head_dim > 256 || args.head_dim % 8 != 0)
    return FA4_UNSUPPORTED_HEAD_DIM;

  const int rows_q = packed ? args.total_q : args.seq_q,
            rows_k = packed ? args.total_k : args.seq_k;
  if (std::max(rows_q, rows_k) > kMaxRows) return FA4_UNSUPPORTED_SIZE;
  // Tiles are numbered by int; the smallest has 64 queries, packed sequences add one each.
  const int64_t row_blocks =
      packed ? ceil_div(rows_q, 64) + args.batch : ceil_div(rows_q, 64) * args.batch;
  if (row_blocks * args.heads_q > std::numeric_limits<int32_t>::max()) return FA4_UNSUPPORTED_SIZE;

  if (int64_t{rows_q} * args.batch * args.heads_q == 0) return FA4_OK;  // nothing will be touched
  if (args.q.data == nullptr || args.out.data == nullptr || args.lse == nullptr)
    return FA4_INVALID_ARGUMENT;
  if (rows_k > 0 && (args.k.data == nullptr || args.v.data == nullptr)) return FA4_INVALID_ARGUMENT;
  const bool strides = tensor_map_takes(args.q, args, rows_q, args.heads_q) &&
                       tensor_map_takes(args.out, args, rows_q, args.heads_q) &&
                       tensor_map_takes(args.k, args, rows_k, args.heads_k) &&
                       tensor_map_takes(args.v, args, rows_k, args.heads_k);
  return strides ? FA4_OK : FA4_UNSUPPORTED_STRIDE;
}

fa4_forward_plan plan_forward(const fa4_forward_args& args, int multiprocessors) {
  const bool packed = args.cu_seqlens_q != nullptr;
  const Window window = window_of(args);
  fa4_forward_plan plan{};
  plan.tile = choose_tile(args.head_dim, window.mask);
  const ForwardTile& tile = kForwardTiles[plan.tile];

  // Packing the query heads of a group into a tile loads K and V once for all of them. It pays
  // where the queries alone leave rows of the tile empty.
  const int group = args.heads_k == 0 ? 1 : args.heads_q / args.heads_k;
  const bool pack = group > 1 && group <= 64 &&
                    efficiency(args.seq_q, tile.block_m()) <
                        0.9 * efficiency(args.seq_q, tile.warpgroups * (64 / group)) *
                            (64 / group * group) / 64.0;
  plan.packed_heads = pack ? group : 1;
  plan.tile_queries = tile.warpgroups * (64 / plan.packed_heads);

  const int64_t heads = args.heads_q / plan.packed_heads;
  const int64_t row_blocks = packed ? ceil_div(args.total_q, plan.tile_queries) + args.batch
                                    : ceil_div(args.seq_q, plan.tile_queries) * args.batch;
  plan.tiles = static_cast<int32_t>(row_blocks * heads);
  plan.grid = std::min(plan.tiles, multiprocessors);

  // Under a mask tiles differ in length, and so does the last one of a head: the longest first,
  // whoever is free takes the next. Equal tiles are dealt out in order, which costs nothing and
  // keeps those of a head together.
  const bool equal_tiles = window.mask == Mask::kFull && args.seqused_k == nullptr &&
                           (args.seq_q <= plan.tile_queries || args.seq_q % plan.tile_queries == 0);
  plan.dynamic = packed || !equal_tiles;
  if (window.mask != Mask::kFull) {
    // Of a head's keys L2 needs those of the tiles under way: a window bounded on the left moves.
    const int64_t key_bytes = int64_t{2} * args.head_dim * kElementBytes;
    const int64_t reach = int64_t{window.left} + window.right + kTilesUnderWay * tile.block_m();
    const int64_t needed = std::clamp<int64_t>(reach, 1, std::max(args.seq_k, 1));
    const int64_t keys =
        std::min(kSectionBytes / key_bytes * args.seq_k / needed, kSectionHeads * args.seq_k);
    plan.section_keys = static_cast<int32_t>(
        std::min<int64_t>(keys * (group / plan.packed_heads), std::numeric_limits<int32_t>::max()));
  }
  if (plan.dynamic) plan.workspace_bytes = 16;
  if (packed) plan.workspace_bytes += int64_t{4} * (2 * args.batch + 1);
  return plan;
}

}  // namespace fa4

extern "C" {

int fa4_abi_version(void) { return FA4_ABI_VERSION; }

const char* fa4_error_string(int status) {
  switch (status) {
    case FA4_OK:
      return "no error";
    case FA4_INVALID_ARGUMENT:
      return "invalid argument: sizes contradict each other, or a pointer is missing";
    case FA4_UNSUPPORTED_HEAD_DIM:
      return "unsupported head_dim: multiples of 8 from 8 to 256 are served";
    case FA4_UNSUPPORTED_STRIDE:
      return "unsupported strides: addresses and strides must be non-negative multiples of 16 "
             "bytes under 2^40";
    case FA4_UNSUPPORTED_SIZE:
      return "unsupported size: too many rows or tiles for 32-bit numbers";
    case FA4_UNSUPPORTED_DEVICE:
      return "unsupported device: the kernels are for Hopper GPUs (compute capability 9.0)";
    case FA4_WORKSPACE_TOO_SMALL:
      return "the workspace is missing or smaller than fa4_forward_workspace_bytes says";
    case FA4_DRIVER_WITHOUT_TENSOR_MAP:
      return "the driver has no cuTensorMapEncodeTiled: one for CUDA 12 or newer is needed";
    default:
      return status < 0 ? "a CUDA call failed: the status is CUDA's error number, negated"
                        : "unknown status";
  }
}

int fa4_forward_tile_at(int tile, fa4_forward_tile* result) {
  if (tile < 0 || tile >= fa4::kForwardTileCount) return FA4_INVALID_ARGUMENT;
  const fa4::ForwardTile& row = fa4::kForwardTiles[tile];
  *result = {row.head_dim,      static_cast<int32_t>(row.mask),
             row.block_m(),     row.block_n,
             row.q_stages,      row.kv_stages,
             row.shared_bytes()};
  return FA4_OK;
}

int fa4_plan_forward(const fa4_forward_args* args, int multiprocessors, fa4_forward_plan* plan) {
  const int status = fa4::check_forward(*args);
  if (status == FA4_OK) *plan = fa4::plan_forward(*args, multiprocessors);
  return status;
}

}  // extern "C"

#include "plan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "backward_tiles.h"

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

template <class Args>
bool tensor_map_takes(const fa4_tensor& tensor, const Args& args, int seq, int heads) {
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

struct Rows {
  int q, k;  // of a tensor: of every sequence, or of all of them if they are packed
};

template <class Args>
Rows rows_of(const Args& args) {
  const bool packed = args.cu_seqlens_q != nullptr;
  return packed ? Rows{args.total_q, args.total_k} : Rows{args.seq_q, args.seq_k};
}

// Rows of the longest sequence. Of packed ones the caller may have named more than there are, up to
// any number.
template <class Args>
Rows longest_of(const Args& args) {
  if (args.cu_seqlens_q == nullptr) return {args.seq_q, args.seq_k};
  return {std::min(args.seq_q, args.total_q), std::min(args.seq_k, args.total_k)};
}

template <class Args>
bool has_queries(const Args& args, Rows rows) {
  return rows.q > 0 && args.batch > 0 && args.heads_q > 0;
}

template <class Args>
bool has_keys(const Args& args, Rows rows) {
  return rows.k > 0 && args.batch > 0 && args.heads_k > 0;
}

bool are_there(std::initializer_list<fa4_tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [](const fa4_tensor& tensor) { return tensor.data != nullptr; });
}

template <class Args>
bool tensor_maps_take(std::initializer_list<fa4_tensor> tensors, const Args& args, int seq,
                      int heads) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const fa4_tensor& tensor) {
    return tensor_map_takes(tensor, args, seq, heads);
  });
}

// Tiles are numbered by int; the smallest has 64 rows, packed sequences add one each.
template <class Args>
bool can_number_tiles(const Args& args, int rows, int heads) {
  const bool packed = args.cu_seqlens_q != nullptr;
  const int64_t row_blocks =
      packed ? ceil_div(rows, 64) + args.batch : ceil_div(rows, 64) * args.batch;
  return row_blocks * heads <= std::numeric_limits<int32_t>::max();
}

// Whether a backward can number its tiles. It launches packed sequences as if all were as long as
// the longest; rows of queries in units of 64, as many as its workspace holds.
template <class Args>
bool can_number_backward(const Args& args, Rows rows) {
  const Rows longest = longest_of(args);
  const int64_t blocks = std::max(ceil_div(longest.q, kRowAlignment) * (kRowAlignment / 64),
                                  ceil_div(longest.k, 64));
  return can_number_tiles(args, rows.k, args.heads_q) &&
         blocks * args.heads_q * args.batch <= std::numeric_limits<int32_t>::max();
}

// What must hold for the sizes of a call in either direction.
template <class Args>
int check_sizes(const Args& args, Rows rows) {
  const bool packed = args.cu_seqlens_q != nullptr;
  if ((args.element != FA4_HALF && args.element != FA4_BFLOAT16) ||
      packed != (args.cu_seqlens_k != nullptr)) {
    return FA4_INVALID_ARGUMENT;
  }
  for (int size :
       {args.batch, args.heads_q, args.heads_k, args.seq_q, args.seq_k, rows.q, rows.k}) {
    if (size < 0) return FA4_INVALID_ARGUMENT;
  }
  if (args.heads_q > 0 && (args.heads_k == 0 || args.heads_q % args.heads_k != 0))
    return FA4_INVALID_ARGUMENT;
  if (args.head_dim < 8 || args.head_dim > 256 || args.head_dim % 8 != 0)
    return FA4_UNSUPPORTED_HEAD_DIM;

  // A forward whose backward could not follow is declined too: whoever trains is told before it
  // runs, not after. With seqused_k none follows.
  const bool countable = std::max(rows.q, rows.k) <= kMaxRows &&
                         can_number_tiles(args, rows.q, args.heads_q) &&
                         (args.seqused_k != nullptr || can_number_backward(args, rows));
  return countable ? FA4_OK : FA4_UNSUPPORTED_SIZE;
}

template <class Args>
Window window(const Args& args) {
  const auto [seq_q, seq_k] = longest_of(args);
  const int right = args.causal ? 0 : args.window_right;
  const bool left_bounded = args.window_left >= 0 && args.window_left < seq_k - 1;
  const bool right_bounded = right >= 0 && right < seq_q - 1;
  const int everything = seq_q + seq_k;
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

}  // namespace

fa4_backward_args without_excess(fa4_backward_args args) {
  const Rows longest = longest_of(args);
  args.seq_q = longest.q, args.seq_k = longest.k;
  return args;
}

Window window_of(const fa4_forward_args& args) { return window(args); }
Window window_of(const fa4_backward_args& args) { return window(args); }

int check_forward(const fa4_forward_args& args) {
  const Rows rows = rows_of(args);
  const int status = check_sizes(args, rows);
  if (status != FA4_OK) return status;
  if (!has_queries(args, rows)) return FA4_OK;  // nothing will be touched
  if (args.lse == nullptr || !are_there({args.q, args.out})) return FA4_INVALID_ARGUMENT;
  if (rows.k > 0 && !are_there({args.k, args.v})) return FA4_INVALID_ARGUMENT;
  return tensor_maps_take({args.q, args.out}, args, rows.q, args.heads_q) &&
                 tensor_maps_take({args.k, args.v}, args, rows.k, args.heads_k)
             ? FA4_OK
             : FA4_UNSUPPORTED_STRIDE;
}

int check_backward(const fa4_backward_args& args) {
  const Rows rows = rows_of(args);
  const int status = check_sizes(args, rows);
  if (status != FA4_OK) return status;
  // Torch's backward op does not have it, and these kernels do not read it.
  if (args.seqused_k != nullptr) return FA4_INVALID_ARGUMENT;
  // Without queries there are gradients of keys all the same, and the other way round.
  const auto queries = {args.q, args.out, args.grad_out, args.dq};
  const auto keys = {args.k, args.v, args.dk, args.dv};
  if (has_queries(args, rows) && (args.lse == nullptr || !are_there(queries)))
    return FA4_INVALID_ARGUMENT;
  if (has_keys(args, rows) && !are_there(keys)) return FA4_INVALID_ARGUMENT;
  return tensor_maps_take(queries, args, rows.q, args.heads_q) &&
                 tensor_maps_take(keys, args, rows.k, args.heads_k)
             ? FA4_OK
             : FA4_UNSUPPORTED_STRIDE;
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
      return "the workspace is missing or smaller than the plan says";
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

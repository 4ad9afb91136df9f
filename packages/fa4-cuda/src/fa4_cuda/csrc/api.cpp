// The part of the C ABI that needs CUDA: from arguments and plan to tensor maps and launches.
#include "api.h"

#include <cmath>

#include "launch.h"
#include "plan.h"
#include "tiles.h"

namespace fa4 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there, so that the library loads without one.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      entry = nullptr;
    }
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

// A tensor as the copy engine sees it, columns first. Columns beyond head_dim and rows beyond the
// last are read as zeros.
struct TensorMapBuilder {
  Element element;
  int head_dim;

  template <int kRank>
  int encode(CUtensorMap* map, void* data, const int64_t (&sizes)[kRank],
             const int64_t (&strides)[kRank], const int (&boxes)[kRank]) const {
    cuuint64_t dims[kRank + 1] = {static_cast<cuuint64_t>(head_dim)}, stride_bytes[kRank];
    cuuint32_t box_dims[kRank + 1] = {kPanelColumns}, steps[kRank + 1] = {1};
    for (int i = 0; i < kRank; ++i) {
      dims[i + 1] = sizes[i];
      // A dimension of size one has whatever stride torch gave it.
      stride_bytes[i] = sizes[i] == 1 ? 16 : strides[i] * kElementBytes;
      box_dims[i + 1] = boxes[i];
      steps[i + 1] = 1;
    }
    // What one fetch brings to L2: of rows of 256 bytes both panels at once, worth 1 to 2% where K
    // and V come from memory once. Rows that start at odd multiples of 16 bytes (head_dim 72) would
    // lose 15%.
    const CUtensorMapL2promotion fetch = head_dim * kElementBytes % 256 == 0
                                             ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B
                                             : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    const CUresult result =
        encode_tiled()(map,
                       element == Element::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                       kRank + 1, data, dims, stride_bytes, box_dims, steps,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                       fetch, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? FA4_OK : FA4_UNSUPPORTED_STRIDE;
  }
};

TensorView view_of(const fa4_tensor& tensor, bool packed) {
  return {tensor.data, packed ? 0 : tensor.stride_batch, tensor.stride_seq, tensor.stride_head};
}

int make_tensor_maps(ForwardParams& params, const fa4_forward_args& args, const ForwardTile& tile,
                     int packed_heads) {
  const bool packed = args.cu_seqlens_q != nullptr;
  const TensorMapBuilder builder{static_cast<Element>(args.element), args.head_dim};
  const int64_t batch = packed ? 1 : args.batch;
  // Without keys there is no tensor of them, but a tile reads a block all the same: anything will
  // do, it is all masked.
  const int64_t keys = packed ? args.total_k : args.seq_k;
  const auto key_map = [&](CUtensorMap* map, const fa4_tensor& tensor) {
    if (keys == 0)
      return builder.encode<3>(map, args.q.data, {1, 1, 1}, {0, 0, 0}, {tile.block_n, 1, 1});
    return builder.encode<3>(map, tensor.data, {keys, args.heads_k, batch},
                             {tensor.stride_seq, tensor.stride_head, tensor.stride_batch},
                             {tile.block_n, 1, 1});
  };
  const int64_t heads = args.heads_q / packed_heads;
  int status = builder.encode<4>(&params.q_map, args.q.data,
                                 {packed_heads, packed ? args.total_q : args.seq_q, heads, batch},
                                 {args.q.stride_head, args.q.stride_seq,
                                  args.q.stride_head * packed_heads, args.q.stride_batch},
                                 {packed_heads, params.slab_queries, 1, 1});
  if (status == FA4_OK) status = key_map(&params.k_map, args.k);
  if (status == FA4_OK) status = key_map(&params.v_map, args.v);
  return status;
}

ForwardLauncher launcher_of(int tile, Element element) {
  switch (kForwardTiles[tile].head_dim) {
    case 64:
      return forward_launcher<64>(tile, element);
    case 96:
      return forward_launcher<96>(tile, element);
    case 128:
      return forward_launcher<128>(tile, element);
    case 192:
      return forward_launcher<192>(tile, element);
    default:
      return forward_launcher<256>(tile, element);
  }
}

struct Device {
  int multiprocessors = 0;
  int capability = 0;  // 90 for 9.0

  static cudaError_t current(Device& device) {
    int number = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&number);
    if (error == cudaSuccess) {
      error =
          cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, number);
    }
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number);
    device.capability = 10 * major + minor;
    return error;
  }
};

int plan_for_device(const fa4_forward_args& args, fa4_forward_plan& plan) {
  const int status = check_forward(args);
  if (status != FA4_OK) return status;
  Device device;
  if (const cudaError_t error = Device::current(device); error != cudaSuccess) return -error;
  if (device.capability != 90) return FA4_UNSUPPORTED_DEVICE;
  plan = plan_forward(args, device.multiprocessors);
  return FA4_OK;
}

// Tensor maps are encoded in the context of the calling thread, and a thread that has not used CUDA
// yet has none: torch's allocator may have given it memory from its cache.
cudaError_t enter_context() {
  static thread_local bool entered = false;
  if (entered) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  entered = error == cudaSuccess;
  return error;
}

int launch(const fa4_forward_args& args, const fa4_forward_plan& plan) {
  if (plan.tiles == 0) return FA4_OK;
  if (plan.workspace_bytes > 0 &&
      (args.workspace == nullptr ||
       args.workspace_bytes < static_cast<size_t>(plan.workspace_bytes))) {
    return FA4_WORKSPACE_TOO_SMALL;
  }
  if (encode_tiled() == nullptr) return FA4_DRIVER_WITHOUT_TENSOR_MAP;
  if (const cudaError_t error = enter_context(); error != cudaSuccess) return -error;

  const bool packed = args.cu_seqlens_q != nullptr;
  const ForwardTile& tile = kForwardTiles[plan.tile];
  const Window window = window_of(args);
  const auto stream = static_cast<cudaStream_t>(args.stream);

  ForwardParams params{};
  params.q = view_of(args.q, packed);
  params.k = view_of(args.k, packed);
  params.v = view_of(args.v, packed);
  params.out = view_of(args.out, packed);
  params.lse = args.lse;
  params.lse_stride_batch = packed ? 0 : args.lse_stride_batch;
  params.lse_stride_head = args.lse_stride_head;
  params.cu_seqlens_q = args.cu_seqlens_q;
  params.cu_seqlens_k = args.cu_seqlens_k;
  params.seqused_k = args.seqused_k;
  params.seq_q = args.seq_q;
  params.seq_k = args.seq_k;
  params.head_dim = args.head_dim;
  params.heads_per_group = args.heads_q / args.heads_k / plan.packed_heads;
  params.packed_heads = plan.packed_heads;
  params.inverse_packed_heads = 1.f / static_cast<float>(plan.packed_heads);
  params.slab_queries = 64 / plan.packed_heads;
  params.window_left = window.left;
  params.window_right = window.right;
  params.scale = std::fabs(args.scale);
  params.negate_q = args.scale < 0;
  // Zero would make NaN of a masked -inf. The smallest normal number makes the same weights of
  // every finite score.
  constexpr float kLog2E = 1.44269504f, kSmallest = 1.17549435e-38f;
  params.scale_log2 = params.scale * kLog2E < kSmallest ? kSmallest : params.scale * kLog2E;
  params.empty_lse = args.empty_lse;
  params.schedule = {.tiles = plan.tiles,
                     .tile_queries = plan.tile_queries,
                     .heads = args.heads_q / plan.packed_heads,
                     .sequences = args.batch,
                     .section_keys = plan.section_keys,
                     .dynamic = plan.dynamic,
                     .state = static_cast<int*>(args.workspace)};

  const int status = make_tensor_maps(params, args, tile, plan.packed_heads);
  if (status != FA4_OK) return status;

  cudaError_t error = cudaSuccess;
  if (packed) {
    error = launch_prepare_packed(params, stream);
  } else if (plan.dynamic && !args.workspace_is_zero) {
    error = cudaMemsetAsync(args.workspace, 0, 16, stream);
  }
  if (error == cudaSuccess) {
    error = launcher_of(plan.tile, static_cast<Element>(args.element))(params, plan.grid, stream);
  }
  return -error;
}

}  // namespace
}  // namespace fa4

extern "C" {

int fa4_forward_workspace_bytes(const fa4_forward_args* args, size_t* bytes) {
  fa4_forward_plan plan;
  const int status = fa4::plan_for_device(*args, plan);
  if (status == FA4_OK) *bytes = static_cast<size_t>(plan.workspace_bytes);
  return status;
}

int fa4_forward(const fa4_forward_args* args) {
  fa4_forward_plan plan;
  const int status = fa4::plan_for_device(*args, plan);
  return status == FA4_OK ? fa4::launch(*args, plan) : status;
}

int fa4_forward_with_plan(const fa4_forward_args* args, const fa4_forward_plan* plan) {
  const int status = fa4::check_forward(*args);
  if (status != FA4_OK) return status;
  if (plan->tile < 0 || plan->tile >= fa4::kForwardTileCount) return FA4_INVALID_ARGUMENT;
  return fa4::launch(*args, *plan);
}

}  // extern "C"

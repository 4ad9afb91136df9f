// The part of the C ABI that needs CUDA: from arguments and plan to tensor maps and launches.
#include "api.h"

#include <cmath>

#include "launch.h"
#include "plan.h"
#include "tensor_map.h"
#include "tiles.h"

namespace fa4 {
namespace {

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
  params.scale_log2 = scale_log2_of(params.scale);
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

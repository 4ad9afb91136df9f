#include "forward.h"

#include <limits>

#include "../api.h"
#include "devices.h"

namespace fa4::glue {
namespace {

// Of query, key and value: one of the dtypes served, one GPU, last dimensions without gaps.
bool share_what_they_must(const Tensor& query, const Tensor& key, const Tensor& value) {
  if (query.device_type != libtorch.aoti_torch_device_type_cuda()) return false;
  if (query.dtype != libtorch.aoti_torch_dtype_float16() &&
      query.dtype != libtorch.aoti_torch_dtype_bfloat16()) {
    return false;
  }
  for (const Tensor* tensor : {&query, &key, &value}) {
    if (tensor->dtype != query.dtype || tensor->device_type != query.device_type ||
        tensor->device != query.device || !tensor->unit_stride() || tensor->is_empty()) {
      return false;
    }
  }
  return true;
}

bool read_three(const Arguments& arguments, int first, int64_t dims, Forward& forward) {
  return read(arguments.tensor(first), dims, forward.query) &&
         read(arguments.tensor(first + 1), dims, forward.key) &&
         read(arguments.tensor(first + 2), dims, forward.value) &&
         forward.key.same_sizes(forward.value) &&
         share_what_they_must(forward.query, forward.key, forward.value) &&
         forward.query.sizes[dims - 1] == forward.key.sizes[dims - 1];
}

// Offsets or lengths of packed sequences.
bool read_numbers(AtenTensorHandle handle, const Tensor& query, Tensor& numbers) {
  return handle != nullptr && read(handle, 1, numbers) &&
         numbers.dtype == libtorch.aoti_torch_dtype_int32() &&
         numbers.device_type == query.device_type && numbers.device == query.device &&
         numbers.unit_stride();
}

// A tensor as the kernels take it: [B, S, H, D] or [T, H, D].
fa4_tensor view_of(const Tensor& tensor, void* data, HeadAxis head_axis) {
  if (tensor.dims == 3) return {data, 0, tensor.strides[0], tensor.strides[1]};
  const int heads = static_cast<int>(head_axis);
  return {data, tensor.strides[0], tensor.strides[3 - heads], tensor.strides[heads]};
}

fa4_tensor input(const Tensor& tensor, HeadAxis head_axis) {
  const void* data = nullptr;
  libtorch.torch_get_const_data_ptr(tensor.handle, &data);
  return view_of(tensor, const_cast<void*>(data), head_axis);
}

const int32_t* numbers_of(const Tensor& tensor) {
  const void* data = nullptr;
  if (tensor.handle != nullptr) libtorch.torch_get_const_data_ptr(tensor.handle, &data);
  return static_cast<const int32_t*>(data);
}

void* output(AtenTensorHandle handle) {
  void* data = nullptr;
  libtorch.aoti_torch_get_data_ptr(handle, &data);
  return data;
}

// Whether numbers are what the kernels can count with.
template <class... Numbers>
bool fit(Numbers... numbers) {
  return ((numbers <= std::numeric_limits<int32_t>::max()) && ...);
}

int32_t window_of(int64_t window) {
  // Whatever is further than any key is no bound.
  return window < 0 || !fit(window) ? -1 : static_cast<int32_t>(window);
}

// The sizes, strides and options of a request; nothing that has to be allocated.
bool describe(const Forward& forward, const Tensor& out, fa4_forward_args& args) {
  const Tensor& query = forward.query;
  const Tensor& key = forward.key;
  const int last = static_cast<int>(query.dims) - 1;
  const int heads = forward.is_packed() ? 1 : static_cast<int>(forward.head_axis);
  const int rows = forward.is_packed() ? 0 : 3 - heads;
  const int64_t batch =
      forward.is_packed() ? forward.cu_seqlens_query.sizes[0] - 1 : query.sizes[0];
  const int64_t seq_q = forward.is_packed() ? forward.max_seqlen_query : query.sizes[rows];
  const int64_t seq_k = forward.is_packed() ? forward.max_seqlen_key : key.sizes[rows];
  if (!fit(batch, query.sizes[rows], key.sizes[rows], query.sizes[heads], query.sizes[last], seq_q,
           seq_k)) {
    return false;
  }
  args.q = input(query, forward.head_axis);
  args.k = input(key, forward.head_axis);
  args.v = input(forward.value, forward.head_axis);
  args.out = view_of(out, output(out.handle), forward.head_axis);
  args.cu_seqlens_q = numbers_of(forward.cu_seqlens_query);
  args.cu_seqlens_k = numbers_of(forward.cu_seqlens_key);
  args.seqused_k = numbers_of(forward.seqused_key);
  args.element = query.dtype == libtorch.aoti_torch_dtype_float16() ? FA4_HALF : FA4_BFLOAT16;
  args.batch = static_cast<int32_t>(batch);
  args.heads_q = static_cast<int32_t>(query.sizes[heads]);
  args.heads_k = static_cast<int32_t>(key.sizes[heads]);
  args.head_dim = static_cast<int32_t>(query.sizes[last]);
  args.seq_q = static_cast<int32_t>(seq_q);
  args.seq_k = static_cast<int32_t>(seq_k);
  args.total_q = static_cast<int32_t>(query.sizes[rows]);
  args.total_k = static_cast<int32_t>(key.sizes[rows]);
  args.causal = forward.causal;
  args.window_left = window_of(forward.window_left);
  args.window_right = window_of(forward.window_right);
  args.scale = static_cast<float>(forward.scale);
  args.empty_lse = forward.lse_of_empty_rows;
  return true;
}

OwnedTensor empty_lse(const Forward& forward, const fa4_forward_args& args) {
  const int64_t dense[3] = {args.batch, args.heads_q, args.seq_q};
  const int64_t packed[2] = {args.heads_q, args.total_q};
  return forward.is_packed() ? empty(forward.query, libtorch.aoti_torch_dtype_float32(), 2, packed)
                             : empty(forward.query, libtorch.aoti_torch_dtype_float32(), 3, dense);
}

// The workspace of one launch; the caching allocator keeps it from others until the stream is past
// it.
OwnedTensor workspace_of(const fa4_forward_plan& plan, const Tensor& like) {
  const int64_t words = (plan.workspace_bytes + 3) / 4;
  return empty(like, libtorch.aoti_torch_dtype_int32(), 1, &words);
}

}  // namespace

bool read_dense(const Arguments& arguments, int first, HeadAxis head_axis, Forward& forward) {
  forward.head_axis = head_axis;
  const int axis = static_cast<int>(head_axis);
  return read_three(arguments, first, 4, forward) &&
         forward.query.sizes[0] == forward.key.sizes[0] &&
         forward.query.sizes[axis] % forward.key.sizes[axis] == 0;
}

bool read_packed(const Arguments& arguments, int first, AtenTensorHandle cu_seqlens_query,
                 AtenTensorHandle cu_seqlens_key, AtenTensorHandle seqused_key,
                 int64_t max_seqlen_query, int64_t max_seqlen_key, Forward& forward) {
  forward.max_seqlen_query = max_seqlen_query;
  forward.max_seqlen_key = max_seqlen_key;
  return read_three(arguments, first, 3, forward) &&
         forward.query.sizes[1] % forward.key.sizes[1] == 0 &&
         read_numbers(cu_seqlens_query, forward.query, forward.cu_seqlens_query) &&
         read_numbers(cu_seqlens_key, forward.query, forward.cu_seqlens_key) &&
         forward.cu_seqlens_query.sizes[0] >= 2 &&
         forward.cu_seqlens_query.sizes[0] == forward.cu_seqlens_key.sizes[0] &&
         (seqused_key == nullptr ||
          (read_numbers(seqused_key, forward.query, forward.seqused_key) &&
           forward.seqused_key.sizes[0] + 1 == forward.cu_seqlens_key.sizes[0]));
}

OwnedTensor run(const Forward& forward, const Tensor& out) {
  const Tensor& query = forward.query;
  const Device* device = device_at(query.device);
  if (device == nullptr || !out.unit_stride()) return OwnedTensor();
  fa4_forward_args args = {};
  fa4_forward_plan plan = {};
  if (!describe(forward, out, args) ||
      libtorch.aoti_torch_get_current_cuda_stream(query.device, &args.stream)) {
    return OwnedTensor();
  }
  OwnedTensor lse = empty_lse(forward, args);
  if (!lse) return OwnedTensor();
  args.lse = static_cast<float*>(output(lse.get()));
  args.lse_stride_head = forward.is_packed() ? args.total_q : args.seq_q;
  args.lse_stride_batch = args.lse_stride_head * args.heads_q;
  if (fa4_plan_forward(&args, device->multiprocessors, &plan) != FA4_OK) return OwnedTensor();
  OwnedTensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = workspace_of(plan, query);
    if (!workspace) return OwnedTensor();
    args.workspace = output(workspace.get());
    args.workspace_bytes = static_cast<size_t>(plan.workspace_bytes);
  }
  const OnDevice guard(query.device);
  return guard && fa4_forward_with_plan(&args, &plan) == FA4_OK ? std::move(lse) : OwnedTensor();
}

}  // namespace fa4::glue

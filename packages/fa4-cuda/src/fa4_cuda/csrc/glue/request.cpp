#include "request.h"

#include <limits>

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
    if (!tensor->same_kind(query) || !tensor->unit_stride() || tensor->is_empty()) return false;
  }
  return true;
}

bool read_three(const Arguments& arguments, int first, int64_t dims, Request& request) {
  return read(arguments.tensor(first), dims, request.query) &&
         read(arguments.tensor(first + 1), dims, request.key) &&
         read(arguments.tensor(first + 2), dims, request.value) &&
         request.key.same_sizes(request.value) &&
         share_what_they_must(request.query, request.key, request.value) &&
         request.query.sizes[dims - 1] == request.key.sizes[dims - 1];
}

// Offsets or lengths of packed sequences.
bool read_numbers(AtenTensorHandle handle, const Tensor& query, Tensor& numbers) {
  return handle != nullptr && read(handle, 1, numbers) &&
         numbers.dtype == libtorch.aoti_torch_dtype_int32() && numbers.same_device(query) &&
         numbers.unit_stride();
}

fa4_tensor view_of(const Tensor& tensor, void* data, HeadAxis head_axis) {
  if (tensor.dims == 3) return {data, 0, tensor.strides[0], tensor.strides[1]};
  const int heads = static_cast<int>(head_axis);
  return {data, tensor.strides[0], tensor.strides[3 - heads], tensor.strides[heads]};
}

const int32_t* numbers_of(const Tensor& tensor) {
  return tensor.handle == nullptr ? nullptr : static_cast<const int32_t*>(read_only(tensor.handle));
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

template <class Args>
bool fill(const Request& request, Args& args) {
  const Tensor& query = request.query;
  const Tensor& key = request.key;
  const int last = static_cast<int>(query.dims) - 1;
  const int heads = request.heads(), rows = request.rows();
  const int64_t batch =
      request.is_packed() ? request.cu_seqlens_query.sizes[0] - 1 : query.sizes[0];
  const int64_t seq_q = request.is_packed() ? request.max_seqlen_query : query.sizes[rows];
  const int64_t seq_k = request.is_packed() ? request.max_seqlen_key : key.sizes[rows];
  if (!fit(batch, query.sizes[rows], key.sizes[rows], query.sizes[heads], query.sizes[last], seq_q,
           seq_k)) {
    return false;
  }
  args.q = input(query, request.head_axis);
  args.k = input(key, request.head_axis);
  args.v = input(request.value, request.head_axis);
  args.cu_seqlens_q = numbers_of(request.cu_seqlens_query);
  args.cu_seqlens_k = numbers_of(request.cu_seqlens_key);
  args.seqused_k = numbers_of(request.seqused_key);
  args.element = query.dtype == libtorch.aoti_torch_dtype_float16() ? FA4_HALF : FA4_BFLOAT16;
  args.batch = static_cast<int32_t>(batch);
  args.heads_q = static_cast<int32_t>(query.sizes[heads]);
  args.heads_k = static_cast<int32_t>(key.sizes[heads]);
  args.head_dim = static_cast<int32_t>(query.sizes[last]);
  args.seq_q = static_cast<int32_t>(seq_q);
  args.seq_k = static_cast<int32_t>(seq_k);
  args.total_q = static_cast<int32_t>(query.sizes[rows]);
  args.total_k = static_cast<int32_t>(key.sizes[rows]);
  args.causal = request.causal;
  args.window_left = window_of(request.window_left);
  args.window_right = window_of(request.window_right);
  args.scale = static_cast<float>(request.scale);
  return true;
}

}  // namespace

bool read_dense(const Arguments& arguments, int first, HeadAxis head_axis, Request& request) {
  request.head_axis = head_axis;
  const int axis = static_cast<int>(head_axis);
  return read_three(arguments, first, 4, request) &&
         request.query.sizes[0] == request.key.sizes[0] &&
         request.query.sizes[axis] % request.key.sizes[axis] == 0;
}

bool read_packed(const Arguments& arguments, int first, AtenTensorHandle cu_seqlens_query,
                 AtenTensorHandle cu_seqlens_key, AtenTensorHandle seqused_key,
                 int64_t max_seqlen_query, int64_t max_seqlen_key, Request& request) {
  request.max_seqlen_query = max_seqlen_query;
  request.max_seqlen_key = max_seqlen_key;
  return read_three(arguments, first, 3, request) &&
         request.query.sizes[1] % request.key.sizes[1] == 0 &&
         read_numbers(cu_seqlens_query, request.query, request.cu_seqlens_query) &&
         read_numbers(cu_seqlens_key, request.query, request.cu_seqlens_key) &&
         request.cu_seqlens_query.sizes[0] >= 2 &&
         request.cu_seqlens_query.sizes[0] == request.cu_seqlens_key.sizes[0] &&
         (seqused_key == nullptr ||
          (read_numbers(seqused_key, request.query, request.seqused_key) &&
           request.seqused_key.sizes[0] + 1 == request.cu_seqlens_key.sizes[0]));
}

double default_scale(const Tensor& query) {
  return 1.0 / std::sqrt(double(query.sizes[query.dims - 1]));
}

fa4_tensor input(const Tensor& tensor, HeadAxis head_axis) {
  return view_of(tensor, const_cast<void*>(read_only(tensor.handle)), head_axis);
}

fa4_tensor output(const Tensor& tensor, HeadAxis head_axis) {
  return view_of(tensor, writable(tensor.handle), head_axis);
}

bool describe(const Request& request, fa4_forward_args& args) { return fill(request, args); }
bool describe(const Request& request, fa4_backward_args& args) { return fill(request, args); }

OwnedTensor workspace_of(int64_t bytes, const Tensor& like) {
  const int64_t words = (bytes + 3) / 4;
  return empty(like, libtorch.aoti_torch_dtype_int32(), 1, &words);
}

}  // namespace fa4::glue

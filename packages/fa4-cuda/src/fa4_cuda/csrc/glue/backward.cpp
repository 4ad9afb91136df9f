#include "backward.h"

#include "devices.h"

namespace fa4::glue {
namespace {

constexpr int64_t kAlignmentBytes = 16;
constexpr int64_t kElementBytes = 2;

// Whether the copy engine reads a tensor where it is. It steps by zero too, over heads or rows that
// are one in memory, but not within a row: the gradient of a sum has one number for all.
bool is_readable(const Tensor& tensor) {
  if (!tensor.unit_stride() ||
      reinterpret_cast<uintptr_t>(read_only(tensor.handle)) % kAlignmentBytes != 0) {
    return false;
  }
  for (int dim = 0; dim + 1 < tensor.dims; ++dim) {
    const int64_t bytes = tensor.strides[dim] * kElementBytes;
    if (tensor.sizes[dim] > 1 && bytes % kAlignmentBytes != 0) return false;
  }
  return true;
}

// Reads a tensor that is like the query, or a copy of it that is made if the kernels need one.
bool read_like_query(AtenTensorHandle handle, const Tensor& query, OwnedTensor& copy,
                     Tensor& tensor) {
  if (!read(handle, query.dims, tensor) || !tensor.same_sizes(query) || !tensor.same_kind(query))
    return false;
  if (is_readable(tensor)) return true;
  copy = contiguous_copy(tensor);
  return copy && read(copy.get(), query.dims, tensor);
}

// One number a row, rows side by side.
bool read_lse(const Request& request, const ForwardResults& results, fa4_backward_args& args) {
  const Tensor& query = request.query;
  const int64_t rows = query.sizes[request.rows()], heads = query.sizes[request.heads()];
  const int axis = request.is_packed() ? 0 : 1;  // of heads; rows are behind it
  Tensor lse;
  if (!read(results.lse, axis + 2 + results.lse_is_column, lse) ||
      lse.dtype != libtorch.aoti_torch_dtype_float32() || !lse.same_device(query) ||
      lse.sizes[axis] != heads || lse.sizes[axis + 1] != rows ||
      (axis == 1 && lse.sizes[0] != query.sizes[0]) ||
      (results.lse_is_column && lse.sizes[axis + 2] != 1) ||
      (rows > 1 && lse.strides[axis + 1] != 1)) {
    return false;
  }
  args.lse = static_cast<const float*>(read_only(lse.handle));
  args.lse_stride_head = lse.strides[axis];
  args.lse_stride_batch = axis == 1 ? lse.strides[0] : 0;
  return true;
}

bool allocate_like(const Tensor& tensor, HeadAxis head_axis, OwnedTensor& made, fa4_tensor& view) {
  made = empty_like(tensor);
  Tensor gradient;
  if (!made || !read(made.get(), tensor.dims, gradient) || !gradient.unit_stride()) return false;
  view = output(gradient, head_axis);
  return true;
}

}  // namespace

bool run_backward(const Request& request, const ForwardResults& results, Gradients& gradients) {
  const Tensor& query = request.query;
  const HeadAxis head_axis = request.head_axis;
  const Device* device = device_at(query.device);
  if (device == nullptr) return false;
  const OnDevice guard(query.device);
  fa4_backward_args args = {};
  fa4_backward_plan plan = {};
  OwnedTensor grad_out_copy, out_copy;
  Tensor grad_out, out;
  if (!guard || !describe(request, args) || !read_lse(request, results, args) ||
      libtorch.aoti_torch_get_current_cuda_stream(query.device, &args.stream) ||
      !read_like_query(results.grad_out, query, grad_out_copy, grad_out) ||
      !read_like_query(results.out, query, out_copy, out) ||
      !allocate_like(query, head_axis, gradients.query, args.dq) ||
      !allocate_like(request.key, head_axis, gradients.key, args.dk) ||
      !allocate_like(request.value, head_axis, gradients.value, args.dv)) {
    return false;
  }
  args.grad_out = input(grad_out, head_axis);
  args.out = input(out, head_axis);
  args.deterministic = deterministic_is_asked();
  if (fa4_plan_backward(&args, device->multiprocessors, &plan) != FA4_OK) return false;
  OwnedTensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = workspace_of(plan.workspace_bytes, query);
    if (!workspace) return false;
    args.workspace = writable(workspace.get());
    args.workspace_bytes = static_cast<size_t>(plan.workspace_bytes);
  }
  return fa4_backward_with_plan(&args, &plan) == FA4_OK;
}

}  // namespace fa4::glue

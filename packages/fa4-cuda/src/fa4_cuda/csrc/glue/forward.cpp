#include "forward.h"

#include "devices.h"

namespace fa4::glue {
namespace {

OwnedTensor empty_lse(const Request& request, const fa4_forward_args& args) {
  const int64_t dense[3] = {args.batch, args.heads_q, args.seq_q};
  const int64_t packed[2] = {args.heads_q, args.total_q};
  const int32_t dtype = libtorch.aoti_torch_dtype_float32();
  return request.is_packed() ? empty(request.query, dtype, 2, packed)
                             : empty(request.query, dtype, 3, dense);
}

}  // namespace

OwnedTensor run_forward(const Request& request, const Tensor& out, float lse_of_empty_rows) {
  const Tensor& query = request.query;
  const Device* device = device_at(query.device);
  if (device == nullptr || !out.unit_stride()) return OwnedTensor();
  fa4_forward_args args = {};
  fa4_forward_plan plan = {};
  if (!describe(request, args) ||
      libtorch.aoti_torch_get_current_cuda_stream(query.device, &args.stream)) {
    return OwnedTensor();
  }
  args.out = output(out, request.head_axis);
  args.empty_lse = lse_of_empty_rows;
  OwnedTensor lse = empty_lse(request, args);
  if (!lse) return OwnedTensor();
  args.lse = static_cast<float*>(writable(lse.get()));
  args.lse_stride_head = request.is_packed() ? args.total_q : args.seq_q;
  args.lse_stride_batch = args.lse_stride_head * args.heads_q;
  if (fa4_plan_forward(&args, device->multiprocessors, &plan) != FA4_OK) return OwnedTensor();
  OwnedTensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = workspace_of(plan.workspace_bytes, query);
    if (!workspace) return OwnedTensor();
    args.workspace = writable(workspace.get());
    args.workspace_bytes = static_cast<size_t>(plan.workspace_bytes);
  }
  const OnDevice guard(query.device);
  return guard && fa4_forward_with_plan(&args, &plan) == FA4_OK ? std::move(lse) : OwnedTensor();
}

}  // namespace fa4::glue

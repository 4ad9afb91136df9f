// How a backward call is served: decided from sizes alone, on the host, without a GPU.
#include "plan.h"

namespace fa4 {
namespace {

constexpr int64_t kWorkspaceAlignment = 128;

int64_t aligned(int64_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

fa4_backward_plan plan_backward(const fa4_backward_args& args, int multiprocessors) {
  const bool packed = args.cu_seqlens_q != nullptr;
  const int64_t rows =
      int64_t{args.heads_q} * (packed ? args.total_q : int64_t{args.batch} * args.seq_q);
  fa4_backward_plan plan{};
  plan.grid = multiprocessors;
  plan.deterministic = args.deterministic != 0;
  plan.workspace_bytes = aligned(rows * args.head_dim * 4) + 2 * aligned(rows * 4);
  return plan;
}

}  // namespace
}  // namespace fa4

extern "C" int fa4_plan_backward(const fa4_backward_args* args, int multiprocessors,
                                 fa4_backward_plan* plan) {
  const int status = fa4::check_backward(*args);
  if (status == FA4_OK) *plan = fa4::plan_backward(*args, multiprocessors);
  return status;
}

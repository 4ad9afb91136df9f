// The backward's part of the C ABI that needs CUDA.
#include <cuda_runtime.h>

#include "api.h"
#include "plan.h"

extern "C" int fa4_backward_with_plan(const fa4_backward_args* args,
                                      const fa4_backward_plan* plan) {
  const int status = fa4::check_backward(*args);
  if (status != FA4_OK) return status;
  if (args->workspace_bytes < static_cast<size_t>(plan->workspace_bytes))
    return FA4_WORKSPACE_TOO_SMALL;
  return -cudaErrorNotSupported;  // no kernel is compiled in
}

// From a request to the forward kernel.
#pragma once

#include "request.h"

namespace fa4::glue {

// Allocates lse, [B, H, S] or [H, T], and runs the kernel on the tensors' device and its current
// stream. Writes `out`. `lse_of_empty_rows` is what lse reads for rows without keys. Returns null,
// with nothing launched, if the kernels do not serve the request or if anything fails.
OwnedTensor run_forward(const Request& request, const Tensor& out, float lse_of_empty_rows);

}  // namespace fa4::glue

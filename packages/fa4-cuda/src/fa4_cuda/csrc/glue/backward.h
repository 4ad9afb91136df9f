// From a request and what its forward left to the backward kernels.
#pragma once

#include "request.h"

namespace fa4::glue {

// What a backward is given beside the request of its forward.
struct ForwardResults {
  AtenTensorHandle grad_out, out;  // shaped like the query
  AtenTensorHandle lse;            // fp32 [B, H, S] or [H, T]
  bool lse_is_column = false;      // [B, H, S, 1] instead
};

// Each laid out as torch.empty_like makes it.
struct Gradients {
  OwnedTensor query, key, value;
};

// Allocates the gradients and runs the kernels on the tensors' device and its current stream.
// Returns false, with nothing launched that counts, if the kernels do not serve the request, if the
// results belong to no such forward, or if anything fails.
bool run_backward(const Request& request, const ForwardResults& results, Gradients& gradients);

}  // namespace fa4::glue

// How a call is served: decided from sizes alone, on the host, without a GPU.
#pragma once

#include "api.h"
#include "tiles.h"

namespace fa4 {

// Windows as the kernels take them: finite, so that adding a row number cannot overflow.
struct Window {
  Mask mask;
  int left, right;
};
Window window_of(const fa4_forward_args& args);
Window window_of(const fa4_backward_args& args);

// FA4_OK, or why the call cannot be served.
int check_forward(const fa4_forward_args& args);
int check_backward(const fa4_backward_args& args);

// The same call, whose longest packed sequence is no longer than all of them together.
fa4_backward_args without_excess(fa4_backward_args args);

// Expects checked arguments.
fa4_forward_plan plan_forward(const fa4_forward_args& args, int multiprocessors);

}  // namespace fa4

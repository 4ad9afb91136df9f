// The host's side of a backward launch.
#pragma once

#include "api.h"
#include "backward_tiles.h"

namespace fa4 {

// Where the parts of the workspace begin, in bytes; sums of dQ, if there are any, come first.
struct BackwardWorkspace {
  int64_t negative_lse, delta, next_tile, nan_keys, next_query_tile, turns;
  int64_t zeroed;
  int64_t bytes;
};

// Rows that the workspace holds of a head of every sequence; of all sequences if they are packed.
int64_t workspace_rows(const fa4_backward_args& args);
BackwardWorkspace lay_out_workspace(const fa4_backward_args& args, const fa4_backward_plan& plan);

// Whether thread blocks add to sums of dQ by turns, for the same bits in every run. Where dQ has a
// kernel of its own nothing is summed, and they are the same anyway.
bool takes_turns(const fa4_backward_plan& plan);

// Whether the main kernel zeroes sums of dQ.
bool zeroes_ahead(const fa4_backward_args& args, const fa4_backward_plan& plan);

// Expects checked arguments.
fa4_backward_plan plan_backward(const fa4_backward_args& args, int multiprocessors);

}  // namespace fa4

// A forward request from any op in one form, and its way to the kernels.
#pragma once

#include <cmath>

#include "tensor.h"

namespace fa4::glue {

// Which axis of a dense tensor counts heads; the other of 1 and 2 counts rows.
enum class HeadAxis { kOne = 1, kTwo = 2 };

struct Forward {
  Tensor query, key, value;
  Tensor cu_seqlens_query, cu_seqlens_key;  // [B + 1] int32; without handles if dense
  Tensor seqused_key;                       // [B] int32, of packed sequences; without a handle: all
  HeadAxis head_axis = HeadAxis::kOne;
  int64_t max_seqlen_query = 0, max_seqlen_key = 0;  // of packed sequences
  double scale = 0;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;  // as the op took them: -1 is none
  float lse_of_empty_rows = INFINITY;

  bool is_packed() const { return cu_seqlens_query.handle != nullptr; }
};

// Reads query, key and value. Returns false if they are no valid dense or packed request, which
// torch is to refuse.
bool read_dense(const Arguments& arguments, int first, HeadAxis head_axis, Forward& forward);
// `seqused_key` may be null.
bool read_packed(const Arguments& arguments, int first, AtenTensorHandle cu_seqlens_query,
                 AtenTensorHandle cu_seqlens_key, AtenTensorHandle seqused_key,
                 int64_t max_seqlen_query, int64_t max_seqlen_key, Forward& forward);

// Allocates lse, [B, H, S] or [H, T], and runs the kernel on the tensors' device and its current
// stream. Writes `out`. Returns null, with nothing launched, if the kernels do not serve the
// request or if anything fails.
OwnedTensor run(const Forward& forward, const Tensor& out);

}  // namespace fa4::glue

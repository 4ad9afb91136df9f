// A request from any op in one form, and what the kernels are told of it.
#pragma once

#include <cmath>

#include "../api.h"
#include "tensor.h"

namespace fa4::glue {

// Which axis of a dense tensor counts heads; the other of 1 and 2 counts rows.
enum class HeadAxis { kOne = 1, kTwo = 2 };

// What the forward and the backward of one call share.
struct Request {
  Tensor query, key, value;
  Tensor cu_seqlens_query, cu_seqlens_key;  // [B + 1] int32; without handles if dense
  Tensor seqused_key;                       // [B] int32, of packed sequences; without a handle: all
  HeadAxis head_axis = HeadAxis::kOne;
  int64_t max_seqlen_query = 0, max_seqlen_key = 0;  // of packed sequences
  double scale = 0;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;  // as the op took them: -1 is none

  bool is_packed() const { return cu_seqlens_query.handle != nullptr; }
  // The axes of query, key and value.
  int heads() const { return is_packed() ? 1 : static_cast<int>(head_axis); }
  int rows() const { return is_packed() ? 0 : 3 - heads(); }
};

// Reads query, key and value. Returns false if they are no valid dense or packed request, which
// torch is to refuse.
bool read_dense(const Arguments& arguments, int first, HeadAxis head_axis, Request& request);
// `seqused_key` may be null.
bool read_packed(const Arguments& arguments, int first, AtenTensorHandle cu_seqlens_query,
                 AtenTensorHandle cu_seqlens_key, AtenTensorHandle seqused_key,
                 int64_t max_seqlen_query, int64_t max_seqlen_key, Request& request);

// What the op scales scores with if it is not told.
double default_scale(const Tensor& query);

// A tensor as the kernels take it: [B, S, H, D] or [T, H, D].
fa4_tensor input(const Tensor& tensor, HeadAxis head_axis);
fa4_tensor output(const Tensor& tensor, HeadAxis head_axis);

// The sizes, the strides of query, key and value, and the options of a request; nothing that has to
// be allocated. Returns false if the kernels cannot count that far.
bool describe(const Request& request, fa4_forward_args& args);
bool describe(const Request& request, fa4_backward_args& args);

// The workspace of one launch; the caching allocator keeps it from others until the stream is past
// it. Null if there is no memory.
OwnedTensor workspace_of(int64_t bytes, const Tensor& like);

}  // namespace fa4::glue

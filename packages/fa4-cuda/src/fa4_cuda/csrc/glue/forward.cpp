#include "forward.h"

namespace fa4::glue {
namespace {

// Of query, key and value: one floating dtype, one GPU, last dimensions without gaps.
bool share_what_they_must(const Tensor& query, const Tensor& key, const Tensor& value) {
  if (query.device_type != libtorch.aoti_torch_device_type_cuda()) return false;
  for (const Tensor* tensor : {&query, &key, &value}) {
    if (tensor->dtype != query.dtype || tensor->device_type != query.device_type ||
        tensor->device != query.device || !tensor->unit_stride() || tensor->is_empty()) {
      return false;
    }
  }
  return true;
}

bool read_three(const Arguments& arguments, int first, int64_t dims, Forward& forward) {
  return read(arguments.tensor(first), dims, forward.query) && read(arguments.tensor(first + 1), dims, forward.key) &&
         read(arguments.tensor(first + 2), dims, forward.value) && forward.key.same_sizes(forward.value) &&
         share_what_they_must(forward.query, forward.key, forward.value) &&
         forward.query.sizes[dims - 1] == forward.key.sizes[dims - 1];
}

bool read_offsets(AtenTensorHandle handle, const Tensor& query, Tensor& offsets) {
  return handle != nullptr && read(handle, 1, offsets) && offsets.dtype == libtorch.aoti_torch_dtype_int32() &&
         offsets.device_type == query.device_type && offsets.device == query.device && offsets.unit_stride();
}

}  // namespace

bool read_dense(const Arguments& arguments, int first, HeadAxis head_axis, Forward& forward) {
  forward.head_axis = head_axis;
  const int axis = static_cast<int>(head_axis);
  return read_three(arguments, first, 4, forward) && forward.query.sizes[0] == forward.key.sizes[0] &&
         forward.query.sizes[axis] % forward.key.sizes[axis] == 0;
}

bool read_packed(const Arguments& arguments, int first, AtenTensorHandle cu_seqlens_query,
                 AtenTensorHandle cu_seqlens_key, int64_t max_seqlen_query, int64_t max_seqlen_key,
                 Forward& forward) {
  forward.max_seqlen_query = max_seqlen_query;
  forward.max_seqlen_key = max_seqlen_key;
  return read_three(arguments, first, 3, forward) && forward.query.sizes[1] % forward.key.sizes[1] == 0 &&
         read_offsets(cu_seqlens_query, forward.query, forward.cu_seqlens_query) &&
         read_offsets(cu_seqlens_key, forward.query, forward.cu_seqlens_key) &&
         forward.cu_seqlens_query.sizes[0] >= 2 &&
         forward.cu_seqlens_query.sizes[0] == forward.cu_seqlens_key.sizes[0];
}

OwnedTensor run(const Forward&, const Tensor&) { return OwnedTensor(); }

}  // namespace fa4::glue

#include "tensor.h"

#include <utility>

namespace fa4::glue {
namespace {

// Whether the elements fill their memory without gaps and without sharing: then empty_like keeps
// the strides.
bool is_dense(const Tensor& tensor) {
  int order[kMostDims];
  int count = 0;
  for (int dim = 0; dim < tensor.dims; ++dim) {
    if (tensor.sizes[dim] != 1) order[count++] = dim;
  }
  for (int i = 1; i < count; ++i) {
    for (int j = i; j > 0 && tensor.strides[order[j]] < tensor.strides[order[j - 1]]; --j) {
      std::swap(order[j], order[j - 1]);
    }
  }
  int64_t expected = 1;
  for (int i = 0; i < count; ++i) {
    if (tensor.strides[order[i]] != expected) return false;
    expected *= tensor.sizes[order[i]];
  }
  return true;
}

OwnedTensor empty_strided(const Tensor& like, int32_t dtype, int64_t dims, const int64_t* sizes,
                          const int64_t* strides) {
  AtenTensorHandle made = nullptr;
  const auto failed = libtorch.aoti_torch_empty_strided(dims, sizes, strides, dtype,
                                                        like.device_type, like.device, &made);
  return OwnedTensor(failed ? nullptr : made);
}

}  // namespace

bool Tensor::same_sizes(const Tensor& other) const {
  if (dims != other.dims) return false;
  for (int dim = 0; dim < dims; ++dim) {
    if (sizes[dim] != other.sizes[dim]) return false;
  }
  return true;
}

bool Tensor::same_device(const Tensor& other) const {
  return device_type == other.device_type && device == other.device;
}

bool Tensor::same_kind(const Tensor& other) const {
  return dtype == other.dtype && same_device(other);
}

bool Tensor::is_empty() const {
  for (int dim = 0; dim < dims; ++dim) {
    if (sizes[dim] == 0) return true;
  }
  return false;
}

bool read(AtenTensorHandle handle, int64_t dims, Tensor& tensor) {
  tensor.handle = handle;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  if (libtorch.aoti_torch_get_dim(handle, &tensor.dims) || tensor.dims != dims ||
      libtorch.aoti_torch_get_sizes(handle, &sizes) ||
      libtorch.aoti_torch_get_strides(handle, &strides) ||
      libtorch.aoti_torch_get_dtype(handle, &tensor.dtype) ||
      libtorch.aoti_torch_get_device_type(handle, &tensor.device_type) ||
      libtorch.aoti_torch_get_device_index(handle, &tensor.device)) {
    return false;
  }
  tensor.sizes = sizes;
  tensor.strides = strides;
  return true;
}

const void* read_only(AtenTensorHandle handle) {
  const void* data = nullptr;
  libtorch.torch_get_const_data_ptr(handle, &data);
  return data;
}

void* writable(AtenTensorHandle handle) {
  void* data = nullptr;
  libtorch.aoti_torch_get_data_ptr(handle, &data);
  return data;
}

OwnedTensor empty(const Tensor& like, int32_t dtype, int64_t dims, const int64_t* sizes) {
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (int64_t dim = dims; dim-- > 0; stride *= sizes[dim]) strides[dim] = stride;
  return empty_strided(like, dtype, dims, sizes, strides);
}

OwnedTensor empty_like(const Tensor& like) {
  if (is_dense(like)) return empty_strided(like, like.dtype, like.dims, like.sizes, like.strides);
  // Slower, and rare: torch knows what it does with gaps and with dimensions that share memory.
  StableIValue stack[6] =
      {};  // self, and dtype, layout, device, pin_memory and memory_format as None
  AtenTensorHandle self = nullptr;
  if (libtorch.aoti_torch_new_tensor_handle(like.handle, &self)) return OwnedTensor();
  stack[0] = reinterpret_cast<StableIValue>(self);
  if (libtorch.torch_call_dispatcher("aten::empty_like", "", stack, kTorchVersion))
    return OwnedTensor();
  return OwnedTensor(reinterpret_cast<AtenTensorHandle>(stack[0]));
}

OwnedTensor contiguous_copy(const Tensor& tensor) {
  OwnedTensor made = empty(tensor, tensor.dtype, tensor.dims, tensor.sizes);
  constexpr int32_t non_blocking = 1;
  const bool copied = made && !libtorch.aoti_torch_copy_(made.get(), tensor.handle, non_blocking);
  return copied ? std::move(made) : OwnedTensor();
}

OwnedTensor undefined() {
  AtenTensorHandle made = nullptr;
  return OwnedTensor(libtorch.aoti_torch_new_uninitialized_tensor(&made) ? nullptr : made);
}

}  // namespace fa4::glue

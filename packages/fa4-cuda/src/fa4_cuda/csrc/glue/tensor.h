// What a call needs to know of a tensor, and how results are allocated.
#pragma once

#include "arguments.h"

namespace fa4::glue {

inline constexpr int kMostDims = 4;

// A tensor of at most kMostDims dimensions, borrowed.
struct Tensor {
  AtenTensorHandle handle = nullptr;
  int64_t dims = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t dtype = 0;
  int32_t device_type = 0;
  int32_t device = 0;

  bool same_sizes(const Tensor& other) const;
  bool same_device(const Tensor& other) const;
  bool same_kind(const Tensor& other) const;  // dtype and device
  bool is_empty() const;
  bool unit_stride() const { return strides[dims - 1] == 1; }
};

// Reads a tensor. Returns false if it has another number of dimensions.
bool read(AtenTensorHandle handle, int64_t dims, Tensor& tensor);

// Where the elements are: to read them, or to write them too.
const void* read_only(AtenTensorHandle handle);
void* writable(AtenTensorHandle handle);

// Uninitialised, contiguous, on the device of `like`; null if there is no memory.
OwnedTensor empty(const Tensor& like, int32_t dtype, int64_t dims, const int64_t* sizes);

// Uninitialised, with the strides that torch.empty_like gives; null if there is no memory.
OwnedTensor empty_like(const Tensor& like);

// The same elements, contiguous, by the current stream of their device; null if there is no memory.
OwnedTensor contiguous_copy(const Tensor& tensor);

// A tensor that is not there, which Python reads as None.
OwnedTensor undefined();

}  // namespace fa4::glue

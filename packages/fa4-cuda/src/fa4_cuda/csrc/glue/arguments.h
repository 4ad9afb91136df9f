// Arguments and results of an op, as libtorch's stable ABI passes them: one 64-bit value each.
//
// A tensor is an owning handle, a number its bits, an optional a pointer to one more such value, or
// 0 for None.
#pragma once

#include <cstring>
#include <utility>

#include "torch_api.h"

namespace fa4::glue {

// A handle that is given back where it goes out of scope.
class OwnedTensor {
 public:
  OwnedTensor() = default;
  explicit OwnedTensor(AtenTensorHandle handle) : handle_(handle) {}
  OwnedTensor(OwnedTensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  OwnedTensor& operator=(OwnedTensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~OwnedTensor() {
    if (handle_ != nullptr) libtorch.aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }
  explicit operator bool() const { return handle_ != nullptr; }
  StableIValue release() { return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr)); }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// What a call was given; borrowed.
class Arguments {
 public:
  explicit Arguments(const StableIValue* values) : values_(values) {}

  AtenTensorHandle tensor(int index) const {
    return reinterpret_cast<AtenTensorHandle>(values_[index]);
  }
  double number(int index) const { return as_double(values_[index]); }
  int64_t integer(int index) const { return static_cast<int64_t>(values_[index]); }
  bool flag(int index) const { return (values_[index] & 0xff) != 0; }

  // Of an argument that is no optional and may be a tensor that is not there.
  AtenTensorHandle defined_or_null(int index) const {
    bool is_defined = false;
    const AtenTensorHandle handle = tensor(index);
    return handle != nullptr && !libtorch.aoti_torch_is_defined(handle, &is_defined) && is_defined
               ? handle
               : nullptr;
  }

  bool is_none(int index) const { return values_[index] == 0; }
  AtenTensorHandle tensor_or_null(int index) const {
    return is_none(index) ? nullptr : reinterpret_cast<AtenTensorHandle>(*inner(index));
  }
  double number_or(int index, double otherwise) const {
    return is_none(index) ? otherwise : as_double(*inner(index));
  }
  int64_t integer_or(int index, int64_t otherwise) const {
    return is_none(index) ? otherwise : static_cast<int64_t>(*inner(index));
  }

 private:
  static double as_double(StableIValue value) {
    double number;
    std::memcpy(&number, &value, sizeof number);
    return number;
  }
  const StableIValue* inner(int index) const {
    return reinterpret_cast<const StableIValue*>(values_[index]);
  }

  const StableIValue* values_;
};

// Results of a call, in order, until they are handed over.
class Results {
 public:
  static constexpr int kMost = 9;
  Results() = default;
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;
  void add(OwnedTensor tensor) { tensors_[count_++] = std::move(tensor); }
  void add(int64_t number) { numbers_[count_++] = static_cast<StableIValue>(number); }
  void hand_over(StableIValue* values) {
    for (int i = 0; i < count_; ++i) values[i] = tensors_[i] ? tensors_[i].release() : numbers_[i];
  }

 private:
  int count_ = 0;
  OwnedTensor tensors_[kMost];
  StableIValue numbers_[kMost] = {};
};

// Gives back the arguments of a call. `signature` has a letter for each: T tensor, f float, i int,
// b bool, and a question mark after it if it is optional; it ends at the first other character.
void release_arguments(StableIValue* values, const char* signature);

}  // namespace fa4::glue

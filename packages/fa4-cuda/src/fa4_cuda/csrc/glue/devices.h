// The GPUs of this process: which of them the kernels are for, and making one current.
#pragma once

#include "torch_api.h"

namespace fa4::glue {

struct Device {
  int multiprocessors;
};

// A device by its number, or null if the kernels are not for it, or if it cannot be asked. Asks CUDA once.
const Device* device_at(int32_t index);

// Makes a device the current one while it lives, if it is not yet.
class OnDevice {
 public:
  explicit OnDevice(int32_t index) {
    int32_t current = -1;
    if (libtorch.aoti_torch_get_current_device_index(&current) == 0 && current == index) {
      is_current_ = true;
    } else {
      is_current_ = libtorch.aoti_torch_create_device_guard(index, &guard_) == 0;
    }
  }
  ~OnDevice() {
    if (guard_ != nullptr) libtorch.aoti_torch_delete_device_guard(guard_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  explicit operator bool() const { return is_current_; }

 private:
  DeviceGuardHandle guard_ = nullptr;
  bool is_current_ = false;
};

}  // namespace fa4::glue

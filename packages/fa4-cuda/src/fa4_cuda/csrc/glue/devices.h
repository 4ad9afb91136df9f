// The GPUs of this process: which of them the kernels are for, and making one current.
#pragma once

#include "torch_api.h"

namespace fa4::glue {

struct Device {
  int multiprocessors;
};

// A device by its number, or null if the kernels are not for it, or if it cannot be asked. Asks
// CUDA once.
const Device* device_at(int32_t index);

// Makes a device the current one while it lives, if it is not yet.
class OnDevice {
 public:
  explicit OnDevice(int32_t index);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  explicit operator bool() const { return is_current_; }

 private:
  DeviceGuardHandle guard_ = nullptr;
  bool is_current_ = false;
};

}  // namespace fa4::glue

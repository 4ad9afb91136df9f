#include "devices.h"

#include <cuda_runtime.h>

#include <array>
#include <mutex>

namespace fa4::glue {
namespace {

constexpr int kMostDevices = 64;

struct Entry {
  std::once_flag asked;
  Device device = {};
  bool is_served = false;

  void ask(int index) {
    int major = 0, minor = 0;
    is_served =
        libtorch.aoti_torch_get_current_cuda_stream != nullptr &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) == cudaSuccess &&
        major == 9 && minor == 0 &&
        cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index) ==
            cudaSuccess;
  }
};

std::array<Entry, kMostDevices> entries;

}  // namespace

const Device* device_at(int32_t index) {
  if (index < 0 || index >= kMostDevices) return nullptr;
  Entry& entry = entries[index];
  std::call_once(entry.asked, [&entry, index] { entry.ask(index); });
  return entry.is_served ? &entry.device : nullptr;
}

OnDevice::OnDevice(int32_t index) {
  int32_t current = -1;
  is_current_ = (libtorch.aoti_torch_get_current_device_index(&current) == 0 && current == index) ||
                libtorch.aoti_torch_create_device_guard(index, &guard_) == 0;
}

OnDevice::~OnDevice() {
  if (guard_ != nullptr) libtorch.aoti_torch_delete_device_guard(guard_);
}

}  // namespace fa4::glue

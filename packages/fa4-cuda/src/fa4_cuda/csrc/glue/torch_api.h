// The functions of libtorch's stable C ABI (torch 2.11) that are called here, found when the
// library is asked to.
//
// They are declared by hand, so that building needs no torch; tests/test_torch_api.py compares them
// with torch's headers. None is linked: a process without torch, or with a torch without CUDA, can
// load the library.
#pragma once

#include <cstdint>

using AOTITorchError = int32_t;
using StableIValue = uint64_t;
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct DeviceGuardOpaque;
using DeviceGuardHandle = DeviceGuardOpaque*;

// X(result, name, parameters)
#define FA4_TORCH_FUNCTIONS(X)                                                                \
  X(int32_t, aoti_torch_device_type_cuda, ())                                                 \
  X(int32_t, aoti_torch_dtype_bfloat16, ())                                                   \
  X(int32_t, aoti_torch_dtype_float16, ())                                                    \
  X(int32_t, aoti_torch_dtype_float32, ())                                                    \
  X(int32_t, aoti_torch_dtype_int32, ())                                                      \
  X(int32_t, aoti_torch_dtype_int64, ())                                                      \
  X(int32_t, aoti_torch_dtype_uint64, ())                                                     \
  X(AOTITorchError, aoti_torch_get_dim, (AtenTensorHandle, int64_t*))                         \
  X(AOTITorchError, aoti_torch_get_sizes, (AtenTensorHandle, int64_t**))                      \
  X(AOTITorchError, aoti_torch_get_strides, (AtenTensorHandle, int64_t**))                    \
  X(AOTITorchError, aoti_torch_get_dtype, (AtenTensorHandle, int32_t*))                       \
  X(AOTITorchError, aoti_torch_get_device_type, (AtenTensorHandle, int32_t*))                 \
  X(AOTITorchError, aoti_torch_get_device_index, (AtenTensorHandle, int32_t*))                \
  X(AOTITorchError, aoti_torch_is_defined, (AtenTensorHandle, bool*))                         \
  X(AOTITorchError, aoti_torch_get_storage_offset, (AtenTensorHandle, int64_t*))              \
  X(AOTITorchError, aoti_torch_get_data_ptr, (AtenTensorHandle, void**))                      \
  X(AOTITorchError, torch_get_const_data_ptr, (AtenTensorHandle, const void**))               \
  X(AOTITorchError, aoti_torch_new_tensor_handle, (AtenTensorHandle, AtenTensorHandle*))      \
  X(AOTITorchError, aoti_torch_new_uninitialized_tensor, (AtenTensorHandle*))                 \
  X(AOTITorchError, aoti_torch_delete_tensor_object, (AtenTensorHandle))                      \
  X(AOTITorchError, aoti_torch_empty_strided,                                                 \
    (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorHandle*))  \
  X(AOTITorchError, aoti_torch__reinterpret_tensor,                                           \
    (AtenTensorHandle, int64_t, const int64_t*, const int64_t*, int64_t, AtenTensorHandle*))  \
  X(AOTITorchError, aoti_torch_copy_, (AtenTensorHandle, AtenTensorHandle, int32_t))          \
  X(AOTITorchError, aoti_torch_get_current_device_index, (int32_t*))                          \
  X(AOTITorchError, aoti_torch_create_device_guard, (int32_t, DeviceGuardHandle*))            \
  X(AOTITorchError, aoti_torch_delete_device_guard, (DeviceGuardHandle))                      \
  X(AOTITorchError, aoti_torch_library_init_impl,                                             \
    (const char*, const char*, const char*, uint32_t, TorchLibraryHandle*))                   \
  X(AOTITorchError, aoti_torch_delete_library_object, (TorchLibraryHandle))                   \
  X(AOTITorchError, torch_library_impl,                                                       \
    (TorchLibraryHandle, const char*, void (*)(StableIValue*, uint64_t, uint64_t), uint64_t)) \
  X(AOTITorchError, torch_call_dispatcher, (const char*, const char*, StableIValue*, uint64_t))

// Null where this torch has none: it is older, or built without CUDA.
#define FA4_TORCH_OPTIONAL_FUNCTIONS(X)                                    \
  X(AOTITorchError, aoti_torch_get_current_cuda_stream, (int32_t, void**)) \
  X(AOTITorchError, torch_delete_stable_ivalue, (StableIValue*))           \
  X(const char*, torch_exception_get_what_without_backtrace, ())

namespace fa4::glue {

// The version whose conventions these declarations follow: 2.11.0.
inline constexpr uint64_t kTorchVersion = (uint64_t{2} << 56) | (uint64_t{11} << 48);

struct TorchApi {
#define FA4_MEMBER(result, name, parameters) result(*name) parameters;
  FA4_TORCH_FUNCTIONS(FA4_MEMBER)
  FA4_TORCH_OPTIONAL_FUNCTIONS(FA4_MEMBER)
#undef FA4_MEMBER
};

// All null until find_torch has succeeded.
extern TorchApi libtorch;

// Finds the functions in the torch that this process has loaded. Returns null, or the name of the
// one that is missing.
const char* find_torch();

// torch.backends.cuda.flash_sdp_enabled(), of which the C ABI does not tell. False where it cannot
// be asked.
bool flash_is_enabled();
bool can_ask_whether_flash_is_enabled();

// torch.are_deterministic_algorithms_enabled(). True where it cannot be asked: what is always
// right.
bool deterministic_is_asked();

}  // namespace fa4::glue

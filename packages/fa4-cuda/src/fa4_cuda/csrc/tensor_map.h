// Tensors as the copy engine sees them: how tensor maps are made.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cmath>

#include "api.h"
#include "forward_params.h"
#include "tiles.h"

namespace fa4 {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there, so that the library loads without one.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      entry = nullptr;
    }
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

// A tensor as the copy engine sees it, columns first. Columns beyond head_dim and rows beyond the
// last are read as zeros.
struct TensorMapBuilder {
  Element element;
  int head_dim;

  template <int kRank>
  int encode(CUtensorMap* map, void* data, const int64_t (&sizes)[kRank],
             const int64_t (&strides)[kRank], const int (&boxes)[kRank]) const {
    cuuint64_t dims[kRank + 1] = {static_cast<cuuint64_t>(head_dim)}, stride_bytes[kRank];
    cuuint32_t box_dims[kRank + 1] = {kPanelColumns}, steps[kRank + 1] = {1};
    for (int i = 0; i < kRank; ++i) {
      dims[i + 1] = sizes[i];
      // A dimension of size one has whatever stride torch gave it.
      stride_bytes[i] = sizes[i] == 1 ? 16 : strides[i] * kElementBytes;
      box_dims[i + 1] = boxes[i];
      steps[i + 1] = 1;
    }
    // What one fetch brings to L2: of rows of 256 bytes both panels at once, worth 1 to 2% where K
    // and V come from memory once. Rows that start at odd multiples of 16 bytes (head_dim 72) would
    // lose 15%.
    const CUtensorMapL2promotion fetch = head_dim * kElementBytes % 256 == 0
                                             ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B
                                             : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    const CUresult result =
        encode_tiled()(map,
                       element == Element::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                       kRank + 1, data, dims, stride_bytes, box_dims, steps,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, fetch,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? FA4_OK : FA4_UNSUPPORTED_STRIDE;
  }
};

inline TensorView view_of(const fa4_tensor& tensor, bool packed) {
  return {tensor.data, packed ? 0 : tensor.stride_batch, tensor.stride_seq, tensor.stride_head};
}

// Tensor maps are encoded in the context of the calling thread, and a thread that has not used CUDA
// yet has none: torch's allocator may have given it memory from its cache.
inline cudaError_t enter_context() {
  static thread_local bool entered = false;
  if (entered) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  entered = error == cudaSuccess;
  return error;
}

// scale * log2(e), never zero, which would make NaN of a masked infinity. The smallest normal
// number makes the same weights of every finite score.
inline float scale_log2_of(float scale) {
  constexpr float kLog2E = 1.44269504f, kSmallest = 1.17549435e-38f;
  return std::fabs(scale) * kLog2E < kSmallest ? kSmallest : scale * kLog2E;
}

}  // namespace fa4

// Stands in for the GPU: what devices.cpp and api.cpp do, on the CPU, for bfloat16. With it the way
// of a served call, from an op's arguments to its results, runs without a GPU.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "api.h"
#include "glue/devices.h"
#include "plan.h"

namespace {

float load(const fa4_tensor& tensor, int64_t batch, int64_t row, int64_t head, int64_t column) {
  const auto* data = static_cast<const uint16_t*>(tensor.data);
  const uint32_t bits = uint32_t{data[batch * tensor.stride_batch + row * tensor.stride_seq +
                                      head * tensor.stride_head + column]}
                        << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void store(const fa4_tensor& tensor, int64_t batch, int64_t row, int64_t head, int64_t column,
           float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits += 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  static_cast<uint16_t*>(tensor.data)[batch * tensor.stride_batch + row * tensor.stride_seq +
                                      head * tensor.stride_head + column] =
      static_cast<uint16_t>(bits >> 16);
}

struct Rows {
  int64_t batch, first_q, first_k, count_q, count_k;
};

void attend(const fa4_forward_args& args, const Rows& rows, int head, int64_t i) {
  const int kv_head = head / (args.heads_q / args.heads_k);
  const int64_t diagonal = i + rows.count_k - rows.count_q;
  std::vector<double> weights(rows.count_k), sums(args.head_dim);
  double largest = -std::numeric_limits<double>::infinity(), total = 0;
  for (int64_t j = 0; j < rows.count_k; ++j) {
    const int right = args.causal ? 0 : args.window_right;
    const bool hidden = (right >= 0 && j > diagonal + right) ||
                        (args.window_left >= 0 && j < diagonal - args.window_left);
    double score = 0;
    for (int d = 0; d < args.head_dim; ++d) {
      score += double(load(args.q, rows.batch, rows.first_q + i, head, d)) *
               load(args.k, rows.batch, rows.first_k + j, kv_head, d);
    }
    weights[j] = hidden ? -std::numeric_limits<double>::infinity() : score * args.scale;
    largest = std::fmax(largest, weights[j]);
  }
  const bool empty = std::isinf(largest);
  for (int64_t j = 0; !empty && j < rows.count_k; ++j) {
    const double weight = std::exp(weights[j] - largest);
    total += weight;
    for (int d = 0; d < args.head_dim; ++d) {
      sums[d] += weight * load(args.v, rows.batch, rows.first_k + j, kv_head, d);
    }
  }
  for (int d = 0; d < args.head_dim; ++d) {
    store(args.out, rows.batch, rows.first_q + i, head, d,
          empty ? 0.f : static_cast<float>(sums[d] / total));
  }
  args.lse[rows.batch * args.lse_stride_batch + head * args.lse_stride_head + rows.first_q + i] =
      empty ? args.empty_lse : static_cast<float>(largest + std::log(total));
}

int fail_with = FA4_OK;

}  // namespace

namespace fa4::glue {

const Device* device_at(int32_t) {
  static const Device device = {132};
  return &device;
}

OnDevice::OnDevice(int32_t) : is_current_(true) {}
OnDevice::~OnDevice() = default;

}  // namespace fa4::glue

// After fa4_torch_find: CPU tensors pass for those of a GPU, and the next launches return `status`.
extern "C" __attribute__((visibility("default"))) void pretend(int status) {
  using fa4::glue::libtorch;
  libtorch.aoti_torch_device_type_cuda = [] { return int32_t{0}; };
  libtorch.aoti_torch_get_current_cuda_stream = [](int32_t, void** stream) -> AOTITorchError {
    *stream = nullptr;
    return 0;
  };
  fail_with = status;
}

extern "C" int fa4_forward_with_plan(const fa4_forward_args* args, const fa4_forward_plan* plan) {
  if (fail_with != FA4_OK) return fail_with;
  if (plan->workspace_bytes > static_cast<int64_t>(args->workspace_bytes))
    return FA4_WORKSPACE_TOO_SMALL;
  for (int64_t batch = 0; batch < args->batch; ++batch) {
    Rows rows = {batch, 0, 0, args->seq_q, args->seq_k};
    if (args->cu_seqlens_q != nullptr) {
      const int *q = args->cu_seqlens_q + batch, *k = args->cu_seqlens_k + batch;
      rows = {0, q[0], k[0], q[1] - q[0], k[1] - k[0]};
    }
    if (args->seqused_k != nullptr) rows.count_k = args->seqused_k[batch];
    for (int head = 0; head < args->heads_q; ++head) {
      for (int64_t i = 0; i < rows.count_q; ++i) attend(*args, rows, head, i);
    }
  }
  return FA4_OK;
}

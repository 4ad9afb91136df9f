// Stands in for the GPU: what devices.cpp, api.cpp and backward_api.cpp do, on the CPU. With it the
// way of a served call, from an op's arguments to its results, runs without a GPU.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "api.h"
#include "glue/devices.h"
#include "plan.h"

namespace {

uint16_t& element_at(const fa4_tensor& tensor, int64_t batch, int64_t row, int64_t head,
                     int64_t column) {
  return static_cast<uint16_t*>(tensor.data)[batch * tensor.stride_batch + row * tensor.stride_seq +
                                             head * tensor.stride_head + column];
}

float load(int element, const fa4_tensor& tensor, int64_t batch, int64_t row, int64_t head,
           int64_t column) {
  const uint16_t stored = element_at(tensor, batch, row, head, column);
  if (element == FA4_HALF) return std::bit_cast<_Float16>(stored);
  return std::bit_cast<float>(uint32_t{stored} << 16);
}

void store(int element, const fa4_tensor& tensor, int64_t batch, int64_t row, int64_t head,
           int64_t column, float value) {
  uint16_t& stored = element_at(tensor, batch, row, head, column);
  if (element == FA4_HALF) {
    stored = std::bit_cast<uint16_t>(static_cast<_Float16>(value));
    return;
  }
  const auto bits = std::bit_cast<uint32_t>(value);
  stored = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // ties to even
}

struct Rows {
  int64_t batch, first_q, first_k, count_q, count_k;
  int64_t unused_k;  // behind those that count
};

template <class Args>
Rows rows_of(const Args& args, int64_t batch) {
  Rows rows = {batch, 0, 0, args.seq_q, args.seq_k, 0};
  if (args.cu_seqlens_q != nullptr) {
    const int *q = args.cu_seqlens_q + batch, *k = args.cu_seqlens_k + batch;
    rows = {0, q[0], k[0], q[1] - q[0], k[1] - k[0], 0};
  }
  if (args.seqused_k != nullptr) {
    rows.unused_k = rows.count_k - args.seqused_k[batch];
    rows.count_k = args.seqused_k[batch];
  }
  return rows;
}

template <class Args>
bool is_hidden(const Args& args, const Rows& rows, int64_t i, int64_t j) {
  const int64_t diagonal = i + rows.count_k - rows.count_q;
  const int right = args.causal ? 0 : args.window_right;
  return (right >= 0 && j > diagonal + right) ||
         (args.window_left >= 0 && j < diagonal - args.window_left);
}

void attend(const fa4_forward_args& args, const Rows& rows, int head, int64_t i) {
  const int kv_head = head / (args.heads_q / args.heads_k);
  std::vector<double> weights(rows.count_k), sums(args.head_dim);
  double largest = -std::numeric_limits<double>::infinity(), total = 0;
  for (int64_t j = 0; j < rows.count_k; ++j) {
    double score = 0;
    for (int d = 0; d < args.head_dim; ++d) {
      score += double(load(args.element, args.q, rows.batch, rows.first_q + i, head, d)) *
               load(args.element, args.k, rows.batch, rows.first_k + j, kv_head, d);
    }
    weights[j] =
        is_hidden(args, rows, i, j) ? -std::numeric_limits<double>::infinity() : score * args.scale;
    largest = std::fmax(largest, weights[j]);
  }
  const bool empty = largest == -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; !empty && j < rows.count_k; ++j) {
    if (is_hidden(args, rows, i, j)) continue;  // whatever its value is
    const double weight = std::exp(weights[j] - largest);
    total += weight;
    for (int d = 0; d < args.head_dim; ++d) {
      sums[d] += weight * load(args.element, args.v, rows.batch, rows.first_k + j, kv_head, d);
    }
  }
  for (int d = 0; d < args.head_dim; ++d) {
    store(args.element, args.out, rows.batch, rows.first_q + i, head, d,
          empty ? 0.f : static_cast<float>(sums[d] / total));
  }
  args.lse[rows.batch * args.lse_stride_batch + head * args.lse_stride_head + rows.first_q + i] =
      empty ? args.empty_lse : static_cast<float>(largest + std::log(total));
}

// Sums of one sequence, of all its heads.
class Sums {
 public:
  Sums(int64_t rows, int heads, int columns)
      : heads_(heads), columns_(columns), values_(rows * heads * columns) {}
  double* at(int64_t row, int head) { return &values_[(row * heads_ + head) * columns_]; }
  void store_to(int element, const fa4_tensor& tensor, int64_t batch, int64_t first,
                int64_t count) {
    for (int64_t row = 0; row < count; ++row) {
      for (int head = 0; head < heads_; ++head) {
        for (int d = 0; d < columns_; ++d) {
          store(element, tensor, batch, first + row, head, d, static_cast<float>(at(row, head)[d]));
        }
      }
    }
  }

 private:
  int heads_, columns_;
  std::vector<double> values_;
};

// As the kernels do it, from lse and out: what the forward gave is what they go by.
void differentiate(const fa4_backward_args& args, const Rows& rows) {
  const int64_t keys = rows.count_k + rows.unused_k;
  const int columns = args.head_dim;
  Sums dq(rows.count_q, args.heads_q, columns);
  Sums dk(keys, args.heads_k, columns), dv(keys, args.heads_k, columns);
  for (int head = 0; head < args.heads_q; ++head) {
    const int kv_head = head / (args.heads_q / args.heads_k);
    for (int64_t i = 0; i < rows.count_q; ++i) {
      const int64_t row = rows.first_q + i;
      const double lse =
          args.lse[rows.batch * args.lse_stride_batch + head * args.lse_stride_head + row];
      if (std::isinf(lse)) continue;
      double delta = 0;
      for (int d = 0; d < columns; ++d) {
        delta += double(load(args.element, args.grad_out, rows.batch, row, head, d)) *
                 load(args.element, args.out, rows.batch, row, head, d);
      }
      for (int64_t j = 0; j < rows.count_k; ++j) {
        if (is_hidden(args, rows, i, j)) continue;
        const int64_t key = rows.first_k + j;
        double score = 0, dp = 0;
        for (int d = 0; d < columns; ++d) {
          score += double(load(args.element, args.q, rows.batch, row, head, d)) *
                   load(args.element, args.k, rows.batch, key, kv_head, d);
          dp += double(load(args.element, args.grad_out, rows.batch, row, head, d)) *
                load(args.element, args.v, rows.batch, key, kv_head, d);
        }
        const double weight = std::exp(score * args.scale - lse);
        const double ds = weight * (dp - delta) * args.scale;
        for (int d = 0; d < columns; ++d) {
          dq.at(i, head)[d] += ds * load(args.element, args.k, rows.batch, key, kv_head, d);
          dk.at(j, kv_head)[d] += ds * load(args.element, args.q, rows.batch, row, head, d);
          dv.at(j, kv_head)[d] +=
              weight * load(args.element, args.grad_out, rows.batch, row, head, d);
        }
      }
    }
  }
  dq.store_to(args.element, args.dq, rows.batch, rows.first_q, rows.count_q);
  dk.store_to(args.element, args.dk, rows.batch, rows.first_k, keys);
  dv.store_to(args.element, args.dv, rows.batch, rows.first_k, keys);
}

int fail_with = FA4_OK;
int last_was_deterministic = -1;

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
    const Rows rows = rows_of(*args, batch);
    for (int head = 0; head < args->heads_q; ++head) {
      for (int64_t i = 0; i < rows.count_q; ++i) attend(*args, rows, head, i);
    }
  }
  return FA4_OK;
}

// Whether the last backward was asked for equal bits and planned so; -1 before the first.
extern "C" __attribute__((visibility("default"))) int was_deterministic() {
  return last_was_deterministic;
}

extern "C" int fa4_backward_with_plan(const fa4_backward_args* args,
                                      const fa4_backward_plan* plan) {
  if (fail_with != FA4_OK) return fail_with;
  if (const int status = fa4::check_backward(*args); status != FA4_OK) return status;
  if (plan->workspace_bytes > static_cast<int64_t>(args->workspace_bytes))
    return FA4_WORKSPACE_TOO_SMALL;
  // Nothing of what the kernels may write is outside of what was allocated.
  std::fill_n(static_cast<char*>(args->workspace), plan->workspace_bytes, '\xff');
  last_was_deterministic = args->deterministic != 0 && plan->deterministic != 0;
  for (int64_t batch = 0; batch < args->batch; ++batch) differentiate(*args, rows_of(*args, batch));
  return FA4_OK;
}

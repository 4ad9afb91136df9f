// The forward ops: from the arguments of each to a request, and from the kernel's results to those
// of the op. What is served, and what results look like, is told in flash_attention_registry.sdpa,
// whose adapters serve the same calls from Python.
#include "ops.h"

#include <cmath>

#include "forward.h"

namespace fa4::glue {
namespace {

OwnedTensor empty_scalar(const Tensor& like, int32_t dtype) {
  return empty(like, dtype, 0, nullptr);
}

// Random state, its second part and the debug mask of a flash forward without dropout; nobody reads
// them.
struct Unused {
  OwnedTensor state, second, debug;

  bool allocate(const Tensor& query) {
    const int32_t dtype = libtorch.aoti_torch_dtype_uint64();
    const int64_t two = 2, none = 0;
    state = empty(query, dtype, 1, &two);
    second = empty_scalar(query, dtype);
    debug = empty(query, query.dtype, 1, &none);
    return state && second && debug;
  }
  void add_to(Results& results) {
    results.add(std::move(state));
    results.add(std::move(second));
    results.add(std::move(debug));
  }
};

OwnedTensor marked_seed(const Tensor& query) {
  const int64_t size = kSeedMark + 1;
  OwnedTensor storage = empty(query, libtorch.aoti_torch_dtype_int64(), 1, &size);
  AtenTensorHandle seed = nullptr;
  if (!storage || libtorch.aoti_torch__reinterpret_tensor(storage.get(), 0, nullptr, nullptr,
                                                          kSeedMark, &seed)) {
    return OwnedTensor();
  }
  return OwnedTensor(seed);
}

// What torch's flash kernels write as lse of a row that sees no key; cuDNN's is the negative.
constexpr float kLseOfEmptyRows = INFINITY;

// Allocates out like the query and runs the request into it.
bool run_into_new(const Request& request, float lse_of_empty_rows, OwnedTensor& out,
                  OwnedTensor& lse) {
  out = empty_like(request.query);
  Tensor target;
  if (!out || !read(out.get(), request.query.dims, target)) return false;
  lse = run_forward(request, target, lse_of_empty_rows);
  return bool(lse);
}

// The arguments of the general ops from query on, in order.
bool read_general(const Arguments& arguments, int first, bool with_pages, Request& request) {
  enum {
    kQuery,
    kKey,
    kValue,
    kCuQ,
    kCuK,
    kMaxQ,
    kMaxK,
    kDropout,
    kCausal,
    kDebug,
    kScale,
    kLeft,
    kRight,
    kSeqused,
    kAlibi,
    kBlockTable,
    kSplits
  };
  const auto at = [first](int argument) { return first + argument; };
  if (arguments.number(at(kDropout)) != 0 || arguments.flag(at(kDebug))) return false;
  if (!arguments.is_none(at(kAlibi))) return false;
  if (with_pages) {
    if (!arguments.is_none(at(kBlockTable)) || arguments.integer_or(at(kSplits), 0) > 1)
      return false;
  }
  const AtenTensorHandle cu_q = arguments.tensor_or_null(at(kCuQ));
  const AtenTensorHandle cu_k = arguments.tensor_or_null(at(kCuK));
  const AtenTensorHandle seqused = arguments.tensor_or_null(at(kSeqused));
  const bool packed = cu_q != nullptr || cu_k != nullptr;
  if (!packed && seqused != nullptr) return false;
  if (packed ? !read_packed(arguments, first, cu_q, cu_k, seqused, arguments.integer(at(kMaxQ)),
                            arguments.integer(at(kMaxK)), request)
             : !read_dense(arguments, first, HeadAxis::kTwo, request)) {
    return false;
  }
  request.scale = arguments.number_or(at(kScale), default_scale(request.query));
  request.causal = arguments.flag(at(kCausal));
  request.window_left = arguments.integer_or(at(kLeft), -1);
  request.window_right = arguments.integer_or(at(kRight), -1);
  return true;
}

bool serve_general(const Arguments& arguments, bool with_pages, Results& results) {
  Request request;
  Unused unused;
  OwnedTensor out, lse;
  if (!read_general(arguments, 0, with_pages, request) || !unused.allocate(request.query) ||
      !run_into_new(request, kLseOfEmptyRows, out, lse)) {
    return false;
  }
  results.add(std::move(out));
  results.add(std::move(lse));
  unused.add_to(results);
  return true;
}

}  // namespace

bool serve_sdpa_flash(const Arguments& arguments, Results& results) {
  enum { kQuery, kKey, kValue, kDropout, kCausal, kDebug, kScale };
  if (arguments.number(kDropout) != 0 || arguments.flag(kDebug)) return false;
  Request request;
  if (!read_dense(arguments, kQuery, HeadAxis::kOne, request)) return false;
  request.scale = arguments.number_or(kScale, default_scale(request.query));
  request.causal = arguments.flag(kCausal);
  Unused unused;
  OwnedTensor out, lse;
  if (!unused.allocate(request.query) || !run_into_new(request, kLseOfEmptyRows, out, lse))
    return false;
  results.add(std::move(out));
  results.add(std::move(lse));
  results.add(undefined());
  results.add(undefined());
  results.add(request.query.sizes[2]);
  results.add(request.key.sizes[2]);
  unused.add_to(results);
  return true;
}

bool serve_sdpa_cudnn(const Arguments& arguments, Results& results) {
  enum { kQuery, kKey, kValue, kBias, kComputeLse, kDropout, kCausal, kDebug, kScale };
  if (arguments.number(kDropout) != 0 || arguments.flag(kDebug) || !arguments.is_none(kBias))
    return false;
  if (!flash_is_enabled()) return false;  // the caller asked for cuDNN itself
  Request request;
  if (!read_dense(arguments, kQuery, HeadAxis::kOne, request)) return false;
  request.scale = arguments.number_or(kScale, default_scale(request.query));
  request.causal = arguments.flag(kCausal);
  // cuDNN aligns causal masks of unequal lengths top-left.
  if (request.causal && request.query.sizes[2] != request.key.sizes[2]) return false;
  OwnedTensor seed = marked_seed(request.query);
  OwnedTensor offset = empty_scalar(request.query, libtorch.aoti_torch_dtype_int64());
  OwnedTensor out, lse;
  if (!seed || !offset || !run_into_new(request, -kLseOfEmptyRows, out, lse)) return false;
  const int64_t* sizes = request.query.sizes;
  const int64_t shape[4] = {sizes[0], sizes[1], sizes[2], 1};
  const int64_t strides[4] = {sizes[1] * sizes[2], sizes[2], 1, 1};
  AtenTensorHandle column = nullptr;
  if (libtorch.aoti_torch__reinterpret_tensor(lse.get(), 4, shape, strides, 0, &column))
    return false;
  results.add(std::move(out));
  results.add(OwnedTensor(column));
  results.add(undefined());
  results.add(undefined());
  results.add(sizes[2]);
  results.add(request.key.sizes[2]);
  results.add(std::move(seed));
  results.add(std::move(offset));
  results.add(undefined());
  return true;
}

bool serve_flash_forward(const Arguments& arguments, Results& results) {
  return serve_general(arguments, false, results);
}

bool serve_flash_forward_with_pages(const Arguments& arguments, Results& results) {
  return serve_general(arguments, true, results);
}

bool serve_flash_forward_inplace(const Arguments& arguments, Results& results) {
  Request request;
  Tensor out;
  if (!read_general(arguments, 1, true, request)) return false;
  if (!read(arguments.tensor(0), request.query.dims, out)) return false;
  if (!out.same_sizes(request.query) || !out.same_kind(request.query)) return false;
  OwnedTensor lse = run_forward(request, out, kLseOfEmptyRows);
  if (!lse) return false;
  results.add(std::move(lse));
  return true;
}

}  // namespace fa4::glue

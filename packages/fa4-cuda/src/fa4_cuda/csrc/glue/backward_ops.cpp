// The backward ops, as ops.cpp has the forward ones. Of the flash ops it does not matter who ran
// the forward, since lse means the same on both sides.
#include "backward.h"
#include "ops.h"

namespace fa4::glue {
namespace {

bool run_into(Results& results, const Request& request, const ForwardResults& left) {
  Gradients gradients;
  if (!run_backward(request, left, gradients)) return false;
  results.add(std::move(gradients.query));
  results.add(std::move(gradients.key));
  results.add(std::move(gradients.value));
  return true;
}

// The arguments of the flash ops, in order; the general one has a window too.
namespace flash {
enum {
  kGradOut,
  kQuery,
  kKey,
  kValue,
  kOut,
  kLse,
  kCuQ,
  kCuK,
  kMaxQ,
  kMaxK,
  kDropout,
  kCausal,
  kRngState,
  kUnused,
  kScale,
  kLeft,
  kRight
};
}  // namespace flash

bool is_marked(AtenTensorHandle seed) {
  int64_t offset = 0;
  return seed != nullptr && !libtorch.aoti_torch_get_storage_offset(seed, &offset) &&
         offset == kSeedMark;
}

}  // namespace

bool serve_sdpa_flash_backward(const Arguments& arguments, Results& results) {
  using namespace flash;
  if (arguments.number(kDropout) != 0) return false;
  if (arguments.defined_or_null(kCuQ) != nullptr || arguments.defined_or_null(kCuK) != nullptr)
    return false;
  Request request;
  if (!read_dense(arguments, kQuery, HeadAxis::kOne, request)) return false;
  request.scale = arguments.number_or(kScale, default_scale(request.query));
  request.causal = arguments.flag(kCausal);
  return run_into(results, request,
                  {arguments.tensor(kGradOut), arguments.tensor(kOut), arguments.tensor(kLse)});
}

bool serve_sdpa_cudnn_backward(const Arguments& arguments, Results& results) {
  enum {
    kGradOut,
    kQuery,
    kKey,
    kValue,
    kOut,
    kLse,
    kSeed,
    kOffset,
    kBias,
    kCuQ,
    kCuK,
    kMaxQ,
    kMaxK,
    kDropout,
    kCausal,
    kScale
  };
  // The forward was cuDNN's: it may have aligned its mask top-left, or be what the caller asked
  // for.
  if (!is_marked(arguments.defined_or_null(kSeed))) return false;
  if (arguments.number(kDropout) != 0) return false;
  for (const int index : {kBias, kCuQ, kCuK}) {
    if (arguments.defined_or_null(index) != nullptr) return false;
  }
  Request request;
  if (!read_dense(arguments, kQuery, HeadAxis::kOne, request)) return false;
  request.scale = arguments.number_or(kScale, default_scale(request.query));
  request.causal = arguments.flag(kCausal);
  return run_into(results, request,
                  {.grad_out = arguments.tensor(kGradOut),
                   .out = arguments.tensor(kOut),
                   .lse = arguments.tensor(kLse),
                   .lse_is_column = true});
}

bool serve_flash_backward(const Arguments& arguments, Results& results) {
  using namespace flash;
  if (arguments.number(kDropout) != 0) return false;
  const AtenTensorHandle cu_q = arguments.defined_or_null(kCuQ);
  const AtenTensorHandle cu_k = arguments.defined_or_null(kCuK);
  const bool packed = cu_q != nullptr || cu_k != nullptr;
  Request request;
  if (packed ? !read_packed(arguments, kQuery, cu_q, cu_k, nullptr, arguments.integer(kMaxQ),
                            arguments.integer(kMaxK), request)
             : !read_dense(arguments, kQuery, HeadAxis::kTwo, request)) {
    return false;
  }
  request.scale = arguments.number_or(kScale, default_scale(request.query));
  request.causal = arguments.flag(kCausal);
  request.window_left = arguments.integer_or(kLeft, -1);
  request.window_right = arguments.integer_or(kRight, -1);
  return run_into(results, request,
                  {arguments.tensor(kGradOut), arguments.tensor(kOut), arguments.tensor(kLse)});
}

}  // namespace fa4::glue

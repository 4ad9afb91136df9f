// Native kernels in torch's dispatcher: put in once, switched by one flag, asked by Python through
// a C interface.
//
// What a native kernel does not serve goes on to the op of the same name in the namespace
// fa4_cuda_declined, which Python defines with the same schema: its kernel is the registry's
// router. So arguments and results cross as they are, and reasons, errors and torch's own kernels
// stay the router's business. An error comes back on a way of its own, because torch's C interface
// would lose what it was: Python leaves it with fa4_torch_raise and returns anything.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops.h"
#include "python_error.h"

#define FA4_EXPORT extern "C" __attribute__((visibility("default")))

namespace fa4::glue {
namespace {

struct State {
  TorchLibraryHandle library = nullptr;
  std::string declined;  // qualified name of the op to go on to
  std::atomic<int64_t> served = 0;
};

State states[kOpCount];
std::atomic<bool> switched_on = false;

struct Thread {
  // Inside what was declined: torch's kernels call one another through the dispatcher, and what was
  // declined as a whole is not to be served in part.
  int inside_declined = 0;
  void* error_type = nullptr;
  std::string error_text;
};

thread_local Thread thread;

void decline(const Op& op, const State& state, StableIValue* stack, uint64_t arguments,
             uint64_t results) {
  // Torch pairs the results of a call with their types in reverse order, which is right only where
  // the types read the same from both ends. Those of the SDPA ops do with one tensor more, so the
  // declined op has one (native.py).
  constexpr int kMostValues = 24;
  StableIValue values[kMostValues] = {};
  std::copy(stack, stack + arguments, values);
  ++thread.inside_declined;
  const AOTITorchError failed =
      libtorch.torch_call_dispatcher(state.declined.c_str(), "", values, kTorchVersion);
  --thread.inside_declined;
  const char* result_types = std::strstr(op.signature, "->") + 2;
  if (!failed && std::strchr(result_types, 'i') != nullptr)
    release_arguments(values + results, "T");
  if (thread.error_type != nullptr) {
    if (!failed) release_arguments(values, result_types);
    throw PythonError(std::exchange(thread.error_type, nullptr), std::move(thread.error_text));
  }
  if (failed) {
    const auto what = libtorch.torch_exception_get_what_without_backtrace;
    throw std::runtime_error(what != nullptr ? what()
                                             : "fa4-cuda: calling " + state.declined + " failed");
  }
  std::copy(values, values + results, stack);
}

template <int index>
void kernel(StableIValue* stack, uint64_t arguments, uint64_t results) {
  const Op& op = kOps[index];
  State& state = states[index];
  if (switched_on.load(std::memory_order_relaxed) && thread.inside_declined == 0) {
    Results made;
    if (op.serve(Arguments(stack), made)) {
      state.served.fetch_add(1, std::memory_order_relaxed);
      release_arguments(stack, op.signature);
      made.hand_over(stack);
      return;
    }
  }
  decline(op, state, stack, arguments, results);
}

using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

template <int... indices>
constexpr Kernel kernel_of(int index, std::integer_sequence<int, indices...>) {
  constexpr Kernel kernels[] = {kernel<indices>...};
  return kernels[index];
}

int index_of(const std::string& name, const std::string& signature) {
  for (int index = 0; index < kOpCount; ++index) {
    if (name == kOps[index].name && signature == kOps[index].signature) return index;
  }
  return -1;
}

bool can_be_served(const Op& op) {
  return op.serve != serve_sdpa_cudnn || can_ask_whether_flash_is_enabled();
}

}  // namespace
}  // namespace fa4::glue

using namespace fa4::glue;

// Finds torch's functions. Returns null, or the name of one that this torch lacks.
FA4_EXPORT const char* fa4_torch_find() { return find_torch(); }

// Puts the native kernel of an op into the dispatcher, on top of what is there.
// Returns 1, or 0 if there is none for this op with this signature, or -1 if torch refuses.
FA4_EXPORT int fa4_torch_put_in(const char* dispatch_key, const char* op, const char* signature) {
  const int index = index_of(op, signature);
  if (index < 0 || !can_be_served(kOps[index])) return 0;
  State& state = states[index];
  if (state.library != nullptr) return 1;
  state.declined = std::string("fa4_cuda_declined::") + op;
  TorchLibraryHandle library = nullptr;
  if (libtorch.aoti_torch_library_init_impl("aten", dispatch_key, "fa4_cuda", 0, &library))
    return -1;
  const Kernel chosen = kernel_of(index, std::make_integer_sequence<int, kOpCount>());
  if (libtorch.torch_library_impl(library, op, chosen, kTorchVersion)) {
    libtorch.aoti_torch_delete_library_object(library);
    return -1;
  }
  state.library = library;
  return 1;
}

// Takes all native kernels out. No thread may be inside one.
FA4_EXPORT void fa4_torch_take_out() {
  switched_on.store(false, std::memory_order_relaxed);
  for (State& state : states) {
    if (state.library != nullptr) libtorch.aoti_torch_delete_library_object(state.library);
    state.library = nullptr;
  }
}

// Serves calls from now on, or none.
FA4_EXPORT void fa4_torch_switch(int on) { switched_on.store(on != 0, std::memory_order_relaxed); }

// How many calls of an op were served so far.
FA4_EXPORT int64_t fa4_torch_served(const char* op) {
  int64_t served = 0;
  for (int index = 0; index < kOpCount; ++index) {
    if (std::string(kOps[index].name) == op)
      served += states[index].served.load(std::memory_order_relaxed);
  }
  return served;
}

// Lets the declined call that this thread is inside of raise an exception; `type` is a
// PyTypeObject* that lives for ever.
FA4_EXPORT void fa4_torch_raise(void* type, const char* text) {
  thread.error_type = type;
  thread.error_text = text;
}

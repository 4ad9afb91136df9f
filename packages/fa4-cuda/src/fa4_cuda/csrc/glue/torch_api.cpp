#include "torch_api.h"

#include <dlfcn.h>

namespace fa4::glue {
namespace {

// at::globalContext(), and of at::Context userEnabledFlashSDP() const and
// deterministicAlgorithms() const: exported C++ functions without a C twin.
void* (*global_context)() = nullptr;
bool (*user_enabled_flash_sdp)(const void*) = nullptr;
bool (*deterministic_algorithms)(const void*) = nullptr;

// A library that is loaded already, or null; what it exports is found through it alone, because
// Python loads torch's libraries out of sight of the process's other symbols.
void* loaded(const char* name) { return dlopen(name, RTLD_LAZY | RTLD_NOLOAD); }

template <class Function>
void find(Function*& function, const char* name, void* cpu, void* cuda) {
  void* found = cpu == nullptr ? nullptr : dlsym(cpu, name);
  if (found == nullptr && cuda != nullptr) found = dlsym(cuda, name);
  function = reinterpret_cast<Function*>(found);
}

}  // namespace

TorchApi libtorch = {};

const char* find_torch() {
  void* cpu = loaded("libtorch_cpu.so");
  void* cuda = loaded("libtorch_cuda.so");
  TorchApi found = {};
#define FA4_FIND(result, name, parameters) find(found.name, #name, cpu, cuda);
  FA4_TORCH_FUNCTIONS(FA4_FIND)
  FA4_TORCH_OPTIONAL_FUNCTIONS(FA4_FIND)
#undef FA4_FIND
#define FA4_CHECK(result, name, parameters) \
  if (found.name == nullptr) return #name;
  FA4_TORCH_FUNCTIONS(FA4_CHECK)
#undef FA4_CHECK
  find(global_context, "_ZN2at13globalContextEv", cpu, cuda);
  find(user_enabled_flash_sdp, "_ZNK2at7Context19userEnabledFlashSDPEv", cpu, cuda);
  find(deterministic_algorithms, "_ZNK2at7Context23deterministicAlgorithmsEv", cpu, cuda);
  libtorch = found;
  return nullptr;
}

bool can_ask_whether_flash_is_enabled() {
  return global_context != nullptr && user_enabled_flash_sdp != nullptr;
}

bool flash_is_enabled() {
  return can_ask_whether_flash_is_enabled() && user_enabled_flash_sdp(global_context());
}

bool deterministic_is_asked() {
  return global_context == nullptr || deterministic_algorithms == nullptr ||
         deterministic_algorithms(global_context());
}

}  // namespace fa4::glue

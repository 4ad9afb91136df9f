#include "arguments.h"

namespace fa4::glue {

void release_arguments(StableIValue* values, const char* signature) {
  for (int index = 0; *signature >= 'A'; ++index) {
    const bool is_tensor = *signature++ == 'T';
    const bool is_optional = *signature == '?';
    if (is_optional) ++signature;
    if (values[index] == 0) continue;
    auto* inner = is_optional ? reinterpret_cast<StableIValue*>(values[index]) : &values[index];
    if (is_tensor)
      libtorch.aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(*inner));
    if (!is_optional) continue;
    if (libtorch.torch_delete_stable_ivalue != nullptr) {
      libtorch.torch_delete_stable_ivalue(inner);
    } else {
      delete inner;  // as torch before 2.13 made it
    }
  }
}

}  // namespace fa4::glue

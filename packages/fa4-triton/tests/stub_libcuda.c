// A libcuda.so.1 of the functions that Triton's launcher and driver call: it takes every launch,
// runs nothing, and counts. With it the host's side of a launch is tested without a GPU.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define UNUSED(x) ((void)(x))

static int launches, tensor_maps, grid_x;
static uint64_t first_argument;

int stub_launches(void) { return launches; }
int stub_tensor_maps(void) { return tensor_maps; }
int stub_grid_x(void) { return grid_x; }
uint64_t stub_first_argument(void) { return first_argument; }  // of the last launch, 8 bytes of it

int cuGetErrorString(int code, const char** text) {
  UNUSED(code);
  *text = "an error of the stub";
  return 0;
}

int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  UNUSED(attribute), UNUSED(device);
  *value = 232448;  // shared memory of a program, the only one that matters
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = &launches;
  return 0;
}

int cuCtxSetCurrent(void* context) {
  UNUSED(context);
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  UNUSED(device);
  return cuCtxGetCurrent(context);
}

int cuCtxGetLimit(size_t* value, int limit) {
  UNUSED(limit);
  *value = 0;
  return 0;
}

int cuCtxSetLimit(int limit, size_t value) {
  UNUSED(limit), UNUSED(value);
  return 0;
}

int cuModuleLoadData(void** module, const void* image) {
  UNUSED(image);
  *module = &launches;
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  UNUSED(name);
  *function = module;
  return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  UNUSED(function);
  *value = attribute == 0 ? 1024 : 0;  // 0: threads of a program, at most
  return 0;
}

int cuFuncSetCacheConfig(void* function, int config) {
  UNUSED(function), UNUSED(config);
  return 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  UNUSED(function), UNUSED(attribute), UNUSED(value);
  return 0;
}

int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  UNUSED(attribute);
  memcpy(value, &pointer, sizeof pointer);
  return 0;
}

// A tensor map is 128 opaque bytes; the stub keeps the address in the first eight.
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const unsigned* box, const unsigned* steps,
                           int interleave, int swizzle, int promotion, int fill) {
  UNUSED(type), UNUSED(rank), UNUSED(sizes), UNUSED(strides), UNUSED(box), UNUSED(steps);
  UNUSED(interleave), UNUSED(swizzle), UNUSED(promotion), UNUSED(fill);
  memset(map, 0, 128);
  memcpy(map, &address, sizeof address);
  ++tensor_maps;
  return 0;
}

int cuLaunchKernelEx(const unsigned* config, void* function, void** arguments, void** extra) {
  UNUSED(function), UNUSED(extra);
  grid_x = (int)config[0];
  memcpy(&first_argument, arguments[0], sizeof first_argument);
  ++launches;
  return 0;
}

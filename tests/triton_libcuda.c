// The functions of libcuda.so.1 that Triton's driver and launchers call, for one GPU that is not there.
//
// All of them succeed. A launch is reported to whoever has set `on_launch`.
#include <stddef.h>
#include <stdint.h>

typedef void (*Launched)(const unsigned* grid_and_block, unsigned shared, void* stream, void* function,
                         void** parameters);
Launched on_launch = NULL;
int capability_major = 9, capability_minor = 0;

enum { WARP_SIZE = 10, MAJOR = 75, MINOR = 76, MAX_SHARED_MEMORY = 97 };  // CUdevice_attribute
enum { MAX_THREADS = 0 };                                                 // CUfunction_attribute

// The beginning of CUlaunchConfig.
typedef struct {
  unsigned grid_and_block[6];
  unsigned shared;
  void* stream;
} LaunchConfig;

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  if (on_launch != NULL) on_launch(config->grid_and_block, config->shared, config->stream, function, parameters);
  return 0;
}

// An address is taken at its word.
int cuPointerGetAttribute(void* out, int attribute, uint64_t address) {
  *(uint64_t*)out = address;
  return 0;
}

int cuDeviceGetAttribute(int* out, int attribute, int device) {
  *out = attribute == MAJOR               ? capability_major
         : attribute == MINOR             ? capability_minor
         : attribute == WARP_SIZE         ? 32
         : attribute == MAX_SHARED_MEMORY ? 227 * 1024
                                          : 1;
  return 0;
}

int cuFuncGetAttribute(int* out, int attribute, void* function) {
  *out = attribute == MAX_THREADS ? 1024 : 0;
  return 0;
}

// A function's handle is its name, so that a launch tells what was launched.
int cuModuleGetFunction(void** out, void* module, const char* name) {
  *out = (void*)name;
  return 0;
}

int cuModuleLoadData(void** out, const void* image) {
  *out = (void*)image;
  return 0;
}

int cuGetErrorString(int error, const char** out) {
  *out = "an error of a library that stands for libcuda.so.1";
  return 0;
}

int cuCtxGetCurrent(void** out) {
  *out = &on_launch;
  return 0;
}

int cuDeviceGet(int* out, int ordinal) {
  *out = ordinal;
  return 0;
}

int cuCtxGetDevice(int* out) {
  *out = 0;
  return 0;
}

int cuDriverGetVersion(int* out) {
  *out = 13000;
  return 0;
}

int cuCtxGetLimit(size_t* out, int limit) {
  *out = 0;
  return 0;
}

int cuStreamIsCapturing(void* stream, int* out) {
  *out = 0;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** out, int device) {
  return cuCtxGetCurrent(out);
}
int cuCtxSetCurrent(void* context) {
  return 0;
}
int cuCtxSetLimit(int limit, size_t value) {
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return 0;
}
int cuFuncSetCacheConfig(void* function, int config) {
  return 0;
}
int cuModuleUnload(void* module) {
  return 0;
}

// Whether the machine's driver can run what this library was built for, and what to do where it cannot.

#include "driver.h"

#include <string>

#include "../library.h"

namespace fsam::cuda {

// NOTE [the first launch in a capture]
// CUDA loads a kernel when it is launched for the first time, which may be while a graph is captured. Loading is no
// work on a stream and leaves no trace in the graph; drivers since CUDA 12.3 do it there, and a library built by CUDA
// 13 meets no older ones. So nothing is loaded ahead, which would cost each process every kernel for the few that
// it uses. A library built by CUDA 12 may meet an older driver, which refuses: then the error says what to do.
const char* advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return "; build fsam_ext with this GPU's compute capability in TORCH_CUDA_ARCH_LIST";
    case cudaErrorInsufficientDriver:
      return "; python -m fsam_ext.info tells which driver it needs";
    case cudaErrorStreamCaptureUnsupported:
      return "; where this was the kernel's first launch, make one step before the capture or set "
             "CUDA_MODULE_LOADING=EAGER: drivers older than CUDA 12.3 load no kernel while a graph is captured";
    default:
      return "";
  }
}

namespace {

// "13.0" for 13000, which is how CUDA numbers its versions.
std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// NOTE [a driver of its own age]
// This library brings the CUDA runtime of the nvcc that built it, whatever runtime torch has. A driver serves runtimes
// up to its own major version, so a torch built for CUDA 12 may have a GPU that kernels of CUDA 13 cannot run on. Only
// the runtime knows the rule and its exceptions (compatibility packages): it is asked, by a call without a stream.
std::string driver_problem() {
  int count, driver = 0, runtime = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // or the next launch would report it again
  if (error != cudaErrorInsufficientDriver) return std::string("CUDA does not start: ") + cudaGetErrorString(error);
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no NVIDIA driver is installed";
  return "it was built by CUDA " + version_name(runtime) + " and this machine's driver is for CUDA " +
         version_name(driver) + "; update the driver" +
         (driver >= 12000 ? ", or build fsam_ext with an nvcc of CUDA " + std::to_string(driver / 1000) : "");
}

// What is found stays: CUDA starts once in a process.
std::string cuda_driver_problem() {
  static const std::string problem = driver_problem();
  return problem;
}

}  // namespace
}  // namespace fsam::cuda

FSAM_LIBRARY_FRAGMENT(FSAM_NAMESPACE, m) {
  // Why this library's kernels cannot run with the machine's driver; empty where they can. No backend op.
  m.def("cuda_driver_problem() -> str");
}

FSAM_LIBRARY_IMPL(FSAM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_driver_problem", TORCH_BOX(&fsam::cuda::cuda_driver_problem));
}

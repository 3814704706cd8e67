// The ops on CUDA tensors: tensors to plain pointers, on the current stream of the parameters' device.

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../library.h"
#include "../op_arguments.h"
#include "driver.h"
#include "launch.h"

namespace fsam::cuda {
namespace {

// The tests run the same bindings and kernels on CPU tensors.
#if defined(CUDA_EMULATED)
constexpr bool kOnCpu = true;
#else
constexpr bool kOnCpu = false;
#endif

// NOTE [the current stream]
// The symbols that give a stream are not in every torch that this library loads in: torch_stream_native_handle came
// with torch 2.13, and aoti_torch_get_current_cuda_stream is in libtorch_cuda, which a CPU build lacks. So they are
// looked up when the first kernel is launched, among the libraries that are loaded by then.
cudaStream_t current_stream(int32_t device) {
  if constexpr (kOnCpu) return nullptr;
  using NativeHandle = AOTITorchError (*)(StreamHandle, void**);
  using CudaStream = AOTITorchError (*)(int32_t, void**);
  static const auto native_handle = reinterpret_cast<NativeHandle>(dlsym(RTLD_DEFAULT, "torch_stream_native_handle"));
  static const auto cuda_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<CudaStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (native_handle != nullptr) {
    StreamHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
    const torch::stable::accelerator::Stream owner(handle);
    TORCH_ERROR_CODE_CHECK(native_handle(handle, &stream));
  } else {
    STD_TORCH_CHECK(
        cuda_stream != nullptr,
        "fsam_ext: this torch gives no access to its current CUDA stream; use torch 2.10 or later, built for CUDA");
    TORCH_ERROR_CODE_CHECK(cuda_stream(device, &stream));
  }
  return static_cast<cudaStream_t>(stream);
}

// Calls launch(stream) with `device` as the current one, and turns its error into an exception.
template <class Launch>
void on_device(int32_t device, const Launch& launch) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if constexpr (!kOnCpu) guard.emplace(device);
  const cudaError_t error = launch(current_stream(device));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  STD_TORCH_CHECK(false, "fsam_ext: a CUDA kernel could not be launched: ", cudaGetErrorString(error), advice(error));
}

// An optional number that lives in a tensor of one element.
Number number(const OptionalTensor& tensor, const char* name, double otherwise, Place place) {
  if (!tensor.has_value()) return {nullptr, false, otherwise};
  if (dtype_of(*tensor) == dtype_number<double>()) return {data_of<double>(*tensor, name, 1, place), true, otherwise};
  return {data_of<float>(*tensor, name, 1, place), false, otherwise};
}

// The rows of a call, checked; a launch numbers its chunks in 32 bits.
Arguments checked_arguments(const Tensors& params, const Tensors* grads, const Tensor& offsets) {
  Arguments result = arguments(params, grads, offsets, kOnCpu);
  STD_TORCH_CHECK(result.table.chunks <= INT32_MAX, "fsam_ext: a call takes at most 2^31 chunks of ", kChunk,
                  " elements; use several param groups");
  return result;
}

// Where sums over all rows go: `count` of fp64, on the device of the rows if there are any.
struct Sums {
  double* data;
  int32_t device;
};
Sums sums_of(const Tensor& tensor, const char* name, int64_t count, const Arguments& args) {
  const int32_t device = args.table.rows.empty() ? tensor.get_device_index() : args.place.index;
  return {data_of<double>(tensor, name, count, {kOnCpu, device}), device};
}

void noise_norm(const Tensors& params, const Tensors& grads, const Tensor& offsets, const OptionalTensor& ema,
                const OptionalTensor& ema_scale, const OptionalTensor& grad_scale, double sigma, double lmbda,
                bool adaptive, bool ema_updated, const Tensor& partials, const Tensor& stats) {
  const Arguments args = checked_arguments(params, &grads, offsets);
  const Sums total = sums_of(stats, "stats", kStatistics, args);
  if (args.table.rows.empty()) {
    on_device(total.device,
              [&](cudaStream_t stream) { return launch_noise_norm<float>({}, false, {}, total.data, stream); });
  }
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const int64_t chunks = args.table.chunks;
    const NoiseNormArguments<S> values{average_of<S>(ema, ema_scale, args),
                                       number(grad_scale, "grad_scale", 1.0, args.place),
                                       sigma,
                                       lmbda,
                                       ema_updated,
                                       data_of<S>(partials, "partials", chunks * kStatistics, args.place),
                                       chunks};
    on_device(total.device, [&](cudaStream_t stream) {
      return launch_noise_norm<T>(args.table, adaptive, values, total.data, stream);
    });
  });
}

void perturb(const Tensors& params, const Tensors& grads, const Tensor& offsets, const OptionalTensor& ema,
             const OptionalTensor& ema_scale, const Tensor& backup, const Tensor& stats,
             const OptionalTensor& grad_scale, double rho, const OptionalTensor& rho_tensor, double sigma, double lmbda,
             double eps, bool adaptive, bool ema_updated, bool feeds, int64_t forward, const OptionalTensor& effect,
             const OptionalTensor& journal, const OptionalTensor& kept) {
  const Journal written(journal);
  const Arguments args = checked_arguments(params, &grads, offsets);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const Saved<T> saved = saved_weights<T>(backup, args);
    const PerturbArguments<T> values{average_of<S>(ema, ema_scale, args),
                                     saved.backup,
                                     saved.master,
                                     data_of<double>(stats, "stats", kStatistics, args.place),
                                     number(grad_scale, "grad_scale", 1.0, args.place),
                                     number(rho_tensor, "rho_tensor", rho, args.place),
                                     sigma,
                                     lmbda,
                                     eps,
                                     adaptive,
                                     ema_updated,
                                     feeds,
                                     forward_of<T>(forward),
                                     data_of<S>(effect, "effect", args.table.chunks * kEffect, args.place),
                                     kept_of<S>(kept, "kept", args)};
    on_device(args.place.index, [&](cudaStream_t stream) { return launch_perturb<T>(args.table, values, stream); });
  });
  written.wrote();
}

void update_ema(const Tensors& params, const Tensors& grads, const Tensor& offsets, const Tensor& ema,
                const OptionalTensor& ema_scale, const OptionalTensor& stats, const OptionalTensor& grad_scale,
                const OptionalTensor& found_inf, double lmbda, const OptionalTensor& journal,
                const OptionalTensor& partials, const OptionalTensor& grad_sq) {
  const Journal written(journal);
  const Arguments args = checked_arguments(params, &grads, offsets);
  double* total = grad_sq.has_value() ? sums_of(*grad_sq, "grad_sq", 1, args).data : nullptr;
  if (args.table.rows.empty() && total != nullptr) {
    on_device(grad_sq->get_device_index(),
              [&](cudaStream_t stream) { return launch_update_ema<float>({}, {}, total, stream); });
  }
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const UpdateEmaArguments<S> values{average_of<S>(ema, ema_scale, args),
                                       data_of<double>(stats, "stats", kStatistics, args.place),
                                       number(grad_scale, "grad_scale", 1.0, args.place),
                                       number(found_inf, "found_inf", 0.0, args.place),
                                       lmbda,
                                       square_sums<S>(partials, grad_sq, args)};
    on_device(args.place.index,
              [&](cudaStream_t stream) { return launch_update_ema<T>(args.table, values, total, stream); });
  });
  written.wrote();
}

void dots(const Tensors& params, const Tensors& grads, const Tensor& offsets, const Tensor& kept,
          const OptionalTensor& grad_scale, const Tensor& partials, const Tensor& sums) {
  const Arguments args = checked_arguments(params, &grads, offsets);
  const Sums total = sums_of(sums, "sums", kDots, args);
  if (args.table.rows.empty()) {
    on_device(total.device, [&](cudaStream_t stream) { return launch_dots<float>({}, {}, total.data, stream); });
  }
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const int64_t chunks = args.table.chunks;
    const DotsArguments<S> values{kept_of<S>(kept, "kept", args), number(grad_scale, "grad_scale", 1.0, args.place),
                                  data_of<S>(partials, "partials", chunks * kDots, args.place), chunks};
    on_device(total.device,
              [&](cudaStream_t stream) { return launch_dots<T>(args.table, values, total.data, stream); });
  });
}

void project(const Tensors& params, const Tensors& grads, const Tensor& offsets, const Tensor& kept, const Tensor& sums,
             const OptionalTensor& stats, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
             const Tensor& partials, const Tensor& kept_sq, const OptionalTensor& journal) {
  const Journal written(journal);
  const Arguments args = checked_arguments(params, &grads, offsets);
  const Sums total = sums_of(kept_sq, "kept_sq", 1, args);
  if (args.table.rows.empty()) {
    const ProjectArguments<float> values{.stats = data_of<double>(stats, "stats", kStatistics, {kOnCpu, total.device})};
    on_device(total.device, [&](cudaStream_t stream) { return launch_project<float>({}, values, total.data, stream); });
  }
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const ProjectArguments<S> values{kept_of<S>(kept, "kept", args),
                                     data_of<double>(sums, "sums", kDots, args.place),
                                     data_of<double>(stats, "stats", kStatistics, args.place),
                                     number(grad_scale, "grad_scale", 1.0, args.place),
                                     number(found_inf, "found_inf", 0.0, args.place),
                                     data_of<S>(partials, "partials", args.table.chunks, args.place)};
    on_device(total.device,
              [&](cudaStream_t stream) { return launch_project<T>(args.table, values, total.data, stream); });
  });
  written.wrote();
}

void restore(const Tensors& params, const Tensor& offsets, const Tensor& backup) {
  const Arguments args = checked_arguments(params, nullptr, offsets);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    const Saved<T> saved = saved_weights<T>(backup, args);
    const RestoreArguments<T> values{saved.backup, saved.master};
    on_device(args.place.index, [&](cudaStream_t stream) { return launch_restore<T>(args.table, values, stream); });
  });
}

// What the two fused bases share.
template <class T>
UpdateArguments<T> update_arguments(const Arguments& args, const OptionalTensor& backup, const OptionalTensor& stats,
                                    const OptionalTensor& grad_scale, const OptionalTensor& found_inf, double lr,
                                    const OptionalTensor& lr_tensor, const OptionalTensor& rounding, bool adopts,
                                    const OptionalTensor& reused, const OptionalTensor& reuse_sq, double reuse,
                                    double reuse_eps) {
  const Saved<T> saved = saved_weights<T>(backup, args);
  return {saved.backup,
          saved.master,
          data_of<double>(stats, "stats", kStatistics, args.place),
          number(found_inf, "found_inf", 0.0, args.place),
          number(grad_scale, "grad_scale", 1.0, args.place),
          number(lr_tensor, "lr_tensor", lr, args.place),
          data_of<int64_t>(rounding, "rounding", 2, args.place),
          adopts,
          reused_of<compute_t<T>>(reused, reuse_sq, args),
          reuse,
          reuse_eps};
}

void restore_sgd(const Tensors& params, const Tensors& grads, const Tensor& offsets, const OptionalTensor& backup,
                 const OptionalTensor& momentum_buffer, const OptionalTensor& stats, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf, double lr, const OptionalTensor& lr_tensor, double momentum,
                 double dampening, double weight_decay, bool nesterov, bool maximize, const OptionalTensor& rounding,
                 bool adopts, const OptionalTensor& journal, const OptionalTensor& reused,
                 const OptionalTensor& reuse_sq, double reuse, double reuse_eps) {
  const Journal written(journal);
  const Arguments args = checked_arguments(params, &grads, offsets);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const SgdArguments<T> values{update_arguments<T>(args, backup, stats, grad_scale, found_inf, lr, lr_tensor,
                                                     rounding, adopts, reused, reuse_sq, reuse, reuse_eps),
                                 flat_data<S>(momentum_buffer, "momentum_buffer", args),
                                 momentum,
                                 dampening,
                                 weight_decay,
                                 nesterov,
                                 maximize};
    on_device(args.place.index, [&](cudaStream_t stream) { return launch_restore_sgd<T>(args.table, values, stream); });
  });
  written.wrote();
}

// `index` is on the device, where its entries are not looked at before they are used.
void count_steps(const Tensor& steps, const Tensor& index, const Tensor& corrections, const OptionalTensor& stats,
                 const OptionalTensor& found_inf, double lr, const OptionalTensor& lr_tensor, double beta1,
                 double beta2, const OptionalTensor& journal) {
  const Journal written(journal);
  dispatch_state(corrections, [&](auto state) {
    using S = decltype(state);
    const StepCounts<S> counts = step_counts<S>(steps, index, corrections);
    const CountArguments<S> values{counts.steps,
                                   counts.index,
                                   counts.members,
                                   counts.rows,
                                   counts.corrections,
                                   data_of<double>(stats, "stats", kStatistics, counts.place),
                                   number(found_inf, "found_inf", 0.0, counts.place),
                                   number(lr_tensor, "lr_tensor", lr, counts.place),
                                   beta1,
                                   beta2};
    if (counts.members == 0) return;
    on_device(counts.place.index, [&](cudaStream_t stream) { return launch_count_steps<S>(values, stream); });
  });
  written.wrote();
}

void restore_adam(const Tensors& params, const Tensors& grads, const Tensor& offsets, const OptionalTensor& backup,
                  const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& corrections,
                  const OptionalTensor& stats, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                  double lr, const OptionalTensor& lr_tensor, double beta1, double beta2, double eps,
                  double weight_decay, bool decoupled, bool maximize, const OptionalTensor& rounding, bool adopts,
                  const OptionalTensor& journal, const OptionalTensor& reused, const OptionalTensor& reuse_sq,
                  double reuse, double reuse_eps) {
  const Journal written(journal);
  const Arguments args = checked_arguments(params, &grads, offsets);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const AdamArguments<T> values{update_arguments<T>(args, backup, stats, grad_scale, found_inf, lr, lr_tensor,
                                                      rounding, adopts, reused, reuse_sq, reuse, reuse_eps),
                                  flat_data<S>(exp_avg, "exp_avg", args),
                                  flat_data<S>(exp_avg_sq, "exp_avg_sq", args),
                                  corrections_of<S>(corrections, args),
                                  beta1,
                                  beta2,
                                  eps,
                                  weight_decay,
                                  decoupled,
                                  maximize};
    on_device(args.place.index,
              [&](cudaStream_t stream) { return launch_restore_adam<T>(args.table, values, stream); });
  });
  written.wrote();
}

}  // namespace
}  // namespace fsam::cuda

#if defined(CUDA_EMULATED)
#define FSAM_DISPATCH_KEY CPU
#else
#define FSAM_DISPATCH_KEY CUDA
#endif

FSAM_LIBRARY_IMPL(FSAM_NAMESPACE, FSAM_DISPATCH_KEY, m) {
  m.impl("noise_norm", TORCH_BOX(&fsam::cuda::noise_norm));
  m.impl("perturb", TORCH_BOX(&fsam::cuda::perturb));
  m.impl("update_ema", TORCH_BOX(&fsam::cuda::update_ema));
  m.impl("dots", TORCH_BOX(&fsam::cuda::dots));
  m.impl("project", TORCH_BOX(&fsam::cuda::project));
  m.impl("restore", TORCH_BOX(&fsam::cuda::restore));
  m.impl("restore_sgd", TORCH_BOX(&fsam::cuda::restore_sgd));
  m.impl("count_steps", TORCH_BOX(&fsam::cuda::count_steps));
  m.impl("restore_adam", TORCH_BOX(&fsam::cuda::restore_adam));
}

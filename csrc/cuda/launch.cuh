// Fills kernel parameters and launches: the definitions of launch.h, included once for each storage type.
#pragma once

#include <type_traits>

#include "kernels.cuh"
#include "launch.h"

namespace fsam::cuda {

constexpr int kParameterBytes = 32764;
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  const void* pointers[] = {&arguments...};  // not copies: a table is large
  return cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), const_cast<void**>(pointers), 0,
                          stream);
}

// Calls queue(table, blocks) for tables that hold all rows: the large ones first, then those of one warp.
template <class Rows, class Id, class Queue>
cudaError_t for_tables(const TensorTable& all, const Id& id, const Queue& queue) {
  Rows table;
  table.rows = table.large = table.large_blocks = 0;
  const auto flush = [&] {
    const int small = table.rows - table.large;
    const cudaError_t error = queue(table, table.large_blocks + (small + kWarps - 1) / kWarps);
    table.rows = table.large = table.large_blocks = 0;
    return error;
  };
  for (const bool large : {true, false}) {
    for (const Row& row : all.rows) {
      if (row.numel == 0 || (row.numel > kWarpRow) != large) continue;
      if (table.rows == Rows::kCapacity) {
        if (const cudaError_t error = flush(); error != cudaSuccess) return error;
      }
      const int at = table.rows++;
      table.param[at] = row.param;
      table.grad[at] = row.grad;
      table.offset[at] = row.offset;
      table.numel[at] = row.numel;
      table.id[at] = int32_t(id(row));
      if (large) {
        table.first_block[at] = table.large_blocks;
        table.large_blocks += int32_t((row.numel + kChunk - 1) / kChunk);
        table.large = table.rows;
      }
    }
  }
  return table.rows > 0 ? flush() : cudaSuccess;
}

template <class Tag>
using Of = typename Tag::type;

// Launches over all rows the kernel that kernels(tag) names for a type of table: the small one where all rows fit it.
template <class Kernels, class Id, class Arguments>
cudaError_t launch_tables(const TensorTable& all, const Id& id, const Kernels& kernels, const Arguments& arguments,
                          cudaStream_t stream) {
  static_assert(sizeof(Table<kLargeTable>) + sizeof(Arguments) <= kParameterBytes);
  const auto with = [&](auto tag) {
    using Rows = Of<decltype(tag)>;
    return for_tables<Rows>(all, id, [&](const Rows& table, int64_t blocks) {
      return launch(kernels(tag), blocks, kThreads, stream, table, arguments);
    });
  };
  if (all.rows.size() <= kSmallTable) return with(std::type_identity<Table<kSmallTable>>{});
  return with(std::type_identity<Table<kLargeTable>>{});
}

constexpr auto kNoId = [](const Row&) { return 0; };

// Calls call.operator()<kEma, kAdaptive>() and returns what it returns.
template <class Call>
auto choose_ascent(Ema kind, bool adaptive, const Call& call) {
  switch (kind) {
    case Ema::none:
      return adaptive ? call.template operator()<Ema::none, true>() : call.template operator()<Ema::none, false>();
    case Ema::previous:
      return adaptive ? call.template operator()<Ema::previous, true>()
                      : call.template operator()<Ema::previous, false>();
    default:
      return adaptive ? call.template operator()<Ema::updated, true>()
                      : call.template operator()<Ema::updated, false>();
  }
}

template <class T>
cudaError_t launch_noise_norm(const TensorTable& rows, Ema kind, bool adaptive,
                              const NoiseNormArguments<compute_t<T>>& arguments, double* stats, cudaStream_t stream) {
  const auto first_chunk = [](const Row& row) { return row.first_chunk; };
  const cudaError_t error = choose_ascent(kind, adaptive, [&]<Ema kEma, bool kAdaptive>() {
    return launch_tables(
        rows, first_chunk, [](auto tag) { return &noise_norm_kernel<T, kEma, kAdaptive, Of<decltype(tag)>>; },
        arguments, stream);
  });
  if (error != cudaSuccess) return error;
  return launch(&sum_slots_kernel<compute_t<T>>, kStatistics, kSumThreads, stream, arguments.slots, arguments.chunks,
                stats);
}

template <class T>
cudaError_t launch_perturb(const TensorTable& rows, Ema kind, bool adaptive, const PerturbArguments<T>& arguments,
                           cudaStream_t stream) {
  return choose_ascent(kind, adaptive, [&]<Ema kEma, bool kAdaptive>() {
    return launch_tables(
        rows, kNoId, [](auto tag) { return &perturb_kernel<T, kEma, kAdaptive, Of<decltype(tag)>>; }, arguments,
        stream);
  });
}

template <class T>
cudaError_t launch_restore(const TensorTable& rows, const T* backup, cudaStream_t stream) {
  return launch_tables(rows, kNoId, [](auto tag) { return &restore_kernel<T, Of<decltype(tag)>>; }, backup, stream);
}

template <class T>
cudaError_t launch_restore_sgd(const TensorTable& rows, const SgdArguments<T>& arguments, cudaStream_t stream) {
  if (arguments.momentum_buffer == nullptr) {
    return launch_tables(
        rows, kNoId, [](auto tag) { return &restore_sgd_kernel<T, false, Of<decltype(tag)>>; }, arguments, stream);
  }
  return launch_tables(
      rows, kNoId, [](auto tag) { return &restore_sgd_kernel<T, true, Of<decltype(tag)>>; }, arguments, stream);
}

template <class T>
cudaError_t launch_restore_adam(const TensorTable& rows, const AdamArguments<T>& arguments, cudaStream_t stream) {
  const auto number = [&](const Row& row) { return &row - rows.rows.data(); };
  return launch_tables(
      rows, number, [](auto tag) { return &restore_adam_kernel<T, Of<decltype(tag)>>; }, arguments, stream);
}

#define FSAM_INSTANTIATE_LAUNCHES(T)                                                                                \
  template cudaError_t launch_noise_norm<T>(const TensorTable&, Ema, bool, const NoiseNormArguments<compute_t<T>>&, \
                                            double*, cudaStream_t);                                                 \
  template cudaError_t launch_perturb<T>(const TensorTable&, Ema, bool, const PerturbArguments<T>&, cudaStream_t);  \
  template cudaError_t launch_restore<T>(const TensorTable&, const T*, cudaStream_t);                               \
  template cudaError_t launch_restore_sgd<T>(const TensorTable&, const SgdArguments<T>&, cudaStream_t);             \
  template cudaError_t launch_restore_adam<T>(const TensorTable&, const AdamArguments<T>&, cudaStream_t);

}  // namespace fsam::cuda

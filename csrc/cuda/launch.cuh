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

// How many chunks a block takes: NOTE [several chunks a block].
inline int span_of(int64_t chunks) {
  int span = 1;
  while (span < kMaxSpan && chunks / (2 * span) >= kBlocksToSpare) span *= 2;
  return span;
}

// Where the search for a block's row begins and ends.
template <class Rows>
void set_hints(Rows& table) {
  table.hint_shift = 0;
  while ((table.large_blocks >> table.hint_shift) >= kHints) ++table.hint_shift;
  int row = 0;
  for (int i = 0; i <= kHints; ++i) {
    while (row + 1 < table.large && table.first_block[row + 1] <= int64_t(i) << table.hint_shift) ++row;
    table.hint[i] = int16_t(row);
  }
}

// Calls queue(table, blocks) for tables that hold all rows: the large ones first, then those of one warp.
template <class Rows, class Id, class Queue>
cudaError_t for_tables(const TensorTable& all, const Id& id, const Queue& queue) {
  const int64_t tables = (int64_t(all.rows.size()) + Rows::kCapacity - 1) / Rows::kCapacity;
  Rows table;
  table.span = span_of(tables > 0 ? all.chunks / tables : 0);
  table.rows = table.large = table.large_blocks = 0;
  const auto flush = [&] {
    const int small = table.rows - table.large;
    set_hints(table);
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
        table.large_blocks += int32_t((row.numel + table.span * kChunk - 1) / (table.span * kChunk));
        table.large = table.rows;
      }
    }
  }
  return table.rows > 0 ? flush() : cudaSuccess;
}

template <class Tag>
using Of = typename Tag::type;

// Launches a kernel over all rows, in as many tables of one type as it takes.
template <class Rows, class Kernel, class Id, class Arguments>
cudaError_t launch_tables_of(const TensorTable& all, const Id& id, Kernel* kernel, const Arguments& arguments,
                             cudaStream_t stream) {
  return for_tables<Rows>(all, id, [&](const Rows& table, int64_t blocks) {
    return launch(kernel, blocks, kThreads, stream, table, arguments);
  });
}

// Launches over all rows the kernel that kernels(tag) names for a type of table: the smallest one that all rows fit, or
// as many of the largest as it takes.
template <class Kernels, class Id, class Arguments>
cudaError_t launch_tables(const TensorTable& all, const Id& id, const Kernels& kernels, const Arguments& arguments,
                          cudaStream_t stream) {
  static_assert(sizeof(Table<kLargeTable>) + sizeof(Arguments) <= kParameterBytes);
  const auto with = [&](auto tag) {
    return launch_tables_of<Of<decltype(tag)>>(all, id, kernels(tag), arguments, stream);
  };
  if (all.rows.size() <= kSmallTable) return with(std::type_identity<Table<kSmallTable>>{});
  if (all.rows.size() <= kMiddleTable) return with(std::type_identity<Table<kMiddleTable>>{});
  return with(std::type_identity<Table<kLargeTable>>{});
}

// NOTE [one size of table]
// What reuses a gradient is compiled for tables of one size, the middle one: a flattened model pays for 10 KB of
// parameters where 3 KB would do, one of 1,000 tensors makes four launches in the place of two. Three sizes would make
// the library a tenth larger, for everyone.
using ReuseTable = Table<kMiddleTable>;

constexpr auto kFirstChunk = [](const Row& row) { return row.first_chunk; };

// Calls call.operator()<kMaster>(): only 16-bit parameters have masters.
template <class T, class Call>
cudaError_t choose_master(bool master, const Call& call) {
  if constexpr (sizeof(T) == 2) {
    if (master) return call.template operator()<true>();
  }
  return call.template operator()<false>();
}

// to[0:count] = the sums of so many rows of slots.
template <class S>
cudaError_t launch_sum_slots(int count, const S* slots, int64_t chunks, double* to, cudaStream_t stream,
                             const double* gate = nullptr) {
  return launch(&sum_slots_kernel<S>, count, kSumThreads, stream, slots, chunks, to, gate);
}

template <class T>
cudaError_t launch_noise_norm(const TensorTable& rows, bool adaptive, const NoiseNormArguments<compute_t<T>>& arguments,
                              double* stats, cudaStream_t stream) {
  const cudaError_t error = choose_average<compute_t<T>>(arguments.ema.storage, [&](auto m) {
    using M = Of<decltype(m)>;
    if (adaptive) {
      return launch_tables(
          rows, kFirstChunk, [](auto tag) { return &noise_norm_kernel<T, M, true, Of<decltype(tag)>>; }, arguments,
          stream);
    }
    return launch_tables(
        rows, kFirstChunk, [](auto tag) { return &noise_norm_kernel<T, M, false, Of<decltype(tag)>>; }, arguments,
        stream);
  });
  if (error != cudaSuccess) return error;
  return launch_sum_slots(kStatistics, arguments.slots, arguments.chunks, stats, stream);
}

template <class T>
cudaError_t launch_perturb(const TensorTable& rows, const PerturbArguments<T>& arguments, cudaStream_t stream) {
  return choose_average<compute_t<T>>(arguments.ema.storage, [&](auto m) {
    using M = Of<decltype(m)>;
    return choose_master<T>(arguments.master != nullptr, [&]<bool kMaster>() {
      return launch_tables(
          rows, kFirstChunk, [](auto tag) { return &perturb_kernel<T, M, kMaster, Of<decltype(tag)>>; }, arguments,
          stream);
    });
  });
}

template <class T>
cudaError_t launch_update_ema(const TensorTable& rows, const UpdateEmaArguments<compute_t<T>>& arguments,
                              double* grad_sq, cudaStream_t stream) {
  const cudaError_t error = choose_average<compute_t<T>>(arguments.ema.storage, [&](auto m) {
    using M = Of<decltype(m)>;
    if constexpr (has_average<M>) {
      if (arguments.slots != nullptr) {
        return launch_tables_of<ReuseTable>(rows, kFirstChunk, &update_ema_kernel<T, M, true, ReuseTable>, arguments,
                                            stream);
      }
      return launch_tables(
          rows, kFirstChunk, [](auto tag) { return &update_ema_kernel<T, M, false, Of<decltype(tag)>>; }, arguments,
          stream);
    } else {
      return cudaSuccess;
    }
  });
  if (error != cudaSuccess || grad_sq == nullptr) return error;
  return launch_sum_slots(1, arguments.slots, rows.chunks, grad_sq, stream);
}

template <class T>
cudaError_t launch_dots(const TensorTable& rows, const DotsArguments<compute_t<T>>& arguments, double* sums,
                        cudaStream_t stream) {
  const cudaError_t error =
      launch_tables_of<ReuseTable>(rows, kFirstChunk, &dots_kernel<T, ReuseTable>, arguments, stream);
  if (error != cudaSuccess) return error;
  return launch_sum_slots(kDots, arguments.slots, arguments.chunks, sums, stream);
}

template <class T>
cudaError_t launch_project(const TensorTable& rows, const ProjectArguments<compute_t<T>>& arguments, double* kept_sq,
                           cudaStream_t stream) {
  const cudaError_t error =
      launch_tables_of<ReuseTable>(rows, kFirstChunk, &project_kernel<T, ReuseTable>, arguments, stream);
  if (error != cudaSuccess) return error;
  return launch_sum_slots(1, arguments.slots, rows.chunks, kept_sq, stream, arguments.stats);
}

template <class T>
cudaError_t launch_restore(const TensorTable& rows, const RestoreArguments<T>& arguments, cudaStream_t stream) {
  return choose_master<T>(arguments.master != nullptr, [&]<bool kMaster>() {
    return launch_tables(
        rows, kFirstChunk, [](auto tag) { return &restore_kernel<T, kMaster, Of<decltype(tag)>>; }, arguments, stream);
  });
}

template <class T>
cudaError_t launch_restore_sgd(const TensorTable& rows, const SgdArguments<T>& arguments, cudaStream_t stream) {
  return choose_master<T>(arguments.update.master != nullptr, [&]<bool kMaster>() {
    if (arguments.update.reused.v) {
      return launch_tables_of<ReuseTable>(rows, kFirstChunk, &restore_sgd_kernel<T, kMaster, true, true, ReuseTable>,
                                          arguments, stream);
    }
    if (arguments.momentum_buffer == nullptr) {
      return launch_tables(
          rows, kFirstChunk, [](auto tag) { return &restore_sgd_kernel<T, kMaster, false, false, Of<decltype(tag)>>; },
          arguments, stream);
    }
    return launch_tables(
        rows, kFirstChunk, [](auto tag) { return &restore_sgd_kernel<T, kMaster, true, false, Of<decltype(tag)>>; },
        arguments, stream);
  });
}

template <class S>
cudaError_t launch_count_steps(const CountArguments<S>& arguments, cudaStream_t stream) {
  const int64_t blocks = (arguments.members + kCountThreads - 1) / kCountThreads;
  return launch(&count_steps_kernel<S>, blocks, kCountThreads, stream, arguments);
}

template <class T>
cudaError_t launch_restore_adam(const TensorTable& rows, const AdamArguments<T>& arguments, cudaStream_t stream) {
  const auto number = [&](const Row& row) { return &row - rows.rows.data(); };
  return choose_master<T>(arguments.update.master != nullptr, [&]<bool kMaster>() {
    if (arguments.update.reused.v) {
      return launch_tables_of<ReuseTable>(rows, number, &restore_adam_kernel<T, kMaster, true, ReuseTable>, arguments,
                                          stream);
    }
    return launch_tables(
        rows, number, [](auto tag) { return &restore_adam_kernel<T, kMaster, false, Of<decltype(tag)>>; }, arguments,
        stream);
  });
}

#define FSAM_INSTANTIATE_LAUNCHES(T)                                                                                  \
  template cudaError_t launch_noise_norm<T>(const TensorTable&, bool, const NoiseNormArguments<compute_t<T>>&,        \
                                            double*, cudaStream_t);                                                   \
  template cudaError_t launch_perturb<T>(const TensorTable&, const PerturbArguments<T>&, cudaStream_t);               \
  template cudaError_t launch_update_ema<T>(const TensorTable&, const UpdateEmaArguments<compute_t<T>>&, double*,     \
                                            cudaStream_t);                                                            \
  template cudaError_t launch_dots<T>(const TensorTable&, const DotsArguments<compute_t<T>>&, double*, cudaStream_t); \
  template cudaError_t launch_project<T>(const TensorTable&, const ProjectArguments<compute_t<T>>&, double*,          \
                                         cudaStream_t);                                                               \
  template cudaError_t launch_restore<T>(const TensorTable&, const RestoreArguments<T>&, cudaStream_t);               \
  template cudaError_t launch_restore_sgd<T>(const TensorTable&, const SgdArguments<T>&, cudaStream_t);               \
  template cudaError_t launch_restore_adam<T>(const TensorTable&, const AdamArguments<T>&, cudaStream_t);

}  // namespace fsam::cuda

// The ops on CPU tensors: chunks over torch's own thread pool, the leaf loops of the best ISA
// inside.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <limits>

#include "../library.h"
#include "../op_arguments.h"
#include "../threads.h"
#include "isa.h"

namespace fsam {
namespace {

// Fewer chunks than this are not worth waking a thread for.
constexpr int64_t kChunksPerTask = 16;

template <class Visit>
void parallel_rows(const TensorTable& table, const Visit& visit) {
  const auto is_large = [](const Row& row) { return row.numel > kTorchsGrain; };
  for_parts(table.chunks, kChunksPerTask, is_forked_child && std::ranges::any_of(table.rows, is_large),
            [&](int64_t first, int64_t last) { table.for_rows(first, last, visit); });
}

// Calls visit(row, begin, n, chunk) for each chunk.
template <class Visit>
void parallel_chunks(const TensorTable& table, const Visit& visit) {
  parallel_rows(table, [&](const Row& row, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kChunk)
      visit(row, i, std::min(kChunk, end - i), row.first_chunk + i / kChunk);
  });
}

// Adds up the sums of all chunks in order: NOTE [chunks are fixed].
template <int kSums, class S>
void add_up(const S* slots, int64_t chunks, double* total) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int k = 0; k < kSums; ++k) total[k] += slots[chunk * kSums + k];
}

// NOTE [streaming stores]
// An ordinary store reads its line into the cache before it writes it. What a pass writes and the
// next pass over the model reads only after everything else has gone by (the backup in pass B, the
// weights in pass C) is written around the caches instead, unless the whole working set fits the
// caches of the threads: then the next pass finds it there. The last level is not counted. It is
// shared with the forward and the backward pass, and on a virtual machine with the neighbours (300
// MB are reported for two cores, where 187 MB took 1.4 times as long with ordinary stores).
bool worth_streaming(int64_t bytes) {
  static const int64_t cache = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return int64_t(1) << 20;
  }();
  return bytes > cache * torch::stable::get_num_threads();
}

constexpr Place kHere{true, 0};

// An optional number that lives in a tensor of one element.
double value_or(const OptionalTensor& tensor, const char* name, double otherwise) {
  if (!tensor.has_value()) return otherwise;
  if (dtype_of(*tensor) == dtype_number<double>()) return *data_of<double>(*tensor, name, 1, kHere);
  return *data_of<float>(*tensor, name, 1, kHere);
}

double inverse_scale(const OptionalTensor& grad_scale) {
  return 1.0 / value_or(grad_scale, "grad_scale", 1.0);
}

void noise_norm(const Tensors& params, const Tensors& grads, const Tensor& offsets, const OptionalTensor& ema,
                const OptionalTensor& ema_scale, const OptionalTensor& grad_scale, double sigma, double lmbda,
                bool adaptive, bool ema_updated, const Tensor& partials, const Tensor& stats) {
  double* written = data_of<double>(stats, "stats", kStatistics, kHere);
  double total[kStatistics] = {};
  const Arguments args = arguments(params, &grads, offsets, true);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const Average average = average_of<S>(ema, ema_scale, args);
    S* slots = data_of<S>(partials, "partials", args.table.chunks * kStatistics, args.place);
    const auto scalars = ascent_scalars<S>(inverse_scale(grad_scale), sigma, lmbda, 0.0, adaptive, ema_updated);
    const auto leaf = isa_loops().of<T>().noise_norm;
    parallel_chunks(args.table, [&](const Row& row, int64_t i, int64_t n, int64_t chunk) {
      leaf(static_cast<const T*>(row.param) + i, static_cast<const T*>(row.grad) + i, average, row.offset + i, n,
           scalars, slots + chunk * kStatistics);
    });
    add_up<kStatistics>(slots, args.table.chunks, total);
  });
  std::copy(total, total + kStatistics, written);
}

void perturb(const Tensors& params, const Tensors& grads, const Tensor& offsets, const OptionalTensor& ema,
             const OptionalTensor& ema_scale, const Tensor& backup, const Tensor& stats,
             const OptionalTensor& grad_scale, double rho, const OptionalTensor& rho_tensor, double sigma, double lmbda,
             double eps, bool adaptive, bool ema_updated, bool feeds, int64_t forward, const OptionalTensor& effect,
             const OptionalTensor& journal, const OptionalTensor& kept) {
  const Journal written(journal);
  const Arguments args = arguments(params, &grads, offsets, true);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const Average average = average_of<S>(ema, ema_scale, args);
    const Saved<T> saved = saved_weights<T>(backup, args);
    const Kept first = kept_of<S>(kept, "kept", args);
    const Forward seen = forward_of<T>(forward);
    S* sums = data_of<S>(effect, "effect", args.table.chunks * kEffect, args.place);
    const double noise_sq = *data_of<double>(stats, "stats", kStatistics, args.place);
    const double step_length = perturbation_step_length(noise_sq, value_or(rho_tensor, "rho_tensor", rho), eps);
    const auto scalars = ascent_scalars<S>(inverse_scale(grad_scale), sigma, lmbda, step_length, adaptive, ema_updated);
    const bool finite = is_finite(noise_sq);
    const bool stream = worth_streaming(args.table.numel * int64_t(3 * sizeof(T) + sizeof(S)));
    const auto leaf = isa_loops().of<T>().perturb;
    if (sums && !finite) std::fill(sums, sums + args.table.chunks * kEffect, S(0));
    parallel_rows(args.table, [&](const Row& row, int64_t begin, int64_t end) {
      T* w = static_cast<T*>(row.param);
      T* to = saved.backup ? saved.backup + row.offset : nullptr;
      S* from = saved.master ? saved.master + row.offset : nullptr;
      if (!finite) {
        if (to) std::memcpy(to + begin, w + begin, (end - begin) * sizeof(T));
        if (from) isa_loops().of<T>().adopt(w + begin, from + begin, end - begin);
        return;
      }
      const int64_t piece = sums ? kChunk : end - begin;  // the sums are a chunk's
      for (int64_t i = begin; i < end; i += piece) {
        leaf(w + i, static_cast<const T*>(row.grad) + i, average, to ? to + i : nullptr, from ? from + i : nullptr,
             row.offset + i, std::min(piece, end - i), scalars, feeds, seen,
             sums ? sums + (row.first_chunk + i / kChunk) * kEffect : nullptr, part_of<S>(first, row.offset + i),
             stream);
      }
    });
  });
  written.wrote();
}

// Whether pass C only restores: the ascent or the scaler met a non-finite gradient.
bool update_is_skipped(const OptionalTensor& stats, const OptionalTensor& found_inf) {
  return !is_finite(value_or(stats, "stats", 0.0)) || value_or(found_inf, "found_inf", 0.0) != 0;
}

void update_ema(const Tensors& params, const Tensors& grads, const Tensor& offsets, const Tensor& ema,
                const OptionalTensor& ema_scale, const OptionalTensor& stats, const OptionalTensor& grad_scale,
                const OptionalTensor& found_inf, double lmbda, const OptionalTensor& journal,
                const OptionalTensor& partials, const OptionalTensor& grad_sq) {
  const Journal written(journal);
  double* square = data_of<double>(grad_sq, "grad_sq", 1, kHere);
  double total = 0.0;
  const Arguments args = arguments(params, &grads, offsets, true);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const Average average = average_of<S>(ema, ema_scale, args);
    S* slots = square_sums<S>(partials, grad_sq, args);
    const auto scalars = ascent_scalars<S>(inverse_scale(grad_scale), 0.0, lmbda, 0.0, false, false);
    const auto leaf = isa_loops().of<T>().update_ema;
    const bool feeds = !update_is_skipped(stats, found_inf);
    if (slots) {
      parallel_chunks(args.table, [&](const Row& row, int64_t i, int64_t n, int64_t chunk) {
        leaf(static_cast<const T*>(row.grad) + i, average, row.offset + i, n, scalars, feeds, slots + chunk);
      });
      add_up<1>(slots, args.table.chunks, &total);
    } else if (feeds) {
      parallel_rows(args.table, [&](const Row& row, int64_t begin, int64_t end) {
        leaf(static_cast<const T*>(row.grad) + begin, average, row.offset + begin, end - begin, scalars, true, nullptr);
      });
    }
  });
  if (square) *square = total;
  written.wrote();
}

void dots(const Tensors& params, const Tensors& grads, const Tensor& offsets, const Tensor& kept,
          const OptionalTensor& grad_scale, const Tensor& partials, const Tensor& sums) {
  constexpr int kSums = 2;
  double* written = data_of<double>(sums, "sums", kSums, kHere);
  double total[kSums] = {};
  const Arguments args = arguments(params, &grads, offsets, true);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const Kept first = kept_of<S>(kept, "kept", args);
    S* slots = data_of<S>(partials, "partials", args.table.chunks * kSums, args.place);
    const S inverse = S(inverse_scale(grad_scale));
    const auto leaf = isa_loops().of<T>().dots;
    parallel_chunks(args.table, [&](const Row& row, int64_t i, int64_t n, int64_t chunk) {
      leaf(static_cast<const T*>(row.grad) + i, part_of<S>(first, row.offset + i), n, inverse, slots + chunk * kSums);
    });
    add_up<kSums>(slots, args.table.chunks, total);
  });
  std::copy(total, total + kSums, written);
}

void project(const Tensors& params, const Tensors& grads, const Tensor& offsets, const Tensor& kept, const Tensor& sums,
             const OptionalTensor& stats, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
             const Tensor& partials, const Tensor& kept_sq, const OptionalTensor& journal) {
  const Journal written(journal);
  double* square = data_of<double>(kept_sq, "kept_sq", 1, kHere);
  const double* sum = data_of<double>(sums, "sums", 2, kHere);
  const bool ascended = is_finite(value_or(stats, "stats", 0.0));
  const bool exists = value_or(found_inf, "found_inf", 0.0) == 0 && is_finite(sum[0]) && is_finite(sum[1]);
  double total = 0.0;
  const Arguments args = arguments(params, &grads, offsets, true);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const Kept direction = kept_of<S>(kept, "kept", args);
    S* slots = data_of<S>(partials, "partials", args.table.chunks, args.place);
    const S inverse = S(inverse_scale(grad_scale)), part = S(projection(sum[0], sum[1]));
    const auto leaf = isa_loops().of<T>().project;
    if (!ascended || !exists) return;
    parallel_chunks(args.table, [&](const Row& row, int64_t i, int64_t n, int64_t chunk) {
      leaf(static_cast<const T*>(row.grad) + i, part_of<S>(direction, row.offset + i), n, inverse, part, slots + chunk);
    });
    add_up<1>(slots, args.table.chunks, &total);
  });
  *square = ascended ? total : std::numeric_limits<double>::quiet_NaN();
  written.wrote();
}

// w = the saved weights, bit for bit; or the rounded masters, which is what the weights were, or what they become where
// the masters adopt them.
template <class T>
void restore_part(const Row& row, const Saved<T>& saved, bool adopts, int64_t begin, int64_t end) {
  T* w = static_cast<T*>(row.param) + begin;
  const int64_t at = row.offset + begin;
  const LeafLoops<T>& leaf = isa_loops().of<T>();
  if (saved.backup) std::memcpy(w, saved.backup + at, (end - begin) * sizeof(T));
  if (saved.master && adopts) leaf.adopt(w, saved.master + at, end - begin);
  if (saved.master && !adopts) leaf.restore_master(w, saved.master + at, end - begin);
}

void restore(const Tensors& params, const Tensor& offsets, const Tensor& backup) {
  const Arguments args = arguments(params, nullptr, offsets, true);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    const Saved<T> saved = saved_weights<T>(backup, args);
    parallel_rows(args.table,
                  [&](const Row& row, int64_t begin, int64_t end) { restore_part(row, saved, false, begin, end); });
  });
}

// How 16-bit weights without masters are rounded: `rounding` holds a seed and the number of the step.
Rounding rounding_of(const OptionalTensor& rounding, const Arguments& args) {
  const int64_t* numbers = data_of<int64_t>(rounding, "rounding", 2, args.place);
  if (numbers == nullptr) return {false, 0};
  return {true, rounding_key(uint64_t(numbers[0]), uint64_t(numbers[1]))};
}

// What an update adds to its gradients; nothing where the length is 0, so that nothing is read either.
template <class S>
Share<S> share_of(const OptionalTensor& reused, const OptionalTensor& reuse_sq, double reuse, double eps,
                  const Arguments& args) {
  const Reused found = reused_of<S>(reused, reuse_sq, args);
  if (!found.v) return {};
  const S length = S(reuse_length(found.squares[0], found.squares[1], reuse, eps));
  return length == 0 ? Share<S>{} : Share<S>{found.v, length};
}

// What the two fused bases share: update(w, row, from, master, begin, n, stream) on each row, or the plain restore.
template <class T, class Update>
void restore_and_update(const Arguments& args, const Saved<T>& saved, bool adopts, bool skip, int64_t bytes_per_element,
                        const Update& update) {
  const bool stream = worth_streaming(args.table.numel * bytes_per_element);
  parallel_rows(args.table, [&](const Row& row, int64_t begin, int64_t end) {
    if (skip) return restore_part(row, saved, adopts, begin, end);
    const int64_t at = row.offset + begin;
    update(static_cast<T*>(row.param) + begin, static_cast<const T*>(row.grad) + begin,
           saved.backup ? saved.backup + at : nullptr, saved.master ? saved.master + at : nullptr, row, at, end - begin,
           stream);
  });
}

void restore_sgd(const Tensors& params, const Tensors& grads, const Tensor& offsets, const OptionalTensor& backup,
                 const OptionalTensor& momentum_buffer, const OptionalTensor& stats, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf, double lr, const OptionalTensor& lr_tensor, double momentum,
                 double dampening, double weight_decay, bool nesterov, bool maximize, const OptionalTensor& rounding,
                 bool adopts, const OptionalTensor& journal, const OptionalTensor& reused,
                 const OptionalTensor& reuse_sq, double reuse, double reuse_eps) {
  const Journal written(journal);
  const Arguments args = arguments(params, &grads, offsets, true);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const Saved<T> saved = saved_weights<T>(backup, args);
    S* buffer = flat_data<S>(momentum_buffer, "momentum_buffer", args);
    const Rounding how = rounding_of(rounding, args);
    const Share<S> share = share_of<S>(reused, reuse_sq, reuse, reuse_eps, args);
    const auto scalars = sgd_scalars<S>(inverse_scale(grad_scale), value_or(lr_tensor, "lr_tensor", lr), momentum,
                                        dampening, weight_decay, nesterov, maximize);
    const auto leaf = isa_loops().of<T>().restore_sgd;
    restore_and_update<T>(
        args, saved, adopts, update_is_skipped(stats, found_inf), 3 * sizeof(T) + sizeof(S),
        [&](T* w, const T* g, const T* from, S* master, const Row&, int64_t at, int64_t n, bool stream) {
          leaf(w, g, {part_of<S>(share.v, at), share.length}, from, master, adopts, buffer ? buffer + at : nullptr, at,
               n, scalars, how, stream);
        });
  });
  written.wrote();
}

void count_steps(const Tensor& steps, const Tensor& index, const Tensor& corrections, const OptionalTensor& stats,
                 const OptionalTensor& found_inf, double lr, const OptionalTensor& lr_tensor, double beta1,
                 double beta2, const OptionalTensor& journal) {
  const Journal written(journal);
  dispatch_state(corrections, [&](auto state) {
    using S = decltype(state);
    const StepCounts<S> counts = step_counts<S>(steps, index, corrections);
    for (int64_t i = 0; i < counts.members; ++i) {
      STD_TORCH_CHECK(counts.index[i] >= 0 && counts.index[i] < steps.numel(), "fsam_ext: index[", i, "] is ",
                      counts.index[i], ", which is no position in the ", steps.numel(), " steps");
    }
    const double rate = value_or(lr_tensor, "lr_tensor", lr);
    const float one = update_is_skipped(stats, found_inf) ? 0.0f : 1.0f;
    BiasCorrection<S> correction{};
    for (int64_t i = 0; i < counts.members; ++i) {
      float& step = counts.steps[counts.index[i]];
      step += one;
      if (i >= counts.rows) continue;
      // A power costs more than all else here, and most rows are at the same step as the one before.
      if (i == 0 || step != counts.steps[counts.index[i - 1]])
        correction = bias_correction<S>(rate, beta1, beta2, step);
      counts.corrections[i] = correction;
    }
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
  const Arguments args = arguments(params, &grads, offsets, true);
  dispatch_storage(args, [&](auto storage) {
    using T = decltype(storage);
    using S = compute_t<T>;
    const Saved<T> saved = saved_weights<T>(backup, args);
    S* first = flat_data<S>(exp_avg, "exp_avg", args);
    S* second = flat_data<S>(exp_avg_sq, "exp_avg_sq", args);
    const BiasCorrection<S>* correction = corrections_of<S>(corrections, args);
    const Rounding how = rounding_of(rounding, args);
    const Share<S> share = share_of<S>(reused, reuse_sq, reuse, reuse_eps, args);
    const double rate = value_or(lr_tensor, "lr_tensor", lr);
    const auto scalars =
        adam_scalars<S>(inverse_scale(grad_scale), rate, beta1, beta2, eps, weight_decay, decoupled, maximize);
    const auto leaf = isa_loops().of<T>().restore_adam;
    const Row* rows = args.table.rows.data();
    restore_and_update<T>(
        args, saved, adopts, update_is_skipped(stats, found_inf), 3 * sizeof(T) + 2 * sizeof(S),
        [&](T* w, const T* g, const T* from, S* master, const Row& row, int64_t at, int64_t n, bool stream) {
          leaf(w, g, {part_of<S>(share.v, at), share.length}, from, master, adopts, first + at, second + at, at, n,
               scalars, correction[&row - rows], how, stream);
        });
  });
  written.wrote();
}

// NOTE [huge pages]
// The flat buffers are read and written end to end: with pages of 2 MiB instead of 4 KiB the walk through the page
// tables goes away. A hint: where the kernel does not take it, nothing is lost.
void advise_huge_pages(const Tensor& buffer) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + buffer.numel() * buffer.element_size()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)buffer;
#endif
}

std::string cpu_isa() {
  return isa_loops().name;
}

}  // namespace
}  // namespace fsam

FSAM_LIBRARY_IMPL(FSAM_NAMESPACE, CPU, m) {
  m.impl("noise_norm", TORCH_BOX(&fsam::noise_norm));
  m.impl("perturb", TORCH_BOX(&fsam::perturb));
  m.impl("update_ema", TORCH_BOX(&fsam::update_ema));
  m.impl("dots", TORCH_BOX(&fsam::dots));
  m.impl("project", TORCH_BOX(&fsam::project));
  m.impl("restore", TORCH_BOX(&fsam::restore));
  m.impl("restore_sgd", TORCH_BOX(&fsam::restore_sgd));
  m.impl("count_steps", TORCH_BOX(&fsam::count_steps));
  m.impl("restore_adam", TORCH_BOX(&fsam::restore_adam));
  m.impl("advise_huge_pages", TORCH_BOX(&fsam::advise_huge_pages));
}

FSAM_LIBRARY_IMPL(FSAM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fsam::cpu_isa));
}

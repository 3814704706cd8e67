// The interface between the CPU ops and the loops that are compiled once for each ISA: plain
// pointers and numbers.
#pragma once

#include <cstdint>

#include "../storage.h"

namespace fsam {

// `w` parameters, `g` gradients: n elements each, as are all state pointers. `ema` and `backup` may
// be null where the formula has none. `stream` writes what is not read again soon around the
// caches. Nothing may overlap.
template <class T>
struct LeafLoops {
  using S = compute_t<T>;

  // The statistics of one chunk.
  void (*noise_norm)(const T* w, const T* g, const S* ema, int64_t n, Ema, bool adaptive, const AscentScalars<S>&,
                     S* out);
  // backup = w, ema = the updated average, w = the perturbed weight.
  void (*perturb)(T* w, const T* g, S* ema, T* backup, int64_t n, Ema, bool adaptive, const AscentScalars<S>&,
                  bool stream);
  // w = update(backup, g); without a backup w = update(w, g).
  void (*restore_sgd)(T* w, const T* g, const T* backup, S* momentum_buffer, int64_t n, const SgdScalars<S>&,
                      bool stream);
  void (*restore_adam)(T* w, const T* g, const T* backup, S* exp_avg, S* exp_avg_sq, int64_t n, const AdamScalars<S>&,
                       const BiasCorrection<S>&, bool stream);
};

struct IsaLoops {
  const char* name;
  LeafLoops<double> f64;
  LeafLoops<float> f32;
  LeafLoops<bfloat16> bf16;
  LeafLoops<half> f16;

  template <class T>
  const LeafLoops<T>& of() const {
    if constexpr (std::is_same_v<T, double>) return f64;
    if constexpr (std::is_same_v<T, float>) return f32;
    if constexpr (std::is_same_v<T, bfloat16>) return bf16;
    if constexpr (std::is_same_v<T, half>) return f16;
  }
};

namespace baseline {
extern const IsaLoops loops;
}
namespace avx2 {
extern const IsaLoops loops;
}
namespace avx512 {
extern const IsaLoops loops;
}

}  // namespace fsam

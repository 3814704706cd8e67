// The interface between the CPU ops and the loops that are compiled once for each ISA: plain
// pointers and numbers.
#pragma once

#include <cstdint>

#include "../average.h"
#include "../formulas.h"
#include "../kept.h"
#include "../storage.h"

namespace fsam {

// How pass C rounds: to nearest, or with random bits from `key` and an element's position in the flat state.
struct Rounding {
  bool stochastic;
  uint32_t key;
};

// What an update adds to a gradient: length * v, or nothing where there is no v. The length is not 0 then.
template <class S>
struct Share {
  Kept v;
  S length = 0;
};

// `w` parameters, `g` gradients: n elements each, as are all state pointers. `at` is the first element's position in
// the flat state, which tells where in an Average the slice lies. `stream` writes what is not read
// again soon around the caches. Nothing may overlap.
template <class T>
struct LeafLoops {
  using S = compute_t<T>;

  // The statistics of one chunk.
  void (*noise_norm)(const T* w, const T* g, const Average& ema, int64_t at, int64_t n, const AscentScalars<S>&,
                     S* out);
  // w = the perturbed weight, ema = the updated average where `feeds`. Without masters backup = w comes first; with
  // them master = w where they differ, and the perturbation starts from the master: NOTE [masters adopt]. `effect`:
  // null, or where the sums of Effect go. kept = g where there is one.
  void (*perturb)(T* w, const T* g, const Average& ema, T* backup, S* master, int64_t at, int64_t n,
                  const AscentScalars<S>&, bool feeds, Forward, S* effect, Kept kept, bool stream);
  // ema = the average with g where `feeds`. `grad_sq`: null, or where the sum of g^2 goes; without it all are fed.
  void (*update_ema)(const T* g, const Average& ema, int64_t at, int64_t n, const AscentScalars<S>&, bool feeds,
                     S* grad_sq);
  // out[0:2] = the sums of g k and of k^2.
  void (*dots)(const T* g, Kept, int64_t n, S inverse_scale, S* out);
  // k = g - part k, and out[0] = the sum of k^2 as it is stored.
  void (*project)(const T* g, Kept, int64_t n, S inverse_scale, S part, S* out);
  // w = the rounded master.
  void (*restore_master)(T* w, const S* master, int64_t n);
  // master = w where they differ.
  void (*adopt)(const T* w, S* master, int64_t n);
  // w = update(backup, g); with masters both of them, after adopting w where `adopts`; with neither w = update(w, g).
  void (*restore_sgd)(T* w, const T* g, const Share<S>&, const T* backup, S* master, bool adopts, S* momentum_buffer,
                      int64_t at, int64_t n, const SgdScalars<S>&, Rounding, bool stream);
  void (*restore_adam)(T* w, const T* g, const Share<S>&, const T* backup, S* master, bool adopts, S* exp_avg,
                       S* exp_avg_sq, int64_t at, int64_t n, const AdamScalars<S>&, const BiasCorrection<S>&, Rounding,
                       bool stream);
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

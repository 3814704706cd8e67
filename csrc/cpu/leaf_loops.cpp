// The three passes over contiguous memory, compiled once for each ISA with -DFSAM_ISA=its name.

#include "leaf_loops.h"

#include "lanes.h"

namespace fsam::FSAM_ISA {
namespace {

// Calls body(i, access) for each group of lanes, the last of which may be partial.
template <class T, class Body>
FSAM_FN void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kCount<T> <= n; i += kCount<T>) body(i, Whole{});
  if (i < n) body(i, Part{int(n - i)});
}

#define FSAM_BODY [&](int64_t i, auto access) __attribute__((always_inline))

template <class T, Ema kEma, bool kAdaptive>
void noise_norm(const T* w, const T* g, const compute_t<T>* ema, int64_t n, const AscentScalars<compute_t<T>>& scalars,
                compute_t<T>* out) {
  using V = lanes_t<T>;
  using S = compute_t<T>;
  const AscentScalars<S> s = scalars;
  Statistics<V> sums;
  for_lanes<T>(
      n, FSAM_BODY {
        V weight(0), average(0);
        if constexpr (kAdaptive) weight = widen<T>(access.load(w + i));
        if constexpr (kEma != Ema::none) average = widen<S>(access.load(ema + i));
        accumulate<kEma, kAdaptive>(sums, weight, widen<T>(access.load(g + i)), average, s);
      });
  out[0] = sum(sums.noise_sq);
  out[1] = sum(sums.grad_sq);
  out[2] = sum(sums.grad_dot_ema);
  out[3] = sum(sums.ema_sq);
  out[4] = sum(sums.nonfinite);
}

template <class T, Ema kEma, bool kAdaptive, bool kStream>
void perturb(T* w, const T* g, compute_t<T>* ema, T* backup, int64_t n, const AscentScalars<compute_t<T>>& scalars) {
  using V = lanes_t<T>;
  using S = compute_t<T>;
  const AscentScalars<S> s = scalars;
  for_lanes<T>(
      n, FSAM_BODY {
        const Packed<T> stored = access.load(w + i);
        const V gradient = widen<T>(access.load(g + i)) * s.inverse_scale;
        V average(0);
        if constexpr (kEma != Ema::none) average = widen<S>(access.load(ema + i));
        const V d = noise<kEma>(gradient, average, s);
        access.store(w + i, narrow<T>(perturbed<kAdaptive>(widen<T>(stored), d, s.step_length)));
        if constexpr (kEma != Ema::none) {
          access.store(ema + i, narrow<S>(ema_update(average, gradient, s.lmbda, s.one_minus_lmbda)));
        }
        if constexpr (kStream) {
          access.stream(backup + i, stored);
        } else {
          access.store(backup + i, stored);
        }
      });
  if constexpr (kStream) stream_fence();
}

template <class T, bool kMomentum, bool kStream>
void restore_sgd(T* w, const T* g, const T* from, compute_t<T>* momentum_buffer, int64_t n,
                 const SgdScalars<compute_t<T>>& scalars) {
  using V = lanes_t<T>;
  using S = compute_t<T>;
  const SgdScalars<S> s = scalars;
  for_lanes<T>(
      n, FSAM_BODY {
        V buffer(0);
        if constexpr (kMomentum) buffer = widen<S>(access.load(momentum_buffer + i));
        const V updated = sgd<kMomentum>(widen<T>(access.load(from + i)), widen<T>(access.load(g + i)), buffer, s);
        if constexpr (kMomentum) access.store(momentum_buffer + i, narrow<S>(buffer));
        if constexpr (kStream) {
          access.stream(w + i, narrow<T>(updated));
        } else {
          access.store(w + i, narrow<T>(updated));
        }
      });
  if constexpr (kStream) stream_fence();
}

template <class T, bool kStream>
void restore_adam(T* w, const T* g, const T* from, compute_t<T>* exp_avg, compute_t<T>* exp_avg_sq, int64_t n,
                  const AdamScalars<compute_t<T>>& scalars, const BiasCorrection<compute_t<T>>& correction_) {
  using V = lanes_t<T>;
  using S = compute_t<T>;
  const AdamScalars<S> s = scalars;
  const BiasCorrection<S> correction = correction_;
  for_lanes<T>(
      n, FSAM_BODY {
        V first = widen<S>(access.load(exp_avg + i));
        V second = widen<S>(access.load(exp_avg_sq + i));
        const V updated =
            adam(widen<T>(access.load(from + i)), widen<T>(access.load(g + i)), first, second, s, correction);
        access.store(exp_avg + i, narrow<S>(first));
        access.store(exp_avg_sq + i, narrow<S>(second));
        if constexpr (kStream) {
          access.stream(w + i, narrow<T>(updated));
        } else {
          access.store(w + i, narrow<T>(updated));
        }
      });
  if constexpr (kStream) stream_fence();
}

#undef FSAM_BODY

// ---- From run-time choices to the loops compiled for them
// ------------------------------------------------------

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};
template <Ema kValue>
struct EmaIs {
  static constexpr Ema value = kValue;
};

template <class Call>
FSAM_FN void choose_bool(bool value, const Call& call) {
  if (value) {
    call(Bool<true>{});
  } else {
    call(Bool<false>{});
  }
}
template <class Call>
FSAM_FN void choose_ema(Ema value, const Call& call) {
  switch (value) {
    case Ema::none:
      return call(EmaIs<Ema::none>{});
    case Ema::previous:
      return call(EmaIs<Ema::previous>{});
    case Ema::updated:
      return call(EmaIs<Ema::updated>{});
  }
}

// A streaming store needs an aligned address.
FSAM_FN bool aligned(const void* p) {
  return (uintptr_t)p % kLaneBytes == 0;
}

template <class T>
constexpr LeafLoops<T> leaf_loops() {
  using S = compute_t<T>;
  return {
      [](const T* w, const T* g, const S* ema, int64_t n, Ema kind, bool adaptive, const AscentScalars<S>& s, S* out) {
        choose_ema(kind, [&](auto e) {
          choose_bool(adaptive, [&](auto a) { noise_norm<T, e.value, a.value>(w, g, ema, n, s, out); });
        });
      },
      [](T* w, const T* g, S* ema, T* backup, int64_t n, Ema kind, bool adaptive, const AscentScalars<S>& s,
         bool stream) {
        choose_ema(kind, [&](auto e) {
          choose_bool(adaptive, [&](auto a) {
            choose_bool(stream && aligned(backup),
                        [&](auto st) { perturb<T, e.value, a.value, st.value>(w, g, ema, backup, n, s); });
          });
        });
      },
      [](T* w, const T* g, const T* backup, S* momentum_buffer, int64_t n, const SgdScalars<S>& s, bool stream) {
        choose_bool(momentum_buffer != nullptr, [&](auto m) {
          choose_bool(stream && aligned(w), [&](auto st) {
            restore_sgd<T, m.value, st.value>(w, g, backup ? backup : w, momentum_buffer, n, s);
          });
        });
      },
      [](T* w, const T* g, const T* backup, S* exp_avg, S* exp_avg_sq, int64_t n, const AdamScalars<S>& s,
         const BiasCorrection<S>& correction, bool stream) {
        choose_bool(stream && aligned(w), [&](auto st) {
          restore_adam<T, st.value>(w, g, backup ? backup : w, exp_avg, exp_avg_sq, n, s, correction);
        });
      },
  };
}

}  // namespace

#define FSAM_STRING_(x) #x
#define FSAM_STRING(x) FSAM_STRING_(x)

const IsaLoops loops = {FSAM_STRING(FSAM_ISA), leaf_loops<double>(), leaf_loops<float>(), leaf_loops<bfloat16>(),
                        leaf_loops<half>()};

}  // namespace fsam::FSAM_ISA

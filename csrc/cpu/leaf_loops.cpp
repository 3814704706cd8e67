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

// Stores around the caches where `stream`: a branch that always goes the same way.
template <class T, class Access>
FSAM_FN void put(Access access, bool stream, T* to, const Packed<T>& x) {
  if (stream) {
    access.stream(to, x);
  } else {
    access.store(to, x);
  }
}

// A group of lanes of an average; unset (NaN) where its block's scale is.
template <class T, class M, class Access>
FSAM_FN lanes_t<T> load_average(const AverageSlice<M>& ema, int64_t i, Access access) {
  if constexpr (!has_average<M>) {
    return lanes_t<T>(0);
  } else if constexpr (is_quantized<M>) {
    return widen<M>(access.load(ema.data + i)) * lanes_t<T>(ema.scales[i / kQuantized]);
  } else {
    return widen<M>(access.load(ema.data + i));
  }
}

// Calls body(i, access), which returns the new average, for each group of lanes, and stores what it returns where
// `feeds`. A quantized average is stored a block at a time, once its largest element is known.
template <class T, class M, class Body>
FSAM_FN void for_averages(const AverageSlice<M>& ema, int64_t n, bool feeds, const Body& body) {
  if constexpr (is_quantized<M>) {
    for (int64_t start = 0; start < n; start += kQuantized) {
      const int64_t count = n - start < kQuantized ? n - start : kQuantized;
      lanes_t<T> fresh[kQuantized / kCount<T>];
      lanes_t<T> largest(0);
      for_lanes<T>(
          count, FSAM_BODY {
            fresh[i / kCount<T>] = known(body(start + i, access));
            largest = largest_magnitude(largest, fresh[i / kCount<T>]);
          });
      if (!feeds) continue;
      const float scale = quantization_scale(largest_of(largest)), inverse = inverse_quantization_scale(scale);
      ema.scales[start / kQuantized] = scale;
      for_lanes<T>(
          count,
          FSAM_BODY { access.store(ema.data + start + i, low_bits<M>(quantized(fresh[i / kCount<T>], inverse))); });
    }
  } else {
    for_lanes<T>(
        n, FSAM_BODY {
          const lanes_t<T> fresh = body(i, access);
          if constexpr (has_average<M>) {
            if (feeds) access.store(ema.data + i, narrow<M>(fresh));
          }
        });
  }
}

// A group of lanes of what is kept. A branch that always goes the same way tells the type: loops of their own for each
// would double all that reads or writes it.
template <class T, class Access>
FSAM_FN lanes_t<T> load_kept(const Kept& kept, int64_t i, Access access) {
  using S = compute_t<T>;
  if constexpr (sizeof(S) == 4) {
    if (kept.narrow) return widen<bfloat16>(access.load(static_cast<const bfloat16*>(kept.data) + i));
  }
  return widen<S>(access.load(static_cast<const S*>(kept.data) + i));
}

// Returns what is stored.
template <class T, class Access>
FSAM_FN lanes_t<T> store_kept(const Kept& kept, int64_t i, Access access, bool stream, lanes_t<T> x) {
  using S = compute_t<T>;
  if constexpr (sizeof(S) == 4) {
    if (kept.narrow) {
      const Packed<bfloat16> low = narrow<bfloat16>(x);
      put<bfloat16>(access, stream, static_cast<bfloat16*>(kept.data) + i, low);
      return widen<bfloat16>(low);
    }
  }
  put<S>(access, stream, static_cast<S*>(kept.data) + i, narrow<S>(x));
  return x;
}

template <class T, class M>
void noise_norm(const T* w, const T* g, const AverageSlice<M>& ema, int64_t n,
                const AscentScalars<compute_t<T>>& scalars, compute_t<T>* out) {
  using V = lanes_t<T>;
  using S = compute_t<T>;
  const AscentScalars<S> s = scalars;
  Statistics<V> sums;
  for_lanes<T>(
      n, FSAM_BODY {
        V weight(0);
        if (s.adaptive) weight = widen<T>(access.load(w + i));
        accumulate<has_average<M>>(sums, weight, widen<T>(access.load(g + i)), load_average<T>(ema, i, access), s);
      });
  out[0] = sum(sums.noise_sq);
  out[1] = sum(sums.grad_sq);
  out[2] = sum(sums.grad_dot_ema);
  out[3] = sum(sums.ema_sq);
  out[4] = sum(sums.nonfinite);
}

// What the forward pass sees of weights that are stored as T.
template <class T>
FSAM_FN lanes_t<T> seen(const Packed<T>& stored, Forward forward) {
  const lanes_t<T> x = widen<T>(stored);
  if constexpr (sizeof(compute_t<T>) == 4) {
    if (forward == Forward::bfloat16) return widen<bfloat16>(narrow<bfloat16>(x));
    if (forward == Forward::half) return widen<half>(narrow<half>(x));
  }
  return x;
}

// The masters of a group of weights, which are brought up to date in memory where the weights are others':
// NOTE [masters adopt].
template <class T, class Access>
FSAM_FN lanes_t<T> adopted_masters(Access access, const T* w, compute_t<T>* master) {
  using S = compute_t<T>;
  const lanes_t<T> found = widen<S>(access.load(master));
  const Packed<T> rounded = narrow<T>(found), weight = access.load(w);
  if (same_bits(rounded, weight)) [[likely]]
    return found;
  const lanes_t<T> fresh = adopted(found, widen<T>(rounded), widen<T>(weight));
  access.store(master, narrow<S>(fresh));
  return fresh;
}

// kExtras: the effect is summed or the gradient kept, or both.
template <class T, class M, bool kMaster, bool kExtras>
void perturb(T* w, const T* g, const AverageSlice<M>& ema, T* backup, compute_t<T>* master, int64_t n,
             const AscentScalars<compute_t<T>>& scalars, bool feeds, Forward forward, compute_t<T>* out, Kept kept,
             bool stream, bool stream_kept) {
  using V = lanes_t<T>;
  using S = compute_t<T>;
  const AscentScalars<S> s = scalars;
  Effect<V> effect;
  for_averages<T>(
      ema, n, feeds, FSAM_BODY {
        Packed<T> before;
        V start;
        if constexpr (kMaster) {
          start = adopted_masters(access, w + i, master + i);
          before = narrow<T>(start);
        } else {
          before = access.load(w + i);
          start = widen<T>(before);
        }
        const V gradient = unscaled(widen<T>(access.load(g + i)), s.inverse_scale);
        const V average = load_average<T>(ema, i, access);
        const V intended = perturbation(start, noise<has_average<M>>(gradient, average, s), s);
        const Packed<T> after = narrow<T>(start + intended);
        access.store(w + i, after);
        if constexpr (!kMaster) put(access, stream, backup + i, before);
        if constexpr (kExtras) {
          if (kept) store_kept<T>(kept, i, access, stream_kept, gradient);
          if (out) accumulate(effect, seen(after, forward) - seen(before, forward), intended);
        }
        return ema_update(average, gradient, s.lmbda, s.one_minus_lmbda);
      });
  stream_fence();
  if (kExtras && out) {
    out[0] = sum(effect.effective_sq);
    out[1] = sum(effect.effective_dot_intended);
    out[2] = sum(effect.intended_sq);
  }
}

template <class T, class M, bool kSquare>
void update_ema(const T* g, const AverageSlice<M>& ema, int64_t n, const AscentScalars<compute_t<T>>& scalars,
                bool feeds, compute_t<T>* out) {
  using V = lanes_t<T>;
  const AscentScalars<compute_t<T>> s = scalars;
  V squares(0);
  for_averages<T>(
      ema, n, feeds || !kSquare, FSAM_BODY {
        const V scaled = widen<T>(access.load(g + i));
        if constexpr (kSquare) {
          const V gradient = unscaled(scaled, s.inverse_scale);
          squares = squares + gradient * gradient;
        }
        return fed(load_average<T>(ema, i, access), scaled, s.inverse_scale, s.lmbda, s.one_minus_lmbda);
      });
  if constexpr (kSquare) out[0] = sum(squares);
}

template <class T>
void dots(const T* g, Kept kept, int64_t n, compute_t<T> inverse_scale, compute_t<T>* out) {
  using V = lanes_t<T>;
  V product(0), square(0);
  for_lanes<T>(
      n, FSAM_BODY {
        const V k = load_kept<T>(kept, i, access);
        product = product + unscaled(widen<T>(access.load(g + i)), inverse_scale) * k;
        square = square + k * k;
      });
  out[0] = sum(product);
  out[1] = sum(square);
}

template <class T>
void project(const T* g, Kept kept, int64_t n, compute_t<T> inverse_scale, compute_t<T> part, compute_t<T>* out) {
  using V = lanes_t<T>;
  V square(0);
  for_lanes<T>(
      n, FSAM_BODY {
        const V gradient = unscaled(widen<T>(access.load(g + i)), inverse_scale);
        const V direction = gradient - part * load_kept<T>(kept, i, access);
        const V stored = store_kept<T>(kept, i, access, false, direction);
        square = square + stored * stored;
      });
  out[0] = sum(square);
}

template <class T>
void restore_master(T* w, const compute_t<T>* master, int64_t n) {
  for_lanes<T>(n, FSAM_BODY { access.store(w + i, narrow<T>(widen<compute_t<T>>(access.load(master + i)))); });
}

template <class T>
void adopt(const T* w, compute_t<T>* master, int64_t n) {
  for_lanes<T>(n, FSAM_BODY { adopted_masters(access, w + i, master + i); });
}

// Where pass C takes a weight from and how it gives it back.
template <class T, bool kMaster, bool kStochastic>
struct Weights {
  T* w;
  const T* from;
  compute_t<T>* master;
  bool adopts;
  int64_t at;
  uint32_t key;
  bool stream;

  template <class Access>
  FSAM_FN lanes_t<T> load(int64_t i, Access access) const {
    if constexpr (kMaster) {
      if (adopts) return adopted_masters(access, w + i, master + i);
      return widen<compute_t<T>>(access.load(master + i));
    } else {
      return widen<T>(access.load(from + i));
    }
  }
  template <class Access>
  FSAM_FN void store(int64_t i, Access access, lanes_t<T> x) const {
    if constexpr (kMaster) access.store(master + i, narrow<compute_t<T>>(x));
    Packed<T> low;
    if constexpr (kStochastic) {
      const int64_t position = at + i;
      low = narrow_stochastically<T>(x, random_bits(counting_from(uint32_t(position)), rounding_key_of(key, position)));
    } else {
      low = narrow<T>(x);
    }
    put(access, stream, w + i, low);
  }
};

// The gradient that pass C steps along.
template <class T, bool kReused>
struct Gradients {
  const T* g;
  Share<compute_t<T>> share;

  template <class Access>
  FSAM_FN lanes_t<T> load(int64_t i, Access access, compute_t<T> inverse_scale) const {
    const lanes_t<T> gradient = unscaled(widen<T>(access.load(g + i)), inverse_scale);
    if constexpr (!kReused) return gradient;
    if (share.length == 0) __builtin_unreachable();
    return with_reused(gradient, load_kept<T>(share.v, i, access), share.length);
  }
};

template <class T, bool kMomentum, class Where, class From>
void restore_sgd(const Where& where, const From& from, compute_t<T>* momentum_buffer, int64_t n,
                 const SgdScalars<compute_t<T>>& scalars) {
  using V = lanes_t<T>;
  using S = compute_t<T>;
  const SgdScalars<S> s = scalars;
  const Where weights = where;
  const From gradients = from;
  for_lanes<T>(
      n, FSAM_BODY {
        V buffer(0);
        if constexpr (kMomentum) buffer = widen<S>(access.load(momentum_buffer + i));
        const V gradient = gradients.load(i, access, s.inverse_scale);
        const V updated = sgd<kMomentum>(weights.load(i, access), gradient, buffer, s);
        if constexpr (kMomentum) access.store(momentum_buffer + i, narrow<S>(buffer));
        weights.store(i, access, updated);
      });
  stream_fence();
}

template <class T, class Where, class From>
void restore_adam(const Where& where, const From& from, compute_t<T>* exp_avg, compute_t<T>* exp_avg_sq, int64_t n,
                  const AdamScalars<compute_t<T>>& scalars, const BiasCorrection<compute_t<T>>& correction_) {
  using V = lanes_t<T>;
  using S = compute_t<T>;
  const AdamScalars<S> s = scalars;
  const BiasCorrection<S> correction = correction_;
  const Where weights = where;
  const From gradients = from;
  for_lanes<T>(
      n, FSAM_BODY {
        V first = widen<S>(access.load(exp_avg + i));
        V second = widen<S>(access.load(exp_avg_sq + i));
        const V gradient = gradients.load(i, access, s.inverse_scale);
        const V updated = adam(weights.load(i, access), gradient, first, second, s, correction);
        access.store(exp_avg + i, narrow<S>(first));
        access.store(exp_avg_sq + i, narrow<S>(second));
        weights.store(i, access, updated);
      });
  stream_fence();
}

#undef FSAM_BODY

// ---- From run-time choices to the loops compiled for them
// ------------------------------------------------------

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

template <class Call>
FSAM_FN void choose_bool(bool value, const Call& call) {
  if (value) {
    call(Bool<true>{});
  } else {
    call(Bool<false>{});
  }
}

// A streaming store needs an aligned address.
FSAM_FN bool aligned(const void* p) {
  return (uintptr_t)p % kLaneBytes == 0;
}

// Calls call(weights) with the Weights that these pointers and this rounding ask for. Only 16-bit weights are rounded.
template <class T, class Call>
FSAM_FN void choose_weights(T* w, const T* backup, compute_t<T>* master, bool adopts, int64_t at, Rounding rounding,
                            bool stream, const Call& call) {
  const T* from = backup ? backup : w;
  stream = stream && aligned(w);
  if constexpr (sizeof(T) == 2) {
    if (master) return call(Weights<T, true, false>{w, from, master, adopts, at, 0, stream});
    if (rounding.stochastic) return call(Weights<T, false, true>{w, from, nullptr, false, at, rounding.key, stream});
  }
  call(Weights<T, false, false>{w, from, nullptr, false, at, 0, stream});
}

// Calls call(gradients) with the Gradients that this share asks for.
template <class T, class Call>
FSAM_FN void choose_gradients(const T* g, const Share<compute_t<T>>& share, const Call& call) {
  if (share.v) return call(Gradients<T, true>{g, share});
  call(Gradients<T, false>{g, {}});
}

template <class T>
constexpr LeafLoops<T> leaf_loops() {
  using S = compute_t<T>;
  return {
      [](const T* w, const T* g, const Average& ema, int64_t at, int64_t n, const AscentScalars<S>& s, S* out) {
        choose_average<S>(ema.storage, [&](auto m) {
          using M = typename decltype(m)::type;
          noise_norm<T, M>(w, g, slice_of<M>(ema, at), n, s, out);
        });
      },
      [](T* w, const T* g, const Average& ema, T* backup, S* master, int64_t at, int64_t n, const AscentScalars<S>& s,
         bool feeds, Forward forward, S* effect, Kept kept, bool stream) {
        const bool stream_kept = stream && aligned(kept.data);
        choose_average<S>(ema.storage, [&](auto m) {
          using M = typename decltype(m)::type;
          const AverageSlice<M> average = slice_of<M>(ema, at);
          choose_bool(effect || kept, [&](auto extras) {
            if constexpr (sizeof(T) == 2) {
              if (master) {
                return perturb<T, M, true, extras.value>(w, g, average, nullptr, master, n, s, feeds, forward, effect,
                                                         kept, false, stream_kept);
              }
            }
            perturb<T, M, false, extras.value>(w, g, average, backup, nullptr, n, s, feeds, forward, effect, kept,
                                               stream && aligned(backup), stream_kept);
          });
        });
      },
      [](const T* g, const Average& ema, int64_t at, int64_t n, const AscentScalars<S>& s, bool feeds, S* grad_sq) {
        choose_average<S>(ema.storage, [&](auto m) {
          using M = typename decltype(m)::type;
          choose_bool(grad_sq != nullptr, [&](auto square) {
            update_ema<T, M, square.value>(g, slice_of<M>(ema, at), n, s, feeds, grad_sq);
          });
        });
      },
      dots<T>,
      project<T>,
      [](T* w, const S* master, int64_t n) { restore_master<T>(w, master, n); },
      [](const T* w, S* master, int64_t n) {
        if constexpr (sizeof(T) == 2) adopt<T>(w, master, n);
      },
      [](T* w, const T* g, const Share<S>& share, const T* backup, S* master, bool adopts, S* momentum_buffer,
         int64_t at, int64_t n, const SgdScalars<S>& s, Rounding rounding, bool stream) {
        choose_weights<T>(w, backup, master, adopts, at, rounding, stream, [&](const auto& where) {
          choose_gradients<T>(g, share, [&](const auto& from) {
            choose_bool(momentum_buffer != nullptr,
                        [&](auto m) { restore_sgd<T, m.value>(where, from, momentum_buffer, n, s); });
          });
        });
      },
      [](T* w, const T* g, const Share<S>& share, const T* backup, S* master, bool adopts, S* exp_avg, S* exp_avg_sq,
         int64_t at, int64_t n, const AdamScalars<S>& s, const BiasCorrection<S>& correction, Rounding rounding,
         bool stream) {
        choose_weights<T>(w, backup, master, adopts, at, rounding, stream, [&](const auto& where) {
          choose_gradients<T>(
              g, share, [&](const auto& from) { restore_adam<T>(where, from, exp_avg, exp_avg_sq, n, s, correction); });
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

// The maths of F-SAM and of its fused base optimizers, per element, for host and device.
//
// No torch, no threads, no memory access. `V` is a value: float or double on a GPU, a vector of
// lanes on a CPU (cpu/lanes.h overloads what is used here). `S` is the scalar type of V. Sources:
// Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024 (arXiv 2403.12350), and its
// official code; torch.optim for the bases.
//
// Every line is written as separate multiplications and additions, and all compilers are told not
// to contract them: the kernels wait for memory, so it costs nothing, and each backend gives the
// same bits for the same norm.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FSAM_FN __host__ __device__ __forceinline__
#else
#define FSAM_FN inline __attribute__((always_inline))
#endif

namespace fsam {

// ---- What a value must offer; the scalar versions
// --------------------------------------------------------------

FSAM_FN bool is_nan(float x) {
  return x != x;
}
FSAM_FN bool is_nan(double x) {
  return x != x;
}
FSAM_FN bool is_finite(float x) {
  return x - x == 0;
}
FSAM_FN bool is_finite(double x) {
  return x - x == 0;
}
FSAM_FN float select(bool condition, float a, float b) {
  return condition ? a : b;
}
FSAM_FN double select(bool condition, double a, double b) {
  return condition ? a : b;
}
FSAM_FN float square_root(float x) {
  return ::sqrtf(x);
}
FSAM_FN double square_root(double x) {
  return ::sqrt(x);
}

// ---- The ascent
// ------------------------------------------------------------------------------------------------

// Whether a moving average m exists is known where a loop is compiled (kEma); without one d = g (SAM, ASAM). With one:
//   d = g - sigma * m_prev  the official code
//   d = g - sigma * m_new   Algorithm 1 of the paper (`updated`)
// The flags are the same for all elements, so a branch on them costs nothing beside a memory access; where one decides
// about registers, as on a GPU, a kernel may know it when it is compiled.
template <class S>
struct AscentScalars {
  S inverse_scale;    // 1 / loss scale: gradients are unscaled where they are read
  S sigma;            // projection
  S lmbda;            // decay of the average
  S one_minus_lmbda;  // rounded once, from double
  S step_length;      // rho / (norm + eps); pass B only
  bool adaptive;      // ASAM
  bool updated;       // the noise uses the average that includes g
};

template <class S>
FSAM_FN AscentScalars<S> ascent_scalars(double inverse_scale, double sigma, double lmbda, double step_length,
                                        bool adaptive, bool updated) {
  return {S(inverse_scale), S(sigma), S(lmbda), S(1.0 - lmbda), S(step_length), adaptive, updated};
}

// A gradient as the loss has it, where the loss was scaled.
template <class V, class S>
FSAM_FN V unscaled(V scaled_g, S inverse_scale) {
  return scaled_g * inverse_scale;
}

// rho / (norm + eps), and 0 for a zero norm: no direction, no perturbation, no NaN even where eps
// is 0.
FSAM_FN double perturbation_step_length(double noise_sq, double rho, double eps) {
  return noise_sq > 0 ? rho / (::sqrt(noise_sq) + eps) : 0.0;
}

// NOTE [an unset state is NaN]
// The first finite gradient becomes the average itself (m = g, as in the official code), and
// likewise torch's SGD takes the first gradient as its momentum buffer whatever the dampening.
// Which gradient was the first cannot be known on the host: a step may have been skipped on the
// device because of an inf. So a buffer that has seen no gradient is filled with NaN, and each
// element tells for itself that it is unset. No finite update ever leaves a NaN behind (pass B runs
// only where the norm is finite), so the mark cannot be mistaken; it survives checkpoints and
// resharding, and it costs no flag, no launch and no synchronisation.
template <class V, class S>
FSAM_FN V ema_update(V ema, V g, S lmbda, S one_minus_lmbda) {
  return select(is_nan(ema), g, lmbda * ema + one_minus_lmbda * g);
}

// The value of an average or momentum that may be unset.
template <class V>
FSAM_FN V known(V state) {
  return select(is_nan(state), V(0), state);
}

// The noise component d of the gradient. kSet: the average is known to have seen a gradient.
template <bool kEma, bool kSet = false, class V, class S>
FSAM_FN V noise(V g, V ema, const AscentScalars<S>& s) {
  if constexpr (!kEma) return g;
  return g - s.sigma * (s.updated ? ema_update(ema, g, s.lmbda, s.one_minus_lmbda) : kSet ? ema : known(ema));
}

// The summands of pass A.
template <class V>
struct Statistics {
  V noise_sq{0}, grad_sq{0}, grad_dot_ema{0}, ema_sq{0}, nonfinite{0};
};
constexpr int kStatistics = 5;

// All but the last, of a gradient that is unscaled.
template <bool kEma, bool kSet = false, class V, class S>
FSAM_FN void accumulate_products(Statistics<V>& sums, V w, V g, V ema, const AscentScalars<S>& s) {
  V d = noise<kEma, kSet>(g, ema, s);
  if (s.adaptive) d = w * d;  // (|w| d)^2 = (w d)^2
  sums.noise_sq = sums.noise_sq + d * d;
  sums.grad_sq = sums.grad_sq + g * g;
  if constexpr (kEma) {
    const V m = kSet ? ema : known(ema);
    sums.grad_dot_ema = sums.grad_dot_ema + g * m;
    sums.ema_sq = sums.ema_sq + m * m;
  }
}
template <class V>
FSAM_FN void count_nonfinite(Statistics<V>& sums, V g) {
  sums.nonfinite = sums.nonfinite + select(is_finite(g), V(0), V(1));
}

template <bool kEma, class V, class S>
FSAM_FN void accumulate(Statistics<V>& sums, V w, V scaled_g, V ema, const AscentScalars<S>& s) {
  const V g = unscaled(scaled_g, s.inverse_scale);
  accumulate_products<kEma>(sums, w, g, ema, s);
  count_nonfinite(sums, g);
}

// What pass B adds to a weight: rho * d / (norm + eps), adaptive: rho * |w|^2 * d / (norm + eps); in the order of the
// official code.
template <class V, class S>
FSAM_FN V perturbation(V w, V d, const AscentScalars<S>& s) {
  return (s.adaptive ? w * w * d : d) * s.step_length;
}

// How much of a perturbation is left once the perturbed weights are rounded: the sums that give its norm and its
// cosine with the intended one.
template <class V>
struct Effect {
  V effective_sq{0}, effective_dot_intended{0}, intended_sq{0};
};
constexpr int kEffect = 3;

template <class V>
FSAM_FN void accumulate(Effect<V>& sums, V effective, V intended) {
  sums.effective_sq = sums.effective_sq + effective * effective;
  sums.effective_dot_intended = sums.effective_dot_intended + effective * intended;
  sums.intended_sq = sums.intended_sq + intended * intended;
}

// The average outside an ascent. A gradient that is not finite leaves its element alone: here no norm has been taken
// that could tell.
template <class V, class S>
FSAM_FN V fed(V ema, V scaled_g, S inverse_scale, S lmbda, S one_minus_lmbda) {
  const V g = unscaled(scaled_g, inverse_scale);
  return select(is_finite(g), ema_update(ema, g, lmbda, one_minus_lmbda), ema);
}

// NOTE [masters adopt]
// 16-bit weights with masters are their rounded copies. What others write into a weight counts, and they need not tell:
// writes through p.data (a model averager, clamp_) leave no trace on the tensor. So wherever weights are known not to
// be perturbed, one that is not the rounded copy of its master becomes the master. NaN is the copy of NaN, whatever its
// bits. `rounded`: the master as the weight is stored, widened again.
template <class V>
FSAM_FN V adopted(V master, V rounded, V weight) {
  const V written = select(is_nan(weight), select(is_nan(rounded), master, weight), weight);
  return select(rounded == weight, master, written);
}

// ---- Reuse of the second gradient
// ----------------------------------------------------------------------------------

// NOTE [reuse of the second gradient]
// LookSAM (Liu et al., CVPR 2022) on top of F-SAM. What an ascent adds to a step is the part of its second gradient
// that is orthogonal to the first one, v = g2 - (<g2, g1> / <g1, g1>) g1, and that part changes slowly. So the steps
// between two ascents use g + reuse (|g| / |v|) v, for one gradient each. One buffer serves both: pass B keeps g1 in
// it, and `project` turns it into v. There is no v where its squared norm is 0, which is how it starts.

// <g2, g1> / <g1, g1>: how much of g1 is in g2.
FSAM_FN double projection(double dot, double kept_sq) {
  return kept_sq > 0 ? dot / kept_sq : 0.0;
}

// reuse |g| / |v|, and 0 where there is no v, or where |g| is not finite: such a step is a plain one.
FSAM_FN double reuse_length(double grad_sq, double reused_sq, double reuse, double eps) {
  if (!is_finite(grad_sq) || !is_finite(reused_sq) || !(reused_sq > 0)) return 0.0;
  return reuse * ::sqrt(grad_sq) / (::sqrt(reused_sq) + eps);
}

// The gradient of a step between two ascents; itself where the length is 0, because anything may lie in the place of v.
template <class V, class S>
FSAM_FN V with_reused(V g, V reused, S length) {
  return length == 0 ? g : g + length * reused;
}

// ---- The base updates
// ------------------------------------------------------------------------------------------

template <class S>
struct SgdScalars {
  S inverse_scale, lr, momentum, one_minus_dampening, weight_decay;
  bool nesterov, maximize;
};

template <class S>
FSAM_FN SgdScalars<S> sgd_scalars(double inverse_scale, double lr, double momentum, double dampening,
                                  double weight_decay, bool nesterov, bool maximize) {
  return {S(inverse_scale), S(lr), S(momentum), S(1.0 - dampening), S(weight_decay), nesterov, maximize};
}

// torch.optim.SGD, of a gradient that is unscaled. kMomentum: a buffer exists.
template <bool kMomentum, class V, class S>
FSAM_FN V sgd(V w, V g, V& momentum_buffer, const SgdScalars<S>& s) {
  if (s.maximize) g = -g;
  if (s.weight_decay != 0) g = g + s.weight_decay * w;
  if constexpr (kMomentum) {
    momentum_buffer = select(is_nan(momentum_buffer), g, s.momentum * momentum_buffer + s.one_minus_dampening * g);
    g = s.nesterov ? g + s.momentum * momentum_buffer : momentum_buffer;
  }
  return w - s.lr * g;
}

template <class S>
struct AdamScalars {
  S inverse_scale, weight_decay, keep, one_minus_beta1, beta2, one_minus_beta2, eps;
  bool decoupled, maximize;
};

// keep = 1 - lr * weight_decay: what AdamW's decoupled decay leaves of a weight.
template <class S>
FSAM_FN AdamScalars<S> adam_scalars(double inverse_scale, double lr, double beta1, double beta2, double eps,
                                    double weight_decay, bool decoupled, bool maximize) {
  return {S(inverse_scale), S(weight_decay), S(1.0 - lr * weight_decay),
          S(1.0 - beta1),   S(beta2),        S(1.0 - beta2),
          S(eps),           decoupled,       maximize};
}

// The bias corrections depend on the row's step count: one pair for each row.
template <class S>
struct BiasCorrection {
  S step_size;    // lr / (1 - beta1^step)
  S sqrt_second;  // sqrt(1 - beta2^step)
};

template <class S>
FSAM_FN BiasCorrection<S> bias_correction(double lr, double beta1, double beta2, double step) {
  return {S(lr / (1.0 - ::pow(beta1, step))), S(::sqrt(1.0 - ::pow(beta2, step)))};
}

// torch.optim.Adam, and AdamW where `decoupled`, of a gradient that is unscaled: first the moments and the decay of the
// weight, which is returned.
template <class V, class S>
FSAM_FN V adam_moments(V w, V g, V& exp_avg, V& exp_avg_sq, const AdamScalars<S>& s) {
  if (s.maximize) g = -g;
  if (s.decoupled) {
    w = w * s.keep;
  } else if (s.weight_decay != 0) {
    g = g + s.weight_decay * w;
  }
  exp_avg = exp_avg + s.one_minus_beta1 * (g - exp_avg);
  exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (g * g);
  return w;
}

// How the step divides, for backends that have more than one way to the same bits.
struct PlainDivision {
  template <class V>
  FSAM_FN V root(V x) const {
    return square_root(x);
  }
  template <class V, class S>
  FSAM_FN V corrected(V root, S sqrt_second) const {
    return root / sqrt_second;
  }
  template <class V>
  FSAM_FN V quotient(V a, V b) const {
    return a / b;
  }
};

// Then the step.
template <class V, class S, class Division>
FSAM_FN V adam_step(V w, V exp_avg, V exp_avg_sq, S eps, const BiasCorrection<S>& correction,
                    const Division& division) {
  const V denominator = division.corrected(division.root(exp_avg_sq), correction.sqrt_second) + eps;
  return w - correction.step_size * division.quotient(exp_avg, denominator);
}

template <class V, class S>
FSAM_FN V adam(V w, V g, V& exp_avg, V& exp_avg_sq, const AdamScalars<S>& s, const BiasCorrection<S>& correction) {
  w = adam_moments(w, g, exp_avg, exp_avg_sq, s);
  return adam_step(w, exp_avg, exp_avg_sq, s.eps, correction, PlainDivision{});
}

}  // namespace fsam

// Every op of fsam_ext, with what it mutates: the one list to read.
//
// A backend implements these nine ops and nothing else (fsam_ext/backends/README.md is the contract
// in words). `params` and `grads` are lists with one entry per row; optimizer state comes as flat
// buffers in which row i owns the slice [offsets[i], offsets[i] + params[i].numel()). `offsets` is
// an int64 tensor on the CPU: a list of ten thousand ints would be boxed one by one in every call. `journal`: int64 on
// the CPU; an op adds one to its first element once it has written: NOTE [the journal] in op_arguments.h.

#include "library.h"

FSAM_LIBRARY(FSAM_NAMESPACE, m) {
  // Pass A. Writes stats[0:5] = sum d^2, sum g^2, sum g*m, sum m^2, count of non-finite g, over all
  // rows. `partials` is scratch: 5 values for each chunk of 4096 elements of each row.
  m.def(
      "noise_norm(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor? ema, Tensor? ema_scale, "
      "Tensor? grad_scale, float sigma, float lmbda, bool adaptive, bool ema_updated, "
      "Tensor(a!) partials, Tensor(b!) stats) -> ()");

  // Pass B. Fills the backup, or brings masters up to date with what others wrote into the parameters; then, where
  // stats[0] is finite, updates the EMA where `feeds` and moves the parameters. `effect`: 3 values for each chunk, what
  // rounding leaves of the perturbation. `kept` gets the gradient where the parameters move: NOTE [reuse of the second
  // gradient] in formulas.h.
  m.def(
      "perturb(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? ema, "
      "Tensor(c!)? ema_scale, Tensor(d!) backup, Tensor stats, Tensor? grad_scale, float rho, "
      "Tensor? rho_tensor, float sigma, float lmbda, float eps, bool adaptive, bool ema_updated, "
      "bool feeds, int forward, Tensor(e!)? effect, Tensor(f!)? journal=None, Tensor(g!)? kept=None) -> ()");

  // The EMA without an ascent: in steps that have none, and from the second gradient. grad_sq[0] = sum g^2 in the same
  // pass, where it is given; `partials` is scratch then, a value for each chunk.
  m.def(
      "update_ema(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor(a!) ema, "
      "Tensor(b!)? ema_scale, Tensor? stats, Tensor? grad_scale, Tensor? found_inf, float lmbda, "
      "Tensor(c!)? journal=None, Tensor(d!)? partials=None, Tensor(e!)? grad_sq=None) -> ()");

  // sums[0:2] = sum g k, sum k^2, with k what pass B kept. `partials`: 2 values for each chunk.
  m.def(
      "dots(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor kept, Tensor? grad_scale, "
      "Tensor(a!) partials, Tensor(b!) sums) -> ()");

  // k = g - (sums[0] / sums[1]) k, and kept_sq[0] = sum k^2 of what is stored. `partials`: a value for each chunk.
  // Where stats[0] is not finite k stays and kept_sq[0] is NaN; else where `found_inf` is not zero, or a sum is not
  // finite, there is no k: it may hold anything, and kept_sq[0] is 0.
  m.def(
      "project(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor(a!) kept, Tensor sums, Tensor? stats, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor(b!) partials, Tensor(c!) kept_sq, "
      "Tensor(d!)? journal=None) -> ()");

  // Pass C without a base optimizer: params = backup, bit for bit.
  m.def("restore(Tensor(a!)[] params, Tensor offsets, Tensor backup) -> ()");

  // Pass C with SGD. Without `backup` the update starts from the parameters as they are; masters are written. With
  // `adopts` the parameters are not perturbed, and masters are first brought up to date with them. Where `stats` is
  // given and stats[0] is not finite, or `found_inf` is given and not zero, the pass only restores. Where `reused` is
  // given, the gradient is g + reuse (|g| / (|v| + reuse_eps)) v of it: reuse_sq[0:2] = |g|^2, |v|^2.
  m.def(
      "restore_sgd(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? backup, "
      "Tensor(c!)? momentum_buffer, Tensor? stats, Tensor? grad_scale, Tensor? found_inf, "
      "float lr, Tensor? lr_tensor, float momentum, float dampening, float weight_decay, "
      "bool nesterov, bool maximize, Tensor? rounding, bool adopts=False, "
      "Tensor(d!)? journal=None, Tensor? reused=None, Tensor? reuse_sq=None, float reuse=0.0, "
      "float reuse_eps=0.0) -> ()");

  // Before pass C with Adam: steps[index] += 1 where pass C will update, and each row's bias corrections. `index` names
  // first the members that start a row, in the order of the rows, then the others; corrections[i] is row i's.
  m.def(
      "count_steps(Tensor(a!) steps, Tensor index, Tensor(b!) corrections, Tensor? stats, Tensor? found_inf, "
      "float lr, Tensor? lr_tensor, float beta1, float beta2, Tensor(c!)? journal=None) -> ()");

  // Pass C with Adam or (decoupled) AdamW. corrections[i] = lr / (1 - beta1^t), sqrt(1 - beta2^t) for row i, which is
  // at its t-th update: what count_steps writes.
  m.def(
      "restore_adam(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? backup, "
      "Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor corrections, Tensor? stats, Tensor? grad_scale, "
      "Tensor? found_inf, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled, bool maximize, Tensor? rounding, "
      "bool adopts=False, Tensor(e!)? journal=None, Tensor? reused=None, Tensor? reuse_sq=None, "
      "float reuse=0.0, float reuse_eps=0.0) -> ()");

  // Asks for huge pages behind a CPU buffer, before it is touched; no backend op.
  m.def("advise_huge_pages(Tensor buffer) -> ()");

  // Parameters that the ops above take in the place of lists, under their `offsets`: NOTE [held parameters] in held.h.
  // `release` takes the address of the offsets' data; whoever held them may be on the way out.
  m.def("can_hold() -> bool");
  m.def("hold(Tensor[] params, Tensor offsets) -> ()");
  m.def("release(int address) -> ()");
  // Whether each is laid out as it was when it was held (and lies where it did, if asked); lies there and has a
  // gradient; and that lies where it did, in the same order.
  m.def("have_their_forms(Tensor offsets, bool in_place) -> bool");
  m.def("have_grads(Tensor offsets) -> bool");
  m.def("in_place(Tensor offsets) -> bool");
  // Tells autograd that the parameters were written to.
  m.def("written(Tensor offsets) -> ()");
  // For other libraries: the address of a HeldParameters, or 0.
  m.def("held_parameters(Tensor offsets) -> int");

  // The instruction set that the CPU kernels use here; no backend op.
  m.def("cpu_isa() -> str");
}

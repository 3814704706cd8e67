// Parameters that C++ holds on to between calls, so that a step need not bring their lists from Python.
//
// NOTE [held parameters]
// With many small tensors a step's time is their way from Python: a third of a microsecond for each tensor and list of
// each op call, and as much again for each look whether a gradient is still where it was. So an optimizer's segment may
// `hold` its parameters once. The ops then take empty lists and the segment's `offsets`, under which the parameters are
// held; the gradients are those that the last look found, or else those that the parameters have at the time of the
// call. Nothing is trusted to have stayed as it was: each pass looks whether a parameter still has the form that the
// flat state was laid out for, and what no look has found is read anew in every call, as it is from lists.
//
// NOTE [a look serves a pass]
// To read a tensor's shape, dtype and address costs as much as the kernel does on a small one, and a pass would do it
// twice or three times: in its look and in each op. So the look keeps what it found, in the form that ops need, until
// the next look, or until the parameters are `written`. It keeps the gradients too, lest a signal handler free what an
// op is about to read. A pass begins with the one and ends with the other. What an interrupt cuts short goes on after a
// look: Transaction.resume.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "tensor_list.h"
#include "tensor_table.h"

namespace fsam {

// What a look has found, for the ops: NOTE [a look serves a pass]. Plain data, as HeldParameters is, where Arguments
// (op_arguments.h) are not.
struct Found {
  const Row* rows;  // with gradients that lie in the order of their parameters
  int64_t chunks, numel, flat_numel;
  int32_t dtype;
  Place place;
};

// NOTE [symbols outside the stable ABI]
// The stable ABI knows no .grad, no version counter and no lazy negation. These functions of libtorch are declared by
// their names in the binary instead, weakly: a torch that lacks them loads this library all the same, and then nothing
// is held. A name does not tell a function's result, so fsam_ext/step/held.py allows only those releases of torch whose
// headers were read.
extern "C" {
// const at::Tensor& c10::TensorImpl::grad() const; the tensor is undefined where there is no gradient.
[[gnu::weak, gnu::visibility("default")]] AtenTensorHandle fsam_grad_of(const void* impl) __asm__(
    "_ZNK3c1010TensorImpl4gradEv");
// void torch::autograd::impl::bump_version(const at::Tensor&).
[[gnu::weak, gnu::visibility("default")]] void fsam_bump_version(AtenTensorHandle tensor) __asm__(
    "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE");
// bool at::native::is_neg(const at::Tensor&): whether the values in memory have the wrong sign, which the dispatcher
// mends where it sees the tensor.
[[gnu::weak, gnu::visibility("default")]] bool fsam_is_negated(AtenTensorHandle tensor) __asm__(
    "_ZN2at6native6is_negERKNS_6TensorE");
}

// The gradient of a tensor, or null where it has none.
inline AtenTensorHandle grad_of(AtenTensorHandle tensor) {
  const AtenTensorHandle grad = fsam_grad_of(object_of(tensor));
  bool defined;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(grad, &defined));
  return defined ? grad : nullptr;
}

// What the library that holds parameters tells the others of them: plain data, because they may be compiled apart.
struct HeldParameters {
  const AtenTensorHandle* params;
  // Where each one's gradient was kept when it was held. Only to be fetched: nobody knows whether it is still there.
  const AtenTensorHandle* grads;
  size_t size;
  // Null where no look has found every gradient as ops need it.
  const Found* found = nullptr;

  // To be called before parameter i and its gradient are looked at. Each turn asks for the next link of a chain that it
  // may only follow once the one before has come: NOTE [tensors are fetched ahead].
  void fetch_ahead(size_t i) const {
    if (i + 2 * kFetchedAhead < size) {
      fetch(params[i + 2 * kFetchedAhead]);
      __builtin_prefetch(grads[i + 2 * kFetchedAhead]);
    }
    if (i + kFetchedAhead < size) fetch(fsam_grad_of(object_of(params[i + kFetchedAhead])));
  }
};

}  // namespace fsam

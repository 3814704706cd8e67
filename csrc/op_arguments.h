// From the tensors of an op call to plain pointers, checked: shared by the bindings of every C++
// backend.
//
// All checks of a call come before its first write.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "average.h"
#include "formulas.h"
#include "held.h"
#include "kept.h"
#include "storage.h"
#include "tensor_list.h"
#include "tensor_table.h"

namespace fsam {

using torch::stable::Tensor;
using Tensors = TensorList;
using OptionalTensor = std::optional<Tensor>;

// Comparing the shim's numbers is cheap; converting them to ScalarType asks the shim for every
// dtype in turn.
template <class AnyTensor>
int32_t dtype_of(const AnyTensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}
template <class AnyTensor>
int32_t layout_of(const AnyTensor& tensor) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  return layout;
}

template <class T>
int32_t dtype_number() {
  if constexpr (std::is_same_v<T, double>) return aoti_torch_dtype_float64();
  if constexpr (std::is_same_v<T, float>) return aoti_torch_dtype_float32();
  if constexpr (std::is_same_v<T, bfloat16>) return aoti_torch_dtype_bfloat16();
  if constexpr (std::is_same_v<T, half>) return aoti_torch_dtype_float16();
  if constexpr (std::is_same_v<T, int8_t>) return aoti_torch_dtype_int8();
  if constexpr (std::is_same_v<T, int64_t>) return aoti_torch_dtype_int64();
}
template <class T>
const char* dtype_name() {
  if constexpr (std::is_same_v<T, double>) return "float64";
  if constexpr (std::is_same_v<T, float>) return "float32";
  if constexpr (std::is_same_v<T, bfloat16>) return "bfloat16";
  if constexpr (std::is_same_v<T, half>) return "float16";
  if constexpr (std::is_same_v<T, int8_t>) return "int8";
  if constexpr (std::is_same_v<T, int64_t>) return "int64";
}

// Whether the elements fill one block of memory without gaps or overlap, in any order of the
// dimensions.
inline bool is_dense(ListedTensor tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.push_back({strides[d], sizes[d]});
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// The parameters of a call and their gradients: lists, or what is held under the offsets.
class Rows {
 public:
  Rows(const Tensors& params, const Tensors* grads, const Tensor& offsets)
      : params_(params.data()), size_(params.size()), grads_(grads ? grads->data() : nullptr) {
    if (size_ > 0 || offsets.numel() == 0) return;
    StableIValue argument = torch::stable::detail::from(offsets);
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fsam_ext::held_parameters", "", &argument, TORCH_ABI_VERSION));
    held_ = reinterpret_cast<const HeldParameters*>(torch::stable::detail::to<int64_t>(argument));
    if (!held_) return;
    params_ = held_->params;
    size_ = held_->size;
  }

  size_t size() const { return size_; }
  // What was found when they were looked at, or null.
  const Found* found() const { return held_ ? held_->found : nullptr; }
  // To be called before row i is looked at.
  void fetch_ahead(size_t i) const {
    if (held_) {
      held_->fetch_ahead(i);
    } else if (i + kFetchedAhead < size_) {
      fetch(params_[i + kFetchedAhead]);
      if (grads_) fetch(grads_[i + kFetchedAhead]);
    }
  }
  ListedTensor param(size_t i) const { return ListedTensor(params_[i]); }
  ListedTensor grad(size_t i) const {
    if (!held_) return ListedTensor(grads_[i]);
    const AtenTensorHandle grad = grad_of(params_[i]);
    STD_TORCH_CHECK(grad, "fsam_ext: grads[", i, "] is missing; each parameter of a call needs a gradient");
    return ListedTensor(grad);
  }

 private:
  const AtenTensorHandle* params_;
  size_t size_;
  const AtenTensorHandle* grads_;
  const HeldParameters* held_ = nullptr;
};

// The rows of a call, and what must live as long as they are in use.
struct Arguments {
  TensorTable table;
  int32_t dtype = 0;
  Place place{};
  int64_t flat_numel = 0;  // how many elements the flat buffers need
  std::vector<Tensor> reordered_grads;
};

// NOTE [gradients follow the parameter's layout]
// The kernels walk parameters and gradients as flat memory, so equal positions must hold equal
// indices. autograd keeps it so; a gradient set by hand, or made by an op that changed the memory
// format, may not. Such a gradient (and no other) is copied into the parameter's order for the time
// of the call.
inline Arguments arguments(const Tensors& params, const Tensors* grads, const Tensor& offsets, bool on_cpu) {
  const auto check_strided = [](ListedTensor tensor, const char* list, size_t i) {
    STD_TORCH_CHECK(layout_of(tensor) == aoti_torch_layout_strided(), "fsam_ext: ", list, "[", i,
                    "] is sparse; only dense (strided) tensors are supported: use sparse=False, or to_dense()");
  };
  const Rows rows(params, grads, offsets);
  STD_TORCH_CHECK(offsets.is_cpu() && dtype_of(offsets) == aoti_torch_dtype_int64() && offsets.is_contiguous() &&
                      offsets.numel() == int64_t(rows.size()),
                  "fsam_ext: offsets must be a contiguous int64 tensor on the CPU with one entry "
                  "for each of the ",
                  rows.size(), " parameters");
  STD_TORCH_CHECK(!grads || grads->size() == params.size(), "fsam_ext: ", params.size(), " params but ",
                  grads ? grads->size() : 0, " grads; each parameter of a call needs a gradient");

  Arguments result;
  if (rows.size() == 0) return result;
  if (const Found* found = rows.found(); found && grads && found->place.on_cpu == on_cpu) {
    result.table = {{found->rows, found->rows + rows.size()}, found->chunks, found->numel};
    result.dtype = found->dtype;
    result.place = found->place;
    result.flat_numel = found->flat_numel;
    return result;
  }
  const int64_t* offset = static_cast<const int64_t*>(offsets.data_ptr());
  result.dtype = dtype_of(rows.param(0));
  result.place = {rows.param(0).is_cpu(), rows.param(0).get_device_index()};
  STD_TORCH_CHECK(result.place.on_cpu == on_cpu,
                  "fsam_ext: params[0] is on another device than the backend that was called serves");
  // Row i, checked. Its gradient is still to be found where it lies in another order.
  const auto row = [&](size_t i) -> Row {
    rows.fetch_ahead(i);
    const ListedTensor param = rows.param(i);
    check_strided(param, "params", i);
    STD_TORCH_CHECK(dtype_of(param) == result.dtype && result.place.holds(param), "fsam_ext: params[", i,
                    "] differs from params[0] in dtype or device; make one call for each dtype and device");
    STD_TORCH_CHECK(is_dense(param), "fsam_ext: params[", i,
                    "] has gaps or overlaps in memory; only dense strides are supported: call "
                    ".contiguous() on it");
    STD_TORCH_CHECK(param.data_ptr() || param.numel() == 0, "fsam_ext: params[", i,
                    "] has no memory of its own; materialise it");
    STD_TORCH_CHECK(offset[i] >= 0, "fsam_ext: offsets must not be negative");
    Row row{param.data_ptr(), nullptr, param.numel(), offset[i], 0};
    if (!grads) return row;
    const ListedTensor grad = rows.grad(i);
    check_strided(grad, "grads", i);
    STD_TORCH_CHECK(dtype_of(grad) == result.dtype, "fsam_ext: grads[", i,
                    "] has another dtype than its parameter; convert it");
    STD_TORCH_CHECK(result.place.holds(grad), "fsam_ext: grads[", i,
                    "] is on another device than its parameter; move it");
    STD_TORCH_CHECK(same_sizes(param, grad), "fsam_ext: grads[", i, "] has another shape than its parameter");
    STD_TORCH_CHECK(grad.data_ptr() || grad.numel() == 0, "fsam_ext: grads[", i,
                    "] has no memory of its own; give its values to the op");
    if (same_order(param, grad)) row.grad = grad.data_ptr();
    return row;
  };
  result.table.rows.resize(rows.size());
  std::atomic<bool> refused = false;
  for_tensors(rows.size(), [&](int64_t first, int64_t last) {
    try {
      for (int64_t i = first; i < last; ++i) result.table.rows[i] = row(i);
    } catch (...) {  // is thrown again below: for the first row that is refused, and to the caller
      refused = true;
    }
  });
  for (size_t i = 0; i < rows.size(); ++i) {
    Row& found = result.table.rows[i];
    if (refused) found = row(i);
    if (grads && !found.grad && found.numel > 0) {
      Tensor copy = torch::stable::empty_like(rows.param(i).owned());
      torch::stable::copy_(copy, rows.grad(i).owned());
      found.grad = copy.data_ptr();
      result.reordered_grads.push_back(std::move(copy));
    }
    result.flat_numel = std::max(result.flat_numel, found.offset + found.numel);
  }
  result.table.number_chunks();
  return result;
}

// Calls call(T{}) with the storage type of the parameters.
template <class Call>
void dispatch_storage(const Arguments& args, const Call& call) {
  if (args.table.rows.empty()) return;
  if (args.dtype == dtype_number<float>()) {
    call(float{});
  } else if (args.dtype == dtype_number<double>()) {
    call(double{});
  } else if (args.dtype == dtype_number<bfloat16>()) {
    call(bfloat16{});
  } else if (args.dtype == dtype_number<half>()) {
    call(half{});
  } else {
    STD_TORCH_CHECK(false, "fsam_ext: params[0] must be float64, float32, bfloat16 or float16");
  }
}

// The data of a tensor of element type E with at least `numel` elements.
template <class E>
E* data_of(const Tensor& tensor, const char* name, int64_t numel, Place place) {
  STD_TORCH_CHECK(
      place.holds(tensor) && dtype_of(tensor) == dtype_number<E>() && tensor.is_contiguous() && tensor.numel() >= numel,
      "fsam_ext: ", name, " must be a contiguous ", dtype_name<E>(), " tensor of at least ", numel,
      " elements on the parameters' device");
  return static_cast<E*>(tensor.data_ptr());
}
template <class E>
E* data_of(const OptionalTensor& tensor, const char* name, int64_t numel, Place place) {
  return tensor.has_value() ? data_of<E>(*tensor, name, numel, place) : nullptr;
}

// The data of a flat state buffer of element type E, or null where there is none.
template <class E, class MaybeTensor>
E* flat_data(const MaybeTensor& flat, const char* name, const Arguments& args) {
  return data_of<E>(flat, name, args.flat_numel, args.place);
}

// The average, in whichever type stores it.
template <class S>
Average average_of(const OptionalTensor& ema, const OptionalTensor& ema_scale, const Arguments& args) {
  if (!ema.has_value()) return {};
  const int32_t dtype = dtype_of(*ema);
  if (dtype == dtype_number<S>()) return {AverageStorage::full, flat_data<S>(ema, "ema", args)};
  if (sizeof(S) == 4 && dtype == dtype_number<bfloat16>()) {
    return {AverageStorage::bfloat16, flat_data<bfloat16>(ema, "ema", args)};
  }
  STD_TORCH_CHECK(sizeof(S) == 4 && dtype == dtype_number<int8_t>(),
                  "fsam_ext: ema must be float32, bfloat16 or int8 (float64 for float64 parameters)");
  STD_TORCH_CHECK(ema_scale.has_value(), "fsam_ext: an int8 ema needs ema_scale, one float32 for each ", kQuantized,
                  " elements");
  for (const Row& row : args.table.rows) {
    STD_TORCH_CHECK(row.offset % kQuantized == 0, "fsam_ext: with an int8 ema each offset must be a multiple of ",
                    kQuantized);
  }
  return {AverageStorage::int8, flat_data<int8_t>(ema, "ema", args),
          data_of<float>(ema_scale, "ema_scale", (args.flat_numel + kQuantized - 1) / kQuantized, args.place)};
}

// What is kept of gradients, under the name that the op has for it.
template <class S>
Kept kept_of(const OptionalTensor& kept, const char* name, const Arguments& args) {
  if (!kept.has_value()) return {};
  const int32_t dtype = dtype_of(*kept);
  if (sizeof(S) == 4 && dtype == dtype_number<bfloat16>()) return {flat_data<bfloat16>(kept, name, args), true};
  STD_TORCH_CHECK(dtype == dtype_number<S>(), "fsam_ext: ", name,
                  " must be float32 or bfloat16 (float64 for float64 parameters)");
  return {flat_data<S>(kept, name, args), false};
}

// What an update reuses.
template <class S>
Reused reused_of(const OptionalTensor& reused, const OptionalTensor& reuse_sq, const Arguments& args) {
  if (!reused.has_value()) return {};
  STD_TORCH_CHECK(reuse_sq.has_value(), "fsam_ext: reused needs reuse_sq, the squared norms of the gradient and of it");
  return {kept_of<S>(reused, "reused", args), data_of<double>(reuse_sq, "reuse_sq", 2, args.place)};
}

// Where each chunk's sum of squares goes, or null where `grad_sq` is not asked for.
template <class S>
S* square_sums(const OptionalTensor& partials, const OptionalTensor& grad_sq, const Arguments& args) {
  if (!grad_sq.has_value()) return nullptr;
  STD_TORCH_CHECK(partials.has_value(), "fsam_ext: grad_sq needs partials, an element for each chunk");
  return data_of<S>(partials, "partials", args.table.chunks, args.place);
}

// Where the unperturbed weights are: a copy in the dtype of the parameters, or float32 masters of 16-bit parameters.
template <class T>
struct Saved {
  T* backup = nullptr;
  compute_t<T>* master = nullptr;
};
template <class T>
Saved<T> saved_weights(const OptionalTensor& backup, const Arguments& args) {
  if (!backup.has_value()) return {};
  if (sizeof(T) == 2 && dtype_of(*backup) == dtype_number<float>()) {
    return {nullptr, flat_data<compute_t<T>>(backup, "backup", args)};
  }
  return {flat_data<T>(backup, "backup", args), nullptr};
}

// NOTE [the journal]
// An exception such as Ctrl-C may reach Python between the end of an op and the line after it, and a line before the op
// may be reached without it. So the op itself counts, on the host and within its call, that it has written
// (fsam_ext/step/transaction.py); what refuses its arguments throws before that.
class Journal {
 public:
  explicit Journal(const OptionalTensor& cell) : count_(data_of<int64_t>(cell, "journal", 1, {true, 0})) {}
  void wrote() const {
    if (count_) ++*count_;
  }

 private:
  int64_t* count_;
};

// The bias corrections of each row, two scalars in the type of the arithmetic.
template <class S>
const BiasCorrection<S>* corrections_of(const Tensor& corrections, const Arguments& args) {
  static_assert(sizeof(BiasCorrection<S>) == 2 * sizeof(S));
  return reinterpret_cast<const BiasCorrection<S>*>(
      data_of<S>(corrections, "corrections", 2 * int64_t(args.table.rows.size()), args.place));
}

// What count_steps works on, checked. The entries of `index` are positions in `steps`.
template <class S>
struct StepCounts {
  float* steps;
  const int64_t* index;
  int64_t members, rows;  // rows <= members
  BiasCorrection<S>* corrections;
  Place place;
};
template <class S>
StepCounts<S> step_counts(const Tensor& steps, const Tensor& index, const Tensor& corrections) {
  const Place place{steps.is_cpu(), steps.get_device_index()};
  const int64_t members = index.numel(), rows = corrections.numel() / 2;
  STD_TORCH_CHECK(
      corrections.dim() == 2 && corrections.size(1) == 2 && rows <= members,
      "fsam_ext: corrections must have the shape [rows, 2] with at most as many rows as index has entries, ", members);
  return {data_of<float>(steps, "steps", 0, place),
          data_of<int64_t>(index, "index", 0, place),
          members,
          rows,
          reinterpret_cast<BiasCorrection<S>*>(data_of<S>(corrections, "corrections", 0, place)),
          place};
}

// Calls call(S{}) with the type of the arithmetic that a tensor of state is in.
template <class Call>
void dispatch_state(const Tensor& state, const Call& call) {
  if (dtype_of(state) == dtype_number<double>()) {
    call(double{});
  } else {
    call(float{});
  }
}

template <class T>
Forward forward_of(int64_t forward) {
  STD_TORCH_CHECK(forward >= 0 && forward <= 2 && (forward == 0 || sizeof(T) <= 4),
                  "fsam_ext: forward must be 0 (as stored), 1 (bfloat16) or 2 (float16), and 0 for float64");
  return Forward(forward);
}

}  // namespace fsam

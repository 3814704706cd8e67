// From the tensors of an op call to plain pointers, checked: shared by the bindings of every C++
// backend.
//
// All checks of a call come before its first write.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "formulas.h"
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
}

// Calls call(T{}) with the storage type of the parameters.
template <class Call>
void dispatch_storage(const Tensors& params, const Call& call) {
  if (params.empty()) return;
  const int32_t dtype = dtype_of(params[0]);
  if (dtype == dtype_number<float>()) {
    call(float{});
  } else if (dtype == dtype_number<double>()) {
    call(double{});
  } else if (dtype == dtype_number<bfloat16>()) {
    call(bfloat16{});
  } else if (dtype == dtype_number<half>()) {
    call(half{});
  } else {
    STD_TORCH_CHECK(false, "fsam_ext: params[0] must be float64, float32, bfloat16 or float16");
  }
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

inline bool same_sizes(ListedTensor a, ListedTensor b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// Whether equal positions in memory hold equal indices. A stride along a dimension of size 1 means
// nothing.
inline bool same_order(ListedTensor a, ListedTensor b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && x[d] != y[d]) return false;
  return true;
}

// The rows of a call, and what must live as long as they are in use.
struct Arguments {
  TensorTable table;
  std::vector<Tensor> reordered_grads;
};

// NOTE [gradients follow the parameter's layout]
// The kernels walk parameters and gradients as flat memory, so equal positions must hold equal
// indices. autograd keeps it so; a gradient set by hand, or made by an op that changed the memory
// format, may not. Such a gradient (and no other) is copied into the parameter's order for the time
// of the call.
inline Arguments arguments(const Tensors& params, const Tensors* grads, const Tensor& offsets) {
  const auto check_strided = [](ListedTensor tensor, const char* list, size_t i) {
    STD_TORCH_CHECK(layout_of(tensor) == aoti_torch_layout_strided(), "fsam_ext: ", list, "[", i,
                    "] is sparse; only dense (strided) tensors are supported: use sparse=False, or to_dense()");
  };
  STD_TORCH_CHECK(offsets.is_cpu() && dtype_of(offsets) == aoti_torch_dtype_int64() && offsets.is_contiguous() &&
                      offsets.numel() == int64_t(params.size()),
                  "fsam_ext: offsets must be a contiguous int64 tensor on the CPU with one entry "
                  "for each of the ",
                  params.size(), " parameters");
  STD_TORCH_CHECK(!grads || grads->size() == params.size(), "fsam_ext: ", params.size(), " params but ",
                  grads ? grads->size() : 0, " grads; each parameter of a call needs a gradient");

  Arguments result;
  result.table.rows.reserve(params.size());
  const int64_t* offset = static_cast<const int64_t*>(offsets.data_ptr());
  const int32_t dtype = params.empty() ? 0 : dtype_of(params[0]);
  const int32_t device = params.empty() ? 0 : params[0].get_device_index();
  for (size_t i = 0; i < params.size(); ++i) {
    const ListedTensor param = params[i];
    check_strided(param, "params", i);
    STD_TORCH_CHECK(dtype_of(param) == dtype && param.get_device_index() == device, "fsam_ext: params[", i,
                    "] differs from params[0] in dtype or device; make one call for each dtype and device");
    STD_TORCH_CHECK(is_dense(param), "fsam_ext: params[", i,
                    "] has gaps or overlaps in memory; only dense strides are supported: call "
                    ".contiguous() on it");
    const void* grad_data = nullptr;
    if (grads) {
      const ListedTensor grad = (*grads)[i];
      check_strided(grad, "grads", i);
      STD_TORCH_CHECK(dtype_of(grad) == dtype, "fsam_ext: grads[", i,
                      "] has another dtype than its parameter; convert it");
      STD_TORCH_CHECK(grad.is_cpu() == param.is_cpu() && grad.get_device_index() == device, "fsam_ext: grads[", i,
                      "] is on another device than its parameter; move it");
      STD_TORCH_CHECK(same_sizes(param, grad), "fsam_ext: grads[", i, "] has another shape than its parameter");
      if (same_order(param, grad)) {
        grad_data = grad.data_ptr();
      } else {
        Tensor copy = torch::stable::empty_like(param.owned());
        torch::stable::copy_(copy, grad.owned());
        grad_data = copy.data_ptr();
        result.reordered_grads.push_back(std::move(copy));
      }
    }
    result.table.add(param.data_ptr(), grad_data, param.numel(), offset[i]);
  }
  return result;
}

// The data of a flat state buffer of element type E, or null where there is none.
template <class E>
E* flat_data(const OptionalTensor& flat, const char* name, const TensorTable& table, bool on_cpu) {
  if (!flat.has_value()) return nullptr;
  int64_t needed = 0;
  for (const Row& row : table.rows) {
    STD_TORCH_CHECK(row.offset >= 0, "fsam_ext: offsets must not be negative");
    needed = std::max(needed, row.offset + row.numel);
  }
  STD_TORCH_CHECK(flat->is_cpu() == on_cpu && dtype_of(*flat) == dtype_number<E>() && flat->is_contiguous() &&
                      flat->numel() >= needed,
                  "fsam_ext: ", name, " must be a contiguous buffer of at least ", needed,
                  " elements on the parameters' device, in the dtype of the state (float32; "
                  "float64 for float64 parameters; the "
                  "backup has the parameters' dtype)");
  return static_cast<E*>(flat->data_ptr());
}

// The data of a small tensor of element type E with at least `numel` elements.
template <class E>
E* small_data(const Tensor& tensor, const char* name, int64_t numel, bool on_cpu) {
  STD_TORCH_CHECK(tensor.is_cpu() == on_cpu && dtype_of(tensor) == dtype_number<E>() && tensor.is_contiguous() &&
                      tensor.numel() >= numel,
                  "fsam_ext: ", name, " must be a contiguous ", sizeof(E) == 8 ? "float64" : "float32",
                  " tensor of at least ", numel, " elements on the parameters' device");
  return static_cast<E*>(tensor.data_ptr());
}
template <class E>
E* small_data(const OptionalTensor& tensor, const char* name, int64_t numel, bool on_cpu) {
  return tensor.has_value() ? small_data<E>(*tensor, name, numel, on_cpu) : nullptr;
}

inline Ema ema_kind(bool has_ema, bool ema_updated) {
  return !has_ema ? Ema::none : ema_updated ? Ema::updated : Ema::previous;
}

}  // namespace fsam

// A list of tensors as an op receives it, read without a heap allocation for each one.
//
// NOTE [tensor lists are read as handles]
// std::vector<torch::stable::Tensor> makes a shared pointer, with a control block of its own, around each tensor
// handle. With ten thousand small tensors that and its release cost more than the pass itself. The handles are enough
// here: the list owns them for the time of the call.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "threads.h"

namespace fsam {

// NOTE [tensors are fetched ahead]
// A look at thousands of tensors waits for memory: what torch knows of each is in objects of their own. A handle points
// to an at::Tensor, which is a pointer to such an object of about four lines of cache, with the links to storage,
// gradient and version in the first one. Asking some turns ahead for what will be read takes a third off the time of a
// look; where a torch has it elsewhere, nothing but time is lost.
constexpr size_t kFetchedAhead = 8;

inline const char* object_of(AtenTensorHandle tensor) {
  return *reinterpret_cast<const char* const*>(tensor);
}
inline void fetch_links(AtenTensorHandle tensor) {
  __builtin_prefetch(object_of(tensor));
}
inline void fetch(AtenTensorHandle tensor) {
  for (int line = 0; line < 4; ++line) __builtin_prefetch(object_of(tensor) + 64 * line);
}

// Calls visit(first, last) for parts of a list of tensors, on torch's threads: they wait for memory side by side. Fewer
// tensors than this are not worth waking one for. No Python and no dispatcher in there: threads have their own state.
constexpr int64_t kTensorsPerTask = 256;

template <class Visit>
void for_tensors(int64_t size, const Visit& visit) {
  for_parts(size, kTensorsPerTask, false, visit);
}

// Whether holds(i) is true of each i below `size`.
template <class Holds>
bool all_tensors(int64_t size, const Holds& holds) {
  std::atomic<bool> result = true;
  for_tensors(size, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      if (!holds(i)) return result.store(false, std::memory_order_relaxed);
  });
  return result;
}

// One tensor of a list: valid as long as the list.
class ListedTensor {
 public:
  explicit ListedTensor(AtenTensorHandle handle) : handle_(handle) {}

  AtenTensorHandle get() const { return handle_; }
  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  int32_t dtype() const { return ask<int32_t>(aoti_torch_get_dtype); }
  void* data_ptr() const { return ask<void*>(aoti_torch_get_data_ptr); }
  int32_t get_device_index() const { return ask<int32_t>(aoti_torch_get_device_index); }
  int32_t device_type() const { return ask<int32_t>(aoti_torch_get_device_type); }
  bool is_cpu() const { return device_type() == aoti_torch_device_type_cpu(); }
  torch::headeronly::IntHeaderOnlyArrayRef sizes() const {
    return {ask<int64_t*>(aoti_torch_get_sizes), size_t(dim())};
  }
  torch::headeronly::IntHeaderOnlyArrayRef strides() const {
    return {ask<int64_t*>(aoti_torch_get_strides), size_t(dim())};
  }
  // dim() numbers each.
  std::pair<const int64_t*, const int64_t*> sizes_and_strides() const {
    return {ask<int64_t*>(aoti_torch_get_sizes), ask<int64_t*>(aoti_torch_get_strides)};
  }
  torch::stable::Tensor owned() const {
    AtenTensorHandle copy;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &copy));
    return torch::stable::Tensor(copy);
  }

 private:
  template <class R, class Getter>
  R ask(Getter getter) const {
    R result;
    TORCH_ERROR_CODE_CHECK(getter(handle_, &result));
    return result;
  }
  AtenTensorHandle handle_;
};

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

// Where the tensors of a call are.
struct Place {
  bool on_cpu;
  int32_t index;

  template <class AnyTensor>
  bool holds(const AnyTensor& tensor) const {
    return tensor.is_cpu() == on_cpu && (on_cpu || tensor.get_device_index() == index);
  }
};

class TensorList {
 public:
  explicit TensorList(StableListHandle list) {
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  TensorList(TensorList&& other) noexcept : handles_(std::exchange(other.handles_, {})) {}
  TensorList& operator=(TensorList&&) = delete;
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  size_t size() const { return handles_.size(); }
  bool empty() const { return handles_.empty(); }
  ListedTensor operator[](size_t i) const { return ListedTensor(handles_[i]); }
  const AtenTensorHandle* data() const { return handles_.data(); }

 private:
  std::vector<AtenTensorHandle> handles_;
};

}  // namespace fsam

// What TORCH_BOX asks to make an argument of this type.
HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct ToImpl<fsam::TensorList> {
  static fsam::TensorList call(StableIValue value, uint64_t, bool) {
    return fsam::TensorList(to<StableListHandle>(value));
  }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)

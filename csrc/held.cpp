// The ops around held parameters: NOTE [held parameters] in held.h.

#include "held.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "library.h"
#include "op_arguments.h"
#include "words.h"

namespace fsam {
namespace {

// Null for tensors without elements, and for those without memory of their own: sparse ones.
const void* address_of(AtenTensorHandle tensor) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  return layout == aoti_torch_layout_strided() ? ListedTensor(tensor).data_ptr() : nullptr;
}

// Whether a gradient's values can be read from its memory, at `address`, as they are. One that a subclass holds, that
// is zero without memory, or whose sign is yet to be changed goes to the ops in a list, where the dispatcher makes it
// plain.
bool is_plain(AtenTensorHandle grad, const void* address) {
  return (address || ListedTensor(grad).numel() == 0) && !fsam_is_negated(grad);
}

// Whether an op may read a gradient as it lies.
bool is_as_needed(ListedTensor param, ListedTensor grad) {
  return layout_of(grad) == aoti_torch_layout_strided() && dtype_of(grad) == dtype_of(param) &&
         Place{param.is_cpu(), param.get_device_index()}.holds(grad) && same_sizes(param, grad) &&
         same_order(param, grad);
}

// Where a parameter and its gradient lie.
struct Addresses {
  const void* param;
  const void* grad;
};

// What the flat state was laid out for: dtype, device, sizes and strides of each tensor, one after the other.
class Forms {
 public:
  void add(ListedTensor tensor) {
    starts_.push_back(numbers_.size());
    visit(tensor, [this](int64_t number) {
      numbers_.push_back(number);
      return true;
    });
  }

  // Whether a tensor has the form that the one added as number i had.
  bool holds(size_t i, ListedTensor tensor) const {
    const int64_t* next = numbers_.data() + starts_[i];
    return visit(tensor, [&next](int64_t number) { return number == *next++; });
  }

 private:
  // The number of dimensions comes before sizes and strides, so a walk never reads beyond a form.
  template <class Number>
  static bool visit(ListedTensor tensor, const Number& number) {
    if (!number(tensor.dtype()) || !number(tensor.device_type()) || !number(tensor.get_device_index())) return false;
    const int64_t dim = tensor.dim();
    if (!number(dim)) return false;
    const auto [sizes, strides] = tensor.sizes_and_strides();
    for (int64_t d = 0; d < dim; ++d)
      if (!number(sizes[d]) || !number(strides[d])) return false;
    return true;
  }
  std::vector<int64_t> numbers_;
  std::vector<size_t> starts_;
};

class Held {
 public:
  Held(TensorList&& params, const Tensor& offsets) : params_(std::move(params)) {
    addresses_.reserve(params_.size());
    for (size_t i = 0; i < params_.size(); ++i) {
      const AtenTensorHandle param = params_[i].get();
      const AtenTensorHandle grad = grad_of(param);
      addresses_.push_back({address_of(param), grad ? address_of(grad) : nullptr});
      forms_.add(params_[i]);
      grads_.push_back(fsam_grad_of(object_of(param)));
    }
    view_ = {params_.data(), grads_.data(), params_.size()};
    seen_.resize(params_.size());
    if (!params_.empty()) words_ = FormWords(params_[0]);
    if (offsets.numel() == int64_t(params_.size())) lay_out(offsets);
  }
  Held(const Held&) = delete;
  ~Held() {
    for (AtenTensorHandle grad : kept_) aoti_torch_delete_tensor_object(grad);
  }

  bool have_their_forms(bool in_place) {
    forget();
    return all_tensors(params_.size(), [this, in_place](size_t i) {
      if (i + kFetchedAhead < params_.size()) fetch(params_[i + kFetchedAhead].get());
      return (!in_place || address_of(params_[i].get()) == addresses_[i].param) && forms_.holds(i, params_[i]);
    });
  }

  bool have_grads() {
    forget();
    std::atomic<bool> as_needed = !arguments_.table.rows.empty();
    const bool result = all_tensors(params_.size(), [&](size_t i) {
      const auto grad = look(i);
      if (!grad || !as_needed.load(std::memory_order_relaxed)) return grad.has_value();
      if (grad->is_as_needed) {
        arguments_.table.rows[i].grad = grad->address;
        TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(grad->handle, kept_[i]));
      } else {
        as_needed.store(false, std::memory_order_relaxed);
      }
      return true;
    });
    keeps_ = !kept_.empty();
    if (result && as_needed) view_.found = &found_;
    return result;
  }

  bool in_place() {
    forget();
    return all_tensors(params_.size(), [this](size_t i) {
      const auto grad = look(i);
      return grad && grad->is_as_needed && grad->address == addresses_[i].grad;
    });
  }

  void written() {
    view_.found = nullptr;
    const bool keeps = std::exchange(keeps_, false);
    for_tensors(params_.size(), [this, keeps](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (i + kFetchedAhead < params_.size()) fetch_links(params_[i + kFetchedAhead].get());
        fsam_bump_version(params_[i].get());
        if (keeps) let_go(i);
      }
    });
  }

  const HeldParameters* view() const { return &view_; }

 private:
  // Prepares what looks find, of parameters that an op would take.
  void lay_out(const Tensor& offsets) {
    const bool on_cpu = params_.empty() || params_[0].is_cpu();
    try {
      arguments_ = arguments(params_, nullptr, offsets, on_cpu);
    } catch (const std::exception&) {  // the op says why, when it is called
      return;
    }
    for (size_t i = 0; i <= params_.size(); ++i)
      TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&kept_.emplace_back()));
    const TensorTable& table = arguments_.table;
    found_ = {table.rows.data(), table.chunks, table.numel, arguments_.flat_numel, arguments_.dtype, arguments_.place};
  }

  // Lets go of what the last look found.
  void forget() {
    view_.found = nullptr;
    if (!std::exchange(keeps_, false)) return;
    for (size_t i = 0; i < params_.size(); ++i) let_go(i);
  }
  void let_go(size_t i) { TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(kept_.back(), kept_[i])); }

  // A gradient that was found.
  struct Gradient {
    AtenTensorHandle handle;
    const void* address;
    bool is_as_needed;
  };
  // The gradient of parameter i; nothing where that has none that is plain, or is not what and where it was.
  std::optional<Gradient> look(size_t i) {
    view_.fetch_ahead(i);
    const ListedTensor param = params_[i];
    const AtenTensorHandle grad = grad_of(param.get());
    if (!grad) return {};
    const uint64_t words = words_.of(param.get(), grad);
    if (words != 0 && words == seen_[i]) {
      const void* address = ListedTensor(grad).data_ptr();
      if (address && param.data_ptr() == addresses_[i].param) return Gradient{grad, address, true};
    }
    const void* address = address_of(grad);
    if (!is_plain(grad, address) || address_of(param.get()) != addresses_[i].param || !forms_.holds(i, param))
      return {};
    const bool as_needed = is_as_needed(param, ListedTensor(grad));
    if (as_needed) seen_[i] = words;
    return Gradient{grad, address, as_needed};
  }

  TensorList params_;
  std::vector<Addresses> addresses_;
  Forms forms_;
  FormWords words_;
  // Of each parameter and a gradient that an op may read: NOTE [a form is words of an object].
  std::vector<uint64_t> seen_;
  std::vector<AtenTensorHandle> grads_;
  Arguments arguments_;  // empty where an op would refuse the parameters
  Found found_{};
  // Gradients that were found, lest what an op reads be freed by somebody's signal handler; and one that is undefined.
  std::vector<AtenTensorHandle> kept_;
  bool keeps_ = false;
  HeldParameters view_;
};

// By the address of the offsets. Never destroyed: what is left when the process ends belongs to an interpreter that has
// ended already.
std::mutex mutex;
auto& held_by_offsets = *new std::unordered_map<const void*, std::shared_ptr<Held>>;

std::shared_ptr<Held> find(const Tensor& offsets) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = held_by_offsets.find(offsets.data_ptr());
  return found == held_by_offsets.end() ? nullptr : found->second;
}

std::shared_ptr<Held> held_under(const Tensor& offsets) {
  auto held = find(offsets);
  STD_TORCH_CHECK(held, "fsam_ext: no parameters are held under these offsets; hold() them first");
  return held;
}

bool can_hold() {
  return &fsam_grad_of != nullptr && &fsam_bump_version != nullptr && &fsam_is_negated != nullptr;
}

void hold(TensorList& params, const Tensor& offsets) {
  STD_TORCH_CHECK(can_hold(), "fsam_ext: this torch gives no access to gradients from C++; give the ops lists");
  auto held = std::make_shared<Held>(std::move(params), offsets);  // before the lock, as in release
  const std::lock_guard<std::mutex> lock(mutex);
  STD_TORCH_CHECK(held_by_offsets.count(offsets.data_ptr()) == 0,
                  "fsam_ext: parameters are held under these offsets already; release them first");
  held_by_offsets.emplace(offsets.data_ptr(), std::move(held));
}

void release(int64_t address) {
  std::shared_ptr<Held> held;  // goes only after the lock has: its end may run Python
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = held_by_offsets.find(reinterpret_cast<const void*>(address));
  if (found == held_by_offsets.end()) return;
  held = std::move(found->second);
  held_by_offsets.erase(found);
}

bool have_their_forms(const Tensor& offsets, bool in_place) {
  return held_under(offsets)->have_their_forms(in_place);
}
bool have_grads(const Tensor& offsets) {
  return held_under(offsets)->have_grads();
}
bool in_place(const Tensor& offsets) {
  return held_under(offsets)->in_place();
}
void written(const Tensor& offsets) {
  held_under(offsets)->written();
}
int64_t held_parameters(const Tensor& offsets) {
  const auto held = find(offsets);
  return held ? reinterpret_cast<int64_t>(held->view()) : 0;
}

}  // namespace
}  // namespace fsam

FSAM_LIBRARY_IMPL(FSAM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("can_hold", TORCH_BOX(&fsam::can_hold));
  m.impl("hold", TORCH_BOX(&fsam::hold));
  m.impl("release", TORCH_BOX(&fsam::release));
  m.impl("have_their_forms", TORCH_BOX(&fsam::have_their_forms));
  m.impl("have_grads", TORCH_BOX(&fsam::have_grads));
  m.impl("in_place", TORCH_BOX(&fsam::in_place));
  m.impl("written", TORCH_BOX(&fsam::written));
  m.impl("held_parameters", TORCH_BOX(&fsam::held_parameters));
}

// Whether an optimizer's ``state``, a dict of dicts, holds just the objects that it held before, and each tensor lies
// where it did: fsam_ext/state/ownership.py, NOTE [identity, never equality]. Called through ctypes, with the GIL held.
#include <atomic>
#include <cstdint>

#include "tensor_list.h"

// All that is needed of CPython, from its stable ABI. The process that loads this library has it; one that does not,
// such as a C++ test, never calls.
extern "C" {
struct _object;
using PyObject = _object;
__attribute__((weak)) int PyDict_Next(PyObject* dict, intptr_t* position, PyObject** key, PyObject** value);
}

namespace fsam {
namespace {

// Address, shape and strides as one number.
uint64_t place_of(AtenTensorHandle tensor) {
  void* data = nullptr;
  int64_t dimensions = 0, *sizes = nullptr, *strides = nullptr;
  if (aoti_torch_get_data_ptr(tensor, &data) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_dim(tensor, &dimensions) != AOTI_TORCH_SUCCESS)
    return 0;
  uint64_t mixed = reinterpret_cast<uint64_t>(data);
  if (dimensions == 0) return mixed;
  if (aoti_torch_get_sizes(tensor, &sizes) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_strides(tensor, &strides) != AOTI_TORCH_SUCCESS)
    return 0;
  const auto mix = [&](int64_t number) { mixed = (mixed ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15; };
  for (int64_t i = 0; i < dimensions; ++i) {
    mix(sizes[i]);
    mix(strides[i]);
  }
  return mixed;
}

// NOTE [tensors are fetched ahead]: the link to its storage is the third word of a tensor's object.
void fetch_storage(AtenTensorHandle tensor) {
  __builtin_prefetch(reinterpret_cast<const char* const*>(object_of(tensor))[2]);
}

// Whether each tensor is where it was noted to be.
bool same_places(const AtenTensorHandle* tensors, int64_t count, const uint64_t* places) {
  constexpr int64_t kAhead = kFetchedAhead;
  std::atomic<bool> same = true;
  for_tensors(count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (i + 3 * kAhead < last) __builtin_prefetch(tensors[i + 3 * kAhead]);
      if (i + 2 * kAhead < last) fetch(tensors[i + 2 * kAhead]);
      if (i + kAhead < last) fetch_storage(tensors[i + kAhead]);
      if (places[i] != place_of(tensors[i])) return same.store(false, std::memory_order_relaxed);
    }
  });
  return same;
}

// Whether `state` holds the objects that it held.
bool same_objects(PyObject* state, const uint64_t* known, int64_t count) {
  const uint64_t* const end = known + count;
  const auto is_next = [&](PyObject* object) { return known != end && reinterpret_cast<uint64_t>(object) == *known++; };
  PyObject *key, *entry, *name, *value;
  for (intptr_t i = 0; PyDict_Next(state, &i, &key, &entry);) {
    if (!is_next(key)) return false;
    // An entry that is no dict has nothing that counts: nothing is next in it.
    for (intptr_t j = 0; PyDict_Next(entry, &j, &name, &value);)
      if (!is_next(name) || !is_next(value)) return false;
  }
  return known == end;
}

}  // namespace
}  // namespace fsam

extern "C" {
// Notes where tensors lie; `tensors` are the addresses of at::Tensors.
__attribute__((visibility("default"))) void fsam_note_places(const AtenTensorHandle* tensors, int64_t count,
                                                             uint64_t* places) {
  for (int64_t i = 0; i < count; ++i) places[i] = fsam::place_of(tensors[i]);
}

// `known`: the address of each key, followed by those of the names and values of its entry. `tensors`: of those values
// that lie somewhere, and `places` what was noted of them. They are looked at only where the objects are the same.
__attribute__((visibility("default"))) int fsam_same_state(PyObject* state, const uint64_t* known, int64_t count,
                                                           const AtenTensorHandle* tensors, int64_t tensor_count,
                                                           const uint64_t* places, int in_place) {
  return fsam::same_objects(state, known, count) && (!in_place || fsam::same_places(tensors, tensor_count, places));
}
}

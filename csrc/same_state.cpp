// Whether an optimizer's ``state``, a dict of dicts, holds just the objects that it held before, each tensor where it
// was: fsam_ext/state/ownership.py, NOTE [identity, never equality]. Called through ctypes, with the GIL held.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

// All that is needed of CPython, from its stable ABI. The process that loads this library has it; one that does not,
// such as a C++ test, never calls.
extern "C" {
struct _object;
using PyObject = _object;
__attribute__((weak)) int PyDict_Next(PyObject* dict, intptr_t* position, PyObject** key, PyObject** value);
}

namespace {

// Address, shape and strides as one number that is never 0.
uint64_t place_of(AtenTensorHandle tensor) {
  void* data = nullptr;
  int64_t dimensions = 0, *sizes = nullptr, *strides = nullptr;
  if (aoti_torch_get_data_ptr(tensor, &data) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_dim(tensor, &dimensions) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_sizes(tensor, &sizes) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_strides(tensor, &strides) != AOTI_TORCH_SUCCESS)
    return 1;
  uint64_t mixed = reinterpret_cast<uint64_t>(data);
  const auto mix = [&](int64_t number) { mixed = (mixed ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15; };
  for (int64_t i = 0; i < dimensions; ++i) {
    mix(sizes[i]);
    mix(strides[i]);
  }
  return mixed | 1;
}

}  // namespace

extern "C" {
// `known`: the address of each key, followed by those of the names and values of its entry and, after each value, its
// place: 0 where it is no tensor. `record` fills in the places that are not 0. `handle`: where in a tensor's PyObject
// the at::Tensor is, in bytes.
__attribute__((visibility("default"))) int fsam_same_state(PyObject* state, uint64_t* known, int64_t count,
                                                           int64_t handle, int record) {
  uint64_t* const end = known + count;
  const auto is_next = [&](PyObject* object) { return known != end && reinterpret_cast<uint64_t>(object) == *known++; };
  PyObject *key, *entry, *name, *value;
  for (intptr_t i = 0; PyDict_Next(state, &i, &key, &entry);) {
    if (!is_next(key)) return false;
    // An entry that is no dict has nothing that counts: nothing is next in it.
    for (intptr_t j = 0; PyDict_Next(entry, &j, &name, &value);) {
      if (!is_next(name) || !is_next(value) || known == end) return false;
      uint64_t& place = *known++;
      if (place == 0) continue;
      const uint64_t now = place_of(reinterpret_cast<AtenTensorHandle>(reinterpret_cast<char*>(value) + handle));
      if (record) place = now;
      if (place != now) return false;
    }
  }
  return known == end;
}
}

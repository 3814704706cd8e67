// Whether an optimizer's ``state``, a dict of dicts, holds just the objects that it held before, each tensor where it
// was: fsam_ext/state/ownership.py, NOTE [identity, never equality]. Called through ctypes, with the GIL held.
#include <cstdint>

// All that is needed of CPython, from its stable ABI. The process that loads this library has it; one that does not,
// such as a C++ test, never calls.
extern "C" {
struct _object;
using PyObject = _object;
__attribute__((weak)) int PyDict_Next(PyObject* dict, intptr_t* position, PyObject** key, PyObject** value);
__attribute__((weak)) void PyErr_Clear();
}

namespace {

// What DLPack's C interface tells of a tensor without owning it (dlpack.h, DLTensor).
struct Described {
  char* data;
  int32_t device[2];
  int32_t dimensions;
  uint8_t dtype[4];
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};
using Describe = int (*)(PyObject* tensor, Described* out);

// Address, shape and strides as one number that is never 0.
uint64_t place_of(PyObject* tensor, Describe describe) {
  Described it;
  if (describe(tensor, &it) != 0) {
    PyErr_Clear();
    return 1;
  }
  uint64_t mixed = reinterpret_cast<uint64_t>(it.data) + it.byte_offset;
  const auto mix = [&](int64_t number) { mixed = (mixed ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15; };
  for (int32_t i = 0; i < it.dimensions; ++i) {
    mix(it.shape[i]);
    mix(it.strides == nullptr ? -1 : it.strides[i]);
  }
  return mixed | 1;
}

}  // namespace

extern "C" {
// `known`: the address of each key, followed by those of the names and values of its entry and, after each value, its
// place: 0 where it is no tensor. `record` fills in the places that are not 0.
__attribute__((visibility("default"))) int fsam_same_state(PyObject* state, uint64_t* known, int64_t count,
                                                           Describe describe, int record) {
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
      const uint64_t now = place_of(value, describe);
      if (record) place = now;
      if (place != now) return false;
    }
  }
  return known == end;
}
}

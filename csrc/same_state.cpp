// Whether an optimizer's ``state``, a dict of dicts, holds just the objects that it held before:
// fsam_ext/state/ownership.py, NOTE [identity, never equality]. Called through ctypes, with the GIL held.
#include <cstdint>

// All that is needed of CPython, from its stable ABI. The process that loads this library has it; one that does not,
// such as a C++ test, never calls.
extern "C" {
struct _object;
using PyObject = _object;
__attribute__((weak)) int PyDict_Next(PyObject* dict, intptr_t* position, PyObject** key, PyObject** value);

// `known`: the address of each key, followed by those of the names and values of its entry.
__attribute__((visibility("default"))) int fsam_same_state(PyObject* state, PyObject* const* known, int64_t count) {
  PyObject* const* const end = known + count;
  const auto is_next = [&](PyObject* object) { return known != end && object == *known++; };
  PyObject *key, *entry, *name, *value;
  for (intptr_t i = 0; PyDict_Next(state, &i, &key, &entry);) {
    if (!is_next(key)) return false;
    // An entry that is no dict has nothing that counts: nothing is next in it.
    for (intptr_t j = 0; PyDict_Next(entry, &j, &name, &value);)
      if (!is_next(name) || !is_next(value)) return false;
  }
  return known == end;
}
}

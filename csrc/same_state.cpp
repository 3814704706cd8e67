// Whether an optimizer's ``state``, a dict of dicts, holds just the objects that it held before, and each tensor lies
// where it did: fsam_ext/state/watch.py, NOTE [identity, never equality]. Called through ctypes, with the GIL held.
#include <cstdint>
#include <vector>

#include "tensor_list.h"
#include "words.h"

// All that is needed of CPython, from its stable ABI. The process that loads this library has it; one that does not,
// such as a C++ test, never calls.
extern "C" {
struct _object;
using PyObject = _object;
__attribute__((weak)) int PyDict_Next(PyObject* dict, intptr_t* position, PyObject** key, PyObject** value);
}

// What ``state`` held: watch.py has the same struct.
struct FsamKnownState {
  int64_t entries;
  PyObject* const* keys;      // of each entry
  const int64_t* starts;      // of each entry's objects, and where the last one's end
  PyObject* const* contents;  // the names and values of each entry, in turn
  int64_t tensors;            // of those values that lie somewhere
  int64_t words;              // that tell where a tensor lies: watch.py, NOTE [a place is words of an object]
  const uint64_t* const* objects;
  uint64_t* places;  // what was noted of each
};

namespace fsam {
namespace {

// Whether each tensor lies where and how it was noted to.
bool same_places(const FsamKnownState& known) {
  // They lie far apart, and a thread that asks for them early waits for many at once.
  constexpr int64_t kAhead = 32, kLine = 64 / sizeof(uint64_t);
  return all_tensors(known.tensors, [&known](int64_t i) {
    if (i + kAhead < known.tensors)
      for (int64_t word = 0; word < known.words + kLine; word += kLine)  // they begin anywhere in a line
        __builtin_prefetch(known.objects[i + kAhead] + word);
    return known.places[i] == mixed(known.objects[i], known.words);
  });
}

// Whether `state` holds the objects that it held. Threads that do not hold the GIL may read what nobody can change
// while the one that holds it waits for them.
bool same_objects(PyObject* state, const FsamKnownState& known) {
  std::vector<PyObject*> entries;
  entries.reserve(known.entries);
  PyObject *key, *entry;
  for (intptr_t i = 0; PyDict_Next(state, &i, &key, &entry); entries.push_back(entry))
    if (int64_t(entries.size()) == known.entries || key != known.keys[entries.size()]) return false;
  if (int64_t(entries.size()) != known.entries) return false;
  return all_tensors(known.entries, [&](int64_t i) {
    auto next = known.contents + known.starts[i], end = known.contents + known.starts[i + 1];
    PyObject *name, *value;
    // An entry that is no dict has nothing that counts: nothing is next in it.
    for (intptr_t j = 0; PyDict_Next(entries[i], &j, &name, &value); next += 2)
      if (next == end || name != next[0] || value != next[1]) return false;
    return next == end;
  });
}

}  // namespace
}  // namespace fsam

extern "C" {
// Notes where tensors lie.
__attribute__((visibility("default"))) void fsam_note_state(const FsamKnownState* known) {
  for (int64_t i = 0; i < known->tensors; ++i) known->places[i] = fsam::mixed(known->objects[i], known->words);
}

// Tensors are looked at only where the objects are the same.
__attribute__((visibility("default"))) int fsam_holds_state(PyObject* state, const FsamKnownState* known,
                                                            int in_place) {
  return fsam::same_objects(state, *known) && (!in_place || fsam::same_places(*known));
}
}

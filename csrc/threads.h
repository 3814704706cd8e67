// Work for torch's own threads, or for none.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace fsam {

// NOTE [a forked child]
// A process that fork() has made lacks its parent's threads, and OpenMP waits for them for ever. torch's own optimizers
// go on there while no tensor is large enough to be shared among threads; so does this one, which elsewhere shares many
// small ones, too.
inline std::atomic<bool> is_forked_child = false;
inline const int notices_forks = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
// Of torch's elementwise loops.
constexpr int64_t kTorchsGrain = 32768;

// Calls visit(first, last) for parts of [0, size), on torch's threads where there is work for several. In a forked
// child only if `for_torch_too`: if torch would do the same.
template <class Visit>
void for_parts(int64_t size, int64_t grain, bool for_torch_too, const Visit& visit) {
  if (is_forked_child && !for_torch_too) {
    if (size > 0) visit(0, size);
  } else {
    torch::stable::parallel_for(0, size, grain, visit);
  }
}

}  // namespace fsam

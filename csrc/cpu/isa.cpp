// Which of the compiled ISAs serves this machine.

#include "isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace fsam {
namespace {

// From the widest to the one that every processor has.
std::vector<const IsaLoops*> available() {
  std::vector<const IsaLoops*> result;
#if defined(FSAM_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    result.push_back(&avx512::loops);
#endif
#if defined(FSAM_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2")) result.push_back(&avx2::loops);
#endif
  result.push_back(&baseline::loops);
  return result;
}

const IsaLoops& choose() {
  const auto loops = available();
  const char* forced = std::getenv("FSAM_CPU_ISA");
  if (!forced || !*forced) return *loops[0];
  std::string names;
  for (const IsaLoops* candidate : loops) {
    if (std::strcmp(candidate->name, forced) == 0) return *candidate;
    names += std::string(names.empty() ? "" : ", ") + candidate->name;
  }
  STD_TORCH_CHECK(false, "fsam_ext: FSAM_CPU_ISA=", forced, " is not available on this machine; use one of ", names);
}

}  // namespace

const IsaLoops& isa_loops() {
  static const IsaLoops& chosen = choose();
  return chosen;
}

}  // namespace fsam

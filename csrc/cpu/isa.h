// Which of the compiled ISAs serves this machine.
#pragma once

#include "leaf_loops.h"

namespace fsam {

// The widest ISA that was compiled and that the processor has, or the one that the environment
// variable FSAM_CPU_ISA names. Raises where that one is not available.
const IsaLoops& isa_loops();

}  // namespace fsam

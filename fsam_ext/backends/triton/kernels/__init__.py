"""What runs on the GPU: the passes, line for line csrc/formulas.h. One file for each pass beside what they share.

One program owns one chunk of 4096 elements of one row. What a call has (an average, a backup, a table) is decided when
the kernel is compiled: tensors that it has not are None. The only branch at run time is the one between whole and
partial access (memory.py).

NOTE [names of arguments]
Triton generates the function that binds a kernel's arguments, and its own names in there (`params`, `specialization`,
`options`, `backend`) shadow arguments of the same name: such a kernel works in the interpreter and ahead of time, and
cannot be launched. So the parameters of a model are called `weights` here, and a test asks Triton for its names.
"""

from .adam import restore_adam
from .average_update import update_ema
from .norm import noise_norm
from .perturbation import perturb
from .plain_restore import restore
from .projection import dots, project
from .sgd import restore_sgd
from .step_counts import count_steps
from .sums import sum_partials

__all__ = [
    "count_steps",
    "dots",
    "noise_norm",
    "perturb",
    "project",
    "restore",
    "restore_adam",
    "restore_sgd",
    "sum_partials",
    "update_ema",
]

"""The Triton backend: the ops on any GPU that Triton serves, as `torch.ops.fsam_ext_triton.*`.

An op goes through checks.py (rows.py, tables.py) and launch.py to one of kernels/; passes.py has all of them, and
registration.py puts them into torch. Under ``TRITON_INTERPRET=1`` the ops serve CPU tensors, for tests and debugging.
"""

from .launch import INTERPRETED, unavailable
from .registration import NAMESPACE, SCHEMAS

__all__ = ["INTERPRETED", "NAMESPACE", "SCHEMAS", "unavailable"]

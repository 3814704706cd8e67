"""Converts checkpoint files: ``python -m fsam_ext.convert official.pt ours.pt``. The work is in state/convert.py."""

import sys

from .state.convert import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

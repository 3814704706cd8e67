"""What the CUDA library is built for. setup.py, the checks and the tests read it, and docs/building.md is held to it.

It imports nothing, so that setup.py can read it without the package and without torch.
"""

# GPUs of 8.9 run what is compiled for 8.6, as they do in torch's own wheels: a seventh less to build and to ship.
# Newer ones than the last run its PTX.
ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")

# The first with 32,764 bytes of kernel parameters.
OLDEST_NVCC = (12, 1)

# What an nvcc of each major version builds runs from this driver of NVIDIA's on.
OLDEST_DRIVERS = {12: "525", 13: "580"}

# The nvcc of the libraries that the documents measure and that `make wheel` ships.
TOOLKIT = (13, 0)

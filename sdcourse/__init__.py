"""sdcourse: diffusion models from the first equation to the cluster. The lessons in `nbs/` are the source of this package."""

__version__ = "0.1.0"

import os

from . import guard

guard.install()
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") # read once, when torch loads OpenMP: a thread that waits leaves its core to others

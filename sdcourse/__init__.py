"""sdcourse: diffusion models from the first equation to the cluster. The lessons in `nbs/` are the source of this package."""

__version__ = "0.1.0"

from . import guard

guard.install()

"""`sdcourse cache …` with a pause before each batch, so that a test can interfere, and a note of what was
encoded.

    SLOW=0.05 NOTES=FILE python tests/slow_cache.py latents DATA OUT --model FOLDER

HOOK=code runs first and can break things.
"""

import os, sys, time

from sdcourse import cli
from sdcourse.cache import fill as cache

finite, rank = cache.finite, int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def slow(encoder, batch, names):
    time.sleep(float(os.environ.get("SLOW", 0)))
    if notes := os.environ.get("NOTES"):
        with open(f"{notes}.{rank}", "a") as f:
            f.write("".join(f"{n}\n" for n in names))
    return finite(encoder, batch, names)


cache.finite = slow
if hook := os.environ.get("HOOK"):
    exec(hook)
if __name__ == "__main__":
    raise SystemExit(
        cli.main(["cache", *sys.argv[1 + 3 * (sys.argv[1] == "-m") :]])
    )  # a batch script says -m sdcourse.cli cache

"""`sdcourse generate …` with a pause before each batch, so that a test can interfere, and a note of what was
drawn.

SLOW=0.05 NOTES=FILE python tests/slow_generate.py MODEL OUT --classes all
"""

import os, sys, time

from sdcourse import cli
from sdcourse.commands import generate

real, rank = generate.draw, int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def slow(pipe, rows, cfg, *rest, **more):
    time.sleep(float(os.environ.get("SLOW", 0)))
    if notes := os.environ.get("NOTES"):
        with open(f"{notes}.{rank}", "a") as f:
            f.write("".join(f"{r['id']}\n" for r in rows))
    return real(pipe, rows, cfg, *rest, **more)


generate.draw = slow
if __name__ == "__main__":
    raise SystemExit(
        cli.main(["generate", *sys.argv[1 + 3 * (sys.argv[1] == "-m") :]])
    )  # a batch script says -m sdcourse.cli generate

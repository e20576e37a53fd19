"""`sdcourse caption …` with a pause before each batch, so that a test can interfere, and a note of what was
written.

    SLOW=0.05 NOTES=FILE python tests/slow_caption.py template DATA --out OUT
"""

import os, sys, time

from sdcourse import cli
from sdcourse.caption import write as module

real, rank = module.write_rows, int(os.environ.get("RANK", 0))


def slow(job, rows, items):
    time.sleep(float(os.environ.get("SLOW", 0)))
    if notes := os.environ.get("NOTES"):
        with open(f"{notes}.{rank}", "a") as f:
            f.write("".join(f"{id}\n" for id, _ in rows))
    return real(job, rows, items)


module.write_rows = slow
if __name__ == "__main__":
    raise SystemExit(cli.main(["caption", *sys.argv[1:]]))

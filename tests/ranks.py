"""Start ranks by hand: real processes with a launcher's variables and no agent around them, so that each
one's own end can be seen.
"""

import os
import socket
from pathlib import Path

import warm

SCRIPT = Path(__file__).parent / "ranks_train.py"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(argv, world, *, first=warm.LOOP, **env):
    """One process per rank, as torchrun would start them on one machine; `first` is imported before they are
    forked.
    """
    port = str(free_port())

    def one(r):
        mine = dict(
            RANK=str(r),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(r),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            OMP_NUM_THREADS="1",
        )
        return warm.start(argv, env=os.environ | mine | env, first=first)

    return [one(r) for r in range(world)]


def finish(ranks, seconds=warm.LIMIT):
    "[(exit code, stdout, stderr)] by rank; nothing is left running."
    try:
        ends = [p.communicate(timeout=seconds) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    return [(p.returncode, *end) for p, end in zip(ranks, ends)]


def toy(out, world=2, *, first=warm.LOOP, **over):
    "Start the toy training on `world` ranks."
    return start([SCRIPT, out, *(f"{k}={v!r}" for k, v in over.items())], world, first=first)

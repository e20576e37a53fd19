"""Run by torchrun, srun or by hand: train the toy task with options from the command line (key=value).

stop_rank, stop_step: raise the flag on one rank. hook: lines of Python that plant a fault; they see `loop`,
`toy`, `os`, `time` and `rank`.
"""

import ast
import json
import os
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
import sdcourse.engine.loop as loop  # noqa: E402
import toy  # noqa: E402
from sdcourse.core import UserError  # noqa: E402
from sdcourse.engine.dist import launched  # noqa: E402

out, rank = Path(sys.argv[1]), launched().rank
over = {k: ast.literal_eval(v) for k, v in (a.split("=", 1) for a in sys.argv[2:])}
stop_rank, stop_step, hook = over.pop("stop_rank", None), over.pop("stop_step", None), over.pop("hook", "")
ids, step, place = [], loop.step, loop.Run.place


def one(r):
    ids.append([])
    step(r)
    if rank == stop_rank and r.step == stop_step:
        os.kill(os.getpid(), __import__("signal").SIGUSR1)


def seen(self, batch, data, items):
    if ids and data is self.data:
        ids[-1] += [int(i) for i in batch["id"]]
    return place(self, batch, data, items)


loop.step, loop.Run.place = one, seen
exec(hook, dict(loop=loop, toy=toy, os=os, time=time, rank=rank, over=over, UserError=UserError))
try:
    result = toy.run(out, **over)
except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(e.code)
Path(f"{out}.rank{rank}.json").write_text(
    json.dumps(dict(ids=ids, step=result.step, stopped=result.stopped, exit_code=result.exit_code))
)

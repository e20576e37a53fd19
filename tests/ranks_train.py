"""Run by torchrun: train the toy task with options from the command line (key=value); optionally raise the flag on one rank."""
import ast
import json
import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
import sdcourse.train.loop as loop  # noqa: E402
from toy import run  # noqa: E402

out, rank = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
over = {k: ast.literal_eval(v) for k, v in (a.split("=", 1) for a in sys.argv[2:])}
stop_rank, stop_step = over.pop("stop_rank", None), over.pop("stop_step", None)
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
result = run(out, **over)
Path(f"{out}.rank{rank}.json").write_text(json.dumps(dict(ids=ids, step=result.step, stopped=result.stopped)))

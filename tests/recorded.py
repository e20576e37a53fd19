"""`python tests/recorded.py -m sdcourse.train …` is `python -m sdcourse.train …` that also notes the ids of
every step in $RECORDED/rank-R.jsonl, and who the rank is in $RECORDED/rank-R.json. SLOW=0.5 adds so many
seconds to each step, so that a test can meet it on its way.
"""

import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path

from sdcourse.engine.stop import StopFlag

StopFlag().__enter__()  # as the command does in its first line
import sdcourse.engine.loop as loop  # noqa: E402

sys.argv = sys.argv[2:] if sys.argv[1] == "-m" else sys.exit(__doc__)
folder, step, place = Path(os.environ["RECORDED"]), loop.step, loop.Run.place
folder.mkdir(parents=True, exist_ok=True)
seen = []


def noted(self, batch, data, items):
    if data is self.data:
        seen.extend(int(i) for i in batch["id"])
    return place(self, batch, data, items)


def one(run):
    seen.clear()
    step(run)
    time.sleep(float(os.environ.get("SLOW", 0)))
    with open(folder / f"rank-{run.ranks.rank}.jsonl", "a") as f:
        f.write(json.dumps([run.step, seen]) + "\n")


who = dict(
    pid=os.getpid(),
    host=socket.gethostname(),
    **{k: os.environ.get(k) for k in ("SLURM_JOB_END_TIME", "SLURM_RESTART_COUNT")},
)
(folder / f"rank-{os.environ.get('SLURM_PROCID', 0)}.json").write_text(json.dumps(who))
loop.Run.place, loop.step = noted, one
sys.path[0] = os.getcwd()
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

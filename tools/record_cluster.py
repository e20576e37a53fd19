"""What lesson 09 shows of a real SLURM.

    python tools/record_cluster.py
    (root, Debian's slurm-wlm and munge; about six minutes)

Trains the tiny flow DiT on two nodes in a job whose time limit is one minute, so that it has to be stopped
and requeued until it is done, and once more without a limit. Writes nbs/recorded/09_cluster.json: when each
row of the log appeared, the log itself, and whether the weights are equal.
"""

import re, shutil, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from cluster import Cluster  # noqa: E402

from sdcourse.core import git_commit, write_json  # noqa: E402
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint  # noqa: E402
from sdcourse.engine.trackers import read_metrics  # noqa: E402

COMMAND = (
    "sbatch --nodes=2 --ntasks-per-node=1 --time=1 --signal=USR1@45 slurm/train.sbatch "
    "flow_dit --preset tiny --log-every 25 --num-samples 0"
)


def submit(slurm, out, *limit):
    words = COMMAND.replace("--time=1 --signal=USR1@45 ", "").split()[1:]
    env = dict(
        SDCOURSE_CLUSTER="slurm/cpu.env", PYTHON=sys.executable, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1"
    )
    return slurm.sbatch(
        "--output=/dev/null", *limit, *words[:2], ROOT / words[2], *words[3:], "--out", out, cwd=ROOT, **env
    )


def follow(slurm, job, out):
    """[(seconds since the first look, step, loss)] as the rows appear, and [(seconds, state)] as the state
    changes.
    """
    rows, states, begin = {}, [], time.time()
    while True:
        now, state = time.time() - begin, slurm.show(job)["JobState"]
        if not states or states[-1][1] != state:
            states.append((round(now, 1), state))
        for r in read_metrics(out) if (out / "metrics.jsonl").exists() else []:
            rows.setdefault(r["step"], (round(now, 1), r["step"], r["loss"]))
        if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            return sorted(rows.values()), states
        time.sleep(0.3)


def main():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with Cluster(folder / "c") as slurm:
            job = submit(slurm, folder / "run", "--time=1", "--signal=USR1@45")
            rows, states = follow(slurm, job, folder / "run")
            restarts = int(slurm.show(job)["Restarts"])
            slurm.wait(submit(slurm, folder / "whole"), seconds=600)
        a, b = (
            load_checkpoint(latest_checkpoint(folder / k / "checkpoints")[0])["tensors"]
            for k in ("run", "whole")
        )
        equal = all((a[n][k] == b[n][k]).all().item() for n in a for k in a[n])
        log = "\n".join(p.read_text() for p in sorted((folder / "run").glob("slurm-*.log"))).replace(
            str(folder) + "/", "runs/"
        )
        whole = [(r["step"], r["loss"]) for r in read_metrics(folder / "whole")]
        log = "\n".join(l for l in log.splitlines() if not re.search(r"Warning|warn", l))
        write_json(
            ROOT / "nbs/recorded/09_cluster.json",
            dict(
                made_by="python tools/record_cluster.py",
                command=COMMAND,
                commit=git_commit(),
                restarts=restarts,
                equal=equal,
                rows=rows,
                states=states,
                whole=whole,
                log=log.splitlines(),
            ),
        )
        print(f"{restarts} restarts, weights {'equal' if equal else 'DIFFER'}, {len(rows)} rows")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

"""What training costs beside another busy process:   python tools/bench_busy.py

The tiny flow DiT (`make train`) and the tiny Stable Diffusion of lesson 03 (from caches) train in processes
of their own, on one and on two threads, with the wait policies of OpenMP, first on idle cores and then beside
one process that takes a core; all of it in turn, several rounds. The table has the median time of a step and
the ratio of busy to idle.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sdcourse.engine.trackers import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {  # what: (threads, environment)
    "1 thread": (1, {}),
    "2 threads": (2, {}),
    "2 threads, passive": (2, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "2 threads, as torch comes": (2, {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}),
}
PREPARE = [
    "prepare photos raw --crops 4",
    "prepare unsplash raw data --size 32",
    "cache latents data latents --model tiny-sd15 --size 32",
    "cache prompts data prompts --model tiny-sd15",
]
TASKS = {
    "flow_dit": (
        "train flow_dit --preset tiny --num-samples 0 --num-inference-steps 2 "
        "--max-steps {steps} --log-every 10"
    ),
    "sd15": (
        "train sd15 --preset tiny --data data --latents latents --prompts prompts "
        "--max-steps {steps} --log-every 5 --validate-every 0 --num-samples 0"
    ),
}


def run(words, folder, *more, **env):
    "A command of ours; its last words when it fails."
    env = {k: v for k, v in (os.environ | env).items() if v}
    done = subprocess.run(
        [sys.executable, "-m", "sdcourse.cli", *words.split(), *more],
        cwd=folder,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"sdcourse {words}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def step_time(task, steps, setting, folder, name):
    "Milliseconds of a step, the median over log rows without the first."
    threads, env = SETTINGS[setting]
    run(f"{TASKS[task].format(steps=steps)} --threads {threads} --out", folder, name, **env)
    rows = [r for r in read_metrics(folder / name) if "seconds" in r]
    between = rows[0]["step"]
    return statistics.median(1000 * r["seconds"] / between for r in rows[1:-1])


def main(argv=None):
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=2)
    ask.add_argument("--steps", type=int, default=100)
    args = ask.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for words in PREPARE:
            run(words, folder)
        found = {}
        for i in range(args.rounds):
            for task in TASKS:
                for setting in SETTINGS:
                    for busy in (False, True):
                        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
                        steps = args.steps if task == "flow_dit" else args.steps // 2
                        try:
                            took = step_time(task, steps, setting, folder, f"{task}-{setting}-{i}-{busy}")
                        finally:
                            if other:
                                other.kill()
                        found.setdefault((task, setting, busy), []).append(took)
                        print(f"{task}, {setting}, {'busy' if busy else 'idle'}: {took:.1f} ms", flush=True)
    for task in TASKS:
        for setting in SETTINGS:
            idle, busy = (statistics.median(found[task, setting, b]) for b in (False, True))
            print(
                f"{task:9} {setting:26} idle {idle:6.1f} ms   busy {busy:6.1f} ms   {busy / idle:.2f} times"
            )


if __name__ == "__main__":
    main()

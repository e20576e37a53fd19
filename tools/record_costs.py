"""What each difference of the published flow DiT costs at tiny size: train the tiny preset once for each, and
keep the numbers.

    python tools/record_costs.py [NAME …]

Writes nbs/recorded/06b_costs.json, which lesson 06b shows. A variant that no option offers is planted here: a
start that is not zero, and the published code of time.
"""

import argparse, json, tempfile
from pathlib import Path

from torch import nn

from sdcourse.config import resolve
from sdcourse.core import read_json, write_json
from sdcourse.engine.loop import train
from sdcourse.engine.trackers import read_metrics
from sdcourse.models import dit
from sdcourse.models.dit_452m import published_time_code, time_frequencies
from sdcourse.train.flow_dit import Config, Task

OUT = Path(__file__).resolve().parent.parent / "nbs/recorded/06b_costs.json"
reset, code = dit.DiT.reset_parameters, dit.time_code


def not_zero(self):
    "Modulation, gates and output begin as matrices of Xavier, as a plain `nn.Linear` would."
    reset(self)
    for m in (*(b.ada for b in self.blocks), self.final_ada, self.final):
        nn.init.xavier_uniform_(m.weight)


def fast_code(t, dim=256):
    return published_time_code(t, time_frequencies(dim).to(t.device))


VARIANTS = {
    "as it is": {},
    "1-D rotary positions": dict(position="rope1d"),
    "2-D rotary positions alone": dict(position="rope2d"),
    "no zero start": dict(plant="start"),
    "published code of time": dict(plant="time"),
}


def run(name, seed, steps):
    "The numbers of one training."
    over = dict(VARIANTS[name])
    plant = over.pop("plant", "")
    dit.DiT.reset_parameters, dit.time_code = (
        (not_zero if plant == "start" else reset),
        (fast_code if plant == "time" else code),
    )
    try:
        with tempfile.TemporaryDirectory() as out:
            train(
                Task(
                    resolve(
                        Config,
                        preset="tiny",
                        overrides=over
                        | dict(out=f"{out}/r", threads=1, device="cpu", seed=seed)
                        | (dict(max_steps=steps, warmup_steps=min(150, steps // 2)) if steps else {}),
                    )
                )
            )
            rows = read_metrics(f"{out}/r")
    finally:
        dit.DiT.reset_parameters, dit.time_code = reset, code
    last, early = rows[-1], next(r for r in rows if r["step"] >= min(300, rows[-1]["step"]))
    kept = ("step", "val_loss", "digit[tiny-digits]", "FD[tiny-digits]", "KID[tiny-digits]")
    return {k: last[k] for k in kept} | {"loss at 300": early["loss"]}


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("names", nargs="*")
    ask.add_argument("--seeds", type=int, default=1)
    ask.add_argument("--steps", type=int, default=0)
    args = ask.parse_args()
    found = read_json(OUT) if OUT.is_file() else {}
    for seed in range(args.seeds):
        for name in args.names or VARIANTS:
            if f"{name}, seed {seed}" in found:
                continue
            found[f"{name}, seed {seed}"] = run(name, seed, args.steps)
            print(name, seed, json.dumps(found[f"{name}, seed {seed}"]), flush=True)
            if not args.steps:
                write_json(OUT, found)


if __name__ == "__main__":
    raise SystemExit(main())

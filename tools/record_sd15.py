"""What the options of lesson 03 do, from real runs:

    python tools/record_sd15.py [--only NAME …]
    about twenty minutes on two idle cores

Each run fine-tunes the shipped scenes model on crops of photographs and is judged by: the held-out loss, the
distance of 144 samples of test captions from held-out crops, the share of them that lies closer to the
training set than real crops do, and what is left of the scenes. nbs/recorded/03_sd15.json keeps the numbers
and the command of each; what is there already is not run again.
"""

import argparse, json, tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch

import sdcourse  # noqa: F401  (guards torchvision)
from sdcourse import cli
from sdcourse.config import resolve
from sdcourse.core import read_json, write_json
from sdcourse.dataset import Transform, pictures
from sdcourse.engine.checkpoint import load_checkpoint
from sdcourse.engine.loop import train
from sdcourse.engine.order import key
from sdcourse.engine.trackers import read_metrics
from sdcourse.evaluation.adherence import adherence
from sdcourse.evaluation.judges import Tiny
from sdcourse.evaluation.memorise import memorisation
from sdcourse.evaluation.stats import frechet
from sdcourse.models.shipped import shipped_folder
from sdcourse.train import sd15

OUT = Path(__file__).resolve().parent.parent / "nbs/recorded/03_sd15.json"
RUNS = {  # name -> options beside those of the lesson
    "a fifth of the rate": dict(lr=1e-4),
    "five times the rate": dict(lr=2.5e-3),
    "no average": dict(ema_decay=0.0),
    "LoRA, rank 4": dict(lora_rank=4, lr=2e-3),
    "LoRA, rank 16": dict(lora_rank=16, lr=2e-3),
    "Min-SNR": dict(min_snr_gamma=5.0),
    "captions never dropped": dict(cond_drop=0.0),
    "half of the captions dropped": dict(cond_drop=0.5),
    "steps": dict(max_steps=960, checkpoint_every=120, keep=99),
}
GUIDANCE = ("captions never dropped", "half of the captions dropped", "as it is")


def quietly(words):
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert cli.main(words) == 0, words


def prepare(root):
    model = shipped_folder("tiny-sd15")
    quietly(["prepare", "photos", str(root / "raw"), "--crops", "16"])
    quietly(["prepare", "unsplash", str(root / "raw"), str(root / "data"), "--size", "32"])
    quietly(
        [
            "cache",
            "latents",
            str(root / "data"),
            str(root / "latents"),
            "--model",
            str(model),
            "--size",
            "32",
            "--encode-batch",
            "64",
        ]
    )
    quietly(
        [
            "cache",
            "prompts",
            str(root / "data"),
            str(root / "prompts"),
            "--model",
            str(model),
            "--encode-batch",
            "64",
        ]
    )


def bytes_of(data):
    return torch.stack([Transform(32)(data.image(i)) for i in range(len(data))])


class Judge:
    def __init__(self, root):
        self.net, test, known = (
            Tiny("tiny-photos"),
            pictures(root / "data", "test"),
            pictures(root / "data", "train"),
        )
        self.texts, self.seeds = (
            [test.row(i)["texts"][0] for i in range(len(test))],
            [key(0, "picture", i) % 2**32 for i in test.ids],
        )
        self.real, self.train = (self.net(bytes_of(d)) for d in (test, known))

    def __call__(self, task, module, w=2.0, scenes=True):
        from sdcourse.plot import to_uint8

        with torch.no_grad():
            found = self.net(
                to_uint8(
                    task.images(module, self.texts, self.seeds, guidance_scale=w, num_inference_steps=10)
                )
            )
        row = {
            "FD": frechet(found, self.real),
            "closer to training": memorisation(found, self.real, self.train)["closer"],
        }
        if not scenes:
            return row
        left = adherence(
            lambda texts, seeds: task.images(
                module, texts, list(seeds), guidance_scale=2.0, num_inference_steps=20
            ),
            40,
        )
        return row | {
            k: left[f"{k}_val"]["value"] for k in ("shape", "colour", "size", "place", "background")
        }


def module_of(task, checkpoint):
    found = load_checkpoint(checkpoint)["tensors"]
    module = task.build()
    module.load_state_dict(found.get("ema", found["model"]), strict=False)
    return module.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[])
    names, known = parser.parse_args().only, read_json(OUT) if OUT.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        judge = Judge(root)
        for name, over in {"as it is": {}, **RUNS}.items():
            if name in known and name not in names or names and name not in names:
                continue
            fixed = dict(
                model="tiny-sd15",
                data=str(root / "data"),
                latents=str(root / "latents"),
                prompts=str(root / "prompts"),
                flip=True,
                out=str(root / name.replace(" ", "-")),
            )
            task = sd15.Task(resolve(sd15.Config, preset="tiny", overrides=fixed | over))
            with redirect_stderr(StringIO()):
                train(task)
            rows = read_metrics(fixed["out"])
            words = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in over.items())
            sets = "--data data --latents latents --prompts prompts"
            said = dict(
                command=f"python -m sdcourse.train sd15 --preset tiny {sets} --flip {words}".strip(),
                loss=[[r["step"], r["loss"], r.get("val_loss")] for r in rows if "loss" in r],
            )
            places = sorted(
                (Path(fixed["out"]) / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:])
            )
            if name == "steps":
                said["curve"] = [dict(step=int(p.name[5:])) | judge(task, module_of(task, p)) for p in places]
            else:
                said |= judge(task, module_of(task, places[-1])) | dict(val_loss=rows[-1]["val_loss"])
            if name in GUIDANCE:
                said["guidance"] = {
                    str(w): judge(task, module_of(task, places[-1]), w, scenes=False)["FD"]
                    for w in (1.0, 1.5, 2.0, 3.0, 4.0)
                }
            if name == "as it is":
                said["before"] = judge(task, task.build().eval())
            known[name] = json.loads(json.dumps(said), parse_float=lambda x: float(f"{float(x):.4g}"))
            write_json(OUT, known)
            print(
                name,
                {k: v for k, v in known[name].items() if k not in ("loss", "command", "curve")},
                flush=True,
            )


if __name__ == "__main__":
    main()

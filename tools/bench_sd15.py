"""Our Stable Diffusion trainer beside the loop that everybody starts from, in one run, in turn:

    python tools/bench_sd15.py

The other side is a plain re-statement of diffusers' text-to-image script: pictures decoded and tokenised in a
torch DataLoader, VAE and text encoder in every step, torch's AdamW, the script's `EMAModel`, one `.item()`
per step. Both train the same tiny pipeline on the same pictures, 16 a step, in float32, each side in a
process of its own, and the processes take turns. The last table says where our time goes.
"""

import argparse, io, json, subprocess, sys, tempfile, time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F

import sdcourse  # noqa: F401  (guards torchvision)
from sdcourse import cli
from sdcourse.config import resolve
from sdcourse.core import use_cpu
from sdcourse.dataset import pictures
from sdcourse.engine import loop
from sdcourse.engine.dist import Ranks
from sdcourse.models.tiny_sd import make_pipeline
from sdcourse.train import sd15


def prepare(root):
    "An untrained tiny pipeline, photographs, and caches of both."
    data, model = root / "data", make_pipeline(root / "model")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        cli.run(["prepare", "photos", str(root / "raw")])
        cli.run(["prepare", "unsplash", str(root / "raw"), str(data), "--size", "64"])
        cli.run(["cache", "latents", str(data), str(root / "latents"), "--size", "32", "--model", str(model)])
        cli.run(["cache", "prompts", str(data), str(root / "prompts"), "--model", str(model)])


class Script:
    "The text-to-image loop of diffusers, without its options."

    def __init__(self, data, model, batch):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.training_utils import EMAModel
        from torchvision import transforms
        from transformers import CLIPTextModel, CLIPTokenizer

        self.scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
        self.tokenizer, self.text = (
            CLIPTokenizer.from_pretrained(str(model / "tokenizer")),
            CLIPTextModel.from_pretrained(model / "text_encoder").requires_grad_(False),
        )
        self.vae, self.unet = (
            AutoencoderKL.from_pretrained(model / "vae").requires_grad_(False),
            UNet2DConditionModel.from_pretrained(model / "unet").train(),
        )
        self.ema = EMAModel(
            self.unet.parameters(), model_cls=UNet2DConditionModel, model_config=self.unet.config
        )
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, weight_decay=1e-2)
        change = transforms.Compose(
            [
                transforms.Resize(32),
                transforms.CenterCrop(32),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        found = pictures(data, "train")

        class Set(torch.utils.data.Dataset):
            def __len__(_):
                return len(found)

            def __getitem__(_, i):
                return change(found.image(i)), self.tokenizer(
                    found.row(i)["texts"][0],
                    max_length=self.tokenizer.model_max_length,
                    padding="max_length",
                    truncation=True,
                    return_tensors="pt",
                ).input_ids[0]

        self.loader, self.seen = (
            torch.utils.data.DataLoader(Set(), batch_size=batch, shuffle=True, drop_last=True),
            0.0,
        )
        self.batches = iter(())

    def step(self):
        try:
            pixels, ids = next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            pixels, ids = next(self.batches)
        latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        noisy, words = self.scheduler.add_noise(latents, noise, t), self.text(ids, return_dict=False)[0]
        loss = F.mse_loss(
            self.unet(noisy, t, words, return_dict=False)[0].float(), noise.float(), reduction="mean"
        )
        self.seen += loss.repeat(len(latents)).mean().item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())


def ours(root, data, model, batch, cached, **more):
    "One of our trainings, ready to make steps."
    caches = dict(latents=str(root / "latents"), prompts=str(root / "prompts")) if cached else {}
    cfg = resolve(
        sd15.Config,
        preset="tiny",
        overrides=dict(
            model=str(model),
            data=str(data),
            batch_size=batch,
            max_steps=100_000,
            flip=True,
            ema_decay=0.9999,
            weight_decay=1e-2,
            lr=1e-4,
            cond_drop=0.0,
            out=str(root / "run"),
            **caches,
            **more,
        ),
    )
    task = sd15.Task(cfg)
    task.check()
    return loop.Run(task, Ranks())


def parts(run, steps):
    "Seconds per step of each part of one of our trainings, each timed alone."
    from sdcourse.engine.optim import clip_gradients, guarded_step
    from sdcourse.engine.order import Draws

    spent = dict.fromkeys(("read", "encode", "forward and backward", "clip", "AdamW", "EMA"), 0.0)

    def timed(name, f):
        start = time.perf_counter()
        out = f()
        spent[name] += (time.perf_counter() - start) / steps
        return out

    for s in range(run.step, run.step + steps):
        rows = run.micros[0]
        batch = timed("read", lambda: run.next_batch(s, rows))
        draws = Draws(0, s, rows)
        with torch.no_grad():
            batch = timed("encode", lambda: run.task.encode(batch, draws))
        timed("forward and backward", lambda: run.forward(batch, draws)[0].mean().backward())
        timed("clip", lambda: clip_gradients(run.params, 1.0))
        timed("AdamW", lambda: guarded_step(run.optimizer, torch.tensor(False)))
        timed("EMA", lambda: run.ema.update(s))
        run.optimizer.zero_grad(set_to_none=True)
    return spent


def sides(root):
    "name -> what makes one step of it, or our run."
    data, model, batch = root / "data", root / "model", 16
    return {
        "diffusers' loop": lambda: Script(data, model, batch).step,
        "diffusers' loop, freed memory kept": lambda: (use_cpu(), Script(data, model, batch).step)[1],
        "ours, online": lambda: ours(root, data, model, batch, False),
        "ours, caches": lambda: ours(root, data, model, batch, True),
        "ours, caches, --channels-last --compile": lambda: ours(
            root, data, model, batch, True, channels_last=True, compile=True
        ),
    }


def serve(root, name):
    """One side in its own process: for each number that comes in, so many steps, and their seconds back; 0
    asks for the parts.
    """
    it = sides(root)[name]()
    step = it if callable(it) else lambda: loop.step(it)
    for line in sys.stdin:
        took = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            took.append(time.perf_counter() - start)
        print(json.dumps(took or ({} if callable(it) else parts(it, 40))), flush=True)


class Side:
    "A process that makes steps when asked."

    def __init__(self, root, name):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(root), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, steps):
        print(steps, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def main():
    if sys.argv[1:2] == ["--serve"]:
        return serve(Path(sys.argv[2]), sys.argv[3])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="of --steps of each side")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        running = {name: Side(folder, name) for name in sides(Path(folder))}
        for side in running.values():
            side(4)
        took = {name: [] for name in running}
        for _ in range(args.rounds):
            for name, side in running.items():
                took[name].append(torch.tensor(side(args.steps)).median())
        first = torch.stack(took["diffusers' loop"])
        for name, t in took.items():
            steps = torch.stack(t)
            ratio = first / steps
            quartiles = f"{ratio.quantile(0.25):.2f}, {ratio.quantile(0.75):.2f}"
            fast = f"{ratio.median():.2f} times as fast (quartiles {quartiles})"
            print(f"{name}: median {1000 * steps.median():.0f} ms, {fast}")
        for name, side in running.items():
            if where := side(0):
                print(f"{name}: " + ", ".join(f"{k} {1000 * t:.1f} ms" for k, t in where.items()))
            side.process.kill()


if __name__ == "__main__":
    main()

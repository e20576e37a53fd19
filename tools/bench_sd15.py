"""Our Stable Diffusion trainer beside the loop that everybody starts from, in one run, step by step in turn:   python tools/bench_sd15.py [--batch 16] [--steps 60]

The other side is a plain re-statement of diffusers' text-to-image script: pictures decoded and tokenised in a torch DataLoader, VAE and text encoder in
every step, torch's AdamW, the script's `EMAModel`, one `.item()` per step. Both train the same tiny pipeline on the same pictures in float32. The last
table says where our time goes.
"""
import argparse, tempfile, time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import io

import torch
import torch.nn.functional as F

import sdcourse # noqa: F401  (guards torchvision)
from sdcourse.config import resolve
from sdcourse.data.cache import main as cache
from sdcourse.data.photos import main as prepare_photos
from sdcourse.data.unsplash import main as prepare_unsplash
from sdcourse.dataset import pictures
from sdcourse.dist import Ranks
from sdcourse.models.tiny_sd import make_pipeline
from sdcourse.train import loop, sd15


def prepare(root):
    "An untrained tiny pipeline, photographs, and caches of both."
    data, model = root / "data", make_pipeline(root / "model")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        prepare_photos([str(root / "raw")])
        prepare_unsplash([str(root / "raw"), str(data), "--size", "64"])
        cache(["latents", str(data), str(root / "latents"), "--size", "32", "--model", str(model)])
        cache(["prompts", str(data), str(root / "prompts"), "--model", str(model)])
    return data, model


class Script:
    "The text-to-image loop of diffusers, without its options."
    def __init__(self, data, model, batch):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.training_utils import EMAModel
        from torchvision import transforms
        from transformers import CLIPTextModel, CLIPTokenizer
        self.scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
        self.tokenizer, self.text = CLIPTokenizer.from_pretrained(str(model / "tokenizer")), CLIPTextModel.from_pretrained(model / "text_encoder").requires_grad_(False)
        self.vae, self.unet = AutoencoderKL.from_pretrained(model / "vae").requires_grad_(False), UNet2DConditionModel.from_pretrained(model / "unet").train()
        self.ema = EMAModel(self.unet.parameters(), model_cls=UNet2DConditionModel, model_config=self.unet.config)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, weight_decay=1e-2)
        change = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
        found = pictures(data, "train")
        class Set(torch.utils.data.Dataset):
            def __len__(_): return len(found)
            def __getitem__(_, i): return change(found.image(i)), self.tokenizer(found.row(i)["texts"][0], max_length=self.tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
        self.loader, self.seen = torch.utils.data.DataLoader(Set(), batch_size=batch, shuffle=True, drop_last=True), 0.
        self.batches = iter(())

    def step(self):
        try: pixels, ids = next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            pixels, ids = next(self.batches)
        latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        noisy, words = self.scheduler.add_noise(latents, noise, t), self.text(ids, return_dict=False)[0]
        loss = F.mse_loss(self.unet(noisy, t, words, return_dict=False)[0].float(), noise.float(), reduction="mean")
        self.seen += loss.repeat(len(latents)).mean().item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())


def ours(root, data, model, args, cached, **more):
    "One of our trainings, ready to make steps."
    caches = dict(latents=str(root / "latents"), prompts=str(root / "prompts")) if cached else {}
    cfg = resolve(sd15.Config, preset="tiny", overrides=dict(model=str(model), data=str(data), batch_size=args.batch, max_steps=100_000, flip=True, ema_decay=0.9999, weight_decay=1e-2, lr=1e-4, cond_drop=0., out=str(root / "run"), **caches, **more))
    task = sd15.Task(cfg)
    task.check()
    return loop.Run(task, Ranks())


def parts(run, steps):
    "Seconds per step of each part of one of our trainings, each timed alone."
    from sdcourse.train.optim import clip_gradients, guarded_step
    from sdcourse.train.order import Draws
    spent = dict.fromkeys(("read", "encode", "forward and backward", "clip", "AdamW", "EMA"), 0.)
    def timed(name, f):
        start = time.perf_counter()
        out = f()
        spent[name] += (time.perf_counter() - start) / steps
        return out
    for s in range(run.step, run.step + steps):
        rows = run.micros[0]
        batch = timed("read", lambda: run.next_batch(s, rows))
        draws = Draws(0, s, rows)
        with torch.no_grad(): batch = timed("encode", lambda: run.task.encode(batch, draws))
        timed("forward and backward", lambda: run.forward(batch, draws)[0].mean().backward())
        timed("clip", lambda: clip_gradients(run.params, 1.))
        timed("AdamW", lambda: guarded_step(run.optimizer, torch.tensor(False)))
        timed("EMA", lambda: run.ema.update(s))
        run.optimizer.zero_grad(set_to_none=True)
    return spent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data, model = prepare(root)
        script, runs = Script(data, model, args.batch), {"caches": ours(root, data, model, args, True), "online": ours(root, data, model, args, False),
            "caches, --channels-last --compile": ours(root, data, model, args, True, channels_last=True, compile=True)}
        sides = {"diffusers' loop": script.step} | {f"ours, {name}": lambda run=run: loop.step(run) for name, run in runs.items()}
        for f in sides.values(): f(), f(), f()
        took = {name: [] for name in sides}
        for _ in range(args.steps):
            for name, f in sides.items():
                start = time.perf_counter()
                f()
                took[name].append(time.perf_counter() - start)
        first = torch.tensor(took["diffusers' loop"])
        for name, t in took.items():
            ratio = first / torch.tensor(t)
            print(f"{name}: median {1000 * torch.tensor(t).median():.0f} ms, {ratio.median():.2f} times as fast (quartiles {ratio.quantile(0.25):.2f}, {ratio.quantile(0.75):.2f})")
        for name, run in runs.items(): print(f"{name}: " + ", ".join(f"{k} {1000 * t:.1f} ms" for k, t in parts(run, args.steps).items()))


if __name__ == "__main__": main()

"""Lesson 03: the tiny Stable Diffusion, its autoencoder, and the trainer."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sdcourse.tiny as tiny
from sdcourse.config import resolve
from sdcourse.core import UserError
from sdcourse.data.cache import main as cache
from sdcourse.data.scenes import main as prepare_scenes
from sdcourse.models import tiny_sd
from sdcourse.models.sd import noise_of
from sdcourse.train import sd15, vae
from sdcourse.train.loop import train
from sdcourse.train.order import Draws

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory): return tiny_sd.make_pipeline(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, model):
    "Twelve captioned pictures, with caches of latents and prompts."
    root = tmp_path_factory.mktemp("data")
    assert prepare_scenes([str(root / "data"), "--train", "12", "--val", "4", "--test", "4", "--size", "32"]) == 0
    common = ["--model", str(model), "--dtype", "fp32", "--encode-batch", "4"]
    assert cache(["latents", str(root / "data"), str(root / "latents"), "--size", "32", *common]) == 0
    assert cache(["prompts", str(root / "data"), str(root / "prompts"), *common]) == 0
    return root


def config(out, **over):
    base = dict(out=str(out), image_size=32, flip=False, max_steps=3, batch_size=4, encode_batch=4, lr=1e-4, ema_decay=0.9, checkpoint_every=0, num_samples=0, num_inference_steps=2, validation_prompts=("a red ring",), log_every=1)
    return resolve(sd15.Config, preset="tiny", overrides=base | over)


def weights(out):
    from sdcourse.train.checkpoint import latest_checkpoint, load_checkpoint
    return load_checkpoint(latest_checkpoint(Path(out) / "checkpoints")[0])["tensors"]["model"]


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the autoencoder

def test_autoencoder_reconstructs_held_out_pictures():
    "Asked: 26 dB for scenes and faces, 22 dB for photographs."
    test = vae.worlds("test", 32).tensors
    rows = torch.cat([(test["world"] == k).nonzero()[:100, 0] for k in range(3)])
    found = vae.measured(tiny.load("tiny-vae"), {k: v[rows] for k, v in test.items()})
    assert found["psnr_scenes"]["value"] > 36 and found["psnr_faces"]["value"] > 30 and found["psnr_photos"]["value"] > 22, found


def test_latents_have_deviation_one():
    net, x = tiny.load("tiny-vae"), vae.worlds("test", 32, 0.2).tensors["pixels"]
    with torch.no_grad(): z = net.encode(x.float() / 127.5 - 1).latent_dist.mean * net.config.scaling_factor
    assert abs(z.std().item() - 1) < 0.1


def test_pictures_come_back_as_bytes():
    class Half(torch.nn.Module):
        device = "cpu"
        def encode(self, x): return type("O", (), dict(latent_dist=type("D", (), dict(mean=x))))
        def decode(self, z): return type("O", (), dict(sample=z * 0.5))
    x = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert vae.reconstructed(Half(), x).flatten().tolist() == [64, 114, 191]
    found = vae.measured(Half(), dict(pixels=x.expand(4, 3, 12, 12), world=torch.tensor([0, 0, 1, 2])))
    assert abs(found["psnr_scenes"]["value"] - 10 * np.log10(255**2 / ((64**2 + 14**2 + 64**2) / 3))) < 1e-6


def test_divergence_is_that_of_torch():
    from torch.distributions import Normal, kl_divergence
    task = vae.Task(resolve(vae.Config, overrides=dict(widths=(8, 8), side=8, beta=0.5)))
    module = task.build().eval()
    x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    d = module.vae.encode(x / 127.5 - 1).latent_dist
    kl = kl_divergence(Normal(d.mean, d.std), Normal(torch.zeros_like(d.mean), 1.)).mean((1, 2, 3))
    error = (module.vae.decode(d.mean).sample - (x / 127.5 - 1)).square().mean((1, 2, 3))
    torch.testing.assert_close(module(dict(pixels=x), Draws(0, 0, range(3)))[0], error + 0.5 * kl)


@pytest.mark.parametrize("over, words", [(dict(side=30), "no multiple of 4"), (dict(widths=(9, 8)), "multiples of 8"), (dict(beta=-1.), "0 or more"), (dict(share=0.), "share above 0")])
def test_autoencoder_refuses(over, words):
    with pytest.raises(UserError, match=words): vae.Task(resolve(vae.Config, overrides=over)).check()


# ---- the tokenizer

def test_tokenizer_is_clips_own(model):
    from transformers import CLIPTokenizer
    there, made = CLIPTokenizer.from_pretrained(str(model / "tokenizer")), tiny_sd.make_tokenizer(tiny_sd.sample_captions())
    texts = ["a small red circle", "Ünknown wörds, 漢字 & 42!", ""]
    assert there(texts).input_ids == made(texts).input_ids and there.model_max_length == 32
    for ids in there(texts).input_ids: assert ids[0] == there.bos_token_id and ids[-1] == there.eos_token_id and there.eos_token_id not in ids[1:-1]
    assert max(len(ids) for ids in there(tiny_sd.sample_captions()).input_ids) <= 32


def test_the_same_seed_gives_the_same_bytes(tmp_path, model):
    from sdcourse.data.encoders import weights_id
    again, other = tiny_sd.make_pipeline(tmp_path / "a"), tiny_sd.make_pipeline(tmp_path / "b", seed=1)
    assert weights_id(again / "unet") == weights_id(model / "unet") != weights_id(other / "unet")
    with pytest.raises(UserError, match="not empty"): tiny_sd.make_pipeline(tmp_path / "a")


# ---- the loss

def denoiser(**over):
    cfg = config("", **over)
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.tensor(0.5))
        def forward(self, x, t, c): self.seen = (x, t, c); return type("O", (), dict(sample=self.w * x))
    abar = noise_of({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})[0]
    return sd15.Denoiser(Net(), cfg, abar=abar, prediction=over.get("prediction", "eps"), shift=0.1, scale=2., empty=torch.full((5, 3), 7.)), abar


def batch_of(n):
    g = torch.Generator().manual_seed(1)
    return {"mean": torch.randn(n, 1, 4, 4, 4, generator=g), "std": torch.full((n, 1, 4, 4, 4), 0.1), "text_encoder.hidden": torch.randn(n, 5, 3, generator=g)}


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_is_that_of_diffusers(prediction):
    from diffusers import DDPMScheduler
    module, _ = denoiser(prediction=prediction, cond_drop=0.)
    batch, draws = batch_of(16), Draws(0, 3, range(16))
    loss, at = module(batch, draws)
    x, t, context = module.unet.seen
    z = (batch["mean"][:, 0] + 0.1 * draws.normal("posterior", (4, 4, 4)) - 0.1) * 2.
    eps = draws.normal("noise", (4, 4, 4))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(x, scheduler.add_noise(z, eps, t), atol=2e-5, rtol=1e-5)
    target = eps if prediction == "eps" else scheduler.get_velocity(z, eps, t)
    torch.testing.assert_close(loss, F.mse_loss(0.5 * x, target, reduction="none").mean((1, 2, 3)), atol=2e-5, rtol=1e-4)
    assert torch.equal(context, batch["text_encoder.hidden"]) and torch.equal(at, t / 1000)


def test_min_snr_weighs_as_diffusers_computes():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr
    plain, weighted = (denoiser(min_snr_gamma=g, cond_drop=0.)[0] for g in (0., 5.))
    batch, draws = batch_of(16), Draws(0, 3, range(16))
    (a, at), (b, _) = plain(batch, draws), weighted(batch, draws)
    s = compute_snr(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), plain.unet.seen[1])
    torch.testing.assert_close(b / a, s.clamp(max=5.) / s, atol=1e-4, rtol=1e-4)


def test_every_step_is_trained_and_captions_are_dropped_at_their_rate():
    module, _ = denoiser(cond_drop=0.1)
    t, dropped = [], []
    for step in range(40):
        batch = batch_of(256)
        module(batch, Draws(0, step, range(256)))
        gone = (module.unet.seen[2] == 7.).all(2).all(1)
        assert torch.equal(module.unet.seen[2][~gone], batch["text_encoder.hidden"][~gone])
        assert 0 < gone.sum() < 256
        t.append(module.unet.seen[1]); dropped.append(gone)
    t, share = torch.cat(t), torch.cat(dropped).double().mean().item()
    assert t.min() < 5 and t.max() > 994 and abs(t.double().mean() - 499.5) < 3 * 289 / 101
    assert abs(share - 0.1) < 3 * (0.09 / 10240) ** 0.5


# ---- training

def test_caches_give_the_weights_of_online_training(tmp_path, scenes, model):
    "Bit by bit, from float32 caches with the same encode batches."
    common = dict(model=str(model), data=str(scenes / "data"), num_workers=0)
    train(sd15.Task(config(tmp_path / "online", **common)))
    train(sd15.Task(config(tmp_path / "cached", **common, latents=str(scenes / "latents"), prompts=str(scenes / "prompts"))))
    a, b = weights(tmp_path / "online"), weights(tmp_path / "cached")
    assert max((a[k] - b[k]).abs().max().item() for k in a) == 0


def test_resumed_is_uninterrupted(tmp_path, model):
    import shutil
    common = dict(model=str(model), data="scenes", train_text=True, batch_size=6, micro_batch=4, checkpoint_every=1, keep=3)
    for name in ("whole", "parts"): train(sd15.Task(config(tmp_path / name, **common)))
    for gone in ("checkpoints/step-3", "checkpoints/step-2", "export"):
        there = next(p for p in (tmp_path / "parts").glob(gone.replace("step-", "step-*")) if gone == "export" or int(p.name[5:]) == int(gone[-1]))
        shutil.rmtree(there)
    assert train(sd15.Task(config(tmp_path / "parts", **common))).step == 3
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert same(a, b) and any(k.startswith("text.") for k in a)


def test_export_draws_in_plain_diffusers_what_the_task_draws(tmp_path, scenes, model):
    from diffusers import StableDiffusionPipeline
    from sdcourse.models.dit import image_generators
    task = sd15.Task(config(tmp_path / "run", model=str(model), data=str(scenes / "data"), latents=str(scenes / "latents"), prompts=str(scenes / "prompts"), lr=1e-3))
    train(task)
    run = tmp_path / "run"
    pipe = StableDiffusionPipeline.from_pretrained(run / "export", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    module = task.build()
    from sdcourse.train.checkpoint import latest_checkpoint, load_checkpoint
    ema = load_checkpoint(latest_checkpoint(run / "checkpoints")[0])["tensors"]["ema"]
    module.load_state_dict(ema, strict=False)
    assert same({f"unet.{k}": v for k, v in pipe.unet.state_dict().items()}, ema)
    texts = ["a red ring", "a green moon"]
    theirs = pipe(texts, generator=image_generators([0, 1]), guidance_scale=2., num_inference_steps=2, output_type="pt").images * 2 - 1
    assert (task.images(module.eval(), texts, [0, 1]) - theirs).abs().max() < 1e-5
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3 and "val_loss" in rows[-1] and next((run / "samples").glob("*.png")) and (run / "README.md").is_file()


def test_only_what_is_asked_trains(model):
    task = sd15.Task(config("", model=str(model)))
    module = task.build()
    assert module.text is None and all(n.startswith("unet.") for n, p in module.named_parameters())
    both = sd15.Task(config("", model=str(model), train_text=True)).build()
    assert {n.split(".")[0] for n, p in both.named_parameters() if p.requires_grad} == {"unet", "text"}
    fresh = sd15.Task(config("", model=str(model), from_scratch=True)).build()
    first = next(iter(module.unet.state_dict()))
    assert not torch.equal(fresh.unet.state_dict()[first], module.unet.state_dict()[first])


# ---- bad input

@pytest.mark.parametrize("over, words", [
    (dict(model="/nowhere/model"), "--model .*no such folder"),
    (dict(model="CompVis/stable-diffusion-v1-4"), "not in the local hub cache.*licence"),
    (dict(image_size=34), "no multiple of 8"),
    (dict(cond_drop=1.), "probability below 1"),
    (dict(min_snr_gamma=-1.), "0 or more"),
    (dict(data="scenes", flip=True), "left and right"),
    (dict(latents="/nowhere/latents"), "sdcourse cache latents .* --size 32"),
    (dict(prompts="/nowhere/prompts"), "sdcourse cache prompts"),
    (dict(prompts="x", train_text=True), "would not change with the text encoder")])
def test_refused_in_one_line(over, words, scenes, model):
    over = dict(model=str(model), data=str(scenes / "data")) | over
    with pytest.raises(UserError, match=words) as e: sd15.Task(config("", **over)).check()
    assert "\n" not in str(e.value)


def test_pictures_without_captions_are_refused(tmp_path, model):
    from PIL import Image
    for split in ("train", "val"):
        (tmp_path / "d" / split).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "d" / split / "a.png")
    with pytest.raises(UserError, match="a has no caption"): sd15.Task(config("", model=str(model), data=str(tmp_path / "d"))).check()


def test_prompts_of_another_text_encoder_are_refused(tmp_path, scenes):
    other = tiny_sd.make_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made by another text encoder"): sd15.Task(config("", model=str(other), data=str(scenes / "data"), prompts=str(scenes / "prompts"))).check()


def test_a_pipeline_with_a_part_missing(tmp_path, model):
    import shutil
    shutil.copytree(model, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "vae")
    with pytest.raises(UserError, match="has no vae/"): sd15.Task(config("", model=str(tmp_path / "sd"))).check()

"""Lesson 03: the tiny Stable Diffusion, its autoencoder, and the trainer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ranks
import tiny_models
from sdcourse.models.files import load_shipped
from sdcourse.models.shipped import shipped_folder, shipped_home
import warm
from sdcourse import cli
from sdcourse.config import resolve
from sdcourse.core import UserError
from sdcourse.engine.loop import Run, train, validation_loss
from sdcourse.engine.order import Draws
from sdcourse.models import tiny_sd
from sdcourse.models.home import noise_of
from sdcourse.train import sd15, vae


@pytest.fixture(scope="module")
def model(built):
    return built(tiny_models.thin_sd15)


@pytest.fixture(scope="module")
def model2(tmp_path_factory, model):
    """What Stable Diffusion 2.1 has and 1.5 has not: a prediction of v, linear projections, heads of one
    width, DDIM; autoencoder and text encoder are those of `model`.
    """
    import shutil
    from diffusers import DDIMScheduler, UNet2DConditionModel

    folder = shutil.copytree(model, tmp_path_factory.mktemp("models") / "sd2")
    unet = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(
        unet
        | dict(
            use_linear_projection=True,
            attention_head_dim=[2 * (i + 1) for i in range(len(unet["block_out_channels"]))],
        )
    ).save_pretrained(folder / "unet")
    DDIMScheduler.from_pretrained(
        folder / "scheduler", prediction_type="v_prediction", clip_sample=False
    ).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | dict(scheduler=["diffusers", "DDIMScheduler"]))
    )
    return folder


@pytest.fixture(scope="module")
def scenes(built, model):
    "Twelve captioned pictures, with caches of latents and prompts; whoever changes them, changes a copy."

    def captioned_scenes(root):
        data = str(root / "data")
        parts = [w for split, n in dict(train=12, val=4, test=4).items() for w in (f"--{split}", str(n))]
        assert cli.run(["prepare", "scenes", data, *parts, "--size", "32"]) == 0
        common = ["--model", str(model), "--dtype", "fp32", "--encode-batch", "4"]
        assert cli.run(["cache", "latents", data, str(root / "latents"), "--size", "32", *common]) == 0
        assert cli.run(["cache", "prompts", data, str(root / "prompts"), *common]) == 0

    return built(captioned_scenes)


def config(out, **over):
    base = dict(
        out=str(out),
        image_size=32,
        flip=False,
        max_steps=3,
        batch_size=4,
        encode_batch=4,
        lr=1e-4,
        ema_decay=0.9,
        checkpoint_every=0,
        num_samples=0,
        num_inference_steps=2,
        validation_prompts=("a red ring",),
        log_every=1,
    )
    return resolve(sd15.Config, preset="tiny", overrides=base | over)


def weights(out):
    from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint

    return load_checkpoint(latest_checkpoint(Path(out) / "checkpoints")[0])["tensors"]["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the autoencoder


@pytest.fixture(scope="module")
def some_of_all():
    "Sixty held-out pictures of each world, at 64 pixels."
    from sdcourse.data.sets import captioned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioned, "SHARES", {name: (0, 60) for name in captioned.SHARES})
        return captioned.captioned("val", 64)[0].tensors


def test_autoencoder_reconstructs_held_out_pictures(some_of_all):
    "Asked: 34 dB for scenes, 28 for faces, 30 for emoji (29.8 flat), 24 for photographs."
    found = vae.psnr_of_worlds(load_shipped("tiny-vae"), some_of_all)
    asked = dict(scenes=34, faces=28, emoji_3d=29, emoji_flat=29, photos=24)
    assert found.keys() == {f"psnr_{name}" for name in asked}
    assert all(found[f"psnr_{name}"]["value"] > dB for name, dB in asked.items()), found


def test_latents_have_deviation_one(some_of_all):
    net = load_shipped("tiny-vae")
    with torch.no_grad():
        x = some_of_all["pixels"].float() / 127.5 - 1
        z = net.encode(x).latent_dist.mean * net.config.scaling_factor
    assert abs(z.std().item() - 1) < 0.1


def test_an_autoencoder_goes_on_from_a_folder(tmp_path):
    from diffusers import AutoencoderKL

    home = tmp_path / "first"
    vae.Task(resolve(vae.Config, overrides=dict(widths=(8, 8), side=8))).build().vae.save_pretrained(home)
    task = vae.Task(resolve(vae.Config, overrides=dict(model=str(home), side=16)))
    task.check()
    later = task.build().vae
    assert later.config.block_out_channels == [8, 8] and later.config.sample_size == 16
    assert same(later.state_dict(), AutoencoderKL.from_pretrained(home).state_dict())
    with pytest.raises(UserError, match="no multiple of 2"):
        vae.Task(resolve(vae.Config, overrides=dict(model=str(home), side=15))).check()


def test_pictures_come_back_as_bytes():
    class Half(torch.nn.Module):
        device = "cpu"

        def encode(self, x):
            return type("O", (), dict(latent_dist=type("D", (), dict(mean=x))))

        def decode(self, z):
            return type("O", (), dict(sample=z * 0.5))

    x = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert vae.reconstructed(Half(), x).flatten().tolist() == [64, 114, 191]
    found = vae.psnr_of_worlds(Half(), dict(pixels=x.expand(10, 3, 12, 12), world=torch.arange(10) // 2))
    assert abs(found["psnr_scenes"]["value"] - 10 * np.log10(255**2 / ((64**2 + 14**2 + 64**2) / 3))) < 1e-6


def test_divergence_is_that_of_torch():
    from torch.distributions import Normal, kl_divergence

    task = vae.Task(resolve(vae.Config, overrides=dict(widths=(8, 8), side=8, beta=0.5)))
    module = task.build().eval()
    x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    d = module.vae.encode(x / 127.5 - 1).latent_dist
    kl = kl_divergence(Normal(d.mean, d.std), Normal(torch.zeros_like(d.mean), 1.0)).mean((1, 2, 3))
    error = (module.vae.decode(d.mean).sample - (x / 127.5 - 1)).square().mean((1, 2, 3))
    torch.testing.assert_close(module(dict(pixels=x), Draws(0, 0, range(3)))[0], error + 0.5 * kl)


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(side=30), "no multiple of 4"),
        (dict(widths=(9, 8)), "multiples of 8"),
        (dict(beta=-1.0), "at least 0"),
        (dict(share=0.0), "greater than 0 and at most 1"),
    ],
)
def test_autoencoder_refuses(over, words):
    with pytest.raises(UserError, match=words):
        vae.Task(resolve(vae.Config, overrides=over)).check()


# ---- the tokenizer


def test_tokenizer_is_clips_own(model):
    from transformers import CLIPTokenizer

    there, made = (
        CLIPTokenizer.from_pretrained(str(model / "tokenizer")),
        tiny_sd.make_tokenizer(tiny_sd.sample_captions()),
    )
    texts = ["a small red circle", "Ünknown wörds, 漢字 & 42!", ""]
    assert there(texts).input_ids == made(texts).input_ids and there.model_max_length == 32
    for ids in there(texts).input_ids:
        assert (
            ids[0] == there.bos_token_id
            and ids[-1] == there.eos_token_id
            and there.eos_token_id not in ids[1:-1]
        )
    assert max(len(ids) for ids in there(tiny_sd.sample_captions()).input_ids) <= 32


def test_equally_frequent_pairs_are_merged_in_the_same_order():
    "Each makes its own random hashes: without fixed numbers two of them agree by luck."
    words = [a + b for a in "abcdefgh" for b in "abcdefgh"] * 2
    orders = {tuple(sorted(tiny_sd.make_tokenizer(words).get_vocab().items())) for _ in range(4)}
    assert len(orders) == 1
    merges = tiny_sd.make_tokenizer(words, words=10)
    assert len(merges) == 512 + 10 + 2


def test_the_same_seed_gives_the_same_bytes(tmp_path, model):
    from sdcourse.models.files import weights_id

    again = tiny_models.thin_sd15(tmp_path / "a")
    other = tiny_sd.make_pipeline(tmp_path / "b", seed=1, width=32, channels=(16, 32))
    assert weights_id(again / "unet") == weights_id(model / "unet") != weights_id(other / "unet")
    with pytest.raises(UserError, match="not empty"):
        tiny_sd.make_pipeline(tmp_path / "a")


def test_the_larger_untrained_one_has_the_words_of_tiny_clip(tmp_path):
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    made = tiny_sd.make_pipeline(tmp_path / "a", **tiny_sd.UNTRAINED["new64"])
    clip, text = (
        cls.from_pretrained(folder).state_dict()
        for cls, folder in ((CLIPModel, shipped_folder("tiny-clip")), (CLIPTextModel, made / "text_encoder"))
    )
    words = {k.removeprefix("text_model."): v for k, v in clip.items() if k.startswith("text_model.")}
    found = {k.removeprefix("text_model."): v for k, v in text.items()}
    assert found.keys() == words.keys() and all(torch.equal(v, words[k].float()) for k, v in found.items())
    known, mine = (
        CLIPTokenizer.from_pretrained(p) for p in (shipped_folder("tiny-clip"), made / "tokenizer")
    )
    asked = "a 3d emoji of a woman firefighter with dark skin"
    assert known(asked).input_ids == mine(asked).input_ids and mine.model_max_length == tiny_sd.LENGTH
    unet = json.loads((made / "unet/config.json").read_text())
    assert (unet["sample_size"], len(unet["block_out_channels"])) == (16, 3)
    assert unet["cross_attention_dim"] == words["embeddings.token_embedding.weight"].shape[1]


def test_the_shipped_model_draws_what_is_asked():
    """Through plain diffusers, from the float16 files; each fact in nine of ten objects, pairs of shape and
    colour that were never trained included.
    """
    from diffusers import StableDiffusionPipeline
    from sdcourse.core import read_json
    from sdcourse.evaluation.adherence import adherence
    from sdcourse.engine.order import image_generators

    pipe = StableDiffusionPipeline.from_pretrained(shipped_folder("tiny-sd15"))
    pipe.set_progress_bar_config(disable=True)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {
        torch.float32
    } and pipe.scheduler.config.prediction_type == "epsilon"

    def draw(texts, seeds):
        return (
            pipe(
                list(texts),
                generator=image_generators(list(seeds)),
                guidance_scale=2.0,
                num_inference_steps=20,
                output_type="pt",
            ).images
            * 2
            - 1
        )

    found = adherence(draw, 30)
    assert len(found) == 12 and all(n["value"] >= 0.9 for n in found.values()), found
    assert all(
        n["low"] >= 0.9 and n["n"] >= 200
        for n in read_json(shipped_home() / "manifest.json")["tiny-sd15"]["metrics"].values()
    )


# ---- the loss


def denoiser(**over):
    cfg = config("", **over)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t, c):
            self.seen = (x, t, c)
            return type("O", (), dict(sample=self.w * x))

    abar = noise_of({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})[0]
    return sd15.Denoiser(
        Net(),
        cfg,
        abar=abar,
        prediction=over.get("prediction", "eps"),
        empty=torch.full((5, 3), 7.0),
    ), abar


def batch_of(n, side=4, words=(5, 3)):
    g = torch.Generator().manual_seed(1)
    return {
        "x0": torch.randn(n, 4, side, side, generator=g),
        "text_encoder.hidden": torch.randn(n, *words, generator=g),
    }


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_is_that_of_diffusers(prediction):
    from diffusers import DDPMScheduler

    module, _ = denoiser(prediction=prediction, cond_drop=0.0)
    batch, draws = batch_of(16), Draws(0, 3, range(16))
    loss, at = module(batch, draws)
    x, t, context = module.unet.seen
    z = batch["x0"]
    eps = draws.normal("noise", (4, 4, 4))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(x, scheduler.add_noise(z, eps, t), atol=2e-5, rtol=1e-5)
    target = eps if prediction == "eps" else scheduler.get_velocity(z, eps, t)
    torch.testing.assert_close(
        loss, F.mse_loss(0.5 * x, target, reduction="none").mean((1, 2, 3)), atol=2e-5, rtol=1e-4
    )
    assert torch.equal(context, batch["text_encoder.hidden"]) and torch.equal(at, t / 1000)


def test_min_snr_weighs_as_diffusers_computes():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    plain, weighted = (denoiser(min_snr_gamma=g, cond_drop=0.0)[0] for g in (0.0, 5.0))
    batch, draws = batch_of(16), Draws(0, 3, range(16))
    (a, at), (b, _) = plain(batch, draws), weighted(batch, draws)
    s = compute_snr(
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), plain.unet.seen[1]
    )
    torch.testing.assert_close(b / a, s.clamp(max=5.0) / s, atol=1e-4, rtol=1e-4)


def test_every_step_is_trained_and_captions_are_dropped_at_their_rate():
    module, _ = denoiser(cond_drop=0.1)
    t, dropped = [], []
    for step in range(40):
        batch = batch_of(256)
        module(batch, Draws(0, step, range(256)))
        gone = (module.unet.seen[2] == 7.0).all(2).all(1)
        assert torch.equal(module.unet.seen[2][~gone], batch["text_encoder.hidden"][~gone])
        assert 0 < gone.sum() < 256
        t.append(module.unet.seen[1])
        dropped.append(gone)
    t, share = torch.cat(t), torch.cat(dropped).double().mean().item()
    assert t.min() < 5 and t.max() > 994 and abs(t.double().mean() - 499.5) < 3 * 289 / 101
    assert abs(share - 0.1) < 3 * (0.09 / 10240) ** 0.5


def losses(batch=16, **over):
    "(loss, network input, timesteps, draws, the clean latents) of one forward pass."
    module, abar = denoiser(cond_drop=0.0, **over)
    b, draws = batch_of(batch), Draws(0, 3, range(batch))
    loss, _ = module(b, draws)
    return loss.detach(), module.unet.seen[0], module.unet.seen[1], draws, b["x0"], abar


def test_dream_is_that_of_diffusers():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_dream_and_update_latents

    loss, seen, t, draws, z, _ = losses(dream=True, dream_detail_preservation=2.0)
    scheduler, eps = (
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        draws.normal("noise", (4, 4, 4)),
    )

    class Net(torch.nn.Module):
        def forward(self, x, t, c):
            return type("O", (), dict(sample=0.5 * x))

    x, target = compute_dream_and_update_latents(
        Net(), scheduler, t, eps, scheduler.add_noise(z, eps, t), eps, None, 2.0
    )
    torch.testing.assert_close(seen, x, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(loss, (0.5 * x - target).square().mean((1, 2, 3)), atol=2e-5, rtol=1e-4)


def test_perturbation_is_in_the_input_and_offset_in_both():
    plain, (loss, seen, t, draws, z, abar) = losses(), losses(input_perturbation=0.5)
    alpha, sigma = abar[t].float().sqrt().view(-1, 1, 1, 1), (1 - abar[t]).float().sqrt().view(-1, 1, 1, 1)
    eps, more = draws.normal("noise", (4, 4, 4)), draws.normal("perturbation", (4, 4, 4))
    torch.testing.assert_close(seen, plain[1] + 0.5 * sigma * more, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, (0.5 * seen - eps).square().mean((1, 2, 3)), atol=1e-5, rtol=1e-4)
    loss, seen, *_ = losses(noise_offset=0.3)
    moved = eps + 0.3 * draws.normal("offset", (4,)).view(16, 4, 1, 1)
    torch.testing.assert_close(seen, alpha * z + sigma * moved, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, (0.5 * seen - moved).square().mean((1, 2, 3)), atol=1e-5, rtol=1e-4)


def test_biased_timesteps_have_their_share():
    t = losses(4096, timestep_bias="later", timestep_bias_multiplier=3.0, timestep_bias_portion=0.25)[2]
    assert abs((t >= 750).double().mean().item() - 0.5) < 3 * (0.25 / 4096) ** 0.5
    t = losses(
        4096,
        timestep_bias="range",
        timestep_bias_multiplier=0.0,
        timestep_bias_begin=100,
        timestep_bias_end=900,
    )[2]
    assert ((t < 100) | (t >= 900)).all()


def test_debiased_weight():
    (a, _, t, _, _, abar), (b, *_) = losses(), losses(debiased=True)
    torch.testing.assert_close(
        b / a, ((1 - abar[t]) / abar[t]).clamp(1e-3, 1e3).sqrt().float(), atol=1e-3, rtol=1e-3
    )


def test_zero_terminal_snr_stays_finite_and_reaches_the_sampler(model):
    task = sd15.Task(config("", model=str(model), zero_terminal_snr=True, prediction="v"))
    assert task.noise[0][-1] == 0
    module = task.build().eval()
    b = batch_of(64, side=8, words=(32, 32))
    module.objective.probabilities = torch.nn.functional.one_hot(torch.tensor(999), 1000).double()
    loss, t = module(b, Draws(0, 0, range(64)))
    assert loss.isfinite().all() and (t == 0.999).all()
    pipe = task.pipeline(module)
    assert pipe.scheduler.config.rescale_betas_zero_snr and pipe.scheduler.alphas_cumprod[-1] < 1e-7
    pipe.scheduler.set_timesteps(5)
    assert pipe.scheduler.timesteps[0] == 999 and task.images(module, ["a red ring"], [0]).isfinite().all()


def test_lr_grows_with_the_batch():
    cfg = config("", scale_lr=True, lr=1e-4, batch_size=8)
    assert (
        cfg.lr == pytest.approx(8e-4)
        and resolve(sd15.Config, overrides={k: v for k, v in cfg.__dict__.items()}).lr == cfg.lr
    )  # once


def test_complete_captions_say_everything(model):
    from sdcourse.data.sets.scenes import captions, facts

    data = sd15.Task(config("", model=str(model), caption_column="complete")).dataset("train")
    found = data.__getitems__([(i, 7 * i) for i in range(20)])
    known = facts(data.ids[:20])
    assert found["text"] == [captions(known, i)[3] for i in range(20)]
    mixed = (
        sd15.Task(config("", model=str(model))).dataset("train").__getitems__([(i, 7 * i) for i in range(20)])
    )
    assert {captions(known, i).index(t) for i, t in enumerate(mixed["text"])} == set(range(5))


# ---- training


def test_caches_give_the_weights_of_online_training(tmp_path, scenes, model):
    "Bit by bit, from float32 caches with the same encode batches."
    common = dict(model=str(model), data=str(scenes / "data"), num_workers=0)
    train(sd15.Task(config(tmp_path / "online", **common)))
    train(
        sd15.Task(
            config(
                tmp_path / "cached",
                **common,
                latents=str(scenes / "latents"),
                prompts=str(scenes / "prompts"),
            )
        )
    )
    a, b = weights(tmp_path / "online"), weights(tmp_path / "cached")
    assert max((a[k] - b[k]).abs().max().item() for k in a) == 0


def test_micro_batches_and_ranks_change_nothing(tmp_path, scenes, model):
    "O1, O2, D1: 8, 3 + 3 + 2, and two processes see the same pairs and reach the same weights."
    common = dict(
        model=str(model),
        data=str(scenes / "data"),
        latents=str(scenes / "latents"),
        prompts=str(scenes / "prompts"),
        precision="fp64",
        batch_size=8,
        max_steps=10,
    )
    for name, micro in (("whole", 8), ("parts", 3)):
        train(sd15.Task(config(tmp_path / name, **common, micro_batch=micro)))
    options = {
        k: v
        for k, v in config(tmp_path / "ranks", **common, micro_batch=4).__dict__.items()
        if k
        in {
            *common,
            "out",
            "image_size",
            "encode_batch",
            "lr",
            "ema_decay",
            "checkpoint_every",
            "num_samples",
            "num_inference_steps",
            "micro_batch",
            "log_every",
        }
    }
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    ends = ranks.finish(
        ranks.start(
            ["-m", "sdcourse.train", "sd15", "--preset", "tiny", *words, "--no-flip", "--threads", "1"],
            2,
            first=warm.MODELS,
        ),
        warm.LONG,
    )
    assert [c for c, _, _ in ends] == [0, 0], ends[0][2][-3000:]
    want = weights(tmp_path / "whole")
    for name in ("parts", "ranks"):
        got = weights(tmp_path / name)
        assert got.keys() == want.keys() and max((got[k] - want[k]).abs().max().item() for k in want) <= 1e-9
    rows = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("whole", "ranks")
    ]
    assert [r["loss"] for r in rows[0] if "loss" in r] == pytest.approx(
        [r["loss"] for r in rows[1] if "loss" in r], rel=1e-9
    )


@pytest.mark.parametrize("cached", [False, True])
def test_resumed_is_uninterrupted(tmp_path, scenes, model, cached):
    """R1: drawn scenes with the text encoder trained along; from caches, accumulated four times, read by two
    workers, across the end of an epoch.
    """
    import shutil

    common = dict(
        model=str(model),
        data="scenes",
        train_text=True,
        batch_size=6,
        micro_batch=4,
        checkpoint_every=1,
        keep=3,
    )
    if cached:
        common |= dict(
            data=str(scenes / "data"),
            latents=str(scenes / "latents"),
            prompts=str(scenes / "prompts"),
            train_text=False,
            batch_size=8,
            micro_batch=2,
            num_workers=2,
        )
    for name in ("whole", "parts"):
        train(sd15.Task(config(tmp_path / name, **common)))
    for gone in ("checkpoints/step-3", "checkpoints/step-2", "export"):
        there = next(
            p
            for p in (tmp_path / "parts").glob(gone.replace("step-", "step-*"))
            if gone == "export" or int(p.name[5:]) == int(gone[-1])
        )
        shutil.rmtree(there)
    assert train(sd15.Task(config(tmp_path / "parts", **common))).step == 3
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert same(a, b) and any(k.startswith("text.") for k in a) != cached


@pytest.mark.parametrize("name, prediction", [("model", "eps"), ("model2", "v")])
def test_export_draws_in_plain_diffusers_what_the_task_draws(tmp_path, scenes, request, name, prediction):
    from diffusers import StableDiffusionPipeline
    from sdcourse.engine.order import image_generators

    task = sd15.Task(
        config(
            tmp_path / "run",
            model=str(request.getfixturevalue(name)),
            data=str(scenes / "data"),
            latents=str(scenes / "latents"),
            prompts=str(scenes / "prompts"),
            lr=1e-3,
        )
    )
    train(task)
    run = tmp_path / "run"
    pipe = StableDiffusionPipeline.from_pretrained(run / "export", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    module = task.build()
    assert (
        module.objective.prediction == prediction
        and pipe.scheduler.config.prediction_type == {"eps": "epsilon", "v": "v_prediction"}[prediction]
    )
    from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint

    ema = load_checkpoint(latest_checkpoint(run / "checkpoints")[0])["tensors"]["ema"]
    module.load_state_dict(ema, strict=False)
    assert same({f"unet.{k}": v for k, v in pipe.unet.state_dict().items()}, ema)
    assert (
        cli.run(["export", str(run), str(tmp_path / "unet"), "--part", "unet"]) == 0
    )  # the newest checkpoint is the last step
    assert same(pipe.unet.state_dict(), type(pipe.unet).from_pretrained(tmp_path / "unet").state_dict())
    texts = ["a red ring", "a green moon"]
    theirs = (
        pipe(
            texts,
            generator=image_generators([0, 1]),
            guidance_scale=2.0,
            num_inference_steps=2,
            output_type="pt",
        ).images
        * 2
        - 1
    )
    assert (task.images(module.eval(), texts, [0, 1]) - theirs).abs().max() < 1e-5
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (
        rows[-1]["step"] == 3
        and "val_loss" in rows[-1]
        and next((run / "samples").glob("*.png"))
        and (run / "README.md").is_file()
    )


def test_only_what_is_asked_trains(model):
    task = sd15.Task(config("", model=str(model)))
    module = task.build()
    assert module.text is None and all(n.startswith("unet.") for n, p in module.named_parameters())
    both = sd15.Task(config("", model=str(model), train_text=True)).build()
    assert {n.split(".")[0] for n, p in both.named_parameters() if p.requires_grad} == {"unet", "text"}
    fresh = sd15.Task(config("", model=str(model), from_scratch=True)).build()
    first = next(iter(module.unet.state_dict()))
    assert not torch.equal(fresh.unet.state_dict()[first], module.unet.state_dict()[first])


def test_lora_of_both_networks_comes_out_as_it_was_trained(tmp_path, model):
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from sdcourse.commands.generate import GenerateOptions, open_pipeline
    from safetensors.torch import load_file
    from sdcourse.commands.export import ExportOptions, export
    from sdcourse.engine.order import image_generators
    from sdcourse.models.lora import LORA_FILES

    common = dict(model=str(model), lora_rank=2, lora_alpha=8.0, lora_text=True, lr=1e-2, checkpoint_every=2)
    train(sd15.Task(config(tmp_path / "run", **common)))
    saved = weights(tmp_path / "run")
    assert (
        saved and all(".lora_" in k for k in saved) and {k.split(".")[0] for k in saved} == {"unet", "text"}
    )
    with pytest.raises(UserError, match="adapters, which are files of their own"):
        export(tmp_path / "run", tmp_path / "unet", ExportOptions(part="unet"))
    assert export(tmp_path / "run", tmp_path / "again", ExportOptions()) == 0
    for file in LORA_FILES:
        assert same(load_file(tmp_path / "again" / file), load_file(tmp_path / "run/export" / file))
    ours, _ = open_pipeline(tmp_path / "run", GenerateOptions(), "cpu")  # of the checkpoint
    draw = lambda pipe: (
        pipe(
            ["a red ring", "a moon"],
            generator=image_generators([0, 1]),
            guidance_scale=2.0,
            num_inference_steps=2,
            output_type="pt",
        ).images
    )
    for file in LORA_FILES:
        plain = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
        before = draw(plain)
        plain.load_lora_weights(str(tmp_path / "run" / "export"), weight_name=file)
        assert (draw(plain) - draw(ours)).abs().max() < 1e-5 < (draw(plain) - before).abs().max()


class Eight:
    "The first eight items of a data set, each some times: every time with noise of its own."

    by_position = True

    def __init__(self, data, times):
        self.data, self.ids = data, list(data.ids[:8]) * times

    def __len__(self):
        return len(self.ids)

    def __getitems__(self, places):
        return self.data.__getitems__([(i % 8, position) for i, position in places])


def test_eight_scenes_are_learned_by_heart(tmp_path, built):
    "O13, by the engine: on 64 fixed draws of noise a tenth of the first loss is left."
    over = dict(
        lr=2e-3, batch_size=8, train_text=True, cond_drop=0.0, caption_column="complete", ema_decay=0.0
    )
    over |= dict(max_steps=120, log_every=120, num_workers=0, num_samples=0)
    task = sd15.Task(config(tmp_path, model=str(built(tiny_sd.make_pipeline)), **over))
    sets = {split: Eight(task.dataset("train"), n) for split, n in (("train", 1), ("validate", 8))}
    task.dataset = sets.get
    task.sample = lambda *_: None
    first = validation_loss(Run(task))
    row = train(task).metrics
    assert row["step"] <= 300 and row["val_loss"] <= 0.1 * first, (first, row)


# ---- bad input


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(model="/nowhere/model"), "--model .*no such folder"),
        (dict(model="CompVis/stable-diffusion-v1-4"), "not in the local hub cache.*licence"),
        (dict(image_size=34), "no multiple of 8"),
        (dict(cond_drop=1.0), "at least 0 and less than 1"),
        (dict(min_snr_gamma=-1.0), "at least 0"),
        (dict(min_snr_gamma=5.0, debiased=True), "two weights"),
        (dict(zero_terminal_snr=True), "give --prediction v"),
        (dict(dream=True, prediction="v"), "prediction eps"),
        (dict(lora_rank=2, train_text=True), "beside frozen weights"),
        (dict(lora_text=True), "need --lora-rank"),
        (dict(timestep_bias="range", timestep_bias_begin=900, timestep_bias_end=100), "must lie within"),
        (dict(data="scenes", flip=True), "left and right"),
        (dict(latents="/nowhere/latents"), "sdcourse cache latents .* --size 32"),
        (dict(prompts="/nowhere/prompts"), "sdcourse cache prompts"),
        (dict(prompts="x", train_text=True), "would not change with the text encoder"),
    ],
)
def test_refused_in_one_line(over, words, scenes, model):
    over = dict(model=str(model), data=str(scenes / "data")) | over
    with pytest.raises(UserError, match=words) as e:
        sd15.Task(config("", **over)).check()
    assert "\n" not in str(e.value)


def test_dream_is_refused_for_a_model_of_v(scenes, model2):
    with pytest.raises(UserError, match="predict eps, and .* predicts v"):
        sd15.Task(config("", model=str(model2), data=str(scenes / "data"), dream=True)).check()


def captioned(place, texts, file="{}.png"):
    from PIL import Image

    (place / "train").mkdir(parents=True)
    rows = [dict(file_name=file.format(i), text=t) for i, t in enumerate(texts)]
    for i in range(len(texts)):
        Image.new("RGB", (32, 32), (i, 9, 9)).save(place / f"train/{i}.png")
    (place / "train/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return place


@pytest.mark.parametrize(
    "val, words",
    [
        ("", "its split val is empty"),
        (json.dumps(dict(file_name="0.png", text="")) + "\n", "0 has no caption"),
    ],
)
def test_what_is_wrong_with_held_out_pictures_is_said_first(tmp_path, model, val, words):
    "It came as a warning at each validation, hours later."
    from PIL import Image

    data = captioned(tmp_path, ["a cat"])
    (data / "val").mkdir()
    (data / "val/metadata.jsonl").write_text(val)
    if val:
        Image.new("RGB", (32, 32)).save(data / "val/0.png")
    with pytest.raises(UserError, match=words):
        sd15.Task(config("", model=str(model), data=str(data))).check()


def test_prompts_that_lack_held_out_captions_are_said_first(tmp_path, model, scenes):
    common = ["--model", str(model), "--dtype", "fp32", "--encode-batch", "4", "--splits", "train"]
    assert cli.run(["cache", "prompts", str(scenes / "data"), str(tmp_path / "p"), *common]) == 0
    with pytest.raises(UserError, match="has no row for .* run sdcourse cache again"):
        how = dict(model=str(model), data=str(scenes / "data"), prompts=str(tmp_path / "p"))
        sd15.Task(config("", **how)).check()


ODD = [
    "a \U0001f642\u200d\U0001f525 cat",
    "x" * 10_000,
    "\u202eright to left \u0627\u0644\u0642\u0637",
    "line\nfeed\r\n and\ttab",
    "nul \x00 bell \x07 \x1b[31m",
    "\ufeffmark <|endoftext|> <|startoftext|>",
    "\u2028\x85 apart",
    '"quoted", \\ and {braces}',
]


def test_odd_captions_are_cached_trained_and_drawn(tmp_path, model):
    "faults.md F: cached and embedded in each step they give the same weights, and pictures carry them."
    from sdcourse.dataset import pictures

    data = captioned(tmp_path / "d", ODD)
    words = ["--model", str(model), "--dtype", "fp32", "--encode-batch", "4"]
    assert cli.run(["cache", "prompts", str(data), str(tmp_path / "p"), *words]) == 0
    how = dict(model=str(model), data=str(data), num_workers=0, max_steps=2, cond_drop=0.5)
    for name, prompts in (("online", ""), ("cached", str(tmp_path / "p"))):
        task = sd15.Task(config(tmp_path / name, prompts=prompts, **how))
        task.sample = lambda *_: None
        assert train(task).step == 2
    a, b = (weights(tmp_path / name) for name in ("online", "cached"))
    assert max((a[k] - b[k]).abs().max().item() for k in a) <= 1e-5
    words = ["--data", str(data), "--split", "train", "--size", "32", "--num-inference-steps", "1"]
    assert cli.run(["generate", str(model), str(tmp_path / "g"), *words]) == 0
    texts = [[r["texts"] for r in pictures(f, "train").rows(range(8))] for f in (data, tmp_path / "g")]
    assert texts[0] == texts[1] == [[t.strip()] for t in ODD]


@pytest.mark.parametrize("command", ["train", "cache", "generate"])
def test_an_empty_caption_is_said_with_its_picture(tmp_path, model, command, capsys):
    data = str(captioned(tmp_path / "d", ["a cat", " \n", "a dog"]))
    line = dict(
        train=["train", "sd15", "--preset", "tiny", "--model", str(model), "--no-flip", "--data", data],
        cache=["cache", "prompts", data, str(tmp_path / "p"), "--model", str(model)],
        generate=["generate", str(model), str(tmp_path / "g"), "--data", data, "--split", "train"],
    )[command]
    if command == "train":
        line += ["--image-size", "32", "--out", str(tmp_path / "r")]
    assert cli.main(line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and (" 1 has no " in said or "the first is 1;" in said)


def test_one_picture_beside_an_empty_val(tmp_path, model):
    data = captioned(tmp_path / "d", ["a cat"])
    (data / "val").mkdir()
    task = sd15.Task(config(tmp_path / "r", model=str(model), data=str(data), num_workers=0, max_steps=1))
    task.sample = lambda *_: None
    result = train(task)
    assert result.step == 1 and "val_loss" not in result.metrics


def test_folders_as_windows_writes_them_are_said_in_clear_words(tmp_path, model):
    data = captioned(tmp_path, ["a cat"], file="sub\\{}.png")
    with pytest.raises(UserError, match="outside its folder; write / between folders") as e:
        sd15.Task(config("", model=str(model), data=str(data))).check()
    assert "\n" not in str(e.value)


def test_pictures_without_captions_are_refused(tmp_path, model):
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / "d" / split).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "d" / split / "a.png")
    with pytest.raises(UserError, match="a has no caption"):
        sd15.Task(config("", model=str(model), data=str(tmp_path / "d"))).check()


def test_one_file_is_taken_apart_and_trains_alike(tmp_path, model):
    from diffusers import StableDiffusionPipeline
    from sdcourse.models.single_file import save_original
    from safetensors.torch import load_file, save_file

    path = str(
        save_original(
            StableDiffusionPipeline.from_pretrained(model, safety_checker=None), tmp_path / "one.safetensors"
        )
    )
    a, b = (sd15.Task(config("", model=m, model_config=c)) for m, c in ((path, str(model)), (str(model), "")))
    a.check()
    assert same(a.build().state_dict(), b.build().state_dict()) and a.vae == b.vae
    with pytest.raises(UserError, match="give --model-config"):
        sd15.Task(config("", model=path)).check()
    with pytest.raises(UserError, match="no such file"):
        sd15.Task(config("", model=str(tmp_path / "x.safetensors"), model_config=str(model))).check()
    t = load_file(path)
    for gone in (
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ):
        save_file({k: v for k, v in t.items() if k != gone}, tmp_path / "less.safetensors")
        with pytest.raises(UserError, match="less.safetensors"):
            sd15.Task(config("", model=str(tmp_path / "less.safetensors"), model_config=str(model))).check()


def test_prompts_of_another_text_encoder_are_refused(tmp_path, scenes):
    other = tiny_sd.make_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made by another text_encoder"):
        sd15.Task(
            config("", model=str(other), data=str(scenes / "data"), prompts=str(scenes / "prompts"))
        ).check()


def test_a_pipeline_with_a_part_missing(tmp_path, model):
    import shutil

    shutil.copytree(model, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "vae")
    with pytest.raises(UserError, match="has no vae/"):
        sd15.Task(config("", model=str(tmp_path / "sd"))).check()


# ---- gradient checkpointing
def gradients(model, **over):
    "(losses, gradients by name, how often a block was computed) of one forward and backward pass."
    task = sd15.Task(config("", model=str(model), **over))
    torch.manual_seed(0)
    module = task.build().train()
    for name, p in module.named_parameters():
        if ".lora_B." in name:  # they begin at zero, and then nothing reaches lora_A
            p.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    calls = []
    for block in task.blocks(module):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, _ = module(batch_of(4, side=8, words=(32, 32)), Draws(0, 0, range(4)))
    loss.mean().backward()
    return loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.requires_grad}, len(calls)


@pytest.mark.parametrize("lora", [0, 2])
def test_gradient_checkpointing_changes_no_bit(model, lora):
    "Each block (but two of the middle) is computed once more in the backward pass; nothing else differs."
    (a, before, once), (b, after, twice) = (
        gradients(model, lora_rank=lora, gradient_checkpointing=on) for on in (False, True)
    )
    assert torch.equal(a, b) and same(before, after)
    assert all(g.abs().max() > 0 for g in before.values()) and (".lora_" in next(iter(before))) == bool(lora)
    assert once > 6 and once - 2 <= twice - once <= once


# ---- every noise level
class EveryStep(Draws):
    "Draws whose row i is trained at step i."

    def uniform(self, name, *shape):
        if name != "time":
            return super().uniform(name, *shape)
        return (torch.arange(len(self.rows), dtype=torch.float64) + 0.5) / 1000


EVERY = [
    dict(prediction="v", zero_terminal_snr=True, noise_offset=0.1, min_snr_gamma=5.0),
    dict(prediction="v", zero_terminal_snr=True, noise_offset=0.1, debiased=True),
    dict(prediction="v", noise_offset=0.1, min_snr_gamma=1.0),
    dict(prediction="eps", noise_offset=0.1, min_snr_gamma=5.0),
    dict(prediction="eps", noise_offset=0.1, debiased=True),
]


@pytest.mark.parametrize("over", EVERY, ids=lambda over: " ".join(over))
def test_loss_and_weight_are_finite_at_every_step(model, over):
    "O9: all of 0 … 999, through the schedule of a model; its gradient too."
    task = sd15.Task(config("", model=str(model), cond_drop=0.0, **over))
    abar, prediction = task.noise
    net = torch.nn.Module()
    net.w = torch.nn.Parameter(torch.tensor(0.5))
    net.forward = lambda x, t, c: type("O", (), dict(sample=net.w * x, t=t))
    module = sd15.Denoiser(net, task.config, abar=abar, prediction=prediction, empty=torch.zeros(5, 3))
    loss, t = module(batch_of(1000), EveryStep(0, 0, range(1000)))
    assert torch.equal((t * 1000).round().long(), torch.arange(1000)) and loss.isfinite().all()
    weight = module.objective.weight(module.objective.abar)
    assert weight.isfinite().all() and (weight >= 0).all() and (loss >= 0).all()
    loss.sum().backward()
    assert net.w.grad.isfinite()
    ratio = abar[-1] / (1 - abar[-1])
    assert ratio <= 1e-12 if over.get("zero_terminal_snr") else ratio > 1e-4
    if gamma := over.get("min_snr_gamma"):
        s = abar.double() / (1 - abar.double())
        torch.testing.assert_close(
            weight.double(), s.clamp(max=gamma) / (s + 1 if prediction == "v" else s), atol=1e-6, rtol=1e-4
        )

"""Latents for a trainer: cached or encoded in each step, it is the same training."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from sdcourse.cache.fill import LatentOptions, cache
from sdcourse.cache.latents import CachedLatents, OnlineLatents, draw_latents, latent_source
from sdcourse.cache.store import Cache
from sdcourse.config import resolve
from sdcourse.core import UserError
from sdcourse.dataset import DataSet, Transform
from sdcourse.engine.loop import Run, step, train
from sdcourse.engine.order import Draws
from sdcourse.engine.trackers import read_metrics
from sdcourse.train.flow_dit import Config, Task
from test_fill import pictures


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    data, vae = pictures(root / "data"), tiny_models.tiny_vae(root / "vae")
    for name, over in {
        "one": dict(encode_batch=1),
        "eight": dict(encode_batch=8),
        "bf16": dict(encode_batch=1, dtype="bf16"),
    }.items():
        assert (
            cache(
                "latents",
                data,
                root / name,
                LatentOptions(
                    model=str(vae), size=16, device="cpu", shard_bytes=5000, **dict(dtype="fp32") | over
                ),
            )
            == 0
        )
    return root


def config(out, **over):
    small = dict(
        size="tiny/2",
        max_steps=20,
        batch_size=8,
        warmup_steps=0,
        device="cpu",
        num_samples=0,
        num_inference_steps=2,
        log_every=5,
        validate_every=10,
        threads=1,
        ema_decay=0.9,
    )
    if not Path(over["data"], "index.json").is_file():
        small["image_size"] = 16  # a cache has its own
    return resolve(Config, overrides=dict(out=str(out), **small | over))


def trained(out, **over):
    "(hash of the weights, of their average, losses)"
    train(Task(config(out, **over)))
    folder = next((out / "checkpoints").glob("step-*"))
    return [
        hashlib.sha256((folder / f"{n}.safetensors").read_bytes()).hexdigest() for n in ("model", "ema")
    ], [{k: r.get(k) for k in ("loss", "val_loss", "grad_norm")} for r in read_metrics(out)]


def test_cached_training_is_online_training_bit_by_bit(world, tmp_path):
    """D4: with a float32 cache and encode batches of one picture; also in two processes that read, and in
    pieces.
    """
    online = trained(tmp_path / "a", data=str(world / "data"), vae=str(world / "vae"), encode_batch=1)
    cached = trained(tmp_path / "b", data=str(world / "one"))
    assert online == cached and online[1][0]["loss"] and any(r["val_loss"] for r in online[1])
    workers = trained(
        tmp_path / "c", data=str(world / "data"), vae=str(world / "vae"), encode_batch=1, num_workers=2
    )
    assert workers == online


def test_other_encode_batches_change_only_the_last_bits(world, tmp_path):
    run = lambda name, **over: [r["loss"] for r in trained(tmp_path / name, **over)[1] if r["loss"]]
    online, cached = (
        run("a", data=str(world / "data"), vae=str(world / "vae"), encode_batch=8, precision="fp64"),
        run("b", data=str(world / "eight"), precision="fp64"),
    )
    assert max(abs(a - b) for a, b in zip(online, cached, strict=True)) < 1e-5


def test_a_bf16_cache_has_nearly_the_same_losses(world, tmp_path):
    "D4: within one per cent over 50 steps."
    run = lambda name: np.array(
        [
            r["loss"]
            for r in trained(tmp_path / name, data=str(world / name), max_steps=50, validate_every=0)[1]
            if r["loss"]
        ]
    )
    exact, rounded = run("one"), run("bf16")
    assert len(exact) == 10 and (exact != rounded).any() and (abs(rounded / exact - 1) < 0.01).all()


def test_both_sides_of_nearly_every_item_in_ten_epochs(world):
    """D5: counted from the batches and draws of a real run: of 24 items, each is seen from both sides with
    probability 99.8 %.
    """
    task = Task(config("x", data=str(world / "one"), batch_size=8, max_steps=30))
    run, seen = Run(task), {}
    for s in range(30):
        batch = run.next_batch(s, run.micros[0])
        x0 = draw_latents(
            batch | {"std": torch.zeros_like(batch["std"])},
            Draws(0, s, run.micros[0]),
            flip=True,
            shift=0.0,
            scale=1.0,
        )
        for i, x, mean in zip(batch["id"], x0, batch["mean"]):
            sides = [torch.equal(x, m) for m in mean]
            assert sum(sides) == 1
            seen.setdefault(i, set()).add(sides.index(True))
    assert len(seen) == 24 and sum(len(v) == 2 for v in seen.values()) >= 0.99 * 24


def test_the_posterior_is_drawn_anew_in_each_step(world):
    batch = Cache(world / "one").__getitems__(range(8))
    a, b = (draw_latents(batch, Draws(0, s, range(8)), flip=False, shift=0.0, scale=1.0) for s in (0, 1))
    z = ((a - batch["mean"][:, 0]) / batch["std"][:, 0], (b - batch["mean"][:, 0]) / batch["std"][:, 0])
    assert not torch.equal(a, b) and all(abs(x.std() - 1) < 0.1 and abs(x.mean()) < 0.1 for x in z)
    half = draw_latents(batch, Draws(0, 0, range(8)), flip=False, shift=0.5, scale=2.0)
    assert torch.allclose(half, (a - 0.5) * 2)


def test_online_flips_are_those_of_the_cache(world):
    "The side that is drawn first and encoded afterwards is the side that the cache would have given."
    found = {}
    for name, source in (
        ("cached", CachedLatents(world / "one")),
        (
            "online",
            OnlineLatents(DataSet(world / "data"), world / "vae", transform=Transform(16), encode_batch=1),
        ),
    ):
        data, draws = source.dataset("train"), Draws(3, 7, range(24))
        found[name] = source.encode(data.__getitems__(range(24)), draws, True)["x0"]
    assert torch.equal(found["cached"], found["online"])


def test_random_crops_differ_between_epochs_and_never_in_validation(world, tmp_path):
    wide = pictures(tmp_path / "wide", width=40)
    source = OnlineLatents(DataSet(wide), world / "vae", transform=Transform(8, "random"), seed=1)
    data, held_out = source.dataset("train"), source.dataset("validate")
    assert data.by_position and not held_out.by_position and source.side == 2
    crops = [data.__getitems__([(3, p)])["image"] for p in (3, 27, 51, 75)]  # the same picture in four epochs
    assert any(not torch.equal(crops[0], c) for c in crops[1:]) and torch.equal(
        data.__getitems__([(3, 3)])["image"], crops[0]
    )
    step(Run(Task(config("x", data=str(wide), vae=str(world / "vae"), image_size=8, crop="random"))))


def test_what_does_not_fit_is_refused(world, tmp_path):
    def refused(words, **over):
        with pytest.raises(UserError, match=words):
            Task(config("x", **over)).check()

    refused(
        "holds pictures, which a VAE has to encode: make a cache .sdcourse cache latents",
        data=str(world / "data"),
    )
    refused(
        "--image-size 18: is no multiple of 4",
        data=str(world / "data"),
        vae=str(world / "vae"),
        image_size=18,
    )
    refused(
        "is not the VAE that made",
        data=str(world / "one"),
        vae=str(tiny_models.tiny_vae(tmp_path / "other", seed=1)),
    )
    refused("encode_batch 0", data=str(world / "one"), encode_batch=0)
    refused("--vae nowhere: no such folder", data=str(world / "one"), vae="nowhere")
    Task(config("x", data=str(world / "one"), vae=str(world / "vae"))).check()
    (tmp_path / "features").mkdir()
    index = (world / "one/index.json").read_text().replace('"kind": "latents"', '"kind": "features"', 1)
    (tmp_path / "features/index.json").write_text(index)
    refused("is a cache of features, and latents are needed", data=str(tmp_path / "features"))
    with pytest.raises(UserError, match="no such folder"):
        latent_source("nowhere")
    for name in ("empty", "pets"):
        (tmp_path / name).mkdir()
    (tmp_path / "pets/a.png").touch()
    for name in ("empty", "pets", "nowhere"):
        with pytest.raises(UserError, match=f"{name}: no cache is there; make it with sdcourse cache"):
            CachedLatents(tmp_path / name)

"""Built-in worlds are data sets like any other, and a data set is looked at once."""

import json
from pathlib import Path

import pytest
import torch

import tiny_models
from sdcourse import cli
from sdcourse.cache.latents import latent_source
from sdcourse.cache.store import Joined
from sdcourse.config import resolve
from sdcourse.core import UserError
from sdcourse.data import sources
from sdcourse.dataset import DataSet, Squares, Transform, pictures, splits
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint
from sdcourse.engine.loop import train
from sdcourse.train import flow_dit, sd15


@pytest.fixture(scope="module")
def model(built):
    return built(tiny_models.thin_sd15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Twelve scenes as files, at 32 pixels."
    out = tmp_path_factory.mktemp("worlds") / "scenes"
    words = "--train 12 --val 4 --test 4 --size 32".split()
    assert cli.run(["prepare", "scenes", str(out), *words]) == 0
    return out


def config(out, model, **over):
    base = dict(out=str(out), model=str(model), image_size=32, flip=False, max_steps=3, batch_size=4)
    base |= dict(encode_batch=4, ema_decay=0.0, checkpoint_every=0, num_samples=0, num_inference_steps=2)
    return resolve(sd15.Config, preset="tiny", overrides=base | over)


def weights(out):
    return load_checkpoint(latest_checkpoint(Path(out) / "checkpoints")[0])["tensors"]["model"]


# ---- like any other
def test_a_world_gives_what_its_files_give(folder):
    "The same numbers of scenes: id, captions and pixels are those of `prepare scenes`."
    for split in ("train", "val", "test"):
        world, files = pictures("scenes", split), pictures(folder, split)
        n = len(files)
        assert [int(i) for i in files.ids] == [int(i) for i in world.ids[:n]]
        a, b = (Squares(data, Transform(32)).__getitems__(range(n)) for data in (world, files))
        assert torch.equal(a["image"], b["image"]) and a["texts"] == b["texts"]


def test_columns_of_a_world():
    one, five = (pictures("scenes", caption_column=c).row(3)["texts"] for c in ("complete", ""))
    assert len(one) == 1 and len(five) == 5 and one[0] == five[3]
    with pytest.raises(UserError, match="no column complet .--caption-column"):
        pictures("scenes", caption_column="complet")
    with pytest.raises(UserError, match="built-in worlds have no column x"):
        pictures("scenes", image_column="x")
    with pytest.raises(UserError, match="digits: has no split val; it has train, test"):
        pictures("digits", "val")
    assert splits("faces") == ("train", "val", "test")


def test_scenes_and_emoji_together_are_those_of_each():
    both, parts = pictures("drawings", "val"), [pictures(name, "val") for name in ("scenes", "emoji:3d")]
    assert list(both.ids) == [i for part in parts for i in part.ids]
    n = len(parts[0])
    for i, (part, j) in {3: (0, 3), n + 5: (1, 5)}.items():
        a, b = both.row(i), parts[part].row(j)
        assert (a["texts"], a["complete"]) == (b["texts"], b["complete"]), i
        a, b = (d.squares([k], Transform(64)) for d, k in ((both, i), (parts[part], j)))
        assert torch.equal(a, b)
    train = pictures("drawings")
    scenes = set(train.ids) & set(pictures("scenes").ids)
    assert len(scenes) == 5000 and len(train) == 5000 + len(pictures("emoji:3d"))


def test_classes_of_a_world():
    data = pictures("digits", "test")
    batch = Squares(data, Transform(8)).__getitems__([0, 7])
    assert data.classes == tuple("0123456789") and batch["image"].shape == (2, 3, 8, 8)
    assert batch["label"].tolist() == [data.row(i)["label"] for i in (0, 7)]


def test_a_part_of_a_world_is_spread_and_its_pictures_are_its_own():
    some, whole = pictures("scenes", max_samples=20), pictures("scenes")
    assert len(some) == 20 and int(some.ids[-1]) > 50_000
    at = whole.ids.index(some.ids[7])
    a, b = (d.squares([i], Transform(48)) for d, i in ((some, 7), (whole, at)))
    assert torch.equal(a, b) and some.row(7)["texts"] == whole.row(at)["texts"]
    assert some.digest(7) == whole.digest(at) != whole.digest(at + 1)


def test_a_drawn_picture_is_drawn_in_its_size_and_not_made_smaller():
    data = pictures("scenes", "val")
    drawn, shrunk = data.squares([0], Transform(32))[0], Transform(32)(data.image(0))
    assert not torch.equal(drawn, shrunk) and (drawn.float() - shrunk.float()).abs().mean() < 8


def test_a_folder_with_the_name_of_a_world_is_not_taken_for_it(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()  # empty: nobody can mean it
    assert len(pictures("scenes", "val")) == 256
    (tmp_path / "scenes").rmdir()
    (tmp_path / "scenes").symlink_to(folder)
    with pytest.raises(UserError, match="write world:scenes, or ./scenes for the folder"):
        pictures("scenes", "val")
    assert len(pictures("./scenes", "val")) == 4 and len(pictures("world:scenes", "val")) == 256
    assert latent_source("world:digits").channels == 1
    with pytest.raises(UserError, match="world:scene: no such world; did you mean 'scenes'"):
        pictures("world:scene")


# ---- trained on
def test_a_cache_of_a_world_trains_to_the_weights_of_drawing_in_each_step(tmp_path, model):
    "Bit by bit, as for files; of a part of the world, so that the cache is small."
    options = "--size 32 --no-mirror --dtype fp32 --encode-batch 4 --max-samples 24 --device cpu".split()
    assert cli.run(["cache", "latents", "scenes", str(tmp_path / "z"), "--model", str(model), *options]) == 0
    common = dict(data="scenes", max_samples=24)
    train(sd15.Task(config(tmp_path / "drawn", model, **common)))
    train(sd15.Task(config(tmp_path / "cached", model, **common, latents=str(tmp_path / "z"))))
    a, b = weights(tmp_path / "drawn"), weights(tmp_path / "cached")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_knows_left_and_right_is_not_mirrored(tmp_path, model):
    with pytest.raises(UserError, match="--data scenes: has left and right in its captions; give --no-flip"):
        sd15.Task(config("", model, data="scenes", flip=True)).check()
    out = tmp_path / "mirrored"
    with pytest.raises(UserError, match="scenes: .* left and right .*; give --no-mirror"):
        words = ["--model", str(model), "--size", "32", "--max-samples", "4"]
        cli.run(["cache", "latents", "scenes", str(out), *words])
    assert not out.exists() or not any(out.glob("*.safetensors"))


def test_photos_are_a_world_that_a_trainer_takes(tmp_path, model):
    task = sd15.Task(config(tmp_path / "run", model, data="photos", flip=True, max_steps=1))
    result = train(task)
    assert result.step == 1 and result.metrics["val_loss"] > 0
    assert task.facts()["data_licence"].startswith("several")


def test_the_flow_dit_takes_a_world_through_a_vae(tmp_path):
    vae = tiny_models.tiny_vae(tmp_path / "vae")
    over = dict(data="digits", vae=str(vae), image_size=16, size="tiny/2", max_steps=1, batch_size=4)
    over |= dict(num_samples=0, num_inference_steps=1, flip=False, out=str(tmp_path / "run"))
    task = flow_dit.Task(resolve(flow_dit.Config, overrides=over))
    assert task.latents.channels == 4 and train(task).step == 1
    assert latent_source("digits").channels == 1  # without one: the pixels themselves


# ---- looked at once
@pytest.mark.parametrize("cached", [False, True])
def test_a_training_walks_its_folder_once(folder, tmp_path, model, monkeypatch, cached):
    "With two validations and pictures of held-out captions."
    common = dict(data=str(folder), max_steps=2, validate_every=1)
    if cached:
        made = ["--model", str(model), "--device", "cpu"]
        assert cli.run(["cache", "latents", str(folder), str(tmp_path / "z"), "--size", "32", *made]) == 0
        assert cli.run(["cache", "prompts", str(folder), str(tmp_path / "p"), *made]) == 0
        common |= dict(latents=str(tmp_path / "z"), prompts=str(tmp_path / "p"))
    walks, walk = [], sources.walk
    monkeypatch.setattr(sources, "walk", lambda *a, **k: walks.append(a) or walk(*a, **k))
    reads, read = [], sd15.Task._texts
    monkeypatch.setattr(sd15.Task, "_texts", lambda task, split: reads.append(split) or read(task, split))
    train(sd15.Task(config(tmp_path / "run", model, **common)))
    assert len(walks) == 1 and len(reads) == len(set(reads)) > 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum("val_loss" in row for row in rows) == 2


def test_a_split_is_opened_once(folder):
    data = DataSet(folder)
    assert data.pictures("val") is data.pictures("validation") is not data.pictures("train")


def test_items_without_a_row_of_captions_are_named(folder):
    "A cache of all pictures, and captions of a part of them."
    items = Squares(pictures(folder), Transform(32))
    texts = {name: ["x"] for name in items.ids[:-2]}
    with pytest.raises(UserError, match=f"2 of 12 items have no row with captions, e.g. {items.ids[-2]}"):
        Joined(items, texts=texts)

"""X5: a resume notices other pictures, captions, labels and weights, and says which; --force goes on."""

import json
import shutil
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file, save_file

import sdcourse.cache.latents as latents
from sdcourse import cli
from sdcourse.config import resolve
from sdcourse.core import UserError
from sdcourse.dataset import pictures
from sdcourse.engine.checkpoint import load_checkpoint
from sdcourse.engine.loop import train
from sdcourse.train import judge, sd15, vae
from test_latents import config as dit_config
from test_latents import world as dit_world  # noqa: F401 - a fixture
from test_sd15 import config, model, scenes  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def world(tmp_path_factory, model, scenes):
    "A model, a bare folder of pictures, caches of both, and runs; a test puts back what it changes."
    home = tmp_path_factory.mktemp("stale")
    for name, source in dict(
        sd=model, data=scenes / "data", z=scenes / "latents", p=scenes / "prompts"
    ).items():
        shutil.copytree(source, home / name)
    (home / "data/manifest.json").unlink()
    for name in ("online", "cached"):
        train(task(home, name))
    return home


def task(home, kind, out=None, **over):
    "A training of two steps, or one that goes on from the first."
    how = dict(model=str(home / "sd"), data=str(home / "data"), num_workers=0, lora_rank=2, max_steps=2)
    how |= dict(checkpoint_every=1, keep=2, validation_prompts=())
    if kind == "cached":
        how |= dict(latents=str(home / "z"), prompts=str(home / "p"))
    if out:
        how |= dict(resume=str(home / kind / "checkpoints/step-00000001"))
    return sd15.Task(config(out or home / kind, **how | over))


@contextmanager
def changed(path, change):
    "The file at `path` is another for a while."
    before = path.read_bytes()
    try:
        change(path)
        assert path.read_bytes() != before
        yield
    finally:
        path.write_bytes(before)


def other_byte(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def other_caption(path):
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    column = next(k for k in row if k.startswith("text"))
    row[column] = [*row[column], "one more"] if isinstance(row[column], list) else "another"
    path.write_text("\n".join([json.dumps(row), *rest]) + "\n")


def other_label(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["label"] = 1 - rows[2]["label"]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def other_weight(path):
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})


CHANGES = {  # what has changed: kind of run, file, change, words
    "a picture of the same name and size": ("online", "data/train/*.png", other_byte, "other pictures: "),
    "a caption": ("online", "data/train/metadata.jsonl", other_caption, "other captions: "),
    "a caption beside caches": (
        "cached",
        "data/train/metadata.jsonl",
        other_caption,
        "has no row for|captions",
    ),
    "the network": ("online", "sd/unet/*.safetensors", other_weight, "other weights of unet: "),
    "the network beside caches": ("cached", "sd/unet/*.safetensors", other_weight, "other weights of unet: "),
    "the autoencoder": ("online", "sd/vae/*.safetensors", other_weight, "other weights of vae: "),
    "the text encoder": (
        "online",
        "sd/text_encoder/*.safetensors",
        other_weight,
        "weights of text_encoder: ",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resume_on_something_else_is_refused(tmp_path, world, what):
    kind, pattern, change, words = CHANGES[what]
    with changed(sorted(world.glob(pattern))[0], change):
        with pytest.raises(UserError, match=words) as e:
            train(task(world, kind, tmp_path / "run"))
        said = str(e.value)
        assert "\n" not in said and not (tmp_path / "run/config.yaml").exists()
        assert "--force to go on" in said or "sdcourse cache again" in said


def test_a_resume_with_one_picture_more_is_refused(tmp_path, world):
    table = world / "data/train/metadata.jsonl"
    more = table.with_name("more.png")

    def add(path):
        shutil.copy(sorted(path.parent.glob("*.png"))[0], more)
        row = json.loads(path.read_text().splitlines()[0]) | dict(file_name="more.png", id="more")
        path.write_text(path.read_text() + json.dumps(row) + "\n")

    with changed(table, add):
        with pytest.raises(UserError, match="other pictures and other captions: .*--force to go on"):
            train(task(world, "online", tmp_path / "run"))
        more.unlink()


def test_caches_made_again_from_other_pictures_or_captions_are_refused(tmp_path, world):
    common = ["--model", str(world / "sd"), "--encode-batch", "4", "--dtype"]
    places = dict(latents=world / "z", prompts=world / "p")
    kept = {k: shutil.copytree(v, tmp_path / k) for k, v in places.items()}
    one = sorted((world / "data/train").glob("*.png"))[3]
    other = dict(size=["--size", "32"])
    try:
        for kind, dtype, words in (
            ("latents", "fp32", "other pictures: "),
            ("prompts", "bf16", "other captions: "),
        ):
            shutil.rmtree(places[kind])
            with changed(
                one,
                lambda path: shutil.copy(
                    one.with_name(sorted(p.name for p in one.parent.glob("*.png"))[4]), path
                ),
            ):
                more = other["size"] if kind == "latents" else []
                assert (
                    cli.run(["cache", kind, str(world / "data"), str(places[kind]), *common, dtype, *more])
                    == 0
                )
                with pytest.raises(UserError, match=words):
                    train(task(world, "cached", tmp_path / "run"))
            shutil.rmtree(places[kind])
            shutil.copytree(kept[kind], places[kind])
    finally:
        for kind, place in places.items():
            if not place.exists():
                shutil.copytree(kept[kind], place)


def test_what_is_the_same_elsewhere_goes_on_and_force_takes_the_new(tmp_path, world):
    "Times and places are not looked at; a checkpoint of the forced run knows the new pictures."
    there = shutil.copytree(world, tmp_path / "copy")
    for kind in ("online", "cached"):
        then = load_checkpoint(world / kind / "checkpoints/step-00000001")["state"]["fixed"]
        assert task(there, kind).fixed() == then
    with changed(sorted((world / "data/train").glob("*.png"))[0], shift_colours):
        assert train(task(world, "online", tmp_path / "run", force=True)).step == 2
        again = task(world, "online", tmp_path / "run", resume="auto")
        assert train(again).step == 2


def shift_colours(path):
    from PIL import Image

    with Image.open(path) as im:
        im.convert("RGB").point(lambda v: 255 - v).save(path)


def test_other_labels_are_other_pictures(dit_world):
    home = dit_world / "data"
    known = latents.contents(pictures(home))
    with changed(home / "train/metadata.jsonl", other_label):
        assert latents.contents(pictures(home)) != known
    assert latents.contents(pictures(home)) == known


def test_of_a_large_set_a_part_is_looked_at(dit_world, monkeypatch):
    data = pictures(dit_world / "data")
    seen = []
    monkeypatch.setattr(type(data), "digest", lambda self, i: seen.append(i) or "x")
    monkeypatch.setattr(latents, "LOOKED_AT", 10)
    latents.contents(data)
    assert len(data) == 24 and seen == list(range(0, 24, 3))


@pytest.mark.parametrize("module", [judge, vae])
def test_drawn_pictures_are_remembered(module):
    cfg = resolve(module.Config, preset="tiny", overrides=dict(share=0.01))
    task = module.Task(cfg)
    assert task.fixed()["pictures"] == task.facts()["data_sha256"]


def test_a_vae_that_encodes_in_each_step_is_remembered(dit_world):
    from sdcourse.train.flow_dit import Task

    kept = Task(dit_config("x", data=str(dit_world / "data"), vae=str(dit_world / "vae"))).fixed()
    assert kept.keys() == {"pictures", "weights of vae"}
    cached = Task(dit_config("x", data=str(dit_world / "one"))).fixed()
    assert cached.keys() == {"pictures"}

"""The road of somebody with own pictures and a published model: eight commands, from a folder to numbers, and
the result in another program.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from types import SimpleNamespace

import tiny_models
from sdcourse import cli
from sdcourse.config import resolve
from sdcourse.core import UserError, read_json
from sdcourse.engine import order
from sdcourse.evaluation.metrics import Squared, is_mixed, open_set
from sdcourse.evaluation.report import crop_of
from sdcourse.train import flow_dit, sd15


def photo(i, size):
    few = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(few).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def model(built):
    return built(tiny_models.thin_sd15)


@pytest.fixture(scope="module")
def clip(built):
    return built(tiny_models.tiny_clip)


@pytest.fixture(scope="module")
def road(tmp_path_factory, model, clip):
    "What eight commands leave; {command: what it said}."
    home = tmp_path_factory.mktemp("road")
    (home / "photos").mkdir()
    for i in range(60):
        photo(i, (36 + 4 * (i % 4), 36 + 6 * (i % 3))).save(home / f"photos/{i:02}.jpg", quality=95)
        if i % 4 == 0:
            (home / f"photos/{i:02}.txt").write_text(f"a photo of the cat {i}")
    (home / "photos/phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (home / "photos/broken.jpg").write_bytes((home / "photos/00.jpg").read_bytes()[:500])
    cpu = "--device cpu --threads 1"
    data, caches = f"{home}/mine", f"--latents {home}/latents --prompts {home}/prompts"
    train = (
        f"train sd15 --model {model} --data {data} {caches} --image-size 32 --batch-size 4 --lora-rank 2 "
        f"--num-inference-steps 2 --checkpoint-every 0 --device cpu --threads 1"
    )
    draw = f"--data {data} --num-inference-steps 2 --batch 20 --device cpu --threads 1"
    commands = [
        f"prepare folder {home}/photos {data} --size 32 --caption cat --test-share 0.35 --workers 1",
        f"cache latents {data} {home}/latents --model {model} --size 32 --dtype fp32 {cpu}",
        f"cache prompts {data} {home}/prompts --model {model} --dtype fp32 {cpu}",
        f"{train} --max-steps 4000 --out {home}/try --dry-run",
        f"{train} --max-steps 3 --out {home}/run",
        f"generate {model} {home}/before {draw}",
        f"generate {home}/run {home}/after {draw}",
        f"evaluate {home}/before {home}/after --reference {data} --train {data} --extractor clip:{clip} "
        f"--draws 20 --force --device cpu --threads 1 --out {home}/report",
    ]
    assert len(commands) <= 8
    said = {}
    for line in commands:
        with pytest.MonkeyPatch.context() as m:
            warned = []
            m.setattr("sdcourse.engine.preflight.log.warning", lambda text, *a: warned.append(text % a))
            assert cli.run(line.split()) == 0, line
        said[line.replace(str(home), ".")] = warned
    return SimpleNamespace(home=home, said=said)


def test_broken_and_unknown_pictures_are_counted_and_mixed_shapes_kept(road):
    lines = (road.home / "mine/failures.jsonl").read_text().splitlines()
    assert {json.loads(r)["id"] for r in lines} == {"phone", "broken"}
    held_out = open_set(road.home / "mine", "test")
    assert len(held_out) == 21 and is_mixed(held_out)


def test_a_number_of_epochs_beyond_reason_is_said(road):
    warned = {line: w for line, w in road.said.items() if line.startswith("train")}
    tried, trained = warned.values()
    assert not trained and "4,000 steps show each of 32 pictures 500 times" in tried[0]
    assert "--max-steps 2400 are 300 epochs" in tried[0]
    assert not (road.home / "try/checkpoints").exists()


def test_the_report_holds_what_was_asked_for_and_how_the_reference_was_squared(road):
    found = read_json(road.home / "report/evaluation.json")
    assert found["about"]["squared"]["size"] == 32 and found["about"]["squared"]["crop"] == "center"
    text = (road.home / "report/README.md").read_text()
    assert "Pictures of the reference were squared to 32 pixels as in training (crop center)." in text
    names = {n["name"] for n in found["numbers"]["after"]}
    for word in ("KID[", "CLIP score", "closer to training", "PSNR"):
        assert any(n.startswith(word) for n in names), (word, names, found["left_out"])
    assert {n["name"].split(":")[0] for n in found["differences"]} >= {"PSNR", "SSIM"}


def test_plain_diffusers_draws_with_the_adapters(road, model):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    how = dict(num_inference_steps=2, height=32, width=32, output_type="np")

    def image():
        return pipe("cat", generator=torch.Generator().manual_seed(0), **how).images[0]

    before = image()
    pipe.load_lora_weights(road.home / "run/export", weight_name="pytorch_lora_weights.safetensors")
    assert image().shape == (32, 32, 3) and not np.array_equal(before, image())


# ---- a reference of many shapes
def test_a_reference_is_squared_as_the_training_was(tmp_path):
    for k, (folder, crop) in enumerate(
        (("none", None), ("config", "adm"), ("cache", "none"), ("random", "random"))
    ):
        run, out = tmp_path / f"run{k}", tmp_path / folder
        run.mkdir()
        out.mkdir()
        (out / "generate.json").write_text(json.dumps({"source": str(run), "made_by": {}}))
        if folder == "cache":
            (tmp_path / "z").mkdir()
            (tmp_path / "z/index.json").write_text(json.dumps({"key": {"crop": crop}}))
            crop = f"center\n  latents: {tmp_path}/z"
        if crop:
            (run / "config.yaml").write_text(f"config:\n  crop: {crop}\n")
    assert [crop_of(tmp_path / f) for f in ("none", "config", "cache", "random")] == [
        "center",
        "adm",
        "none",
        "center",
    ]
    assert crop_of(tmp_path) == "center"


def test_pictures_of_one_square_size_stay_as_they_are(tmp_path):
    from sdcourse.dataset import Transform

    for i in range(3):
        photo(i, (16, 16)).save(tmp_path / f"{i}.png")
    data = open_set(tmp_path, "train")
    assert not is_mixed(data) and not is_mixed(open_set("digits"))
    whole = Squared(data, Transform(16))
    assert whole.ids == data.ids and len(whole) == 3 and whole.image(1).tobytes() == data.image(1).tobytes()
    photo(4, (16, 20)).save(tmp_path / "4.png")
    assert is_mixed(open_set(tmp_path, "train"))


# ---- pieces that fit
def test_large_pictures_are_drawn_in_small_pieces():
    sizes = []

    def draw(some, generators):
        sizes.append(len(some))
        return torch.zeros(len(some), 1, 1, 1)

    order.drawn(draw, ["a"] * 32, range(32), side=512)
    order.drawn(draw, ["a"] * 32, range(32), side=64)
    order.drawn(draw, ["a"] * 2, range(2), side=4096)
    assert sizes == [4] * 8 + [32] + [1, 1]


@pytest.mark.parametrize("module, n", [(sd15, 2), (flow_dit, 32)])
def test_samples_of_a_validation_are_drawn_in_pieces(module, n, model, monkeypatch):
    over = dict(model=str(model), image_size=32) if module is sd15 else {}
    task = module.Task(resolve(module.Config, overrides=over))
    sizes = []

    def pipe(some, **how):
        sizes.append(len(some))
        return SimpleNamespace(images=torch.zeros(len(some), 3, 8, 8))

    monkeypatch.setattr(order, "PIECE", 2 * 32**2)
    task.pipeline = lambda module: pipe
    asked = ["a"] * 40 if module is sd15 else [1] * 40
    assert task.images(None, asked, range(40)).shape[0] == 40 and max(sizes) == n


@pytest.mark.parametrize("preset", ["full", "24gb", "8gb"])
def test_a_preset_needs_no_path_but_that_of_the_data(preset):
    cfg = resolve(sd15.Config, preset=preset, overrides=dict(data="mine"))
    assert not cfg.latents and not cfg.prompts


# ---- one file for other programs
def test_a_single_file_is_read_back_with_equal_weights(tmp_path, model, road):
    from diffusers import StableDiffusionPipeline

    train = f"train sd15 --model {model} --data {road.home}/mine --image-size 32 --batch-size 4 --max-steps 1"
    rest = f"--checkpoint-every 0 --num-inference-steps 1 --device cpu --threads 1 --out {tmp_path}/run"
    assert cli.run(f"{train} {rest}".split()) == 0
    path = tmp_path / "one.safetensors"
    assert cli.run(["export", f"{tmp_path}/run", str(path), "--layout", "single"]) == 0
    ours = StableDiffusionPipeline.from_pretrained(tmp_path / "run/export", safety_checker=None)
    read = dict(config=str(model), local_files_only=True, safety_checker=None)
    theirs = StableDiffusionPipeline.from_single_file(str(path), **read)
    for part in ("unet", "vae", "text_encoder"):
        a, b = (getattr(p, part).state_dict() for p in (ours, theirs))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    with pytest.raises(UserError, match="give OUT.safetensors"):
        cli.run(["export", f"{tmp_path}/run", str(tmp_path / "x"), "--layout", "single"])
    with pytest.raises(UserError, match="--layout single: this run trained adapters"):
        cli.run(["export", f"{road.home}/run", str(tmp_path / "x.safetensors"), "--layout", "single"])
    with pytest.raises(UserError, match="--vae x: a sd15 has its own"):
        cli.run(["export", f"{tmp_path}/run", str(tmp_path / "x"), "--vae", "x"])


def test_names_of_the_published_layout():
    "Where the upper blocks have no attention, the layer that enlarges stands one place earlier."
    from sdcourse.models.single_file import original_unet, original_vae

    how = dict(layers=2, attends={1, 2, 3})
    names = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "down_blocks.0.downsamplers.0.conv.bias": "input_blocks.3.0.op.bias",
        "down_blocks.3.resnets.1.conv2.bias": "input_blocks.11.0.out_layers.3.bias",
        "mid_block.attentions.0.proj_in.bias": "middle_block.1.proj_in.bias",
        "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.1.conv.bias",
        "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
        "up_blocks.3.attentions.2.norm.bias": "output_blocks.11.1.norm.bias",
    }
    assert {k: original_unet(k, **how) for k in names} == names
    assert original_vae("decoder.up_blocks.0.upsamplers.0.conv.bias", 4) == "decoder.up.3.upsample.conv.bias"

"""The small models that ship: every file is what the manifest says, every quality is measured again through
the stored files, and a build that was stopped ends the same.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sdcourse import cli
from sdcourse.commands import tiny
from sdcourse.models import shipped
from sdcourse.models.files import load_shipped
from sdcourse.models.shipped import LIMIT, MODELS, shipped_folder, shipped_home
from sdcourse.config import resolve
from sdcourse.core import UserError, read_json
from sdcourse.data.sets.digits import digits
from sdcourse.data.sets.labelled import FACES, _faces, labelled, questions
from sdcourse.engine.loop import train
from sdcourse.engine.order import Draws
from sdcourse.evaluation.judges import Tiny, TinyLpips, asked_accuracy
from sdcourse.evaluation.stats import wilson
from sdcourse.plot import to_uint8
from sdcourse.train import judge as nets


def test_every_shipped_file_is_in_the_manifest_and_small():
    known = read_json(shipped_home() / "manifest.json")
    assert known.keys() == MODELS.keys() and sum(r.largest for r in MODELS.values()) <= LIMIT
    for name, row in MODELS.items():
        place = shipped_folder(name)
        size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        assert (
            size <= row.largest
            and size == known[name]["bytes"]
            and known[name]["seconds"] < 3 * 3600
            and known[name]["metrics"]
        )
        assert all(
            v.dtype == torch.float16 for f in place.glob("*.safetensors") for v in load_file(f).values()
        )
        texts = {
            p.name: p.read_text()
            for f in ("*.json", "*.md")
            for p in place.rglob(f)
            if p.name != "tokenizer.json"
        }
        assert not [
            n for n, t in texts.items() if "_name_or_path" in t or re.search(r"[ '\"(|]/[a-z]+/", t)
        ]  # no folder of the machine that made it
    assert {p.name for p in shipped_home().iterdir()} == {*known, "manifest.json"}


@pytest.fixture
def root(tmp_path):
    shutil.copytree(shipped_home(), tmp_path / "weights")
    return tmp_path / "weights"


def test_a_file_that_is_not_as_listed_is_refused(root):
    def refused(words):
        with pytest.raises(UserError, match=words) as e:
            load_shipped("tiny-digits", root=root)
        assert "\n" not in str(e.value)

    weights = root / "tiny-digits/model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(r"model.safetensors: is not what the manifest says")
    weights.unlink()
    refused(r"model.safetensors: is missing; install")
    weights.write_bytes(good)
    (root / "tiny-digits/pytorch_model.bin").write_bytes(b"x")
    refused(r"pytorch_model.bin: is not in the manifest")
    (root / "manifest.json").write_text("{}")
    refused("sdcourse tiny build tiny-digits")
    with pytest.raises(UserError, match="did you mean 'tiny-scenes'"):
        load_shipped("tiny-scene")


def test_plain_transformers_loads_them():
    from transformers import AutoModelForImageClassification

    plain, ours = (
        AutoModelForImageClassification.from_pretrained(shipped_folder("tiny-digits")).float().eval(),
        load_shipped("tiny-digits"),
    )
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain(x).logits, ours(x).logits)
    assert (
        not any(p.requires_grad for p in ours.parameters()) and next(ours.parameters()).dtype == torch.float32
    )


def test_what_does_not_fit_float16_is_refused(tmp_path):
    save_file({"w": torch.tensor([1e-3, 70000.0])}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="w does not fit float16"):
        tiny.halve(tmp_path / "w.safetensors")


# ---- quality


def test_digits_that_it_never_saw():
    real = digits("test").tensors
    found = Tiny("tiny-digits").classify(to_uint8(real["pixels"]))["digit"]
    assert wilson((found == real["label"]).sum().item(), 360)["value"] >= 0.98


def test_scenes_of_held_out_pairs_and_people_never_seen():
    "Every fact of a scene at 97 % or more, faces where 32 pixels can show it."
    test, net = labelled("scenes", "test").tensors, Tiny("tiny-scenes")
    numbers = {
        n.name.split("[")[0]: n
        for n in asked_accuracy(net, test["pixels"], dict(zip(net.attributes, test["labels"].T)))
    }
    facts = [
        k
        for k in numbers
        if k.split()[0] in ("kind", "count", "background", "shape", "colour", "size", "place")
    ]
    assert len(facts) == 11 and all(numbers[k].value >= 0.97 for k in facts), numbers
    assert all(numbers[k].value >= 0.94 for k in FACES if k != "Young") and numbers["Young"].value > 0.75
    assert numbers["Male"].n == (test["labels"][:, 0] == 1).sum()


def test_photographs_by_regions_never_seen():
    "Chance would be one in nine."
    test, net = labelled("photos", "test").tensors, Tiny("tiny-photos")
    found = net.classify(test["pixels"])["photograph"]
    assert (found == test["labels"][:, 0]).double().mean() > 0.5


def test_training_and_test_pictures_do_not_meet():
    from sdcourse.data.sets.scenes import facts, held_out, scene_numbers

    known = facts(scene_numbers("train", 300))
    two = known["shape"] >= 0
    assert not held_out(known["shape"], known["colour"])[two].any()
    for world, share in (("digits", 1.0), ("scenes", 0.01)):
        a, b = (labelled(world, s, share).tensors["pixels"].flatten(1) for s in ("train", "test"))
        assert torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist").min() > 0


def test_training_and_test_people_do_not_meet(monkeypatch):
    from sdcourse.data.sets import faces

    seen, real = {}, faces.draw_face
    for split in ("train", "test"):
        drawn = []
        monkeypatch.setattr(
            faces,
            "draw_face",
            lambda attributes, body, *a, **k: drawn.append(tuple(body)) or real(attributes, body, *a, **k),
        )
        _faces(split, 60, 32)
        seen[split] = set(drawn)
    assert len(seen["train"]) > 10 and len(seen["test"]) > 10 and not seen["train"] & seen["test"]


# ---- as instruments


def test_labels_do_not_shift():
    "An answer is the name that transformers gives it."
    net = Tiny("tiny-scenes")
    assert {k: tuple(v) for k, v in questions("scenes").items()} == net.attributes
    x = labelled("scenes", "test", 1.0).tensors
    rows = (x["labels"][:, 0] == 0).nonzero().flatten()[:50]
    colours = [net.attributes["colour 1"][k] for k in net.classify(x["pixels"][rows])["colour 1"]]
    assert asked_accuracy(net, x["pixels"][rows], {"colour 1": colours})[0].value == 1
    with torch.no_grad():
        best = net.net(net.pixels(x["pixels"][rows])).logits
    first = [net.net.config.id2label[i.item()] for i in best[:, 10:18].argmax(1) + 10 + 8]
    assert (
        all(f.startswith("colour 1: ") for f in [net.net.config.id2label[i] for i in range(18, 26)])
        and len(first) == 50
    )


def test_features_do_not_depend_on_the_batch_and_say_what_they_are():
    net, x = Tiny("tiny-digits"), to_uint8(digits("test").tensors["pixels"])
    assert (net(x) - torch.cat([net(x[i : i + 7]) for i in range(0, 360, 7)])).abs().max() < 1e-4
    assert (
        net.how["extractor"] == "tiny-digits"
        and "antialiased" in net.how["resize"]
        and len(net.how["weights"]) == 16
        and net(x).shape == (360, net.width)
    )


def test_pictures_of_other_sizes_are_resized_with_antialiasing():
    "As Pillow does it: fine stripes become grey, and do not turn into coarse ones."
    from PIL import Image

    net, rng = Tiny("tiny-scenes"), np.random.default_rng(0)
    fine = rng.integers(0, 256, (3, 200, 200, 3)).astype(np.uint8)
    want = np.stack([np.asarray(Image.fromarray(f).resize((32, 32), Image.Resampling.BICUBIC)) for f in fine])
    got = (net.pixels(torch.from_numpy(fine).permute(0, 3, 1, 2)) + 1) * 127.5
    assert (got.permute(0, 2, 3, 1) - torch.from_numpy(want)).abs().max() < 1.01  # E7: one level of 255


def test_lpips_sees_every_stage():
    x, far = labelled("scenes", "test", 0.05).tensors["pixels"][:4], TinyLpips("tiny-scenes")
    assert (
        len(far.net.stages(x)) == 3
        and [s.shape[1] for s in far.net.stages(x)] == far.net.net.config.hidden_sizes
    )


def test_lpips_of_equal_pairs_is_zero_and_it_grows_with_noise():
    "E9, and the formula written out."
    x, far = labelled("scenes", "test", 0.1).tensors["pixels"][:20], TinyLpips("tiny-scenes")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    by = [
        far(x, (x.float() + 255 * s * noise).clamp(0, 255).round().byte()).mean().item()
        for s in (0, 0.02, 0.05, 0.1, 0.3)
    ]
    assert by[0] == 0 and sorted(by) == by and by[1] > 0 and far.name == "LPIPS[tiny]"
    y, want = x.flip(3), 0
    for a, b in zip(far.net.stages(x), far.net.stages(y)):
        a, b = (v.double().numpy() for v in (a, b))
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
        want = want + ((a - b) ** 2).sum(1).mean((1, 2))
    assert np.abs(far(x, y).numpy() - want).max() < 1e-6
    with pytest.raises(UserError, match="are no pairs"):
        far(x, x[:3])


# ---- how they are trained


def test_minus_one_is_no_question():
    "A picture without a second object learns nothing about it."
    reader = nets.Task(resolve(nets.Config, preset="scenes", overrides=dict(share=0.01))).build().eval()
    t = labelled("scenes", "train", 0.002).tensors
    batch = dict(pixels=t["pixels"][:4], labels=t["labels"][:4].clone())
    batch["labels"][:, 1:] = -1
    loss, _ = reader(batch, Draws(0, 0, range(4)))
    logits = reader.net(batch["pixels"].float() / 127.5 - 1).logits
    assert torch.allclose(
        loss,
        F.cross_entropy(logits[:, :2], batch["labels"][:, 0], reduction="none", label_smoothing=0.02),
        atol=1e-6,
    )


def lies_in(root, monkeypatch):
    "All shipped models have this folder."
    for module in (shipped, tiny):
        monkeypatch.setattr(module, "shipped_home", lambda: root)


def test_a_build_that_was_stopped_ends_the_same_in_float16(tmp_path, monkeypatch):
    "Through the command, with its own root; bitwise."
    lies_in(tmp_path / "weights", monkeypatch)
    (tmp_path / "weights").mkdir()
    words = "--max-steps 6 --batch-size 16 --threads 1 --device cpu".split()
    assert tiny.build_shipped(["tiny-digits", *words, "--out", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "weights/tiny-digits/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "weights/tiny-digits")
    for _ in range(8):
        if (tmp_path / "weights/tiny-digits").exists():
            break
        assert (
            tiny.build_shipped(
                ["tiny-digits", *words, "--out", str(tmp_path / "parts"), "--max-seconds", "0.000001"]
            )
            == 0
        )
    assert (tmp_path / "weights/tiny-digits/model.safetensors").read_bytes() == whole
    assert all(
        v.dtype == torch.float16
        for v in load_file(tmp_path / "weights/tiny-digits/model.safetensors").values()
    )
    said = json.loads((tmp_path / "weights/manifest.json").read_text())["tiny-digits"]
    assert (
        said["steps"] == 6
        and said["metrics"]["digit"]["n"] == 360
        and shipped_folder("tiny-digits").name == "tiny-digits"
    )
    assert said["bytes"] == sum(p.stat().st_size for p in (tmp_path / "weights/tiny-digits").iterdir())


def test_a_model_of_two_presets_goes_on_from_the_first(root, tmp_path, monkeypatch):
    "Through the command; the second training begins with what the first one exported."
    lies_in(root, monkeypatch)
    drawn = lambda draw, n: {"finite": dict(value=float(draw(["a red ring"], [0]).isfinite().all()), n=1)}
    monkeypatch.setattr("sdcourse.evaluation.adherence.adherence", drawn)
    short = "--max-steps 2 --batch-size 4 --validate-every 0 --num-samples 0 --num-inference-steps 2"
    words = f"{short} --threads 1 --device cpu --lr 1e-30".split()
    assert tiny.build_shipped(["tiny-sd15", *words, "--out", str(tmp_path / "run")]) == 0
    first, last = (
        tmp_path / n / "export/unet/diffusion_pytorch_model.safetensors" for n in ("run-places", "run")
    )
    a, b = load_file(first), load_file(last)
    assert (
        a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    )  # nothing is learned at such a rate
    assert f"model: {tmp_path}/run-places/export" in (tmp_path / "run/config.yaml").read_text()
    said = json.loads((root / "manifest.json").read_text())["tiny-sd15"]
    assert not [p for p in (root / "tiny-sd15").rglob("config.json") if "_name_or_path" in p.read_text()]
    assert (
        said["steps"] == 4
        and said["metrics"]["finite"]["value"] == 1
        and "# Stable Diffusion" in (root / "tiny-sd15/README.md").read_text()
    )


def test_wrong_words_are_one_line():
    for words, text in (
        (["bild"], "did you mean 'build'"),
        (["build", "tiny-digts"], "did you mean 'tiny-digits'"),
        (["build"], "valid: tiny-clip"),
    ):
        with pytest.raises(UserError, match=text):
            cli.run(["tiny", *words])
    with pytest.raises(UserError, match="stages do not divide"):
        train(nets.Task(resolve(nets.Config, overrides=dict(widths=(8, 8, 8, 8, 8), depths=(1, 1, 1, 1, 1)))))

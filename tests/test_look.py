"""`sdcourse look`: figures and numbers of a model, or of LoRAs from one noise; bad input is one line."""

import json

import numpy as np
import pytest
import tiny_models
import torch

from sdcourse.attention.hooks import tap_of
from sdcourse.attention.maps import text_of, token_maps, word_map
from sdcourse.cli import main
from test_hooks import our_dit, pipeline

PROMPT = "a red cat and a hat"


@pytest.fixture(scope="module")
def sd15(built):
    return built(tiny_models.tiny_sd15)


@pytest.fixture(scope="module")
def lora(built, tmp_path_factory):
    "A LoRA of the tiny model with some effect."
    from sdcourse.models.lora import add_lora, save_lora

    pipe = pipeline(built, tiny_models.tiny_sd15)
    add_lora(pipe.unet, rank=2)
    for n, p in pipe.unet.named_parameters():
        if "lora_B" in n:
            p.data.fill_(0.3)
    folder = tmp_path_factory.mktemp("lora") / "bright"
    save_lora(folder, unet=pipe.unet)
    return folder


def look(kind, model, out, *options, steps=2):
    words = [
        "look",
        kind,
        str(model),
        "--out",
        str(out),
        "--num-inference-steps",
        str(steps),
        *map(str, options),
    ]
    assert main(words) == 0
    facts = json.loads((out / f"{kind}.json").read_text())
    assert {p.name for p in out.iterdir()} == {f"{kind}.{end}" for end in ("png", "npz", "json")}
    return facts, dict(np.load(out / f"{kind}.npz"))


def test_maps_are_those_of_the_package(built, sd15, tmp_path):
    facts, found = look(
        "attention", sd15, tmp_path / "a", "--prompt", PROMPT, "--step", 0, "--concepts", "dog"
    )
    names = ["a 1", "red", "cat", "and", "a 2", "hat", "(dog)", "[begin]", "[end]", "[padding]"]
    assert {k.removeprefix("model/0/") for k in found} == {*names, "picture"} and facts["step"] == 0
    pipe = pipeline(built, tiny_models.tiny_sd15)
    with tap_of(pipe, 1, steps=[0]) as tap:
        g = torch.Generator().manual_seed(0)
        image = pipe(PROMPT, generator=g, num_inference_steps=2, output_type="np").images[0]
    maps = token_maps(tap.at(kind="cross"), 77)
    tokens = text_of(pipe, PROMPT)
    at = [i for i, t in enumerate(tokens) if t.text == "cat"]
    assert np.abs(found["model/0/cat"] - word_map(maps, at).numpy()).max() <= 1e-6
    assert np.abs(found["model/0/picture"] - image).max() <= 1 / 255
    with pytest.raises(AssertionError):
        look("attention", sd15, tmp_path / "a", "--prompt", PROMPT)


def test_loras_stand_beside_the_model_on_one_noise(sd15, lora, tmp_path):
    options = ["--prompt", PROMPT, "--words", "cat"]
    _, both = look("attention", sd15, tmp_path / "b", *options, "--lora", lora)
    _, off = look("attention", sd15, tmp_path / "c", *options, "--lora", lora, "--lora-scale", 0)
    for name in ("picture", "cat"):
        was, now = both[f"model/0/{name}"], both[f"1 bright/0/{name}"]
        assert np.abs(was - now).max() > 1e-4 and np.abs(was - off[f"1 bright/0/{name}"]).max() <= 1e-5


def test_pictures_in_one_graph_and_the_same_in_each_run(sd15, lora, tmp_path):
    (tmp_path / "p.txt").write_text("a red cat\nthe lake\n", encoding="utf-8")
    options = ["--prompts", tmp_path / "p.txt", "--eigenvectors", 5, "--segments", 3, "--lora", lora]
    facts, found = look("ncut", sd15, tmp_path / "a", *options)
    _, again = look("ncut", sd15, tmp_path / "b", *options)
    assert all(np.array_equal(found[k], again[k]) for k in found)
    n = facts["cuts"]["model"]["nodes"]
    assert n == len(found["model/labels"]) == 2 * 16 and set(found["model/labels"]) == {0, 1, 2}
    assert np.allclose(found["model/values"][0], 1) and found["1 bright/colours"].shape == (n, 3)


@pytest.mark.parametrize("affinity", ["weight", "output"])
def test_classes_and_words_beside_patches(built, tmp_path, affinity):
    our_dit().save_pretrained(tmp_path / "dit")
    options = ["--affinity", affinity, "--eigenvectors", 4]
    facts, _ = look("ncut", tmp_path / "dit", tmp_path / "a", "--prompt", "b", *options)
    assert facts["cuts"]["model"]["nodes"] == 16 and facts["step"] == 1
    facts, found = look("ncut", built(tiny_models.tiny_sd3), tmp_path / "b", "--prompt", "a cat", *options)
    kinds = found["model/nodes"][:, 1] >= 0
    assert (~kinds).sum() == 64 and 0 < kinds.sum() < 20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", " "], "give one of --prompt and --prompts, and some words"),
        (["--prompt", "a" * 10_000], "10,000 characters are more than any model reads"),
        (["--prompt", "\U0001f408"], "holds no word; name what to look for"),
        (["--prompt", "a cat", "--words", "cap"], "'cap': is not in the prompt; there are cat"),
        (["--prompt", "a cat", "--num-inference-steps", "0"], "--num-inference-steps"),
        (["--prompt", "a cat", "--guidance-scale", "nan"], "--guidance-scale"),
        (
            ["--prompt", "a cat", "--step", "2"],
            "--step 2: there are 2 forward passes; give 0 to 1, or -1 to -2",
        ),
        (["--prompt", "a cat", "--lora", "nowhere"], "--lora nowhere: no such file or folder"),
        (["--prompt", "a cat", "--blocks", "mid_blok.*"], "block 'mid_blok.*': no module has such a name"),
        (["--prompt", "a cat", "--heads", "7"], "head 7: this layer has heads 0 to"),
        (["--prompt", "a cat", "--blocks", "*attn1"], "no word is looked at there"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(sd15, tmp_path, capsys, words, says):
    common = [] if "--num-inference-steps" in words else ["--num-inference-steps", "2"]
    assert main(["look", "attention", str(sd15), "--out", str(tmp_path / "o"), *common, *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_only_one_of_the_verbs_can_show(sd15, lora, tmp_path, capsys):
    our_dit().save_pretrained(tmp_path / "dit")
    out = ["--out", str(tmp_path / "o"), "--num-inference-steps", "2"]
    assert main(["look", "attention", str(tmp_path / "dit"), "--prompt", "b", *out]) == 2
    assert "draws classes and has no words; use sdcourse look ncut" in capsys.readouterr().err
    assert main(["look", "ncut", str(tmp_path / "dit"), "--prompt", "d", *out]) == 2
    assert "--prompt d: is no class of this model" in capsys.readouterr().err
    assert main(["look", "ncut", str(sd15), "--prompt", "a cat", "--blocks", "*attn2", *out]) == 2
    assert "no patch looks at patches there" in capsys.readouterr().err
    assert main(["look", "ncut", str(tmp_path / "dit"), "--prompt", "b", "--lora", str(lora), *out]) == 2
    assert "does not fit FlowDiTPipeline" in capsys.readouterr().err

"""BLIP and BLIP-2 in their published layouts, with random weights of the true classes: what they say is what
transformers says, whatever the batch, and each trap is one line before any work.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_models
from sdcourse import cli
from sdcourse.caption import models
from sdcourse.caption.models import Blip2Job, Blip2Options, BlipJob, BlipOptions
from sdcourse.caption.table import read_captions
from sdcourse.caption.write import run_captions, write_rows
from sdcourse.core import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Eleven pictures of noise in different colours."
    folder = tmp_path_factory.mktemp("noise") / "data"
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(11):
        tone = rng.integers(0, 256, 3)
        pixels = np.clip(tone + rng.normal(0, 40, (20, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{i:02}.png")
    return folder


KINDS = {
    "blip": (tiny_models.tiny_blip, {}, BlipJob, BlipOptions),
    "t5": (tiny_models.tiny_blip2, {}, Blip2Job, Blip2Options),
    "opt": (tiny_models.tiny_blip2, dict(text="opt"), Blip2Job, Blip2Options),
}


def opened(data, built, kind, tmp_path, folder=None, **over):
    make, how, job, options = KINDS[kind]
    over = (
        dict(
            device="cpu",
            out=str(tmp_path / "o"),
            batch=3,
            max_tokens=8,
            model=str(folder or built(make, **how)),
        )
        | over
    )
    cfg = options(**over)
    cfg.check()
    return job(data, cfg, "cpu")


def texts(job):
    "What it says of all pictures, batch by batch."
    rows = job.inputs()["train"]
    n = job.cfg.batch
    found = []
    for some in (rows[i : i + n] for i in range(0, len(rows), n)):
        found += write_rows(job, some, [job.find("train", r) for r in some])
    return [r["text"] for r in found]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_transformers_at_any_batch(data, built, tmp_path, kind):
    "One by one with the library's own words; in float32 the batch changes nothing."
    job = opened(data, built, kind, tmp_path)
    said = texts(job)
    assert len(set(said)) > 1 and all(said)
    for batch in (1, 7):
        assert texts(opened(data, built, kind, tmp_path, batch=batch)) == said
    model, words = job.model, job.tokenizer
    for i in (0, 10):
        pixels = job.processor(
            images=[Image.open(data / f"train/{i:02}.png").convert("RGB")], return_tensors="pt"
        )
        with torch.no_grad():
            if kind == "blip":
                ids = model.generate(**pixels, num_beams=3, min_length=5, max_length=8)[:, 1:]
            else:
                asked = words("")["input_ids"]
                ids = torch.tensor([[3] * 4 + asked])
                ids = model.generate(**pixels, input_ids=ids, num_beams=1, do_sample=False, max_new_tokens=8)
        start = 4 + len(asked) if kind == "opt" else 0  # else the answer begins with image tokens
        whole = words.decode(ids[0, start:], skip_special_tokens=True)
        assert models.one_line(whole) == said[i]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_no_part_of_the_answer(data, built, tmp_path, kind):
    asked = opened(data, built, kind, tmp_path, prompt="photo of the")
    said = texts(asked)
    assert not any("photo of the" in t for t in said) and any(said)
    assert said != texts(opened(data, built, kind, tmp_path))


def test_the_picture_decides(data, built, tmp_path):
    "A black picture is captioned otherwise; with the wrong number of image tokens it is refused."
    job = opened(data, built, "t5", tmp_path)
    black = job.write(["x"], [Image.new("RGB", (16, 16))])[0][0]
    assert black != texts(job)[0]
    job.model.config.num_query_tokens = 3
    with pytest.raises(UserError, match="has 4 query tokens, and its config says 3"):
        job.prepare(Path("x"))


def test_draws_depend_on_the_row_and_on_nothing_else(data, built, tmp_path):
    many = texts(opened(data, built, "t5", tmp_path, sample=True, temperature=50.0, seed=1))
    assert many == texts(opened(data, built, "t5", tmp_path, sample=True, temperature=50.0, seed=1, batch=5))
    assert many != texts(opened(data, built, "t5", tmp_path, sample=True, temperature=50.0, seed=2))
    assert many != texts(opened(data, built, "t5", tmp_path))


def test_parts_that_must_stay_float32_do(data, built, tmp_path):
    job = opened(data, built, "t5", tmp_path, precision="fp16")
    kept = {
        p.dtype for n, p in job.model.named_parameters() if n.startswith("qformer") or n == "query_tokens"
    }
    assert kept == {torch.float32} and job.model.vision_model.dtype == torch.float16
    assert len(texts(job)) == 11


def test_an_old_checkpoint_without_an_image_token_gets_one(data, built, tmp_path):
    old = built(tiny_models.tiny_blip2, image_token=False)
    job = opened(data, built, "t5", tmp_path, folder=old)
    assert job.ids.tolist().count(job.model.config.image_token_index) == 4 and len(set(texts(job))) > 1
    job.model.config.image_token_index = None
    with pytest.raises(UserError, match="has no room for one; fetch a newer revision"):
        models.image_token_of(old, job.model.config, job.tokenizer, 5)


def test_features_that_overflow_are_named(data, built, tmp_path):
    job = opened(data, built, "blip", tmp_path)
    with torch.no_grad():
        job.model.vision_model.post_layernorm.bias[0] = torch.inf
    with pytest.raises(
        UserError, match="00: its features are not finite in fp32; use --precision bf16 or fp32"
    ):
        texts(job)


def changed(built, tmp_path, kind, change):
    make, how = KINDS[kind][:2]
    folder = Path(shutil.copytree(built(make, **how), tmp_path / "model"))
    change(folder)
    return folder


def zeros(part):
    def change(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights = {k: v * 0 if k.startswith(part) else v for k, v in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_words(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"hat"', '"hut"').replace('"lake":', '"lake": 900, "sea":'))


def other_end(folder):
    path = folder / "config.json"
    found = json.loads(path.read_text())
    found["text_config"]["eos_token_id"] = 7
    path.write_text(json.dumps(found))


WRONG = [
    ("blip", pickled, "pytorch_model.bin is a pickle, which is never read here; save it as safetensors"),
    ("blip", lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    ("blip", lambda f: (f / "config.json").unlink(), "no config.json; expected blip"),
    ("blip", zeros("vision_model"), "weights of its vision tower are all zero"),
    ("t5", zeros("query_tokens"), "its query tokens are all zero"),
    ("t5", other_words, "its tokenizer has words up to number 900"),
    ("t5", other_end, "eos_token_id is 1 in its tokenizer and 7 in its config"),
]


@pytest.mark.parametrize("kind, change, said", WRONG)
def test_models_that_cannot_caption_are_one_line(data, built, tmp_path, capsys, kind, change, said):
    folder = changed(built, tmp_path, kind, change)
    verb = "blip" if kind == "blip" else "blip2"
    out = tmp_path / "o"
    assert (
        cli.main(["caption", verb, str(data), "--out", str(out), "--model", str(folder), "--device", "cpu"])
        == 2
    )
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(out.rglob("*.jsonl"))


def test_other_wrong_words_are_one_line(data, built, tmp_path, capsys):
    blip = str(built(tiny_models.tiny_blip))
    for words, said in (
        (["blip"], "blip-image-captioning-large: no such folder, and not in the local hub cache"),
        (["blip2", "--model", blip], "its model_type is 'blip', expected 'blip-2'"),
        (
            ["blip", "--model", blip, "--prompt", "a {thing}"],
            "unknown placeholder {thing}; there may be none",
        ),
        (["blip", "--model", blip, "--sample"], "--sample and --beams 3: beams draw nothing"),
        (["blip", "--model", blip, "--min-tokens", "30"], "--min-tokens 30: more than --max-tokens 20"),
        (["blip", "--model", blip, "--seed", "3"], "has no effect without --sample"),
        (["blip", "--model", blip, "--precision", "int8"], "needs the package bitsandbytes"),
    ):
        kind, *rest = words
        assert (
            cli.main(["caption", kind, str(data), "--out", str(tmp_path / "o"), "--device", "cpu", *rest])
            == 2
        )
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


def test_the_origin_of_a_row(data, built, tmp_path):
    "Model, hash, prompt, precision and decoding stand in each row; another model is another origin."
    cfg = BlipOptions(
        device="cpu", out=str(tmp_path / "o"), model=str(built(tiny_models.tiny_blip)), max_tokens=6
    )
    assert run_captions(BlipJob, data, cfg) == 0
    row = read_captions(tmp_path / "o", "train").rows["blip", "03"]
    assert row["decoding"] == "beams 3, 5 to 6 tokens" and row["precision"] == "fp32"
    assert len(row["model_hash"]) == 16 and "transformers " in row["versions"] and "/" not in row["model"]
    job = opened(
        data, built, "blip", tmp_path, folder=changed(built, tmp_path, "blip", zeros("text_decoder.cls"))
    )
    assert job.origin["model_hash"] != row["model_hash"]

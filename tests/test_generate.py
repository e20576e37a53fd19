"""A picture is a function of the model, the options and its id: whatever the batch order, the ranks, the
stops and the kills.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import ranks
import tiny_models
import warm
from sdcourse.cli import main
from sdcourse.commands.copy_images import CopyOptions, copy_images
from sdcourse.commands.generate import (
    GenerateOptions,
    NEEDED,
    _sampler,
    as_the_run_says,
    file_of,
    generate,
    json_line,
    open_pipeline,
    plan_pictures,
    rows_of_file,
)
from sdcourse.config import load_config, resolve
from sdcourse.core import UserError
from sdcourse.engine.work import Owner
from sdcourse.dataset import pictures
from sdcourse.engine.run_folder import DRAWING
from sdcourse.engine.checkpoint import load_checkpoint
from sdcourse.engine.loop import train
from sdcourse.train.flow_dit import Config, Task

SLOW = Path(__file__).parent / "slow_generate.py"
DIGITS = tuple("0123456789")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A flow DiT after a few steps, with averaged weights that differ from the raw ones."
    out = tmp_path_factory.mktemp("run") / "r"
    train(
        Task(
            resolve(
                Config,
                overrides=dict(
                    size="tiny/4",
                    max_steps=6,
                    batch_size=16,
                    warmup_steps=0,
                    lr=3e-2,
                    num_samples=0,
                    num_inference_steps=1,
                    out=str(out),
                    device="cpu",
                    threads=1,
                ),
            )
        )
    )
    return out


@pytest.fixture(scope="module")
def sd15(built):
    return built(tiny_models.tiny_sd15)


def options(**over):
    asked = {} if over.get("classes") == () else dict(classes=("all",), per_class=2)
    return GenerateOptions(**asked | dict(batch=5, num_inference_steps=2, device="cpu", threads=1) | over)


def words(**over):
    given = {k: v for k, v in vars(options(**over)).items() if v != vars(GenerateOptions())[k]}
    return [
        w
        for k, v in given.items()
        for w in (f"--{k.replace('_', '-')}", ",".join(v) if isinstance(v, tuple) else str(v))
    ]


def content(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def drawn(folder):
    return {k: v for k, v in content(folder).items() if k.endswith(".png")}


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    "An uninterrupted set by one process."
    out = tmp_path_factory.mktemp("whole") / "o"
    assert generate(run, out, options()) == 0
    assert len(set(drawn(out).values())) == 20  # all differ
    return out


# ---- films, and pictures on the way
def film(path):
    with Image.open(path) as im:
        return [im.seek(k) or im.convert("RGB").tobytes() for k in range(im.n_frames)], im.info["duration"]


def test_a_film_shows_what_the_sampler_has_after_each_step(run, whole, sd15, tmp_path):
    few = dict(per_class=1, classes=("3", "5"), gif=True, num_inference_steps=3)
    assert generate(run, tmp_path / "a", options(**few)) == 0
    films = sorted((tmp_path / "a/trajectories").iterdir())
    assert [p.name for p in films] == ["0003-0000.gif", "0005-0000.gif"]
    frames, last = film(films[0])
    assert len(set(frames)) == 3 and last == 2000
    shorter = options(**few | dict(num_inference_steps=2))
    assert generate(run, tmp_path / "b", shorter) == 0
    assert len(film(tmp_path / "b/trajectories/0003-0000.gif")[0]) == 2
    (tmp_path / "p").write_text("a cat\n")
    text = dict(classes=(), prompts=str(tmp_path / "p"), gif=True, num_inference_steps=4)
    assert generate(sd15, tmp_path / "c", options(**text)) == 0
    frames, _ = film(tmp_path / "c/trajectories/00000.gif")
    assert len(set(frames)) == 4


def test_pictures_on_the_way_from_a_prompt_to_the_next(run, sd15, tmp_path):
    (tmp_path / "p").write_text("a cat\na red dog\n")
    text = dict(classes=(), prompts=str(tmp_path / "p"), guidance_scale=3.0)
    assert generate(sd15, tmp_path / "o", options(**text, interpolate=1)) == 0
    rows = [json.loads(x) for x in (tmp_path / "o/test/metadata.jsonl").read_text().splitlines()]
    assert [(r["text"], r["to"], r["share"]) for r in rows] == [
        ("a cat", "a red dog", 0.0),
        ("a cat", "a red dog", 0.5),
        ("a red dog", "a red dog", 0.0),
    ]
    assert len({r["seed"] for r in rows}) == 1 and len(set(drawn(tmp_path / "o").values())) == 3
    pipe, _ = open_pipeline(sd15, options(**text), "cpu")
    both = [pipe.encode_prompt(r, pipe.device, 1, False)[0] for r in ("a cat", "a red dog")]
    how = dict(
        guidance_scale=3.0, num_inference_steps=2, generator=torch.Generator().manual_seed(rows[1]["seed"])
    )
    want = pipe(prompt_embeds=(both[0] + both[1]) / 2, **how).images[0]
    found = Image.open(tmp_path / "o/test" / rows[1]["file_name"])
    assert np.abs(np.asarray(want, float) - np.asarray(found, float)).max() <= 2
    for over, words in (
        (dict(images_per_prompt=2), "--interpolate: mixes captions, all from one noise; leave"),
        (dict(classes=("3",), prompts=""), "--interpolate: mixes captions"),
    ):
        with pytest.raises(UserError, match=words):
            generate(sd15, tmp_path / "x", options(**text | over, interpolate=1))
    (tmp_path / "p").write_text("a cat\n")
    with pytest.raises(UserError, match="--interpolate: there is one prompt; give two or more"):
        generate(sd15, tmp_path / "y", options(**text, interpolate=1))


# ---- what a picture depends on


def test_a_picture_depends_on_its_id_and_not_on_the_others(run, tmp_path):
    "Batches of one: other classes, another number and another order change no byte."
    assert (
        generate(run, tmp_path / "a", options(batch=1))
        == generate(run, tmp_path / "b", options(batch=1, classes=("7", "3"), per_class=3))
        == 0
    )
    a, b = drawn(tmp_path / "a"), drawn(tmp_path / "b")
    assert len(b) == 6 and len(a.keys() & b.keys()) == 4 and all(a[k] == b[k] for k in a.keys() & b.keys())
    seeds = [r["seed"] for r in plan_pictures(options(), DIGITS)]
    assert len(set(seeds)) == 20 and seeds != [r["seed"] for r in plan_pictures(options(seed=1), DIGITS)]


def test_the_batch_size_changes_no_more_than_rounding(run, whole, tmp_path):
    assert generate(run, tmp_path / "o", options(batch=3)) == 0
    a, b = (
        [np.asarray(Image.open(f / k)).astype(int) for k in sorted(drawn(whole))]
        for f in (whole, tmp_path / "o")
    )
    assert max(np.abs(x - y).max() for x, y in zip(a, b)) <= 1


def test_options_reach_the_pipeline(run, whole, tmp_path):
    for k, over in enumerate(
        (
            dict(guidance_scale=3.0),
            dict(num_inference_steps=3),
            dict(seed=1),
            dict(sampler="euler"),
            dict(weights="raw"),
        )
    ):
        source = max((run / "checkpoints").iterdir()) if "weights" in over else run
        assert generate(source, tmp_path / str(k), options(**over)) == 0
        assert not set(drawn(whole).values()) & set(drawn(tmp_path / str(k)).values()), over


def test_a_checkpoint_draws_with_averaged_weights_what_the_export_draws(run, whole, tmp_path):
    assert generate(max((run / "checkpoints").iterdir()), tmp_path / "o", options()) == 0
    assert drawn(tmp_path / "o") == drawn(whole)


# ---- a model out of a checkpoint


def test_an_exported_checkpoint_is_that_checkpoint(run, whole, tmp_path):
    "Averaged and raw; the one of a run is its newest, which is what the run exported."
    last = max((run / "checkpoints").iterdir())
    for name, source, more in (("run", run, []), ("ema", last, []), ("raw", last, ["--weights", "raw"])):
        assert main(["export", str(source), str(tmp_path / name), *more]) == 0
    a, b, c, d = (
        load_file(f / "transformer/diffusion_pytorch_model.safetensors")
        for f in (run / "export", tmp_path / "run", tmp_path / "ema", tmp_path / "raw")
    )
    held = load_checkpoint(last)["tensors"]
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a) and any(
        not torch.equal(a[k], d[k]) for k in a
    )
    assert all(torch.equal(d[k], held["model"][f"dit.{k}" if f"dit.{k}" in held["model"] else k]) for k in d)
    for name in ("run", "ema"):  # they have left their run, and draw as it says
        assert main(["generate", str(tmp_path / name), str(tmp_path / f"{name}-drawn"), *words()]) == 0
        assert drawn(tmp_path / f"{name}-drawn") == drawn(whole)


def test_exports_refuse_in_one_line_and_leave_nothing(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text((run / "config.yaml").read_text())
    for asked, said in (
        ([str(run), str(tmp_path / "there")], "is there already"),
        ([str(run), str(tmp_path / "o"), "--part", "unet"], "this model has transformer"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "o")], "no such folder"),
        ([str(tmp_path / "empty"), str(tmp_path / "o")], "without checkpoints"),
        ([str(run / "export"), str(tmp_path / "o")], "export: is a pipeline already"),
        ([str(run / "checkpoints"), str(tmp_path / "o")], "is no pipeline, run or checkpoint; give RUN"),
        ([str(run / "samples"), str(tmp_path / "o")], "is no pipeline, run or checkpoint; give RUN"),
        ([str(run), str(tmp_path / "o"), "--weights", "average"], "ema, raw"),
    ):
        assert main(["export", *asked]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error, error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "there"]


def test_stable_diffusion_is_its_own_pipeline(sd15, tmp_path):
    "Prompts, seeds, guidance, negative prompt and scheduler arrive; K pictures of a prompt differ."
    (tmp_path / "p.txt").write_text("a red circle\n\nan old cat\n")
    cfg = options(
        classes=(),
        prompts=str(tmp_path / "p.txt"),
        images_per_prompt=2,
        batch=4,
        guidance_scale=3.0,
        negative_prompt="dark",
        sampler="DDIMScheduler",
        size=32,
    )
    assert generate(sd15, tmp_path / "o", cfg) == 0
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe, rows = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None), plan_pictures(cfg)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert [(r["id"], r["of"], r["text"]) for r in rows] == [
        (f"0000{i}-{k}", f"0000{i}", t) for i, t in enumerate(("a red circle", "an old cat")) for k in (0, 1)
    ]
    want = pipe(
        [r["text"] for r in rows],
        negative_prompt=["dark"] * 4,
        guidance_scale=3.0,
        num_inference_steps=2,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(r["seed"]) for r in rows],
    ).images
    for r, w in zip(rows, want):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "o/test" / r["file_name"])), np.asarray(w))
    assert len(set(drawn(tmp_path / "o").values())) == 4
    data = pictures(tmp_path / "o", "test")
    assert data.ids == [r["id"] for r in rows] and data.row(3)["texts"] == ["an old cat"]


def test_a_lora_changes_pictures_and_its_strength_counts(sd15, tmp_path):
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(pipe.unet)
    )
    (tmp_path / "p.txt").write_text("a red circle\n")
    found = []
    for k, over in enumerate(
        (
            dict(),
            dict(lora=str(tmp_path / "lora")),
            dict(lora=str(tmp_path / "lora"), lora_scale=0.0),
            dict(lora=str(tmp_path / "lora/pytorch_lora_weights.safetensors"), lora_scale=0.5),
        )
    ):
        assert (
            generate(
                sd15, tmp_path / str(k), options(classes=(), prompts=str(tmp_path / "p.txt"), size=32, **over)
            )
            == 0
        )
        found.append(*drawn(tmp_path / str(k)).values())
    assert found[0] == found[2] and len(set(found)) == 3


# ---- stops, kills and ranks


def test_two_ranks_draw_the_same_bytes_and_share_the_work(run, whole, tmp_path):
    ends = ranks.finish(
        ranks.start([SLOW, run, tmp_path / "o", *words()], 2, first=warm.MODELS, NOTES=str(tmp_path / "n"))
    )
    assert [c for c, _, _ in ends] == [0, 0], ends
    assert content(tmp_path / "o/test") == content(whole / "test")
    mine = [set(Path(f"{tmp_path}/n.{r}").read_text().split()) for r in (0, 1)]
    assert not mine[0] & mine[1] and [len(m) for m in mine] == [10, 10]


def test_killed_it_goes_on_and_ends_with_the_same_bytes(run, tmp_path):
    "Three kills, each after another picture is there; twenty batches, so that none comes after the end."
    out, end = tmp_path / "o", time.monotonic() + warm.LIMIT
    for kill in range(3):
        (proc,) = ranks.start([SLOW, run, out, *words(batch=1)], 1, first=warm.MODELS, SLOW="0.1")
        before = len(list(out.glob("test/*.png")))
        while len(list(out.glob("test/*.png"))) <= before and proc.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        assert proc.poll() is None
        proc.send_signal(signal.SIGKILL)
        proc.communicate()
        assert not (out / "test/metadata.jsonl").exists()
        for p in out.glob("test/*.png"):
            Image.open(p).load()  # none is half
    assert generate(run, out, options(batch=1)) == generate(run, tmp_path / "whole", options(batch=1)) == 0
    assert content(out / "test") == content(tmp_path / "whole/test")


@pytest.mark.parametrize("how", ["SIGTERM", "STOP", "SIGUSR1 to one rank"])
def test_asked_to_stop_it_leaves_between_batches_and_goes_on_later(run, whole, tmp_path, how):
    "R7: on both ranks, with the code of a requeue, and a file STOP with 0."
    out = tmp_path / "o"
    procs = ranks.start(
        [SLOW, run, out, *words(batch=1), "--requeue-code", "75"],
        2,
        first=warm.MODELS,
        SLOW="1",
        NOTES=str(tmp_path / "n"),
    )
    end = time.monotonic() + warm.LIMIT
    while not list(out.glob("test/*.png")):
        assert time.monotonic() < end and all(p.poll() is None for p in procs), [
            p.communicate() for p in procs
        ]
        time.sleep(0.01)
    if how == "STOP":
        (out / "STOP").touch()
    else:
        for p in procs[how.endswith("one rank") :]:
            p.send_signal(getattr(signal, how.split()[0]))
    ends = ranks.finish(procs)
    assert [c for c, _, _ in ends] == ([0, 0] if how == "STOP" else [75, 75]), ends
    assert (
        "pictures are left; the same command goes on" in ends[0][1]
        and not (out / "STOP").exists()
        and not (out / "test/metadata.jsonl").exists()
    )
    assert all(len(Path(f"{tmp_path}/n.{r}").read_text().split()) < 10 for r in (0, 1))  # each rank has ten
    first = drawn(out)
    assert (
        generate(run, out, options(batch=1)) == 0
        and len(drawn(out)) == 20
        and first.items() <= drawn(out).items()
    )


def test_a_deadline_stops_it_too(run, tmp_path):
    assert generate(run, tmp_path / "o", options(max_seconds=1e-6, requeue_code=75)) == 75
    assert not drawn(tmp_path / "o") and generate(run, tmp_path / "o", options()) == 0


def test_a_missing_picture_is_drawn_again_with_its_batch(run, whole, tmp_path):
    assert generate(run, tmp_path / "o", options()) == 0
    victim = next((tmp_path / "o/test").glob("*.png"))
    victim.unlink()
    (tmp_path / "o/test/.half.png.1.tmp").write_bytes(b"x")  # what a kill leaves
    assert generate(run, tmp_path / "o", options()) == 0 and content(tmp_path / "o") == content(whole)


# ---- what is refused


def test_a_folder_of_other_settings_is_refused(run, whole, tmp_path):
    for over, name in (
        (dict(guidance_scale=2.0), "guidance_scale"),
        (dict(seed=3), "seed"),
        (dict(num_inference_steps=4), "num_inference_steps"),
        (dict(batch=4), "batch"),
        (dict(per_class=3), "rows|per_class"),
    ):
        with pytest.raises(UserError, match=f"made with other settings .*({name})"):
            generate(run, whole, options(**over))
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        generate(run, tmp_path, options())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_model_is_refused(run, whole, tmp_path):
    import shutil

    shutil.copytree(run / "export", tmp_path / "m")
    from safetensors.torch import load_file, save_file

    (file,) = (tmp_path / "m").rglob("*.safetensors")
    save_file({k: v + 1e-3 for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError, match="other settings .*weights"):
        generate(tmp_path / "m", whole, options())


@pytest.mark.parametrize(
    "over, text",
    [
        (dict(classes=()), "give one of --data, --prompts and --classes, got none"),
        (dict(data="x"), "got --data and --classes"),
        (dict(classes=("12",)), "class 12: "),
        (dict(classes=("zero",)), "class zero: "),
        (dict(batch=0), "--batch 0: must be greater than 0"),
        (dict(lora="nowhere"), "--lora nowhere: no such file"),
        (dict(classes=(), prompts="nowhere.txt"), "--prompts nowhere.txt: cannot be read"),
        (dict(classes=(), data="nowhere/"), "nowhere/?: no such folder"),
    ],
)
def test_wrong_options_are_one_line(run, tmp_path, over, text):
    with pytest.raises(UserError, match=text) as e:
        generate(run, tmp_path / "o", options(**over))
    assert "\n" not in str(e.value) and not list(tmp_path.glob("o/*/*"))


def test_wrong_models_and_sets_are_one_line(run, sd15, tmp_path):
    import shutil

    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "p.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "b"}\n')
    (tmp_path / "twice.jsonl").write_text('{"id": "a/b", "text": "x"}\n{"id": "a_b", "text": "y"}\n')
    prompts = options(classes=(), prompts=str(tmp_path / "p.txt"))
    cases = [
        (tmp_path / "no", prompts, "no such folder"),
        (run, prompts, "00000 has no label; this model wants one"),
        (sd15, options(), "--classes: this model draws texts"),
        (sd15, options(classes=(), prompts=str(tmp_path / "p.jsonl")), "p.jsonl:2: expected an object"),
        (sd15, options(classes=(), prompts=str(tmp_path / "twice.jsonl")), "two rows would be a_b.png"),
        (
            sd15,
            options(classes=(), prompts=str(tmp_path / "p.txt"), sampler="DIMScheduler"),
            "--sampler DIMScheduler: did you mean 'DDIMScheduler'",
        ),
    ]
    half = tmp_path / "half"
    shutil.copytree(sd15, half)
    for p in (half / "unet").glob("*.safetensors"):
        p.unlink()
    cases.append((half, prompts, "half: is no pipeline that diffusers loads"))
    for source, cfg, text in cases:
        with pytest.raises(UserError, match=text) as e:
            generate(source, tmp_path / "o", cfg)
        assert "\n" not in str(e.value) and not list(tmp_path.glob("o/*/*"))


def test_a_checkpoint_away_from_its_run_says_where_it_belongs(run, tmp_path, monkeypatch, capsys):
    "faults.md F: also when the config.yaml of something else lies where that of the run should."
    import shutil

    moved = shutil.copytree(run / "checkpoints/step-00000006", tmp_path / "a/b/moved")
    (tmp_path / "a/config.yaml").write_text("task: flow_dit\n")
    monkeypatch.chdir(tmp_path / "a/b")
    remedy = "put it back as RUN/checkpoints/step-00000006, beside RUN/config.yaml"
    for verb, more in (("export", []), ("generate", words())):
        for source in (str(moved), "moved"):
            assert main([verb, source, str(tmp_path / "o"), *more]) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"error: {moved}: has left its run") and said.strip().endswith(remedy)
    shutil.copytree(moved, tmp_path / "back/checkpoints/step-00000006")  # the remedy works
    shutil.copy(run / "config.yaml", tmp_path / "back")
    assert main(["export", str(tmp_path / "back"), str(tmp_path / "o")]) == 0


def test_a_run_whose_paths_are_elsewhere_says_where_to_go(run, tmp_path, capsys):
    "faults.md F: a relative --model or --data, and another working folder."
    import shutil

    shutil.copytree(run, tmp_path / "r")
    file = tmp_path / "r/config.yaml"
    file.write_text(file.read_text().replace("  data: digits", "  data: d/pictures"))
    assert main(["export", str(tmp_path / "r"), str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "d/pictures" in said and "run this command in the folder where the run was trained" in said
    assert said.count("\n") == 1 and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "over, text",
    [
        (dict(num_inference_steps=1001), "--num-inference-steps 1001: more than the 1000 steps"),
        (dict(size=33), "StableDiffusionPipeline does not draw so: `height` and `width`"),
        (dict(sampler="FlowMatchEulerDiscreteScheduler"), "--sampler Flow.*: the model is of noise"),
    ],
)
def test_what_a_pipeline_cannot_do_is_one_line(sd15, tmp_path, over, text):
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(UserError, match=text) as e:
        generate(sd15, tmp_path / "o", options(classes=(), prompts=str(tmp_path / "p.txt"), **over))
    assert "\n" not in str(e.value) and not list(tmp_path.glob("o/*/*.png"))


def test_a_sampler_fits_noise_or_flows():
    from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler

    noise, flow = PNDMScheduler().config, FlowMatchEulerDiscreteScheduler().config
    for config, name in ((noise, "LCMScheduler"), (flow, "FlowMatchHeunDiscreteScheduler")):
        assert type(_sampler(name, config)).__name__ == name
    assert type(_sampler("UniPCMultistepScheduler", flow)).__name__ == "UniPCMultistepScheduler"
    with pytest.raises(UserError, match="DDIMScheduler: the model is a flow"):
        _sampler("DDIMScheduler", flow)


def test_a_model_that_is_not_finite_draws_nothing(sd15, tmp_path):
    "It would draw black pictures, and say nothing."
    import shutil

    from safetensors.torch import save_file

    odd = shutil.copytree(sd15, tmp_path / "odd")
    (file,) = (odd / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"].view(-1)[0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(UserError, match="decoder.conv_in.weight of its vae is not finite in fp32"):
        generate(odd, tmp_path / "o", options(classes=(), prompts=str(tmp_path / "p.txt")))


@pytest.mark.parametrize("out", ["file", "file/x"])
def test_a_file_in_the_way_is_said_before_the_model_is_read(tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^OUT .*file is a file; choose another folder$"):
        generate(tmp_path / "no-model", tmp_path / out, options())


# ---- a run draws as it says


def test_what_is_not_given_is_as_the_run_says(run, whole):
    said = load_config(run / "config.yaml")["config"]
    free = GenerateOptions(classes=("all",))
    for source in (run, run / "export", run / "checkpoints" / "step-00000006"):
        cfg, more = as_the_run_says(source, free)
        assert (cfg.guidance_scale, cfg.num_inference_steps, cfg.sampler) == (1.25, 1, "heun") and not more
        own = options(guidance_scale=0.0, sampler="euler")
        assert as_the_run_says(source, own) == (own, {})
    assert said["guidance_scale"] == 1.25
    made = json.loads((whole / "generate.json").read_text())["made_by"]
    assert (made["guidance_scale"], made["num_inference_steps"], made["sampler"]) == (1.25, 2, "heun")


def test_the_pictures_of_a_run_are_those_of_its_guidance_and_interval(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "r")
    file = tmp_path / "r/export" / DRAWING
    text = file.read_text()
    assert "guidance_scale: 1.25" in text
    file.write_text(text.replace("guidance_scale: 1.25", "guidance_scale: 3.5"))
    some = dict(classes=("3",), per_class=2)
    for source, out, over in (
        (run, "a", {}),
        (run, "b", dict(guidance_scale=3.5)),
        (tmp_path / "r", "c", {}),
    ):
        assert generate(source, tmp_path / out, options(**some, **over)) == 0
    assert drawn(tmp_path / "b") == drawn(tmp_path / "c") != drawn(tmp_path / "a")
    strong = yaml.safe_load(text) | dict(guidance_scale=3.5)
    file.write_text(yaml.safe_dump(strong | dict(guidance_interval=[0.01, 0.02])))  # no step is in it
    assert generate(tmp_path / "r", tmp_path / "d", options(**some)) == 0
    assert generate(run, tmp_path / "e", options(**some, guidance_scale=1.0)) == 0
    assert drawn(tmp_path / "d") == drawn(tmp_path / "e")
    file.unlink()  # of no run: the pipeline's own
    assert as_the_run_says(tmp_path / "r/export", options()) == (options(), {})


# ---- files of prompts


def test_lines_of_prompts_end_at_line_feeds_only(tmp_path):
    "Cases 8 and 10: separators of Unicode, form feeds and the mark of Windows editors."
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa cat\r\n\r\ntwo\u2028lines \x0cof\x85one\rlast".encode())
    assert [r["text"] for r in rows_of_file(file)] == ["a cat", "two\u2028lines \x0cof\x85one", "last"]
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"id": "x", "text": "a\u2028b"}\n'.encode())
    assert rows_of_file(tmp_path / "p.jsonl") == [dict(id="x", text="a\u2028b")]


@pytest.mark.parametrize(
    "line, text",
    [
        ('{"text": null}', "p.jsonl:1: expected an object with text or label"),
        ('{"text": ["a"]}', "p.jsonl:1: its text is .* give text"),
        ('{"text": ""}', "p.jsonl:1: its text is "),
        ('{"text": "a", "id": ""}', "p.jsonl:1: its id is .* a text or a whole number"),
        ('{"text": "a", "id": 1.5}', "p.jsonl:1: its id is 1.5; give a text or a whole number"),
        ('{"label": true}', "p.jsonl:1: its label is true"),
        ('{"text": ' + "9" * 5000 + "}", "p.jsonl:1: expected an object"),
        ("[" * 100_000, "p.jsonl:1: expected an object"),
    ],
)
def test_values_of_prompts_are_checked_where_they_stand(tmp_path, line, text):
    "Case 41."
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=text) as e:
        rows_of_file(tmp_path / "p.jsonl")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize(
    "row, text",
    [
        (dict(text="cut \ud83d"), "the text of '00000' holds half of a character"),
        (dict(text="a", id="\ud83d"), "the id of .* holds half of a character"),
        (dict(text="a", id="x" * 300), "is too long for the name of a file; shorten it"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, row, text):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=text) as e:
        plan_pictures(GenerateOptions(prompts=str(tmp_path / "p.jsonl")))
    str(e.value).encode()


def test_a_hidden_id_gives_a_file_that_is_seen():
    assert [file_of(k) for k in (".x", "a/b", "..", "a.b")] == ["_x.png", "a_b.png", "_..png", "a.b.png"]


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=("Cs",))), st.text(min_size=1))
@example("a\u2028b\u2029c\x85d\x0ce", "x")
def test_a_row_is_one_line_for_every_reader(text, name):
    line = json_line(dict(id=name, text=text)) if name.isprintable() else json_line(dict(text=text))
    assert len(line.splitlines()) == 1 and json.loads(line)["text"] == text


def test_only_some_of_the_prompts(tmp_path):
    "Case 40: so many, spread over the file; a smaller choice is part of a larger one, with the same seeds."
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(50)))

    def plan(n):
        return plan_pictures(GenerateOptions(prompts=str(tmp_path / "p.txt"), max_samples=n))

    whole, some, few = plan(0), plan(10), plan(3)
    assert [len(x) for x in (whole, some, few)] == [50, 10, 3] and plan(99) == whole
    assert all(r in some for r in few) and all(r in whole for r in some)
    assert [r["id"] for r in some] == sorted(r["id"] for r in some) and some != whole[:10]


def test_an_option_without_effect_is_refused(run, sd15, tmp_path):
    given = dict(per_class=3, max_samples=2, caption_column="c", label_column="l", lora_scale=0.5)
    given |= dict(lora_block_scales=("0:0.5",), lora_any_base=True)
    assert given.keys() == NEEDED.keys()
    (tmp_path / "p.txt").write_text("a cat\n")
    for option, value in given.items():
        asked = dict(classes=("all",)) if option != "per_class" else dict(prompts="p.txt")
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')}: has no effect without --"):
            GenerateOptions(**asked, **{option: value}).check()
    for source, over, text in (
        (run, dict(weights="raw"), "--weights raw: .*export is an exported pipeline"),
        (run, dict(negative_prompt="x"), "--negative-prompt: this model draws classes"),
        (
            run / "checkpoints/step-00000006",
            dict(precision="bf16"),
            "--precision bf16: a checkpoint is drawn in",
        ),
    ):
        with pytest.raises(UserError, match=text):
            generate(source, tmp_path / "o", options(**over))


def test_an_export_leaves_what_another_command_left(run, tmp_path):
    "Case 46: OUT.partial of a stopped command is not its own; and OUT below a file is one line."
    from sdcourse.commands.export import ExportOptions, export

    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial/hours").write_text("of work")
    assert export(run, tmp_path / "x", ExportOptions()) == 0
    assert (tmp_path / "x.partial/hours").read_text() == "of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.partial"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; choose another folder"):
        export(run, tmp_path / "file/x", ExportOptions())


# ---- prompts of a data set, and the truth beside it


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data") / "d", np.random.default_rng(0)
    (folder / "test").mkdir(parents=True)
    rows = [
        {"file_name": f"{i}.png", "id": f"p/{i}", "text": f"a {w} cat", "label": i % 2, "place": w}
        for i, w in enumerate(("red", "blue", "green"))
    ]
    for r in rows:
        Image.fromarray(rng.integers(0, 256, (24, 36, 3), dtype=np.uint8)).save(
            folder / "test" / r["file_name"]
        )
    (folder / "test/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_captions_and_ids_of_a_data_set(data, sd15, tmp_path):
    rows = plan_pictures(options(classes=(), data=str(data)))
    assert [(r["id"], r["text"], r["file_name"]) for r in rows] == [
        ("p/0", "a red cat", "p_0.png"),
        ("p/1", "a blue cat", "p_1.png"),
        ("p/2", "a green cat", "p_2.png"),
    ]
    odd = shutil.copytree(data, tmp_path / "odd") / "test/metadata.jsonl"
    odd.write_text(odd.read_text().replace("a blue", "a\u2028b\x85c"), encoding="utf-8")
    how = options(classes=(), data=str(tmp_path / "odd"), size=32, num_inference_steps=1)
    assert generate(sd15, tmp_path / "drawn", how) == 0  # case 55: what is drawn can be judged
    drawn_rows = pictures(tmp_path / "drawn", "test").rows(range(3))
    assert [r["texts"] for r in drawn_rows] == [["a red cat"], ["a\u2028b\x85c cat"], ["a green cat"]]
    few, all_ = (plan_pictures(options(classes=(), data="digits", max_samples=n), DIGITS) for n in (5, 0))
    assert len(few) == 5 and len(all_) == 360 and [r for r in all_ if r in few] == few


def test_the_truth_is_copied_linked_or_resized(data, tmp_path):
    assert (
        copy_images(data, tmp_path / "copy", CopyOptions())
        == copy_images(data, tmp_path / "link", CopyOptions(link=True))
        == copy_images(data, tmp_path / "small", CopyOptions(size=12))
        == 0
    )
    truth = pictures(data, "test")
    for name in ("copy", "link"):
        same = pictures(tmp_path / name, "test")
        assert (
            same.ids == truth.ids
            and same.row(1)["texts"] == ["a blue cat"]
            and same.row(1)["place"] == "blue"
            and same.row(1)["label"] == 1
        )
        assert all(np.array_equal(np.asarray(same.image(i)), np.asarray(truth.image(i))) for i in range(3))
    links = sorted((tmp_path / "link/test").glob("*.png"))
    assert all(p.is_symlink() and not os.readlink(p).startswith("/") for p in links)
    (tmp_path / "x").mkdir()
    want = np.asarray(truth.image(0).resize((18, 12), Image.Resampling.BICUBIC).crop((3, 0, 15, 12))).astype(
        int
    )
    assert (
        np.abs(np.asarray(pictures(tmp_path / "small", "test").image(0)).astype(int) - want).max() <= 1
    )  # E7
    for cfg, text in (
        (CopyOptions(link=True, size=4), "cannot be resized"),
        (CopyOptions(split="val"), "no split val|val"),
    ):
        with pytest.raises(UserError, match=text):
            copy_images(data, tmp_path / "new", cfg)
    with pytest.raises(UserError, match="is there already"):
        copy_images(data, tmp_path / "copy", CopyOptions())
    assert not (tmp_path / "new").exists()


def test_a_model_is_named_by_its_weights(run):
    a, b = (open_pipeline(s, options(), "cpu")[1] for s in (run, run / "export"))
    assert a == b and len(a["weights"]) == 16 and a["pipeline"] == "FlowDiTPipeline"


def test_the_command(run, tmp_path):
    done = warm.run(
        ["-m", "sdcourse.cli", "generate", run, tmp_path / "o", *words(per_class=1)], first=warm.MODELS
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("o: 10 pictures") and not done.stderr, (
        done.stderr
    )


def test_two_ids_of_a_set_never_share_a_file(tmp_path):
    home = tmp_path / "in/train"
    rows = []
    for i, name in enumerate(("cat 1.png", "cat_1.png", "cat/1.png")):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(home / name)
        rows.append({"file_name": name, "text": f"\u2028 {i}", "x": None})
    (home / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert copy_images(tmp_path / "in", tmp_path / "out", CopyOptions(split="train")) == 0
    copied = pictures(tmp_path / "out", "train")
    assert (
        copied.ids == ["cat 1", "cat_1", "cat/1"] and len(list((tmp_path / "out/train").glob("*.png"))) == 3
    )
    assert [copied.image(i).getpixel((0, 0))[0] for i in range(3)] == [0, 1, 2]
    assert not list((tmp_path / "out").glob(".*"))


def test_the_work_of_another_command_is_left_alone(data, tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial/hours.png").write_bytes(b"of download")
    with pytest.raises(UserError, match="x.partial: is the work of another command"):
        copy_images(data, tmp_path / "x", CopyOptions())
    assert (tmp_path / "x.partial/hours.png").is_file()
    (tmp_path / "y.partial").mkdir()
    (tmp_path / "y.partial/.copy-images").touch()  # a start that was killed
    (tmp_path / "y.partial/test").mkdir()
    (tmp_path / "y.partial/test/old.png").touch()
    assert copy_images(data, tmp_path / "y", CopyOptions()) == 0
    assert sorted(p.name for p in (tmp_path / "y/test").iterdir()) == [
        "metadata.jsonl",
        "p_0.png",
        "p_1.png",
        "p_2.png",
    ]
    (tmp_path / "z.partial").mkdir()
    (tmp_path / "z.partial/.copy-images").touch()
    with Owner(tmp_path / "z.partial"):  # one that is at work
        with pytest.raises(UserError, match="another process is working in it"):
            copy_images(data, tmp_path / "z", CopyOptions())


def test_what_is_in_the_way_of_a_copy_is_one_line(data, tmp_path):
    "Case 45: OUT is a file, a broken link, or below a file."
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, words in (
        ("file", "is there already"),
        ("link", "is there already"),
        ("file/x", "file is a file"),
    ):
        with pytest.raises(UserError, match=f"{words}; choose another") as e:
            copy_images(data, tmp_path / name, CopyOptions())
        assert "\n" not in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_a_full_disk_ends_a_copy_with_one_line(data, tmp_path):
    "Case 48: the limit on file sizes stands for a disk; a second start begins anew, as the line says."
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, old[1]))
    try:
        with pytest.raises(UserError, match="ulimit -f.* it begins anew") as e:
            copy_images(data, tmp_path / "x", CopyOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(e.value) and not (tmp_path / "x").exists()
    assert (
        copy_images(data, tmp_path / "x", CopyOptions()) == 0 and len(pictures(tmp_path / "x", "test")) == 3
    )
    assert [p.name for p in tmp_path.iterdir()] == ["x"]

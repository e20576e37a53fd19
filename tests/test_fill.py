"""`sdcourse cache`: the right numbers, the same bytes however often it was interrupted and by however many
ranks, and refusals.
"""

import hashlib
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ranks
import tiny_models
import warm
from sdcourse import cli
from sdcourse.cache import fill as module
from sdcourse.cache.fill import JOBS, FeatureOptions, LatentOptions, PromptOptions, cache, fill, prepare_plan
from sdcourse.cache.store import Cache, read_index
from sdcourse.core import UserError

SLOW = Path(__file__).parent / "slow_cache.py"
WORDS = "a red house|a blue cat|the large dog on the lake|a smiling face with glasses".split("|")


def pictures(folder, n=24, val=6, size=16, width=16):
    "Random pictures with captions and two classes."
    rng = np.random.default_rng(0)
    for split, count in (("train", n), ("val", val)):
        (folder / split).mkdir(parents=True)
        rows = []
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (size, width, 3), dtype=np.uint8)).save(
                folder / split / f"{i:03}.png"
            )
            rows.append(
                {"file_name": f"{i:03}.png", "id": f"{split}-{i:03}", "text": WORDS[i % 4], "label": i % 2}
            )
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "classes.json").write_text(
        json.dumps([{"label": k, "name": n, "folder": n} for k, n in enumerate("ab")])
    )
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory, built):
    "(pictures, a pipeline, a vision model)"
    root = tmp_path_factory.mktemp("world")
    return pictures(root / "data"), built(tiny_models.tiny_sd15), built(tiny_models.tiny_dino)


def options(model, cls=LatentOptions, **over):
    small = dict(device="cpu", encode_batch=4, dtype="fp32") | (
        dict(size=16, shard_bytes=5000) if cls is LatentOptions else {}
    )
    return cls(model=str(model), **small | over)


def content(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).iterdir())
        if not p.name.startswith("slurm-")
    }


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    "An uninterrupted cache by one process."
    out = tmp_path_factory.mktemp("whole") / "c"
    assert cache("latents", world[0], out, options(world[1])) == 0
    assert len(list(out.glob("train-*.safetensors"))) == 6 and len(list(out.glob("val-*.safetensors"))) == 2
    return out


def test_latents_are_the_moments_of_picture_and_mirror(world, whole):
    "By hand with diffusers, one by one; the mirror's latent is not the mirrored latent."
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(world[1] / "vae").eval()
    for split, n in (("train", 24), ("val", 6)):
        data = Cache(whole, split, kind="latents")
        assert data.ids.tolist() == [f"{split}-{i:03}" for i in range(n)]
        for i in range(n):
            item = data[i]
            x = (
                torch.from_numpy(np.array(Image.open(world[0] / split / f"{i:03}.png"))).permute(2, 0, 1)[
                    None
                ]
                / 127.5
                - 1
            )
            with torch.no_grad():
                sides = [vae.encode(s).latent_dist for s in (x, x.flip(-1))]
            for side, d in enumerate(sides):
                assert (item["mean"][side] - d.mean[0]).abs().max() < 1e-5 and (
                    item["std"][side] - d.std[0]
                ).abs().max() < 1e-5
            assert item["label"] == i % 2 and item["id"] == f"{split}-{i:03}"
        assert (item["mean"][1] - item["mean"][0].flip(-1)).abs().max() > 1e-3
    assert data.facts["classes"] == ["a", "b"] and data.facts["channels"] == 4


@pytest.mark.parametrize(
    "dtype, kind, error", [("fp16", torch.float16, 2**-10), ("bf16", torch.bfloat16, 2**-7)]
)
def test_smaller_formats_round_once(world, whole, tmp_path, dtype, kind, error):
    assert cache("latents", world[0], tmp_path / "c", options(world[1], dtype=dtype)) == 0
    exact, data = Cache(whole), Cache(tmp_path / "c")
    got, want = data.__getitems__(range(24)), exact.__getitems__(range(24))
    for k in ("mean", "std"):
        assert got[k].dtype == kind and torch.equal(got[k], want[k].to(kind))
    assert got["label"].tolist() == want["label"].tolist()


def test_prompts_are_kept_by_their_words(world, tmp_path, capsys):
    """Equal captions once, the empty prompt always; a caption added later is one row; nothing else is
    computed again.
    """
    from diffusers import StableDiffusionPipeline

    data, out = pictures(tmp_path / "data"), tmp_path / "p"
    assert cache("prompts", data, out, options(world[1], PromptOptions)) == 0
    found = Cache(out, "", kind="prompts")
    assert found.ids.tolist() == ["", *WORDS] and len(json.loads((out / "-00000.json").read_text())) == 5
    pipe = StableDiffusionPipeline.from_pretrained(world[1])
    for text in ("", WORDS[2]):
        want = pipe.encode_prompt(text, "cpu", 1, False)[0]
        assert (found.__getitems__(found.numbers([text]))["text_encoder.hidden"] - want).abs().max() < 1e-5
    assert found.__getitems__([1])["text_encoder.mask"].dtype == torch.bool
    before, table = content(out), data / "train/metadata.jsonl"
    table.write_text(table.read_text().replace(WORDS[0], "a green tree", 1))
    encoded = []
    real = module.finite
    try:
        module.finite = lambda e, b, names: encoded.extend(b) or real(e, b, names)
        assert cache("prompts", data, out, options(world[1], PromptOptions)) == 0
    finally:
        module.finite = real
    assert encoded == ["a green tree"] and Cache(out, "").ids.tolist() == ["", *WORDS, "a green tree"]
    after = content(out)
    assert all(after[n] == before[n] for n in before if n != "index.json")
    (tmp_path / "more.txt").write_text("a large cat\n\n a red house \n")
    assert cache("prompts", data, out, options(world[1], PromptOptions, more=str(tmp_path / "more.txt"))) == 0
    assert Cache(out, "").ids.tolist()[-1] == "a large cat"
    assert "1 rows computed" in capsys.readouterr().out


def test_features_are_those_of_the_model(world, tmp_path):
    from transformers import AutoImageProcessor, Dinov2Model

    assert cache("features", world[0], tmp_path / "f", options(world[2], FeatureOptions, what="both")) == 0
    data, net, steps = (
        Cache(tmp_path / "f", "val"),
        Dinov2Model.from_pretrained(world[2]).eval(),
        AutoImageProcessor.from_pretrained(world[2], backend="pil"),
    )
    for i in range(6):
        with torch.no_grad():
            want = net(
                **steps(images=[Image.open(world[0] / f"val/{i:03}.png").convert("RGB")], return_tensors="pt")
            )
        assert (data[i]["pooled"] - want.pooler_output[0]).abs().max() < 1e-4 and (
            data[i]["tokens"] - want.last_hidden_state[0]
        ).abs().max() < 1e-4


def new_weights(model, tmp_path):
    import shutil
    from diffusers import AutoencoderKL

    shutil.copytree(model, tmp_path / "other")
    vae = AutoencoderKL.from_pretrained(model / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-3
    vae.save_pretrained(tmp_path / "other/vae")
    return tmp_path / "other"


@pytest.mark.parametrize(
    "name, over, words",
    [
        ("weights", "other", "weights: "),
        ("dtype", dict(dtype="bf16"), "dtype: 'fp32' -> 'bf16'"),
        ("resolution", dict(size=8), "size: 16 -> 8"),
        ("transform", dict(crop="none"), "crop: 'center' -> 'none'"),
        ("code", "code", "cache_code: 1 -> 2"),
        ("mirror", dict(mirror=False), "mirror: True -> False"),
        ("batches", dict(encode_batch=3), "encode_batch: 4 -> 3"),
    ],
)
def test_a_cache_of_other_settings_is_refused(world, whole, tmp_path, monkeypatch, name, over, words):
    "D3: each change is noticed, named, and costs nothing."
    before, model = content(whole), world[1]
    if over == "other":
        model, over = new_weights(world[1], tmp_path), {}
    if over == "code":
        monkeypatch.setattr(module.LatentJob, "code", 2)
        over = {}
    with pytest.raises(UserError, match=words) as e:
        cache("latents", world[0], whole, options(model, **over))
    assert "choose another OUT, or give --overwrite" in str(e.value) and content(whole) == before


def test_overwrite_makes_a_cache_of_other_settings_again_and_leaves_an_equal_one(world, whole, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "c")
    again = dict(mirror=False, dtype="fp16", shard_bytes=100_000)
    assert cache("latents", world[0], tmp_path / "c", options(world[1], **again, overwrite=True)) == 0
    assert cache("latents", world[0], tmp_path / "new", options(world[1], **again)) == 0
    first = content(tmp_path / "new")
    assert content(tmp_path / "c") == first  # nothing of the old one is left
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").iterdir()}
    assert cache("latents", world[0], tmp_path / "c", options(world[1], **again, overwrite=True)) == 0
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("*.safetensors")}
    assert kept == {k: v for k, v in times.items() if k in kept}


def test_a_moved_model_or_more_threads_are_the_same_cache(world, whole, tmp_path):
    import shutil

    shutil.copytree(world[1], tmp_path / "moved")
    before = content(whole)
    assert (
        cache("latents", world[0], whole, options(tmp_path / "moved", workers=1, shard_bytes=999)) == 0
        and content(whole) == before
    )


def test_a_changed_picture_is_computed_again_and_a_new_one_added(world, tmp_path):
    data, out = pictures(tmp_path / "data"), tmp_path / "c"
    assert cache("latents", data, out, options(world[1])) == 0
    old = Cache(out).__getitems__(range(24))
    Image.new("RGB", (16, 16), "red").save(data / "train/005.png")  # another size on disk
    (data / "train/007.png").unlink()
    Image.new("RGB", (16, 16), "blue").save(data / "train/new.png")
    table = data / "train/metadata.jsonl"
    rows = [json.loads(l) for l in table.read_text().splitlines() if "007" not in l] + [
        {"file_name": "new.png", "id": "new", "label": 1}
    ]
    table.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert cache("latents", data, out, options(world[1])) == 0
    now = Cache(out)
    assert set(now.ids) == {r["id"] for r in rows}
    same = [i for i in range(24) if i not in (5, 7)]
    assert torch.equal(
        now.__getitems__(now.numbers([f"train-{i:03}" for i in same]))["mean"], old["mean"][same]
    )
    assert not torch.equal(now.__getitems__(now.numbers(["train-005"]))["mean"][0], old["mean"][5])
    assert len(list(out.glob("train-*.safetensors"))) == 7


KILL = """
import os, random, sys, time
sys.path[:0] = {path!r}
import slow_cache, diffusers, transformers
from diffusers import AutoencoderKL
out, rng = {out!r}, random.Random(0)
def shards():
    names = os.listdir(out) if os.path.isdir(out) else []
    return len([n for n in names if n.endswith(".safetensors") and n[0] != "."])
def begin(where, slow):
    if pid := os.fork(): return pid
    os.environ["SLOW"] = slow
    os._exit(slow_cache.cli.main(["cache", "latents", {data!r}, where, *{words!r}]))
for kill in range(5):
    target = shards() + kill % 2 # in turn: before its first shard is done, and after one
    pid = begin(out, "0.1")
    while shards() < target and not os.waitpid(pid, os.WNOHANG)[0]: time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.08 if kill % 2 else 0.3))
    os.kill(pid, 9); os.waitpid(pid, 0)
    print("killed with", shards(), "shards", flush=True)
for where in (out, out + "-whole"): assert os.waitpid(begin(where, "0"), 0)[1] == 0
"""


def words_for(world):
    return (
        f"--model {world[1]} --device cpu --encode-batch 4 --dtype fp32 --size 16 --shard-bytes 5000".split()
    )


def test_killed_five_times_it_ends_with_the_same_bytes(world, tmp_path):
    "D8"
    code = KILL.format(
        path=[str(SLOW.parent), str(SLOW.parent.parent)],
        out=str(tmp_path / "c"),
        data=str(world[0]),
        words=words_for(world),
    )
    done = warm.run(["-c", code], first=warm.MODELS)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [int(l.split()[2]) for l in done.stdout.splitlines() if l.startswith("killed")]
    assert len(counts) == 5 and max(counts) < 8, counts  # each kill came before the end
    assert content(tmp_path / "c") == content(
        tmp_path / "c-whole"
    )  # both by processes of one kind: another number of threads changes last bits


def shards_of(folder):
    return {k: v for k, v in content(folder).items() if k.endswith(".safetensors")}


def notes(path):
    return [l for r in (0, 1) if (p := Path(f"{path}.{r}")).exists() for l in p.read_text().splitlines()]


def test_two_ranks_share_whole_shards_and_make_the_same_bytes(world, whole, tmp_path):
    ends = ranks.finish(
        ranks.start(
            [SLOW, "latents", world[0], tmp_path / "c", *words_for(world)],
            2,
            first=warm.MODELS,
            NOTES=str(tmp_path / "n"),
        )
    )
    assert [c for c, _, _ in ends] == [0, 0], ends
    assert content(tmp_path / "c") == content(whole)
    mine = [set(Path(f"{tmp_path}/n.{r}").read_text().split()) for r in (0, 1)]
    planned = [json.loads(p.read_text()) for p in sorted((tmp_path / "c").glob("*-0*.json"))]
    assert all(
        sum({r[0] for r in rows} <= m for m in mine) == 1 for rows in planned
    )  # but for the row that shows the columns, each shard has one rank
    assert mine[0] | mine[1] == {r[0] for rows in planned for r in rows}


@pytest.mark.parametrize("how", ["SIGTERM", "STOP", "deadline", "SIGUSR1 to one rank"])
def test_asked_to_stop_it_leaves_soon_and_goes_on_later(world, whole, tmp_path, how):
    "R7 and R8: between two batches, on both ranks, with the code of a requeue; what was whole is kept."
    out = tmp_path / "c"
    words = [SLOW, "latents", world[0], out, *words_for(world), "--requeue-code", "75"]
    procs = ranks.start(
        [*words, *(["--max-seconds", "0.8"] if how == "deadline" else [])],
        2,
        first=warm.MODELS,
        SLOW="0.4",
        NOTES=str(tmp_path / "n"),
    )
    end = time.monotonic() + warm.LIMIT
    working = lambda: (
        list(out.glob("*.safetensors")) and all(Path(f"{tmp_path}/n.{r}").exists() for r in (0, 1))
    )  # one rank may begin late
    while not working() if how != "deadline" else any(p.poll() is None for p in procs):
        assert time.monotonic() < end and (how == "deadline" or all(p.poll() is None for p in procs)), [
            p.communicate() for p in procs
        ]
        time.sleep(0.01)
    if how.startswith("SIG"):
        for p in procs[how.endswith("one rank") :]:
            p.send_signal(getattr(signal, how.split()[0]))
    if how == "STOP":
        (out / "STOP").touch()
    ends = ranks.finish(procs)
    assert [c for c, _, _ in ends] == ([0, 0] if how == "STOP" else [75, 75]), ends
    assert "shards are left; the same command goes on" in ends[0][1] and not (out / "STOP").exists()
    before = shards_of(out)
    planned = [f"{s['name']}.safetensors" for s in read_index(out)["shards"]]
    assert (
        before and not any(set(planned[rank::2]) <= before.keys() for rank in (0, 1)) or how == "deadline"
    )  # neither rank went on to its end
    assert len(notes(tmp_path / "n")) < 2 * 30 - 8  # rows with their mirrors; the rest was not encoded
    with pytest.raises(UserError, match="is not finished, .* run the same sdcourse cache command again"):
        Cache(out)
    assert cache("latents", world[0], out, options(world[1])) == 0
    assert content(out) == content(whole) and before.items() <= content(out).items()


def test_a_shard_is_left_between_two_batches(world, tmp_path):
    "What was computed of it is forgotten: a shard is whole or absent."
    cfg = options(world[1], encode_batch=1)
    job = JOBS["latents"](world[0], cfg, "cpu")
    (tmp_path / "c").mkdir()
    index, _ = prepare_plan(tmp_path / "c", job)
    shard, answers = index["shards"][0], iter([True, False])
    assert shard["rows"] > 2
    assert fill(tmp_path / "c", shard, job, batch=1, go_on=lambda n: next(answers)) is False
    assert not shards_of(tmp_path / "c") and next(answers, None) is None
    assert fill(tmp_path / "c", shard, job, batch=1, go_on=lambda n: True) and shards_of(tmp_path / "c")


def test_a_rank_that_is_refused_ends_all_with_its_words(world, whole, tmp_path):
    hook = """
import torch
real = cache.finite
def broken(e, b, names):
    if rank == 1: raise cache.UserError(f'{names[0]}: the latents are not finite')
    time.sleep(0.3)
    return real(e, b, names)
cache.finite = broken
"""
    ends = ranks.finish(
        ranks.start(
            [SLOW, "latents", world[0], tmp_path / "c", *words_for(world)], 2, first=warm.MODELS, HOOK=hook
        )
    )
    assert [c for c, _, _ in ends] == [2, 2] and all(
        "the latents are not finite (rank 1)" in e and "Traceback" not in e for _, _, e in ends
    ), ends
    assert len(list((tmp_path / "c").glob("*.safetensors"))) < 4  # the others did not go on to the end
    assert cache("latents", world[0], tmp_path / "c", options(world[1])) == 0 and content(
        tmp_path / "c"
    ) == content(whole)


def test_a_full_disk(world, whole, tmp_path):
    """On a real file system without room: one line, no half file, and the same command goes on when there is
    room again.
    """
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True
        ).returncode
    ):
        pytest.skip("only root may mount")
    try:
        with pytest.raises(UserError, match="space.*the same command goes on") as e:
            cache("latents", world[0], place / "c", options(world[1]))
        there = [p.name for p in (place / "c").iterdir()]
        assert (
            "\n" not in str(e.value)
            and not [n for n in there if n.endswith(".tmp")]
            and 0 < sum(n.endswith(".safetensors") for n in there) < 8
        )
        subprocess.run(["mount", "-o", "remount,size=1m", place], check=True)
        assert cache("latents", world[0], place / "c", options(world[1])) == 0 and content(
            place / "c"
        ) == content(whole)
    finally:
        subprocess.run(["umount", "-l", place])


def test_features_of_a_layer_and_some_of_the_encoders(world, tmp_path):
    from transformers import AutoImageProcessor, Dinov2Model

    assert (
        cache(
            "features", world[0], tmp_path / "f", options(world[2], FeatureOptions, what="tokens", layer="-2")
        )
        == 0
    )
    net, steps = (
        Dinov2Model.from_pretrained(world[2]).eval().requires_grad_(False),
        AutoImageProcessor.from_pretrained(world[2], backend="pil"),
    )
    want = net(
        **steps(images=[Image.open(world[0] / "val/000.png").convert("RGB")], return_tensors="pt"),
        output_hidden_states=True,
    ).hidden_states[-2][0]
    assert (Cache(tmp_path / "f", "val")[0]["tokens"] - want).abs().max() < 1e-4
    sd3 = tiny_models.tiny_sd3(tmp_path / "sd3")
    assert (
        cache("prompts", world[0], tmp_path / "p", options(sd3, PromptOptions, only=("text_encoder_2",))) == 0
    )
    assert set(Cache(tmp_path / "p", "").columns) == {
        "text_encoder_2.hidden",
        "text_encoder_2.pooled",
        "text_encoder_2.mask",
    }


def test_what_was_cut_or_computed_again_is_said(world, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("cat " * 100 + "\n")
    assert (
        cache(
            "prompts",
            world[0],
            tmp_path / "p",
            options(world[1], PromptOptions, more=str(tmp_path / "more.txt")),
        )
        == 0
    )
    assert "1 captions were too long for text_encoder and are cut" in capsys.readouterr().out


def test_not_finite_names_the_picture(world, tmp_path, capsys):
    """D7: weights that overflow float16 are computed again in float32; those that overflow float32 too are an
    error that names the picture.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(world[1] / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(8e4)
    vae.save_pretrained(tmp_path / "hot")
    work = module.LatentJob(world[0], options(tmp_path / "hot", precision="fp16"), "cpu")
    pixels = torch.stack([work.read("train", ["train-000", work.data.splits["train"].digest(0)])])
    assert not work.encoder.encode(pixels)["mean"].isfinite().all()
    assert cache("latents", world[0], tmp_path / "hot16", options(tmp_path / "hot", precision="fp16")) == 0
    assert (
        "62 results overflowed fp16 and were computed again in fp32" in capsys.readouterr().out
    )  # 30 pictures, 30 mirrors, and one pair to see the columns
    assert cache("latents", world[0], tmp_path / "hot32", options(tmp_path / "hot")) == 0
    a, b = (Cache(tmp_path / n).__getitems__(range(24))["mean"] for n in ("hot16", "hot32"))
    assert (a - b).abs().max() < 0.02  # the weights were rounded to float16 in one of them
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e33)
    vae.save_pretrained(tmp_path / "fire")
    with pytest.raises(UserError, match="train-000.*not finite"):
        cache("latents", world[0], tmp_path / "c", options(tmp_path / "fire"))
    assert not list((tmp_path / "c").glob("*.safetensors"))


def test_wrong_input_is_refused_in_one_line_before_anything_is_written(world, whole, tmp_path):
    def refused(words, kind="latents", data=world[0], out=tmp_path / "c", **over):
        with pytest.raises(UserError, match=words) as e:
            cache(
                kind,
                data,
                out,
                options(
                    over.pop("model", world[1]),
                    {"latents": LatentOptions, "prompts": PromptOptions, "features": FeatureOptions}[kind],
                    **over,
                ),
            )
        assert "\n" not in str(e.value) and not list(tmp_path.glob("c/*"))

    refused("--model is missing", model="")
    refused("--crop random: a cache would hold one crop", crop="random")
    refused("--encode-batch 0", encode_batch=0)
    refused("--layer second", kind="features", model=world[2], layer="second")
    refused("no such folder", model=tmp_path / "nothing")
    refused("no such folder", data=tmp_path / "nothing")
    refused("no multiple of 4", size=18)
    refused("has no column blurb", kind="prompts", caption_column="blurb")
    refused("cannot be read", kind="prompts", more=str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="is a cache of latents"):
        cache("prompts", world[0], whole, options(world[1], PromptOptions))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/mine.txt").write_text("x")
    refused("is not empty and no cache", out=tmp_path / "x")
    with pytest.raises(UserError, match="unknown kind 'latent': did you mean 'latents'"):
        cli.run(["cache", "latent", "a", "b"])


def test_a_picture_that_changes_meanwhile_is_noticed(world, tmp_path):
    data = pictures(tmp_path / "data")
    work = module.LatentJob(data, options(world[1]), "cpu")
    index, _ = module.prepare_plan((tmp_path / "c").mkdir() or tmp_path / "c", work)
    later = module.LatentJob(data, options(world[1]), "cpu")
    later.data.splits["train"].digest = lambda i: "other"
    with pytest.raises(UserError, match="picture train-000 changed while it was cached"):
        module.fill(tmp_path / "c", index["shards"][0], later, batch=4, go_on=lambda n: True)


@pytest.mark.parametrize("bare", [range(1, 24, 2), range(8), range(12, 24)])
def test_a_row_without_label_is_refused_before_anything_is_encoded(world, tmp_path, bare):
    home = pictures(tmp_path / "data")
    table = home / "train/metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().split("\n") if line]
    for i in bare:
        del rows[i]["label"]
    table.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(
        UserError, match=rf"train train-{bare[0]:03} has no label, .*\({len(bare)} have none\)"
    ):
        cache("latents", home, tmp_path / "out", options(world[1]))
    assert not (tmp_path / "out/index.json").exists()
    assert cache("latents", home, tmp_path / "out", options(world[1], splits=("validation",))) == 0
    shards = json.loads((tmp_path / "out/index.json").read_text())["shards"]
    assert {s["split"] for s in shards} == {"val"}


def test_a_hub_set_whose_test_has_no_labels_is_cached_without_it(world, tmp_path, monkeypatch):
    "Case 32: the test labels of ImageNet on the hub are -1; the refusal names the option that helps."
    datasets = pytest.importorskip("datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", kind), ("label", pa.int64())], about)
    files = sorted((world[0] / "train").glob("*.png"))
    (tmp_path / "set").mkdir()
    for k, split in enumerate(("train", "validation", "test")):
        cells = [{"bytes": p.read_bytes(), "path": None} for p in files[4 * k : 4 * k + 4]]
        rows = [{"image": c, "label": -1 if split == "test" else i % 2} for i, c in enumerate(cells)]
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "set" / f"{split}-0.parquet")
    with pytest.raises(UserError, match=r"leave its split out \(--splits train,val\)"):
        cache("latents", tmp_path / "set", tmp_path / "out", options(world[1]))
    words = ["--model", str(world[1]), "--size", "16", "--device", "cpu", "--splits", "train,validation"]
    assert cli.main(["cache", "latents", str(tmp_path / "set"), str(tmp_path / "out"), *words]) == 0
    for split in ("train", "val"):
        found = Cache(tmp_path / "out", split)
        assert len(found) == 4 and [found[i]["label"] for i in range(4)] == [0, 1, 0, 1]


def test_prompts_of_a_file_are_its_lines(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\r\ntwo \u2028 parts\x0c of one\n\n", encoding="utf-8")
    assert module._lines(tmp_path / "p.txt") == ["a cat", "two \u2028 parts\x0c of one"]
    with pytest.raises(UserError, match="--more /dev/zero: cannot be read"):
        module._lines("/dev/zero")


# ---- faults.md A 6 and 7: a picture that goes, or is another one, while a cache is made and afterwards
def replaced(place, kind):
    "A folder of bitmaps or a tar of stored PNGs; a function that puts another picture of the same length."
    from test_scan import sample_tar

    def bytes_of(seed):
        im = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))
        out = io.BytesIO()
        im.save(out, "BMP") if kind == "folder" else im.save(out, "PNG", compress_level=0)
        return out.getvalue()

    def lay(first):
        datas = [bytes_of(seed) for seed in (first, 1, 2)]
        if kind == "tar":
            sample_tar(place / "train-0.tar", datas)
        else:
            for i, data in enumerate(datas):
                (place / f"{i}.bmp").write_bytes(data)

    place.mkdir()
    lay(0)
    if kind == "tar":
        assert cli.run(["shards", str(place), str(place)]) == 0
    return lay


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_replaced_picture_of_the_same_length_is_computed_again(world, tmp_path, kind):
    lay = replaced(tmp_path / "d", kind)
    sizes = {p: p.stat().st_size for p in (tmp_path / "d").iterdir()}
    assert cache("latents", tmp_path / "d", tmp_path / "z", options(world[1])) == 0
    old = Cache(tmp_path / "z")
    old = dict(zip(old.ids.tolist(), old.__getitems__(range(3))["mean"]))
    lay(7)
    assert sizes == {p: p.stat().st_size for p in sizes}
    assert cache("latents", tmp_path / "d", tmp_path / "z", options(world[1])) == 0
    now = Cache(tmp_path / "z")
    now = dict(zip(now.ids.tolist(), now.__getitems__(range(3))["mean"]))
    assert [torch.equal(now[k], old[k]) for k in sorted(old)] == [False, True, True]


def test_what_a_scan_leaves_out_is_no_dead_end(world, tmp_path, capsys):
    "Case 6: the commands that the messages name, in turn; the plan that was made before is mended."
    from test_scan import sample_tar

    home, out = tmp_path / "d", tmp_path / "z"
    replaced(home, "tar")
    datas = [p.read_bytes() for p in sorted((world[0] / "train").glob("*.png"))[:12]]
    sample_tar(home / "train-0.tar", [*datas[:5], datas[5][:200], *datas[6:]])
    assert cli.run(["shards", str(home), str(home)]) == 0
    with pytest.raises(UserError, match="train-0/5 .*sdcourse scan .* lists such pictures"):
        cache("latents", home, out, options(world[1]))
    assert cli.run(["scan", str(home), "--limit", "0.2"]) == 0
    assert cache("latents", home, out, options(world[1])) == 0
    assert sorted(Cache(out).ids) == sorted(f"train-0/{i}" for i in range(12) if i != 5)


def test_a_split_that_is_left_out_is_not_waited_for(world, tmp_path):
    assert cache("latents", world[0], tmp_path / "z", options(world[1])) == 0
    for name in ("val-00000", "train-00001"):
        (tmp_path / f"z/{name}.safetensors").unlink()
    assert cache("latents", world[0], tmp_path / "z", options(world[1], splits=("train",))) == 0
    assert len(Cache(tmp_path / "z").ids) == 24
    assert cache("latents", world[0], tmp_path / "z", options(world[1])) == 0
    assert len(Cache(tmp_path / "z", "val").ids) == 6

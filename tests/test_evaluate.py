"""The command that measures: pairs by id, intervals by group, floors from other pictures, the same numbers on
any batch and ranks, and one line for what cannot be measured.
"""

import json
import os
import shutil
import signal
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
from sdcourse.core import UserError, read_json
from sdcourse.data.sets.digits import digits
from sdcourse.evaluation.distances import kid, prdc
from sdcourse.evaluation.metrics import (
    METRICS,
    Case,
    _cut_note,
    clip_cosines,
    extractor_of,
    features_over,
    measure,
    measure_digits,
    open_set,
    pixels_of,
)
from sdcourse.evaluation.pairwise import psnr_of_equal
from sdcourse.evaluation.report import EvaluateOptions, blocks_of, evaluate, option_of
from sdcourse.evaluation.stats import frechet, load_stats

N = 60


def write(folder, noise=0.0, ids=None, size=8, order=None, extra=lambda i: {}, picture=lambda i: i):
    "Held-out digits with noise under the ids of the truth, in any order of rows."
    data, place = open_set("digits", "test"), folder / "test"
    place.mkdir(parents=True)
    rows = []
    for i in order if order is not None else range(N):
        x = (
            np.asarray(data.image(picture(i)).convert("L"), float)
            + np.random.default_rng(i).normal(0, 1, (8, 8)) * noise
        )
        k = data.ids[i] if ids is None else ids(i)
        Image.fromarray(x.clip(0, 255).astype(np.uint8)).resize((size, size), 0).save(place / f"{k}.png")
        rows.append(dict(file_name=f"{k}.png", id=k, label=data.row(picture(i))["label"]) | extra(i))
    (place / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("w")
    write(root / "a", 60)
    write(root / "b", 30, order=reversed(range(N)))
    write(root / "truth")
    return root


def options(tmp, **over):
    return EvaluateOptions(
        **dict(
            out=str(tmp / "r"),
            reference="digits",
            train="digits",
            extractor="tiny-digits",
            draws=20,
            pictures=2,
            device="cpu",
            threads=1,
        )
        | over
    )


def by_name(ns):
    return {n.name: n for n in ns}


@pytest.fixture(scope="module")
def report(world, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("rep")
    return evaluate([str(world / "a"), str(world / "b")], options(tmp)), tmp / "r"


# ---- numbers


def test_every_number_is_what_its_function_says_of_the_same_pictures(world, report):
    found, net = by_name(report[0]["a"]), extractor_of("tiny-digits")
    a, b = (
        net(pixels_of(open_set(world / "a"), list(range(N)))),
        net(pixels_of(open_set("digits", "test"), list(range(360)))),
    )
    assert found["FD[tiny-digits]"].value == pytest.approx(frechet(a, b), rel=1e-6) and found[
        "KID[tiny-digits]"
    ].value == pytest.approx(kid(a, b)["value"], rel=1e-5)
    same = b[torch.randperm(360, generator=torch.Generator().manual_seed(0))[:N].sort().values]
    want = prdc(a, same)
    assert all(
        found[f"{k}[tiny-digits]"].value == pytest.approx(want[k])
        for k in ("precision", "recall", "density", "coverage")
    )
    assert (
        "of 60 and 360 pictures" in found["recall[tiny-digits]"].note and found["digit[tiny-digits]"].n == N
    )


def test_every_number_says_how_it_was_made(report):
    "E6: N, reference, extractor and its hash, resize, dtype, seed."
    for n in (n for ns in report[0].values() for n in ns):
        assert (
            n.n == N
            and {"extractor", "weights", "resize", "dtype", "reference"} <= n.how.keys()
            and len(n.how["reference"]) == 16
        )
        if (
            n.low is not None
            and n.name not in ("digit[tiny-digits]",)
            and not n.name.split("[")[0] in ("precision", "recall", "coverage")
        ):
            assert n.how["seed"] == 0 or "variety" in n.name
    names = set(by_name(report[0]["a"]))
    assert {"FD[tiny-digits]", "LPIPS[tiny]", "PSNR"} <= names and not {"FID", "LPIPS"} & names


def test_the_floor_comes_from_other_real_pictures_at_the_same_n(world, report):
    found, net = by_name(report[0]["a"])["FD[tiny-digits]"], extractor_of("tiny-digits")
    b, t = (features_over(net, open_set("digits", s)) for s in ("test", "train"))
    g = torch.Generator().manual_seed(0)
    want = [frechet(t[torch.randperm(len(t), generator=g)[:N]], b) for _ in range(5)]
    assert found.floor == pytest.approx(np.mean(want), rel=1e-6) and found.floor_high == pytest.approx(
        max(want), rel=1e-6
    )


def test_pictures_are_paired_by_id_and_not_by_place(world, report):
    "The rows of b are in the opposite order."
    said = {n["name"]: n for n in read_json(report[1] / "evaluation.json")["differences"]}
    truth, a, b = (
        pixels_of(d, list(range(N))).double() / 255
        for d in (open_set(world / "truth"), open_set(world / "a"), open_set(world / "b"))
    )
    psnr = lambda x, y: -10 * (x - y).square().mean((1, 2, 3)).log10()
    want = (psnr(b.flip(0), truth) - psnr(a, truth)).mean().item()
    assert (
        said["PSNR: b - a"]["value"] == pytest.approx(want, rel=1e-9)
        and said["PSNR: b - a"]["low"] > 0
        and said["FD[tiny-digits]: b - a"]["value"] < 0
    )
    each = {n.name: n for n in report[0]["b"]}
    assert each["PSNR"].value == pytest.approx(psnr(b.flip(0), truth).mean().item(), rel=1e-9)
    width = said["PSNR: b - a"]["high"] - said["PSNR: b - a"]["low"]
    apart = sum((n.high - n.low) ** 2 for n in (each["PSNR"], by_name(report[0]["a"])["PSNR"])) ** 0.5
    assert width < apart  # paired


def test_groups_widen_the_interval(tmp_path):
    "Six pictures of each of ten prompts: the interval is that of ten."
    write(
        tmp_path / "g",
        10,
        picture=lambda i: i // 6 * 6,
        ids=lambda i: f"{open_set('digits', 'test').ids[i // 6 * 6]}-{i % 6}",
        extra=lambda i: dict(of=open_set("digits", "test").ids[i // 6 * 6]),
    )
    data = open_set(tmp_path / "g")
    assert len(set(blocks_of(data, open_set("digits", "test")))) == 10
    one, whole = (
        by_name(
            evaluate(
                [str(tmp_path / "g")],
                options(tmp_path, out=str(tmp_path / f"r{k}"), metrics=("pairs", "variety"), block_column=c),
            )["g"]
        )
        for k, c in enumerate(("id", "of"))
    )
    assert one["LPIPS[tiny]"].value == whole["LPIPS[tiny]"].value and whole["LPIPS[tiny]"].high - whole[
        "LPIPS[tiny]"
    ].low > 1.3 * (one["LPIPS[tiny]"].high - one["LPIPS[tiny]"].low)
    assert whole["variety, LPIPS[tiny]"].n == 60 and "10 prompts" in whole["variety, LPIPS[tiny]"].note


def test_any_batch_and_number_of_ranks_give_the_same_numbers(world, report, tmp_path):
    sets = "--reference digits --train digits --extractor tiny-digits"
    how = "--draws 20 --pictures 2 --device cpu --threads 1"
    words = ["evaluate", str(world / "a"), str(world / "b"), *sets.split(), *how.split()]
    ends = ranks.finish(
        ranks.start(["-m", "sdcourse.cli", *words, "--out", str(tmp_path / "two")], 2, first=warm.MODELS)
    )
    assert [c for c, _, _ in ends] == [0, 0], ends
    evaluate([str(world / "a"), str(world / "b")], options(tmp_path, out=str(tmp_path / "seven"), batch=7))
    want = read_json(report[1] / "evaluation.json")["numbers"]
    for other in ("two", "seven"):
        for m, ns in read_json(tmp_path / other / "evaluation.json")["numbers"].items():
            for n, w in zip(ns, want[m]):
                assert n["name"] == w["name"] and n["value"] == pytest.approx(
                    w["value"], rel=1e-3, abs=1e-5
                ), (other, n, w)


def test_memorisation_sees_copies(tmp_path):
    train = open_set("digits", "train")
    place = tmp_path / "c/test"
    place.mkdir(parents=True)
    for i in range(N):
        train.image(i).convert("L").save(place / f"{i}.png")
    found = by_name(evaluate([str(tmp_path / "c")], options(tmp_path, metrics=("memorisation",)))["c"])
    assert found["closer to training[tiny-digits]"].value == 1 and found["copies[tiny-digits]"].value == 1


# ---- clip


def test_clip_score_is_transformers_cosine(tmp_path):
    from transformers import CLIPModel
    from transformers import AutoTokenizer

    tiny_models.clip_tokenizer(tmp_path / "clip", length=8)
    folder = tiny_models.tiny_clip(
        tmp_path / "clip", words=len(AutoTokenizer.from_pretrained(tmp_path / "clip"))
    )
    words = ["a red cat", "a dog", "a dog"]
    images = [
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (40, 32, 3), dtype=np.uint8))
        for k in range(3)
    ]
    got = clip_cosines(folder, images, words, batch=2)
    longer = ["a red cat with glasses and a hat on the lake", "a red cat with glasses and a hat on the tree"]
    beyond = clip_cosines(folder, images[:1] * 2, longer)
    assert beyond[0] == beyond[1]  # what CLIP does not read changes nothing, and is said
    assert _cut_note(folder, [*longer, *words]).startswith("2 of 5 captions are longer than CLIP's 8")
    assert _cut_note(folder, words) == ""
    from transformers import AutoImageProcessor

    model, tok, look = (
        CLIPModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    for k in range(3):
        with torch.no_grad():
            out = model(
                **tok([words[k]], padding="max_length", max_length=8, truncation=True, return_tensors="pt"),
                **look(images=images[k], return_tensors="pt"),
            )
        x, y = out.image_embeds[0].double(), out.text_embeds[0].double()
        assert got[k].item() == pytest.approx((x @ y / x.norm() / y.norm()).item(), abs=1e-5)
    assert abs(got[0] - clip_cosines(folder, images[:1], ["a dog"])[0]) > 1e-3  # words count
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such folder"):
        clip_cosines(folder, images, words)


# ---- files


def test_the_report_can_be_read(report, world):
    folder = report[1]
    said, text = read_json(folder / "evaluation.json"), (folder / "README.md").read_text()
    assert {p.name for p in folder.iterdir()} == {
        "evaluation.json",
        "README.md",
        "intervals.png",
        "pictures.png",
        "pictures.csv",
    }
    assert (
        "| FD[tiny-digits] |" in text
        and "real pictures" in text
        and "## Left out" in text
        and said["about"]["reference_id"] in text
    )
    assert (
        len((folder / "pictures.csv").read_text().splitlines()) == N + 1
        and Image.open(folder / "pictures.png").width > 3 * 64
    )
    assert len(said["numbers"]["a"]) == len(report[0]["a"]) and str(world) in said["about"]["sources"]["a"]


def test_statistics_are_read_and_written(world, tmp_path):
    evaluate([str(world / "a")], options(tmp_path, save_stats=str(tmp_path / "s.npz")))
    stored = load_stats(tmp_path / "s.npz")
    assert stored.n == 360 and stored.how["extractor"] == "tiny-digits"
    again = evaluate(
        [str(world / "a")],
        options(tmp_path, out=str(tmp_path / "r2"), reference=str(tmp_path / "s.npz"), train=""),
    )
    whole = read_json(tmp_path / "r/evaluation.json")["numbers"]["a"][0]
    assert [n.name for n in again["a"]] == ["FD[tiny-digits]", "digit[tiny-digits]"] and again["a"][
        0
    ].value == pytest.approx(whole["value"], rel=1e-6)
    with pytest.raises(UserError, match="another extractor"):
        evaluate(
            [str(world / "a")],
            options(
                tmp_path,
                out=str(tmp_path / "r3"),
                reference=str(tmp_path / "s.npz"),
                train="",
                extractor="tiny-scenes",
                metrics=("fd",),
            ),
        )


def test_a_curve_over_an_option(world, tmp_path):
    for k, (name, w, step) in enumerate((("a", 3.0, 500), ("b", 1.0, 1000))):
        shutil.copytree(world / name, tmp_path / name)
        (tmp_path / name / "generate.json").write_text(
            json.dumps(dict(source=f"runs/x/checkpoints/step-{step:08d}", made_by=dict(guidance_scale=w)))
        )
    assert option_of(tmp_path / "a", "guidance_scale") == 3 and option_of(tmp_path / "b", "step") == 1000
    evaluate(
        [str(tmp_path / n) for n in "ab"], options(tmp_path, curve="guidance_scale", metrics=("fd", "kid"))
    )
    text = (tmp_path / "r/README.md").read_text()
    assert (
        "## Over guidance_scale" in text
        and (tmp_path / "r/curve-fd-tiny-digits.png").is_file()
        and (tmp_path / "r/curve-kid-tiny-digits.png").is_file()
    )
    with pytest.raises(UserError, match="is no option of sdcourse generate, nor of the run"):
        option_of(tmp_path / "a", "mood")
    with pytest.raises(UserError, match="no generate.json"):
        option_of(world / "a", "step")


def test_a_table_over_two_options(world, tmp_path):
    "One option of the drawing, one of the training behind it."
    for mean in (-0.5, 0.5):
        (tmp_path / f"run{mean}/export").mkdir(parents=True)
        (tmp_path / f"run{mean}/config.yaml").write_text(f"config: {{density_mean: {mean}}}\n")
        for k, w in (("a", 1.0), ("b", 3.0)):
            shutil.copytree(world / k, tmp_path / f"{k}{mean}")
            (tmp_path / f"{k}{mean}/generate.json").write_text(
                json.dumps(dict(source=str(tmp_path / f"run{mean}/export"), made_by=dict(guidance_scale=w)))
            )
    models = [str(tmp_path / f"{k}{mean}") for k in "ab" for mean in (-0.5, 0.5)]
    found = evaluate(models, options(tmp_path, table=("density_mean", "guidance_scale"), metrics=("fd",)))
    lines = (
        (tmp_path / "r/README.md").read_text().split("## By density_mean and guidance_scale")[1].splitlines()
    )
    head, rows = (
        [l for l in lines if l.startswith("| FD")][0],
        [l for l in lines if l.startswith("| density_mean")],
    )
    assert head == "| FD[tiny-digits] | guidance_scale 1.0 | guidance_scale 3.0 |" and [
        r.split("|")[1].strip() for r in rows
    ] == ["density_mean -0.5", "density_mean 0.5"]
    assert [r.split("|")[2].split()[0] for r in rows] == [f"{found['a-0.5'][0].value:.3g}"] * 2 and rows[
        0
    ].split("|")[3].split()[0] == f"{found['b-0.5'][0].value:.3g}"
    with pytest.raises(UserError, match="have the same values"):
        evaluate(
            models,
            options(
                tmp_path, out=str(tmp_path / "r2"), table=("density_mean", "density_mean"), metrics=("fd",)
            ),
        )
    assert not (tmp_path / "r2").exists()
    with pytest.raises(UserError, match="give two options"):
        options(tmp_path, out=str(tmp_path / "r3"), table=("x",)).check()
    with pytest.raises(UserError, match="mood: is no option of sdcourse generate, nor of the run"):
        option_of(models[0], "mood")


def test_digits_drawn_in_this_process_get_the_numbers_of_the_command(world, report):
    "But for the floors of the distances, which are drawn with the classes that were asked for."
    data, before = open_set(world / "a"), torch.get_rng_state()
    images = pixels_of(data, list(range(N)))[:, :1].float() / 127.5 - 1
    asked = torch.tensor([data.row(i)["label"] for i in range(N)])
    found = measure_digits(images, asked)
    own = found.pop("digit[tiny-digits], real digits")
    assert torch.equal(before, torch.get_rng_state())
    assert own.n == 360 and 0.98 <= own.value < 1 and own.low < own.value < own.high
    want = {k: n for k, n in by_name(report[0]["a"]).items() if k in found}
    assert len(want) == len(found) == 9  # the share, two distances, four shares, two of memorisation
    for k, n in found.items():
        assert n.value == pytest.approx(want[k].value, rel=1e-4, abs=1e-5), k
        if k[:2] not in ("FD", "KI"):
            assert n.floor == want[k].floor, k
    net, g, label = (
        extractor_of("tiny-digits"),
        torch.Generator().manual_seed(0),
        digits("train").tensors["label"],
    )
    b, t = (features_over(net, open_set("digits", s)) for s in ("test", "train"))
    floors = []
    for order in [torch.randperm(len(t), generator=g) for _ in range(5)]:
        rows = [r for k in range(10) for r in order[label[order] == k][: (asked == k).sum()].tolist()]
        floors.append(frechet(t[rows], b))
    assert (found["FD[tiny-digits]"].floor, found["FD[tiny-digits]"].floor_high) == pytest.approx(
        (np.mean(floors), max(floors)), rel=1e-4
    )


def test_there_is_no_floor_where_a_class_has_fewer_real_pictures_than_drawn_ones():
    real = digits("test").tensors
    sevens = (real["label"] == 7).nonzero().flatten().repeat(6)[:200]  # 144 are trained on
    found = measure_digits(real["pixels"][sevens], real["label"][sevens], ("fd", "kid"))
    assert found["FD[tiny-digits]"].floor is None and found["KID[tiny-digits]"].floor is None


def test_numbers_of_digits_need_what_was_asked_and_six_of_them():
    real = digits("test").tensors
    assert measure_digits(real["pixels"], (real["label"] + 1) % 10, ())["digit[tiny-digits]"].value < 0.02
    refused("give one per image", lambda: measure_digits(real["pixels"][:9], real["label"][:8]))
    refused("prdc: 5 images are too few", lambda: measure_digits(real["pixels"][:5], real["label"][:5]))
    refused(r"images of shape \(9, 8, 8\)", lambda: measure_digits(real["pixels"][:9, 0], real["label"][:9]))


# ---- what cannot be measured


def refused(text, fn):
    with pytest.raises(UserError, match=text) as e:
        fn()
    assert "\n" not in str(e.value), str(e.value)


def test_a_fid_of_few_pictures_is_refused_or_says_so(world, tmp_path, monkeypatch):
    net = extractor_of("tiny-digits")
    net.name = "inception"  # as far as names go
    data = open_set(world / "a")
    a, b = features_over(net, data), features_over(net, open_set("digits", "test"))
    case = lambda **k: Case(data, open_set("digits", "test"), net, a, b, how=dict(net.how), draws=5, **k)
    refused("fd: FID of 60 images says nothing", lambda: measure(case(), ["fd"]))
    (n,), _ = measure(case(force=True), ["fd"])
    assert n.name == "FID" and "biased: N=60" in n.note
    assert "fd" in measure(case())[1]  # left out, with the reason


def test_wrong_input_is_one_line_and_leaves_nothing(world, tmp_path):
    run = lambda *models, **over: evaluate([str(m) for m in models], options(tmp_path, **over))
    a = world / "a"
    (tmp_path / "empty/test").mkdir(parents=True)
    refused("empty", lambda: run(tmp_path / "empty"))
    (tmp_path / "one/test").mkdir(parents=True)
    shutil.copy(next((a / "test").glob("*.png")), tmp_path / "one/test/x.png")
    refused("holds 1 picture", lambda: run(tmp_path / "one"))
    shutil.copytree(a, tmp_path / "mixed")
    victim = sorted((tmp_path / "mixed/test").glob("*.png"))[3]
    Image.new("RGB", (9, 8)).save(victim)
    refused("is 9 x 8 pixels and others are 8 x 8", lambda: run(tmp_path / "mixed"))
    victim.write_bytes(victim.read_bytes()[:30])
    refused(victim.name, lambda: run(tmp_path / "mixed"))
    victim.write_text("no picture")
    refused(victim.name, lambda: run(tmp_path / "mixed"))
    write(tmp_path / "half", 10, order=range(N - 1))
    refused("do not pair: 1 ids are in one of them only", lambda: run(a, tmp_path / "half"))
    write(tmp_path / "other", 10, ids=lambda i: f"x{i}")
    refused(
        "pairs: 60 of 60 pictures have no truth with their id, e.g. x0",
        lambda: run(tmp_path / "other", metrics=("pairs",)),
    )
    write(tmp_path / "big", size=16)
    refused(
        "pairs: pictures are 16 x 16 and the reference 8 x 8",
        lambda: run(tmp_path / "big", metrics=("pairs",)),
    )
    refused("did you mean 'tiny-digits'", lambda: run(a, extractor="tiny-digit"))
    refused("--metrics fdd: ", lambda: run(a, metrics=("fdd",)))
    refused("clip-score: CLIP score needs --extractor clip:FOLDER", lambda: run(a, metrics=("clip-score",)))
    refused("memorisation needs --train", lambda: run(a, metrics=("memorisation",), train=""))
    refused("--block-column mood", lambda: run(a, block_column="mood"))
    refused("is given twice", lambda: run(a, a))
    refused("--reference is missing", lambda: run(a, reference=""))
    refused(r"nowhere.pth: no such file", lambda: run(a, extractor="inception:nowhere.pth"))
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()
    (tmp_path / "r/thesis.tex").write_text("x")
    refused("is not empty", lambda: run(a))


# ---- nothing is lost, nothing waits


def strict(path):
    "JSON as others read it: without NaN and infinity."
    return json.loads(path.read_text(), parse_constant=lambda x: pytest.fail(f"{path}: {x}"))


def test_a_picture_that_equals_its_truth_is_finite_and_said(world, tmp_path):
    "Case 5: all of them, and one of them."
    same = by_name(evaluate([str(world / "truth")], options(tmp_path, metrics=("pairs",)))["truth"])
    most = psnr_of_equal((3, 8, 8))
    row = strict(tmp_path / "r/evaluation.json")["numbers"]["truth"][1]
    assert row["value"] == same["PSNR"].value == pytest.approx(most) and same["LPIPS[tiny]"].value == 0
    assert row["note"] == f"60 of 60 equal the truth and count as {most:.1f} dB"
    shutil.copytree(world / "a", tmp_path / "one")
    k = open_set("digits", "test").ids[7]
    shutil.copy(world / f"truth/test/{k}.png", tmp_path / f"one/test/{k}.png")
    models = [str(world / "a"), str(tmp_path / "one")]
    found = evaluate(models, options(tmp_path, out=str(tmp_path / "r2"), metrics=("pairs",)))
    one, rest = (by_name(found[m])["PSNR"] for m in ("one", "a"))
    assert one.note.startswith("1 of 60 equal") and not rest.note
    assert rest.value + (most - 40) / 60 < one.value < rest.value + most / 60
    assert all(np.isfinite(n["value"]) for n in strict(tmp_path / "r2/evaluation.json")["differences"])


@pytest.fixture
def no_work(monkeypatch):
    "Whatever begins to compute fails."
    from sdcourse.evaluation import report

    monkeypatch.setattr(report, "features_over", lambda *_, **__: pytest.fail("work began"))


def test_everything_is_checked_before_work_begins(world, tmp_path, no_work):
    "Cases 43, 44, 45: nothing is computed, and nothing is left."
    run = lambda **over: evaluate([str(world / "a")], options(tmp_path, **over))
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    np.savez(tmp_path / "s1.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "s2.npz", mu=np.zeros(64), sigma=np.eye(64))
    write(tmp_path / "big", size=16)
    before = sorted(tmp_path.iterdir())
    other = dict(reference=str(tmp_path / "big"), train="", metrics=("pairs",))
    refused("pairs: pictures are 8 x 8 and the reference 16 x 16", lambda: run(**other))
    stored = dict(reference=str(tmp_path / "s1.npz"), train="")
    refused("holds 2,048 numbers a picture, .* gives 64; give --extractor inception", lambda: run(**stored))
    stored = dict(reference=str(tmp_path / "s2.npz"), train="", save_stats=str(tmp_path / "s3.npz"))
    refused("--save-stats: the reference is statistics already", lambda: run(**stored))
    refused("s.npy: statistics end in .npz", lambda: run(save_stats=str(tmp_path / "s.npy")))
    refused("there is no folder .*nodir", lambda: run(save_stats=str(tmp_path / "nodir/s.npz")))
    refused("folder.npz: is a folder", lambda: run(save_stats=str(tmp_path / "folder.npz")))
    refused("--out .*file: .*file is a file", lambda: run(out=str(tmp_path / "file")))
    refused("--out .*file/x: .*file is a file", lambda: run(out=str(tmp_path / "file/x")))
    refused("memorisation needs --train", lambda: run(metrics=("fd", "memorisation"), train=""))
    refused("kid: KID needs the pictures", lambda: run(reference=str(tmp_path / "s2.npz"), metrics=("kid",)))
    refused("trunk 'alexa': give alex", lambda: run(lpips="alexa"))
    assert sorted(tmp_path.iterdir()) == before


def test_where_nothing_can_be_measured_nothing_begins(world, tmp_path, no_work, monkeypatch):
    from sdcourse.evaluation import metrics

    wants = {k: lambda c: c.need("not here", None) for k in METRICS}
    monkeypatch.setattr(metrics, "NEEDS", wants)
    refused("nothing can be measured; fd: not here", lambda: evaluate([str(world / "a")], options(tmp_path)))


@pytest.mark.parametrize("broken", ["plot", "table_of_pictures"])
def test_a_figure_that_fails_costs_no_number(world, tmp_path, monkeypatch, capsys, broken):
    from sdcourse.evaluation import report

    def fail(*_):
        raise ValueError("Number of rows must be a positive integer")

    monkeypatch.setattr(report, broken, fail)
    evaluate([str(world / "a")], options(tmp_path))
    assert len(strict(tmp_path / "r/evaluation.json")["numbers"]["a"]) > 5
    text = (tmp_path / "r/README.md").read_text()
    assert "FD[tiny-digits]" in text and "could not be made." in text
    assert "could not be made (ValueError: Number of rows" in capsys.readouterr().out


def test_numbers_are_printed_where_the_disk_is_full(world, tmp_path, monkeypatch, capsys):
    "Case 48: one line, with a remedy that works."
    import errno
    from sdcourse.evaluation import report

    def full(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(report, "write_json", full)
    text = "evaluation.json: No space left on device; the numbers are printed above, give another --out"
    refused(text, lambda: evaluate([str(world / "a")], options(tmp_path, metrics=("fd",))))
    assert "| FD[tiny-digits] |" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "STOP", "deadline"])
def test_it_ends_at_once(world, tmp_path, monkeypatch, how):
    "In the middle of a measure; with the code of a requeue, but for a file STOP."
    from sdcourse.evaluation import report

    out = tmp_path / "r"

    def ask():
        if how == "STOP":
            out.mkdir()
            (out / "STOP").touch()
        elif how != "deadline":
            os.kill(os.getpid(), getattr(signal, how))

    def long(*_):
        ask()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            torch.randn(50, 50) @ torch.randn(50, 50)
        pytest.fail("it went on")

    monkeypatch.setattr(report, "measure", long)
    cfg = options(tmp_path, requeue_code=75, max_seconds=5.0 if how == "deadline" else 0.0)
    old, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    said = "file STOP" if how == "STOP" else how
    with pytest.raises(UserError, match=rf"stopped \({said}\); nothing was written") as e:
        evaluate([str(world / "a")], cfg)
    assert time.monotonic() - began < 30 and e.value.code == (1 if how == "STOP" else 75)
    assert not out.exists() or not list(out.iterdir())
    assert signal.getsignal(signal.SIGALRM) == old and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_pairs_are_read_a_few_at_a_time(tmp_path):
    "Case 56: at most a million pixels, and the same numbers as all at once."
    from sdcourse.evaluation.metrics import per_picture, pixels_in_parts
    from sdcourse.evaluation.pairwise import psnr, ssim

    for name in ("x", "y"):
        (tmp_path / name / "test").mkdir(parents=True)
        for i in range(5):
            pixels = np.random.default_rng([i, name == "x"]).integers(0, 256, (600, 700, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"test/{i}.png", compress_level=0)
    x, y = (open_set(tmp_path / name) for name in ("x", "y"))
    assert [len(p) for p in pixels_in_parts(x)] == [2, 2, 1]
    found = per_picture(Case(x, y, None, None, None))
    a, b = (pixels_of(s, range(5)) for s in (x, y))
    assert found["PSNR"].tolist() == pytest.approx(psnr(a, b).tolist(), rel=1e-12)
    assert found["SSIM"].tolist() == pytest.approx(ssim(a, b).tolist(), rel=1e-9)


# ---- equal ids of unrelated sets


def test_equal_ids_of_unrelated_sets_are_no_pairs(world, tmp_path):
    "Case 54: numbers of lines, and pictures of other captions."
    few = dict(metrics=("pairs",), pictures=0)
    captions = lambda word: lambda i: dict(text=f"{word} {i}")
    shutil.copytree(world / "a", tmp_path / "lines")
    made = dict(source="m", made_by=dict(prompts="p.txt", data=""))
    (tmp_path / "lines/generate.json").write_text(json.dumps(made))
    refused(
        "the ids are numbers of lines of p.txt, not those of the reference",
        lambda: evaluate([str(tmp_path / "lines")], options(tmp_path, **few)),
    )
    truth = write(tmp_path / "t", extra=captions("a cat"))
    same = write(tmp_path / "same", 30, extra=captions("a cat"))
    other = write(tmp_path / "other", 30, extra=captions("a dog"))
    paired = dict(few, reference=str(truth), train="")
    assert evaluate([str(same)], options(tmp_path, **paired))["same"]
    text = "was asked for 'a dog .', and the picture of that id shows 'a cat .', as 60 of 60 do: the sets are"
    refused(text, lambda: evaluate([str(other)], options(tmp_path, **paired, out=str(tmp_path / "r2"))))
    again = dict(source="m", made_by=dict(prompts="", data="d", caption_column="long"))
    (other / "generate.json").write_text(json.dumps(again))  # other captions of the same pictures
    assert evaluate([str(other)], options(tmp_path, **paired, out=str(tmp_path / "r3")))["other"]


# ---- what was found on the way


def test_variety_without_a_perceptual_distance_is_left_out(tmp_path):
    write(tmp_path / "m", 30, extra=lambda i: dict(of=f"p{i % 20}"))
    data = open_set(tmp_path / "m")
    net = type("Net", (), dict(name="inception", width=4))()
    case = Case(data, data, net, torch.randn(N, 4), torch.randn(N, 4), draws=0)
    with pytest.raises(UserError, match="variety: variety needs a perceptual distance, .* give --lpips alex"):
        measure(case, ["variety"])
    assert "variety" in measure(case)[1]


def test_a_curve_over_yes_and_no_is_refused(world, tmp_path):
    for name, value in (("a", True), ("b", False)):
        shutil.copytree(world / name, tmp_path / name)
        made = dict(source="m", made_by=dict(flip=value))
        (tmp_path / f"{name}/generate.json").write_text(json.dumps(made))
    for models in ("ab", "b"):
        sources = [str(tmp_path / m) for m in models]
        refused(" is no number; give --table", lambda: evaluate(sources, options(tmp_path, curve="flip")))


def test_the_perceptual_network_is_opened_once(world, tmp_path, monkeypatch):
    from sdcourse.evaluation import report

    real, opened = report.lpips_of, []
    monkeypatch.setattr(report, "lpips_of", lambda *a: opened.append(1) or real(*a))
    evaluate([str(world / "a"), str(world / "b")], options(tmp_path, metrics=("pairs",)))
    assert len(opened) == 1


def test_the_command(world, tmp_path, capsys):
    assert (
        cli.main(
            [
                "evaluate",
                str(world / "a"),
                "--reference",
                "digits",
                "--extractor",
                "tiny-digits",
                "--metrics",
                "fd,kid",
                "--out",
                str(tmp_path / "r"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert (
        "FD[tiny-digits]" in capsys.readouterr().out
        and len(read_json(tmp_path / "r/evaluation.json")["numbers"]["a"]) == 2
    )
    assert (
        cli.main(["evaluate", "--reference", "digits"]) == 2 and "expected MODEL …" in capsys.readouterr().err
    )


def test_every_measure_has_its_needs():
    from sdcourse.evaluation.metrics import NEEDS

    assert NEEDS.keys() == METRICS.keys()


def test_every_measure_is_documented():
    from sdcourse.evaluation import report

    text = Path(report.__file__).read_text()
    assert all(k in text for k in METRICS)

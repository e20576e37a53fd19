"""Scenes: pure in (seed, number), held-out pairs stay out, and a rule that reads the facts back and can say
no.
"""

import numpy as np
import pytest
import torch
import warm
from PIL import Image

from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data.imagefolder import read_lines
from sdcourse.data.sets import scenes
from sdcourse.data.sets.scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECT_SIZES,
    PLACES,
    SHAPES,
    Scenes,
    agreement,
    captions,
    facts,
    held_out,
    paint,
    read_scenes,
    scene_numbers,
)


@pytest.fixture(scope="module")
def known():
    return facts(np.arange(2000))


def test_a_scene_is_a_function_of_seed_and_number(known):
    for n in (0, 7, 1999):
        assert all(np.array_equal(v[0], known[k][n]) for k, v in facts([n]).items())
    assert np.array_equal(paint(facts([5, 1234]))[1], paint(facts([1234, 8, 9]))[0])
    other = facts(np.arange(2000), seed=1)
    assert 0.8 < (other["shape"][:, 0] != known["shape"][:, 0]).mean() < 0.95
    code = """
import hashlib
from sdcourse.data.sets.scenes import *
print(hashlib.sha256(paint(facts(range(50))).tobytes()).hexdigest())
"""
    text = warm.run(["-c", code])
    import hashlib

    assert text.stdout.strip() == hashlib.sha256(paint(facts(np.arange(50))).tobytes()).hexdigest()


def test_held_out_pairs_are_only_in_test(known):
    held = held_out(known["shape"], known["colour"]) & (known["shape"] >= 0)
    assert np.array_equal(held.any(1), known["id"] % 10 == 0)
    assert len({(s, c) for s, c in zip(known["shape"][held], known["colour"][held])}) == len(SHAPES)
    numbers = {s: set(scene_numbers(s, 300).tolist()) for s in ("train", "val", "test")}
    assert not numbers["train"] & numbers["val"] and not numbers["test"] & (numbers["train"] | numbers["val"])
    assert scene_numbers("train", 5, start=11).tolist() == scene_numbers("train", 16)[11:].tolist()


def test_every_known_pair_occurs_about_equally_often():
    known = facts(scene_numbers("train", 20000))
    count = np.zeros((8, 8))
    for s, c in zip(known["shape"].ravel(), known["colour"].ravel()):
        count[s, c] += s >= 0
    free = count[~held_out(*np.meshgrid(range(8), range(8), indexing="ij"))]
    assert (count > 0).sum() == 56 and free.min() > 0.6 * free.mean() and free.max() < 2.2 * free.mean()
    for key, n in (("background", 6), ("count", 2)):
        assert len(np.unique(known[key])) == n
    assert abs((known["count"] == 2).mean() - scenes.TWO) < 0.02 and len(np.unique(known["place"])) == 10


def test_two_objects_differ_and_stand_apart(known):
    two = known["count"] == 2
    assert (known["shape"][two, 0] != known["shape"][two, 1]).all() and (
        known["colour"][two, 0] != known["colour"][two, 1]
    ).all()
    gap = np.abs(known["xyr"][two, 0, :2] - known["xyr"][two, 1, :2]).max(1)
    assert (gap > 0.42).all() and (known["shape"][~two, 1] == -1).all()


@pytest.mark.parametrize("size", [32, 64])
def test_the_rule_reads_clean_drawings(known, size):
    right = agreement(known, read_scenes(paint(known, size)))
    assert right["all"].mean() >= 0.995, {k: v.mean() for k, v in right.items()}


def test_the_rule_reads_tensors_too(known):
    some = {k: v[:60] for k, v in known.items()}
    pixels = torch.from_numpy(paint(some)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert agreement(some, read_scenes(pixels))["all"].all()


def test_the_rule_says_no(known):
    pictures = read_scenes(paint(known))
    shifted = {k: np.roll(v, 1, 0) for k, v in known.items()}
    assert agreement(shifted, pictures)["all"].mean() < 0.01
    for key in ("shape", "colour", "size", "place"):  # one fact wrong in each picture
        asked = known | {key: known[key].copy()}
        asked[key][:, 0] = (asked[key][:, 0] + 1) % 2
        changed = asked[key][:, 0] != known[key][:, 0]
        assert agreement(asked, pictures)["all"][changed].sum() <= 5


def test_nothing_and_blobs_are_no_shapes():
    rng = np.random.default_rng(0)
    empty = read_scenes(np.full((1, 32, 32, 3), 230, np.uint8))
    assert empty["count"][0] == 0 and (empty["shape"] == -1).all()
    y, x = np.mgrid[:32, :32]
    blob = np.full((32, 32, 3), 240.0)
    blob[(abs(x - 16) < 2) | (abs(y - 16) < 2)] = (44, 96, 214)  # a big cross
    found = read_scenes(blob[None])
    assert found["fit"][0, 0] < 0.8
    asked = facts([2])
    asked["shape"][0, 0] = found["shape"][0, 0]
    assert agreement(asked, found)["shape"][0] and not agreement(asked, found, min_fit=0.8)["shape"][0]
    specks = read_scenes(
        np.clip(paint(facts(range(2, 6))).astype(float) + 5 * rng.standard_normal((4, 32, 32, 3)), 0, 255)
    )
    assert agreement(facts(range(2, 6)), specks)["all"].all()


def test_edges_are_smooth_and_sizes_agree():
    cover = scenes.coverage(np.arange(8), np.tile([0.5, 0.5, 0.4], (8, 1)), 64)
    assert ((cover > 0.01) & (cover < 0.99)).sum((1, 2)).min() > 30
    fine = (
        scenes.coverage(np.arange(8), np.tile([0.5, 0.5, 0.4], (8, 1)), 512)
        .reshape(8, 64, 8, 64, 8)
        .mean((2, 4))
    )
    assert np.abs(fine - cover).mean() < 0.005


def test_captions_say_the_facts(known):
    for i in range(300):
        texts = captions(known, i)
        assert len(set(texts)) == 5
        for k in range(known["count"][i]):
            words = f"{list(COLOURS)[known['colour'][i, k]]} {SHAPES[known['shape'][i, k]]}"
            assert all(words in t for t in texts)
            assert all(f"{list(OBJECT_SIZES)[known['size'][i, k]]} {words}" in t for t in texts[2:])
            assert PLACES[known["place"][i, k]] in texts[3]
        assert all(list(BACKGROUNDS)[known["background"][i]] in t for t in texts[2:])
        if known["count"][i] == 2:
            (x0, y0, _), (x1, y1, _) = known["xyr"][i]
            assert ("above" in texts[1]) == (abs(x0 - x1) < 0.1) and (
                y0 < y1 if "above" in texts[1] else x0 < x1
            )


def test_a_batch_is_its_rows():
    data = Scenes("val", 50, size=32)
    batch = data.__getitems__([4, 0, 49])
    assert (
        batch["id"].tolist() == [41, 1, 491]
        and batch["pixels"].dtype == torch.float32
        and batch["pixels"].abs().max() <= 1
    )
    assert torch.equal(batch["pixels"][2], data[49]["pixels"]) and type(data[4]["id"]) is int
    prints = {
        Scenes(*a, **k).fingerprint()
        for a, k in (
            (("val", 50), {}),
            (("val", 51), {}),
            (("test", 50), {}),
            (("val", 50), {"seed": 2}),
            (("val", 50), {"size": 64}),
        )
    }
    assert len(prints) == 5


def test_prepared_folder_shows_what_its_captions_say(tmp_path):
    assert (
        cli.run(
            [
                "prepare",
                "scenes",
                str(tmp_path / "o"),
                "--train",
                "30",
                "--val",
                "5",
                "--test",
                "8",
                "--workers",
                "1",
                "--size",
                "32",
            ]
        )
        == 0
    )
    rows = read_lines(tmp_path / "o/test/metadata.jsonl")
    assert [r["id"] for r in rows] == scene_numbers("test", 8).tolist()
    for r in rows:
        found = read_scenes(np.asarray(Image.open(tmp_path / "o/test" / r["file_name"]))[None])
        assert (
            found["shape"][0].tolist() == r["facts"]["shape"]
            and found["colour"][0].tolist() == r["facts"]["colour"]
        )
        assert SHAPES[r["facts"]["shape"][0]] in r["text"][0]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Scenes("trian"), "did you mean 'train'?"),
        (lambda: Scenes("train", size=8), "at least 24"),
        (lambda: cli.run(["prepare", "scenes", "--train", "3"]), "expected OUT"),
        (lambda: cli.run(["prepare", "scenes", "x", "--sze", "3"]), "did you mean '--size'?"),
    ],
)
def test_wrong_input_is_refused_in_one_line(call, words):
    with pytest.raises(UserError) as e:
        call()
    assert words in str(e.value) and "\n" not in str(e.value)

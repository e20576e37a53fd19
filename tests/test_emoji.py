"""Emoji in two styles: what is shipped is what the manifest says, captions name the style and read well, and
what is held out depends on names alone.
"""

import csv
import json
import re
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest

from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data.images import open_image
from sdcourse.data.manifests import load_manifest, verify
from sdcourse.data.sets import emoji
from sdcourse.data.sets.emoji import (
    CONCEPTS,
    PAIRS,
    SKIN_TONES,
    STYLES,
    EmojiOptions,
    concepts,
    draw_emoji,
    emoji_captions,
    emoji_file,
    emoji_home,
    emoji_tar,
    share_of,
    split_in,
    why_held_out,
)
from sdcourse.data.sets.photos import COLUMNS
from sdcourse.dataset import Squares, Transform, pictures, splits

KNOWN = concepts()
FEW = [
    i for i, c in enumerate(KNOWN) if c["subgroup"] in ("animal-mammal", "clothing", "hand-fingers-closed")
]
RUDE = r"middle finger|poo\b|sex|love hotel|bunny|symbols on mouth|biting|breast"
DOUBLED = re.compile(r"\b(\w+) \1\b", re.I)
WRONG_ARTICLE = re.compile(
    r"\ban? (?:an?|the)\b|\ba (?!eu|ewe|one-|uni|use)[aeiou]|\ban (?!x-|hour|[aeiouAEIOU])"
)


@pytest.fixture(scope="module")
def tars():
    return {style: emoji_tar(style) for style in STYLES}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "Makes a layout of the flat style once, from three subgroups."
    home, made = tmp_path_factory.mktemp("emoji"), {}

    def make(layout):
        if layout not in made:
            with pytest.MonkeyPatch.context() as m:
                m.setattr(emoji, "concepts", lambda: [KNOWN[i] for i in FEW])
                m.setattr(emoji, "draw_emoji", _draw_few)
                words = ["--style", "flat", "--layout", layout, "--workers", "1"]
                assert cli.run(["prepare", "emoji", str(home / layout), *words]) == 0
            made[layout] = home / layout
        return made[layout]

    return make


def _draw_few(style, number):
    return draw_emoji(style, FEW[number])


# ---- what is shipped
def test_shipped_files_are_what_the_manifest_says(tars):
    assert verify(load_manifest("emoji"), emoji_home(), layout="shipped") == []
    for tar in tars.values():
        assert tar.ids == [c["id"] for c in KNOWN]
    assert sum((emoji_home() / f"{s}.tar").stat().st_size for s in STYLES) <= 13_000_000
    assert 2400 <= len(KNOWN) <= 2900


def test_pictures_are_small_squares_on_white_and_the_styles_differ(tars):
    for i in range(0, len(KNOWN), 150):
        three, flat = (np.asarray(open_image(tars[s].read(i))).astype(int) for s in STYLES)
        assert three.shape == flat.shape == (64, 64, 3)
        assert (three == 255).all(-1).any() and (flat == 255).all(-1).any()
        assert np.abs(three - flat).mean() > 1


def test_skin_is_as_dark_as_it_is_called(tars):
    "Both packages have the files of two tones exchanged; a family is ordered by its brightness."
    families = defaultdict(dict)
    for i, c in enumerate(KNOWN):
        if "tone" in c["parts"] and c["subgroup"].startswith("hand"):
            families[c["name"]][c["parts"]["tone"]] = i
    assert len(families) > 30
    for style, tar in tars.items():
        for name, tones in families.items():
            light = [np.asarray(open_image(tar.read(tones[t]))).mean() for t in SKIN_TONES if t in tones]
            assert light == sorted(light, reverse=True), (style, name)


def test_nothing_rude_and_no_characters():
    for c in KNOWN:
        assert not re.search(RUDE, " ".join([c["name"], c["phrase"], *c["others"]])), c
        assert c["group"] != "flags" and c["subgroup"] not in ("keycap", "alphanum"), c
    assert not any(re.search(r"o'clock|-thirty", c["name"]) for c in KNOWN)


# ---- captions
def test_captions_name_their_style_and_no_other():
    for c in KNOWN:
        for style, other in (STYLES, STYLES[::-1]):
            texts = emoji_captions(c, style)
            assert len(set(texts)) == len(texts) >= 4
            assert all(f"{style} emoji" in t and f"{other} emoji" not in t for t in texts), texts


def test_captions_read_well():
    for c in KNOWN:
        for text in emoji_captions(c, "3d"):
            assert not DOUBLED.search(text) and not WRONG_ARTICLE.search(text), text
            assert not re.search(r"[{}’]|  | ,|:", text), text


def test_a_tone_is_said_in_every_caption():
    for c in KNOWN:
        said = [set(re.findall(r"([\w-]+) skin\b", t)) for t in emoji_captions(c, "flat")]
        tone = c["parts"].get("tone")
        assert all(s == ({tone} if tone else set()) for s in said), c["id"]


def test_parts_are_parsed():
    known = {c["id"]: c["parts"] for c in KNOWN}
    assert known["woman-firefighter-dark"] == {"role": "firefighter", "gender": "female", "tone": "dark"}
    assert known["man-red-hair-light"] == {
        "role": "person with red hair",
        "gender": "male",
        "hair": "red hair",
        "tone": "light",
    }
    assert known["mermaid"] == {"role": "merperson", "gender": "female"}
    assert known["green-book"] == {"object": "book", "colour": "green"}
    assert known["waving-hand-medium"] == {"role": "waving hand", "tone": "medium"}


def test_a_wording_without_style_is_refused():
    with pytest.raises(UserError, match=r"caption 'a \{phrase\}': names no style; write \{style\} emoji"):
        emoji_captions(KNOWN[0], "3d", wordings=("{name}, {style} emoji", "a {phrase}"))


# ---- held out
def test_pairs_are_in_no_training_set_and_every_role_and_tone_is_seen():
    pairs, lost, seen = set(), set(), set()
    for c in KNOWN:
        if "tone" not in c["parts"]:
            continue
        pair = c["parts"]["role"], c["parts"]["tone"]
        pairs.add(pair)
        inside = {split_in(c, style) == "train" for style in STYLES}
        assert len(inside) == 1, "both styles hold out the same pairs"
        (seen if inside.pop() else lost).add(pair)
    assert not seen & lost and seen | lost == pairs
    assert {r for r, _ in seen} == {r for r, _ in pairs} and {t for _, t in seen} == set(SKIN_TONES)
    assert max(Counter(r for r, _ in lost).values()) == 1
    assert abs(len(lost) / len(pairs) - PAIRS) < 0.02
    assert {t for _, t in lost} == set(SKIN_TONES)


def test_held_out_concepts_are_known_in_3d():
    single = [c for c in KNOWN if not c["toned"]]
    lost = [c for c in KNOWN if split_in(c, "flat") == "test"]
    assert not any(c["toned"] for c in lost)
    assert abs(len(lost) / len(single) - CONCEPTS) < 0.02 and len(lost) >= 100
    assert {split_in(c, "3d") for c in lost} == {"train"}
    assert {why_held_out(c) for c in KNOWN if split_in(c, "flat") == "test"} == {"concept"}
    assert {why_held_out(c) for c in KNOWN if split_in(c, "flat") == "val"} == {"pair"}


def test_the_rule_knows_names_only():
    "A concept with nothing but its name and parts falls into the same split."
    for c in KNOWN[::40]:
        bare = {k: c[k] for k in ("name", "toned", "parts")}
        assert why_held_out(bare) == why_held_out(c) and split_in(bare, "3d") == split_in(c, "3d")
    assert share_of("firefighter") == share_of("firefighter") != share_of("firefighters")
    many = [share_of(f"name {i}") for i in range(2000)]
    assert 0 <= min(many) and max(many) < 1 and abs(np.mean(many) - 0.5) < 0.02


def test_the_splits_of_a_version_stay():
    "Models that were trained on them are judged by them: a change makes every number of theirs wrong."
    found = {s: Counter(split_in(c, s) for c in KNOWN) for s in STYLES}
    assert found["3d"] == {"train": 2663, "val": 56, "test": 127}
    assert found["flat"] == {"train": 2537, "val": 183, "test": 126}


# ---- the worlds
@pytest.mark.parametrize("style", STYLES)
def test_a_world_shows_the_concept_that_it_names(style, tars):
    name = f"emoji:{style}"
    assert splits(name) == ("train", "val", "test")
    data = pictures(name, "test")
    place = {c["id"]: i for i, c in enumerate(KNOWN)}
    for i in range(0, len(data), 40):
        row, n = data.row(i), place[data.ids[i]]
        assert row["texts"] == list(emoji_captions(KNOWN[n], style)) and row["facts"] == KNOWN[n]["parts"]
        assert row["held_out"] == why_held_out(KNOWN[n]) and row["subgroup"] == KNOWN[n]["subgroup"]
        assert data.image(i).tobytes() == open_image(tars[style].read(n)).tobytes()
    assert not data.mirrors and data.licence == "MIT"
    assert pictures(name, "test", caption_column="complete").row(0)["texts"] == [
        emoji_captions(KNOWN[place[data.ids[0]]], style)[1]
    ]


def test_other_sizes_are_made_from_64():
    data = pictures("emoji:flat", "test")
    for side in (32, 64, 96):
        assert Squares(data, Transform(side))[0]["image"].shape == (3, side, side)


def test_subgroups_are_classes_for_who_asks():
    data = pictures("emoji:3d", "val", label_column="subgroup")
    assert data.classes[data.row(0)["label"]] == data.row(0)["subgroup"]
    assert "label" not in pictures("emoji:3d", "val").row(0)


def test_the_same_id_is_the_truth_in_the_other_style():
    ids = {
        s: {i for split in splits(f"emoji:{s}") for i in pictures(f"emoji:{s}", split).ids} for s in STYLES
    }
    assert ids["3d"] == ids["flat"] and len(ids["3d"]) == len(KNOWN)


@pytest.mark.parametrize(
    "name, words",
    [
        ("emoji:flad", "did you mean 'emoji:flat'?"),
        ("emoji", "did you mean 'emoji:3d'?"),
        ("world:emoji:2d", "did you mean 'emoji:3d'?"),
    ],
)
def test_an_unknown_style_is_one_line(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        pictures(name)
    assert str(e.value) == f"{name}: no such world; {words}"


def test_an_unknown_style_of_a_tar_is_one_line():
    with pytest.raises(UserError, match="^style flad: did you mean 'flat'"):
        emoji_tar("flad")


def test_a_folder_called_emoji_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "emoji/train").mkdir(parents=True)
    open_image(emoji_tar("3d").read(0)).save(tmp_path / "emoji/train/one.png")
    monkeypatch.chdir(tmp_path)
    assert pictures("emoji").ids == ["one"]


def test_an_altered_tar_is_one_line(tmp_path, monkeypatch):
    for name in ("index.json", "concepts.jsonl", "flat.index.jsonl"):
        shutil.copy(emoji_home() / name, tmp_path / name)
    data = bytearray((emoji_home() / "flat.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flat.tar").write_bytes(data)
    monkeypatch.setattr(emoji, "emoji_home", lambda: tmp_path)
    what = r"flat\.tar: is not what the manifest says \(SHA-256\); install the package again"
    with pytest.raises(UserError, match=what):
        pictures("emoji:flat")
    with pytest.raises(UserError, match=r"3d\.tar: is missing; install the package again"):
        emoji_tar("3d")
    (tmp_path / "concepts.jsonl").write_text("")
    with pytest.raises(UserError, match=r"concepts\.jsonl: is not what"):
        emoji_file("concepts.jsonl", tmp_path)


# ---- as files
def test_a_folder_gives_what_the_world_gives(prepared):
    for split in ("train", "val", "test"):
        world, files = pictures("emoji:flat", split), pictures(prepared("captions"), split)
        place = {name: i for i, name in enumerate(world.ids)}
        assert files.ids == [KNOWN[i]["id"] for i in FEW if split_in(KNOWN[i], "flat") == split]
        for i in range(0, len(files), 9):
            j = place[files.ids[i]]
            assert files.image(i).tobytes() == world.image(j).tobytes()
            for column in ("texts", "facts", "held_out"):
                assert files.row(i)[column] == world.row(j)[column]


def test_a_few_for_training_are_a_part_of_more_and_what_is_held_out_stays():
    few, more = ([i for i, *_ in emoji._chosen(EmojiOptions(style="flat", train=n))] for n in (20, 40))
    assert set(few) < set(more) and few == sorted(few)
    kept = Counter(split_in(KNOWN[i], "flat") for i in few)
    assert kept == {"train": 20, "val": 183, "test": 126}


def test_a_table_has_unsplashs_columns_and_goes_through_prepare_unsplash(prepared, tmp_path):
    out = prepared("table")
    with (out / "photos.tsv000").open(encoding="utf-8", newline="") as f:
        found = list(csv.DictReader(f, delimiter="\t"))
    assert tuple(found[0]) == COLUMNS and len(found) == len(FEW)
    data = tmp_path / "data"
    assert cli.run(["prepare", "unsplash", str(out), str(data), "--size", "32", "--workers", "1"]) == 0
    for split in ("train", "val", "test"):
        assert pictures(data, split).ids == [r["photo_id"] for r in found if r["split"] == split]
    row = pictures(data, "test").row(0)
    assert row["texts"] == [emoji_captions(next(c for c in KNOWN if c["id"] == row["id"]), "flat")[1]]
    assert pictures(data, "test").licence == "MIT"


def test_no_class_is_missing_in_training():
    for style in STYLES:
        seen = {c["subgroup"] for c in KNOWN if split_in(c, style) == "train"}
        assert seen == {c["subgroup"] for c in KNOWN}


def test_folders_have_a_class_for_each_subgroup(prepared):
    data = pictures(prepared("folders"), "test")
    place = {c["id"]: c["subgroup"] for c in KNOWN}
    for i in range(len(data)):
        assert data.row(i)["class"] == place[data.path(i).stem] == data.classes[data.row(i)["label"]]


def test_every_layout_is_what_the_shipped_manifest_says(prepared):
    for layout in ("captions", "table", "folders"):
        assert verify(load_manifest("emoji"), prepared(layout), layout=layout) == []
    mine = json.loads((prepared("captions") / "manifest.json").read_text())
    assert "Copyright (c) Microsoft Corporation" in mine["licence"]["text"]


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "expected OUT"),
        (["o", "--style", "fla"], "did you mean 'flat'?"),
        (["o", "--layout", "tables"], "did you mean 'table'?"),
        (["o", "--layout", "folders", "--train", "9"], "leave it out"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        cli.run(["prepare", "emoji", *argv])
    assert words in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["scenes", "faces"])
def test_the_drawn_worlds_are_drawn_at_64(name):
    data = pictures(name, "test")
    images = Squares(data, Transform(64)).__getitems__([0, 1])["image"]
    assert images.shape == (2, 3, 64, 64) and images.float().std() > 20

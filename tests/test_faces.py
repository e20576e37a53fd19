"""Drawn faces: every attribute can be seen where it belongs, identities keep their faces, and the folders are
laid out as the real ones.
"""

import hashlib

import numpy as np
import pytest
from PIL import Image

from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data.sets.faces import (
    ATTRIBUTES,
    BEARDS,
    HAIR,
    LASTING,
    FacesOptions,
    Pen,
    draw_face,
    geometry,
    hq_numbers,
    people,
    wild_view,
)

BODY, PICTURE = np.where(np.arange(12) == 0, 0.25, 0.45), np.full(16, 0.4)
EYES, MOUTH, CHEEKS, HEAD, HAIRY, ALL = (
    (-0.4, -0.2, 0.4, 0.15),
    (-0.24, 0.26, 0.24, 0.52),
    (-0.45, 0.0, 0.45, 0.45),
    (-0.6, -0.75, 0.6, 1.0),
    (-0.7, -0.8, 0.7, 1.0),
    (-1, -1, 1, 1),
)
JAW = (-0.48, 0.05, 0.48, 0.75)
REGION = {  # attribute: where its flip may change pixels, x0 y0 x1 y1 in face coordinates
    "5_o_Clock_Shadow": JAW,
    "Arched_Eyebrows": EYES[:1] + (-0.3,) + EYES[2:],
    "Attractive": ALL,
    "Bags_Under_Eyes": EYES,
    "Bald": HAIRY,
    "Bangs": (-0.5, -0.5, 0.5, 0.1),
    "Big_Lips": MOUTH,
    "Big_Nose": (-0.15, 0.0, 0.15, 0.3),
    "Black_Hair": HAIRY,
    "Blond_Hair": HAIRY,
    "Blurry": ALL,
    "Brown_Hair": HAIRY,
    "Bushy_Eyebrows": (-0.4, -0.3, 0.4, 0.05),
    "Chubby": HAIRY,
    "Double_Chin": (-0.35, 0.45, 0.35, 0.8),
    "Eyeglasses": (-0.5, -0.2, 0.5, 0.15),
    "Goatee": (-0.25, 0.3, 0.25, 0.7),
    "Gray_Hair": HAIRY,
    "Heavy_Makeup": (-0.45, -0.2, 0.45, 0.3),
    "High_Cheekbones": CHEEKS,
    "Male": ALL,
    "Mouth_Slightly_Open": MOUTH,
    "Mustache": (-0.25, 0.2, 0.25, 0.42),
    "Narrow_Eyes": EYES,
    "No_Beard": JAW,
    "Oval_Face": HAIRY,
    "Pale_Skin": HEAD,
    "Pointy_Nose": (-0.12, -0.05, 0.15, 0.3),
    "Receding_Hairline": (-0.5, -0.65, 0.5, 0.05),
    "Rosy_Cheeks": CHEEKS,
    "Sideburns": (-0.5, -0.25, 0.5, 0.3),
    "Smiling": (-0.3, -0.2, 0.3, 0.5),
    "Straight_Hair": HAIRY,
    "Wavy_Hair": HAIRY,
    "Wearing_Earrings": (-0.55, 0.1, 0.55, 0.35),
    "Wearing_Hat": (-0.6, -0.95, 0.6, -0.1),
    "Wearing_Lipstick": MOUTH,
    "Wearing_Necklace": (-0.3, 0.65, 0.3, 1.0),
    "Wearing_Necktie": (-0.45, 0.65, 0.45, 1.0),
    "Young": (-0.4, -0.45, 0.4, 0.45),
}
MEN = {*BEARDS, "No_Beard", "Bald", "Receding_Hairline", "Wearing_Necktie"}


def face(on, size=128):
    return np.asarray(draw_face([n in on for n in ATTRIBUTES], BODY, PICTURE, size), float)


def flipped(name, size=128):
    "The same face without and with an attribute."
    plain = (
        {"Young", "No_Beard"}
        | ({"Male"} if name in MEN else set())
        | (set() if name in HAIR else {"Brown_Hair"})
    )
    return face(plain, size), face(plain ^ {name}, size)


def test_the_forty_names_are_celebas():
    assert (
        len(ATTRIBUTES) == 40
        and list(ATTRIBUTES) == sorted(ATTRIBUTES, key=str)
        and hashlib.sha256(" ".join(ATTRIBUTES).encode()).hexdigest()[:12] == "b1336d224fff"
    )


def test_every_attribute_is_visible_where_it_belongs():
    y, x = np.mgrid[:128, :128] + 0.5
    wrong = {}
    for name in ATTRIBUTES:
        before, after = flipped(name)
        change = np.abs(before - after).max(-1)
        x0, y0, x1, y1 = (np.array(REGION[name]) * 0.5 + 0.5) * 128
        inside = (x >= x0 - 1) & (x <= x1 + 1) & (y >= y0 - 1) & (y <= y1 + 1)
        if (change[inside] > 12).sum() < 25:
            wrong[name] = "cannot be seen"
        if elsewhere := (change[~inside] > 4).sum():
            wrong[name] = f"changes {elsewhere} pixels elsewhere"
    assert not wrong


def test_attributes_are_visible_at_64_pixels():
    change = {name: np.abs(np.subtract(*flipped(name, 64))).max() for name in ATTRIBUTES}
    assert len(change) == 40 and not {name: c for name, c in change.items() if c <= 20}


def test_pictures_of_one_identity_share_their_lasting_traits():
    who = people(np.arange(1, 2001), identities=50)
    columns = [ATTRIBUTES.index(n) for n in LASTING]
    for i in np.unique(who["identity"]):
        mine = who["identity"] == i
        assert len(np.unique(who["body"][mine], axis=0)) == 1
        for c in columns:  # a hat's owner keeps the nose
            if (
                ATTRIBUTES[c] not in HAIR
                and ATTRIBUTES[c] != "Receding_Hairline"
                and ATTRIBUTES[c] != "Narrow_Eyes"
            ):
                assert len(np.unique(who["attributes"][mine, c])) == 1
    assert len(np.unique(who["body"], axis=0)) == len(np.unique(who["identity"])) == 50
    assert len(np.unique(who["picture"], axis=0)) == 2000


def test_attributes_go_together_as_they_should():
    a = dict(zip(ATTRIBUTES, people(np.arange(1, 8001), identities=4000)["attributes"].T))
    share = {k: v.mean() for k, v in a.items()}
    assert all(0.008 < v < 0.95 for v in share.values()), share
    assert (
        abs(share["Male"] - 0.42) < 0.05
        and abs(share["Young"] - 0.78) < 0.06
        and abs(share["Smiling"] - 0.48) < 0.05
    )
    assert (sum(a[h].astype(int) for h in HAIR) <= 1).all() and not (
        a["Bald"] & (a["Bangs"] | a["Wavy_Hair"])
    ).any()
    assert (
        not (a["No_Beard"] & np.any([a[b] for b in BEARDS], 0)).any() and not (a["Goatee"] & ~a["Male"]).any()
    )
    assert a["Wearing_Lipstick"][a["Male"]].mean() < 0.02 < 0.7 < a["Wearing_Lipstick"][~a["Male"]].mean()
    assert a["Gray_Hair"][~a["Young"]].mean() > 5 * a["Gray_Hair"][a["Young"]].mean()


def test_a_face_is_a_function_of_seed_and_number():
    some = people(np.arange(1, 100))
    for k, v in people([42]).items():
        assert np.array_equal(v[0], some[k][41])
    assert not np.array_equal(people([42], seed=1)["body"], some["body"][41:42])
    pictures = [
        np.asarray(draw_face(some["attributes"][0], some["body"][0], some["picture"][0], 64))
        for _ in range(2)
    ]
    assert np.array_equal(*pictures)


def test_box_and_landmarks_lie_on_the_face():
    options = FacesOptions()
    for n in range(1, 60):
        size, view = wild_view(n, options)
        (x, y, w, h), points = geometry(n, options)
        assert (
            0 <= x
            and 0 <= y
            and x + w <= size[0] + 1
            and y + h <= size[1] + 1
            and min(size) >= options.min_side
        )
        assert (
            all(x <= px <= x + w and y <= py <= y + h for px, py in points)
            and points[0][0] < points[1][0]
            and points[2][1] < points[3][1] + size[1] * 0.1
        )
        pen = Pen(size, **view)
        assert np.allclose(pen.to_sheet([[-0.172, -0.03]])[0] / pen.over, points[0], atol=0.51)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("faces") / "o"
    assert (
        cli.run(
            [
                "prepare",
                "faces",
                str(out),
                "--celeba",
                "60",
                "--hq",
                "20",
                "--workers",
                "2",
                "--identities",
                "12",
            ]
        )
        == 0
    )
    return out


def test_layouts_are_the_original_ones(folder):
    hq, wild = folder / "CelebAMask-HQ", folder / "CelebA"
    assert sorted(p.name for p in (hq / "CelebA-HQ-img").iterdir()) == sorted(f"{i}.jpg" for i in range(20))
    assert sorted(p.name for p in (wild / "Img/img_celeba").iterdir()) == [
        f"{i:06}.jpg" for i in range(1, 61)
    ]
    lines = (hq / "CelebAMask-HQ-attribute-anno.txt").read_text().splitlines()
    assert (
        lines[0] == "20"
        and lines[1].split() == list(ATTRIBUTES)
        and len(lines) == 22
        and set(lines[2].split()[1:]) == {"1", "-1"}
    )
    lines = (wild / "Anno/list_attr_celeba.txt").read_text().splitlines()
    assert (
        lines[0] == "60"
        and lines[1].split() == list(ATTRIBUTES)
        and lines[2].split()[0] == "000001.jpg"
        and len(lines[61].split()) == 41
    )
    assert (wild / "Anno/list_bbox_celeba.txt").read_text().splitlines()[1] == "image_id x_1 y_1 width height"
    assert len((wild / "Anno/identity_CelebA.txt").read_text().splitlines()) == 60
    assert len((wild / "Anno/list_landmarks_celeba.txt").read_text().splitlines()[2].split()) == 11


def test_the_mapping_joins_the_two_folders(folder):
    rows = [
        l.split() for l in (folder / "CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt").read_text().splitlines()
    ]
    assert rows[0] == ["idx", "orig_idx", "orig_file"] and len({r[2] for r in rows[1:]}) == 20
    read = lambda p: {l.split()[0]: l.split()[1:] for l in (folder / p).read_text().splitlines()[2:]}
    hq, wild = (
        read("CelebAMask-HQ/CelebAMask-HQ-attribute-anno.txt"),
        read("CelebA/Anno/list_attr_celeba.txt"),
    )
    for idx, orig, file in rows[1:]:
        assert hq[f"{idx}.jpg"] == wild[file] and file == f"{int(orig) + 1:06}.jpg"
    assert hq_numbers(FacesOptions(celeba=60, hq=20, identities=12)).tolist() == [
        int(r[1]) + 1 for r in rows[1:]
    ]


def test_a_broken_off_run_goes_on(folder, tmp_path):
    argv = [str(tmp_path / "o"), "--celeba", "60", "--hq", "20", "--identities", "12", "--workers", "1"]
    assert cli.run(["prepare", "faces", *argv, "--max-seconds", "0.05"]) == 0
    assert not (tmp_path / "o").exists() and not list(tmp_path.rglob("*.txt"))
    assert cli.run(["prepare", "faces", *argv]) == 0
    files = lambda d: {str(p.relative_to(d)): p.read_bytes() for p in sorted(d.rglob("*")) if p.is_file()}
    assert files(tmp_path / "o") == files(folder)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        cli.run(["prepare", "faces", *argv, "--seed", "1"])


def test_pictures_of_both_folders_have_their_sizes(folder):
    assert Image.open(folder / "CelebAMask-HQ/CelebA-HQ-img/0.jpg").size == (128, 128)
    sizes = {Image.open(p).size for p in (folder / "CelebA/Img/img_celeba").iterdir()}
    assert len(sizes) > 20 and min(map(min, sizes)) >= 80


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--hq", "3"], "expected OUT"),
        (["x", "--hq", "2000"], "--celeba"),
        (["x", "--min-side", "500"], "--max-side"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        cli.run(["prepare", "faces", *argv])
    assert words in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_smile_is_wider_and_higher():
    width = {}
    for name in ("plain", "Smiling"):
        a = face({"Young", "No_Beard", "Brown_Hair", "Wearing_Lipstick", name})
        mouth = a[80:98, 40:88]
        width[name] = ((mouth[..., 0] - mouth[..., 1]) > 110).any(0).sum()
    assert width["Smiling"] >= width["plain"] + 4, width


def test_captions_say_what_is_there_and_what_is_not():
    "Of every fact both answers are said, each of those who have it only; the longest fits a text encoder."
    import re
    from sdcourse.data.sets.faces import ATTRIBUTES, IN_WORDS, face_captions, people

    said = set()
    for i, row in enumerate(people(np.arange(1, 600))["attributes"]):
        known = dict(zip(ATTRIBUTES, map(bool, row)))
        terse, plain, complete, *facts = face_captions(known, i)
        assert terse.split()[-1] == ("man" if known["Male"] else "woman")
        assert ("young" in plain) == known["Young"] and ("smiling" in plain) == known["Smiling"]
        assert ("bald head" in complete) == known["Bald"] and (", glasses" in complete) == known["Eyeglasses"]
        assert len(re.findall(r"\w+|,", complete)) <= 30  # tokens beside the two ends
        for fact in facts:
            told = fact.removeprefix("a portrait: ")
            assert any(IN_WORDS[k][known[k]] == told for k in IN_WORDS)
            said.add(told)
    assert said == {words for pair in IN_WORDS.values() for words in pair}

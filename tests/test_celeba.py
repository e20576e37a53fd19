"""CelebA: the split is stratified and the published one, nobody is on two sides, weights are the optimum,
tables with mistakes are refused.
"""

import json, os, re, shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data.imagefolder import read_lines
from sdcourse.data.sets import celeba, faces
from sdcourse.data.sets.celeba import (
    STRATA,
    balance,
    crop_face,
    face_square,
    frequency,
    read_attributes,
    read_identities,
    read_mapping,
    split_hq,
    strata,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("celeba")
    assert (
        cli.run(
            [
                "prepare",
                "faces",
                str(out),
                "--celeba",
                "500",
                "--hq",
                "160",
                "--hq-size",
                "64",
                "--identities",
                "120",
                "--min-side",
                "64",
                "--max-side",
                "120",
                "--workers",
                "2",
            ]
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def hq(source):
    return source / "CelebAMask-HQ"


@pytest.fixture
def copy(source, tmp_path):
    "Tables that may be broken, with the pictures of the fixture."
    for name in ("CelebA", "CelebAMask-HQ"):
        shutil.copytree(
            source / name,
            tmp_path / name,
            copy_function=lambda a, b: shutil.copy(a, b) if a.endswith(".txt") else os.link(a, b),
        )
    return tmp_path


def made(out):
    return {p: read_lines(out / p / "metadata.jsonl") for p in ("train", "val", "test") if (out / p).is_dir()}


def real_size(n=30000):
    "As many rows as the real set has, with its kind of correlation."
    rng = np.random.default_rng(0)
    male = rng.random(n) < 0.37
    values = rng.random((n, 40)) < 0.3
    for name, v in zip(
        STRATA, (male, np.where(male, rng.random(n) < 0.01, rng.random(n) < 0.85), rng.random(n) < 0.47)
    ):
        values[:, faces.ATTRIBUTES.index(name)] = v
    return list(faces.ATTRIBUTES), values


def test_thirty_thousand_become_24000_3000_3000_as_in_the_system_we_follow():
    from sklearn.model_selection import train_test_split

    names, values = real_size()
    parts = split_hq(names, values)
    assert Counter(parts.tolist()) == {"train": 24000, "val": 3000, "test": 3000}
    labels = values[:, [names.index(n) for n in STRATA]]
    train, rest = train_test_split(np.arange(30000), test_size=0.2, random_state=42, stratify=labels)
    val, test = train_test_split(rest, test_size=0.5, random_state=42, stratify=labels[rest])
    assert (parts[train] == "train").all() and (parts[val] == "val").all() and (parts[test] == "test").all()
    for key in {tuple(v) for v in labels.tolist()}:
        n = {p: (labels[parts == p] == key).all(1).sum() for p in ("train", "val", "test")}
        assert abs(n["train"] - 8 * n["val"]) <= 9 and abs(n["val"] - n["test"]) <= 1
    assert (split_hq(names, values, seed=1) != parts).any()


def test_rare_strata_are_joined_and_common_ones_are_not():
    rows = (
        [(0, 0, 0)] * 50
        + [(0, 0, 1)] * 40
        + [(1, 0, 0)] * 30
        + [(1, 1, 0)] * 6
        + [(1, 1, 1)] * 5
        + [(0, 1, 1)] * 3
    )
    groups = strata(np.array(rows))
    assert Counter(groups.tolist()).most_common() and sorted(Counter(groups.tolist()).values()) == [
        11,
        30,
        40,
        53,
    ]
    assert len(set(groups[120:131])) == 1
    names, values = real_size(100)
    assert Counter(split_hq(names, values).tolist()) == {"train": 80, "val": 10, "test": 10}


def test_the_split_is_in_the_folder(hq, tmp_path, capsys):
    assert cli.run(["prepare", "celeba-hq", str(hq), str(tmp_path / "o"), "--workers", "1"]) == 0
    files, names, values = read_attributes(hq / "CelebAMask-HQ-attribute-anno.txt")
    rows, parts = made(tmp_path / "o"), split_hq(names, values)
    assert {p: len(r) for p, r in rows.items()} == {"train": 128, "val": 16, "test": 16}
    for part, mine in rows.items():
        for r in mine:
            i = files.index(r["file_name"])
            assert (
                parts[i] == part
                and r["id"] == files[i].removesuffix(".jpg")
                and list(r["attributes"].values()) == values[i].tolist()
                and list(r["attributes"]) == names
            )
            assert (tmp_path / "o" / part / r["file_name"]).read_bytes() == (
                hq / "CelebA-HQ-img" / files[i]
            ).read_bytes()
    shares = json.loads((tmp_path / "o/report.json").read_text())["frequency"]
    assert (
        shares["val"]["Smiling"] == round(np.mean([r["attributes"]["Smiling"] for r in rows["val"]]), 4)
        and len(shares["test"]) == 40
    )
    assert "5_o_Clock_Shadow" in (said := capsys.readouterr().out) and len(said.splitlines()) == 42


def test_resized_pictures_are_png(hq, tmp_path):
    assert (
        cli.run(["prepare", "celeba-hq", str(hq), str(tmp_path / "o"), "--size", "32", "--workers", "1"]) == 0
    )
    names = [r["file_name"] for r in made(tmp_path / "o")["val"]]
    assert all(n.endswith(".png") and Image.open(tmp_path / "o/val" / n).size == (32, 32) for n in names)


def test_no_extra_shows_a_person_or_picture_of_val_or_test(source, hq, tmp_path):
    assert (
        cli.run(
            [
                "prepare",
                "celeba",
                str(source / "CelebA"),
                str(hq),
                str(tmp_path / "o"),
                "--min-side",
                "80",
                "--size",
                "32",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert [p.name for p in (tmp_path / "o").iterdir() if p.is_dir()] == ["train"]
    person, mapping = (
        read_identities(source / "CelebA/Anno/identity_CelebA.txt"),
        read_mapping(hq / "CelebA-HQ-to-CelebA-mapping.txt"),
    )
    files, names, values = read_attributes(hq / "CelebAMask-HQ-attribute-anno.txt")
    held = {person[mapping[f]] for f, p in zip(files, split_hq(names, values)) if p != "train"}
    rows = made(tmp_path / "o")["train"]
    extras = {f"{r['id']}.jpg" for r in rows}
    assert len(rows) > 40 and not extras & set(mapping.values()) and not {person[f] for f in extras} & held
    assert all(r["identity"] == person[f"{r['id']}.jpg"] for r in rows)
    wanted = {
        f
        for f, p in person.items()
        if f not in mapping.values()
        and p not in held
        and min(Image.open(source / "CelebA/Img/img_celeba" / f).size) >= 80
    }
    assert extras == wanted
    left = json.loads((tmp_path / "o/report.json").read_text())["left_out"]
    assert (
        left["in_hq"] == 160
        and left["kept"] == len(rows)
        and sum(left[k] for k in ("in_hq", "people_of_val_and_test", "too_small", "kept")) == 500
    )
    shared = np.mean(
        [
            person[mapping[f]]
            in {person[mapping[g]] for g, q in zip(files, split_hq(names, values)) if q == "train"}
            for f, p in zip(files, split_hq(names, values))
            if p != "train"
        ]
    )
    assert (
        left["hq_held_out_pictures_whose_person_is_in_hq_train"] == pytest.approx(shared) and 0 < shared < 1
    )


def test_by_person_nobody_is_on_two_sides(source, hq, tmp_path):
    table = source / "CelebA/Anno/identity_CelebA.txt"
    assert (
        cli.run(
            [
                "prepare",
                "celeba-hq",
                str(hq),
                str(tmp_path / "o"),
                "--identities",
                str(table),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    person, mapping, rows = (
        read_identities(table),
        read_mapping(hq / "CelebA-HQ-to-CelebA-mapping.txt"),
        made(tmp_path / "o"),
    )
    who = {p: {person[mapping[r["file_name"]]] for r in mine} for p, mine in rows.items()}
    assert not who["train"] & who["val"] and not who["train"] & who["test"] and not who["val"] & who["test"]
    assert sum(map(len, rows.values())) == 160 and all(8 <= len(rows[p]) <= 26 for p in ("val", "test"))
    assert (
        cli.run(
            [
                "prepare",
                "celeba",
                str(source / "CelebA"),
                str(hq),
                str(tmp_path / "e"),
                "--hq-split",
                "person",
                "--min-side",
                "80",
                "--size",
                "32",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    extras = {r["identity"] for r in made(tmp_path / "e")["train"]}
    assert extras and not extras & (who["val"] | who["test"])
    assert (
        json.loads((tmp_path / "e/report.json").read_text())["left_out"][
            "hq_held_out_pictures_whose_person_is_in_hq_train"
        ]
        == 0
    )
    (tmp_path / "few.txt").write_text("000001.jpg 7\n")
    with pytest.raises(UserError, match="nobody is named for HQ's"):
        cli.run(
            ["prepare", "celeba-hq", str(hq), str(tmp_path / "x"), "--identities", str(tmp_path / "few.txt")]
        )


def test_by_person_thirty_thousand_stay_stratified():
    names, values = real_size()
    persons = np.random.default_rng(1).integers(0, 6000, 30000)
    parts = celeba.split_hq_by_person(names, values, persons)
    n = Counter(parts.tolist())
    assert not set(persons[parts == "train"]) & set(persons[parts != "train"]) and all(
        abs(n[p] - 3000) < 120 for p in ("val", "test")
    )
    for name in STRATA:
        assert (
            abs(
                values[parts == "train", names.index(name)].mean()
                - values[parts == "test", names.index(name)].mean()
            )
            < 0.03
        )


def test_without_the_identity_file_there_is_a_warning_and_more_extras(copy, tmp_path, capsys):
    (copy / "CelebA/Anno/identity_CelebA.txt").unlink()
    assert (
        cli.run(
            [
                "prepare",
                "celeba",
                str(copy / "CelebA"),
                str(copy / "CelebAMask-HQ"),
                str(tmp_path / "o"),
                "--min-side",
                "80",
                "--size",
                "32",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert "warning:" in (said := capsys.readouterr().err) and "identity_CelebA.txt" in said
    left = json.loads((tmp_path / "o/report.json").read_text())["left_out"]
    assert left["people_of_val_and_test"] is None and left["in_hq"] + left["too_small"] + left["kept"] == 500


@pytest.mark.parametrize(
    "size, box, square",
    [
        ((300, 200), (130, 50, 40, 40), (50, 0, 250, 200)),
        ((300, 200), (0, 50, 10, 10), (0, 0, 200, 200)),
        ((300, 200), (280, 0, 20, 20), (100, 0, 300, 200)),
        ((200, 300), (0, 100, 40, 60), (0, 30, 200, 230)),
        ((200, 200), (0, 0, 5, 5), (0, 0, 200, 200)),
    ],
)
def test_squares_are_centred_on_the_face_and_stay_inside(size, box, square):
    assert face_square(size, box) == square


def test_the_crop_shows_the_face(tmp_path):
    photo = Image.new("RGB", (300, 100), (255, 255, 255))
    photo.paste((255, 0, 0), (240, 40, 260, 60))
    photo.save(tmp_path / "a.png")
    crop = np.asarray(crop_face(tmp_path / "a.png", (240, 40, 20, 20), 0))
    assert (
        crop.shape == (100, 100, 3)
        and tuple(crop[50, 50]) == (255, 0, 0)
        and (crop[:, :, 1] == 0).sum() == 400
    )


@pytest.mark.parametrize("n", [60, 400])
def test_weights_are_the_optimum_of_the_quadratic_programme(n):
    from scipy.optimize import minimize

    values = faces.people(np.arange(1, n + 1), identities=n)["attributes"]
    weights, how = balance(values)
    a = values.astype(float)

    def cost(x):
        r = a.T @ x / n - 0.5
        return (r**2).sum() + 1000 * (x.mean() - 1) ** 2 + 1.3 / n * (
            (x - 1) ** 2
        ).sum(), 2 * a @ r / n + 2000 * (x.mean() - 1) / n + 2.6 / n * (x - 1)

    direct = minimize(
        cost,
        np.ones(n),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.2, 5)] * n,
        options=dict(maxiter=20000, maxfun=100000, ftol=1e-15, gtol=1e-12),
    )
    assert (
        how["gap"] < 1e-6
        and abs(how["cost"] - direct.fun) < 1e-5 * max(direct.fun, 1)
        and how["cost"] < cost(np.ones(n))[0]
    )
    assert weights.mean() == pytest.approx(1) and np.abs(weights - direct.x / direct.x.mean()).max() < 0.02
    assert np.abs(weights @ a / n - 0.5).sum() < np.abs(a.mean(0) - 0.5).sum()


def test_bounds_bind_when_they_must():
    values = np.zeros((500, 40), bool)
    values[:3] = True  # three pictures have everything: without bounds each would count sixteen times
    weights, how = balance(values)
    assert weights[:3] / weights[-1] == pytest.approx(5 / 0.976, rel=0.01) and how["gap"] < 1e-6
    weights, how = balance(
        np.arange(500)[:, None] < np.full(40, 450)
    )  # most have everything: those few with nothing count more, the others less
    assert 0.2 <= weights.min() < 1 < weights.max() <= 5.5 and how["gap"] < 1e-6


def test_weights_are_stored_with_the_ids(hq, tmp_path):
    assert cli.run(["prepare", "celeba-hq", str(hq), str(tmp_path / "o"), "--workers", "1"]) == 0
    stored = json.loads((tmp_path / "o/weights.json").read_text())
    rows = made(tmp_path / "o")["train"]
    assert list(stored["weights"]) == [r["id"] for r in rows]
    expected, _ = balance(np.array([list(r["attributes"].values()) for r in rows]))
    assert np.allclose(list(stored["weights"].values()), expected, atol=2e-6) and stored["share"][
        "Male"
    ] == pytest.approx(np.mean([r["attributes"]["Male"] for r in rows]), abs=1e-4)


def test_a_truncated_picture_is_reported_and_not_used(copy, tmp_path):
    victim = copy / "CelebAMask-HQ/CelebA-HQ-img/5.jpg"
    data = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(data[: len(data) // 2])
    assert (
        cli.run(["prepare", "celeba-hq", str(copy / "CelebAMask-HQ"), str(tmp_path / "o"), "--workers", "1"])
        == 0
    )
    assert [(r["id"], r["reason"].split(":")[0]) for r in read_lines(tmp_path / "o/failures.jsonl")] == [
        ("5", "truncated")
    ]
    assert (
        "5" not in {r["id"] for rows in made(tmp_path / "o").values() for r in rows}
        and "5" not in json.loads((tmp_path / "o/weights.json").read_text())["weights"]
    )


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("\n3.jpg ", "\n3.jpg 1 ", "line 6"),
        ("160\n", "161\n", "'161'"),
        ("Wearing_Lipstick", "Wearing_Lipstik", "did you mean 'Wearing_Lipstik'"),
        ("\n7.jpg +-?1", "\n7.jpg  7", "line 10"),
    ],
)
def test_mistakes_in_tables_name_file_and_line(hq, tmp_path, old, new, words):
    text = (hq / "CelebAMask-HQ-attribute-anno.txt").read_text()
    text, n = re.subn(old, new, text, count=1)
    assert n == 1
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(UserError) as e:
        read_attributes(tmp_path / "t.txt")
    assert words in str(e.value) and "t.txt" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["x"], "expected CELEBAMASK_HQ OUT"),
        (["nowhere", "o"], "CelebAMask-HQ-attribute-anno.txt"),
        (["nowhere", "o", "--sise", "3"], "did you mean '--size'?"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        cli.run(["prepare", "celeba-hq", *argv])
    assert words in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_nothing_large_enough_is_an_error(source, hq, tmp_path):
    with pytest.raises(UserError, match="a smaller --min-side than 768"):
        cli.run(["prepare", "celeba", str(source / "CelebA"), str(hq), str(tmp_path / "o"), "--workers", "1"])
    assert not (tmp_path / "o").exists()


def test_frequency_is_per_part():
    values, parts = np.array([[1, 0], [1, 1], [0, 0]], bool), np.array(["train", "train", "val"])
    assert frequency(["a", "b"], values, parts) == {
        "train": {"a": 1.0, "b": 0.5},
        "val": {"a": 0.0, "b": 0.0},
    }

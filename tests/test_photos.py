"""Photographs from installed packages: regions that share no pixel, a table in Unsplash's form, licences with
every row.
"""

import csv, shutil

import numpy as np
import pytest
from PIL import Image

from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data.manifests import _check_bytes, load_manifest, verify
from sdcourse.data.sets import photos
from sdcourse.data.sets.photos import (
    COLUMNS,
    GAP,
    PHOTOGRAPHS,
    PhotosOptions,
    crops,
    photograph_file,
    regions,
)

BASE = [p for p in PHOTOGRAPHS if not p.file.startswith("skimage/")]


def rows(out):
    return list(csv.DictReader((out / "photos.tsv000").open(encoding="utf-8", newline=""), delimiter="\t"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "o"
    assert cli.run(["prepare", "photos", str(folder), "--crops", "3", "--workers", "1"]) == 0
    return folder


def test_three_photographs_come_with_the_base_install():
    assert [p.name for p in BASE] == ["temple", "flower", "officer"] and all(map(photograph_file, BASE))


def test_all_nine_with_scikit_image():
    assert all(map(photograph_file, PHOTOGRAPHS))
    found = crops(PhotosOptions(crops=2))
    assert {c["photograph"].name for c in found} == {p.name for p in PHOTOGRAPHS} and len(found) == 2 * sum(
        len(p.regions) for p in PHOTOGRAPHS
    )


@pytest.mark.parametrize("photo", PHOTOGRAPHS, ids=lambda p: p.name)
def test_regions_share_no_pixel_and_leave_a_strip(photo):
    for size in ((640, 427), (512, 600), (451, 300), (1000, 872)):
        count = np.zeros(size[::-1], int)
        for l, t, r, b in regions(photo, size):
            count[t:b, l:r] += 1
            assert 0 <= l < r <= size[0] and 0 <= t < b <= size[1]
        assert count.max() == 1
        columns = photo.columns
        (l0, t0, r0, b0), (l1, *_), (_, t2, *_) = (
            regions(photo, size)[0],
            regions(photo, size)[1],
            regions(photo, size)[columns],
        )
        assert l1 - r0 == 2 * GAP and t2 - b0 == 2 * GAP and (l0, t0) == (0, 0)


def test_no_crop_of_one_split_touches_another():
    for seed in (0, 1):
        found = crops(PhotosOptions(crops=20, seed=seed), only=BASE)
        for photo in BASE:
            marks = {}
            with Image.open(photograph_file(photo)) as image:
                shape = image.size[::-1]
            for split in ("train", "val", "test"):
                marks[split] = np.zeros(shape, bool)
                for c in found:
                    if c["photograph"] is photo and c["split"] == split:
                        marks[split][c["box"][1] : c["box"][3], c["box"][0] : c["box"][2]] = True
                assert marks[split].any()
            assert (
                not (marks["train"] & marks["val"]).any()
                and not (marks["train"] & marks["test"]).any()
                and not (marks["val"] & marks["test"]).any()
            )


def test_every_photograph_is_in_every_split_and_seeds_matter():
    found = crops(PhotosOptions(crops=2), only=BASE)
    assert {(c["photograph"].name, c["split"]) for c in found} == {
        (p.name, s) for p in BASE for s in ("train", "val", "test")
    }
    other = crops(PhotosOptions(crops=2, seed=5), only=BASE)
    assert [c["box"] for c in other] != [c["box"] for c in found] and [c["split"] for c in other] != [
        c["split"] for c in found
    ]
    assert crops(PhotosOptions(crops=2), only=[BASE[1]]) == [c for c in found if c["photograph"] is BASE[1]]


def test_crops_are_squares_large_enough_for_their_captions():
    for c in crops(PhotosOptions(crops=10), only=BASE):
        with Image.open(c["path"]) as image:
            l, t, r, b = regions(c["photograph"], image.size)[int(c["id"].split("-")[1])]
        x0, y0, x1, y1 = c["box"]
        assert x1 - x0 == y1 - y0 >= int(0.7 * min(r - l, b - t)) and l <= x0 < x1 <= r and t <= y0 < y1 <= b
        assert c["text"] == c["photograph"].regions[int(c["id"].split("-")[1])]


def test_the_table_has_unsplashs_columns_and_its_files_exist(out):
    found = rows(out)
    assert tuple(found[0]) == COLUMNS and len({r["photo_id"] for r in found}) == len(found) >= 54
    for r in found:
        assert r["photo_image_url"] == f"file:images/{r['photo_id']}.png", (
            "relative: an absolute name is true on one machine only"
        )
        with Image.open(out / "images" / f"{r['photo_id']}.png") as image:
            assert (
                image.size == (int(r["photo_width"]), int(r["photo_height"]))
                and image.mode == "RGB"
                and image.format == "PNG"
            )
        photo = next(p for p in PHOTOGRAPHS if p.name == r["photographer_username"])
        assert (
            r["licence"] == photo.licence
            and r["people"] == photo.people
            and r["ai_description"] in photo.regions
            and r["split"] in ("train", "val", "test")
        )


def test_a_crop_shows_the_pixels_of_its_box(out):
    for c in crops(PhotosOptions(crops=3), only=BASE)[::7]:
        with Image.open(c["path"]) as image:
            want = np.asarray(image.convert("RGB"))[c["box"][1] : c["box"][3], c["box"][0] : c["box"][2]]
        assert np.array_equal(np.asarray(Image.open(out / "images" / f"{c['id']}.png")), want)


def test_licences_are_kept_with_the_data(out):
    assert {
        e["path"]: (e["author"], e["licence"], e["people"], e["sha256"][:16])
        for e in load_manifest("photos")["layouts"]["installed"]["files"]
    } == {p.file: (p.author, p.licence, p.people, p.sha) for p in PHOTOGRAPHS}
    assert all(p.licence and p.author and "state" in p.licence for p in PHOTOGRAPHS), (
        "each licence says who states it"
    )
    mine = load_manifest(out / "manifest.json")
    assert mine["people"] == load_manifest("photos")["people"] and mine["count"] == len(rows(out)) == sum(
        mine["splits"]["counts"].values()
    )


def test_what_is_installed_is_what_the_manifest_lists():
    site = photograph_file(BASE[0]).parents[3]
    files = [
        e for e in load_manifest("photos")["layouts"]["installed"]["files"] if (site / e["path"]).exists()
    ]
    assert (
        len(files) in (3, 9)
        and [
            f
            for e in files
            for f in _check_bytes(e, e["path"], (site / e["path"]).stat().st_size, site / e["path"], None)
        ]
        == []
    )


def test_a_moved_folder_is_as_good_as_before(out, tmp_path):
    shutil.copytree(out, tmp_path / "moved")
    assert (
        cli.run(
            [
                "prepare",
                "unsplash",
                str(tmp_path / "moved"),
                str(tmp_path / "data"),
                "--size",
                "32",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert load_manifest(tmp_path / "data/manifest.json")["name"] == "photos", (
        "Unsplash's terms do not apply to them"
    )
    assert (
        verify(load_manifest("photos"), tmp_path / "data")
        == verify(load_manifest("photos"), tmp_path / "moved")
        == []
    )


def test_the_shipped_manifest_finds_what_is_missing_or_extra(out, tmp_path):
    shutil.copytree(out, tmp_path / "o")
    (tmp_path / "o/images/temple-0-00.png").rename(tmp_path / "o/images/temple.png")
    assert [v.split(" (")[0] for v in verify(load_manifest("photos"), tmp_path / "o")] == [
        "missing: images/temple-0-00.png",
        "extra: images/temple.png",
    ]


def test_another_picture_under_the_same_name_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "sklearn/datasets/images").mkdir(parents=True)
    shutil.copy(photograph_file(BASE[0]), tmp_path / "sklearn/datasets/images/china.jpg")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "sklearn")]})
    monkeypatch.setattr(photos, "find_spec", lambda name: spec)
    assert photograph_file(BASE[0]) and not photograph_file(BASE[1])
    (tmp_path / "sklearn/datasets/images/china.jpg").write_bytes(b"another picture")
    assert photograph_file(BASE[0]) is None
    with pytest.raises(UserError, match="none of the photographs"):
        cli.run(["prepare", "photos", str(tmp_path / "o")])


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    real = photos.find_spec
    monkeypatch.setattr(photos, "find_spec", lambda name: None if name == "skimage" else real(name))
    assert cli.run(["prepare", "photos", str(tmp_path / "o"), "--crops", "1", "--workers", "1"]) == 0
    assert (
        "from 3 photographs; more come with: pip install -c constraints.txt scikit-image"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "expected OUT"),
        (["o", "--crops", "0"], "--crops"),
        (["o", "--smallest", "0.1"], "--smallest"),
        (["o", "--crop", "3"], "did you mean '--crops'?"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        cli.run(["prepare", "photos", *argv])
    assert words in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_regions_are_a_jpeg_block_apart():
    assert 2 * GAP >= 8

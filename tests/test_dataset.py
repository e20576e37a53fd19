"""One view over folders, tars and hub sets: the same items from each, paired by id, seen once per epoch; what
cannot be trusted is refused by name.
"""

import csv, hashlib, io, json, re, shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from torch import nn

import toy
from hostile import lay_what_is_no_file, picture
from nobody import OpenFolder, as_nobody
from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data import scan as scans, shards as sh
from sdcourse.data.imagefolder import read_lines, write_lines
from sdcourse.data.images import BadImage, centre_crop
from sdcourse.data.prepare import Work
from sdcourse.dataset import Squares, Transform, pictures, splits
from sdcourse.engine.loop import collate, train
from sdcourse.engine.order import Order, Plan, micro_rows, rank_rows


class Never:
    reason = ""

    def raised(self):
        return False

    def clear_file(self):
        pass


def write_rows(home, rows):
    (home / "metadata.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )


def folder_of(home, n=13, split="train", **fields):
    "A prepared folder; the side of a picture and its colours tell which one it is."
    (home / split).mkdir(parents=True)
    rows = []
    for i in range(n):
        (home / split / f"p{i}.png").write_bytes(picture(20 + i, 33 - i, seed=i, format="PNG"))
        rows.append(
            {"file_name": f"p{i}.png", "id": f"{split}-a.{i}", "text": f"über {i}", "label": i % 3}
            | {k: v(i) for k, v in fields.items()}
        )
    write_rows(home / split, rows)
    return home


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "(a folder of 13 train and 5 val pictures with classes, its tars)"
    home = tmp_path_factory.mktemp("both")
    folder = folder_of(folder_of(home / "in"), 5, split="val")
    (folder / "classes.json").write_text(
        json.dumps([{"label": k, "name": n, "folder": n} for k, n in enumerate("abc")])
    )
    assert sh.pack(folder, home / "tars", sh.Shards(max_bytes=20_480), flag=Never()) == 0
    return folder, home / "tars"


def refused(source, *words, split="train", **options):
    "The refusal is one line and holds these words."
    with pytest.raises(UserError) as e:
        pictures(source, split, **options)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


# ---- the same items from everywhere
def test_a_folder_and_its_tars_give_the_same_items_bitwise(both):
    for split, n in (("train", 13), ("val", 5)):
        a, b = (pictures(source, split) for source in both)
        assert a.ids == b.ids and len(a) == len(b) == n and a.classes == b.classes == ("a", "b", "c")
        for i in range(n):
            x, y = a[i], b[i]
            assert (
                x.keys() == y.keys()
                and all(x[k] == y[k] for k in x if k != "image")
                and x["texts"] == [f"über {i}"]
                and x["label"] == i % 3
            )
            assert (
                x["image"].mode == y["image"].mode == "RGB"
                and x["image"].size == y["image"].size == (20 + i, 33 - i)
                and x["image"].tobytes() == y["image"].tobytes()
            )
        for crop in ("center", "none", "adm"):
            x, y = (Squares(p, Transform(8, crop)).__getitems__(list(range(n))) for p in (a, b))
            assert (
                torch.equal(x["image"], y["image"])
                and torch.equal(x["label"], y["label"])
                and x["texts"] == y["texts"]
                and x["id"] == y["id"] == a.ids
            )


def test_splits_are_found_in_order(both, tmp_path):
    assert splits(both[0]) == splits(both[1]) == ("train", "val")
    folder_of(folder_of(tmp_path / "in", 2, split="validation"), 2, split="test")
    assert splits(tmp_path / "in") == ("val", "test")
    assert (
        pictures(tmp_path / "in", "validation").ids
        == pictures(tmp_path / "in", "val").ids
        == ["validation-a.0", "validation-a.1"]
    )
    refused(tmp_path / "in", "no split train", "val, test")
    refused(both[1], "no split test", "train, val", split="test")


def test_one_item_and_errors_of_the_index(both):
    p = pictures(both[0])
    assert p[-1]["id"] == p.ids[-1] and p.row(0).keys() == {"id", "text", "texts", "label"}
    with pytest.raises(IndexError):
        p[13]


def test_a_row_does_not_open_its_picture(tmp_path):
    folder = folder_of(tmp_path / "in", 2)
    p = pictures(folder)
    (folder / "train/p1.png").write_bytes(b"rubbish")
    assert p.row(1)["texts"] == ["über 1"]
    with pytest.raises(BadImage, match="p1.png"):
        p.image(1)
    (folder / "train/p1.png").unlink()
    with pytest.raises(BadImage, match="p1.png"):
        p[1]


def test_rows_without_ids_are_called_by_their_file(tmp_path):
    folder = folder_of(tmp_path / "in", 2)
    write_rows(folder / "train", [{"file_name": "p0.png"}, {"file_name": "p1.png", "id": 7}])
    p = pictures(folder)
    assert p.ids == ["p0", "7"] and p.row(0) == {"id": "p0", "texts": []}


def test_a_table_at_the_top_speaks_for_all_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.png").write_bytes(picture(9, 9, format="PNG"))
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/x.png,here\ntest/x.png,there\n")
    assert [pictures(tmp_path, s).row(0)["texts"] for s in ("train", "test")] == [["here"], ["there"]]


# ---- class folders
def test_folders_are_classes(tmp_path):
    for split, names in (("train", ("n2", "n1")), ("val", ("n2",))):
        for n in names:
            (tmp_path / split / n).mkdir(parents=True)
            for i in range(2):
                (tmp_path / split / n / f"{n}_{i}.JPEG").write_bytes(picture(12, 10, seed=i))
    train, val = pictures(tmp_path), pictures(tmp_path, "val")
    assert train.classes == val.classes == ("n1", "n2") and train.ids == [
        "n1/n1_0",
        "n1/n1_1",
        "n2/n2_0",
        "n2/n2_1",
    ]
    assert (
        [train.row(i)["label"] for i in range(4)] == [0, 0, 1, 1]
        and val.row(0)["label"] == 1
        and val.row(0)["class"] == "n2"
    )
    (tmp_path / "val/n3").mkdir()
    (tmp_path / "val/n3/a.png").write_bytes(picture(format="PNG"))
    refused(tmp_path, "val/n3", "no class of train")
    shutil.rmtree(tmp_path / "val/n3")
    (tmp_path / "train/loose.png").write_bytes(picture(format="PNG"))
    refused(tmp_path, "train/loose.png", "beside the folders")


def test_a_plain_folder_of_pictures_is_one_split_without_classes(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(picture(12, 10, seed=i))
    p = pictures(tmp_path)
    assert (
        splits(tmp_path) == ("train",)
        and p.ids == ["0", "1", "2"]
        and p.classes == ()
        and p.row(0) == {"id": "0", "texts": []}
    )
    assert "label" not in Squares(p, Transform(4))[0]


# ---- hostile and broken metadata
@pytest.mark.parametrize(
    "name, words",
    [
        ("../../secret.png", ["outside its folder", "line 2"]),
        ("/etc/x.png", ["outside its folder"]),
        ("a\\b.png", ["outside its folder"]),
        ("p9.png", ["missing: train/p9.png"]),
        ("p0.png", ["p0.png again"]),
    ],
)
def test_rows_that_lead_elsewhere_are_refused(tmp_path, name, words):
    folder = folder_of(tmp_path / "in", 2)
    (tmp_path / "secret.png").write_bytes(picture(format="PNG"))
    write_rows(folder / "train", [{"file_name": "p0.png"}, {"file_name": name}])
    refused(folder, *words)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"file_name": "p0.png"}\n', ["extra: train/p1.png"]),
        ('{"file_name": "p0.png"}\n{"file_na\n', ["line 2 is broken"]),
        ('{"name": "p0.png"}\n', ["no file_name"]),
        ("[1]\n", ["line 1 is broken"]),
    ],
)
def test_rows_and_pictures_must_belong_together(tmp_path, text, words):
    folder = folder_of(tmp_path / "in", 2)
    (folder / "train/metadata.jsonl").write_text(text)
    refused(folder, *words)


def test_a_table_that_is_no_text(tmp_path):
    folder = folder_of(tmp_path / "in", 2)
    (folder / "train/metadata.jsonl").write_bytes(b"\xff\xfe\x00{")
    refused(folder, "train/metadata.jsonl", "not UTF-8")


def test_a_table_whose_pictures_are_all_gone(tmp_path):
    folder = folder_of(tmp_path / "in", 2)
    for p in (folder / "train").glob("*.png"):
        p.unlink()
    refused(folder, "missing: train/p0.png")


def test_two_items_with_one_id_are_refused(tmp_path):
    folder = folder_of(tmp_path / "in", 3, id=lambda i: ["a", "b", "a"][i])
    refused(folder, "p0.png", "p2.png", "same id a")
    refused(folder, "same id a", max_samples=1)


def test_unfinished_folders_are_refused(tmp_path):
    with Work(tmp_path / "half", {"set": "x"}) as w:
        folder_of(w.folder / "x", 1)
    refused(tmp_path / "half", "begun and not finished")
    refused(tmp_path / "half.partial", "begun and not finished")


def test_manifests_of_another_form(tmp_path):
    folder = folder_of(tmp_path / "in", 2)
    for text in ('{"name": "of another program"}', "[1, 2]"):
        (folder / "manifest.json").write_text(text)
        assert pictures(folder).licence == ""
    (folder / "manifest.json").write_text('{"layouts": {"x": []}, "licence": {"name": "x"}}')
    refused(folder, "manifest.json", "unknown form")


@pytest.mark.parametrize("classes", ["[1, 2, {}]", '{"b": 1, "a": 0}', '[{"label": 1, "name": "x"}]', "7"])
def test_class_names_of_another_form(tmp_path, classes):
    folder = folder_of(tmp_path / "in", 2)
    (folder / "classes.json").write_text(classes)
    refused(folder, "classes.json", "labels 0, 1, 2")


@pytest.mark.parametrize("value, classes", [(3, "abc"), (-1, ""), ("x", "abc"), (True, "abc"), (1.5, "")])
def test_labels_must_be_classes(tmp_path, value, classes):
    folder = folder_of(tmp_path / "in", 1, label=lambda i: value)
    (folder / "classes.json").write_text(json.dumps([{"label": k, "name": n} for k, n in enumerate(classes)]))
    with pytest.raises(UserError, match="p0.png: its label"):
        pictures(folder).row(0)


def test_names_of_classes_become_numbers(tmp_path):
    folder = folder_of(tmp_path / "in", 3, kind=lambda i: "cba"[i])
    (folder / "classes.json").write_text('["a", "b", "c"]')
    p = pictures(folder, label_column="kind")
    assert [p.row(i)["label"] for i in range(3)] == [2, 1, 0]
    write_rows(
        folder / "train",
        [{"file_name": f"p{i}.png", "label": 1, "kind": "b" if i else None} for i in range(3)],
    )
    p = pictures(folder, label_column="kind")
    assert (
        "label" not in p.row(0) and p.row(1)["label"] == 1
    )  # the label of another column is not taken in its place


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").write_bytes(b"")
    refused(tmp_path / "empty", "holds no pictures")
    refused(tmp_path / "tars", "no index.json", "sdcourse shards")
    refused(tmp_path / "nowhere/at/all", "no such folder")
    refused("./nowhere", "no such folder")
    (tmp_path / "both/val/").mkdir(parents=True)
    (tmp_path / "both/validation").mkdir()
    for s in ("val", "validation"):
        (tmp_path / "both" / s / "x.png").write_bytes(picture(format="PNG"))
    refused(tmp_path / "both", "val/ and validation/")


# ---- columns and captions
def test_captions_come_from_the_columns_that_are_asked_for(tmp_path):
    folder = folder_of(
        tmp_path / "in",
        3,
        text=lambda i: [" one ", "", "two"] if i else None,
        other=lambda i: "three",
        number=lambda i: i,
    )
    assert [pictures(folder).row(i)["texts"] for i in range(2)] == [[], ["one", "two"]]
    assert pictures(folder, caption_column="other,text").row(1)["texts"] == ["three", "one", "two"]
    refused(folder, "no column txt", "--caption-column", "text, label, other", caption_column="txt")
    refused(folder, "no column class", "--label-column", label_column="class")
    with pytest.raises(UserError, match="p1.png: its caption is int"):
        pictures(folder, caption_column="number").row(1)


def test_another_column_may_name_the_pictures(tmp_path):
    folder = folder_of(tmp_path / "in", 2)
    write_rows(
        folder / "train", [{"image": "p1.png", "file_name": "x"}, {"image": "p0.png", "file_name": "y"}]
    )
    assert pictures(folder, image_column="image").image(0).size == (21, 32)
    refused(folder, "no img", image_column="img")


def test_columns_of_tars(both):
    refused(both[1], "no column x", image_column="x")
    refused(both[1], "no column words", "text, label", caption_column="words")


def test_captions_of_foreign_tars(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "part-0.tar", "w") as tar:
        for name, data in (
            ("a.jpg", picture()),
            ("a.txt", b" from txt "),
            ("a.cls", b"4"),
            ("b.jpg", picture(seed=1)),
            ("b.json", b'{"caption": "from json"}'),
            ("c.jpg", picture(seed=2)),
            ("c.json", b"{"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    sh.index_folder(tmp_path, tmp_path)
    assert splits(tmp_path) == ("train",)
    p = pictures(tmp_path, "train")
    assert p.row(0)["texts"] == ["from txt"] and p.row(0)["label"] == 4 and p.row(1)["texts"] == ["from json"]
    with pytest.raises(UserError, match="part-0/c of .*caption is broken"):
        p.row(2)


def test_a_choice_is_spread_nested_and_in_order(tmp_path):
    folder = folder_of(tmp_path / "in", 13)
    whole, chosen = pictures(folder).ids, [pictures(folder, max_samples=n) for n in (3, 5, 99)]
    for p, n in zip(chosen, (3, 5, 13)):
        assert len(p) == n and p.ids == [i for i in whole if i in p.ids]
    assert set(chosen[0].ids) < set(chosen[1].ids) and chosen[1].ids != whole[:5] and chosen[2].ids == whole
    for i in range(5):
        assert (
            chosen[1].image(i).size[0] == 20 + whole.index(chosen[1].ids[i])
            and chosen[1].row(i)["id"] == chosen[1].ids[i]
        )
    refused(folder, "--max-samples -1", max_samples=-1)


# ---- D6: scans
def corrupt(folder):
    "Every bad kind beside 12 good pictures; the good ones include EXIF, RGBA and palette."
    home = folder_of(folder, 12) / "train"
    good = {
        "rgba.png": picture(16, 12, format="PNG", mode="RGBA"),
        "palette.png": picture(16, 12, seed=3, format="PNG", mode="P"),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    good["turned.jpg"] = picture(30, 20, seed=4, exif=exif)
    bad = {
        "cut.jpg": picture()[:2000],
        "empty.jpg": b"",
        "cmyk.jpg": picture(mode="CMYK"),
        "wrong.png": picture(seed=5),
        "dot.png": picture(1, 1, format="PNG"),
        "zcopy.png": (home / "p0.png").read_bytes(),
        "page.jpg": b"<html></html>",
    }
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(out, "PNG")
    bad["deep.png"] = out.getvalue()
    out = io.BytesIO()
    Image.new("L", (20_000, 5)).save(out, "PNG")
    bad["long.png"] = out.getvalue()
    for name, data in (good | bad).items():
        (home / name).write_bytes(data)
    write_rows(
        home,
        [json.loads(l) for l in (home / "metadata.jsonl").read_text().splitlines()]
        + [{"file_name": n, "label": 0} for n in good | bad],
    )
    return folder, set(good), set(bad)


def test_what_a_scan_found_bad_is_left_out(tmp_path):
    folder, good, bad = corrupt(tmp_path / "in")
    cfg = scans.Scan(limit=0.5, out=str(tmp_path / "scan.json"))
    found = scans.scan(folder, cfg, flag=Never())
    assert {Path(b["file"]).name for b in found["bad"]} == bad
    (folder / "scan.json").write_text(json.dumps(found))
    p = pictures(folder)
    assert (
        len(p) == 15
        and not {Path(b).stem for b in bad} & set(p.ids)
        and {Path(g).stem for g in good} <= set(p.ids)
    )
    batch = Squares(p, Transform(8)).__getitems__(list(range(15)))
    assert batch["image"].shape == (15, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert p.image(p.ids.index("turned")).size == (20, 30)
    (folder / "scan.json").write_text(json.dumps(found | {"limit": 0.01}))
    refused(folder, "more than 1.00%")
    (folder / "scan.json").write_text(json.dumps(found))
    (folder / "train/p0.png").write_bytes(picture(99, 99, format="PNG"))
    refused(folder, "changed since it was scanned")


def test_a_cmyk_picture_that_nobody_scanned_is_still_rgb(tmp_path):
    (tmp_path / "x.jpg").write_bytes(picture(mode="CMYK"))
    assert pictures(tmp_path).image(0).mode == "RGB"


def test_what_may_not_be_read():
    """A closed picture is named when it is asked for; a closed folder is refused, for nobody knows what is in
    it.
    """
    with OpenFolder() as home:
        folder = folder_of(home / "in", 3)
        for p in (folder / "train").iterdir():
            p.chmod(0o644)
        (folder / "train/p1.png").chmod(0)

        def ask(what):
            try:
                return what()
            except UserError as e:
                return str(e)

        said = as_nobody(lambda: ask(lambda: pictures(folder).image(1).size))
        assert "Permission denied" in said and "p1.png" in said and "\n" not in said
        (folder / "closed").mkdir(mode=0)
        assert "closed (Permission denied)" in as_nobody(lambda: ask(lambda: len(pictures(folder))))


def test_a_bomb_is_refused_by_name(tmp_path):
    import struct

    (tmp_path / "bomb.bmp").write_bytes(
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    with pytest.raises(BadImage, match="huge: .*bomb.bmp"):
        pictures(tmp_path).image(0)


# ---- digests
def test_digests_tell_pictures_apart_and_follow_the_manifest(both, tmp_path):
    a, b = map(pictures, both)
    for p in (a, b):
        assert len({p.digest(i) for i in range(len(p))}) == len(p)
    assert a.digest(0) == "sha256:" + hashlib.sha256((both[0] / "train/p0.png").read_bytes()).hexdigest()
    manifest = json.loads((both[1] / "manifest.json").read_text())
    sums = {f["path"]: f["sha256"] for f in manifest["layouts"]["prepared"]["files"]}
    assert b.digest(0).split(":")[1] == sums["train-00000.tar"] and b.licence == "not recorded"
    folder = shutil.copytree(both[0], tmp_path / "in")
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {"layouts": {"x": {"files": [{"path": "train/p0.png", "sha256": "ab" * 32}]}}})
    )
    assert pictures(folder).digest(0) == "sha256:" + "ab" * 32 and pictures(folder).digest(1) == a.digest(1)
    (folder / "manifest.json").write_text(
        json.dumps(
            manifest
            | {"layouts": {"x": {"files": [{"path": "train/p0.png", "size": 7, "sha256": "ab" * 32}]}}}
        )
    )
    refused(folder, "train/p0.png", "the manifest says 7", "sdcourse verify")


# ---- squares
def test_a_square_is_the_antialiased_middle():
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    x = Transform(20)(im)
    expected = np.asarray(im.resize((30, 20), Image.Resampling.BICUBIC))[:, 5:25]
    assert (
        x.dtype == torch.uint8
        and x.shape == (3, 20, 20)
        and x.is_contiguous()
        and np.array_equal(x.permute(1, 2, 0).numpy(), expected)
    )
    assert np.array_equal(Transform(20, "adm")(im).permute(1, 2, 0).numpy(), np.asarray(centre_crop(im, 20)))
    assert np.array_equal(
        Transform(20, "none")(im).permute(1, 2, 0).numpy(),
        np.asarray(im.resize((20, 20), Image.Resampling.BICUBIC)),
    )
    for side, size in ((s, t) for s in range(1, 99) for t in (1, 7, 50) if int(s * (t / s)) < t):
        assert Transform(size)(Image.new("RGB", (side, side + 5))).shape == (3, size, size), (side, size)
    assert Transform(50)(im).shape == (3, 50, 50) and Transform(3)(im.resize((1, 7))).shape == (3, 3, 3)


def test_random_crops_reach_every_place_and_no_further():
    ramp = Image.fromarray(
        np.stack(np.broadcast_arrays(np.arange(6)[:, None], np.arange(9)[None], 0), 2).astype(np.uint8)
    )
    t = Transform(6, "random")
    lefts = Counter(int(t(ramp, (u / 400, 0.5))[1, 0, 0]) for u in range(400))
    assert lefts == {k: 100 for k in range(4)}
    assert int(t(ramp, (1 - 2**-32, 1 - 2**-32))[1, 0, 5]) == 8


def test_nonsense_and_missing_places_are_refused(both):
    with pytest.raises(UserError, match="--size 0"):
        Transform(0)
    with pytest.raises(UserError, match="did you mean 'center'"):
        Transform(8, "centre")
    with pytest.raises(UserError, match="needs a place"):
        Transform(8, "random")(Image.new("RGB", (9, 9)))
    with pytest.raises(UserError, match="position of an item"):
        Squares(pictures(both[0]), Transform(8, "random"))[0]


def test_keys_say_what_matters():
    keys = [json.dumps(Transform(*a).key) for a in ((8,), (9,), (8, "random"), (8, "none"), (8, "adm"))]
    assert len(set(keys)) == 5


def test_all_items_have_a_label_or_none(tmp_path):
    folder = folder_of(tmp_path / "in", 2, label=lambda i: i or None)
    with pytest.raises(UserError, match="train-a.0: has no label"):
        Squares(pictures(folder), Transform(8)).__getitems__([0, 1])


# ---- D1, D2: order
def read(data, *, world=1, micro=0, workers=0, start=0, stop=10, batch=8, seed=5):
    "[(step, batch of all ranks)]: what the ranks of a run read from a data set, put together."
    order, out = Order(len(data), seed), {}
    for r in range(world):
        plan = Plan(
            order, batch, tuple(micro_rows(rank_rows(batch, r, world), micro)), start, stop, data.by_position
        )
        loader = torch.utils.data.DataLoader(
            data, batch_sampler=plan, num_workers=workers, collate_fn=collate
        )
        for k, b in enumerate(loader):
            out.setdefault(start + k // len(plan.micros), []).append(b)
    return {
        s: dict(
            id=sum((b["id"] for b in bs), []),
            texts=sum((b["texts"] for b in bs), []),
            image=torch.cat([b["image"] for b in bs]),
            label=torch.cat([b["label"] for b in bs]),
        )
        for s, bs in out.items()
    }


@pytest.mark.parametrize("which", [0, 1])
def test_items_stay_paired_over_three_epochs_and_two_ranks(both, which):
    "D1: picture, caption and label of every item in every batch are those of its id."
    data = pictures(both[which])
    truth = {
        f"train-a.{k}": dict(image=Image.open(both[0] / f"train/p{k}.png"), texts=[f"über {k}"], label=k % 3)
        for k in range(13)
    }  # as `folder_of` made them
    steps, wrong, seen = (
        read(Squares(data, Transform(8)), world=2, micro=3, stop=5),
        0,
        Counter(),
    )  # 5 x 8 = 40 > 3 x 13
    for b in steps.values():
        for name, image, texts, label in zip(b["id"], b["image"], b["texts"], b["label"].tolist()):
            t = truth[name]
            wrong += not (
                torch.equal(image, Transform(8)(t["image"])) and texts == t["texts"] and label == t["label"]
            )
            seen[name] += 1
    assert wrong == 0 and sum(seen.values()) == 40 and min(seen.values()) >= 3


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (2, 2), (3, 1)])
def test_each_sample_once_per_epoch(both, which, world, workers):
    "D2: 13 items in batches of 8; the stream of ids is whole epochs, whoever reads it."
    data = pictures(both[which])
    stream = [
        i
        for _, b in sorted(read(Squares(data, Transform(4)), world=world, workers=workers, stop=13).items())
        for i in b["id"]
    ]
    for epoch in range(8):
        assert sorted(stream[13 * epoch : 13 * epoch + 13]) == sorted(data.ids)
    assert stream[:13] != stream[13:26]


def test_random_crops_depend_on_seed_and_position_alone(both):
    """One rank or two, none or two workers, resumed or not: the same pixels; the next epoch and another seed
    give others.
    """
    make = lambda seed=3: Squares(pictures(both[0]), Transform(8, "random"), seed)
    whole = read(make(), stop=8)
    for other in (
        read(make(), world=2, stop=8),
        read(make(), world=2, micro=3, workers=2, stop=8),
        read(make(), start=5, stop=8),
    ):
        for s, b in other.items():
            assert b["id"] == whole[s]["id"] and torch.equal(b["image"], whole[s]["image"])
    assert not torch.equal(read(make(4), stop=8)[0]["image"], whole[0]["image"])
    crops = {}
    for s, b in whole.items():
        for name, image in zip(b["id"], b["image"]):
            crops.setdefault(name, []).append(image)
    assert (
        min(map(len, crops.values())) >= 4
        and sum(any(not torch.equal(c[0], x) for x in c) for c in crops.values()) >= 11
    )


# ---- the engine
@dataclass
class SquareConfig(toy.ToyConfig):
    folder: str = ""  # data
    crop: str = "random"


class SquareNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.seen = nn.Linear(48, 1), []

    def forward(self, batch, draws):
        self.seen.append((self.training, batch["id"], batch["texts"], batch["image"]))
        x = self.line(batch["image"].flatten(1).float() / 255)[:, 0]
        return (x - draws.uniform("t")).square(), draws.uniform("t")


class SquareTask(toy.ToyTask):
    def build(self):
        return SquareNet()

    def blocks(self, module):
        return []

    def measure(self, module):
        return {}

    def dataset(self, split):
        return Squares(
            pictures(self.config.folder, {"validate": "val"}.get(split, split)),
            Transform(4, self.config.crop),
            self.config.seed,
        )


def run_squares(out, folder, **over):
    "Train on squares; (result, weights, what the module saw)."
    cfg = SquareConfig(
        **dict(
            out=str(out),
            folder=str(folder),
            max_steps=6,
            batch_size=8,
            lr=1e-2,
            device="cpu",
            log_every=3,
            checkpoint_every=3,
            ema_decay=0.0,
            clip=1.0,
        )
        | over
    )
    task, nets = SquareTask(cfg), []
    task.build = lambda: nets.append(SquareNet()) or nets[-1]
    result = train(task)
    return result, nets[-1].line.weight.detach().clone() if nets else None, nets[-1].seen if nets else []


def test_the_engine_trains_on_random_crops_and_resumes_bitwise(both, tmp_path):
    "The loop asks for pairs, compares ids, validates on fixed crops; three steps and three more are six."
    whole, w, seen = run_squares(tmp_path / "whole", both[0], validate_every=3)
    assert whole.step == 6 and np.isfinite(whole.metrics["val_loss"])
    val = [(i, x) for training, i, _, x in seen if not training]
    assert (
        len(val) == 2
        and val[0][0] == val[1][0] == pictures(both[0], "val").ids
        and torch.equal(val[0][1], val[1][1])
    )
    expected = read(Squares(pictures(both[0]), Transform(4, "random"), 0), stop=6, seed=0)
    for s, (_, ids, texts, x) in enumerate(v for v in seen if v[0]):
        assert (
            ids == expected[s]["id"]
            and texts == expected[s]["texts"]
            and torch.equal(x, expected[s]["image"])
        )
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/export")
    shutil.rmtree(tmp_path / "part/checkpoints/step-00000006", ignore_errors=True)
    for p in (tmp_path / "part/checkpoints").glob("step-*"):
        if int(p.name[5:]) > 3:
            shutil.rmtree(p)
    again, w2, seen2 = run_squares(tmp_path / "part", both[1], num_workers=2, validate_every=0, force=True)
    assert again.step == 6 and sum(v[0] for v in seen2) == 3 and torch.equal(w, w2)


def test_training_goes_on_without_the_bad_ones_or_says_which(tmp_path):
    folder, good, bad = corrupt(tmp_path / "in")
    for workers in (0, 2):
        with pytest.raises(UserError) as e:
            run_squares(tmp_path / f"bad{workers}", folder, num_workers=workers, max_steps=5)
        assert (
            "\n" not in str(e.value)
            and any(b in str(e.value) for b in bad)
            and "sdcourse scan" in str(e.value)
        ), str(e.value)
    (folder / "scan.json").write_text(json.dumps(scans.scan(folder, scans.Scan(limit=0.5), flag=Never())))
    result, _, seen = run_squares(tmp_path / "good", folder, max_steps=5, num_workers=2)
    assert result.step == 5 and {i for _, ids, _, _ in seen for i in ids} == set(pictures(folder).ids)


# ---- hub sets
def hub_folder(home, n=9, path=None, **extra):
    "Parquet as the hub keeps it, with a card; the first picture may be only a path."
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    features = {"image": {"_type": "Image"}, "kind": {"names": ["x", "y"], "_type": "ClassLabel"}} | {
        k: {"dtype": "string", "_type": "Value"} for k in ("text", *extra)
    }
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("kind", pa.int64()),
            ("text", pa.string()),
            *((k, pa.string()) for k in extra),
        ],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    (home / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [
            {
                "image": {
                    "bytes": None if path and not i else picture(20 + i, 30, seed=i, format="PNG"),
                    "path": str(path or "") if not i else f"{i}.png",
                },
                "kind": i % 2,
                "text": f"{split} {i}",
                **{k: v(i) for k, v in extra.items()},
            }
            for i in range(n)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema), home / "data" / f"{split}-00000-of-00001.parquet")
    (home / "README.md").write_text("---\nlicense: mit\n---\n# A set\n")
    return home


@pytest.fixture
def cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_a_local_copy_of_a_hub_set(tmp_path, cache):
    home = hub_folder(tmp_path / "set", other=lambda i: f"other {i}")
    assert splits(home) == ("train", "val")
    p = pictures(home, "validation", caption_column="other")
    assert p.ids[:2] == ["val-0000000", "val-0000001"] and p.classes == ("x", "y")
    assert p.row(3) == {
        "id": "val-0000003",
        "kind": 1,
        "text": "validation 3",
        "other": "other 3",
        "texts": ["other 3"],
        "label": 1,
    }
    assert (
        p.image(4).size == (24, 30)
        and p.image(4).tobytes() == Image.open(io.BytesIO(picture(24, 30, seed=4, format="PNG"))).tobytes()
    )
    assert len({p.digest(i) for i in range(9)}) == 9 and p.digest(0) == pictures(home).digest(0)
    assert pictures(home, max_samples=4).ids == [
        p.ids[i].replace("val", "train")
        for i in np.sort(np.asarray([int(x[-1]) for x in pictures(home, max_samples=4).ids]))
    ]
    data = Squares(pictures(home), Transform(8))
    assert next(iter(torch.utils.data.DataLoader(data, batch_size=4, num_workers=1, collate_fn=collate)))[
        "label"
    ].tolist() == [0, 1, 0, 1]


def test_columns_of_hub_sets(tmp_path, cache):
    home = hub_folder(tmp_path / "set")
    refused(home, "no column picture", "image, kind, text", image_column="picture")
    refused(home, "no column text, or no pictures in it", image_column="text")
    refused(home, "no column words", "kind, text", caption_column="words")
    refused(home, "no split test", "train, val", split="test")
    with pytest.raises(UserError, match="its text train 0 is no number of a class"):
        pictures(home, label_column="text").row(0)


def test_a_row_that_names_a_file_of_yours(tmp_path, cache):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(format="PNG"))
    p = pictures(hub_folder(tmp_path / "set", path=secret))
    with pytest.raises(BadImage, match="outside the data set"):
        p.image(0)
    assert p.image(1).size == (21, 30)


def test_a_set_saved_by_datasets(tmp_path, cache):
    hub_folder(tmp_path / "set")
    cache.load_dataset(str(tmp_path / "set")).save_to_disk(tmp_path / "saved")
    a, b = pictures(tmp_path / "saved", "val"), pictures(tmp_path / "set", "val")
    assert a.ids == b.ids and a.image(2).tobytes() == b.image(2).tobytes() and a.classes == b.classes
    cache.load_dataset(str(tmp_path / "set"), split="train").save_to_disk(tmp_path / "one")
    assert splits(tmp_path / "one") == ("train",)


def test_no_hub_says_what_would_do(cache):
    refused("nobody/nothing", "cannot be reached", "--local-dir")
    refused("nobody/nothing:config", "cannot be reached")


def test_a_set_with_a_script_runs_nothing(tmp_path, cache):
    home = hub_folder(tmp_path / "set")
    for name in ("set.py", "data.py"):
        (home / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    try:
        pictures(home)
    except UserError:
        pass
    assert not (tmp_path / "ran").exists()


def test_broken_parquet(tmp_path, cache):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.parquet").write_bytes(b"PAR1rubbish")
    refused(tmp_path / "set", "set/train.parquet: is cut off, empty or no parquet file")


def test_bad_rows_of_a_hub_set_are_listed_left_out_and_counted(tmp_path, cache, capsys, caplog):
    "Case 6: a null row, an empty and a cut picture, a copy; the rows that stay keep their numbers."
    home = hub_folder(tmp_path / "set", n=20)
    table = [dict(image=None, kind=0, text="a"), dict(image={"bytes": b"", "path": ""}, kind=1, text="b")]
    table += [dict(image={"bytes": picture(30, 20)[:-200], "path": "x.jpg"}, kind=1, text="c")]
    more_rows(home, table)
    with pytest.raises(BadImage) as e:
        pictures(home).image(20)
    command = re.search(r"sdcourse (scan \S+) lists such pictures", str(e.value))[1].split()
    with pytest.raises(UserError, match="row 20 of .*sdcourse scan"):
        pictures(home).digest(20)
    assert cli.main(command) == 1 and cli.main([*command, "--limit", "0.6"]) == 0
    found = json.loads((home / "scan.json").read_text())
    listed = {b["file"]: b["kind"] for b in found["bad"]}
    wrong = {
        "train/0000020/image": "empty",
        "train/0000021/image": "empty",
        "train/0000022/image": "truncated",
    }
    assert {k: v for k, v in listed.items() if v != "duplicate"} == wrong and found["pictures"] == 43
    copies = [k for k, v in listed.items() if v == "duplicate"]
    assert copies == [f"train/{i:07}/image" for i in range(20)]  # validation has them, and held-out ones stay
    (home / "scan.json").write_text(
        json.dumps(found | {"bad": [b for b in found["bad"] if b["kind"] != "duplicate"]})
    )
    data = pictures(home)
    assert "3 of 23 pictures are bad, as scan.json says" in caplog.text
    assert data.ids == [f"train-{i:07}" for i in range(20)] and data.row(19)["text"] == "train 19"
    assert data.image(19).size == (39, 30) and len(pictures(home, "val")) == 20
    more_rows(home, [dict(image=None, kind=0, text="a")])
    refused(home, "changed since it was scanned")


def more_rows(home, rows):
    "Put rows behind those of train."
    import pyarrow as pa, pyarrow.parquet as pq

    path = home / "data/train-00000-of-00001.parquet"
    old = pq.read_table(path)
    pq.write_table(pa.concat_tables([old, pa.Table.from_pylist(rows, old.schema)]), path)


def test_left_out_rows_do_not_shift_the_others(tmp_path, cache):
    home = hub_folder(tmp_path / "set", n=6)
    assert cli.main(["scan", str(home), "--limit", "1"]) == 0
    found = json.loads((home / "scan.json").read_text())
    bad = [{"file": f"train/{i:07}/image", "kind": "truncated", "detail": ""} for i in (0, 2, 3)]
    (home / "scan.json").write_text(json.dumps(found | {"bad": bad}))
    data = pictures(home)
    assert data.ids == [f"train-{i:07}" for i in (1, 4, 5)]
    assert [data.row(i)["text"] for i in range(3)] == ["train 1", "train 4", "train 5"]
    assert [data.image(i).size[0] for i in range(3)] == [21, 24, 25]
    with pytest.raises(UserError, match="row 4 of"):
        pictures(home, label_column="text").row(1)


def test_each_column_of_pictures_is_scanned_by_itself(tmp_path, cache):
    import pyarrow as pa, pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {c: {"_type": "Image"} for c in ("image", "edited")}
    schema = pa.schema(
        [("image", kind), ("edited", kind)], {"huggingface": json.dumps({"info": {"features": features}})}
    )
    cells = [{"bytes": picture(20 + i, 30, seed=i, format="PNG"), "path": None} for i in range(5)]
    rows = [{"image": c, "edited": c} for c in cells[:4]] + [{"image": cells[4], "edited": None}]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "set/train.parquet")
    assert cli.main(["scan", str(tmp_path / "set"), "--limit", "0.5"]) == 0
    found = json.loads((tmp_path / "set/scan.json").read_text())
    assert [b["file"] for b in found["bad"]] == ["train/0000004/edited"]
    assert len(pictures(tmp_path / "set")) == 5
    assert len(pictures(tmp_path / "set", image_column="edited")) == 4


def test_a_hub_name_says_to_scan_a_copy(tmp_path, cache, monkeypatch):
    "No remedy is named that does not work: scan.json needs a folder."
    home = hub_folder(tmp_path / "set", n=2)
    more_rows(home, [dict(image=None, kind=0, text="a")])
    monkeypatch.setattr(
        "sdcourse.data.sources._load_hub", lambda _: dict(train=cache.load_dataset(str(home), split="train"))
    )
    with pytest.raises(BadImage, match="take a local copy, .* sdcourse scan lists there is left out"):
        pictures("owner/name").image(2)
    assert cli.main(["scan", "owner/name"]) == 2


def test_test_labels_of_the_hub_are_none(tmp_path, cache):
    "Case 32: -1 is the hub's word for no label."
    home = hub_folder(tmp_path / "set", n=3)
    import pyarrow.parquet as pq

    table = pq.read_table(home / "data/train-00000-of-00001.parquet")
    table = table.set_column(1, table.schema.field(1), [[-1, -1, -1]])
    pq.write_table(table, home / "data/test-00000-of-00001.parquet")
    assert splits(home) == ("train", "val", "test")
    assert [pictures(home, "test").row(i).get("label") for i in range(3)] == [None] * 3
    assert [pictures(home).row(i)["label"] for i in range(3)] == [0, 1, 0]


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_pictures_in_parquet_without_the_hubs_notes(tmp_path, cache, kind):
    "Case 33: as pandas and pyarrow write them; what shows no picture is none."
    import pyarrow as pa, pyarrow.parquet as pq

    data = [picture(20 + i, 30, seed=i, format="PNG") for i in range(3)]
    cells = [{"bytes": d, "path": None} for d in data] if kind == "struct" else data
    table = {"image": [None, *cells], "text": ["w", "x", "y", "z"], "hash": [b"abc"] * 4}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(table), tmp_path / "set/train.parquet")
    found = pictures(tmp_path / "set")
    assert found.image(3).size == (22, 30) and found.row(3)["texts"] == ["z"] and "hash" in found.row(0)
    pq.write_table(pa.table({"hash": [b"abc"]}), tmp_path / "set/train.parquet")
    refused(tmp_path / "set", "has no column of pictures; its columns are hash")


@pytest.mark.parametrize("how", ["pointer", "cut", "empty"])
def test_a_parquet_file_that_is_none_is_named(tmp_path, cache, how):
    "Case 34: pointers of Git LFS, downloads that were cut, and empty files."
    path = hub_folder(tmp_path / "set") / "data/validation-00000-of-00001.parquet"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    path.write_bytes({"pointer": pointer, "cut": path.read_bytes()[:2000], "empty": b""}[how])
    remedy = "a pointer of Git LFS; fetch it" if how == "pointer" else "download it again"
    refused(tmp_path / "set", f"{path}: is ", remedy)
    (lay(tmp_path / "folder", "a.png") / "a.png").write_bytes(pointer)
    with pytest.raises(BadImage, match="a pointer of Git LFS; fetch it"):
        pictures(tmp_path / "folder").image(0)


# ---- nothing disappears without a count
def lay(home, *names):
    "Pictures of these names, all different."
    for i, name in enumerate(names):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(picture(20, 16, seed=i, format="PNG"))
    return home


def test_hidden_and_system_folders_are_no_classes(tmp_path):
    names = (
        "cat/1.png",
        "dog/3.png",
        ".ipynb_checkpoints/1.png",
        "__MACOSX/cat/._1.png",
        "@eaDir/x.png",
        "cat/._1.png",
    )
    data = pictures(lay(tmp_path, *names))
    assert data.classes == ("cat", "dog") and data.ids == ["cat/1", "dog/3"]
    assert [data.row(i)["label"] for i in range(2)] == [0, 1]


@pytest.mark.parametrize(
    "train, val, test",
    [("Train", "VAL", "Test"), ("training", "valid", "testing"), ("TRAIN", "Validation", "TEST")],
)
def test_splits_in_any_case_and_word(tmp_path, train, val, test):
    lay(tmp_path, f"{train}/a.png", f"{val}/b.png", f"{test}/c.png")
    assert splits(tmp_path) == ("train", "val", "test")
    assert [pictures(tmp_path, s).ids for s in splits(tmp_path)] == [["a"], ["b"], ["c"]]
    assert pictures(tmp_path, "TESTING").ids == ["c"] and not pictures(tmp_path).classes


def test_what_lies_beside_the_splits_is_counted_and_much_of_it_refused(tmp_path, caplog):
    few = lay(tmp_path / "few", *(f"train/{i}.png" for i in range(18)), "extra/9.png")
    assert len(pictures(few)) == 18
    assert "1 of 19 pictures lie in none of its splits (train), the first is extra/9.png" in caplog.text
    refused(lay(tmp_path / "many", "train/1.png", "valid/2.png", "extra/3.png", "4.png"), "2 of 4", "4.png")
    caplog.clear()
    strange = lay(tmp_path / "strange", *(f"{i}.png" for i in range(18)), "b.avif", "c.jfif")
    assert len(pictures(strange)) == 19 and "1 of 20 pictures have a format that is not read" in caplog.text
    assert "b.avif" in caplog.text
    refused(lay(tmp_path / "twice", "train/1.png", "Training/2.png"), "mean the same split")


def test_captions_beside_pictures_and_in_the_folders_of_classes(tmp_path):
    kohya = lay(tmp_path / "kohya", "1.png", "2.png")
    (kohya / "1.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    (kohya / "2.txt").write_text("a dog \u2028 here", encoding="utf-8")
    assert [pictures(kohya).row(i)["texts"] for i in range(2)] == [["a cat"], ["a dog \u2028 here"]]
    parts = lay(tmp_path / "parts", "00000/000000000.png", "00001/000010000.png")
    for p in sorted(parts.rglob("*.png")):
        p.with_suffix(".txt").write_text(p.stem)
    assert pictures(parts).classes == () and pictures(parts).row(1)["texts"] == ["000010000"]
    (parts / "00000/000000000.txt").unlink()
    refused(parts, "1 of 2 pictures have no .txt", "000000000.png")
    nested = lay(tmp_path / "nested", "train/cat/1.png", "train/dog/2.png")
    for c, n in (("cat", 1), ("dog", 2)):
        write_rows(nested / "train" / c, [{"file_name": f"{n}.png", "text": f"my {c}"}])
    rows = [pictures(nested).row(i) for i in range(2)]
    assert [(r["texts"], r["label"]) for r in rows] == [(["my cat"], 0), (["my dog"], 1)]
    (nested / "train/dog/metadata.jsonl").unlink()
    refused(nested, "train/dog/2.png", "has no row")


def test_what_img2dataset_writes_is_a_folder_of_pictures(tmp_path, caplog):
    "Case 58: layout `files`: parts with a table beside each; captions in .txt, numbers that are no classes."
    for part in ("00000", "00001"):
        lay(tmp_path, *(f"{part}/{part}000{i}.png" for i in range(2)))
        for p in (tmp_path / part).glob("*.png"):
            p.with_suffix(".txt").write_text(f"about {p.stem}")
            p.with_suffix(".json").write_text(json.dumps({"caption": "x", "status": "success"}))
        (tmp_path / f"{part}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{part}_stats.json").write_text("{}")
    data = pictures(tmp_path)
    assert len(data) == 4 and data.ids[0] == "00000/000000000"
    assert data.classes == () and all(data.row(i)["texts"] == [f"about {data.ids[i][6:]}"] for i in range(4))
    for p in tmp_path.rglob("*.txt"):
        p.unlink()
    assert pictures(tmp_path).classes == () and "label" not in pictures(tmp_path).row(0)
    assert not caplog.text


@pytest.mark.parametrize(
    "names, words",
    [
        (("metadata.jsonl", "metadata.csv"), "has metadata.csv and metadata.jsonl; remove one of them"),
        (("Metadata.jsonl",), "Metadata.jsonl: call it metadata.jsonl, or it is not read"),
        (("METADATA.CSV",), "METADATA.CSV: call it metadata.csv"),
        (("metadata.json",), "metadata.json is not read; captions are read from"),
        (
            ("metadata.parquet", "captions.json"),
            "captions.json and 1 more is not read; captions are read from",
        ),
        (
            ("metadata.jsonl", "train/metadata.jsonl"),
            "metadata.jsonl is not read; train/metadata.jsonl speaks for",
        ),
    ],
)
def test_tables_that_are_not_read_are_said(tmp_path, caplog, names, words):
    "Case 59."
    lay(tmp_path, "train/a.png", "train/b.png")
    for name in names:
        home = "" if "/" in name else "train/"
        rows = [{"file_name": f"{home}{n}.png", "text": "x"} for n in "ab"]
        text = "".join(json.dumps(r) + "\n" for r in rows)
        if name.lower().endswith("csv"):
            text = "file_name,text\ntrain/a.png,x\ntrain/b.png,y\n"
        (tmp_path / name).write_text(text)
    try:
        pictures(tmp_path)
        said = caplog.text
    except UserError as e:
        said = str(e)
    assert words in said


def test_a_split_without_a_table_beside_others_is_said(tmp_path, caplog):
    write_rows(lay(tmp_path, "train/a.png", "val/b.png") / "train", [{"file_name": "a.png", "text": "x"}])
    assert pictures(tmp_path, "val").row(0)["texts"] == []
    assert "its split val has no metadata.jsonl, and train has one" in caplog.text


def test_rows_that_name_no_picture_by_suffix_are_refused(tmp_path):
    "Case 24: a scan would not see them."
    for name in ("a.jxl", "b", "c.txt"):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / name).write_bytes(picture(format="PNG"))
        write_rows(lay(tmp_path / "in", "p.png"), [{"file_name": "p.png"}, {"file_name": name}])
        refused(tmp_path / "in", "has a format that is not read" if name != "a.jxl" else "a.jxl")
        shutil.rmtree(tmp_path / "in")


def test_labels_of_a_csv_are_numbers_and_long_fields_are_read(tmp_path):
    lay(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        ["file_name", "id", "text", "label"],
        ["a.png", "007", "x" * 200_000, "2"],
        ["b.png", "8", 'q", \u2028"', "0"],
        ["c.png", "9", "", ""],
    ]
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as f:
        csv.writer(f).writerows(rows)
    data = pictures(tmp_path)
    assert data.ids == ["007", "8", "9"] and [data.row(i).get("label") for i in range(3)] == [2, 0, None]
    assert data.row(0)["texts"] == ["x" * 200_000] and data.row(1)["texts"] == ['q", \u2028"']


DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = ['{"file_name": "a.png", "x": %s}' % x for x in ("NaN", "-Infinity", "1e999", "9" * 5000, DEEP)]


@pytest.mark.parametrize(
    "line", [*HOSTILE, '{"file_name": "a.png", "file_name": "a.png"}', '{"file_name": 123}']
)
def test_hostile_json_is_one_line(tmp_path, line):
    (lay(tmp_path, "a.png") / "metadata.jsonl").write_text(line + "\n")
    refused(tmp_path, "metadata.jsonl (line 1")


def test_beginnings_marks_and_halves_are_understood(tmp_path):
    lay(tmp_path, "a.png", "b.png")
    text = (
        r'{"file_name": "./a.png", "text": "cut \ud83d"}'
        + "\n"
        + '{"file_name": "file:b.png", "text": "\u2028\x85|\x0c"}\n'.replace("\x0c", "\\f")
    )
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    data = pictures(tmp_path)
    assert (
        data.row(0)["texts"] == ["cut \ufffd"] and data.ids == ["a", "b"] and "|" in data.row(1)["texts"][0]
    )


def test_links_to_folders_above_are_circles(tmp_path):
    "As a link to the root of the machine would be; one to a folder elsewhere is followed."
    lay(tmp_path / "mine", "cat/a.png")
    lay(tmp_path / "other", "b.png")
    lay(tmp_path, "above.png")
    for name, to in (("up", ".."), ("self", "."), ("dog", "../other")):
        (tmp_path / "mine" / name).symlink_to(to)
    assert pictures(tmp_path / "mine").ids == ["cat/a", "dog/b"]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (lay(tmp_path, "a.png") / "metadata.csv").write_text("file_name,text,text\na.png,x,y\n")
    refused(tmp_path, "metadata.csv: has the column text twice")


@pytest.mark.parametrize("id", ["[1, 2]", "{}", "true"])
def test_ids_are_texts_or_numbers(tmp_path, id):
    (lay(tmp_path, "a.png") / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "id": {id}}}\n')
    refused(tmp_path, "a.png: its id is ", "mend its row")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "id": ""}\n')
    assert pictures(tmp_path).ids == ["a"]


@pytest.mark.parametrize("kind", ["pipe", "device", "name"])
def test_pipes_devices_and_names_that_are_not_text(tmp_path, kind):
    lay(tmp_path, "a.png")
    lay_what_is_no_file(tmp_path, kind)
    refused(tmp_path, "UTF-8" if kind == "name" else "no plain file")


@pytest.mark.parametrize("sealed", [False, True])
def test_a_replaced_picture_of_the_same_size_has_another_digest(tmp_path, both, sealed):
    source = shutil.copytree(both[1] if sealed else both[0], tmp_path / "in")
    if sealed:
        tar = source / "train-00000.tar"
        (source / "manifest.json").touch()
        before = pictures(source).digest(0)
        data = bytearray(tar.read_bytes())
        data[600] ^= 1
        tar.write_bytes(data)
    else:
        before = pictures(source).digest(0)
        one = source / "train/p0.png"
        one.write_bytes(one.read_bytes()[:-1] + b"x")
    assert pictures(source).digest(0) != before


def test_a_tar_that_is_younger_than_its_manifest_keeps_its_digests(tmp_path, both):
    "A copy gives each file a new time, in any order."
    source = shutil.copytree(both[1], tmp_path / "in")
    before = pictures(source).digest(0)
    (source / "train-00000.tar").touch()
    assert pictures(source).digest(0) == before and before.startswith("tar:")


def test_a_prepared_picture_that_was_replaced_is_refused(tmp_path):
    folder = lay(tmp_path, "train/a.png")
    one = folder / "train/a.png"
    entry = {
        "path": "train/a.png",
        "size": one.stat().st_size,
        "sha256": hashlib.sha256(one.read_bytes()).hexdigest(),
    }
    manifest = {"layouts": {"x": {"files": [entry]}}, "licence": {"name": "mine"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert pictures(folder).digest(0) == "sha256:" + entry["sha256"]
    one.write_bytes(one.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="train/a.png: its bytes are not those of the manifest"):
        pictures(folder).digest(0)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
@example(["one\u2028two\x0cthree\x85four\u2029"])
@settings(max_examples=40)
def test_any_caption_comes_back_from_lines_and_tables(tmp_path_factory, texts):
    home = tmp_path_factory.mktemp("any")
    names = [f"{i}.png" for i in range(len(texts))]
    lay(home, *names)
    write_lines(home / "metadata.jsonl", [{"file_name": n, "text": t} for n, t in zip(names, texts)])
    data = pictures(home)
    assert (
        [data.row(i).get("text") for i in range(len(texts))]
        == texts
        == [r["text"] for r in read_lines(home / "metadata.jsonl")]
    )

"""Any folder of pictures becomes a data set: nothing is guessed, nothing is lost without a line, and what
looks alike is on one side of a split.
"""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data.images import image_bytes, open_image
from sdcourse.data.manifests import load_manifest, verify
from sdcourse.data.scan import look, near_duplicates, near_groups
from sdcourse.data.sets.folder import FolderOptions, prepare_pictures
from sdcourse.dataset import pictures, splits


def photo(i, size=(48, 40)):
    "A picture like no other."
    few = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(few).resize(size, Image.Resampling.BICUBIC)


def shot(i, size=(48, 40)):
    "Another picture of the same: a little brighter."
    return Image.fromarray(np.clip(np.asarray(photo(i, size)).astype(int) + 3, 0, 255).astype(np.uint8))


def folder(home, n=12, kind="jpg", **text):
    home.mkdir(parents=True)
    for i in range(n):
        photo(i, (40 + 4 * (i % 3), 40 + 8 * (i % 2))).save(home / f"{i:02}.{kind}")
    for name, said in text.items():
        (home / f"{name[1:]}.txt").write_text(said)
    return home


def made(home, out, **over):
    assert prepare_pictures(home, out, FolderOptions(**dict(captions="none", size=32, workers=1) | over))
    return out


def rows(out):
    return {
        s: {r["id"]: r for r in map(json.loads, (out / s / "metadata.jsonl").read_text().splitlines())}
        for s in ("train", "val", "test")
        if (out / s).is_dir()
    }


def reasons(out):
    return {r["id"]: r["reason"] for r in map(json.loads, (out / "failures.jsonl").read_text().splitlines())}


def refused(text, home, out, **over):
    with pytest.raises(UserError, match=text):
        made(home, out, **over)
    assert not out.exists()


def test_the_command_makes_what_readers_read(tmp_path, capsys):
    home = folder(tmp_path / "in", _00="a red house\n", _03="two trees")
    words = ["--size", "32", "--caption", "a photo", "--workers", "1", "--test-share", "0.25"]
    assert cli.run(["prepare", "folder", str(home), str(tmp_path / "out"), *words]) == 0
    assert "12 pictures (train" in capsys.readouterr().out
    texts = {
        r["id"]: r["texts"]
        for s in splits(tmp_path / "out")
        for d in [pictures(tmp_path / "out", s)]
        for r in d.rows(range(len(d)))
    }
    assert Counter(t for (t,) in texts.values()) == {"a photo": 10, "a red house": 1, "two trees": 1}
    assert texts["00"] == ["a red house"] and len(pictures(tmp_path / "out", "test")) == 3
    sizes = [pictures(tmp_path / "out", "train").image(i).size for i in range(3)]
    assert all(min(s) == 32 for s in sizes) and len(set(sizes)) > 1
    assert verify(load_manifest(tmp_path / "out/manifest.json"), tmp_path / "out") == []


def test_squares_are_cut_and_never_enlarged(tmp_path):
    home = folder(tmp_path / "in")
    photo(99, (30, 60)).save(home / "small.jpg")
    out = made(home, tmp_path / "out", square=True)
    assert {pictures(out, "train").image(i).size for i in range(5)} == {(32, 32)}
    assert reasons(out) == {"small": "tiny: 30 x 60 pixels"}


def test_a_picture_that_is_right_is_kept_byte_for_byte(tmp_path):
    home = folder(tmp_path / "in")
    out = made(home, tmp_path / "out", size=0)
    split, row = next((s, r["04"]) for s, r in rows(out).items() if "04" in r)
    assert (out / split / row["file_name"]).read_bytes() == (home / "04.jpg").read_bytes()


def test_what_cannot_be_used_is_listed_and_counted(tmp_path, capsys):
    home = folder(tmp_path / "in", n=20, kind="png")
    (home / "cut.png").write_bytes((home / "03.png").read_bytes()[:300])
    (home / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (home / "zz.png").write_bytes((home / "05.png").read_bytes())
    (home / "wrong.jpg").write_bytes(image_bytes(photo(77)))  # a PNG: its name does no harm
    (home / "notes.doc").write_text("no picture")
    out = made(home, tmp_path / "out", max_bad=0.2)
    said = reasons(out)
    assert said.keys() == {"cut", "phone", "zz"} and said["zz"] == "duplicate: of 05.png"
    assert said["phone"].startswith("format: heic is not read; HEIC: heif-convert")
    assert sum(map(len, rows(out).values())) == 21
    assert "3 left out (failures.jsonl)" in capsys.readouterr().out
    assert open_image((out / next(p for p in out.rglob("wrong.jpg"))).read_bytes()).size[1] == 32
    refused(
        r"3 of 24 pictures would be left out \(1 \w+, 1 \w+, 1 \w+\), such as .*or raise --max-bad",
        home,
        tmp_path / "x",
        max_bad=0.05,
    )


def test_a_folder_of_heic_alone_says_how_to_convert(tmp_path):
    home = tmp_path / "in"
    home.mkdir()
    (home / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    refused("heif-convert A.heic A.jpg", home, tmp_path / "out")
    (home / "a.heic").unlink()
    refused("holds no pictures", home, tmp_path / "out")


def test_pictures_that_look_alike_are_on_one_side(tmp_path):
    home = folder(tmp_path / "in", n=0)
    for i in range(20):
        photo(i).save(home / f"a{i}.png")
        shot(i).save(home / f"z{i}.png")
    for seed in range(3):
        out = made(home, tmp_path / f"out{seed}", seed=seed, val_share=0.2, test_share=0.2)
        side = {k: s for s, some in rows(out).items() for k in some}
        assert all(side[f"a{i}"] == side[f"z{i}"] for i in range(20)) and set(side.values()) == {
            "train",
            "val",
            "test",
        }
    alone = made(home, tmp_path / "alone", near_bits=-1, val_share=0.2, test_share=0.2)
    side = {k: s for s, some in rows(alone).items() for k in some}
    assert any(side[f"a{i}"] != side[f"z{i}"] for i in range(20))


def test_a_chain_of_likeness_is_one_group():
    "B is like A and like C, which are not alike; of the two, `near_duplicates` names one."
    a, b, c = ((0, 100 + 10 * i, 100, 100) for i in range(3))
    assert near_groups([a, c, None, b]) == [0, 0, 2, 0]
    assert near_duplicates([a, c, None, b]) == {3: 0}
    near = [(bits, 9, 9, 9) for bits in (0, 0b111, 0b111111)]  # three bits apart, one from the next
    assert near_groups([near[0], near[2], near[1]]) == [0, 0, 0]
    assert near_groups(near, bits=2) == [0, 1, 2] and near_groups([look(photo(i)) for i in range(9)]) == [
        *range(9)
    ]


def test_of_equal_pictures_that_with_a_caption_stays(tmp_path):
    home = folder(tmp_path / "in", n=20, _19="nineteen")
    (home / "00copy.jpg").write_bytes((home / "19.jpg").read_bytes())
    out = made(home, tmp_path / "out", captions="txt", caption="some")
    assert reasons(out) == {"00copy": "duplicate: of 19.jpg"}
    assert {r["19"]["text"] for r in rows(out).values() if "19" in r} == {"nineteen"}


def test_captions_of_a_table_and_splits_that_are_there(tmp_path):
    home = tmp_path / "in"
    for split in ("train", "validation"):
        folder(home / split, n=6 if split == "train" else 0)
    for i in range(20, 23):
        photo(i).save(home / f"validation/{i}.jpg")
    for split in ("train", "validation"):
        names = [p.name for p in sorted((home / split).glob("*.jpg"))]
        lines = [json.dumps({"file_name": n, "said": f"picture {n}"}) for n in names]
        (home / split / "metadata.jsonl").write_text("\n".join(lines))
    out = made(home, tmp_path / "out", captions="column", column="said")
    found = rows(out)
    assert found["val"].keys() == {"validation/20", "validation/21", "validation/22"}
    assert found["val"]["validation/20"]["text"] == "picture 20.jpg"
    refused("has no such column, it has said", home, tmp_path / "x", captions="column")


def test_captions_are_never_guessed(tmp_path):
    home = folder(tmp_path / "in", _00="one")
    refused(
        "11 of 12 pictures have no .txt beside them, the first is 01.jpg; give --caption TEXT for those",
        home,
        tmp_path / "out",
        captions="txt",
    )
    with pytest.raises(UserError, match="give it as --caption TEXT"):
        FolderOptions(captions="one").check()
    with pytest.raises(UserError, match="--caption x: has no effect with --captions none"):
        FolderOptions(captions="none", caption="x").check()
    with pytest.raises(UserError, match="--column said: has no effect with --captions txt"):
        FolderOptions(column="said").check()
    one = made(home, tmp_path / "one", captions="one", caption="a cat")
    assert {r["text"] for some in rows(one).values() for r in some.values()} == {"a cat"}


def test_refused_before_work_begins(tmp_path):
    home = folder(tmp_path / "in")
    refused("lies inside", home, home / "out")
    refused("no such folder", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="they leave nothing|leave nothing for training"):
        FolderOptions(val_share=0.5, test_share=0.5).check()
    with pytest.raises(UserError, match="--square: needs a side"):
        FolderOptions(square=True, size=0).check()


def test_a_stopped_look_goes_on(tmp_path, capsys, monkeypatch):
    home, out = folder(tmp_path / "in"), tmp_path / "out"

    class Soon:
        reason, asked = "a signal", 0

        def raised(self):
            self.asked += 1
            return self.asked > 5

        def clear_file(self):
            pass

    cfg = FolderOptions(captions="none", size=32, workers=1)
    assert not prepare_pictures(home, out, cfg, flag=Soon())
    assert "stopped (a signal)" in capsys.readouterr().out
    seen = len((tmp_path / "out.looked").read_text().splitlines())
    assert 3 < seen < 12
    made(home, out)
    assert not (tmp_path / "out.looked").exists() and sum(map(len, rows(out).values())) == 12


def test_what_others_left_is_no_reason_to_stop(tmp_path, capsys):
    "A STOP in the work of another command was obeyed, and taken away; a file of that name was written over."
    home = folder(tmp_path / "in")
    there = tmp_path / "out.partial"
    there.mkdir()
    (there / "film").touch()
    (there / "STOP").touch()
    words = ["prepare", "folder", str(home), str(tmp_path / "out"), "--captions", "none", "--workers", "1"]
    assert cli.main(words) == 2 and (there / "STOP").exists()
    assert "out.partial: is there already and was not made by this command" in capsys.readouterr().err
    (there / "manifest.json").write_text('{"prepared": {"set": "unsplash"}}')
    assert cli.main(words) == 2 and (there / "STOP").exists()
    for p in there.iterdir():
        p.unlink()
    (there / "STOP").touch()  # one's own: a stop before the first picture
    assert cli.main(words) == 0 and not (tmp_path / "out").exists() and not (there / "STOP").exists()
    (tmp_path / "out.looked").write_text("mine\n")
    assert cli.main(words) == 2 and (tmp_path / "out.looked").read_text() == "mine\n"
    (tmp_path / "out.looked").write_text('{"min_')  # cut by a kill
    assert cli.main(words) == 0 and (tmp_path / "out/manifest.json").is_file()
    (tmp_path / "file").touch()
    words[3] = str(tmp_path / "file")
    assert cli.main(words) == 2 and "is a file; choose another folder" in capsys.readouterr().err

"""Image folders: whole or visibly unfinished, the same for every number of processes, stopped and killed at
any moment.
"""

import hashlib, signal, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image

from sdcourse.core import UserError
from sdcourse.data.imagefolder import (
    MakeOne,
    PictureJob,
    build_folder,
    check_jobs,
    file_names,
    read_lines,
    write_lines,
)
from sdcourse.data.manifests import is_inside, load_manifest, verify
from sdcourse.data.prepare import Failed, Prepare

ORIGIN = load_manifest("digits")

CHILD = """
import sys, time
from PIL import Image
from sdcourse.data.imagefolder import PictureJob, build_folder
from sdcourse.data.manifests import load_manifest
from sdcourse.data.prepare import Prepare
from sdcourse.engine.stop import StopFlag
def make(i):
    time.sleep(0.02)
    if i == 7: raise ValueError("seven")
    return Image.new("RGB", (16, 16), (i, 2 * i % 256, 0))
if __name__ == "__main__":
    jobs = [PictureJob("val" if i % 4 == 0 else "train", f"{i:03}.png", {"id": i}, (i,)) for i in range(120)]
    out, workers = sys.argv[1:]
    how = dict(name="toy", origin=load_manifest("digits"))
    with StopFlag(out + ".partial") as flag:
        whole = build_folder(out, jobs, make, Prepare(workers=int(workers)), **how, flag=flag)
        sys.exit(0 if whole else 3)
"""


def paint(i):
    return Image.new("RGB", (4, 4), (i, 0, 0))


def broken(i):
    return paint(i) if i % 5 else 1 / 0


def made(out, jobs, make=paint, options=Prepare(workers=1), **more):
    return build_folder(out, jobs, make, options, name="toy", origin=ORIGIN, **more)


def plan(n=20):
    return [PictureJob("train" if i % 2 else "test", f"{i}.png", {"id": i}, (i,)) for i in range(n)]


def tree(folder):
    "name -> hash of every file."
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    return lambda out, workers=2: subprocess.Popen(
        [sys.executable, str(path), str(out), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ready(child, out):
    "Wait until it makes pictures."
    partial = out.with_name(out.name + ".partial")
    before, end = len(list(partial.rglob("*.png"))), time.time() + 250
    while len(list(partial.rglob("*.png"))) == before and child.poll() is None and time.time() < end:
        time.sleep(0.005)


def test_rows_name_pictures_relative_to_their_split_in_the_order_of_the_plan(tmp_path):
    assert made(tmp_path / "o", plan(), options=Prepare(workers=2))
    for split in ("train", "test"):
        rows = read_lines(tmp_path / "o" / split / "metadata.jsonl")
        assert [r["id"] for r in rows] == [i for i in range(20) if (i % 2 == 1) == (split == "train")]
        assert all(
            (tmp_path / "o" / split / r["file_name"]).is_file() and not Path(r["file_name"]).is_absolute()
            for r in rows
        )
        assert all(
            Image.open(tmp_path / "o" / split / r["file_name"]).getpixel((0, 0))[0] == r["id"] for r in rows
        )
    mine = load_manifest(tmp_path / "o/manifest.json")
    assert (
        verify(mine, tmp_path / "o") == []
        and mine["count"] == 20
        and mine["splits"]["counts"] == {"train": 10, "test": 10}
    )


def test_killed_five_times_ends_as_undisturbed(tmp_path, script):
    whole = script(tmp_path / "whole", 1)
    said, err = whole.communicate()
    assert whole.returncode == 0 and err == ""
    killed = 0
    for delay in (0.05, 0.02, 0.08, 0.01, 0.03):
        child = script(tmp_path / "torn")
        ready(child, tmp_path / "torn")
        time.sleep(delay)
        killed += child.poll() is None
        child.kill()
        child.communicate()
        assert not (tmp_path / "torn").exists() or child.returncode == 0
    assert killed >= 3
    assert script(tmp_path / "torn").wait() == 0
    assert tree(tmp_path / "torn") == tree(tmp_path / "whole")
    assert read_lines(tmp_path / "whole/failures.jsonl") == [
        {"id": 7, "where": "train/007.png", "reason": "ValueError: seven"}
    ]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, "STOP"])
def test_a_stop_is_answered_and_the_same_command_goes_on(tmp_path, script, how):
    child = script(tmp_path / "o")
    ready(child, tmp_path / "o")
    time.sleep(0.1)
    if how == "STOP":
        (tmp_path / "o.partial/STOP").touch()
    else:
        child.send_signal(how)
    said, _ = child.communicate()
    assert child.returncode == 3 and "the same command goes on" in said and not (tmp_path / "o").exists()
    kept = {p.relative_to(tmp_path / "o.partial").as_posix() for p in (tmp_path / "o.partial").rglob("*.png")}
    assert (
        kept == {r["id"] for r in read_lines(tmp_path / "o.partial/done.jsonl")}
        and 0 < len(kept) < 119
        and not list((tmp_path / "o.partial").rglob("*.tmp"))
    )
    assert script(tmp_path / "o").wait() == 0
    assert len(read_lines(tmp_path / "o/train/metadata.jsonl")) == 89


def test_bytes_are_copied_as_they_are_and_pictures_are_encoded(tmp_path):
    (tmp_path / "train").mkdir()
    row = MakeOne(lambda: b"\xff\xd8 any bytes", tmp_path)(PictureJob("train", "a.jpg", {"id": 1}))
    assert (tmp_path / "train/a.jpg").read_bytes() == b"\xff\xd8 any bytes" and row == {
        "bytes": 12,
        "sha256": hashlib.sha256(b"\xff\xd8 any bytes").hexdigest(),
    }
    for name, form in (("b.jpg", "JPEG"), ("b.png", "PNG")):
        MakeOne(paint, tmp_path)(PictureJob("train", name, {"id": 1}, (9,)))
        assert Image.open(tmp_path / "train" / name).format == form


def test_too_many_bad_ones_stop_the_work(tmp_path):
    with pytest.raises(UserError, match="ZeroDivisionError.*--max-bad"):
        made(tmp_path / "o", plan(), broken)
    assert not (tmp_path / "o").exists()
    assert made(tmp_path / "o", plan(), broken, Prepare(workers=1, max_bad=0.2))
    assert [r["where"] for r in read_lines(tmp_path / "o/failures.jsonl")] == [
        "test/0.png",
        "train/5.png",
        "test/10.png",
        "train/15.png",
    ]
    assert [r["id"] for r in read_lines(tmp_path / "o/test/metadata.jsonl")] == [2, 4, 6, 8, 12, 14, 16, 18]
    assert load_manifest(tmp_path / "o/manifest.json")["count"] == 16


def test_a_picture_without_metadata_must_not_fail(tmp_path):
    "Nothing would tell that it is missing."
    jobs = [PictureJob("images", f"{i}.png", {}, (i,)) for i in range(1, 6)]
    with pytest.raises(UserError, match="images/5.png .ZeroDivisionError.*mend the source$"):
        made(tmp_path / "o", jobs, broken, Prepare(workers=1, max_bad=1))
    assert made(tmp_path / "p", jobs[:4], broken) and sorted(
        p.name for p in (tmp_path / "p").rglob("*.*")
    ) == ["1.png", "2.png", "3.png", "4.png", "manifest.json"]


def test_a_picture_that_open_image_refuses_is_a_bad_one(tmp_path):
    from sdcourse.data.images import open_image

    with pytest.raises(Failed, match="empty: the file has no bytes"):
        MakeOne(open_image, tmp_path)(PictureJob("train", "a.png", {"id": 1}, (b"",)))


def test_another_recipe_is_refused(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Sized(Prepare):
        size: int = 4  # pixels

    assert made(tmp_path / "o", plan(), options=Sized(workers=1))
    assert made(tmp_path / "o", plan(), options=Sized(workers=2, max_bad=0.5)), "what is free may change"
    with pytest.raises(UserError, match="size: 4 -> 8"):
        made(tmp_path / "o", plan(), options=Sized(workers=1, size=8))
    for other in (plan(18), [*plan(19), PictureJob("train", "19.png", {"id": 19}, (20,))]):
        with pytest.raises(UserError, match="source: "):
            made(tmp_path / "o", other, options=Sized(workers=1))
    with pytest.raises(UserError, match="by: 'x' -> None"):
        made(tmp_path / "p", plan(), by="x") and made(tmp_path / "p", plan())


def test_a_source_may_move_and_options_of_a_job_count_without_what_is_free(tmp_path):
    def jobs(where, options):
        return [PictureJob("train", "a.png", {"id": 1}, (where / "a.png", options))]

    def show(path, options):
        return paint(1)

    for where, options in ((Path("/here"), Prepare()), (Path("/there"), Prepare(workers=7))):
        assert made(tmp_path / "o", jobs(where, options), show)
    with pytest.raises(UserError, match="source: "):
        made(tmp_path / "o", [PictureJob("train", "a.png", {"id": 1}, (Path("b.png"), Prepare()))], show)


def test_further_files_are_part_of_the_whole(tmp_path):
    "They are written before the folder appears, and their checksums are in the manifest."

    def finish(folder, rows):
        assert not (tmp_path / "o").exists()
        (folder / "more.txt").write_text(f"{sorted(rows)} {len(rows['train'])}")

    assert (
        made(tmp_path / "o", plan(), finish=finish)
        and (tmp_path / "o/more.txt").read_text() == "['test', 'train'] 10"
    )
    assert "more.txt" in {
        e["path"] for e in load_manifest(tmp_path / "o/manifest.json")["layouts"]["prepared"]["files"]
    }


def test_a_full_disk_is_one_line_and_no_bad_picture(tmp_path, monkeypatch):
    from sdcourse.data import imagefolder

    def full(*_):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(imagefolder, "save_bytes", full)
    with pytest.raises(UserError, match="x.png: No space left on device; free some space") as e:
        made(tmp_path / "o", plan(), options=Prepare(workers=2, max_bad=1))
    assert "\n" not in str(e.value) and not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "a\\b.png", ".hidden.png"])
def test_names_stay_below_the_folder(tmp_path, name):
    with pytest.raises(UserError, match="below the data set's folder"):
        check_jobs([PictureJob("train", name, {"id": 0})])
    with pytest.raises(UserError, match="below the data set's folder"):
        check_jobs([PictureJob("nowhere", "a.png", {"id": 0})])


def test_ids_and_names_are_used_once():
    with pytest.raises(UserError, match="two pictures"):
        check_jobs([PictureJob("train", "a.png", {"id": 0}), PictureJob("train", "a.png", {"id": 1})])
    with pytest.raises(UserError, match="used twice"):
        check_jobs([PictureJob("train", "a.png", {"id": 0}), PictureJob("val", "a.png", {"id": 0})])
    with pytest.raises(UserError, match="missing"):
        check_jobs([PictureJob("train", "a.png", {"text": "no id"})])
    with pytest.raises(UserError, match="no pictures"):
        check_jobs([])
    check_jobs([PictureJob("x/y", "a.png"), PictureJob("x/y", "b.png")])


@given(st.lists(st.text(max_size=40), max_size=20, unique=True))
@example(["A", "a"])
@settings(max_examples=200)
def test_two_ids_never_become_one_file(ids):
    names = file_names(ids)
    assert len({n.lower() for n in names}) == len(ids)
    assert all(is_inside(n) and not n.startswith(".") and len(n.encode()) < 255 for n in names)


def test_names_stay_as_they_are_where_they_can():
    assert file_names(["cat 1", "cat_2"]) == ["cat_1.png", "cat_2.png"]
    a, b, c = file_names(["cat 1", "cat_1", "cat/1"])
    assert len({a, b, c}) == 3 and all(n.startswith("cat_1-") for n in (a, b, c))


def test_what_json_cannot_hold_is_written_as_something_it_can(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"a": float("nan"), "b": [float("inf"), 1.5], "c": "cut \ud83d"}])
    assert read_lines(tmp_path / "x.jsonl") == [{"a": None, "b": [None, 1.5], "c": "cut \ufffd"}]

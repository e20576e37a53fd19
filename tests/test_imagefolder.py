"Image folders: whole or visibly unfinished, the same for every number of processes, stopped and killed at any moment."
import hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
from PIL import Image

from sdcourse.core import UserError
from sdcourse.data import imagefolder
from sdcourse.data.imagefolder import Job, Prepare, build, check_jobs, in_parallel, make_one, places, read_lines

CHILD = """
import sys, time
from PIL import Image
from sdcourse.data.imagefolder import Job, Prepare, build
def make(i):
    time.sleep(0.02)
    if i == 7: raise ValueError("seven")
    return Image.new("RGB", (16, 16), (i, 2 * i % 256, 0))
if __name__ == "__main__":
    sys.exit(0 if build(sys.argv[1], [Job("val" if i % 4 == 0 else "train", f"{i:03}.png", {"id": i}, (i,)) for i in range(120)], make, Prepare(workers=int(sys.argv[2]))) else 3)
"""


def paint(i): return Image.new("RGB", (4, 4), (i, 0, 0))
def broken(i): return paint(i) if i % 5 else 1 / 0
def parent(_):
    time.sleep(0.02)
    return os.getpid()


def plan(n=20): return [Job("train" if i % 2 else "test", f"{i}.png", {"id": i}, (i,)) for i in range(n)]


def tree(folder):
    "name -> hash of every file, but prepare.json's number of workers."
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != "prepare.json"}
    state = json.loads((Path(folder) / "prepare.json").read_text(encoding="utf-8"))
    return found | {"prepare.json": {k: v for k, v in state.items() if k != "options"}}


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    return lambda out, workers=2: subprocess.Popen([sys.executable, str(path), str(out), str(workers)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ready(child, out):
    "Wait until it makes pictures."
    before, end = len(list(out.rglob("*.png"))), time.time() + 30
    while len(list(out.rglob("*.png"))) == before and child.poll() is None and time.time() < end: time.sleep(0.005)


def test_rows_name_pictures_relative_to_their_split(tmp_path):
    assert build(tmp_path / "o", plan(), paint, Prepare(workers=1))
    for split in ("train", "test"):
        rows = read_lines(tmp_path / "o" / split / "metadata.jsonl")
        assert len(rows) == 10 and all((tmp_path / "o" / split / r["file_name"]).is_file() and not Path(r["file_name"]).is_absolute() for r in rows)
        assert all(Image.open(tmp_path / "o" / split / r["file_name"]).getpixel((0, 0))[0] == r["id"] for r in rows)


def test_killed_five_times_ends_as_undisturbed(tmp_path, script):
    whole = script(tmp_path / "whole", 1)
    assert whole.wait() == 0 and whole.stderr.read() == ""
    killed = 0
    for delay in (0.05, 0.02, 0.08, 0.01, 0.03):
        child = script(tmp_path / "torn")
        ready(child, tmp_path / "torn"); time.sleep(delay)
        killed += child.poll() is None
        child.kill(); child.wait()
        assert not (tmp_path / "torn/train/metadata.jsonl").exists() or child.returncode == 0
    assert killed >= 3
    assert script(tmp_path / "torn").wait() == 0
    assert tree(tmp_path / "torn") == tree(tmp_path / "whole")
    assert read_lines(tmp_path / "whole/failures.jsonl") == [{"split": "train", "file_name": "007.png", "why": "ValueError: seven"}]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, "STOP"])
def test_a_stop_is_answered_and_the_same_command_goes_on(tmp_path, script, how):
    child = script(tmp_path / "o")
    ready(child, tmp_path / "o"); time.sleep(0.1)
    if how == "STOP": (tmp_path / "o/STOP").touch()
    else: child.send_signal(how)
    assert child.wait(20) == 3 and "the same command goes on" in child.stderr.read()
    assert not list((tmp_path / "o").rglob("metadata.jsonl")) and list((tmp_path / "o").rglob("*.png"))
    assert script(tmp_path / "o").wait(30) == 0
    assert len(read_lines(tmp_path / "o/train/metadata.jsonl")) == 89


def test_no_worker_outlives_its_parent(tmp_path, script):
    import psutil
    child = script(tmp_path / "o")
    ready(child, tmp_path / "o")
    workers = psutil.Process(child.pid).children()
    child.kill(); child.wait()
    assert len(workers) == 2
    gone, alive = psutil.wait_procs(workers, timeout=5)
    for p in alive: p.kill()
    assert not alive


def test_results_come_in_order_from_other_processes():
    assert list(in_parallel(abs, list(range(-50, 0)), workers=2, handful=3)) == list(range(50, 0, -1))
    pids = set(in_parallel(parent, list(range(20)), workers=2, handful=1))
    assert len(pids) == 2 and os.getpid() not in pids


def test_a_picture_that_is_there_is_not_made_again_and_an_empty_one_is(tmp_path):
    (tmp_path / "train").mkdir()
    job = Job("train", "a.png", {"id": 1}, (9,))
    assert make_one(paint, tmp_path, job) == ""
    before = (tmp_path / "train/a.png").stat().st_mtime_ns
    assert make_one(broken, tmp_path, Job("train", "a.png", {"id": 1}, (5,))) == "" and (tmp_path / "train/a.png").stat().st_mtime_ns == before
    (tmp_path / "train/a.png").write_bytes(b"")
    assert make_one(paint, tmp_path, job) == "" and (tmp_path / "train/a.png").stat().st_size


def test_a_death_while_writing_leaves_no_picture(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    def die(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="No space"): make_one(paint, tmp_path, Job("train", "a.png", {"id": 1}, (9,)))
    assert not list((tmp_path / "train").iterdir())


def test_bytes_are_copied_as_they_are(tmp_path):
    (tmp_path / "train").mkdir()
    make_one(lambda: b"\xff\xd8 any bytes", tmp_path, Job("train", "a.jpg", {"id": 1}))
    assert (tmp_path / "train/a.jpg").read_bytes() == b"\xff\xd8 any bytes"


def test_too_many_bad_ones_stop_the_work(tmp_path):
    with pytest.raises(UserError, match="ZeroDivisionError.*--max-bad"): build(tmp_path / "o", plan(), broken, Prepare(workers=1))
    assert not list((tmp_path / "o").rglob("metadata.jsonl"))
    assert build(tmp_path / "o", plan(), broken, Prepare(workers=1, max_bad=0.2))
    assert [r["file_name"] for r in read_lines(tmp_path / "o/failures.jsonl")] == ["0.png", "5.png", "10.png", "15.png"]
    assert [r["id"] for r in read_lines(tmp_path / "o/test/metadata.jsonl")] == [2, 4, 6, 8, 12, 14, 16, 18]


def test_another_recipe_is_refused(tmp_path):
    from dataclasses import dataclass
    @dataclass
    class Sized(Prepare):
        size: int = 4 # pixels
    assert build(tmp_path / "o", plan(), paint, Sized(workers=1))
    assert build(tmp_path / "o", plan(), paint, Sized(workers=2)), "the number of processes is free"
    with pytest.raises(UserError, match="size: 4 -> 8"): build(tmp_path / "o", plan(), paint, Sized(workers=1, size=8))
    with pytest.raises(UserError, match="another source"): build(tmp_path / "o", plan(18), paint, Sized(workers=1))
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty"): build(tmp_path / "mine", plan(), paint, Prepare(workers=1))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "a\\b.png", ".hidden.png"])
def test_names_stay_below_the_folder(tmp_path, name):
    with pytest.raises(UserError, match="below the data set's folder"): check_jobs([Job("train", name, {"id": 0})])
    with pytest.raises(UserError, match="below the data set's folder"): check_jobs([Job("nowhere", "a.png", {"id": 0})])


def test_ids_and_names_are_used_once():
    with pytest.raises(UserError, match="two pictures"): check_jobs([Job("train", "a.png", {"id": 0}), Job("train", "a.png", {"id": 1})])
    with pytest.raises(UserError, match="used twice"): check_jobs([Job("train", "a.png", {"id": 0}), Job("val", "a.png", {"id": 0})])
    with pytest.raises(UserError, match="missing"): check_jobs([Job("train", "a.png", {})])


def test_a_worker_that_is_killed_is_named(monkeypatch):
    with pytest.raises(UserError, match="--workers 1"): list(in_parallel(os._exit, [1] * 4, workers=2))


def test_folders_then_options():
    assert places(["a", "--size", "3"], ("OUT",), "p") == ([Path("a")], ["--size", "3"])
    assert places(["a", "--help"], ("SRC", "OUT"), "p") == ([], ["--help"])
    with pytest.raises(UserError, match="OUT is missing: p SRC OUT"): places(["a"], ("SRC", "OUT"), "p")


def test_parts_agree_on_what_a_split_is(): assert imagefolder.SPLITS == ("train", "val", "test")

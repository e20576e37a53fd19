"""A folder has one owner: the second is refused while the first lives, and a dead one holds nothing."""

import json
import os
import signal
import threading
import time

import pytest
import warm
from toy import config, run
from toy import ToyTask

import sdcourse.engine.loop as loop
import sdcourse.engine.work as work
from sdcourse.core import UserError
from sdcourse.engine.loop import train
from sdcourse.engine.trackers import read_metrics
from sdcourse.engine.work import OWNER, Owner, alone

RUN = """
import sys, time
sys.path[:0] = [{tests!r}]
import sdcourse.engine.loop as loop
from toy import run
step = loop.step
def slow(r):
    step(r)
    time.sleep(0.05)
loop.step = slow
run({out!r}, max_steps=2000)
"""


def started(out):
    "A training in a process of its own, that has made its first steps."
    tests = os.path.dirname(os.path.abspath(__file__))
    child = warm.start(["-c", RUN.format(tests=tests, out=str(out))], first=warm.LOOP)
    end = time.monotonic() + warm.LIMIT
    while not (out / "metrics.jsonl").exists():
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.05)
    return child


def elsewhere(path):
    "Make the file look as if its owner were on another machine."
    said = json.loads(path.read_text())
    said["machine"] = ["far", "another start", ""]
    path.write_text(json.dumps(said | dict(host="far")))
    return path.read_text()


def test_a_second_run_is_refused_while_the_first_lives_and_not_after_its_death(tmp_path):
    "faults.md E: two processes with one --out and two learning rates; then kill -9, and the job comes back."
    out = tmp_path / "run"
    child = started(out)
    try:
        with pytest.raises(
            UserError, match=rf"working in it \(process {child.pid} on .*choose another --out"
        ):
            run(out, max_steps=2000, lr=1e-5)
    finally:
        os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert (out / OWNER).exists()
    begin = time.monotonic()
    assert run(out, max_steps=2000, max_seconds=0.2).stopped == "deadline" and time.monotonic() - begin < 30
    assert not (out / OWNER).exists()
    steps = [r["step"] for r in read_metrics(out)]
    assert steps == sorted(set(steps))


def test_it_also_works_without_flock(tmp_path, monkeypatch):
    import fcntl

    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with alone(tmp_path):
        (tmp_path / ".half.1.tmp").touch()
        with pytest.raises(UserError, match="another process is working"):
            with alone(tmp_path):
                pass
        assert (tmp_path / ".half.1.tmp").exists()  # nothing of a living one is swept up


def test_an_owner_far_away_is_watched(tmp_path, monkeypatch):
    "One that gives signs of life is respected, a silent one holds nothing after the stated time."
    monkeypatch.setattr(work, "SILENT", 1.5)
    path = tmp_path / OWNER
    with Owner(tmp_path):
        pass
    path.write_text(Owner(tmp_path).text)
    elsewhere(path)
    done = threading.Event()

    def beats():
        while not done.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=beats)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(UserError, match="on far"), Owner(tmp_path):
        pass
    assert time.monotonic() - begin < 1.4
    done.set()
    thread.join()
    begin = time.monotonic()
    with Owner(tmp_path) as mine:
        assert 1.4 < time.monotonic() - begin < 5 and path.read_text() == mine.text
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "\0", '{"pid": 1}'])
def test_a_torn_file_is_watched_too(tmp_path, monkeypatch, text):
    monkeypatch.setattr(work, "SILENT", 0.3)
    (tmp_path / OWNER).write_text(text)
    with Owner(tmp_path) as mine:
        assert (tmp_path / OWNER).read_text() == mine.text


def test_a_process_number_that_was_given_anew_is_not_the_owner(tmp_path):
    path = tmp_path / OWNER
    said = json.loads(Owner(tmp_path).text)
    path.write_text(json.dumps(said | dict(start=said["start"] - 100)))
    with Owner(tmp_path):
        pass
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match="working in it"), Owner(tmp_path):
        pass


def test_who_was_silent_too_long_writes_nothing_more(tmp_path, monkeypatch):
    "Its folder has been taken: it stops, says so, and leaves checkpoints and the other's file alone."
    monkeypatch.setattr(work, "BEAT", 0.05)
    step = loop.step
    other, steps = [], []

    def taken(r):
        step(r)
        steps.append(r.step)
        if r.step == 5:
            other.append(elsewhere(tmp_path / OWNER))
        if r.step >= 5:
            time.sleep(0.1)

    monkeypatch.setattr(loop, "step", taken)
    with pytest.raises(UserError, match="another process has taken this folder"):
        run(tmp_path, max_steps=60, checkpoint_every=40)
    assert steps[-1] < 30  # at once, and not when it wants to save
    assert (tmp_path / OWNER).read_text() == other[0]
    assert not (tmp_path / "checkpoints").exists()


def test_many_at_once_one_wins(tmp_path):
    "Also over the file of a dead one, that all of them find."
    said = json.loads(Owner(tmp_path).text)
    (tmp_path / OWNER).write_text(json.dumps(said | dict(start=0.0)))
    won, refused = [], []
    gate = threading.Barrier(8)

    def try_it():
        gate.wait()
        try:
            with Owner(tmp_path):
                won.append(1)
                over.wait()
        except UserError:
            refused.append(1)

    over = threading.Event()
    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for t in threads:
        t.start()
    end = time.monotonic() + warm.LIMIT
    while len(refused) < 7 and time.monotonic() < end:
        time.sleep(0.01)
    over.set()
    for t in threads:
        t.join()
    assert (len(won), len(refused)) == (1, 7) and not (tmp_path / OWNER).exists()


def test_a_dry_run_beside_a_run_is_allowed(tmp_path):
    with Owner(tmp_path):
        assert train(ToyTask(config(tmp_path, dry_run=True))).stopped == "dry run"


def test_a_full_disk_is_held_by_an_empty_file(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise OSError(28, "No space left on device")

    def no_space(path, mode, **_):
        open(path, mode).close()
        return Full()

    monkeypatch.setattr(work, "open", no_space, raising=False)
    monkeypatch.setattr(work, "SILENT", 0.5)
    monkeypatch.setattr(work, "BEAT", 0.1)
    with Owner(tmp_path):
        assert (tmp_path / OWNER).read_text() == ""
        with pytest.raises(UserError, match="working in it"), Owner(tmp_path):
            pass
    assert not (tmp_path / OWNER).exists()


def test_a_file_that_came_in_between_is_left_alone(tmp_path):
    "Two that find the same dead owner: the slower one must not clear the file of the faster one."
    path = tmp_path / OWNER
    path.write_text("of the faster one")
    work._clear(path, "of the dead one")
    assert path.read_text() == "of the faster one" and len(list(tmp_path.iterdir())) == 1
    work._clear(path, "of the faster one")
    assert not list(tmp_path.iterdir())


def test_while_one_clears_no_other_may(tmp_path, monkeypatch):
    "The name is free for nobody between the last look and the end: a third one would win as well."
    path = tmp_path / OWNER
    dead = json.dumps(json.loads(Owner(tmp_path).text) | dict(start=0.0))
    path.write_text(dead)
    read, looked = work._read, []

    def meanwhile(asked):
        found = read(asked)
        if asked == path and not looked:
            looked.append(found)
            with pytest.raises(UserError, match="working in it"):
                Owner(tmp_path)._take()
        return found

    monkeypatch.setattr(work, "_read", meanwhile)
    work._clear(path, dead)
    assert looked == [dead] and not list(tmp_path.iterdir())

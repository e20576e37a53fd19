"""R1: a run that was stopped and resumed equals one that was not, bit for bit."""
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from toy import run

import sdcourse.train.loop as loop
from sdcourse.train.checkpoint import latest_checkpoint, load_checkpoint
from sdcourse.train.track import read_metrics


@contextmanager
def watched(stop_after=None):
    "Record the ids of every step; send a real SIGUSR1 to this process after step `stop_after`."
    ids, step, place = [], loop.step, loop.Run.place
    def one(run):
        ids.append([])
        step(run)
        if run.step == stop_after:
            os.kill(os.getpid(), signal.SIGUSR1)
    def seen(self, batch, data, items):
        if ids and data is self.data:
            ids[-1] += [int(i) for i in batch["id"]]
        return place(self, batch, data, items)
    loop.step, loop.Run.place = one, seen
    try:
        yield ids
    finally:
        loop.step, loop.Run.place = step, place


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outcome(folder):
    c = load_checkpoint(latest_checkpoint(folder / "checkpoints")[0])
    rows = [{k: r.get(k) for k in ("step", "samples", "loss", "loss_by_t", "grad_norm", "lr", "skipped", "val_loss", "weight")} for r in read_metrics(folder)]
    return c["tensors"], c["objects"], rows


CASES = [(1, {}), (4, {}), (6, dict(items=48)), (11, {}), (5, dict(micro_batch=2)), (7, dict(num_workers=2)), (3, dict(num_workers=2, micro_batch=3)), (5, dict(validate_every=2))]


@pytest.mark.parametrize("stop,over", CASES)
def test_resumed_equals_uninterrupted(tmp_path, stop, over):
    over = dict(dropout=0.2, lr_schedule="cosine", warmup_steps=3) | over
    with watched() as ids_whole:
        run(tmp_path / "whole", **over)
    with watched(stop) as ids_first:
        assert run(tmp_path / "parts", **over).stopped == "SIGUSR1"
    assert len(ids_first) == stop
    with watched() as ids_second:
        assert run(tmp_path / "parts", **over).stopped == ""
    assert ids_first + ids_second == ids_whole and len(ids_whole) == 12
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    for what, a, b in zip(("weights and average", "optimizer", "metrics"), whole, parts):
        assert same(a, b), f"{what} differ"


def test_dropout_is_really_on(tmp_path):
    "Otherwise the test above would say nothing about it."
    run(tmp_path / "a", dropout=0.2)
    run(tmp_path / "b", dropout=0.0)
    assert not same(outcome(tmp_path / "a")[0], outcome(tmp_path / "b")[0])


def test_seed_changes_everything(tmp_path):
    with watched() as a:
        run(tmp_path / "a")
    with watched() as b:
        run(tmp_path / "b", seed=1)
    assert a != b and not same(outcome(tmp_path / "a")[0], outcome(tmp_path / "b")[0])


def test_resume_does_not_read_what_it_throws_away(tmp_path):
    with watched(6):
        run(tmp_path)
    with watched() as ids:
        run(tmp_path)
    assert [len(i) for i in ids] == [8] * 6


def test_killed_between_checkpoints_truncates_the_log(tmp_path):
    "Rows beyond the checkpoint are written again, not twice."
    class Power(BaseException):
        pass
    step = loop.step
    def cut(r):
        step(r)
        if r.step == 11:
            raise Power
    loop.step = cut
    try:
        with pytest.raises(Power):
            run(tmp_path / "parts", checkpoint_every=4)
    finally:
        loop.step = step
    assert [r["step"] for r in read_metrics(tmp_path / "parts")] == [3, 6, 9]
    run(tmp_path / "parts", checkpoint_every=4)
    run(tmp_path / "whole", checkpoint_every=4)
    assert [r["step"] for r in read_metrics(tmp_path / "parts")] == [3, 6, 9, 12]
    assert same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "file", "deadline"])
def test_every_way_to_stop(tmp_path, how):
    step = loop.step
    def one(r):
        step(r)
        if r.step == 5 and how == "file":
            (tmp_path / "STOP").touch()
        elif r.step == 5 and how != "deadline":
            os.kill(os.getpid(), getattr(signal, how))
    raised = loop.StopFlag.raised
    def now(self):
        self._looked = 0.0
        if how == "deadline" and self.deadline != float("inf") and (tmp_path / "samples").exists() and now.calls >= 4:
            self.deadline = 0.0
        now.calls += 1
        return raised(self)
    now.calls = 0
    loop.step, loop.StopFlag.raised = one, now
    try:
        result = run(tmp_path, max_seconds=1000 if how == "deadline" else 0)
    finally:
        loop.step, loop.StopFlag.raised = step, raised
    assert result.exit_code == 0 and 5 <= result.step <= 7
    assert result.stopped == {"file": "file STOP"}.get(how, how)
    path, skipped = latest_checkpoint(tmp_path / "checkpoints")
    assert load_checkpoint(path)["state"]["step"] == result.step and not skipped
    assert not (tmp_path / "STOP").exists() and not (tmp_path / "export").exists()
    assert run(tmp_path).step == 12

"""R1: a run that was stopped and resumed equals one that was not, bit for bit."""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import warm
from bench_checkpoint import counted
from toy import ToyTask, config, run

import sdcourse.engine.loop as loop
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint, verify_checkpoint
from sdcourse.engine.stop import StopFlag, end_of_job
from sdcourse.engine.trackers import read_metrics


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
    rows = [
        {
            k: r.get(k)
            for k in (
                "step",
                "samples",
                "loss",
                "loss_by_t",
                "grad_norm",
                "lr",
                "skipped",
                "val_loss",
                "weight",
            )
        }
        for r in read_metrics(folder)
    ]
    return c["tensors"], c["objects"], rows


CASES = [
    (1, {}),
    (4, {}),
    (6, dict(items=48)),
    (11, {}),
    (5, dict(micro_batch=2)),
    (7, dict(num_workers=2)),
    (3, dict(num_workers=2, micro_batch=3)),
    (5, dict(validate_every=2)),
]


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


@pytest.mark.parametrize("threads,then", [(0, 2), (1, 1)])
def test_a_resume_keeps_the_number_of_threads(tmp_path, threads, then):
    "Whatever the machine or the scheduler offers at the next start; `--threads N` says otherwise."
    torch.set_num_threads(2)
    with watched(3):
        run(tmp_path)
    torch.set_num_threads(1)
    run(tmp_path, threads=threads)
    assert torch.get_num_threads() == then


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


def test_a_resume_hashes_each_byte_once(tmp_path):
    "To find the newest checkpoint and to load it needs one proof."
    run(tmp_path, max_steps=4)
    with counted() as proof:
        verify_checkpoint(latest_checkpoint(tmp_path / "checkpoints")[0])
    with counted() as found:
        assert loop.find_start(config(tmp_path, max_steps=4))["state"]["step"] == 4
    assert 2 * found["hashed"] == proof["hashed"] > 0


@pytest.mark.parametrize("when", ["training", "validation", "sampling", "saving"])
@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGINT", "file STOP", "deadline", "end of the job"])
def test_every_way_to_stop(tmp_path, monkeypatch, how, when):
    "R7: asked in step 5, whatever runs then; saved and left within two steps, and the same command goes on."
    flags, fired = [], []
    opened, step, place, sample, save = (
        StopFlag.__init__,
        loop.step,
        loop.Run.place,
        ToyTask.sample,
        loop.save_checkpoint,
    )

    def remember(self, *args, **kwargs):
        opened(self, *args, **kwargs)
        flags.append(self)

    def fire(where, n):
        if where != when or n != 5 or fired:
            return
        fired.append(n)
        if how == "file STOP":
            (tmp_path / "STOP").touch()
            flags[-1]._looked = 0.0
        elif how.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, how))
        else:
            flags[-1].deadlines[how] = 0.0

    def one(r):
        step(r)
        fire("training", r.step)

    def placed(self, batch, data, items):
        if data is not self.data:
            fire("validation", self.step)
        return place(self, batch, data, items)

    def sampled(self, module, path):
        fire("sampling", int(path.stem[5:]))
        sample(self, module, path)

    def saved(root, n, **parts):
        fire("saving", n)
        return save(root, n, **parts)

    for owner, name, new in (
        (StopFlag, "__init__", remember),
        (loop, "step", one),
        (loop.Run, "place", placed),
        (ToyTask, "sample", sampled),
        (loop, "save_checkpoint", saved),
    ):
        monkeypatch.setattr(owner, name, new)
    over = dict(requeue_code=75, validate_every=5, checkpoint_every=5)
    result = run(tmp_path, **over)
    assert fired and 5 <= result.step <= 7 and result.stopped == how
    assert result.exit_code == (
        0 if how == "file STOP" else 75
    )  # a person who asks for a stop does not want it requeued
    path, skipped = latest_checkpoint(tmp_path / "checkpoints")
    assert load_checkpoint(path)["state"]["step"] == result.step and not skipped
    assert not (tmp_path / "STOP").exists() and not (tmp_path / "export").exists()
    again = run(tmp_path, **over)
    assert (again.step, again.stopped, again.exit_code) == (12, "", 0)


def test_a_stopped_run_exits_with_0_unless_it_is_told_otherwise(tmp_path):
    with watched(3):
        result = run(tmp_path)
    assert (result.stopped, result.exit_code) == ("SIGUSR1", 0)


def test_a_signal_before_the_run_is_built_is_not_lost(tmp_path):
    with StopFlag():
        os.kill(os.getpid(), signal.SIGTERM)
        result = run(tmp_path)
    assert result.stopped == "SIGTERM" and result.step <= 2 and latest_checkpoint(tmp_path / "checkpoints")[0]


def test_the_end_of_the_job_is_a_deadline(tmp_path, monkeypatch):
    """A job whose script did not ask for a signal still saves in time: a minute before its end, or a tenth of
    it.
    """
    now = time.time()
    for left, expected in ((3600, 3540), (100, 90), (-5, -5)):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + left))
        assert abs(end_of_job() - expected) < 3
    result = run(tmp_path, requeue_code=75)
    assert (result.stopped, result.exit_code) == ("end of the job", 75) and result.step == 1


def test_readers_outlive_a_signal_to_the_whole_group(tmp_path):
    """SLURM signals every process of a step: the processes that read data must not die of it, or the last
    checkpoint is lost.
    """
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import sdcourse.engine.loop as loop
from toy import ToyTask, run
step = loop.step
def one(r):
    step(r)
    if r.step == 5: os.killpg(0, signal.NAME)
loop.step = one
r = run({str(tmp_path)!r} + '/NAME', num_workers=2, requeue_code=75)
print(r.step, r.stopped, r.exit_code)
"""
    for name in ("SIGUSR1", "SIGTERM", "SIGINT"):
        done = warm.run(["-c", code.replace("NAME", name)])  # in a session of its own
        assert done.returncode == 0 and done.stdout.strip() == f"5 {name} 75", (
            done.stdout + done.stderr[-1500:]
        )


def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.raised() and flag.reason == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_stays_off_where_the_shell_switched_it_off():
    "As for `command &` in a script, which the terminal's Ctrl-C does not mean."
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            os.kill(os.getpid(), signal.SIGINT)
            assert not flag.raised()
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_flag_passes_a_signal_on_and_a_deadline_not(name):
    with StopFlag() as outer:
        with StopFlag(max_seconds=1e-9) as inner:
            assert inner.raised()
        assert not outer.raised()
        with StopFlag(), StopFlag():
            os.kill(os.getpid(), getattr(signal, name))
        assert outer.raised() and outer.reason == name


def test_ctrl_c_saves_as_sigterm_does(tmp_path, monkeypatch):
    step = loop.step

    def one(r):
        step(r)
        if r.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "step", one)
    try:
        result = run(tmp_path)
    except KeyboardInterrupt:
        pytest.fail("nothing was saved")
    assert (result.step, result.stopped) == (3, "SIGINT")
    assert latest_checkpoint(tmp_path / "checkpoints")[0].name == "step-00000003"

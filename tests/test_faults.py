"""What can go wrong on two real ranks: each fault ends in one clear line or in a warning, never in a hang,
and never costs a checkpoint.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import ranks
import warm
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint
from sdcourse.engine.dist import LOST
from sdcourse.engine.trackers import read_metrics
from sdcourse.engine.watchdog import HUNG


def report(out):
    return [json.loads(Path(f"{out}.rank{r}.json").read_text()) for r in (0, 1)]


def step_of(out):
    return load_checkpoint(latest_checkpoint(out / "checkpoints")[0])["state"]["step"]


def wait_for(there, seconds=warm.LIMIT):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


RAISES = """
place, sample = loop.Run.place, toy.ToyTask.sample
def broken(self, batch, data, items):
    if data is not self.data and rank == 1: raise OSError("held-out set gone")
    return place(self, batch, data, items)
def no_ink(self, module, path): raise RuntimeError("no ink")
loop.Run.place, toy.ToyTask.sample = broken, no_ink
from torch.utils.tensorboard import SummaryWriter
def down(*_, **__): raise ConnectionError("tracker down")
SummaryWriter.add_scalar = down
os.environ['HF_TOKEN'] = 'x'
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = False
huggingface_hub.HfApi.create_repo = down
"""


def test_validation_tracker_and_hub_may_fail_on_one_rank(tmp_path):
    """R17: each fault warns, training goes on to the end on both ranks, and nobody waits for the rank that
    raised.
    """
    ends = ranks.finish(
        ranks.toy(
            tmp_path / "run",
            hook=RAISES,
            first=warm.LOOP + "import huggingface_hub, torch.utils.tensorboard",
            validate_every=4,
            tracker="tensorboard",
            push_to_hub="x/y",
        )
    )
    assert [c for c, _, _ in ends] == [0, 0], ends
    assert (
        ends[1][2].count("failed on rank 1 (OSError: held-out set gone)") == 3
        and "held-out" not in ends[0][2]
    )
    for words in ("failed on rank 0 (RuntimeError: no ink)", "tracker down", "not pushed to x/y"):
        assert words in ends[0][2], words
    assert [r["step"] for r in report(tmp_path / "run")] == [12, 12] and step_of(tmp_path / "run") == 12
    assert (tmp_path / "run/export/model.safetensors").exists() and not any(
        "val_loss" in r for r in read_metrics(tmp_path / "run")
    )


def test_the_same_training_without_faults_validates(tmp_path):
    "Otherwise the test above would say nothing about the missing numbers."
    assert [c for c, _, _ in ranks.finish(ranks.toy(tmp_path / "run", validate_every=4))] == [0, 0]
    assert sum("val_loss" in r for r in read_metrics(tmp_path / "run")) == 3


def test_a_killed_rank(tmp_path):
    "The other one says so and leaves with its own code; the run goes on from its last checkpoint."
    hook = """
step = loop.step
def one(r):
    step(r)
    if rank == 1 and r.step == 6: os.kill(os.getpid(), 9)
loop.step = one
"""
    ends = ranks.finish(ranks.toy(tmp_path / "run", hook=hook, checkpoint_every=4))
    assert [c for c, _, _ in ends] == [LOST, -9]
    lost = r"error: rank 0 lost the others while \w+.* step [56] \(.*another rank ended"
    assert re.search(f"{lost}.*the same command goes on", ends[0][2]) and "Traceback" not in ends[0][2]
    assert step_of(tmp_path / "run") == 4
    assert [c for c, _, _ in ranks.finish(ranks.toy(tmp_path / "run", checkpoint_every=4))] == [
        0,
        0,
    ] and step_of(tmp_path / "run") == 12


HANGS = """
get = toy.Points.__getitem__
def never(self, i):
    if rank == 1 and i == 7 and len(self) == 50: time.sleep(1000)
    return get(self, i)
toy.Points.__getitem__ = never
"""


def test_a_rank_that_hangs(tmp_path):
    "Both leave within the stated time, and the line says which rank was not waiting but reading."
    started = ranks.toy(tmp_path / "run", hook=HANGS, hang_seconds=4.0)
    wait_for(lambda: (tmp_path / "run/config.yaml").exists())
    ends = ranks.finish(started, 60)
    assert HUNG in [c for c, _, _ in ends] and {c for c, _, _ in ends} <= {HUNG, LOST}
    line = next(e for c, _, e in ends if c == HUNG)
    assert re.search(r"rank 1 on \S+ (when last heard, was|is) reading data of step \d", line), line
    assert 4 <= int(re.search(r"no progress for (\d+) s", line)[1]) < 8, (
        line
    )  # the limit, a fifth of it, and a busy machine
    assert ends[1][0] != HUNG or "never" in ends[1][2]  # and where in its own code it stands


def test_a_frozen_rank(tmp_path):
    "A process that cannot speak is named by the one that can."
    hook = """
step = loop.step
def one(r):
    step(r)
    if rank == 1 and r.step == 5:
        time.sleep(1.5)
        os.kill(os.getpid(), 19)
loop.step = one
"""
    started = ranks.toy(tmp_path / "run", hook=hook, hang_seconds=3.0)  # it speaks every 0.3 s
    try:
        out, err = started[0].communicate()
    finally:
        os.kill(started[1].pid, signal.SIGCONT)
        for p in started:
            p.kill()
    assert started[0].returncode == HUNG and re.search(r"rank 1 on \S+ when last heard, was \w+", err), err


def test_waiting_for_a_slow_rank_is_no_hang(tmp_path):
    "Rank 0 works longer than the limit and gives signs of life; the other waits for it."
    hook = """
def slow(self, module, path):
    for _ in range(14):
        time.sleep(0.5)
        slow.run.beat('sampling')
toy.ToyTask.sample = slow
run = loop.Run.__init__
def init(self, *a, **k):
    run(self, *a, **k)
    slow.run = self
loop.Run.__init__ = init
"""
    assert [c for c, _, _ in ranks.finish(ranks.toy(tmp_path / "run", hook=hook, hang_seconds=4.0))] == [0, 0]


def test_a_full_disk(tmp_path):
    "R5 on two ranks: both leave with the same line, and the old checkpoint is whole."
    assert [c for c, _, _ in ranks.finish(ranks.toy(tmp_path / "run", checkpoint_every=4, max_steps=4))] == [
        0,
        0,
    ]
    hook = """
import resource, signal
if rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
"""
    ends = ranks.finish(ranks.toy(tmp_path / "run", hook=hook, checkpoint_every=4, max_steps=12, force=True))
    assert [c for c, _, _ in ends] == [2, 2], ends
    for _, _, err in ends:
        assert (
            re.search(r"error: .*step-00000008: not saved .*older checkpoints are intact.*\(rank 0\)", err)
            and "Traceback" not in err
        ), err
    assert step_of(tmp_path / "run") == 4 and not list((tmp_path / "run/checkpoints").glob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 200 kB."
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True
        ).returncode
    ):
        pytest.skip("only root may mount")
    yield place
    subprocess.run(["umount", "-l", place])


def test_a_small_disk(small_disk):
    """R5 on a real full disk: refused by the preflight when it is known, and by the save when another program
    took the room.
    """
    from toy import run
    from sdcourse.core import UserError

    run(small_disk / "run", max_steps=4, checkpoint_every=4, keep=1)
    assert step_of(small_disk / "run") == 4
    (small_disk / "film").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 4_000))
    with pytest.raises(UserError, match="disk has .* free"):
        run(small_disk / "run", max_steps=12, keep=1, force=True)
    import sdcourse.engine.loop as loop

    loop.preflight, whole = (lambda *_: []), loop.preflight
    try:
        with pytest.raises(UserError, match="intact"):
            run(small_disk / "run", max_steps=12, checkpoint_every=4, keep=1, force=True)
    finally:
        loop.preflight = whole
    assert step_of(small_disk / "run") == 4 and latest_checkpoint(small_disk / "run/checkpoints")[1] == []


def test_a_disk_that_fills_in_the_middle_of_a_run(small_disk, monkeypatch):
    "faults.md F: another program takes the room after the first save; both older checkpoints stay."
    import toy
    from sdcourse.core import UserError
    from sdcourse.engine import loop

    step, film = loop.step, small_disk / "film"

    def filling(run):
        step(run)
        if run.step == 10:
            film.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 2_000))

    monkeypatch.setattr(loop, "step", filling)
    with pytest.raises(UserError, match="step-00000012: not saved .*older checkpoints are intact"):
        toy.run(small_disk / "run", max_steps=16, checkpoint_every=4, keep=2, log_every=100)
    monkeypatch.undo()
    assert [p.name[-1] for p in sorted((small_disk / "run/checkpoints").glob("step-*"))] == ["4", "8"]
    assert step_of(small_disk / "run") == 8
    film.unlink()
    assert toy.run(small_disk / "run", max_steps=16, checkpoint_every=4, keep=2, log_every=100).step == 16


def test_a_run_that_fitted_on_a_disk_can_be_resumed_on_it(small_disk):
    "faults.md F: its own old checkpoints are not asked for again; room for one more is."
    from toy import run
    from sdcourse.core import UserError

    run(small_disk / "run", max_steps=8, checkpoint_every=4, keep=2)
    size = sum(p.stat().st_blocks * 512 for p in (small_disk / "run/checkpoints/step-00000008").iterdir())
    film = small_disk / "film"
    film.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 2 * size - 20_000))
    assert run(small_disk / "run", max_steps=12, checkpoint_every=4, keep=2, force=True).step == 12
    with pytest.raises(UserError, match="9 \\+ 1 checkpoints need"):
        run(small_disk / "run", max_steps=14, keep=9, force=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    "Refused before the work on every rank, with the folder's name."
    (tmp_path / "file").touch()
    ends = ranks.finish(ranks.toy(tmp_path / "file/run"))
    assert [c for c, _, _ in ends] == [2, 2] and all(
        "file/run" in e and "choose another --out" in e for _, _, e in ends
    ), ends


@pytest.mark.parametrize(
    "hook, words",
    [
        ("if rank == 1: over['lr'] = 0.5", "rank 1 has another lr than rank 0 (0.5 instead of 0.01)"),
        (
            "find = loop.find_start\nloop.find_start = lambda cfg: None if rank == 1 else find(cfg)",
            "rank 1 has another checkpoint than rank 0 (None instead of 12)",
        ),
        (
            "def check(self): raise UserError('no such file here')\nif rank == 1: toy.ToyTask.check = check",
            "no such file here (rank 1)",
        ),
    ],
)
def test_ranks_that_do_not_agree_are_refused(tmp_path, hook, words):
    """Other options, a folder that one node does not share, a file that only one node lacks: both leave
    before the first step.
    """
    if "find_start" in hook:
        from toy import run

        run(tmp_path / "run")
    ends = ranks.finish(ranks.toy(tmp_path / "run", hook=hook))
    assert [c for c, _, _ in ends] == [2, 2] and all(words in e for _, _, e in ends), ends

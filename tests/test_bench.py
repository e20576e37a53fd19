"""The benchmark on several ranks says what the exchange of gradients takes; what is slow is never a test."""

import json

import pytest

import ranks
from sdcourse.cli import main


def test_two_ranks_measure_the_exchange_of_gradients(tmp_path):
    argv = [
        "flow_dit",
        "--size",
        "tiny/8",
        "--batch",
        "8",
        "--steps",
        "3",
        "--warmup",
        "1",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    ends = ranks.finish(ranks.start(["-m", "sdcourse.cli", "bench", *argv], 2))
    assert [c for c, _, _ in ends] == [0, 0], ends
    found = json.loads(ends[0][1])
    assert (
        ends[1][1] == ""
        and found["ranks"] == 2
        and found["batch"] == 8
        and 0 < found["nosync_step_s"]
        and found["sync_share"] < 1
        and found["data_per_s"] > 0
        and 0 < found["mfu"] < 1
    )


def test_the_textbook_loop_on_two_ranks_is_refused():
    ends = ranks.finish(
        ranks.start(
            [
                "-m",
                "sdcourse.cli",
                "bench",
                "flow_dit",
                "--size",
                "tiny/8",
                "--batch",
                "8",
                "--compare",
                "--device",
                "cpu",
            ],
            2,
        )
    )
    assert [c for c, _, _ in ends] == [2, 2] and "--compare: the textbook loop runs on one rank" in ends[0][2]


def test_without_exchange_the_ranks_drift_apart(tmp_path):
    """What is switched off is really the exchange: the same data in other halves, and weights that differ
    between ranks.
    """
    hook = """
step = loop.step
def one(r):
    if over_sync: step(r)
    else:
        with r.forward.no_sync(): step(r)
    weights = [p.double().sum().item() for p in r.params]
    same = len(set(map(tuple, r.ranks.gather(weights)))) == 1
    assert same == over_sync
loop.step = one
"""
    for sync in (True, False):
        ends = ranks.finish(ranks.toy(tmp_path / str(sync), max_steps=2, hook=f"over_sync = {sync}\n" + hook))
        assert [c for c, _, _ in ends] == [0, 0], ends


SHORT = "--batch 2 --steps 1 --warmup 0 --device cpu --threads 1".split()


@pytest.mark.parametrize("task", ["nets", "sd15", "vae"])
def test_every_task_can_be_measured(task, tmp_path, capsys):
    "faults.md F: it knew flow_dit only."
    assert main(["bench", task, *SHORT, "--json", str(tmp_path / "b.json")]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["task"] == task and found["images_per_s"] > 0


@pytest.mark.parametrize(
    "words, text",
    [
        (["vae", "--size", "tiny/8"], "--size tiny/8: has no effect on vae"),
        (["vae", "--compare"], "--compare"),
        (["flow_dit", "--steps", "0"], "--steps"),
        (["flow_dit", "--json", "/nope/x.json"], "--json /nope/x.json"),
        (["vae", "--options=--lrr 3"], "--lrr: unknown option"),
        (["vae", "--options=--lr '3"], "--options --lr '3: No closing quotation"),
    ],
)
def test_what_cannot_be_measured_is_one_line(words, text, capsys):
    assert main(["bench", *words]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1

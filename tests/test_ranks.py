"""Two real processes with a launcher's variables, and once under torchrun: the same samples, the same
weights, one decision.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ranks as processes
import warm
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint
from sdcourse.engine.trackers import read_metrics

SCRIPT = Path(__file__).parent / "ranks_train.py"


def launch(out, ranks, **over):
    "Train with `ranks` processes; returns the checkpoint and what each rank reported."
    argv = [str(SCRIPT), str(out), *(f"{k}={v!r}" for k, v in over.items())]
    alone = warm.start(argv) if ranks == 1 else None
    for code, _, err in processes.finish([alone] if alone else processes.start(argv, ranks)):
        assert code == 0, err[-3000:]
    path, _ = latest_checkpoint(out / "checkpoints")
    return load_checkpoint(path), [json.loads(Path(f"{out}.rank{r}.json").read_text()) for r in range(ranks)]


@pytest.mark.parametrize(
    "over,limit",
    [
        (dict(precision="fp64", max_steps=20), 1e-9),
        (dict(lr=1e-4, max_steps=20), 1e-6),
        (dict(precision="fp64", max_steps=20, micro_batch=3, batch_size=9), 1e-9),
    ],
)
def test_two_ranks_equal_one(tmp_path, over, limit):
    """The same ids in every step, the same weights, average and losses; uneven ranks and micro-batches
    included.
    """
    one, (alone,) = launch(tmp_path / "one", 1, validate_every=10, **over)
    two, both = launch(tmp_path / "two", 2, validate_every=10, **over)
    assert alone["ids"] == [a + b for a, b in zip(both[0]["ids"], both[1]["ids"])]
    for name in ("model", "ema"):
        a, b = one["tensors"][name], two["tensors"][name]
        assert a.keys() == b.keys() and not any(k.startswith("module.") for k in b)  # R18
        assert max((a[k] - b[k]).abs().max().item() for k in a) <= limit
    for x, y in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")):
        assert x["step"] == y["step"] and x.get("lr") == y.get("lr")
        for k in ("loss", "val_loss", "grad_norm"):
            assert (k in x) == (k in y) and (
                k not in x or abs(x[k] - y[k]) <= max(limit, 1e-6 * abs(x[k])) * 10
            )


def test_a_flag_on_one_rank_stops_both_at_the_same_step(tmp_path):
    "R8: raised in step 5 on rank 1 only, acted on by both two steps later, and the run goes on afterwards."
    stopped, both = launch(tmp_path / "run", 2, precision="fp64", stop_rank=1, stop_step=5)
    assert [r["step"] for r in both] == [6, 6] and all(r["stopped"] for r in both)
    assert stopped["state"]["step"] == 6
    final, _ = launch(tmp_path / "run", 2, precision="fp64")
    whole, _ = launch(tmp_path / "whole", 1, precision="fp64")
    assert final["state"]["step"] == 12
    assert (
        max(
            (final["tensors"]["model"][k] - whole["tensors"]["model"][k]).abs().max().item()
            for k in whole["tensors"]["model"]
        )
        <= 1e-9
    )


def test_torchrun_passes_sigterm_on(tmp_path):
    """R7 under torchrun: its agent ends with an error of its own, but the ranks have saved the step they were
    in.
    """
    out = tmp_path / "run"
    agent = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(SCRIPT),
            str(out),
            "max_steps=1000000",
            "log_every=1",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + warm.LIMIT
        while not ((out / "metrics.jsonl").exists() and len(read_metrics(out)) > 5):
            assert time.monotonic() < end
            time.sleep(0.05)
        agent.send_signal(signal.SIGTERM)
        agent.wait(warm.LIMIT)
    finally:
        agent.kill()
    path, skipped = latest_checkpoint(out / "checkpoints")
    assert not skipped and load_checkpoint(path)["state"]["step"] == read_metrics(out)[-1]["step"] > 5
    assert [json.loads(Path(f"{out}.rank{r}.json").read_text())["stopped"] for r in (0, 1)] == [
        "SIGTERM",
        "SIGTERM",
    ]


@pytest.mark.parametrize("over, limit", [(dict(precision="fp64"), 1e-9), (dict(lr=1e-4), 1e-5)])
def test_another_number_of_ranks_on_the_way(tmp_path, over, limit):
    """R3: one rank, then two, then one again: the ids of every step and, to rounding, the weights of a run
    that was left alone.
    """
    over = dict(lr_schedule="cosine", warmup_steps=3) | over
    whole, (alone,) = launch(tmp_path / "whole", 1, **over)
    _, (first,) = launch(tmp_path / "run", 1, stop_rank=0, stop_step=4, **over)
    _, both = launch(tmp_path / "run", 2, stop_rank=1, stop_step=7, **over)
    final, (last,) = launch(tmp_path / "run", 1, **over)
    assert (first["step"], both[0]["step"], last["step"]) == (4, 8, 12)
    assert (
        alone["ids"] == first["ids"] + [a + b for a, b in zip(both[0]["ids"], both[1]["ids"])] + last["ids"]
    )
    for name in ("model", "ema"):
        assert (
            max((final["tensors"][name][k] - v).abs().max().item() for k, v in whole["tensors"][name].items())
            <= limit
        )
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [3, 6, 9, 12]


def test_a_bad_loss_on_one_rank_skips_the_step_on_both(tmp_path):
    "The NaN item reaches one rank only; weights stay finite and equal to those of one process."
    over = dict(precision="fp64", poison=3, max_steps=12)
    one, _ = launch(tmp_path / "one", 1, **over)
    two, _ = launch(tmp_path / "two", 2, **over)
    assert read_metrics(tmp_path / "two")[-1]["skipped"] == read_metrics(tmp_path / "one")[-1]["skipped"] > 0
    for k, v in one["tensors"]["model"].items():
        assert torch.isfinite(v).all() and (v - two["tensors"]["model"][k]).abs().max() <= 1e-9


def test_a_refusal_reaches_every_rank(tmp_path):
    ends = processes.finish(processes.toy(tmp_path / "x", batch_size=1))
    assert [c for c, _, _ in ends] == [2, 2] and all(
        "batch-size 1: fewer images than the 2 ranks" in e for _, _, e in ends
    ), ends

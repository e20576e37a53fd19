"""The loop: accumulation, guards, validation, refusals, what a run leaves behind."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
import warm
from toy import ToyNet, ToyTask, config, run

import sdcourse.engine.loop as loop
from sdcourse.core import UserError
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint
from sdcourse.engine.dist import Ranks
from sdcourse.engine.loop import Run, step
from sdcourse.engine.optim import lr_at
from sdcourse.engine.trackers import read_metrics


def weights(folder, n=None):
    path = folder / "checkpoints" / f"step-{n:08}" if n else latest_checkpoint(folder / "checkpoints")[0]
    return load_checkpoint(path)["tensors"]


def distance(a, b, name="model"):
    return max((x - y).abs().max().item() for x, y in zip(a[name].values(), b[name].values()))


@pytest.mark.parametrize("precision,lr,limit", [("fp64", 1e-2, 1e-9), ("fp32", 1e-4, 1e-6)])
@pytest.mark.parametrize("micro", [2, 3, 1])
def test_accumulation_equals_one_batch(tmp_path, precision, lr, limit, micro):
    "O1: 1 x 8, 4 x 2, 3 + 3 + 2 and 8 x 1 give the same weights after 10 steps."
    over = dict(max_steps=10, precision=precision, lr=lr)
    run(tmp_path / "one", **over)
    run(tmp_path / "many", micro_batch=micro, **over)
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "many")) <= limit
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "many"), "ema") <= limit


def test_one_step_is_plain_adamw_on_the_mean_loss(tmp_path):
    "An independent straight-line computation of the first update."
    cfg = config(tmp_path, precision="fp64", micro_batch=3)
    r = Run(ToyTask(cfg))
    before = {n: p.detach().clone() for n, p in r.module.named_parameters()}
    data, items = r.data, r.items(0, range(8))
    x0 = data.x[items].double()
    draws = loop.Draws(0, 0, range(8), dtype=torch.float64)
    loss, _ = r.module(dict(x=x0), draws)
    grads = torch.autograd.grad(loss.mean(), r.params)
    norm = torch.sqrt(sum(g.square().sum() for g in grads))
    step(r)
    scale = min(1.0, 1.0 / (norm.item() + 1e-6))
    named = {n: p for n, p in r.module.named_parameters() if p.requires_grad}
    for (n, p), g in zip(named.items(), grads):
        g = g * scale
        assert (p - (before[n] - 1e-2 * g / (g.abs() + 1e-8))).abs().max() < 1e-9
    assert torch.equal(before["frozen"], r.module.frozen)


def test_learning_rate_in_the_optimizer_is_the_closed_form(tmp_path):
    "O3, whatever the accumulation."
    cfg = config(tmp_path, lr_schedule="cosine", warmup_steps=3, lr_end=1e-3, micro_batch=3)
    r = Run(ToyTask(cfg))
    seen = []
    for s in range(12):
        step(r)
        seen.append(r.optimizer.param_groups[0]["lr"])
        assert abs(seen[-1] - lr_at(s, cfg)) < 1e-12
    assert abs(seen[-1] - 1e-3) < 1e-12


def test_bad_step_counts_but_changes_nothing(tmp_path):
    "R10: number, learning rate and data go on; weights, moments and Adam's step count stay."
    run(tmp_path, nan_at=4, checkpoint_every=1, keep=20, validate_every=0)
    four, five, six = (load_checkpoint(tmp_path / "checkpoints" / f"step-{n:08}") for n in (4, 5, 6))
    assert all(
        torch.equal(a, b)
        for a, b in zip(four["tensors"]["model"].values(), five["tensors"]["model"].values())
    )
    a, b = four["objects"]["optimizer"]["state"], five["objects"]["optimizer"]["state"]
    assert all(torch.equal(a[k][n], b[k][n]) for k in a for n in ("step", "exp_avg", "exp_avg_sq"))
    assert distance(five["tensors"], six["tensors"]) > 0
    rows = read_metrics(tmp_path)
    assert [r["skipped"] for r in rows] == [0, 1, 1, 1] and all(r["loss"] is not None for r in rows)


def test_too_many_bad_steps_end_the_run_with_the_ids(tmp_path):
    with pytest.raises(UserError, match=r"6 steps in a row.*items \[10\d"):
        run(tmp_path, items=8, poison=3, max_bad_steps=5, log_every=6)


def test_a_row_of_bad_steps_is_counted_across_log_lines(tmp_path):
    with pytest.raises(UserError, match="in a row"):
        run(tmp_path, items=8, poison=3, max_bad_steps=5, log_every=1)


def test_no_host_read_inside_the_step(tmp_path):
    "A CPU stand-in for CUDA's sync debug mode: no tensor value is read by Python during a step."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (
                torch.ops.aten._local_scalar_dense,
                torch.ops.aten.nonzero,
                torch.ops.aten.is_nonzero,
            ):
                self.found.append(func)
            return func(*args, **(kwargs or {}))

    r = Run(ToyTask(config(tmp_path, micro_batch=4)))
    with Reads() as reads:
        for _ in range(3):
            step(r)
    assert not reads.found
    with Reads() as reads:
        r.meter.losses.sum().item()
    assert reads.found


@pytest.mark.parametrize("every", [1, 5])
def test_validation_never_disturbs_training(tmp_path, every):
    "E12, bit for bit, with dropout on."
    run(tmp_path / "off", dropout=0.3)
    run(tmp_path / "on", dropout=0.3, validate_every=every)
    for a, b in zip(weights(tmp_path / "off").values(), weights(tmp_path / "on").values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert len([r for r in read_metrics(tmp_path / "on") if "val_loss" in r]) == (12 if every == 1 else 3)


def test_validation_uses_the_average_and_fixed_noise(tmp_path):
    r = Run(ToyTask(config(tmp_path)))
    a, r.step = loop.validation_loss(r), 7
    assert loop.validation_loss(r) == a
    r.module.blocks[0].weight.data.add_(1.0)
    assert loop.validation_loss(r) == a
    r.ema.module.blocks[0].weight.data.add_(1.0)
    assert loop.validation_loss(r) != a
    r.cfg.micro_batch = 3
    in_threes = loop.validation_loss(r)
    r.cfg.micro_batch = 0
    assert abs(in_threes / loop.validation_loss(r) - 1) < 1e-5


def test_a_failing_validation_warns_and_training_goes_on(tmp_path, monkeypatch, caplog):
    def broken(self, module, path):
        raise RuntimeError("no ink")

    monkeypatch.setattr(ToyTask, "sample", broken)
    result = run(tmp_path, validate_every=4)
    assert result.step == 12 and not result.stopped
    assert "no ink" in caplog.text and "training goes on" in caplog.text


def test_resume_with_other_settings_is_refused(tmp_path):
    "R11."
    run(tmp_path, max_steps=6)
    kept = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"lr: 0.01 -> 0.02.*--force"):
        run(tmp_path, max_steps=6, lr=0.02)
    assert sorted(p.name for p in tmp_path.rglob("*")) == kept
    run(tmp_path, max_steps=6, log_every=1, micro_batch=2, num_workers=0)
    assert run(tmp_path, max_steps=8, lr=0.02, force=True).step == 8


def test_another_commit_warns(tmp_path, monkeypatch, caplog):
    run(tmp_path, max_steps=3)
    monkeypatch.setattr(loop, "git_commit", lambda: "0123456789abcdef")
    run(tmp_path, max_steps=3)
    assert "0123456789ab" in caplog.text


def test_a_finished_run_does_nothing(tmp_path, monkeypatch):
    "R12."
    first = run(tmp_path)

    def never(*_):
        raise AssertionError("a finished run must not build or step")

    monkeypatch.setattr(loop, "Run", never)
    again = run(tmp_path)
    assert again.step == 12 and again.exit_code == 0 and again.metrics == first.metrics


def test_an_export_that_was_lost_is_made_again(tmp_path):
    run(tmp_path)
    shutil.rmtree(tmp_path / "export")
    run(tmp_path)
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_corrupt_newer_checkpoints_fall_back(tmp_path, caplog):
    "R14."
    run(tmp_path, checkpoint_every=3, keep=10)
    shutil.rmtree(tmp_path / "export")
    for n, name in ((6, "model.safetensors"), (9, "optimizer.pt"), (12, "state.json")):
        f = tmp_path / "checkpoints" / f"step-{n:08}" / name
        f.write_bytes(f.read_bytes()[:-1] + b"?")
    want = weights(tmp_path, 3)
    start = []
    original = loop.find_start
    loop.find_start = lambda cfg: start.append(original(cfg)) or start[0]
    try:
        run(tmp_path)
    finally:
        loop.find_start = original
    assert start[0]["state"]["step"] == 3 and distance(start[0]["tensors"], want) == 0
    assert caplog.text.count("skipped a checkpoint") == 3


def test_missing_tensors_are_an_error(tmp_path):
    "R13: a checkpoint that lacks the average does not silently continue without it."
    run(tmp_path / "a", ema_decay=0.0, max_steps=3)
    with pytest.raises(UserError, match="ema"):
        run(
            tmp_path / "b",
            max_steps=3,
            resume=str(latest_checkpoint(tmp_path / "a" / "checkpoints")[0]),
            force=True,
        )


def test_keys_must_fit_the_model(tmp_path):
    r = Run(ToyTask(config(tmp_path)))
    whole = dict(tensors=r.tensors(), objects=dict(optimizer=r.optimizer.state_dict()), state=r.state())
    for wrong in (
        dict(model=whole["tensors"]["model"]),
        {k: dict(list(v.items())[1:]) for k, v in whole["tensors"].items()},
        {k: {n: t[:1] for n, t in v.items()} for k, v in whole["tensors"].items()},
    ):
        with pytest.raises(UserError, match="checkpoint"):
            r.load(whole | dict(tensors=wrong))
    r.load(whole)


def test_low_precision_weights_are_refused(tmp_path, monkeypatch):
    "O11."
    build = ToyTask.build
    monkeypatch.setattr(ToyTask, "build", lambda self: build(self).bfloat16())
    with pytest.raises(UserError, match="blocks.0.weight is torch.bfloat16"):
        run(tmp_path, precision="bf16")


def test_bf16_autocast_keeps_fp32_weights(tmp_path):
    run(tmp_path, precision="bf16", max_steps=4)
    w = weights(tmp_path)
    assert {v.dtype for part in w.values() for v in part.values()} == {torch.float32}


def test_wrong_pairing_is_noticed(tmp_path, monkeypatch):
    "D1: an item that carries another id than the order says."
    from toy import Points

    get = Points.__getitem__
    monkeypatch.setattr(Points, "__getitem__", lambda self, i: get(self, (i + 1) % len(self)))
    with pytest.raises(RuntimeError, match="expected"):
        run(tmp_path)


def test_what_a_run_leaves_behind(tmp_path):
    "DESIGN section 6 and U8."
    result = run(tmp_path, checkpoint_every=5, validate_every=6, keep=2)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "samples", "export", "README.md"} <= names
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step-00000006.png",
        "step-00000012.png",
    ]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [3, 6, 9, 12] and [r["samples"] for r in rows] == [24, 48, 72, 96]
    for r in rows:
        assert {
            "loss",
            "loss_by_t",
            "grad_norm",
            "lr",
            "images_per_s",
            "mfu",
            "peak_memory_gb",
            "data_wait",
            "skipped",
            "epoch",
        } <= r.keys()
        assert len(r["loss_by_t"]) == 10 and 0 <= r["data_wait"] <= 1 and r["mfu"] > 0
    text = result.summary()
    assert "finished 12 steps" in text and str(tmp_path / "export") in text


def test_export_is_the_average(tmp_path):
    run(tmp_path)
    exported, ema = load_file(tmp_path / "export" / "model.safetensors"), weights(tmp_path)["ema"]
    assert all(torch.equal(exported[k], v) for k, v in ema.items())


def test_loss_by_t_covers_the_window(tmp_path):
    "The logged loss is the mean over all samples of the window, and the buckets add up to it."
    r = Run(ToyTask(config(tmp_path, lr=1e-12)))
    losses, times = [], []
    for s in range(3):
        rows = range(8)
        x = r.data.x[r.items(s, rows)]
        loss, t = r.module(dict(x=x), loop.Draws(0, s, rows))
        losses.append(loss.detach()), times.append(t)
        step(r)
    row, loss, t = r.meter.read(), torch.cat(losses).double(), torch.cat(times)
    assert abs(row["loss"] - loss.mean().item()) < 1e-6
    for b in range(10):
        mine = loss[(t * 10).long() == b]
        assert (
            (row["loss_by_t"][b] is None)
            if len(mine) == 0
            else abs(row["loss_by_t"][b] - mine.mean().item()) < 1e-6
        )


def test_keys_have_no_wrapper_names(tmp_path):
    "R18: compiled or not, the saved names are the model's own."
    run(tmp_path / "plain", max_steps=2)
    run(tmp_path / "compiled", max_steps=2, compile=True)
    assert weights(tmp_path / "plain")["model"].keys() == weights(tmp_path / "compiled")["model"].keys()
    assert not any(
        k.startswith(("module.", "_orig_mod.")) or "._orig_mod" in k
        for k in weights(tmp_path / "compiled")["model"]
    )


def test_dry_run_leaves_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sdcourse")
    result = run(tmp_path / "x", dry_run=True)
    assert result.stopped == "dry run" and not any((tmp_path / "x").iterdir())
    assert "batch: 8 = micro 8 x ranks 1 x accumulation 1" in caplog.text and "dry run" in caplog.text


def test_preflight_refuses_what_does_not_fit(tmp_path, monkeypatch):
    import sdcourse.engine.preflight as preflight

    monkeypatch.setattr(preflight, "free_memory", lambda device: 100)
    with pytest.raises(UserError, match="need .* has 100 B free"):
        run(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(UserError, match="disk has 10 B free"):
        run(tmp_path)


def test_more_ranks_than_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch-size"):
        config(tmp_path, batch_size=2).check(world=3)


def test_memory_is_flat_over_many_steps(tmp_path):
    "R16 in small: live tensors do not grow between step 20 and step 120."
    import gc

    def alive():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    r = Run(ToyTask(config(tmp_path, max_steps=200)), Ranks())
    for _ in range(20):
        step(r)
    before = alive()
    for _ in range(100):
        step(r)
    assert alive() <= before


def test_memory_of_the_process_is_flat(tmp_path):
    """R16: a real task, validation and pictures included; resident memory of step 500 is that of step 50, to
    2 % or 16 MB.
    """
    code = """
import json, sys
import psutil, torch
import sdcourse.engine.loop as loop
from sdcourse.config import resolve
from sdcourse.train.flow_dit import Config, Task
torch.set_num_threads(1)
step, seen = loop.step, {}
def one(r):
    step(r)
    seen[r.step] = psutil.Process().memory_info().rss
loop.step = one
often = dict(validate_every=50, checkpoint_every=50, log_every=10)
small = dict(size="tiny/8", batch_size=16, num_samples=0, num_inference_steps=2, device="cpu")
loop.train(Task(resolve(Config, overrides=dict(out=sys.argv[1], max_steps=500, **often, **small))))
print(json.dumps([seen[50], seen[500]]))
"""
    done = warm.run(["-c", code, tmp_path / "run"], first=warm.MODELS, timeout=warm.LONG)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert after - before <= max(0.02 * before, 16e6), (before, after)


def test_a_branch_needs_its_own_folder(tmp_path):
    "Going on from an older checkpoint in the same folder would leave two histories in it."
    run(tmp_path / "a", checkpoint_every=4, keep=9)
    old = str(tmp_path / "a" / "checkpoints" / "step-00000004")
    with pytest.raises(UserError, match="step-00000012.*its own --out"):
        run(tmp_path / "a", checkpoint_every=4, keep=9, resume=old)
    branch = run(tmp_path / "b", resume=old)
    assert branch.step == 12 and distance(weights(tmp_path / "a"), weights(tmp_path / "b")) == 0


PAGES = """
import ctypes, resource, sys, torch
from sdcourse.core import use_cpu
def pages(rounds=20): # new ones per round of 40 MB asked for and given back
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds): torch.ones(10_000_000)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds
out = [pages()]
for device in ("cuda", "cpu"):
    use_cpu(1, device)
    pages()
    out.append(pages())
print(*out, torch.get_num_threads(), hasattr(ctypes.CDLL(None), "mallopt"))
"""


def test_freed_memory_stays_where_the_cpu_computes():
    "Beside a GPU the host gives back what it held once."
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True)
    first, cuda, cpu, threads, glibc = done.stdout.split()
    if glibc != "True":
        pytest.skip("another C library than glibc")
    assert float(cpu) < float(first) / 10 and float(cuda) > float(first) / 2 and threads == "1", done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
def test_threads_that_wait_leave_their_core():
    """Beside one busy process two spinning threads are ten times slower than one; OpenMP itself says what it
    does. Who asks for ACTIVE gets it.
    """

    def spins(**env):
        words = [sys.executable, "-c", "import sdcourse, torch"]
        env = (
            {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
            | {"OMP_DISPLAY_ENV": "VERBOSE"}
            | env
        )
        return int(
            re.search(
                r"GOMP_SPINCOUNT = '(\d+)'",
                subprocess.run(words, env=env, capture_output=True, text=True).stderr,
            )[1]
        )

    assert spins() == 0 and spins(OMP_WAIT_POLICY="ACTIVE") > 0


def test_a_run_sets_up_the_processor(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "use_cpu", lambda *a: seen.append(a))
    Run(ToyTask(config(tmp_path, threads=1)))
    assert seen == [(1, "cpu")]


def blown_up(out, **over):
    "Forty good steps, then a learning rate of 1e30, as in faults.md E."
    run(out, max_steps=40, **over)
    shutil.rmtree(out / "export")
    with pytest.raises(UserError) as refused:
        run(out, max_steps=160, lr=1e30, force=True, **over)
    return str(refused.value)


@pytest.mark.parametrize(
    "log_every, checkpoint_every, keep", [(50, 10, 2), (20, 10, 1), (50, 2, 3), (7, 3, 1)]
)
def test_bad_steps_never_push_out_the_last_good_checkpoint(tmp_path, log_every, checkpoint_every, keep):
    over = dict(log_every=log_every, checkpoint_every=checkpoint_every, keep=keep, max_bad_steps=10)
    run(tmp_path / "good", max_steps=40, **over)
    said = blown_up(tmp_path / "bad", **over)
    assert "steps in a row had a non-finite loss" in said and "\n" not in said
    left = sorted(p.name for p in (tmp_path / "bad/checkpoints").iterdir())
    assert "step-00000040" in left and len(left) <= keep
    good, kept = weights(tmp_path / "good", 40), weights(tmp_path / "bad", 40)
    assert distance(good, kept) == 0
    assert max(v.abs().max().item() for v in weights(tmp_path / "bad")["model"].values()) < 1e6
    assert run(tmp_path / "bad", max_steps=44, lr=1e-3, force=True, **over).step == 44


def test_a_stop_among_bad_steps_saves_and_replaces_nothing(tmp_path, monkeypatch):
    "Stopped and resumed twice within the streak: one doubtful checkpoint at a time beside the good one."
    over = dict(items=8, max_bad_steps=99, keep=1, checkpoint_every=0)
    run(tmp_path, max_steps=4, **over)
    for stop in (6, 8):

        def one(r, stop=stop):
            r.module.nan_at = r.step
            step(r)
            if r.step == stop:
                os.kill(os.getpid(), 15)

        monkeypatch.setattr(loop, "step", one)
        assert run(tmp_path, max_steps=20, force=True, **over).step == stop
        left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert left == ["step-00000004", f"step-{stop:08}"]
    monkeypatch.setattr(loop, "step", step)
    assert run(tmp_path, max_steps=20, force=True, **over).step == 20
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]


def test_a_model_that_is_not_finite_is_refused_at_the_start(tmp_path, monkeypatch):
    "faults.md F: a NaN weight, fewer steps than --max-bad-steps: nothing is exported as finished."
    build = ToyTask.build

    def broken(self):
        net = build(self)
        net.frozen.data.fill_(float("nan"))
        return net

    monkeypatch.setattr(ToyTask, "build", broken)
    with pytest.raises(UserError, match=r"not finite before step 0 \(frozen\)"):
        run(tmp_path, max_steps=9)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("max_steps", [44, 49])
def test_a_run_that_ends_among_bad_steps_is_not_finished(tmp_path, max_steps):
    "Its weights of 1e30 are finite; its losses are not."
    over = dict(keep=1, checkpoint_every=10, log_every=10)
    run(tmp_path, max_steps=40, **over)
    shutil.rmtree(tmp_path / "export")
    with pytest.raises(UserError, match=r"no model is exported: the last \d steps had a non-finite"):
        run(tmp_path, max_steps=max_steps, lr=1e30, force=True, **over)
    assert not (tmp_path / "export").exists()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000040"]


def test_weights_that_are_not_finite_at_the_end_are_not_exported(tmp_path, monkeypatch):
    def spoilt(r):
        step(r)
        if r.step == 12:
            r.ema.module.blocks[0].bias.data[0] = float("inf")

    monkeypatch.setattr(loop, "step", spoilt)
    with pytest.raises(UserError, match="after step 12 blocks.0.bias holds numbers that are not finite"):
        run(tmp_path)
    assert not (tmp_path / "export").exists()


def test_one_bad_step_at_the_end_does_no_harm(tmp_path):
    assert run(tmp_path, nan_at=11).step == 12 and (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "name", ["step-00000002.bak", "step-latest", "step-", "step-00000009x", "latest", "step-٣"]
)
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_odd_entries_beside_the_checkpoints(tmp_path, name, kind):
    "faults.md D: a run with such an entry can be resumed."
    run(tmp_path, max_steps=4, checkpoint_every=2)
    odd = tmp_path / "checkpoints" / name
    if kind == "folder":
        odd.mkdir()
    elif kind == "file":
        odd.touch()
    else:
        odd.symlink_to("step-00000004")
    assert run(tmp_path, max_steps=6, checkpoint_every=2, force=True).step == 6 and os.path.lexists(odd)


KILLED = """
import os, sys
sys.path[:0] = [{tests!r}]
import toy
from sdcourse.core import UserError
get = toy.Points.__getitem__
def dies(self, i):
    if i == 7: os.kill(os.getpid(), 9)
    return get(self, i)
toy.Points.__getitem__ = dies
try: toy.run({out!r}, num_workers=2, checkpoint_every=1)
except UserError as e: print(e)
"""


def test_a_killed_reader_is_one_line(tmp_path):
    "faults.md E: a data worker that the system ended for want of memory."
    tests = os.path.dirname(os.path.abspath(__file__))
    done = warm.run(["-c", KILLED.format(tests=tests, out=str(tmp_path))], first=warm.LOOP)
    assert done.returncode == 0, done.stderr[-1500:]
    assert re.fullmatch(r"a process that reads data ended .*lower --num-workers.*\n", done.stdout), (
        done.stdout
    )


def test_compiling_that_cannot_work_is_refused_before_a_model_is_built(tmp_path, monkeypatch):
    "No C++ compiler, no Triton, a Python that torch does not know."

    def compile(_):
        def call(*_):
            raise RuntimeError("No working C++ compiler found\nin cpp.cxx")

        return call

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(ToyTask, "build", lambda self: pytest.fail("it was built"))
    with pytest.raises(UserError, match="--compile: does not work here .*No working C.* compiler") as e:
        run(tmp_path / "run", compile=True)
    assert "\n" not in str(e.value)


def test_epochs_say_how_many_steps_and_a_resume_keeps_them(tmp_path, caplog):
    result = run(tmp_path / "x", epochs=2.0, max_steps=3)
    assert result.step == result.max_steps == 13  # 2 x 50 points in batches of 8
    assert run(tmp_path / "x", epochs=2.0).stopped == "" and "learned by heart" not in caplog.text
    with pytest.raises(UserError, match="epochs"):
        run(tmp_path / "x", epochs=3.0)
    run(tmp_path / "y", epochs=400.0, dry_run=True)
    assert "2,500 steps show each of 50 pictures 400 times" in caplog.text
    assert "give --epochs 300 or fewer" in caplog.text
    cfg = config(tmp_path / "y", epochs=2.0)
    cfg.given = frozenset({"epochs", "max_steps"})
    with pytest.raises(UserError, match="--epochs 2: --max-steps 12 says how long, too; give one of them"):
        cfg.check()


def test_an_average_on_the_cpu_is_the_same_run(tmp_path, monkeypatch):
    from sdcourse.engine.optim import EMA

    used = []
    at_hand = EMA.at_hand
    monkeypatch.setattr(EMA, "at_hand", lambda self: used.append(self.cpu) or at_hand(self))
    over = dict(max_steps=4, checkpoint_every=4, device="auto")
    for cpu in (False, True):
        run(tmp_path / str(cpu), ema_cpu=cpu, **over)
    a, b = (weights(tmp_path / str(cpu)) for cpu in (False, True))
    assert all(torch.equal(a[k][n], b[k][n]) for k in ("model", "ema") for n in a[k])
    assert used == [False, False, True, True]  # for a validation and for the export
    with pytest.raises(UserError, match="--ema-cpu: has no effect with --device cpu"):
        config(tmp_path, ema_cpu=True).check()


def test_attention_switch_holds_in_steps_and_validations(tmp_path, monkeypatch):
    seen = set()
    forward = ToyNet.forward

    def looking(self, batch, draws):
        seen.add((self.training, torch.backends.cuda.flash_sdp_enabled()))
        return forward(self, batch, draws)

    monkeypatch.setattr(ToyNet, "forward", looking)
    run(tmp_path, max_steps=2, attention="math")
    assert seen == {(True, False), (False, False)} and torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(UserError, match="--attention cudnn: cannot compute this here"):
        run(tmp_path / "x", max_steps=2, attention="cudnn")


def test_what_a_machine_lacks_is_refused_before_a_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(ToyTask, "build", None)
    with pytest.raises(UserError, match="run: pip install bitsandbytes"):
        run(tmp_path, optimizer="adamw8bit")
    with pytest.raises(UserError, match="--tf32 on: .* leave it out"):
        run(tmp_path, tf32="on", device="auto")

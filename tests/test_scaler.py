"""fp16 with a gradient scaler, run through on the CPU: there the engine refuses it, so the choice of the
precision is patched and nothing else.
"""

from functools import partial

import pytest
import torch
from test_resume import outcome, same, watched
from toy import ToyTask, config, run

import sdcourse.engine.loop as loop
from sdcourse.core import UserError
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint
from sdcourse.engine.loop import Run, step
from sdcourse.engine.trackers import read_metrics


@pytest.fixture
def fp16(monkeypatch):
    "`fp16(scale, interval)`: from now on runs compute in float16 and begin with this loss scale."

    def on(scale=8.0, interval=2000):
        kind = partial(torch.amp.grad_scaler.GradScaler, init_scale=scale, growth_interval=interval)
        monkeypatch.setattr(torch.amp, "GradScaler", kind)
        monkeypatch.setattr(loop, "resolve_precision", lambda *_: (torch.float16, torch.float32))

    return on


def toy(out, **over):
    return Run(ToyTask(config(out, **over)))


def inside(r):
    "All that a skipped step must leave alone: weights, and moments with Adam's own count."
    moments = [v.clone() for s in r.optimizer.state.values() for v in s.values()]
    return [p.detach().clone() for p in r.module.parameters()], moments


def spoil(r, value, at):
    "The first gradient of the steps `at` holds `value`, as after an overflow in float16."
    first = r.params[0]

    def one(grad):
        out = grad.clone()
        out.view(-1)[0] = value
        return out if r.step in at else grad

    first.register_hook(one)


def test_an_inf_gradient_is_skipped_and_the_scale_halves(tmp_path, fp16):
    fp16(scale=1024.0)
    r = toy(tmp_path, ema_decay=0.0)
    spoil(r, float("inf"), [3])
    for s in range(6):
        before = inside(r)
        scale = r.scaler.get_scale()
        step(r)
        after = inside(r)
        assert same(before, after) == (s == 3)
        assert r.scaler.get_scale() == (scale / 2 if s == 3 else scale)
    assert r.step == 6 and r.scaler.get_scale() == 512
    row = r.meter.read()
    assert (row["skipped"], row["bad_in_a_row"]) == (1, 0) and row["loss"] is not None


def test_the_scale_grows_after_its_interval_and_falls_by_real_overflow(tmp_path, fp16):
    "No step is spoilt here: float16 overflows on its own at 2^22 and above."
    fp16(scale=2.0**22, interval=3)
    r = toy(tmp_path, max_steps=40)
    scales = []
    for _ in range(30):
        before, _ = inside(r)
        step(r)
        scales.append((r.scaler.get_scale(), same(before, inside(r)[0])))
    values = [2.0**22, *(v for v, _ in scales)]
    assert all((b == a / 2) == skipped for a, b, (_, skipped) in zip(values, values[1:], scales))
    assert any(b == 2 * a for a, b in zip(values, values[1:]))
    skipped = sum(s for _, s in scales)
    assert skipped >= 5 and r.meter.read()["skipped"] == skipped


def test_gradients_are_unscaled_before_they_are_clipped(tmp_path, fp16):
    "The scale changes nothing but the rounding: the same run at 1 and at 2^10."
    found = []
    for name, scale in (("a", 1.0), ("b", 1024.0)):
        fp16(scale=scale)
        run(tmp_path / name, clip=0.1)
        found.append([r["grad_norm"] for r in read_metrics(tmp_path / name)])
    assert found[0] == pytest.approx(found[1], rel=2e-2)


def test_steps_that_look_for_the_scale_end_no_run_and_spoil_no_checkpoint(tmp_path, fp16):
    "Six skipped steps and more, three are allowed: the scale begins too high, which is no divergence."
    fp16(scale=2.0**26)
    result = run(tmp_path, max_bad_steps=3, max_steps=16, log_every=1, checkpoint_every=1, keep=2)
    rows = read_metrics(tmp_path)
    skipped = rows[-1]["skipped"]
    assert result.step == 16 and (tmp_path / "export").exists() and skipped >= 6
    assert [r["skipped"] for r in rows[:6]] == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    state = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints")[0])["state"]
    assert state["scaler"]["scale"] == 2.0 ** (26 - skipped) and state["meter"]["bad"][1:3] == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_no_scale_mends_ends_the_run(tmp_path, fp16, monkeypatch, value):
    "From 4 the scale falls twice; then the steps count."
    fp16(scale=4.0)
    build = Run._build

    def built(self):
        build(self)
        spoil(self, value, range(3, 99))

    monkeypatch.setattr(Run, "_build", built)
    with pytest.raises(UserError, match=r"3 steps in a row .* the last one step 7 "):
        run(tmp_path, max_bad_steps=3, log_every=1)


def test_a_loss_that_is_not_finite_counts_whatever_the_scale(tmp_path, fp16):
    fp16(scale=2.0**12)
    with pytest.raises(UserError, match="6 steps in a row"):
        run(tmp_path, items=8, poison=3, max_bad_steps=5, log_every=6)


def test_a_run_of_fp16_that_ends_among_bad_steps_is_not_finished(tmp_path, fp16, monkeypatch):
    fp16(scale=1024.0)
    forward = ToyTask.build

    def build(self):
        net = forward(self)
        net.register_forward_hook(
            lambda m, args, out: (out[0] * float("nan"), out[1]) if args[1].step > 8 else out
        )
        return net

    monkeypatch.setattr(ToyTask, "build", build)
    with pytest.raises(UserError, match="no model is exported: the last 3 steps"):
        run(tmp_path, max_bad_steps=10)


def scaler_of(out):
    return load_checkpoint(latest_checkpoint(out / "checkpoints")[0])["state"]["scaler"]


@pytest.mark.parametrize("stop, good", [(2, 0), (6, 2)])
def test_a_resume_keeps_the_scale_and_where_it_stood(tmp_path, fp16, stop, good):
    "Stopped while the scale is looked for, and in the middle of an interval of growth."
    fp16(scale=2.0**19, interval=4)
    run(tmp_path / "whole")
    with watched(stop):
        assert run(tmp_path / "parts").stopped == "SIGUSR1"
    assert scaler_of(tmp_path / "parts")["_growth_tracker"] == good
    fp16(scale=1.0, interval=4)  # what a new run would begin with
    assert run(tmp_path / "parts").step == 12
    for a, b in zip(outcome(tmp_path / "whole"), outcome(tmp_path / "parts")):
        assert same(a, b)
    assert scaler_of(tmp_path / "whole") == scaler_of(tmp_path / "parts")


def test_no_host_read_inside_the_step(tmp_path, fp16):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten._local_scalar_dense:
                self.found.append(func)
            return func(*args, **(kwargs or {}))

    fp16(scale=2.0**24)
    r = toy(tmp_path, micro_batch=4)
    with Reads() as reads:
        for _ in range(3):
            step(r)
    assert not reads.found


def test_the_engine_itself_refuses_fp16_on_a_cpu(tmp_path):
    with pytest.raises(UserError, match="fp16"):
        run(tmp_path, precision="fp16")

"""Learning rate, AdamW with its guard, clipping, EMA, precision."""

import math
import sys
from types import SimpleNamespace as NS

import pytest
import torch
from torch import nn

from sdcourse.core import UserError
from sdcourse.engine.optim import (
    EMA,
    attention_by,
    build_optimizer,
    check_attention,
    check_master_weights,
    clip_gradients,
    guarded_step,
    lr_at,
    resolve_precision,
    set_tf32,
)

CPU = torch.device("cpu")


def cfg(**over):
    return NS(
        **{
            **dict(
                lr=1e-3,
                lr_end=1e-5,
                lr_schedule="cosine",
                warmup_steps=10,
                max_steps=100,
                optimizer="adamw",
                lr_power=2.0,
                lr_cycles=3,
                beta1=0.9,
                beta2=0.99,
                adam_eps=1e-8,
                weight_decay=0.1,
            ),
            **over,
        }
    )


def test_lr_closed_form():
    for s in range(10):
        assert abs(lr_at(s, cfg()) - 1e-3 * (s + 1) / 10) < 1e-12
    for s in range(10, 100):
        done = (s - 10) / 89
        assert abs(lr_at(s, cfg()) - (1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * done)))) < 1e-12
        assert abs(lr_at(s, cfg(lr_schedule="linear")) - (1e-3 + (1e-5 - 1e-3) * done)) < 1e-12
        assert lr_at(s, cfg(lr_schedule="constant")) == 1e-3


def test_polynomial_and_restarts_against_diffusers():
    from diffusers.optimization import get_scheduler

    for ours, theirs, more in (
        ("polynomial", "polynomial", dict(power=2.0, num_training_steps=89)),
        ("restarts", "cosine_with_restarts", dict(num_cycles=3, num_training_steps=89)),
    ):
        opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = get_scheduler(theirs, opt, num_warmup_steps=0, **more)
        end = 1e-7 if ours == "polynomial" else 0.0
        for s in range(10, 100):
            mine = lr_at(s, cfg(lr=1.0, lr_end=end, lr_schedule=ours))
            assert abs(mine - schedule.get_last_lr()[0]) < 1e-9, (ours, s)
            opt.step()
            schedule.step()


def test_beta1_and_eps_reach_the_optimizer():
    (group,) = build_optimizer(nn.Linear(2, 2, bias=False), cfg(beta1=0.5, adam_eps=1e-3)).param_groups
    assert group["betas"] == (0.5, 0.99) and group["eps"] == 1e-3


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "restarts"])
def test_lr_ends_at_the_configured_value_in_the_last_step(name):
    assert abs(lr_at(99, cfg(lr_schedule=name)) - 1e-5) < 1e-12
    assert lr_at(98, cfg(lr_schedule=name)) > 1.001e-5


def test_optimizer_equals_plain_adamw():
    "The fused optimizer against the formula of Loshchilov & Hutter (2019), algorithm 2."
    w = nn.Parameter(torch.full((2, 2), 0.5, dtype=torch.float64))
    opt = build_optimizer(nn.ParameterList([w]), cfg())
    ref, m, v = 0.5, 0.0, 0.0
    for t, g in enumerate([0.3, -0.2, 0.7], 1):
        w.grad = torch.full_like(w, g)
        guarded_step(opt, torch.tensor(False))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        ref = ref * (1 - 1e-3 * 0.1) - 1e-3 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.99**t)) + 1e-8)
    assert (w - ref).abs().max() < 1e-12


def test_weight_decay_spares_vectors():
    groups = build_optimizer(nn.Linear(3, 3), cfg()).param_groups
    assert {tuple(p.shape): g["weight_decay"] for g in groups for p in g["params"]} == {
        (3, 3): 0.1,
        (3,): 0.0,
    }


@pytest.mark.parametrize("name", ["adamw", "torch.optim.RAdam"])
def test_a_bad_step_leaves_weights_and_moments(name):
    def after(grads):
        w = nn.Parameter(torch.ones(4, 4))
        opt = build_optimizer(nn.ParameterList([w]), cfg(optimizer=name))
        for g in grads:
            w.grad = torch.full_like(w, g)
            guarded_step(opt, ~torch.isfinite(w.grad).all())
        return [w.detach()] + [v for v in opt.state[w].values() if isinstance(v, torch.Tensor)]

    for a, b in zip(after([0.1, float("inf"), 0.2, float("nan")]), after([0.1, 0.2])):
        assert torch.equal(a, b)


def test_unknown_optimizer_is_one_line():
    with pytest.raises(UserError, match="torch.optim.Adamm.*package.Class"):
        build_optimizer(nn.Linear(1, 1), cfg(optimizer="torch.optim.Adamm"))


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="no trainable"):
        build_optimizer(nn.Linear(1, 1).requires_grad_(False), cfg())


def test_clip_measures_before_it_scales():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([p], 0.0).item() == 5.0 and p.grad.tolist() == [3.0, 4.0]
    assert clip_gradients([p], 1.0).item() == 5.0
    assert (p.grad - torch.tensor([0.6, 0.8])).abs().max() < 1e-5


def test_ema_closed_form_after_1000_steps():
    lin = nn.Linear(1, 1).double()
    ema, decay, expected = EMA(lin, 0.995), 0.995, lin.weight.item()
    for s in range(1000):
        nn.init.constant_(lin.weight, math.sin(s))
        ema.update(s)
        d = min(decay, (1 + s) / (10 + s))
        expected = d * expected + (1 - d) * math.sin(s)
    assert abs(ema.module.weight.item() - expected) < 1e-6
    assert lin.weight.item() == math.sin(999)


def test_ema_equals_a_loop_over_tensors():
    net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    ema, loop = EMA(net, 0.9), [p.detach().clone() for p in net.parameters()]
    for s in range(20):
        for p in net.parameters():
            p.data += 0.1
        ema.update(s)
        for a, p in zip(loop, net.parameters()):
            a.lerp_(p.detach(), 1 - min(0.9, (1 + s) / (10 + s)))
    assert all(torch.equal(a, b) for a, b in zip(loop, ema.module.parameters()))


def test_ema_shares_frozen_weights():
    net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    twin = EMA(net, 0.9).module
    assert twin[0].weight is net[0].weight and twin[1].weight is not net[1].weight
    assert (
        not twin.training
        and not any(p.requires_grad for p in twin.parameters())
        and net[1].weight.requires_grad
    )


def test_low_precision_master_weights_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    with pytest.raises(UserError, match="1.weight is torch.bfloat16"):
        check_master_weights(net)
    check_master_weights(net[1].requires_grad_(False))


def test_precision():
    assert resolve_precision("auto", CPU) == (None, torch.float32)
    assert resolve_precision("bf16", CPU) == (torch.bfloat16, torch.float32)
    assert resolve_precision("fp64", CPU) == (None, torch.float64)
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        resolve_precision("fp16", CPU)


@pytest.mark.parametrize(
    "name, why",
    [
        ("os.system", "is no optimizer"),
        ("torch.nn.Linear", "is no optimizer"),
        ("torch.optim.LBFGS", "makes no step here"),
        ("torch.optim.SparseAdam", "makes no step here"),
        ("torch.optim.Optimizer", "makes no step here"),
        ("torch.optim", "is no optimizer"),
        ("..", "cannot import"),
    ],
)
def test_what_is_no_usable_optimizer_is_one_line(name, why, capfd):
    "faults.md D; os.system is not called either."
    with pytest.raises(UserError, match=why) as refused:
        build_optimizer(nn.Linear(2, 2), cfg(optimizer=name))
    assert (
        "\n" not in str(refused.value)
        and "use adamw" in str(refused.value)
        and capfd.readouterr() == ("", "")
    )


def test_trying_an_optimizer_draws_nothing_and_trains_nothing():
    net = nn.Linear(2, 2)
    before = [p.detach().clone() for p in net.parameters()]
    state = torch.get_rng_state()
    opt = build_optimizer(net, cfg(optimizer="torch.optim.NAdam"))
    assert torch.equal(state, torch.get_rng_state()) and not opt.state
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_the_average_waits_on_the_cpu_and_has_the_same_bits():
    torch.manual_seed(0)
    one, asked = nn.Linear(8, 8), []
    here, there = EMA(one, 0.9), EMA(one, 0.9, cpu=True)

    class Away:  # a weight on another device
        device = CPU

        def __init__(self, p):
            self.p = p

        def to(self, device):
            asked.append(str(device))
            return self.p

    there.source = [Away(p) for p in there.source]
    for s in range(5):
        with torch.no_grad():
            one.weight += torch.randn(8, 8)
        here.update(s)
        there.update(s)
    assert asked == ["cpu"] * 10  # each weight in each step
    with there.at_hand() as module:
        assert all(torch.equal(a, b) for a, b in zip(here.params, module.parameters()))


def test_tf32_is_a_switch_and_no_wish_for_a_cpu():
    gpu = torch.device("cuda")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    found = []
    try:
        for wish, mixed in (("off", True), ("on", False), ("off", False), ("auto", False), ("auto", True)):
            set_tf32(wish, gpu, mixed)
            found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    off, on = ("highest", False), ("high", True)
    assert found == [off, on, off, off, ("high", False)]
    set_tf32("auto", CPU, True)
    assert torch.get_float32_matmul_precision() == before[0]
    with pytest.raises(UserError, match="--tf32 on: is for NVIDIA's GPUs, and this run computes on cpu"):
        set_tf32("on", CPU, False)


def test_attention_is_computed_by_the_kernel_that_was_asked_for():
    def on():
        return torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()

    with attention_by("math"):
        assert on() == (False, True)
    with attention_by("flash"):
        assert on() == (True, False)
    with attention_by("auto"):
        assert on() == (True, True)
    for kernel in ("auto", "math", "flash"):
        check_attention(kernel, CPU, torch.float32)
    for kernel in ("cudnn", "efficient"):
        with pytest.raises(
            UserError, match=f"--attention {kernel}: cannot compute this here; use auto or math"
        ):
            check_attention(kernel, CPU, torch.float32)


def test_adam_with_8_bits_by_name(monkeypatch):
    from types import ModuleType

    lin = nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="adamw8bit: .* is not installed; run: pip install bitsandbytes"):
        build_optimizer(lin, cfg(optimizer="adamw8bit"))

    class AdamW8bit(torch.optim.AdamW):
        pass

    fake, inner = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    inner.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", inner)
    found = build_optimizer(lin, cfg(optimizer="adamw8bit", adam_eps=1e-6))
    assert type(found) is AdamW8bit and found.defaults["betas"] == (0.9, 0.99)
    assert found.defaults["eps"] == 1e-6 and [g["weight_decay"] for g in found.param_groups] == [0.1, 0.0]

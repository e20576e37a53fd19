"""The conventions of lesson 00: path, converters, weights, densities, samplers, guidance. Oracles: closed
forms, scipy, diffusers.
"""

import math

import pytest
import torch
from scipy import stats

from sdcourse.core import UserError
from sdcourse.diffusion import (
    Density,
    T_MIN,
    add_noise,
    alphas_cumprod,
    convert,
    flow_velocity,
    guided,
    like,
    min_snr_weight,
    renoise,
    sample_flow,
    shift_time,
    snr,
    time_grid,
    to_eps,
    to_v,
    to_x0,
)

KINDS = ("x0", "eps", "v", "flow")
N = 100_000


@pytest.fixture(autouse=True)
def one_thread():
    "Tensors this small run faster on one."
    torch.set_num_threads(1)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(n=N, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def gaussian(mean, std):
    "The exact velocity when the data are one Gaussian."

    def velocity(x, t):
        return -mean + (t - (1 - t) * std**2) / (((1 - t) * std) ** 2 + t**2) * (x - (1 - t) * mean)

    return velocity


def mixture(x, t, means=(-1.0, 1.0), std=0.4):
    "The exact velocity of equal Gaussians on a line."
    var = ((1 - t) * std) ** 2 + t**2
    means = torch.tensor(means, dtype=x.dtype)
    d = x - (1 - t) * means
    return (torch.softmax(-(d**2) / (2 * var), 1) * (-means + (t - (1 - t) * std**2) / var * d)).sum(
        1, keepdim=True
    )


# ---- the path
def test_flow_path_endpoints_and_slope():
    x0, eps = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1)
    assert torch.equal(add_noise(x0, eps, 0.0), x0) and torch.equal(add_noise(x0, eps, 1.0), eps)
    t = torch.tensor([0.0, 0.25, 1.0])
    x = add_noise(x0, eps, t)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[2], eps[2])
    assert (x[1] - (0.75 * x0[1] + 0.25 * eps[1])).abs().max() < 1e-12
    slope = (add_noise(x0, eps, 0.5 + 1e-4) - add_noise(x0, eps, 0.5 - 1e-4)) / 2e-4
    assert (slope - flow_velocity(x0, eps)).abs().max() < 1e-9


def test_like_lines_up_rows():
    assert like(torch.ones(3), torch.zeros(3, 2, 4, 4)).shape == (3, 1, 1, 1)
    assert (
        like(0.5, torch.zeros(3, 2)).ndim == 0
        and like(torch.ones(3, dtype=torch.float64), torch.zeros(3, 2)).dtype == torch.float32
    )


@pytest.mark.parametrize("n", [1, 7])
def test_oracle_velocity_returns_the_data(n):
    x0, eps = rand(5, 3), rand(5, 3, seed=1)
    for sampler in ("euler", "heun", "midpoint"):
        out = sample_flow(lambda x, t: flow_velocity(x0, eps), eps, time_grid(n), sampler=sampler)
        assert (out - x0).abs().max() < 1e-5


# ---- diffusion
@pytest.fixture(scope="module")
def diffusers():
    import diffusers

    return diffusers


CASES = {
    "scaled_linear": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "linear": dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}


@pytest.mark.parametrize("schedule", CASES)
def test_schedules_equal_diffusers(diffusers, schedule):
    theirs = diffusers.DDPMScheduler(**CASES[schedule]).alphas_cumprod
    over = dict(start=0.0001, end=0.02) if schedule == "linear" else {}
    ours = alphas_cumprod(schedule=schedule, **over)
    assert ours.shape == (1000,) and (ours - theirs).abs().max() < 2e-6


def test_noise_and_v_equal_diffusers(diffusers):
    scheduler = diffusers.DDPMScheduler(**CASES["scaled_linear"])
    x0, eps, steps = (
        rand(4, 2, 3, 3).float(),
        rand(4, 2, 3, 3, seed=1).float(),
        torch.tensor([0, 100, 500, 999]),
    )
    abar = alphas_cumprod()[steps]
    path = dict(alpha=abar.sqrt(), sigma=(1 - abar).sqrt())
    x = scheduler.add_noise(x0, eps, steps)
    assert (like(path["alpha"], x0) * x0 + like(path["sigma"], x0) * eps - x).abs().max() < 1e-5
    assert (to_v(eps, x, have="eps", **path) - scheduler.get_velocity(x0, eps, steps))[2:].abs().max() < 1e-4
    assert (to_v(x0, x, have="x0", **path) - scheduler.get_velocity(x0, eps, steps)).abs().max() < 2e-4


@pytest.mark.parametrize("alpha,sigma", [(0.7, 0.3), (0.6, 0.8), (0.05, 0.95)])
def test_converters_know_the_truth(alpha, sigma):
    x0, eps = rand(4, 3), rand(4, 3, seed=1)
    x = alpha * x0 + sigma * eps
    said = dict(x0=x0, eps=eps, v=alpha * eps - sigma * x0, flow=eps - x0)
    for have in KINDS:
        for want in KINDS:
            assert (
                convert(said[have], x, alpha=alpha, sigma=sigma, have=have, want=want) - said[want]
            ).abs().max() < 1e-10
        assert (to_x0(said[have], x, alpha=alpha, sigma=sigma, have=have) - x0).abs().max() < 1e-10
        assert (to_eps(said[have], x, alpha=alpha, sigma=sigma, have=have) - eps).abs().max() < 1e-10
        assert (to_v(said[have], x, alpha=alpha, sigma=sigma, have=have) - said["v"]).abs().max() < 1e-10


def test_converters_take_one_level_per_row_and_clean_rows():
    x0, eps, t = rand(3, 2, 2), rand(3, 2, 2, seed=1), torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    x = add_noise(x0, eps, t)
    for have, said in dict(eps=eps, flow=eps - x0).items():
        out = to_x0(said, x, alpha=1 - t, sigma=t, have=have)
        assert out.isfinite().all() and (out - x0).abs().max() < 1e-10


# ---- weights
def test_losses_differ_only_by_the_documented_weight():
    abar = torch.tensor([0.99, 0.7, 0.36, 0.1, 0.005], dtype=torch.float64)
    x0, eps, guess = (rand(5, 400, seed=i) for i in range(3))

    def losses(alpha, sigma):
        x = like(alpha, x0) * x0 + like(sigma, x0) * eps
        return {
            k: (
                convert(guess, x, alpha=alpha, sigma=sigma, have="x0", want=k)
                - convert(x0, x, alpha=alpha, sigma=sigma, have="x0", want=k)
            )
            .pow(2)
            .mean(1)
            for k in KINDS
        }

    vp, s = losses(abar.sqrt(), (1 - abar).sqrt()), snr(abar)
    for kind, c in dict(eps=s, v=s + 1).items():
        assert ((vp[kind] / (c * vp["x0"])) - 1).abs().max() < 1e-9, kind
    t = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    flow, s = losses(1 - t, t), ((1 - t) / t) ** 2
    for kind, c in dict(eps=s, flow=1 / t**2).items():
        assert ((flow[kind] / (c * flow["x0"])) - 1).abs().max() < 1e-9, kind
    for kind in ("eps", "flow"):  # min-SNR makes them one objective
        assert (
            (min_snr_weight(s, prediction=kind) * flow[kind])
            / (min_snr_weight(s, prediction="x0") * flow["x0"])
            - 1
        ).abs().max() < 1e-9, kind
    s = snr(abar)
    for kind in ("eps", "v"):
        assert (
            (min_snr_weight(s, prediction=kind) * vp[kind]) / (min_snr_weight(s, prediction="x0") * vp["x0"])
            - 1
        ).abs().max() < 1e-9, kind


def test_min_snr_equals_the_reference_formulas(diffusers):
    from diffusers.training_utils import compute_snr

    scheduler, steps = diffusers.DDPMScheduler(**CASES["scaled_linear"]), torch.arange(1000)
    s = compute_snr(scheduler, steps).double()
    assert (snr(scheduler.alphas_cumprod.double()) / s - 1).abs().max() < 1e-5
    for gamma in (1.0, 5.0):
        capped = torch.minimum(s, torch.full_like(s, gamma))
        for kind, right in dict(x0=capped, eps=capped / s, v=capped / (s + 1)).items():
            assert (min_snr_weight(s, gamma, prediction=kind) / right - 1).abs().max() < 1e-6, kind


def test_min_snr_is_finite_at_both_ends():
    s = torch.tensor([0.0, float("inf")])
    ends = {k: min_snr_weight(s, prediction=k).tolist() for k in KINDS}
    assert ends == {"x0": [0.0, 5.0], "eps": [1.0, 0.0], "v": [0.0, 0.0], "flow": [0.0, 0.0]}


# ---- densities
@pytest.mark.parametrize(
    "mean,std,shift", [(0.0, 1.0, 1.0), (-0.8, 0.5, 1.0), (0.5, 1.0, 3.0), (0.0, 1.3, 0.5)]
)
def test_logit_normal_is_normal_in_logit(mean, std, shift):
    t = Density("logit-normal", mean, std, shift).sample(uniforms())
    inside = t[(t > T_MIN) & (t < 1 - T_MIN)].double()
    assert len(inside) > 0.999 * N
    assert stats.kstest(torch.logit(inside).numpy(), "norm", args=(mean + math.log(shift), std)).pvalue > 0.01


LAWS = [
    Density("uniform"),
    Density("mode"),
    Density("mode", scale=-0.7),
    Density("cosmap"),
    Density("cosmap", shift=3.0),
    Density("mode", shift=0.4),
    Density("logit-normal", 0.4, 0.8, 2.0),
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_samples_follow_the_density_which_integrates_to_one(law):
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p = law.pdf(t)
    assert abs(p.mean().item() - 1) < 1e-3
    cdf = p.cumsum(0).numpy() / 200_000
    pvalue = stats.kstest(
        law.sample(uniforms()).numpy(), lambda x: cdf[(x * 200_000).astype(int).clip(0, 199_999)]
    ).pvalue
    assert pvalue > 0.01


def test_cosmap_equals_the_paper():
    t = torch.tensor([0.1, 0.5, 0.8])
    assert (
        Density("cosmap").pdf(t) - 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)
    ).abs().max() < 1e-6


def test_m_and_shift_point_to_noise():
    means = [Density(mean=m).sample(uniforms()).mean().item() for m in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    assert means == sorted(means) and means[0] < 0.35 and means[-1] > 0.65 and abs(means[2] - 0.5) < 0.01
    shifts = [Density(shift=s).sample(uniforms()).mean().item() for s in (0.5, 1.0, 3.0)]
    assert shifts == sorted(shifts) and shifts[-1] > 0.65
    assert shift_time(torch.tensor(0.5), 3.0).item() == pytest.approx(0.75)


def test_published_sd3_times_are_found_again():
    """Index sigmoid(N(-0.5, 1)) into descending, shifted noise levels (SD3-LoRA-CelebA) is m = +0.5 and shift
    3 here.
    """
    levels = shift_time(torch.linspace(1, 0.001, 1000), 3.0)
    theirs = levels[(torch.sigmoid(torch.special.ndtri(uniforms()) - 0.5) * 1000).long().clamp(max=999)]
    ours = Density(mean=0.5, shift=3.0).sample(uniforms(seed=1))
    assert abs(theirs.median().item() - 0.832) < 0.005 and abs(ours.median().item() - 0.832) < 0.005
    assert abs(theirs.mean() - ours.mean()) < 0.005


@pytest.mark.parametrize("law", [*LAWS, Density(mean=9.0), Density(mean=-9.0)], ids=str)
def test_times_stay_inside(law):
    t = law.sample(torch.cat([torch.tensor([0.0, 1.0, 1 - 2**-24]), uniforms(1000)]))
    assert t.isfinite().all() and t.min() >= T_MIN and t.max() <= 1 - T_MIN
    u = uniforms(1000).sort().values
    assert (law.sample(u).diff() >= 0).all()


# ---- samplers
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_diffusers(diffusers, shift):
    n, x = 12, rand(64, 1).float()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / n, n).tolist())
    times = time_grid(n, shift=shift)
    assert (scheduler.sigmas - times).abs().max() < 1e-6
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(mixture(theirs, t / 1000), t, theirs).prev_sample
    assert (sample_flow(mixture, x, times) - theirs).abs().max() < 1e-5


@pytest.fixture(scope="module")
def truth():
    torch.set_num_threads(1)
    x = rand(100, 1)
    return x, sample_flow(mixture, x, time_grid(600).double(), sampler="heun")


@pytest.mark.parametrize("sampler,order", [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence(truth, sampler, order):
    x, truth = truth
    errors = [
        (sample_flow(mixture, x, time_grid(n).double(), sampler=sampler) - truth).pow(2).mean().sqrt().item()
        for n in (24, 96)
    ]
    assert math.log(errors[0] / errors[1]) / math.log(4) == pytest.approx(order, abs=0.12)


def test_samplers_reach_the_closed_form():
    "For a Gaussian the flow is x0 = mean + std * x1, exactly."
    x = rand(500, 1)
    for sampler, n, tol in (("euler", 400, 2e-2), ("heun", 100, 1e-3), ("midpoint", 100, 1e-3)):
        assert (
            sample_flow(gaussian(0.7, 0.5), x, time_grid(n).double(), sampler=sampler) - (0.7 + 0.5 * x)
        ).abs().max() < tol, sampler


@pytest.mark.parametrize("churn", [0.3, 1.0])
def test_stochastic_sampler_keeps_the_marginals(churn):
    "Mean and spread at every time, and the whole law at the end."
    mean, std, n, seen = 0.7, 0.5, 400, {}
    g = torch.Generator().manual_seed(3)
    x = torch.randn(20_000, 1, generator=g)
    out = sample_flow(
        gaussian(mean, std),
        x,
        time_grid(n),
        sampler="stochastic",
        churn=churn,
        noise=lambda i: torch.randn(x.shape, generator=g),
        on_step=lambda i, t, x, x0_hat: seen.update({t.item(): (x.mean().item(), x.std().item())}),
    )
    for t, (m, s) in {**seen, 0.0: (out.mean().item(), out.std().item())}.items():
        assert abs(m - (1 - t) * mean) < 0.03, t
        assert abs(s - math.hypot((1 - t) * std, t)) < 0.02, t
    assert stats.kstest(((out - out.mean()) / out.std()).flatten().numpy(), "norm").pvalue > 0.01


def test_stochastic_sampler_is_right_on_a_mixture():
    g = torch.Generator().manual_seed(4)
    x = torch.randn(10_000, 1, generator=g)
    out = (
        sample_flow(
            mixture,
            x,
            time_grid(200),
            sampler="stochastic",
            noise=lambda i: torch.randn(x.shape, generator=g),
        )
        .flatten()
        .numpy()
    )
    law = lambda v: (stats.norm.cdf(v, -1, 0.4) + stats.norm.cdf(v, 1, 0.4)) / 2
    assert stats.kstest(out, law).statistic < 0.02


def test_no_noise_in_the_last_step():
    asked, before = [], {}

    def noise(i):
        asked.append(i)
        return torch.randn(8, 1, generator=torch.Generator().manual_seed(i))

    velocity = gaussian(0.7, 0.5)
    out = sample_flow(
        velocity,
        torch.zeros(8, 1),
        time_grid(6),
        sampler="stochastic",
        noise=noise,
        on_step=lambda i, t, x, x0_hat: before.update({i: (t, x, x0_hat)}),
    )
    assert asked == [0, 1, 2, 3, 4]
    t, x, x0_hat = before[5]
    assert (out - x0_hat).abs().max() < 1e-6 and (x0_hat - (x - t * velocity(x, t))).abs().max() < 1e-6


def test_churn_zero_is_euler():
    x = rand(20, 1)
    assert torch.equal(
        sample_flow(mixture, x, time_grid(9), sampler="stochastic", churn=0.0),
        sample_flow(mixture, x, time_grid(9)),
    )


def test_renoise_is_the_forward_step():
    x0, eps, z, r, s = (
        rand(N, 1),
        rand(N, 1, seed=1),
        rand(N, 1, seed=2),
        torch.tensor(0.3),
        torch.tensor(0.8),
    )
    x = renoise(add_noise(x0, eps, r), z, r=r, s=s)
    rest = x - (1 - s) * x0
    assert abs(rest.std().item() - 0.8) < 0.01 and abs((rest * x0).mean().item()) < 0.01
    assert torch.equal(renoise(x0, z, r=s, s=s), x0)


def test_sampling_keeps_dtype_and_leaves_no_graph():
    weight = torch.ones(1, requires_grad=True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out = sample_flow(
            lambda x, t: x * weight.to(dtype), torch.ones(2, 1, dtype=dtype), time_grid(3), sampler="heun"
        )
        assert out.dtype == dtype and not out.requires_grad


# ---- guidance
def test_guidance_formula_and_interval():
    def cond(x, t):
        return 2 * x

    def uncond(x, t):
        asked.append(float(t))
        return x

    x, asked = torch.ones(3), []
    assert torch.equal(guided(cond, uncond, 1.0)(x, torch.tensor(0.5)), 2 * x) and not asked
    velocity = guided(cond, uncond, 4.0, (0.25, 0.75))
    out = [velocity(x, torch.tensor(t))[0].item() for t in (0.0, 0.24, 0.25, 0.5, 0.75, 0.76, 1.0)]
    assert out == [2, 2, 5, 5, 5, 2, 2] and asked == [0.25, 0.5, 0.75]
    assert guided(cond, uncond, 0.0)(x, torch.tensor(0.5))[0] == 1


def test_guided_gaussians_have_a_closed_form():
    x = rand(200, 1)
    out = sample_flow(
        guided(gaussian(1.0, 0.5), gaussian(0.0, 0.5), 4.0), x, time_grid(200).double(), sampler="heun"
    )
    assert (out - (4.0 + 0.5 * x)).abs().max() < 1e-3


# ---- wrong input
@pytest.mark.parametrize(
    "call,said",
    [
        (lambda: Density("logitnormal"), "did you mean 'logit-normal'"),
        (lambda: Density(std=0.0), "above 0"),
        (lambda: Density(shift=-1.0), "above 0"),
        (lambda: Density("mode", scale=2.0), "one-to-one"),
        (lambda: alphas_cumprod(schedule="cosin"), "did you mean 'cosine'"),
        (lambda: to_x0(torch.zeros(1), torch.zeros(1), alpha=1, sigma=1, have="epss"), "did you mean 'eps'"),
        (lambda: min_snr_weight(torch.ones(1), prediction="vv"), "did you mean 'v'"),
        (lambda: time_grid(0), "at least 1"),
        (
            lambda: sample_flow(mixture, torch.zeros(1, 1), time_grid(2), sampler="huen"),
            "did you mean 'heun'",
        ),
        (lambda: sample_flow(mixture, torch.zeros(1, 1), time_grid(2), sampler="stochastic"), "needs noise"),
        (
            lambda: sample_flow(
                mixture, torch.zeros(1, 1), time_grid(2), sampler="stochastic", churn=1.5, noise=lambda i: 0
            ),
            "in [0,1]",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_line(call, said):
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)

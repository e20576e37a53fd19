"""The published flow DiT of Latent_Diffusion_Model_Imagenet2012: an independent straight-line version,
written from its fact sheet and without our model, says what every imported model must compute.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_models
from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.models.dit import FlowDiTPipeline
from sdcourse.models.dit_452m import ImportOptions, PublishedDiT, fold, import_flow_dit, shapes

BASE = dict(
    inCh=4,
    num_classes=5,
    patch_size=2,
    dim=32,
    c_dim=24,
    hidden_scale=4.0,
    num_heads=2,
    num_blocks=3,
    device="gpu",
    start_step=250000,
    wandb_id="x",
)


def made(seed=0, **over):
    "(JSON, state dict) with random weights, a VAE and buffers in it."
    p = BASE | dict(positional_encoding="RoPE", legacy_norm=True) | over
    g = torch.Generator().manual_seed(seed)
    state = {
        k: torch.randn(s, generator=g) * (0.5 if len(s) == 1 else 1.5 / s[1] ** 0.5 if len(s) == 2 else 0.3)
        for k, s in shapes(p).items()
    }
    for k in state:
        if k.endswith("_norm.weight"):
            state[k] = 1 + 0.2 * state[k]
        if k.endswith("rotary_emb.freqs"):
            state[k] = torch.tensor(10000.0) ** (
                -2 * torch.arange(p["dim"] // p["num_heads"] // 2) / (p["dim"] // p["num_heads"])
            )
    return p, state | {"VAE.decoder.weight": torch.ones(2), "blocks.0.attn.rotary_emb.cached": torch.zeros(3)}


def straight(state, p, x, t, y):
    "The forward pass from the fact sheet, line by line, per sample and head; y is None or a class."
    s, d, heads, patch = state, p["dim"], p["num_heads"], p["patch_size"]
    linear = lambda name, v: v @ s[f"{name}.weight"].T + (s[f"{name}.bias"] if f"{name}.bias" in s else 0)
    f = torch.tensor(10000) ** (2 * torch.arange(d) / d)
    angles = t * f
    code = torch.stack([angles[j].sin() if j % 2 == 0 else angles[j].cos() for j in range(d)])
    onehot = torch.zeros(p["num_classes"])
    if y is not None:
        onehot[y] = 1
    cond = linear("t_emb2", code) + linear("cond_MLP", linear("c_emb", onehot))
    tokens = torch.nn.functional.conv2d(x[None], s["pos_enc.proj.weight"], stride=patch)[0]
    rows, cols = tokens.shape[1:]
    tokens = tokens.flatten(1).T
    if p["positional_encoding"] == "absolute":
        top, left = (256 - rows) // 2, (256 - cols) // 2
        tokens = tokens + s["pos_enc.pos_embed"][0].view(256, 256, d)[
            top : top + rows, left : left + cols
        ].reshape(-1, d)
    h = linear("patch_emb", tokens)

    def norm(name, v):
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return v * (1 + linear(f"{name}.c_scale", cond)) + linear(f"{name}.c_shift", cond)

    def rms(v, weight, eps):
        return v / (v.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    for i in range(p["num_blocks"]):
        b = f"blocks.{i}"
        v = norm(f"{b}.norm1", h)
        q, k, val = (v @ s[f"{b}.attn.{n}_proj.weight"].T for n in ("query", "key", "value"))
        if p["legacy_norm"]:
            q, k = rms(q, s[f"{b}.attn.q_norm.weight"], d), rms(k, s[f"{b}.attn.k_norm.weight"], d)
        outs = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            qh, kh = q[:, part], k[:, part]
            if not p["legacy_norm"]:
                qh, kh = (
                    rms(z, s[f"{b}.attn.{n}_norm.weight"], torch.finfo(torch.float32).eps)
                    for z, n in ((qh, "q"), (kh, "k"))
                )
            if p["positional_encoding"] == "RoPE":

                def turn(z):
                    out = z.clone()
                    for j, freq in enumerate(s[f"{b}.attn.rotary_emb.freqs"]):
                        a = torch.arange(len(z)) * freq
                        out[:, 2 * j], out[:, 2 * j + 1] = (
                            z[:, 2 * j] * a.cos() - z[:, 2 * j + 1] * a.sin(),
                            z[:, 2 * j + 1] * a.cos() + z[:, 2 * j] * a.sin(),
                        )
                    return out

                qh, kh = turn(qh), turn(kh)
            outs.append(torch.softmax(qh @ kh.T * (d / heads) ** -0.5, -1) @ val[:, part])
        h = h + linear(f"{b}.scale1", cond) * (torch.cat(outs, 1) @ s[f"{b}.attn.out_proj.weight"].T)
        value, gate = linear(f"{b}.MLP.lin_up", norm(f"{b}.norm2", h)).chunk(2, -1)
        h = h + linear(f"{b}.scale2", cond) * linear(f"{b}.MLP.lin_down", value * gate / (1 + (-gate).exp()))
    out = linear("out_proj", norm("out_norm", h)).view(rows, cols, p["inCh"], patch, patch)
    return out.permute(2, 0, 3, 1, 4).reshape(p["inCh"], rows * patch, cols * patch)


@pytest.mark.parametrize(
    "over, size",
    [
        (dict(), (8, 8)),
        (dict(legacy_norm=False), (8, 8)),
        (dict(), (6, 12)),
        (dict(legacy_norm=False), (12, 4)),
        (dict(positional_encoding="absolute"), (8, 8)),
        (dict(positional_encoding="absolute", legacy_norm=False), (8, 8)),
    ],
)
def test_it_computes_the_same_function(over, size):
    "Largest difference 1e-5 in float32, with and without a class, at several times."
    p, state = made(**over)
    model = fold(state, p, input_size=8)
    g = torch.Generator().manual_seed(1)
    for t, y in ((1.0, 3), (0.7, None), (0.03, 0), (0.513, 4)):
        x = torch.randn(4, *size, generator=g)
        want = straight(state, p, x, torch.tensor(t), y)
        with torch.no_grad():
            got = model(x[None], t, None if y is None else torch.tensor([y])).sample[0]
        scale = want.abs().max().item()
        assert 0.1 < scale < 100 and (got - want).abs().max() <= 1e-5 * max(1, scale), (
            over,
            t,
            y,
            (got - want).abs().max(),
            scale,
        )


def test_class_time_and_place_all_count():
    p, state = made()
    model, x = fold(state, p), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base, others = (
            model(x, 0.5, torch.tensor([1])).sample,
            [
                model(x, 0.5, torch.tensor([2])).sample,
                model(x, 0.5).sample,
                model(x, 0.500001, torch.tensor([1])).sample,
                model(x.flip(-1), 0.5, torch.tensor([1])).sample.flip(-1),
            ],
        )
    assert all((o - base).abs().max() > 1e-3 for o in others)


def test_the_true_size():
    with torch.device("meta"):
        model = PublishedDiT()
    p = dict(
        BASE,
        num_classes=1000,
        dim=1088,
        c_dim=2048,
        num_heads=17,
        num_blocks=17,
        positional_encoding="RoPE",
        legacy_norm=True,
    )
    n = sum(math.prod(s) for s in shapes(p).values())
    assert (
        abs(n / 1e6 - 452) < 1
        and abs(sum(q.numel() for q in model.blocks[0].parameters()) / 1e6 - 26.06) < 0.05
    )
    assert model.config.hidden == p["hidden_scale"] * p["dim"] and model.rope_bits.shape == (32,)


# ---- files


@pytest.fixture
def folder(tmp_path):
    p, state = made()
    (tmp_path / "in").mkdir()
    torch.save(state, tmp_path / "in/model_250000s.pkl")
    (tmp_path / "in/model_params_250000s.json").write_text(json.dumps(p))
    return tmp_path / "in"


def test_a_pipeline_that_samples_as_the_system_does(folder, tmp_path):
    """Euler from t = 1 to 1/N, its guidance w as w + 1; Heun with two evaluations a step; names; half
    precision leaves the tables alone.
    """
    (folder / "imagenet_class_to_string.txt").write_text(
        "0: tench, Tinca tinca,\n1: goldfish,\n2: shark,\n3: ray,\n4: cock,\n"
    )
    out = import_flow_dit(folder, tmp_path / "out", ImportOptions(input_size=8))
    pipe, (p, state) = FlowDiTPipeline.from_pretrained(out), made()
    n, w, y = 5, 3.0, 3
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    v = lambda x, t: (
        (1 + w) * straight(state, p, x, torch.tensor(t), y) - w * straight(state, p, x, torch.tensor(t), None)
    )
    euler, heun = noise[0].clone(), noise[0].clone()
    for i in range(n):
        t, dt = 1 - i / n, 1 / n
        euler = euler - dt * v(euler, t)
        a = v(heun, t)
        heun = heun - dt * (a + v(heun - dt * a, max(0.0, t - dt))) / 2
    for sampler, want in (("euler", euler), ("heun", heun)):
        got = pipe(
            ["ray"],
            guidance_scale=w + 1,
            num_inference_steps=n,
            sampler=sampler,
            output_type="latent",
            generator=torch.Generator().manual_seed(7),
        ).images[0]
        assert (got - want).abs().max() < 2e-3 * want.abs().max(), (
            sampler
        )  # times differ in their last bits, and the code of time turns bits into noise
    assert pipe.get_label_ids(["Tinca tinca", "cock"]) == [0, 4]
    half = FlowDiTPipeline.from_pretrained(out, dtype=torch.float16).transformer
    assert (
        half.dtype == torch.float16
        and torch.equal(half.time_bits, pipe.transformer.time_bits)
        and half.time_bits.dtype == torch.int32
    )


def test_it_loads_in_a_fresh_process_without_an_import_first_and_without_a_warning(folder, tmp_path):
    out = import_flow_dit(folder, tmp_path / "out", ImportOptions(input_size=8))
    code = f"""
from sdcourse.models.dit import FlowDiTPipeline
import sys
assert "sdcourse.models.dit_452m" not in sys.modules
pipe = FlowDiTPipeline.from_pretrained({str(out)!r})
print(type(pipe.transformer).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "PublishedDiT", done.stderr
    assert "Expected types" not in done.stderr and "Warning" not in done.stderr, done.stderr


def test_with_a_vae_it_makes_pictures(folder, tmp_path):
    vae = tiny_models.tiny_vae(tmp_path / "vae")
    pipe = FlowDiTPipeline.from_pretrained(
        import_flow_dit(folder, tmp_path / "out", ImportOptions(input_size=8, vae=str(vae)))
    )
    assert pipe([1], num_inference_steps=1).images[0].size[0] > 8


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path):
    def refused(text, fn=lambda: import_flow_dit(folder, tmp_path / "out")):
        with pytest.raises(UserError, match=text) as e:
            fn()
        assert (
            "\n" not in str(e.value)
            and not (tmp_path / "out").exists()
            and not (tmp_path / "out.partial").exists()
        )

    weights, params = folder / "model_250000s.pkl", folder / "model_params_250000s.json"
    good, (p, state) = weights.read_bytes(), made()
    torch.save(state | {"x": Evil(str(tmp_path / "hit"))}, weights)
    refused("holds something else than tensors.*nothing in it was run")
    assert not (tmp_path / "hit").exists()
    weights.write_bytes(good[: len(good) // 2])
    refused("holds something else than tensors, or is cut off")
    torch.save([1, 2], weights)
    refused("is no state dict")
    torch.save({k: v for k, v in state.items() if "lin_up" not in k}, weights)
    refused("lack 6 tensors, e.g. blocks.0.MLP.lin_up.bias")
    torch.save(state | {"blocks.7.scale1.weight": torch.zeros(2)}, weights)
    refused("hold 1 tensors that this model has not, e.g. blocks.7.scale1.weight")
    torch.save(state | {"t_emb2.weight": torch.zeros(3, 3)}, weights)
    refused(r"t_emb2.weight is \[3, 3\], and the JSON wants \[32, 32\]")
    weights.write_bytes(good)
    params.write_text(json.dumps(p | {"legacy_norm": False}))
    refused(r"k_norm.weight is \[32\], and the JSON wants \[16\]|q_norm.weight is \[32\]")
    params.write_text(json.dumps({k: v for k, v in p.items() if k != "c_dim"}))
    refused("lacks c_dim")
    params.write_text(json.dumps(p | {"positional_encoding": "Absolute"}))
    refused("'Absolute': RoPE and absolute are known")
    params.write_text(json.dumps(p | {"dim": -1}))
    refused("dim is -1, expected a positive number")
    params.write_text("{")
    refused("not valid JSON")
    params.unlink()
    refused("model_params_250000s.json: no such file")
    params.write_text(json.dumps(p))
    (folder / "model_9s.pkl").write_bytes(b"")
    refused("holds 2 files model_")
    (folder / "model_9s.pkl").unlink()
    refused("no such folder", lambda: import_flow_dit(tmp_path / "no", tmp_path / "out"))
    (folder / "imagenet_class_to_string.txt").write_text("0: tench,\n")
    refused("names 1 classes and the model has 5")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        import_flow_dit(folder, tmp_path / "there")


def test_the_command(folder, tmp_path, capsys):
    assert (
        cli.main(["import-flow-dit", str(folder), str(tmp_path / "out"), "--input-size", "8"]) == 0
        and "guidance_scale = w + 1" in capsys.readouterr().out
    )
    assert (tmp_path / "out/model_index.json").is_file() and not Path(f"{tmp_path}/out.partial").exists()
    assert (
        cli.main(["import-flow-dit", str(folder)]) == 2 and "expected FOLDER OUT" in capsys.readouterr().err
    )

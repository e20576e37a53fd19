"""The flow DiT: its pieces against diffusers and against equations written out, its counts, its dtypes, its
files.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from sdcourse.core import UserError
from sdcourse.models.dit import (
    DiT,
    DiTBlock,
    MLP_RATIO,
    POSITIONS,
    SIZES,
    Attention,
    dit_config,
    grid_angles,
    modulate,
    patchify,
    rotate,
    sincos,
    time_code,
    train_flops,
    unpatchify,
)

SMALL = dict(input_size=8, patch_size=2, in_channels=3, dim=48, depth=2, heads=3, num_classes=5)


def alive(seed=0, std=0.1, **over):
    "A small model in which nothing is zero any more."
    torch.manual_seed(seed)
    model = DiT(**{**SMALL, **over}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def batch(n=4, c=3, h=8, w=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, h, w, generator=g), torch.rand(n, generator=g), torch.arange(n) % 6


def gap(a, b):
    return (a - b).abs().max().item()


# ---- patches
@pytest.mark.parametrize("p", [1, 2, 4])
def test_patchify_inverse(p):
    x = torch.randn(2, 3, 8, 12)
    tokens = patchify(x, p)
    assert tokens.shape == (2, 8 * 12 // p**2, 3 * p * p)
    assert torch.equal(unpatchify(tokens, p, h=8 // p, w=12 // p), x)
    i, j = 1, 2  # the token in row 1, column 2
    assert torch.equal(tokens[:, i * (12 // p) + j], x[:, :, i * p : i * p + p, j * p : j * p + p].flatten(1))


def test_patch_linear_is_strided_conv():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(10, 3, 2, 2)
    want = F.conv2d(x, weight, stride=2).flatten(2).mT
    assert gap(patchify(x, 2) @ weight.flatten(1).T, want) <= 1e-5


# ---- time
def test_time_code_is_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.001, 0.5, 1.0])
    want = get_timestep_embedding(1000 * t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert gap(time_code(t), want) <= 1e-3  # float32 angles up to 1000: one unit in their last place is 6e-5
    exact = 1000 * t.double()[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    assert gap(time_code(t.double()), torch.cat([exact.cos(), exact.sin()], 1)) <= 1e-12


def test_time_code_is_smooth_and_precise():
    a, b = time_code(torch.tensor([0.5, 0.5001]))
    assert F.cosine_similarity(a, b, dim=0) > 0.999
    assert time_code(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32
    codes = time_code(torch.linspace(0, 1, 101))
    assert (
        torch.cdist(codes, codes).add(10 * torch.eye(101)).min() > 0.5
    )  # hundredths of time can be told apart


# ---- positions
def test_sincos_is_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    want = get_2d_sincos_pos_embed(32, 6, base_size=6, output_type="pt")
    assert (
        gap(
            sincos(grid_angles(6, 6, 32, theta=10000.0, like=torch.empty(0, dtype=torch.float64))),
            want.double(),
        )
        <= 1e-6
    )


def rope_by_hand(x, h, w, *, position, theta):
    "One complex rotation per token and pair, written out."
    dim, out = x.shape[-1], x.clone()
    for i in range(h):
        for j in range(w):
            for pair in range(dim // 2):
                if position == "rope1d":
                    place, k, n = i * w + j, pair, dim // 2
                else:
                    place, k, n = (i, pair, dim // 4) if pair < dim // 4 else (j, pair - dim // 4, dim // 4)
                turn = torch.polar(
                    torch.tensor(1.0, dtype=x.dtype), torch.tensor(place * theta ** (-k / n), dtype=x.dtype)
                )
                z = torch.complex(x[..., i * w + j, 2 * pair], x[..., i * w + j, 2 * pair + 1]) * turn
                out[..., i * w + j, 2 * pair], out[..., i * w + j, 2 * pair + 1] = z.real, z.imag
    return out


@pytest.mark.parametrize("position,axes,theta", [("rope2d", 2, 100.0), ("rope1d", 1, 10000.0)])
def test_rope_by_hand(position, axes, theta):
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    angles = grid_angles(3, 4, 8, axes=axes, theta=theta, like=x).flatten(1)
    assert (
        gap(rotate(x, angles.cos(), angles.sin()), rope_by_hand(x, 3, 4, position=position, theta=theta))
        <= 1e-12
    )


def test_rope_is_diffusers():
    from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

    x = torch.randn(2, 3, 20, 16)
    angles = grid_angles(4, 5, 16, axes=1, theta=10000.0).flatten(1)
    table = get_1d_rotary_pos_embed(16, 20, theta=10000.0, use_real=True, repeat_interleave_real=True)
    assert gap(rotate(x, angles.cos(), angles.sin()), apply_rotary_emb(x, table)) <= 1e-5


def test_rope_sees_only_differences():
    h, w, dim = 5, 7, 16
    q, k = torch.randn(2, dim, dtype=torch.float64)
    angles = grid_angles(h, w, dim, like=q).flatten(1)
    at_q, at_k = (rotate(v.expand(h * w, dim), angles.cos(), angles.sin()).view(h, w, dim) for v in (q, k))
    logits = torch.einsum("ijd,mnd->ijmn", at_q, at_k)
    for di in range(-2, 3):
        for dj in range(-3, 4):
            same = [
                logits[i, j, i + di, j + dj]
                for i in range(h)
                for j in range(w)
                if 0 <= i + di < h and 0 <= j + dj < w
            ]
            assert max(same) - min(same) <= 1e-12
    assert abs(logits[2, 3, 3, 3] - logits[2, 3, 2, 4]) > 1e-3  # down is not right


def test_rope_keeps_lengths_and_axes_apart():
    x = torch.randn(12, 8, dtype=torch.float64)
    angles = grid_angles(3, 4, 8, like=x)
    y = rotate(x, angles.flatten(1).cos(), angles.flatten(1).sin())
    assert gap(x.norm(dim=-1), y.norm(dim=-1)) <= 1e-12
    assert torch.equal(y[:4, :4], x[:4, :4])  # row 0: the half that counts rows stays
    assert torch.equal(y[::4, 4:], x[::4, 4:])  # column 0: the half that counts columns stays


# ---- pieces
def test_qk_norm_bounds_logits():
    torch.manual_seed(0)
    attn, x = Attention(48, 3), torch.randn(2, 9, 48)
    torch.nn.init.normal_(attn.qkv.weight, std=100.0)
    q, k, _ = attn.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    logits = attn.q_norm(q) @ attn.k_norm(k).mT / 16**0.5
    assert logits.abs().max() <= 16**0.5 + 1e-4
    assert (q @ k.mT).abs().max() > 1e4


def test_rmsnorm_is_torch():
    norm = Attention(48, 3).q_norm
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 16)
    assert gap(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-6)) <= 1e-6
    assert norm(x.bfloat16()).dtype == torch.float32


def test_swiglu_is_diffusers():
    from diffusers.models.attention import FeedForward

    torch.manual_seed(0)
    theirs, ours = FeedForward(16, inner_dim=40, activation_fn="swiglu"), DiTBlock(16, 2, 40).mlp
    ours.up.load_state_dict(theirs.net[0].proj.state_dict())
    ours.down.load_state_dict(theirs.net[2].state_dict())
    x = torch.randn(3, 7, 16)
    assert gap(ours(x), theirs(x)) <= 1e-6


def test_modulate():
    x = torch.randn(2, 5, 16)
    normed = modulate(x, torch.zeros(2, 1, 16), torch.zeros(2, 1, 16))
    assert gap(normed, F.layer_norm(x, (16,), eps=1e-6)) == 0  # scale 0 changes nothing
    assert gap(modulate(x, torch.full((2, 1, 16), 3.0), torch.ones(2, 1, 16)), 2 * normed + 3) <= 1e-6


# ---- the whole model
@pytest.mark.parametrize(
    "over", [{}, dict(mlp="gelu"), dict(position="sincos"), dict(position="rope1d"), dict(qk_norm=False)]
)
def test_zero_at_init(over):
    torch.manual_seed(0)
    model, (x, t, y) = DiT(**{**SMALL, **over}), batch()
    assert torch.count_nonzero(model(x, t, y).sample) == 0
    tokens, cond = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert all(
        torch.equal(block(tokens, cond), tokens) for block in model.blocks
    )  # the identity, bit for bit


def test_every_parameter_learns():
    torch.manual_seed(0)
    model, (x, t, y) = DiT(**SMALL), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # adaLN-zero wakes up from the output inwards
        optimizer.zero_grad()
        (model(x, t, y).sample - x).square().mean().backward()
        optimizer.step()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def from_diffusers(theirs):
    "Our model with the weights of a `DiTTransformer2DModel`."
    cfg = theirs.config
    dim, p, c = cfg.num_attention_heads * cfg.attention_head_dim, cfg.patch_size, cfg.in_channels
    model = DiT(
        input_size=cfg.sample_size,
        patch_size=p,
        in_channels=c,
        dim=dim,
        depth=cfg.num_layers,
        heads=cfg.num_attention_heads,
        num_classes=cfg.num_embeds_ada_norm,
        mlp="gelu",
        mlp_ratio=4.0,
        position="sincos",
        qk_norm=False,
    )
    old, new = theirs.state_dict(), {}
    new["patch.weight"], new["patch.bias"] = (
        old["pos_embed.proj.weight"].flatten(1),
        old["pos_embed.proj.bias"],
    )
    emb = "transformer_blocks.0.norm1.emb."
    new["class_embed.weight"] = old[emb + "class_embedder.embedding_table.weight"]
    for ours, name in (
        ("final_ada", "proj_out_1"),
        ("time_mlp.0", emb + "timestep_embedder.linear_1"),
        ("time_mlp.2", emb + "timestep_embedder.linear_2"),
    ):
        for part in ("weight", "bias"):
            new[f"{ours}.{part}"] = old[f"{name}.{part}"]
    for part in (
        "weight",
        "bias",
    ):  # theirs orders a patch (row, column, channel), ours (channel, row, column)
        new[f"final.{part}"] = old[f"proj_out_2.{part}"].unflatten(0, (p, p, c)).movedim(2, 0).flatten(0, 2)
    for i in range(cfg.num_layers):
        a, b = f"transformer_blocks.{i}.", f"blocks.{i}."
        new[b + "attn.qkv.weight"] = torch.cat([old[a + f"attn1.to_{k}.weight"] for k in "qkv"])
        new[b + "attn.out.weight"] = old[a + "attn1.to_out.0.weight"]
        for part in ("weight", "bias"):
            new[b + f"ada.{part}"] = old[a + f"norm1.linear.{part}"]
            new[b + f"mlp.up.{part}"], new[b + f"mlp.down.{part}"] = (
                old[a + f"ff.net.0.proj.{part}"],
                old[a + f"ff.net.2.{part}"],
            )
    model.load_state_dict(new)
    return model


def test_matches_diffusers_dit():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=3,
        num_layers=3,
        attention_bias=False,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for i, block in enumerate(theirs.transformer_blocks):
        torch.nn.init.zeros_(block.attn1.to_out[0].bias)  # ours has none
        block.norm1.emb.load_state_dict(
            theirs.transformer_blocks[0].norm1.emb.state_dict()
        )  # ours embeds once
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the original code of Peebles & Xie
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    ours, (x, _, y) = from_diffusers(theirs).eval(), batch()
    steps = torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        a, b = ours(x, steps / 1000, y).sample, theirs(x, steps, y).sample
    assert b.abs().max() > 0.1 and gap(a, b) <= 1e-5


@pytest.mark.parametrize("position", ["rope2d", "rope1d"])
def test_matches_equations(position):
    "The whole forward pass once more, loop by loop, in float64."
    model, (x, t, y) = alive(position=position, mlp_ratio=2.0).double(), batch()
    x, t, p = x.double(), t.double(), dict(model.named_parameters())
    got = model(x, t, y).sample

    def lin(name, v):
        return v @ p[name + ".weight"].T + p.get(name + ".bias", 0)

    def ln(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def rms(v, w):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w

    angle = 1000 * t[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    c = F.silu(
        lin("time_mlp.2", F.silu(lin("time_mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
        + p["class_embed.weight"][y]
    )
    z = torch.stack(
        [
            lin("patch", x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1))
            for i in range(4)
            for j in range(4)
        ],
        1,
    )
    for i in range(2):
        b = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in lin(b + "ada", c).split(48, 1))
        q, k, v = lin(b + "attn.qkv", ln(z) * (1 + scale1) + shift1).split(48, 2)
        heads = []
        for h in range(3):
            s = slice(16 * h, 16 * h + 16)
            qh, kh = (
                rope_by_hand(
                    rms(u[..., s], p[f"{b}attn.{n}_norm.weight"]),
                    4,
                    4,
                    position=position,
                    theta=100.0 if position == "rope2d" else 1e4,
                )
                for u, n in ((q, "q"), (k, "k"))
            )
            heads.append((qh @ kh.mT / 4).softmax(-1) @ v[..., s])
        z = z + gate1 * lin(b + "attn.out", torch.cat(heads, -1))
        value, gate = lin(b + "mlp.up", ln(z) * (1 + scale2) + shift2).split(96, 2)
        z = z + gate2 * lin(b + "mlp.down", value * F.silu(gate))
    shift, scale = (m[:, None] for m in lin("final_ada", c).split(48, 1))
    out = lin("final", ln(z) * (1 + scale) + shift).view(4, 4, 4, 3, 2, 2)
    want = torch.stack(
        [out[:, i // 2, j // 2, :, i % 2, j % 2] for i in range(8) for j in range(8)], -1
    ).view(4, 3, 8, 8)
    assert want.abs().max() > 0.1 and gap(got, want) <= 1e-10


def test_null_class():
    model, (x, t, _) = alive(), batch()
    assert model.class_embed.num_embeddings == 6
    null = model(x, t, torch.full((4,), 5)).sample
    assert torch.equal(model(x, t).sample, null)
    assert gap(model(x, t, torch.full((4,), 4)).sample, null) > 1e-3


def test_scalar_time():
    model, (x, _, y) = alive(), batch()
    want = model(x, torch.full((4,), 0.3), y, return_dict=False)[0]
    assert torch.equal(model(x, 0.3, y).sample, want) and torch.equal(
        model(x, torch.tensor(0.3), y).sample, want
    )


@pytest.mark.parametrize("position", POSITIONS)
def test_other_sizes(position):
    model = alive(position=position)
    assert model(torch.randn(2, 3, 4, 14), 0.5).sample.shape == (2, 3, 4, 14)


def test_rows_and_columns_are_not_mixed_up():
    """A model whose positions treat rows and columns alike gives the transposed answer for the transposed
    image.
    """
    model, (x, t, y) = alive(patch_size=1, dim=48), batch(h=4, w=6)
    half = torch.cat(
        [torch.arange(8, 16), torch.arange(8)]
    )  # swap the half of each head that counts rows with the one that counts columns
    swap = torch.cat([16 * h + half for h in range(3)])
    turned = alive(patch_size=1, dim=48)
    with torch.no_grad():
        for b in turned.blocks:
            b.attn.qkv.weight.copy_(
                torch.cat(
                    [b.attn.qkv.weight[:48][swap], b.attn.qkv.weight[48:96][swap], b.attn.qkv.weight[96:]]
                )
            )
            for norm in (b.attn.q_norm, b.attn.k_norm):
                norm.weight.copy_(norm.weight[half])
        a, b = model(x, t, y).sample, turned(x.mT.contiguous(), t, y).sample.mT
    assert gap(a, b) <= 1e-5 and gap(a, model(x.mT.contiguous(), t, y).sample.mT) > 1e-3


# ---- dtypes, memory, compilation
def test_dtypes():
    model, (x, t, y) = alive(), batch()
    want = model(x, t, y).sample
    assert gap(model.double()(x.double(), t.double(), y).sample, want) <= 1e-4
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        auto = model(x, t, y).sample
    half = model.bfloat16()(x.bfloat16(), t, y).sample
    assert auto.dtype == torch.float32 and half.dtype == torch.bfloat16
    scale = want.abs().max().item()
    assert gap(auto, want) <= 0.03 * scale and gap(half, want) <= 0.06 * scale


def test_autocast_keeps_the_stream_in_float32():
    model, (x, t, y) = alive(), batch()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda m, args, out: seen.append((args[0].dtype, args[2][0].dtype, out.dtype))
        )
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, y).sample.sum().backward()
    assert set(seen) == {(torch.float32,) * 3} and len(seen) == 2
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing():
    model, (x, t, y) = alive().train(), batch()

    def grads():
        model.zero_grad()
        model(x, t, y).sample.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = grads()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    assert (
        max(gap(a, b) for a, b in zip(grads(), want)) <= 1e-6 and len(calls) == 2
    )  # forward once more in backward
    model.disable_gradient_checkpointing()


@pytest.mark.parametrize("over", [{}, dict(position="sincos", mlp="gelu", qk_norm=False)])
def test_blocks_compile_in_place_without_break(over):
    model, (x, t, y) = alive(**over), batch()
    want, keys = model(x, t, y).sample, list(model.state_dict())
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = model(x, t, y).sample
    got.sum().backward()
    assert (
        gap(got, want) <= 1e-5
        and list(model.state_dict()) == keys
        and not any("_orig_mod" in k for k in keys)
    )
    torch._dynamo.reset()


# ---- counts
def meta(size="XL/2", **over):
    with torch.device("meta"):
        return DiT(**dit_config(size, **over))


def test_parameter_counts():
    assert meta(mlp="gelu").num_parameters() == 674_691_280  # published DiT-XL/2: 675 M
    assert abs(meta().num_parameters() / 674_691_280 - 1) < 1e-3  # SwiGLU at 8/3 costs the same
    system003 = meta(dim=1088, depth=17, heads=17, mlp_ratio=4.0).num_parameters()
    assert abs(system003 / 452e6 - 1) < 0.015
    assert meta("tiny/2", in_channels=1, num_classes=10).num_parameters() < 1e6


def test_paper_gflops():
    assert (
        abs(train_flops(dit_config("XL/2", mlp="gelu")) / 6 / 118.6e9 - 1) < 0.005
    )  # the paper's Gflops are multiply-adds of one forward pass
    for size, gflops in {"S/4": 1.41, "B/4": 5.56, "L/4": 19.70, "XL/4": 29.05}.items():
        assert abs(train_flops(dit_config(size)) / 6e9 / gflops - 1) < 0.01


@pytest.mark.parametrize(
    "over",
    [
        {},
        dict(mlp="gelu", mlp_ratio=4.0),
        dict(patch_size=1),
        dict(position="sincos", dim=96, depth=3),
        dict(in_channels=1, patch_size=4),
    ],
)
def test_train_flops(over):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    cfg = {**SMALL, **over}
    model, (x, t, y) = alive(**over), batch(2, c=cfg["in_channels"])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, y[:2]).sample.sum().backward()
    counted = counter.get_total_flops() / 2
    assert abs(train_flops(model) / counted - 1) <= 0.03 and train_flops(cfg) == train_flops(model)


# ---- files and refusals
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path, dtype):
    model, (x, t, y) = alive(position="rope1d", mlp_ratio=2.5).to(dtype), batch()
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "DiT" and config["position"] == "rope1d" and config["mlp_ratio"] == 2.5
    again = DiT.from_pretrained(tmp_path, torch_dtype=dtype)
    assert again.config["dim"] == 48 and again.dtype == dtype
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_sizes():
    assert dit_config("B/4")["dim"] == 768 and dit_config("B/4")["patch_size"] == 4
    assert (
        dit_config("S/2", mlp="gelu")["mlp_ratio"] == 4
        and dit_config("S/2")["mlp_ratio"] == MLP_RATIO["swiglu"]
    )
    assert all(dim % (4 * heads) == 0 for dim, _, heads in SIZES.values())  # rope2d fits every size


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: dit_config("XXL/2"), ["XXL/2", "XL/2"]),
        (lambda: dit_config("B/3"), ["B/3", "did you mean"]),
        (lambda: dit_config("B/2", num_class=3), ["num_class", "num_classes"]),
        (lambda: DiT(**{**SMALL, "position": "rope2"}), ["rope2", "rope2d"]),
        (lambda: DiT(**{**SMALL, "mlp": "swigl"}), ["swigl", "swiglu"]),
        (lambda: DiT(**{**SMALL, "dim": 50}), ["dim=50", "heads=3", "12"]),
        (lambda: DiT(**{**SMALL, "patch_size": 3}), ["patch_size=3", "input_size=8"]),
        (lambda: alive()(torch.randn(1, 3, 7, 8), 0.5), ["3x7x8", "multiples of 2"]),
        (lambda: alive()(torch.randn(1, 1, 8, 8), 0.5), ["1x8x8", "3 channels"]),
    ],
)
def test_refusals(make, words):
    with pytest.raises(UserError) as e:
        make()
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)

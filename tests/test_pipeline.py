"""`FlowDiTPipeline`: called as diffusers' `DiTPipeline` is, honest about seeds, guidance and latents, and
loadable anywhere.
"""

import json, time

import numpy as np
import pytest
import torch

import warm
from sdcourse.core import UserError
from sdcourse.diffusion import guided, sample_flow, time_grid
from sdcourse.engine.order import image_generators
from sdcourse.models.dit import AutoencoderKL, DiT, FlowDiTPipeline

NAMES = {i: f"class {i}, c{i}" for i in range(5)}


def tiny_dit(seed=0, channels=1, **over):
    torch.manual_seed(seed)
    model = DiT(
        **{**dict(input_size=8, in_channels=channels, dim=32, depth=2, heads=2, num_classes=5), **over}
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model


def tiny_vae(channels=3, **over):
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **{**dict(scaling_factor=0.5, shift_factor=0.3), **over},
    ).eval()


@pytest.fixture(scope="module")
def pipe():
    return FlowDiTPipeline(tiny_dit(), id2label=NAMES)


def gap(a, b):
    return (a - b).abs().max().item()


def draw(pipe, labels, seeds=None, **kw):
    seeds = range(len(labels)) if seeds is None else seeds
    return pipe(
        labels, **{**dict(num_inference_steps=4, output_type="pt", generator=image_generators(seeds)), **kw}
    ).images


# ---- the call
def test_called_like_diffusers(pipe):
    out = pipe(class_labels=[3, 1], guidance_scale=4.0, num_inference_steps=3, generator=torch.manual_seed(0))
    assert [im.mode for im in out.images] == ["L", "L"] and out.images[0].size == (8, 8)
    assert isinstance(pipe([0], num_inference_steps=2, return_dict=False), tuple)
    assert pipe.transformer.config.num_classes == 5 and pipe.components.keys() == {"transformer", "vae"}
    rgb = FlowDiTPipeline(tiny_dit(channels=3))([1], num_inference_steps=2).images[0]
    assert rgb.mode == "RGB"


def test_output_types(pipe):
    pt, arrays, pil, latent = (draw(pipe, [1, 2], output_type=kind) for kind in ("pt", "np", "pil", "latent"))
    assert pt.shape == (2, 1, 8, 8) and arrays.shape == (2, 8, 8, 1) and pt.min() >= 0 and pt.max() <= 1
    assert np.array_equal(arrays, pt.permute(0, 2, 3, 1).numpy())
    assert gap(pt, (latent / 2 + 0.5).clamp(0, 1)) == 0
    assert np.array_equal(np.array(pil[1]), (pt[1, 0].numpy() * 255).round().astype("uint8"))


def test_names_and_ids(pipe):
    assert pipe.get_label_ids(["c3", "class 0", 2, None]) == [3, 0, 2, 5]
    assert pipe.get_label_ids("c4") == [4] and pipe.get_label_ids(torch.tensor([1, 0])) == [1, 0]
    assert gap(draw(pipe, ["c3"]), draw(pipe, [3])) == 0


@pytest.mark.parametrize(
    "call,words",
    [
        (dict(class_labels=[5]), ["5", "0 to 4"]),
        (dict(class_labels=[-1]), ["-1", "0 to 4"]),
        (dict(class_labels=["clas 3"]), ["clas 3", "class 3"]),
        (dict(class_labels=[1], output_type="pillow"), ["pillow", "pil"]),
        (dict(class_labels=[1], sampler="heum"), ["heum", "heun"]),
        (dict(class_labels=[1], num_inference_steps=0), ["0"]),
        (dict(class_labels=[1, 2], generator=image_generators([0, 1, 2])), ["3 for 2"]),
        (dict(class_labels=[1], size=(7, 8)), ["1x7x8"]),
    ],
)
def test_refusals(pipe, call, words):
    with pytest.raises(UserError) as e:
        pipe(**{**dict(num_inference_steps=2), **call})
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_latents_are_no_picture():
    with pytest.raises(UserError, match="vae"):
        FlowDiTPipeline(tiny_dit(channels=4))([1], num_inference_steps=1)


# ---- guidance
def test_guidance_formula(pipe):
    w, y, null = 2.5, torch.tensor([1, 4]), torch.tensor([5, 5])
    start = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in image_generators([7, 8])])

    def field(labels):
        return lambda x, t: pipe.transformer(x, t, labels).sample

    for interval in ((0.0, 1.0), (0.3, 0.8)):
        want = sample_flow(guided(field(y), field(null), w, interval), start, time_grid(4))
        got = draw(pipe, [1, 4], [7, 8], guidance_scale=w, guidance_interval=interval, output_type="latent")
        assert gap(got, want) <= 1e-5
    x, t = start, torch.tensor(1.0)  # and once without any helper: one Euler step
    u, c = field(null)(x, t), field(y)(x, t)
    assert (
        gap(
            draw(pipe, [1, 4], [7, 8], guidance_scale=w, num_inference_steps=1, output_type="latent"),
            x - (u + w * (c - u)),
        )
        <= 1e-5
    )


def test_one_forward_per_step(pipe):
    sizes = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda m, args: sizes.append((len(args[0]), args[2].tolist()))
    )
    draw(pipe, [1, 2], guidance_scale=1.0)
    assert sizes == [(2, [1, 2])] * 4  # no unconditional half
    sizes.clear()
    draw(pipe, [1, 2], guidance_scale=3.0)
    assert sizes == [(4, [1, 2, 5, 5])] * 4
    sizes.clear()
    draw(pipe, [1, 2], guidance_scale=3.0, guidance_interval=(0.4, 0.8))  # times 1, .75, .5, .25
    assert [n for n, _ in sizes] == [2, 4, 4, 2]
    sizes.clear()
    draw(pipe, [1, 2], guidance_scale=3.0, sampler="heun")
    assert [n for n, _ in sizes] == [4] * 8
    hook.remove()


# ---- seeds
@pytest.mark.parametrize("sampler", ["euler", "stochastic"])
def test_one_seed_per_image(sampler):
    "In float64, because float32 matmuls of another batch size round otherwise (here by 2e-6)."
    pipe = FlowDiTPipeline(tiny_dit().double())
    together = draw(pipe, [0, 1, 2, 3], [10, 11, 12, 13], sampler=sampler)
    for i in range(4):
        assert gap(draw(pipe, [i], [10 + i], sampler=sampler), together[i : i + 1]) <= 1e-6
    assert gap(draw(pipe, [3, 2, 1, 0], [13, 12, 11, 10], sampler=sampler).flip(0), together) <= 1e-6
    assert gap(draw(pipe, [0], [99], sampler=sampler), together[:1]) > 1e-2


def test_one_generator_for_all(pipe):
    a, b = (draw(pipe, [1, 1], generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert gap(a, b) == 0 and gap(a[0], a[1]) > 1e-2


# ---- latents
@pytest.mark.parametrize("over", [{}, dict(shift_factor=None)])
def test_latents_are_decoded_with_scale_and_shift(over):
    vae = tiny_vae(**over)
    pipe = FlowDiTPipeline(tiny_dit(channels=4), vae)
    latent, image = (draw(pipe, [1, 2], output_type=kind) for kind in ("latent", "pt"))
    with torch.no_grad():
        want = vae.decode(latent / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
    assert image.shape == (2, 3, 16, 16) and gap(image, (want / 2 + 0.5).clamp(0, 1)) <= 1e-6
    z = torch.randn(2, 4, 8, 8)  # O15: in and out again
    with torch.no_grad():
        direct = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    inside = (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    with torch.no_grad():
        assert gap(pipe.decode(inside, "pt"), direct) <= 1e-5


def test_grey_vae():
    assert (
        FlowDiTPipeline(tiny_dit(channels=4), tiny_vae(channels=1))([0], num_inference_steps=1).images[0].mode
        == "L"
    )


def test_other_sizes(pipe):
    assert draw(pipe, [1, 2], size=(4, 12)).shape == (2, 1, 4, 12)
    assert pipe([1], num_inference_steps=1, size=(4, 12)).images[0].size == (12, 4)


def test_steps_can_be_watched(pipe):
    seen = []
    final = draw(
        pipe,
        [1],
        output_type="latent",
        on_step=lambda i, t, x, x0: seen.append((i, float(t), x.shape, x0.shape)),
    )
    assert [s[:2] for s in seen] == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)] and seen[0][2] == seen[0][
        3
    ] == final.shape


# ---- dtypes
def test_half_precision_starts_from_the_same_noise():
    want = draw(FlowDiTPipeline(tiny_dit()), [1, 2])
    for dtype in (torch.bfloat16, torch.float64):
        assert gap(draw(FlowDiTPipeline(tiny_dit()).to(dtype), [1, 2]), want) < 0.1


# ---- files
FRESH = """
import sys, torch
from sdcourse.models.dit import FlowDiTPipeline
pipe = FlowDiTPipeline.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
g = torch.Generator().manual_seed(0)
images = pipe(["c3", 1], num_inference_steps=4, output_type="pt", generator=g).images
modules = [type(pipe.transformer).__module__, str(pipe.transformer.dtype), type(pipe.vae).__name__]
torch.save(dict(images=images, modules=modules), sys.argv[2])
"""
GENERIC = """
import sys, sdcourse.models.dit
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe) is sdcourse.models.dit.FlowDiTPipeline and pipe.labels["c4"] == 4
"""


@pytest.mark.parametrize("latents,dtype", [(False, "float32"), (True, "bfloat16")])
def test_fresh_process(tmp_path, latents, dtype):
    pipe = FlowDiTPipeline(
        tiny_dit(channels=4 if latents else 1), tiny_vae() if latents else None, id2label=NAMES
    ).to(getattr(torch, dtype))
    pipe.save_pretrained(tmp_path / "export")
    want = pipe(
        ["c3", 1], num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    warm.run(["-c", FRESH, tmp_path / "export", tmp_path / "out.pt", dtype], first=warm.MODELS, check=True)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out["modules"] == [
        "sdcourse.models.dit",
        f"torch.{dtype}",
        "AutoencoderKL" if latents else "NoneType",
    ]
    assert gap(out["images"], want) <= 1e-6


def test_diffusers_finds_the_class(tmp_path):
    FlowDiTPipeline(tiny_dit(), id2label=NAMES).save_pretrained(tmp_path / "export")
    warm.run(["-c", GENERIC, tmp_path / "export"], first=warm.MODELS, check=True)


def test_layout(tmp_path):
    FlowDiTPipeline(tiny_dit(), id2label=NAMES).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (
        index["vae"] == [None, None]
        and index["transformer"] == ["sdcourse.models.dit", "DiT"]
        and index["_class_name"] == "FlowDiTPipeline"
    )
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    assert files == {
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }


# ---- what is missing is said at once (U5)
def refused(name):
    start = time.process_time()
    with pytest.raises(UserError) as e:
        FlowDiTPipeline.from_pretrained(name)
    assert time.process_time() - start < 5 and "\n" not in str(e.value) and str(name) in str(e.value)
    return str(e.value)


def test_missing_files(tmp_path):
    export = tmp_path / "export"
    FlowDiTPipeline(tiny_dit(), id2label=NAMES).save_pretrained(export)
    weights = export / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refused(export)
    weights.unlink()
    assert "no weights in transformer/" in refused(export)
    (export / "transformer" / "config.json").unlink()
    assert "transformer/config.json" in refused(export)
    (export / "model_index.json").unlink()
    assert "model_index.json" in refused(export)
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "Hugging Face cache" in refused("someone/gated-model")


def test_local_folder_wins(tmp_path, monkeypatch):
    FlowDiTPipeline(tiny_dit(), id2label=NAMES).save_pretrained(tmp_path / "someone" / "gated-model")
    monkeypatch.chdir(tmp_path)
    assert FlowDiTPipeline.from_pretrained("someone/gated-model").labels["c1"] == 1

"""Encoders against diffusers and transformers called by hand, on tiny models of the true classes.

The models that are called by hand are frozen too: torch chooses other kernels for weights that require
gradients, under `no_grad` as well.
"""

import json, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdcourse.cache.encoder import bad_rows, finite, fits
from sdcourse.cache.encoders import open_encoder
from sdcourse.cache.text import Prompts
from sdcourse.cache.vae import Latents
from sdcourse.cache.vision import Features
from sdcourse.core import UserError, sha256
from sdcourse.models.files import DTYPES, exact, weights_id

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    base = tmp_path_factory.mktemp("zoo")
    for name in ("vae", "siglip", "siglip2", "dino", "clip"):
        getattr(tiny, f"tiny_{name}")(base / name)
    tiny.tiny_siglip(base / "siglip_vision", whole=False)
    tiny.tiny_dino(base / "dino_registers", registers=3)
    tiny.tiny_clip(base / "clip_projection", kind="projection")
    tiny.tiny_clip(base / "clip_vision", kind="vision")
    return base


def pixels(n=3, h=24, w=32, seed=0):
    return torch.randint(
        0, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def pictures(n=3):
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for h, w in [(40, 50), (64, 33), (36, 36)][:n]
    ]


def rewrite(folder, change, name="model.safetensors"):
    "Change the weights of a folder in place."
    w = load_file(folder / name)
    change(w)
    save_file(w, folder / name, {"format": "pt"})


def equal(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


# ---- latents
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_latents_are_the_posterior_of_diffusers(zoo, precision):
    from diffusers import AutoencoderKL

    dtype = DTYPES[precision]
    vae = AutoencoderKL.from_pretrained(zoo / "vae", torch_dtype=dtype).eval().requires_grad_(False)
    with torch.no_grad():
        d = vae.encode((pixels().float() / 127.5 - 1).to(dtype)).latent_dist
    out = Latents(zoo / "vae", precision=precision).encode(pixels())
    equal(out, {"mean": d.mean.float(), "std": d.std.float()})
    assert (
        out["mean"].shape == (3, 4, 6, 8)
        and {t.dtype for t in out.values()} == {torch.float32}
        and out["std"].std() > 0.01
    )


def test_latent_facts_normalise_as_the_trainers_do(zoo):
    enc = Latents(zoo / "vae")
    assert enc.facts == {"channels": 4, "shift": 0.25, "scale": 0.7, "down": 4}
    tiny.tiny_vae(zoo / "unshifted", shift_factor=None)
    assert Latents(zoo / "unshifted").facts["shift"] == 0.0


@pytest.mark.parametrize("gone", ["scaling_factor", "shift_factor", "latent_channels"])
def test_what_a_published_config_leaves_out(zoo, tmp_path, gone):
    "sd-vae-ft-mse has no scaling_factor in its config; diffusers has a default."
    shutil.copytree(zoo / "vae", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    del config[gone]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    enc = Latents(tmp_path / "m")
    c = enc.model.config
    assert enc.facts == {
        "channels": c.latent_channels,
        "shift": c.shift_factor or 0.0,
        "scale": c.scaling_factor,
        "down": 4,
    }
    assert enc.facts["scale"] == (0.18215 if gone == "scaling_factor" else 0.7)


def test_latents_of_a_pipeline(zoo, tmp_path):
    shutil.copytree(zoo / "vae", tmp_path / "pipe/vae")
    (tmp_path / "pipe/model_index.json").write_text("{}")
    assert Latents(tmp_path / "pipe").key == Latents(zoo / "vae").key


@pytest.mark.parametrize(
    "batch, text",
    [
        (pixels().float(), "expected uint8"),
        (pixels()[0], "expected uint8"),
        (pixels()[:, :1], "expected uint8"),
        (pixels(h=25), "32x25 pixels are no multiple of 4"),
    ],
)
def test_wrong_pixels_are_refused(zoo, batch, text):
    with pytest.raises(UserError, match=text):
        Latents(zoo / "vae").encode(batch)


# ---- numbers that depend on nothing else
@pytest.mark.parametrize(
    "kind, folder, batch",
    [
        ("latents", "vae", pixels(5)),
        ("features", "siglip", pictures() * 2),
        ("features", "dino", pictures() * 2),
        ("features", "siglip2", pictures() * 2),
    ],
)
def test_neighbours_do_not_matter(zoo, kind, folder, batch):
    enc = open_encoder(kind, zoo / folder, **({"what": "both"} if kind == "features" else {}))
    whole, alone = enc.encode(batch), [enc.encode(batch[i : i + 1]) for i in range(len(batch))]
    for name, t in whole.items():
        assert (t.float() - torch.cat([a[name] for a in alone]).float()).abs().max() <= 1e-5


def test_settings_of_a_trainer_do_not_matter(zoo):
    enc = Latents(zoo / "vae")
    plain = enc.encode(pixels())
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            equal(enc.encode(pixels()), plain)
        assert torch.get_float32_matmul_precision() == "medium"
        with exact("cpu"):
            seen = (
                torch.get_float32_matmul_precision(),
                torch.backends.cudnn.allow_tf32,
                torch.backends.cudnn.benchmark,
                torch.is_grad_enabled(),
            )
        assert seen == ("highest", False, False, False)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not any(p.requires_grad for p in enc.model.parameters()) and not enc.model.training


def test_dropout_is_off(zoo, tmp_path):
    "SigLIP with attention dropout in its config."
    shutil.copytree(zoo / "siglip_vision", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"attention_dropout": 0.9}))
    enc = Features(tmp_path / "m")
    equal(enc.encode(pictures()), enc.encode(pictures()))
    equal(enc.encode(pictures()), Features(zoo / "siglip_vision").encode(pictures()))


# ---- not a number
def bright(n=3):
    "Black pictures but the second, which is white."
    x = torch.full((n, 3, 32, 32), 128, dtype=torch.uint8)
    x[1] = 255
    return x


@pytest.fixture
def loud(zoo, tmp_path):
    "A VAE whose first convolution leaves float16 for white and not for grey."
    shutil.copytree(zoo / "vae", tmp_path / "loud")

    def change(w):
        w["encoder.conv_in.weight"] = w["encoder.conv_in.weight"].sign() * 6e3

    rewrite(tmp_path / "loud", change, "diffusion_pytorch_model.safetensors")
    return tmp_path / "loud"


def test_overflow_is_done_once_more_in_float32(loud):
    half, x, names = Latents(loud, precision="fp16"), bright(), ["a.png", "b.png", "c.png"]
    plain = half.encode(x)
    assert bad_rows(plain).tolist() == [False, True, False]
    weights = [p.clone() for p in half.model.parameters()]
    out = finite(half, x, names)
    with half.in_float32():
        full = half.encode(x)
    assert half.retried == 1 and not half.upcast
    for k in out:
        assert torch.equal(out[k][1], full[k][1]) and torch.equal(out[k][[0, 2]], plain[k][[0, 2]])
    rounded = {
        k: v.half().float() for k, v in load_file(loud / "diffusion_pytorch_model.safetensors").items()
    }
    from diffusers import AutoencoderKL

    ref = AutoencoderKL.from_pretrained(loud).eval().requires_grad_(False)
    ref.load_state_dict(rounded)
    with torch.no_grad():
        want = ref.encode(x.float() / 127.5 - 1).latent_dist.mean[1]
    assert torch.equal(out["mean"][1], want)
    assert all(
        p.dtype == torch.float16 and torch.equal(p, q) for p, q in zip(half.model.parameters(), weights)
    )
    equal(finite(half, x, names), out)  # nothing is left over from the time before
    assert half.retried == 2


def test_only_the_row_that_overflows_changes(loud):
    "The other rows do not depend on their neighbours."
    half, x = Latents(loud, precision="fp16"), bright()
    out, alone = finite(half, x, "abc"), finite(half, x[:1], "a")
    assert all((out[k][:1] - alone[k]).abs().max() <= 1e-5 for k in out)


def test_an_infinite_variance_is_seen_through_the_clamp(zoo, tmp_path):
    "diffusers turns a log-variance of inf into 20, a finite number."
    shutil.copytree(zoo / "vae", tmp_path / "m")

    def change(w):
        w["quant_conv.bias"][4:], w["quant_conv.weight"][4:] = 6e4, w["quant_conv.weight"][4:].sign() * 3e4

    rewrite(tmp_path / "m", change, "diffusion_pytorch_model.safetensors")
    enc = Latents(tmp_path / "m", precision="fp16")
    x = pixels()
    with torch.no_grad():
        assert enc.model.encode((x.float() / 127.5 - 1).half()).latent_dist.std.isfinite().all()
    assert bad_rows(enc.encode(x)).all()
    assert finite(enc, x, "abc")["std"].isfinite().all() and enc.retried == 3


def test_what_is_not_finite_in_float32_is_named(zoo, tmp_path):
    shutil.copytree(zoo / "vae", tmp_path / "m")

    def change(w):
        w["encoder.conv_in.weight"] = w["encoder.conv_in.weight"].sign() * 2e19

    rewrite(tmp_path / "m", change, "diffusion_pytorch_model.safetensors")
    for precision in ("fp32", "bf16"):
        enc = Latents(tmp_path / "m", precision=precision)
        with pytest.raises(UserError, match=r"^b\.png: the latents are not finite, in float32 neither"):
            finite(enc, bright(), ["a.png", "b.png", "c.png"])
        assert {p.dtype for p in enc.model.parameters()} == {DTYPES[precision]}
    many = torch.full((9, 3, 32, 32), 255, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"^0, 1, 2, 3, 4 and 4 more: "):
        finite(enc, many, range(9))


def test_weights_that_do_not_fit_are_refused(zoo, tmp_path):
    shutil.copytree(zoo / "vae", tmp_path / "m")

    def change(w):
        w["quant_conv.bias"][0] = 1e6

    rewrite(tmp_path / "m", change, "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="quant_conv.bias is not finite in float16; use fp32"):
        Latents(tmp_path / "m", precision="fp16")
    Latents(tmp_path / "m", precision="bf16")


def test_values_fit_their_storage():
    t = {"x": torch.tensor([[1.0], [7e4], [2.0]]), "mask": torch.ones(3, 1, dtype=torch.bool)}
    out = fits(t, torch.bfloat16, "abc")
    assert {k: v.dtype for k, v in out.items()} == {"x": torch.bfloat16, "mask": torch.bool}
    with pytest.raises(UserError, match="^b: too large for float16; store them as bf16 or fp32"):
        fits(t, torch.float16, "abc")
    assert torch.equal(fits(t, torch.float32, "abc")["x"], t["x"])


def test_names_belong_to_items(zoo):
    with pytest.raises(ValueError, match="2 names for 3 items"):
        finite(Latents(zoo / "vae"), pixels(), "ab")


# ---- features
def by_hand(folder, model, name="pil"):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend=name)(images=pictures(), return_tensors="pt")


@pytest.mark.parametrize(
    "folder, whole, special",
    [
        ("siglip", True, 0),
        ("siglip_vision", False, 0),
        ("dino", False, 1),
        ("dino_registers", False, 4),
        ("clip", True, 1),
        ("clip_projection", False, 1),
        ("clip_vision", False, 1),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_those_of_transformers(zoo, folder, whole, special, precision):
    from transformers import AutoModel, CLIPVisionModel, CLIPVisionModelWithProjection

    cls = {"clip_projection": CLIPVisionModelWithProjection, "clip_vision": CLIPVisionModel}.get(
        folder, AutoModel
    )
    model = cls.from_pretrained(zoo / folder, dtype=DTYPES[precision]).eval().requires_grad_(False)
    x = by_hand(zoo / folder, model)["pixel_values"].to(model.dtype)
    with torch.no_grad():
        half = model.vision_model if whole else model
        found = half(pixel_values=x, output_hidden_states=True)
        pooled = (
            model.visual_projection(found.pooler_output)
            if folder == "clip"
            else found.image_embeds
            if folder == "clip_projection"
            else found.pooler_output
        )
    enc = Features(zoo / folder, what="both", precision=precision)
    equal(enc.encode(pictures()), {"pooled": pooled.float(), "tokens": found.last_hidden_state.float()})
    f = enc.facts
    assert (
        f["special"] == special
        and found.last_hidden_state.shape[1:] == (special + f["grid"][0] * f["grid"][1], f["width"])
        and pooled.shape[1] == f["pooled"]
    )
    for what in ("pooled", "tokens"):
        equal(
            Features(zoo / folder, what=what, precision=precision).encode(pictures()),
            {what: enc.encode(pictures())[what]},
        )
    for layer in (-1, 1):
        assert torch.equal(
            Features(zoo / folder, what="tokens", layer=layer, precision=precision).encode(pictures())[
                "tokens"
            ],
            found.hidden_states[layer].float(),
        )


def test_patches_of_different_number_have_a_mask(zoo):
    from transformers import AutoModel

    inputs = by_hand(zoo / "siglip2", None)
    with torch.no_grad():
        found = AutoModel.from_pretrained(zoo / "siglip2").eval().requires_grad_(False)(**inputs)
    out = Features(zoo / "siglip2", what="both").encode(pictures())
    equal(
        out,
        {
            "pooled": found.pooler_output,
            "tokens": found.last_hidden_state,
            "mask": inputs["pixel_attention_mask"].bool(),
        },
    )
    assert not out["mask"].all() and out["mask"].any(1).all()


def test_features_take_rgb_images_only(zoo):
    enc = Features(zoo / "siglip")
    for batch in ([pictures()[0].convert("L")], [np.zeros((8, 8, 3), np.uint8)], [str(zoo)]):
        with pytest.raises(UserError, match="PIL images in RGB"):
            enc.encode(batch)


def test_a_model_without_pooling_says_so(tmp_path):
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    SiglipVisionModel(SiglipVisionConfig(**tiny.VIT, image_size=32, vision_use_head=False)).save_pretrained(
        tmp_path
    )
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no pooling; ask for tokens"):
        Features(tmp_path).encode(pictures())
    assert Features(tmp_path, what="tokens").encode(pictures())["tokens"].shape == (3, 16, 16)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(what="pool"), "give pooled, tokens or both"),
        (dict(layer="penultimate"), "an index into hidden_states"),
        (dict(layer=4), "hidden states 0 to 3"),
        (dict(layer=-5), "hidden states 0 to 3"),
        (dict(precision="float16"), "did you mean 'fp16'"),
        (dict(device="cuda:9"), "not here"),
        (dict(device="gpu"), "no device"),
    ],
)
def test_wrong_options_are_refused(zoo, options, text):
    with pytest.raises(UserError, match=text):
        Features(zoo / "siglip", **options)


# ---- the key
def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def nudge(folder, name="model.safetensors"):
    def change(w):
        next(iter(w.values())).view(-1)[0] += 1e-3

    rewrite(folder, change, name)


@pytest.mark.parametrize(
    "kind, source, what",
    [
        (k, s, w)
        for k, s, more in (("latents", "vae", ()), ("features", "siglip", ("processor", "layer")))
        for w in ("nothing", "moved", "weights", "precision", "config", *more)
    ],
)
def test_the_key_knows_what_decides(zoo, tmp_path, kind, source, what):
    shutil.copytree(zoo / source, tmp_path / "m")
    options, where = ({"what": "tokens"} if kind == "features" else {}), tmp_path / "m"
    key = open_encoder(kind, where, **options).key
    if what == "moved":
        where = (tmp_path / "m").rename(tmp_path / "elsewhere")
    if what == "weights":
        nudge(where, "diffusion_pytorch_model.safetensors" if kind == "latents" else "model.safetensors")
    if what == "precision":
        options |= {"precision": "bf16"}
    if what == "config":
        edit(
            where / "config.json",
            **({"scaling_factor": 0.5} if kind == "latents" else {"initializer_factor": 2.0}),
        )
    if what == "processor":
        edit(where / "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])
    if what == "layer":
        options |= {"layer": -1}
    changed = open_encoder(kind, where, **options).key
    assert (changed == key) == (what in ("nothing", "moved")) and changed == json.loads(json.dumps(changed))


def test_a_blob_of_the_hub_is_known_by_its_name(zoo, tmp_path):
    """Large files in the hub cache are links to blobs that are named by their SHA-256; here the content lies,
    so that reading it would show.
    """
    shutil.copytree(zoo / "vae", tmp_path / "snap")
    file, blobs = tmp_path / "snap/diffusion_pytorch_model.safetensors", tmp_path / "blobs"
    blobs.mkdir()
    name = sha256(file)
    file.rename(blobs / name)
    file.symlink_to(blobs / name)
    assert weights_id(tmp_path / "snap") == weights_id(zoo / "vae")  # the same as by content
    (blobs / name).write_bytes(b"other")
    assert weights_id(tmp_path / "snap") == weights_id(zoo / "vae")
    (blobs / name).rename(blobs / name[:40])  # 40 digits: not a SHA-256 of the content
    file.unlink()
    file.symlink_to(blobs / name[:40])
    plain = weights_id(shutil.copytree(tmp_path / "snap", tmp_path / "copy"))  # copytree follows the link
    assert weights_id(tmp_path / "snap") == plain != weights_id(zoo / "vae")


def test_a_link_to_nothing_is_said(zoo, tmp_path):
    "A hub cache whose blobs were deleted."
    shutil.copytree(zoo / "vae", tmp_path / "m")
    file = tmp_path / "m/diffusion_pytorch_model.safetensors"
    file.unlink()
    file.symlink_to(tmp_path / "blobs" / ("a" * 64))
    with pytest.raises(
        UserError, match="diffusion_pytorch_model.safetensors is a link to nothing; fetch the model again"
    ):
        Latents(tmp_path / "m")


def test_names_and_contents_are_kept_apart(tmp_path):
    "Two files that swap their contents are another model."
    for folder, (a, b) in {"one": (0.0, 1.0), "two": (1.0, 0.0)}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        for n, v in (("a", a), ("b", b)):
            save_file({"w": torch.tensor([v])}, tmp_path / folder / f"{n}.safetensors")
    assert weights_id(tmp_path / "one") != weights_id(tmp_path / "two")


# ---- where models come from
def test_hub_names_resolve_in_the_local_cache_only(zoo, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    absent = "owner/vae: no such folder, and not in the local hub cache"
    with pytest.raises(UserError, match=f"{absent}; where there is a network: hf download owner/vae"):
        Latents("owner/vae")
    commit = "0" * 40
    repo = tmp_path / "models--owner--vae"
    shutil.copytree(zoo / "vae", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    assert Latents("owner/vae").key == Latents(zoo / "vae").key


def test_a_hub_copy_of_which_only_a_part_was_fetched(zoo, tmp_path, monkeypatch):
    """hf download owner/pipe --include 'vae/*': what is there is enough for latents; for prompts the missing
    part is named.
    """
    from huggingface_hub import constants
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, repo = "1" * 40, tmp_path / "models--owner--pipe"
    shutil.copytree(zoo / "vae", repo / "snapshots" / commit / "vae")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    write_tree_cache(
        str(repo),
        commit,
        {n: TreeCacheEntry(size=1, blob_id="0" * 40) for n in ("vae/config.json", "model_index.json")},
    )
    from huggingface_hub import snapshot_download

    with pytest.raises(Exception, match="incomplete"):
        snapshot_download("owner/pipe", local_files_only=True)
    assert Latents("owner/pipe").key == Latents(zoo / "vae").key
    with pytest.raises(UserError, match="no model_index.json"):
        Prompts("owner/pipe")


def index_of(pipeline, encoder):
    "The model_index.json of a pipeline with one text encoder."
    return json.dumps({"_class_name": pipeline, "text_encoder": ["transformers", encoder]})


@pytest.mark.parametrize(
    "kind, make, text",
    [
        (
            "latents",
            {},
            "no config.json; expected a VAE .config.json, diffusion_pytorch_model.safetensors., "
            "or a pipeline with vae/",
        ),
        ("latents", {"config.json": '{"_class_name": "AutoencoderKL"}'}, "no .*safetensors"),
        (
            "latents",
            {"config.json": '{"_class_name": "AutoencoderKL"}', "diffusion_pytorch_model.bin": "x"},
            "diffusion_pytorch_model.bin is a pickle, which is never read here; save it as safetensors",
        ),
        (
            "latents",
            {"config.json": '{"_class_name": "VQModel"}', "diffusion_pytorch_model.safetensors": "x"},
            "says VQModel, expected AutoencoderKL",
        ),
        (
            "latents",
            {
                "config.json": '{"_class_name": "AutoencoderKL", "latents_mean": [0, 0, 0, 0]}',
                "diffusion_pytorch_model.safetensors": "x",
            },
            "latents_mean",
        ),
        ("latents", {"config.json": "{", "model.safetensors": "x"}, "not valid JSON"),
        (
            "features",
            {
                "config.json": '{"model_type": "bert"}',
                "model.safetensors": "x",
                "preprocessor_config.json": "{}",
            },
            "model_type 'bert' is no vision model",
        ),
        (
            "features",
            {"config.json": '{"model_type": "siglip"}', "model.safetensors": "x"},
            "no preprocessor_config.json",
        ),
        (
            "features",
            {"config.json": '{"model_type": "siglip"}', "model.bin": "x", "preprocessor_config.json": "{}"},
            "model.bin is a pickle",
        ),
        ("prompts", {}, "no model_index.json; expected a pipeline"),
        (
            "prompts",
            {"model_index.json": index_of("StableDiffusionPipeline", "CLIPTextModel")},
            "text_encoder: no such folder; the pipeline names it",
        ),
        (
            "prompts",
            {"model_index.json": index_of("StableDiffusionPipeline", "GemmaModel")},
            "text_encoder is a GemmaModel; known: CLIPTextModel",
        ),
        (
            "prompts",
            {"model_index.json": index_of("FluxPipeline", "CLIPTextModel")},
            "not known here; say layer=last",
        ),
        ("prompts", {"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}, "no text encoders"),
        (
            "prompts",
            {
                "model_index.json": index_of("StableDiffusionPipeline", "CLIPTextModel"),
                "text_encoder/config.json": "{}",
                "text_encoder/model.safetensors": "x",
            },
            "tokenizer: no tokenizer.json and no vocab.json . merges.txt",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, kind, make, text):
    for name, content in make.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=text) as e:
        open_encoder(kind, tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_a_missing_folder_needs_no_heavy_package(tmp_path):
    code = f"""import sys
from sdcourse.cache.encoders import open_encoder
from sdcourse.core import UserError
for kind in ("latents", "prompts", "features"):
    for where in ({str(tmp_path)!r}, {str(tmp_path / "none")!r}, "nobody/nothing"):
        try: open_encoder(kind, where)
        except UserError as e: print(e)
print([m for m in ("diffusers", "transformers") if m in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) == 10 and lines[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    "kind, source, name",
    [
        ("latents", "vae", "diffusion_pytorch_model.safetensors"),
        ("features", "siglip_vision", "model.safetensors"),
    ],
)
def test_weights_are_never_made_up(zoo, tmp_path, kind, source, name):
    "from_pretrained would fill what is missing with random numbers."
    shutil.copytree(zoo / source, tmp_path / "m")
    gone = []

    def change(w):
        gone.append(sorted(w)[0])
        del w[gone[0]]

    rewrite(tmp_path / "m", change, name)
    with pytest.raises(
        UserError, match=f"1 weights of .* are not in its files, the first is .*{gone[0].split('.')[-2]}"
    ):
        open_encoder(kind, tmp_path / "m")

    def wrong(w):
        k = sorted(w)[0]
        w[k] = torch.zeros(*w[k].shape, 2)

    shutil.copy(zoo / source / name, tmp_path / "m" / name)
    rewrite(tmp_path / "m", wrong, name)
    with pytest.raises(UserError) as e:
        open_encoder(kind, tmp_path / "m")
    assert "\n" not in str(e.value)
    data = (zoo / source / name).read_bytes()
    (tmp_path / "m" / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be loaded as") as e:
        open_encoder(kind, tmp_path / "m")
    assert "\n" not in str(e.value)


def test_weights_with_published_names(zoo, tmp_path):
    """The VAEs of SD1.x name their attention as diffusers once did; vision halves have vision_model. before
    each name.
    """
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(w):
        for k in [k for k in w if ".attentions." in k]:
            for new, was in old.items():
                if f".{new}." in k:
                    w[k.replace(f".{new}.", f".{was}.")] = w.pop(k)

    shutil.copytree(zoo / "vae", tmp_path / "vae")
    rewrite(tmp_path / "vae", rename, "diffusion_pytorch_model.safetensors")
    assert any(".query." in k for k in load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors"))
    equal(Latents(tmp_path / "vae").encode(pixels()), Latents(zoo / "vae").encode(pixels()))
    for name in ("siglip_vision", "clip_vision", "clip_projection"):

        def prefix(w):
            for k in [k for k in w if not k.startswith(("vision_model.", "visual_projection"))]:
                w[f"vision_model.{k}"] = w.pop(k)
            w["vision_model.embeddings.position_ids"] = torch.arange(16)[None]

        shutil.copytree(zoo / name, tmp_path / name)
        rewrite(tmp_path / name, prefix)
        equal(Features(tmp_path / name).encode(pictures()), Features(zoo / name).encode(pictures()))


def test_no_code_of_a_model_folder_is_run(zoo, tmp_path, monkeypatch):
    "A processor that names its own Python file."
    shutil.copytree(zoo / "siglip", tmp_path / "m")
    edit(
        tmp_path / "m/preprocessor_config.json",
        image_processor_type="Evil",
        auto_map={"AutoImageProcessor": "evil.Evil"},
    )
    (tmp_path / "m/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # the question whether to trust
    try:
        Features(tmp_path / "m")
    except UserError as e:
        assert "\n" not in str(e)
    assert not (tmp_path / "ran").exists()


def test_outputs_can_be_saved(zoo, tmp_path):
    "Contiguous, none a view of another."
    for out in (
        Latents(zoo / "vae").encode(pixels(1)),
        Latents(zoo / "vae").encode(pixels()),
        Features(zoo / "siglip2", what="both").encode(pictures()),
    ):
        save_file(out, tmp_path / "out.safetensors")


def test_weights_of_a_variant(zoo, tmp_path):
    "fp16 files alone, as many are published."
    shutil.copytree(zoo / "vae", tmp_path / "m")
    (tmp_path / "m/diffusion_pytorch_model.safetensors").rename(
        tmp_path / "m/diffusion_pytorch_model.fp16.safetensors"
    )
    equal(Latents(tmp_path / "m").encode(pixels()), Latents(zoo / "vae").encode(pixels()))
    shutil.copy(
        tmp_path / "m/diffusion_pytorch_model.fp16.safetensors",
        tmp_path / "m/diffusion_pytorch_model.bf16.safetensors",
    )
    with pytest.raises(UserError, match="several variants: bf16, fp16"):
        Latents(tmp_path / "m")


def test_weights_in_shards(zoo, tmp_path):
    from transformers import SiglipVisionModel

    SiglipVisionModel.from_pretrained(zoo / "siglip_vision").save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(zoo / "siglip_vision/preprocessor_config.json", tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    equal(Features(tmp_path).encode(pictures()), Features(zoo / "siglip_vision").encode(pictures()))
    sorted(tmp_path.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(UserError) as e:
        Features(tmp_path)
    assert "\n" not in str(e.value)


def test_unknown_kinds_and_options(zoo):
    with pytest.raises(UserError, match="unknown encoder 'feature': did you mean 'features'"):
        open_encoder("feature", zoo / "siglip")
    with pytest.raises(UserError, match="unknown option 'wat' of features: did you mean 'what'"):
        open_encoder("features", zoo / "siglip", wat="tokens")


# ---- true sizes, without memory
def test_true_sizes_of_vae_and_vision(zoo):
    from diffusers import AutoencoderKL
    from transformers import SiglipVisionConfig, SiglipVisionModel

    enc = Latents(zoo / "vae")
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    with torch.device("meta"):
        enc.model = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=1024,
            **blocks,
        )
    enc.device, enc.facts["down"] = torch.device("meta"), 8
    with torch.no_grad():
        out = enc.run(pixels(1, 1024, 1024).to("meta"))
    assert out["mean"].shape == out["std"].shape == (1, 16, 128, 128)
    with torch.device("meta"):
        model = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                image_size=384,
                patch_size=14,
            )
        )
    vision = Features(zoo / "siglip", what="both")
    vision.model, vision.device = model, torch.device("meta")
    vision.processor.size = {"height": 384, "width": 384}
    with torch.no_grad():
        out = vision.run(pictures(1))
    assert (out["tokens"].shape, out["pooled"].shape, vision._sizes()["grid"]) == (
        (1, 729, 1152),
        (1, 1152),
        [27, 27],
    )

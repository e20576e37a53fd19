"""Stable Diffusion 3: what is trained, what is left, and what is refused; on a pipeline of the true
classes with a few thousand random numbers.
"""

import json
import shutil

import numpy as np
import pytest
import torch

import ranks
import tiny_models
import warm
from sdcourse import cli
from sdcourse.config import resolve
from sdcourse.core import UserError
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint
from sdcourse.engine.loop import train
from sdcourse.engine.order import Draws, image_generators
from sdcourse.train import sd3
from test_sd15 import same

pytest.importorskip("peft")

TEXTS = ["a red cat", "a small dog on the lake"]
SMALL = dict(
    image_size=16,
    t5_length=8,
    flip=False,
    caption_column="",
    max_steps=3,
    batch_size=4,
    encode_batch=4,
    ema_decay=0.9,
    checkpoint_every=0,
    num_inference_steps=2,
    guidance_scale=2.0,
    validation_prompts=("a red cat",),
    log_every=1,
    validate_every=0,
)
LORA = dict(lora_rank=2, lora_alpha=8.0, lora_blocks=("0",), lr=1e-2)


@pytest.fixture(scope="session")
def sd3_model(built):
    return built(tiny_models.tiny_sd3)


@pytest.fixture(scope="session")
def model(sd3_model):
    return sd3_model


@pytest.fixture(scope="session")
def sd3_data(built, sd3_model):
    "Eight captioned pictures, with caches of latents and prompts; whoever changes them, changes a copy."

    def captioned_pictures(root):
        place = str(root / "data")
        words = ["prepare", "scenes", place, "--train", "8", "--val", "2", "--test", "2", "--size", "32"]
        assert cli.run(words) == 0
        common = ["--model", str(sd3_model), "--dtype", "fp32", "--encode-batch", "4"]
        latents = ["cache", "latents", place, str(root / "latents"), "--size", "16", "--no-mirror"]
        assert cli.run([*latents, *common]) == 0
        prompts = ["cache", "prompts", place, str(root / "prompts"), "--t5-length", "8"]
        assert cli.run([*prompts, *common]) == 0

    return built(captioned_pictures)


@pytest.fixture(scope="session")
def data(sd3_data):
    return sd3_data


def config(out, model, **over):
    return resolve(sd3.Config, preset="tiny", overrides=SMALL | dict(out=str(out), model=str(model)) | over)


def cached(data, **over):
    found = {k: str(data / k) for k in ("data", "latents", "prompts")}
    return found | over


def weights(out, kind="model"):
    return load_checkpoint(latest_checkpoint(out / "checkpoints")[0])["tensors"][kind]


def plain(folder):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe):
    how = dict(guidance_scale=2.0, num_inference_steps=2, height=16, width=16, max_sequence_length=8)
    return pipe(TEXTS, generator=image_generators([0, 1]), output_type="pt", **how).images * 2 - 1


# ---- the objective


class Stub(torch.nn.Module):
    "Looks at what it is given, and answers 0."

    def __init__(self):
        super().__init__()
        self.proj_out = torch.nn.Linear(1, 1)
        self.config = type("C", (), dict(joint_attention_dim=5))

    def forward(self, x, hidden, pooled, timestep, return_dict):
        self.seen = (hidden, pooled, timestep)
        return (0 * x,)


def columns(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = dict(text_encoder=(3, 2), text_encoder_2=(3, 2), text_encoder_3=(4, 5))
    found = {f"{k}.hidden": torch.randn(n, *v, generator=g) for k, v in shapes.items()}
    return found | {f"{k}.pooled": torch.randn(n, 2, generator=g) for k in ("text_encoder", "text_encoder_2")}


def stubbed(n, step=0, **over):
    "(module, loss, batch, draws) of one forward pass."
    module = sd3.VelocityModel(Stub(), config("", "new", **over), columns(1, seed=9))
    batch = columns(n) | {"x0": torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(1))}
    draws = Draws(0, step, range(n))
    return module, module(batch, draws), batch, draws


@pytest.mark.parametrize("mean, shift", [(0.5, 3.0), (-0.5, 3.0), (0.0, 1.0)])
def test_noise_levels_have_the_density_that_was_asked_for(mean, shift):
    "O6: logit(t) ~ N(m + ln shift, s), and the network is told 1000 t."
    from scipy.stats import kstest

    module, (_, t), *_ = stubbed(20_000, density_mean=mean, density_std=0.8, density_shift=shift)
    assert kstest(torch.logit(t.double()).numpy(), "norm", (mean + np.log(shift), 0.8)).pvalue > 0.01
    torch.testing.assert_close(module.transformer.seen[2], 1000 * t)
    assert t.min() >= 1e-4 and t.max() <= 1 - 1e-4


def test_more_mean_is_more_noise_and_the_scale_of_mode_counts():
    means = [stubbed(4096, density_mean=m)[1][1].mean() for m in (-0.5, 0.0, 0.5)]
    assert means[0] < means[1] < means[2]
    near = [
        ((stubbed(4096, density="mode", density_scale=s, density_shift=1.0)[1][1] - 0.5).abs()).mean()
        for s in (0.0, 1.29)
    ]
    assert near[1] < 0.8 * near[0]


def test_the_loss_weights_are_what_their_names_say():
    "O7: a loss of data, of noise and of velocity; that of data is the published one; diffusers' weight."
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    found = {k: stubbed(64, loss_weight=k)[1] for k in ("velocity", "x0", "eps", "sigma_sqrt")}
    module, (loss, t), batch, draws = stubbed(64)
    x0, eps = batch["x0"], draws.normal("noise", (2, 1, 1))
    s = t[:, None, None, None]
    x_t = (1 - s) * x0 + s * eps  # the answer is 0: so is the velocity
    torch.testing.assert_close(found["x0"][0], (x_t - x0).square().mean((1, 2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["eps"][0], (x_t - eps).square().mean((1, 2, 3)), atol=1e-5, rtol=1e-5)
    theirs = compute_loss_weighting_for_sd3("sigma_sqrt", t)
    torch.testing.assert_close(found["sigma_sqrt"][0], theirs * loss, atol=1e-5, rtol=1e-5)


# ---- captions


def test_all_encoders_are_dropped_together_at_their_rate():
    "O8: each row is wholly the caption's or wholly the empty one's, bit for bit."
    gone = []
    for step in range(20):
        module, _, batch, draws = stubbed(256, step, cond_drop=0.2, t5_length=4)
        hidden, pooled, _ = module.transformer.seen
        text = (hidden == module.empty_hidden).all(2).all(1)
        assert torch.equal(text, (pooled == module.empty_pooled).all(1))
        assert torch.equal(hidden[~text, 3:], batch["text_encoder_3.hidden"][~text])
        assert torch.equal(pooled[~text, 2:], batch["text_encoder_2.pooled"][~text])
        gone.append(text)
    share = torch.cat(gone).double().mean().item()
    assert abs(share - 0.2) < 3 * (0.16 / 5120) ** 0.5


@pytest.mark.parametrize("t5", [True, False])
def test_captions_are_embedded_as_the_pipeline_does(model, t5):
    pipe = plain(model)
    if not t5:
        pipe.text_encoder_3 = pipe.tokenizer_3 = None
    how = dict(prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=8)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(prompt=TEXTS, **how)
    task = sd3.Task(config("", model, t5=t5))
    batch = task.embedded(TEXTS, "cpu")
    ours = task.build().condition(batch, Draws(0, 0, range(2), scope="validate"))
    module = task.build()
    module.cond_drop = 0.0
    ours = module.condition(batch, Draws(0, 0, range(2)))
    assert (ours[0] - hidden).abs().max() < 1e-5 and (ours[1] - pooled).abs().max() < 1e-5


def test_each_visit_draws_one_of_the_captions(data, model):
    task = sd3.Task(config("", model, **cached(data)))
    items, texts = task.dataset("train"), task.texts("train")
    seen = [items.__getitems__([(0, position)]) for position in range(40)]
    assert {b["text"][0] for b in seen} == set(texts[str(items.ids[0])]) and len(texts[str(items.ids[0])]) > 1
    rows = {b["text"][0]: b["text_encoder_3.hidden"] for b in seen}
    for text, row in rows.items():  # D1: the embedding is that of the caption
        assert (task.captions.embedded([text], "cpu")["text_encoder_3.hidden"] - row).abs().max() < 1e-5


# ---- adapters


def test_adapters_begin_as_the_model_and_alone_learn(data, model):
    "O10 and O11, also in a bf16 model."
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        task = sd3.Task(config("", model, **cached(data), **LORA, base_precision=precision, cond_drop=0.0))
        net, rows = task.build(), task.dataset("train").__getitems__([(i, i) for i in range(4)])
        draws = Draws(0, 0, range(4))
        batch = task.encode(rows, draws)
        given = torch.randn(4, 16, 4, 4), torch.tensor([0.9, 0.7, 0.4, 0.1]), net.condition(batch, draws)
        base = sd3.Task(config("", model, **cached(data), cond_drop=0.0)).build()
        base.transformer.to(dtype)
        assert torch.equal(net.predict(*given), base.predict(*given))
        net(batch, draws)[0].sum().backward()
        named = dict(net.named_parameters())
        assert all((p.grad is not None) == ("lora_" in n) for n, p in named.items())
        assert {p.dtype for n, p in named.items() if "lora_" in n} == {torch.float32}
        assert {p.dtype for n, p in named.items() if "lora_" not in n} == {dtype}
        assert sum(p.numel() for p in named.values() if p.requires_grad) == 2 * 8 * 32


def test_the_published_adapters_have_the_published_size():
    from diffusers import SD3Transformer2DModel
    from sdcourse.models.lora_sd3 import add_block_lora

    with torch.device("meta"):
        net = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        )
        add_block_lora(net, rank=64, blocks=("4-22",))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 29_884_416
    assert not [n for n, m in net.named_modules() if hasattr(m, "lora_A") and ".23." in n]


def test_blocks_in_any_order_are_the_same_run(tmp_path, data, model):
    common = cached(data) | LORA
    for name, blocks in (("a", ("0-1",)), ("b", ("1", "0"))):
        over = common | dict(lora_blocks=blocks, lora_modules=("attn.to_q", "attn.to_v"), max_steps=1)
        train(sd3.Task(config(tmp_path / name, model, **over)))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.fixture(scope="session")
def run(built, data, model):
    "A finished training of adapters with alpha 4 times the rank."

    def lora_run(folder):
        train(sd3.Task(config(folder, model, **cached(data), **LORA, ema_decay=0.0)))

    return built(lora_run)


def test_adapters_load_in_plain_diffusers_as_they_were_trained(run, data, model):
    "O12: alpha is not the rank; beside the weights and merged into them; the task draws as the pipeline."
    task = sd3.Task(config("", model, **cached(data), **LORA))
    net = task.build().eval()
    net.load_state_dict(weights(run), strict=False)
    pipe = plain(model)
    before = drawn(pipe)
    pipe.load_lora_weights(str(run / "export"))
    ours, theirs = task.images(net, TEXTS, [0, 1]), drawn(pipe)
    assert (ours - theirs).abs().max() < 1e-5 < 1e-3 < (theirs - before).abs().max()
    pipe.fuse_lora()
    assert (drawn(pipe) - theirs).abs().max() < 1e-4


def test_adapters_load_in_peft(run, model):
    from peft import PeftModel

    net = PeftModel.from_pretrained(plain(model).transformer, str(run / "export" / "peft"))
    pipe = plain(model)
    pipe.load_lora_weights(str(run / "export"))
    x, t = torch.randn(2, 16, 4, 4), torch.tensor([5.0, 900.0])
    words = torch.randn(2, 7, 48), torch.randn(2, 32)
    with torch.no_grad():
        assert (net(x, *words, t).sample - pipe.transformer(x, *words, t).sample).abs().max() < 1e-5


def test_kohyas_file_is_the_same_change_of_the_published_checkpoint(run, model):
    "Merged into a checkpoint in the published layout, which diffusers then converts."
    from collections import defaultdict
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert
    from safetensors.torch import load_file

    change = {}
    found = load_file(run / "export" / "kohya.safetensors")
    for name in {k.split(".")[0] for k in found}:
        down, up = found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"]
        change[name] = up @ down * found[f"{name}.alpha"] / len(down)

    class Zeros(defaultdict):  # a checkpoint that has every name
        def pop(self, key):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            return change.get(name, torch.zeros(48, 16)) if key.endswith(".weight") else torch.zeros(48)

    known = {f"joint_blocks.{i}.x": 0 for i in range(2)} | {"context_embedder.weight": torch.zeros(16, 48)}
    theirs = convert(Zeros(None, known))
    pipe = plain(model)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(str(run / "export"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert len(moved) == 8 and len(change) == 4
    for k in moved:
        assert (after[k] - before[k] - theirs[k]).abs().max() < 1e-6, k


def test_the_header_says_what_belongs_to_the_adapters(run, model):
    from sdcourse.models.files import weights_id
    from sdcourse.models.lora_sd3 import lora_header

    for name in ("pytorch_lora_weights", "kohya", "peft/adapter_model"):
        said = lora_header(run / "export" / f"{name}.safetensors")
        assert said["base_sha256"] == weights_id(model / "transformer")
        assert (said["lora_alpha"], said["prompt_length"], said["lora_blocks"]) == ("8.0", "8", "0")
        assert said["lora_layers"].split(",") == list(sd3.JOINT_ATTENTION)
    told = lora_header(run / "export/pytorch_lora_weights.safetensors")["lora_adapter_metadata"]
    assert [v for k, v in json.loads(told).items() if k.endswith("lora_alpha")] == [8.0]  # of the network
    config_said = json.loads(said.get("lora_adapter_metadata", "{}") or "{}")
    assert not config_said  # peft has a file of its own for it


def test_a_file_that_lost_alpha_is_not_exported(tmp_path, monkeypatch, data, model):
    "The trainer reads its own file again and compares."
    from sdcourse.models import lora_sd3

    def forgetful(file, tensors, config, about, write=lora_sd3._write_diffusers):
        return write(file, tensors, config | {"lora_alpha": config["r"]}, about)

    monkeypatch.setattr(lora_sd3, "_write_diffusers", forgetful)
    with pytest.raises(UserError, match="answer otherwise than those that were trained"):
        train(sd3.Task(config(tmp_path, model, **cached(data), **LORA)))


def test_scale_zero_is_the_base_bit_for_bit_and_blocks_have_their_own(run, model):
    from sdcourse.models.lora_sd3 import block_scales, scale_blocks

    pipe = plain(model)
    x, t = torch.randn(2, 16, 4, 4), torch.tensor([5.0, 900.0])
    words = torch.randn(2, 7, 48), torch.randn(2, 32)

    @torch.no_grad()
    def answer():
        return pipe.transformer(x, *words, t).sample

    base = answer()
    pipe.load_lora_weights(str(run / "export"), adapter_name="lora")
    whole = answer()
    scale_blocks(pipe.transformer, block_scales(("0=0.5",), 2), "lora")
    half = answer()
    scale_blocks(pipe.transformer, {0: 0.0}, "lora")
    assert torch.equal(answer(), base) and not torch.equal(half, whole) and not torch.equal(half, base)
    pipe.set_adapters(["lora"], [0.0])
    assert torch.equal(answer(), base)
    pipe.set_adapters(["lora"], [0.5])
    assert torch.equal(answer(), half)
    with pytest.raises(UserError, match="block 1 has no adapters; there are some in 0"):
        scale_blocks(pipe.transformer, {1: 0.5}, "lora")


# ---- training


def test_caches_give_the_weights_of_online_training(tmp_path, data, model):
    """D4: bit by bit, from float32 caches with the same encode batches (the empty caption
    is alone in one, and among others in the cache).
    """
    over = dict(cond_drop=0.0)
    train(sd3.Task(config(tmp_path / "online", model, data=str(data / "data"), **over)))
    train(sd3.Task(config(tmp_path / "cached", model, **cached(data), **over)))
    assert same(weights(tmp_path / "online"), weights(tmp_path / "cached"))


def test_resumed_is_uninterrupted(tmp_path, data, model):
    "R1: from every step, with accumulation, adapters and the average."
    common = cached(data) | LORA | dict(micro_batch=2, checkpoint_every=1, keep=3)
    train(sd3.Task(config(tmp_path / "whole", model, **common)))
    for last in (1, 2):
        place = shutil.copytree(tmp_path / "whole", tmp_path / f"from{last}")
        shutil.rmtree(place / "export")
        for there in (place / "checkpoints").glob("step-*"):
            if int(there.name[5:]) > last:
                shutil.rmtree(there)
        assert train(sd3.Task(config(place, model, **common))).step == 3
        for kind in ("model", "ema"):
            assert same(weights(place, kind), weights(tmp_path / "whole", kind))


def test_an_export_draws_in_plain_diffusers_what_the_task_draws(tmp_path, data, model):
    task = sd3.Task(config(tmp_path, model, **cached(data), lr=1e-2, validate_every=3))
    train(task)
    pipe = plain(tmp_path / "export")
    ema = weights(tmp_path, "ema")
    assert same(
        {
            f"transformer.{k}": v
            for k, v in pipe.transformer.state_dict().items()
            if f"transformer.{k}" in ema
        },
        ema,
    )
    net = task.build()
    net.load_state_dict(ema, strict=False)
    assert (task.images(net.eval(), TEXTS, [0, 1]) - drawn(pipe)).abs().max() < 1e-5
    assert list((tmp_path / "samples").glob("*.png")) and (tmp_path / "README.md").is_file()


def test_ranks_may_change_when_a_run_goes_on(tmp_path, data, model):
    "R3 and D1: the first step in one process, the others in two, against one all the way (float64)."
    common = cached(data) | dict(precision="fp64", batch_size=4, checkpoint_every=1, keep=3, lr=1e-4)
    train(sd3.Task(config(tmp_path / "one", model, **common)))
    place = shutil.copytree(tmp_path / "one", tmp_path / "parts")
    shutil.rmtree(place / "export")
    for there in (place / "checkpoints").glob("step-*"):
        if int(there.name[5:]) > 1:
            shutil.rmtree(there)
    over = SMALL | dict(out=str(place), model=str(model)) | common
    code = f"""
import sdcourse.guard
from sdcourse.config import resolve
from sdcourse.engine.loop import train
from sdcourse.train import sd3
train(sd3.Task(resolve(sd3.Config, preset="tiny", overrides={over!r})))
"""
    for ended, _, err in ranks.finish(ranks.start(["-c", code], 2, first=warm.MODELS), warm.LONG):
        assert ended == 0, err[-3000:]
    a, b = weights(tmp_path / "one"), weights(place)
    assert max((a[k] - b[k]).abs().max().item() for k in a) <= 1e-9


# ---- what a run draws


def pictures(folder):
    from PIL import Image

    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(folder.rglob("*.png"))])


def asked(out, source, data, *words):
    "Two pictures of held-out captions."
    line = ["generate", str(source), str(out), "--data", str(data / "data"), "--split", "test"]
    assert cli.run([*line, "--device", "cpu", *map(str, words)]) == 0
    return pictures(out)


def test_a_run_is_drawn_by_checkpoint_by_adapters_and_from_a_cache(tmp_path, run, data, model):
    "The same pictures; length of the prompts, guidance and steps are those of the run."
    first = asked(tmp_path / "a", run / "checkpoints" / "step-00000003", data)
    beside = ["--lora", run / "export"]
    assert (asked(tmp_path / "b", model, data, *beside) == first).all()
    cache = ["--prompt-cache", data / "prompts"]
    assert abs(asked(tmp_path / "c", model, data, *beside, *cache) - first).max() <= 1
    half = asked(tmp_path / "d", model, data, *beside, "--lora-block-scales", "0=0.5")
    assert (asked(tmp_path / "e", model, data, *beside, "--lora-scale", "0.5") == half).all()
    assert (half != first).any()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lora-block-scales", "0-5=1"], "--lora-block-scales 0-5: the model has the blocks 0 to 1"),
        (["--lora-block-scales", "0"], "give BLOCKS=SCALE"),
        (["--prompt-cache", "{data}/prompts", "--t5-length", "77"], "holds 8 tokens of T5, .* is 77"),
        (["--prompt-cache", "{data}/prompts", "--negative-prompt", "a bear"], "has no row for 'a bear'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, run, data, model, words, said):
    line = [
        "generate",
        str(model),
        str(tmp_path / "x"),
        "--data",
        str(data / "data"),
        "--lora",
        str(run / "export"),
    ]
    with pytest.raises(UserError, match=said) as e:
        cli.run([*line, "--device", "cpu", *[w.format(data=data) for w in words]])
    assert "\n" not in str(e.value)


def test_adapters_of_another_base_are_refused(tmp_path, run, data, model):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(model, tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v * 2 for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="was trained beside other weights .* or --lora-any-base"):
        asked(tmp_path / "a", other, data, "--lora", run / "export")
    assert len(asked(tmp_path / "b", other, data, "--lora", run / "export", "--lora-any-base")) == 2


# ---- bad input


def changed(folder, part, **said):
    "Another config of one part."
    file = next((folder / part).glob("*config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    return folder


def no_part(folder):
    shutil.rmtree(folder / "text_encoder_2")


def lost_shard(folder):
    place = folder / "text_encoder_3"
    index = dict(metadata={}, weight_map={"shared.weight": "model-00002-of-00002.safetensors"})
    (place / "model.safetensors").rename(place / "model-00001-of-00002.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (no_part, "--model .*: has no text_encoder_2/; fetch the whole pipeline"),
        (lost_shard, "model-00002-of-00002.safetensors is missing, which"),
        (lambda f: changed(f, "vae", shift_factor=None), "its vae says no shift_factor"),
        (lambda f: changed(f, "vae", latent_channels=4), "takes 16 channels, and its vae has 4"),
        (lambda f: changed(f, "text_encoder_3", d_model=40), "its T5 gives 40"),
        (lambda f: changed(f, "text_encoder", projection_dim=40), "its CLIPs give 60"),
        (lambda f: changed(f, "scheduler", _class_name="DDIMScheduler"), "its scheduler is a DDIMScheduler"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_one_line(tmp_path, model, spoil, said):
    from sdcourse.models.home_sd3 import sd3_home

    folder = shutil.copytree(model, tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=said) as e:
        sd3_home(str(folder))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "over, said",
    [
        (
            dict(model="stabilityai/stable-diffusion-3-medium-diffusers"),
            "hub cache.*wants its licence accepted",
        ),
        (dict(lora_blocks=("4-30",)), "--lora-blocks 4-30: the model has the blocks 0 to 1"),
        (dict(lora_blocks=("1",)), "--lora-blocks 1: block 1 has no attn.to_add_out; leave block 1 out, or"),
        (dict(lora_modules=("to_x",), lora_blocks=()), "--lora-modules to_x: no layer of SD3"),
        (dict(lora_modules=("attn2.to_q",), lora_blocks=()), "--lora-modules attn2.to_q: no layer of SD3"),
        (dict(lora_rank=64), "--lora-rank 64: is more than the 16 inputs or outputs"),
        (dict(lora_rank=0, lora_alpha=4.0, lora_blocks=()), "--lora-alpha: needs --lora-rank"),
        (dict(image_size=18), "--image-size 18: is no multiple of 4"),
        (dict(image_size=96), "more than the 64 pixels"),
        (dict(density_std=0.0), "must be above 0"),
        (dict(t5_length=77), "holds 8 tokens of T5, and --t5-length is 77; give --t5-length 8, or"),
    ],
)
def test_refused_in_one_line(over, said, data, model):
    with pytest.raises(UserError, match=said) as e:
        sd3.Task(config("", **dict(model=model) | cached(data) | LORA | over)).check()
    assert "\n" not in str(e.value)


def test_alpha_zero_is_said_and_without_it_it_is_the_rank(data, model):
    words = dict(cached(data) | LORA, lora_alpha=0.0)
    cfg = config("", model, **words)
    sd3.Task(cfg).check()
    cfg.given = frozenset(["lora_alpha"])
    with pytest.raises(UserError, match="--lora-alpha 0: adapters would have no effect"):
        sd3.Task(cfg).check()


def test_latents_of_another_autoencoder_are_refused(tmp_path, data, model, built):
    other = tiny_models.tiny_vae(tmp_path / "vae")
    line = ["cache", "latents", str(data / "data"), str(tmp_path / "z"), "--size", "16", "--no-mirror"]
    assert cli.run([*line, "--model", str(other), "--dtype", "fp32"]) == 0
    with pytest.raises(UserError, match="is not the VAE that made"):
        sd3.Task(config("", model, **cached(data, latents=str(tmp_path / "z")))).check()


def test_a_cache_without_the_t5_is_for_training_without_it(tmp_path, data, model):
    line = ["cache", "prompts", str(data / "data"), str(tmp_path / "p"), "--model", str(model)]
    assert cli.run([*line, "--dtype", "fp32", "--only", "text_encoder,text_encoder_2"]) == 0
    over = cached(data, prompts=str(tmp_path / "p"))
    with pytest.raises(UserError, match="has no text_encoder_3, only text_encoder, text_encoder_2"):
        sd3.Task(config("", model, **over)).check()
    train(sd3.Task(config(tmp_path / "run", model, **over, t5=False, max_steps=1)))
    assert "zeros stand for T5" in (tmp_path / "run" / "README.md").read_text()

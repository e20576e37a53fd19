"""Adapters: nothing at the start, nothing lost in a file."""

import json

import pytest
import torch

from sdcourse.core import UserError

pytest.importorskip("peft")

from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from sdcourse.models import lora, tiny_sd
from sdcourse.engine.order import image_generators


@pytest.fixture(scope="module")
def home(built):
    return built(tiny_sd.make_pipeline)


def plain(home):
    pipe = StableDiffusionPipeline.from_pretrained(home, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe):
    return pipe(
        ["a red ring", "a green moon"],
        generator=image_generators([0, 1]),
        guidance_scale=2.0,
        num_inference_steps=2,
        output_type="pt",
    ).images


def trained(pipe, alpha=8.0, text=True):
    "Adapters of rank 2 that do something."
    lora.add_lora(pipe.unet, rank=2, alpha=alpha)
    if text:
        lora.add_lora(pipe.text_encoder, rank=2, alpha=alpha, modules=lora.TEXT_ATTENTION)
    g = torch.Generator().manual_seed(0)
    for model in (pipe.unet, pipe.text_encoder):
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.data = 0.03 * torch.randn(p.shape, generator=g)
    return pipe


def test_it_begins_as_the_model_and_only_adapters_learn(home):
    pipe = plain(home)
    before = drawn(pipe)
    lora.add_lora(pipe.unet, rank=3, alpha=6.0)
    assert (drawn(pipe) - before).abs().max() == 0
    pipe.unet(
        torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 32, 128)
    ).sample.square().mean().backward()
    names = {n: p for n, p in pipe.unet.named_parameters()}
    assert all((p.grad is not None) == ("lora_" in n) for n, p in names.items())
    assert sum(p.numel() for n, p in names.items() if "lora_" in n) == lora.lora_size(pipe.unet)


@pytest.mark.parametrize("file", lora.LORA_FILES)
@pytest.mark.parametrize("alpha", [2.0, 8.0])
@pytest.mark.parametrize("text", [False, True])
def test_a_file_is_the_same_function(tmp_path, home, file, alpha, text):
    "alpha = rank and alpha = 4 rank, with and without adapters of the text encoder."
    pipe = trained(plain(home), alpha, text)
    wanted, untouched = drawn(pipe), drawn(plain(home))
    lora.save_lora(tmp_path, unet=pipe.unet, text=pipe.text_encoder if text else None)
    again = plain(home)
    again.load_lora_weights(str(tmp_path), weight_name=file)
    assert (wanted - untouched).abs().max() > 0.003 and (drawn(again) - wanted).abs().max() < 1e-5
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 900])

    def once():  # merging rounds, and a sampler would amplify it
        with torch.no_grad():
            return again.unet(x, t, again.text_encoder(torch.arange(64).view(2, 32)).last_hidden_state).sample

    beside = once()
    again.fuse_lora()
    assert 0 < (once() - beside).abs().max() < 1e-4


def test_peft_reads_the_diffusers_file(tmp_path, home):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    pipe = trained(plain(home), text=False)
    path, _ = lora.save_lora(tmp_path, unet=pipe.unet)
    with safe_open(path, "pt") as f:
        said = json.loads(f.metadata()["lora_adapter_metadata"])
    config = {k.removeprefix("unet."): v for k, v in said.items()}
    assert config["lora_alpha"] == 8 and config["r"] == 2
    other = inject_adapter_in_model(
        LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], target_modules=config["target_modules"]),
        plain(home).unet,
    )
    found = set_peft_model_state_dict(other, {k.removeprefix("unet."): v for k, v in load_file(path).items()})
    assert not found.unexpected_keys
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 32, 128)
    with torch.no_grad():
        assert (other(x, t, c).sample - pipe.unet(x, t, c).sample).abs().max() < 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory, built):
    "A model, and runs by their alpha: 3 steps of both networks at rank 2."
    import tiny_models
    from sdcourse.engine.loop import train
    from sdcourse.train import sd15
    from test_sd15 import captioned, config

    model = built(tiny_models.thin_sd15)
    out = tmp_path_factory.mktemp("adapters")
    data = captioned(out / "data", ["a red ring", "a moon", "a blue ring", "a star"])
    how = dict(model=str(model), data=str(data), lora_rank=2, lora_text=True, lr=1e-2, num_workers=0)
    for alpha in (0.0, 8.0):
        train(sd15.Task(config(out / f"{alpha}", lora_alpha=alpha, **how)))
    return model, out


@pytest.mark.parametrize("alpha", [0.0, 8.0])
def test_after_real_steps_every_reader_has_the_same_function(runs, alpha):
    "faults.md F: alpha = rank, and 4 rank; diffusers, peft alone, and `generate --lora`, by both files."
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from sdcourse.commands.generate import GenerateOptions, open_pipeline

    model, out = runs
    export = out / f"{alpha}/export"
    tensors = load_file(export / lora.LORA_FILES[0])
    assert all(t.abs().max() > 0 for n, t in tensors.items() if "lora_B" in n)  # all have learned
    ours, _ = open_pipeline(out / f"{alpha}", GenerateOptions(), "cpu")  # from the checkpoint
    wanted, untouched = drawn(ours), drawn(plain(model))
    assert (wanted - untouched).abs().max() > 1e-3
    for file in lora.LORA_FILES:
        theirs = plain(model)
        theirs.load_lora_weights(str(export), weight_name=file)
        assert (drawn(theirs) - wanted).abs().max() < 1e-5
    again, _ = open_pipeline(model, GenerateOptions(lora=str(export)), "cpu")
    assert (drawn(again) - wanted).abs().max() < 1e-5
    with safe_open(export / lora.LORA_FILES[0], "pt") as f:
        said = json.loads(f.metadata()["lora_adapter_metadata"])
    alone = plain(model)
    for part in ("unet", "text_encoder"):
        known = {k: said[f"{part}.{k}"] for k in ("r", "lora_alpha", "target_modules")}
        assert (known["r"], known["lora_alpha"]) == (2, alpha or 2)
        network = inject_adapter_in_model(LoraConfig(**known), getattr(alone, part))
        mine = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(part)}
        assert mine and not set_peft_model_state_dict(network, mine).unexpected_keys
    assert (drawn(alone) - wanted).abs().max() < 1e-5


def test_kohya_names(tmp_path, home):
    pipe = trained(plain(home))
    _, path = lora.save_lora(tmp_path, unet=pipe.unet, text=pipe.text_encoder)
    found = load_file(path)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {
        f"{layer}.lora_down.weight",
        f"{layer}.lora_up.weight",
        f"{layer}.alpha",
    } <= found.keys() and found[f"{layer}.alpha"].item() == 8
    assert found["lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight"].shape == (2, 128)
    assert all(k.startswith(("lora_unet_", "lora_te_text_model_")) for k in found)


def test_a_layer_that_is_not_there(home):
    with pytest.raises(UserError, match="--lora-modules to_qq: no layer of UNet2DConditionModel"):
        lora.add_lora(plain(home).unet, rank=2, modules=("to_qq",))


def test_the_published_size():
    "Stable Diffusion 1.5's UNet and its adapters, without memory."
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        assert sum(p.numel() for p in unet.parameters()) == 859_520_964
        lora.add_lora(unet, rank=4)
    assert lora.lora_size(unet) == sum(p.numel() for p in unet.parameters() if p.requires_grad) == 797_184

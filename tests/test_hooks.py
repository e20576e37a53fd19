"""The tap: pictures with and without it are the same bytes in every family; what it keeps is what the layer
computed; it is gone afterwards, and two users do not meet.
"""

import threading

import pytest
import tiny_models
import torch
import torch.nn.functional as F

from sdcourse.attention import hooks
from sdcourse.attention.hooks import Tap, attention_names, network_of, tap_of
from sdcourse.core import UserError

OWN = F.scaled_dot_product_attention
PROMPT = "a red cat on the lake"


def pipeline(built, make):
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(built(make), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, n=1, **options):
    "n pictures, two steps."
    options = dict(num_inference_steps=2, output_type="latent", guidance_scale=3.0) | options
    g = [torch.Generator().manual_seed(i) for i in range(n * options.get("num_images_per_prompt", 1))]
    return pipe([PROMPT] * n, generator=g, **options).images


def our_dit():
    from sdcourse.models.dit import DiT, FlowDiTPipeline

    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, in_channels=3, dim=24, depth=2, heads=2, num_classes=3)
    for p in model.parameters():
        p.data.normal_(std=0.2)
    return FlowDiTPipeline(model.eval(), id2label={0: "a", 1: "b", 2: "c"})


def published_dit():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    shape = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=8, num_layers=2)
    model = DiTTransformer2DModel(**shape, patch_size=2, num_embeds_ada_norm=10).eval()
    x = torch.randn(1, 4, 8, 8)
    return model, lambda: model(x, torch.tensor([5]), torch.tensor([1])).sample


def clip_model(built):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(built(tiny_models.tiny_clip)).eval()
    ids, x = (
        torch.tensor([[48, 3, 4, 49]]),
        torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    )
    return model, lambda: torch.cat([t.flatten() for t in model(ids, x)[2:4]])


def siglip_model(built):
    from transformers import SiglipVisionModel

    model = SiglipVisionModel.from_pretrained(built(tiny_models.tiny_siglip, whole=False)).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model, lambda: model(x).pooler_output


def blip2_model():
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(size, image_size=16, patch_size=8, initializer_range=0.02)
    text = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    former = dict(size, encoder_hidden_size=16, cross_attention_frequency=2, vocab_size=40)
    config = Blip2Config(
        vision_config=vision,
        qformer_config=former,
        text_config=text,
        num_query_tokens=2,
        image_token_index=39,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    model.query_tokens.data.normal_()
    ids, x = torch.tensor([[39, 39, 5, 6]]), torch.randn(1, 3, 16, 16)
    return model, lambda: model(x, ids).logits


FAMILIES = ("sd15", "sdxl", "sd3", "our dit", "published dit", "clip", "siglip", "blip2")


def family(built, name):
    "(the network that is watched, a function that runs it)."
    if name in ("sd15", "sdxl", "sd3"):
        pipe = pipeline(built, getattr(tiny_models, f"tiny_{name}"))
        return network_of(pipe), lambda: draw(pipe)
    if name == "our dit":
        pipe = our_dit()
        options = dict(num_inference_steps=2, output_type="latent")
        return (
            pipe.transformer,
            lambda: pipe([1], generator=torch.Generator().manual_seed(0), **options).images,
        )
    others = {"clip": clip_model, "siglip": siglip_model}
    return (
        others[name](built)
        if name in others
        else {"published dit": published_dit, "blip2": blip2_model}[name]()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_changes_and_what_is_kept_is_what_the_layer_computed(built, name):
    network, run = family(built, name)
    with torch.no_grad():
        before = run()
        with Tap(network, keep=("v", "out"), dtype=torch.float32) as tap:
            during = run()
    assert torch.equal(before, during)
    assert {c.name for c in tap.calls} == {*attention_names(network)} - {
        "head.attention"
    }  # torch's own, SigLIP's
    for c in tap.calls:
        w = c.weights(range(c.q.shape[2]))
        assert (w.sum(-1) - 1).abs().max() <= 1e-5
        assert (w @ c.v[0] - c.out[0]).abs().max() <= 1e-5 * max(1, c.out.abs().max())


def test_weights_are_those_of_a_direct_softmax(built):
    pipe = pipeline(built, tiny_models.tiny_sd15)
    with tap_of(pipe, 1, steps=[1], dtype=torch.float32) as tap:
        draw(pipe)
    with tap_of(pipe, 1, steps=[1]) as half:
        draw(pipe)
    for c, h in zip(tap.calls, half.calls):
        direct = torch.softmax(c.q[0].double() @ c.k[0].double().mT / c.q.shape[-1] ** 0.5, -1)
        whole = torch.cat([w for _, w in c.parts()], 1)
        assert (whole - direct).abs().max() <= 1e-5
        assert h.q.dtype == torch.float16 and (h.weights([0, 3]) - direct[:, [0, 3]]).abs().max() <= 2e-3


def test_never_all_weights_at_once(monkeypatch):
    monkeypatch.setattr(hooks, "PART", 200)
    g = torch.Generator().manual_seed(0)
    call = hooks.Seen(
        "x", 0, "self", torch.randn(1, 2, 30, 4, generator=g), torch.randn(1, 2, 25, 4, generator=g)
    )
    parts = list(call.parts())
    assert all(w.numel() <= 200 for _, w in parts) and torch.cat([r for r, _ in parts]).tolist() == list(
        range(30)
    )


def test_masks_and_causal_rows_are_the_layers_own(built):
    network, run = family(built, "clip")
    with torch.no_grad(), Tap(network, blocks=["text_model.*"], dtype=torch.float32) as tap:
        run()
    w = tap.calls[0].weights(range(4))
    assert torch.equal(w > 0, torch.ones_like(w).tril() > 0)


def test_shared_heads_and_a_mask_of_bools():
    class Attention(torch.nn.Module):
        def forward(self, q, k, mask):
            return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)

    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 5, 8, generator=g), torch.randn(1, 2, 6, 8, generator=g)
    mask = torch.rand(1, 1, 5, 6, generator=g) < 0.6
    mask[..., 0] = True
    module = Attention()
    with Tap(module, keep=("v",), dtype=torch.float32) as tap:
        out = module(q, k, mask)
    (call,) = tap.calls
    assert (call.weights(range(5)) @ call.v[0] - out[0]).abs().max() <= 1e-6
    assert not call.weights(range(5))[:, ~mask[0, 0]].any()


def test_it_is_gone_after_an_exception(built):
    pipe = pipeline(built, tiny_models.tiny_sd15)
    with pytest.raises(ZeroDivisionError), tap_of(pipe, 1):
        assert F.scaled_dot_product_attention is not OWN
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is OWN and not pipe.unet._forward_pre_hooks
    with pytest.raises(UserError, match="step 7"), tap_of(pipe, 1, steps=[7]):
        draw(pipe)
    assert F.scaled_dot_product_attention is OWN and not getattr(hooks._here, "stack", ())


def test_two_users_of_one_network_do_not_meet(built):
    network, run = family(built, "published dit")
    taps, seen, gate = {}, {}, threading.Barrier(2, timeout=60)

    def user(name, steps):
        with torch.no_grad():
            with Tap(network, steps=steps) as taps[name]:
                gate.wait()
                seen[name] = [run() for _ in range(2)]
                gate.wait()
                if name == "b":
                    gate.wait()
                    seen[name].append(run())
            if name == "a":  # goes first
                gate.wait()

    threads = [threading.Thread(target=user, args=a) for a in (("a", [0]), ("b", [0, 1, 2]))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [len(taps[n].calls) for n in "ab"] == [2, 6] and [taps[n].passes for n in "ab"] == [2, 3]
    assert torch.equal(seen["a"][0], seen["b"][2]) and F.scaled_dot_product_attention is OWN


def test_another_network_and_a_tap_in_use_are_not_seen(built):
    pipe = pipeline(built, tiny_models.tiny_sd15)
    with tap_of(pipe, 1) as tap:
        pipe.text_encoder(torch.tensor([[1, 2]]))
        assert not tap.calls
        with pytest.raises(UserError, match="in use"), tap:
            pass
        with tap_of(pipe, 1) as inner:
            draw(pipe)
    assert len(tap.calls) == len(inner.calls) > 0


@pytest.mark.parametrize("make", ["tiny_sd15", "tiny_sd3"])
def test_fused_projections_are_seen_alike(built, make):
    pipe = pipeline(built, getattr(tiny_models, make))
    with tap_of(pipe, 1, steps=[0], dtype=torch.float32) as plain:
        draw(pipe)
    network_of(pipe).fuse_qkv_projections()
    with tap_of(pipe, 1, steps=[0], dtype=torch.float32) as fused:
        draw(pipe)
    assert [(c.name, c.kind) for c in plain.calls] == [(c.name, c.kind) for c in fused.calls]
    for a, b in zip(plain.calls, fused.calls):
        assert (a.k - b.k).abs().max() <= 1e-4 * a.k.abs().max()


def test_a_lora_is_seen(built):
    from sdcourse.models.lora import add_lora

    pipe = pipeline(built, tiny_models.tiny_sd15)
    with tap_of(pipe, 1, steps=[0]) as plain:
        draw(pipe)
    add_lora(pipe.unet, rank=2)
    for n, p in pipe.unet.named_parameters():
        if "lora_B" in n:
            p.data.fill_(0.1)
    before = draw(pipe)
    with tap_of(pipe, 1, steps=[0]) as adapted:
        assert torch.equal(draw(pipe), before)
    pairs = list(zip(plain.calls, adapted.calls))
    assert all(a.name == b.name for a, b in pairs) and any((a.k != b.k).any() for a, b in pairs)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rows_are_those_of_the_pictures(built, guidance):
    "Without guidance there is one half, and several pictures of a prompt are several rows."
    pipe = pipeline(built, tiny_models.tiny_sd15)
    options = dict(guidance_scale=guidance, num_images_per_prompt=2)
    with tap_of(pipe, 4, steps=[0], dtype=torch.float32) as tap:
        draw(pipe, 2, **options)
    with Tap(pipe.unet, steps=[0], dtype=torch.float32) as every:
        draw(pipe, 2, **options)
    assert len(tap.calls[0].q) == 4 and len(every.calls[0].q) == (8 if guidance > 1 else 4)
    assert all(torch.equal(a.q, b.q[-4:]) for a, b in zip(tap.calls, every.calls))
    with pytest.raises(UserError, match="rows for 3 pictures"), tap_of(pipe, 3):
        draw(pipe, 2, **options)


def test_our_pipeline_has_the_classes_in_the_first_half():
    pipe = our_dit()
    options = dict(num_inference_steps=1, output_type="latent", guidance_scale=3.0)

    def keys(y, guidance=3.0):
        g = torch.Generator().manual_seed(0)
        with tap_of(pipe, 1, dtype=torch.float32) as tap:
            pipe([y], generator=g, **options | dict(guidance_scale=guidance))
        return tap.calls[-1].k

    assert (keys(1) - keys(1, 1.0)).abs().max() <= 1e-5 and (keys(1) - keys(None)).abs().max() > 1e-3


def test_chosen_steps_and_blocks_bound_the_memory(built):
    pipe = pipeline(built, tiny_models.tiny_sd15)
    with tap_of(pipe, 1, steps=[1], blocks=["mid_block.*attn2"], inputs=True) as tap:
        draw(pipe)
    (call,) = tap.calls
    assert call.step == 1 and call.kind == "cross" and call.v is None and list(tap.inputs) == [1]
    assert tap.bytes() == 2 * (call.q.numel() + call.k.numel())
    assert tap.at(1, "cross") == [call]
    with pytest.raises(UserError, match="step 0, joint, blocks .*; there are steps 1 and kinds cross"):
        tap.at(0, "joint")


def test_compiled_networks_are_refused(built):
    network, run = family(built, "published dit")
    with pytest.raises(UserError, match="is compiled"), Tap(torch.compile(network)):
        pass
    network.transformer_blocks[0].compile()
    with pytest.raises(UserError, match="transformer_blocks.0 is compiled"), Tap(network):
        pass
    assert F.scaled_dot_product_attention is OWN


def test_other_code_of_attention_is_said(built):
    from diffusers.models.attention_processor import AttnProcessor

    pipe = pipeline(built, tiny_models.tiny_sd15)
    pipe.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(UserError, match="called no scaled_dot_product_attention"), tap_of(pipe, 1):
        draw(pipe)
    with pytest.raises(UserError, match="did you mean 'mid_block.attentions.0.transformer_blocks.0.attn2'"):
        tap_of(pipe, 1, blocks=["mid_block.attentions.0.transformer_block.0.attn2"])


def test_what_float16_cannot_hold_is_said():
    call = hooks.Seen(
        "x", 0, "self", torch.full((1, 1, 2, 2), torch.inf).half(), torch.ones(1, 1, 2, 2).half()
    )
    with pytest.raises(UserError, match="x: queries or keys are too large for torch.float16; keep them as"):
        call.weights([0])

"""Models of the true classes with random weights, a few thousand parameters each, saved in the layout of the
published ones (safetensors).

`tiny_vae`, `tiny_sd15`, `tiny_sdxl`, `tiny_sd3`, `tiny_siglip`, `tiny_siglip2`, `tiny_dino`, `tiny_clip`
(folder) -> folder. `large` makes the random weights larger, so that outputs differ clearly between inputs.
"""

import json, tempfile
from pathlib import Path

import sdcourse  # noqa: F401 (before diffusers and transformers)
import torch

WORDS = """
    a red green blue small large photo of the cat dog house tree smiling face with glasses and hat on lake
""".split()


def large(model, factor=8.0, seed=0):
    """Matrices times `factor`, biases and norms moved: with fresh weights every caption gives nearly the same
    vector.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(factor)
            else:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


def tiny_vae(folder, *, seed=0, **config):
    "AutoencoderKL: 4 channels, 4 pixels per latent; a shift, which SD3's VAE has and SD1.5's has not."
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    config = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 32,
        "scaling_factor": 0.7,
        "shift_factor": 0.25,
    } | config
    large(AutoencoderKL(**config), 2.0).save_pretrained(folder)
    return Path(folder)


def clip_tokenizer(folder, *, length=77, legacy=True):
    """A byte-level BPE like CLIP's: 256 bytes, 256 bytes at the end of a word, merges, two specials. Legacy:
    vocab.json and merges.txt, as SD1.5 is published.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    signs = list(bytes_to_unicode().values())
    words, merges = signs + [s + "</w>" for s in signs], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (pair := (parts[0], parts[1])) not in merges:
                merges.append(pair)
            parts[:2] = ["".join(pair)]
    words += list(dict.fromkeys("".join(m) for m in merges)) + ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(folder)
    CLIPTokenizer(
        vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=length
    ).save_pretrained(folder)
    if legacy:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
        )
    return len(words)


def t5_tokenizer(folder):
    "A unigram like T5's: pad 0, end 1, unknown 2."
    from transformers import T5Tokenizer

    pieces = (
        [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
        + [("\u2581" + w, -2.0) for w in WORDS]
        + [(chr(c), -6.0) for c in range(33, 127)]
    )
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(4))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=4)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def clip_text(words, *, width=16, projection=None, length=77, seed=0, eos=None, **config):
    "CLIPTextModel, or with a projection."
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        **{
            "vocab_size": words,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": length,
            "projection_dim": projection or width,
            "bos_token_id": words - 2,
            "eos_token_id": words - 1 if eos is None else eos,
            "pad_token_id": words - 1,
        }
        | config
    )
    return large((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5(words, *, width=24, seed=0):
    "T5EncoderModel, gated as T5 v1.1."
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    return large(
        T5EncoderModel(
            T5Config(
                vocab_size=words + 5,
                d_model=width,
                d_kv=8,
                d_ff=2 * width,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=8,
            )
        ),
        1.5,
    )


def tokenizers(*kinds):
    "Loaded tokenizers."
    from transformers import CLIPTokenizer, T5Tokenizer

    out = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as where:
            (clip_tokenizer if kind == "clip" else t5_tokenizer)(where)
            out.append((CLIPTokenizer if kind == "clip" else T5Tokenizer).from_pretrained(where))
    return out


def _unet(width, **config):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": width,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        | config
    ).eval()


def _vae(folder, **config):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(tiny_vae(Path(folder) / "vae", **config))


def _legacy(folder, *names):
    "Tokenizers as vocab.json and merges.txt."
    for name in names:
        clip_tokenizer(Path(folder) / name)


def tiny_sd15(folder):
    "StableDiffusionPipeline: tokenizer, text_encoder (eos_token_id 2, as published), unet, vae, scheduler."
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    (words,) = tokenizers("clip")
    StableDiffusionPipeline(
        vae=_vae(folder, shift_factor=None),
        text_encoder=clip_text(len(words), eos=2),
        tokenizer=words,
        unet=_unet(16),
        scheduler=DDPMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    _legacy(folder, "tokenizer")
    return Path(folder)


def tiny_sdxl(folder):
    "StableDiffusionXLPipeline: two CLIPs of different width."
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    one, two = tokenizers("clip", "clip")
    unet = _unet(
        16 + 20,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    StableDiffusionXLPipeline(
        vae=_vae(folder, shift_factor=None),
        text_encoder=clip_text(len(one)),
        text_encoder_2=clip_text(len(two), width=20, projection=12, seed=1),
        tokenizer=one,
        tokenizer_2=two,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(folder)
    _legacy(folder, "tokenizer", "tokenizer_2")
    return Path(folder)


def tiny_sd3(folder, *, t5_too=True):
    """StableDiffusion3Pipeline: two CLIPs with projections and a T5 (or none), an MMDiT, a VAE of 16 channels
    with a shift.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    one, two, three = tokenizers("clip", "clip", "t5")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=12 + 20,
        out_channels=16,
        pos_embed_max_size=16,
    ).eval()
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(folder, latent_channels=16),
        text_encoder=clip_text(len(one), projection=12),
        tokenizer=one,
        text_encoder_2=clip_text(len(two), width=24, projection=20, seed=1),
        tokenizer_2=two,
        text_encoder_3=t5(len(three), width=48) if t5_too else None,
        tokenizer_3=three if t5_too else None,
    ).save_pretrained(folder)
    _legacy(folder, "tokenizer", "tokenizer_2")
    return Path(folder)


VIT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=8)


def tiny_siglip(folder, *, whole=True):
    """SiglipModel with text and vision (as google/siglip-… is published), or the vision half alone; 32
    pixels, 16 patches.
    """
    from transformers import (
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(0)
    text = dict(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = (
        SiglipModel(SiglipConfig(text_config=text, vision_config=dict(VIT, image_size=32)))
        if whole
        else SiglipVisionModel(SiglipVisionConfig(**VIT, image_size=32))
    )
    large(model, 2.0).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return Path(folder)


def tiny_siglip2(folder):
    "Siglip2VisionModel (NaFlex): up to 12 patches, as many as the shape of the picture needs."
    from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    large(Siglip2VisionModel(Siglip2VisionConfig(**VIT, num_patches=16)), 2.0).save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=12).save_pretrained(folder)
    return Path(folder)


def tiny_dino(folder, *, registers=0):
    """Dinov2Model, with register tokens if asked; trained at 40 pixels, used at 32 (the published one: 518
    and 224).
    """
    from transformers import (
        BitImageProcessor,
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    torch.manual_seed(0)
    shape = {k: v for k, v in VIT.items() if k != "intermediate_size"} | {"image_size": 40}
    model = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=registers))
        if registers
        else Dinov2Model(Dinov2Config(**shape))
    )
    large(model, 2.0).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True
    ).save_pretrained(folder)
    return Path(folder)


def tiny_clip(folder, *, kind="whole", words=50, length=8):
    "CLIPModel (whole), CLIPVisionModelWithProjection (projection) or CLIPVisionModel (vision)."
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    text = dict(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=12,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    vision = dict(VIT, image_size=32, projection_dim=12)
    model = (
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        if kind == "whole"
        else (CLIPVisionModelWithProjection if kind == "projection" else CLIPVisionModel)(
            CLIPVisionConfig(**vision)
        )
    )
    large(model, 2.0).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return Path(folder)


def thin_sd15(folder):
    "The course's own Stable Diffusion with a quarter of its channels: a step takes a tenth of the time."
    from sdcourse.models.tiny_sd import make_pipeline

    return make_pipeline(folder, width=32, channels=(16, 32))


def _preprocessor(folder, size, name="BlipImageProcessor"):
    steps = dict(
        image_processor_type=name,
        do_resize=True,
        do_normalize=True,
        do_rescale=True,
        do_convert_rgb=True,
        rescale_factor=1 / 255,
        image_mean=[0.48, 0.46, 0.41],
        image_std=[0.27, 0.26, 0.28],
        size={"height": size, "width": size},
        resample=3,
    )
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(steps))


def word_tokenizer(folder, specials, *, template=None, **named):
    "One word, one number; `named` are its special tokens."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*specials, *dict.fromkeys(WORDS)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **named)
    if template:
        found.chat_template = template
    found.save_pretrained(folder)
    return len(words)


def tiny_blip(folder):
    "BLIP with a BERT tokenizer."
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *dict.fromkeys(WORDS)]
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = small | dict(vocab_size=len(words), encoder_hidden_size=16, max_position_embeddings=64)
    text |= dict(bos_token_id=5, sep_token_id=3, pad_token_id=0, eos_token_id=3)
    vision = small | dict(image_size=16, patch_size=8, initializer_range=0.02)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    large(BlipForConditionalGeneration(config)).save_pretrained(folder)
    _preprocessor(folder, 16)
    return Path(folder)


def tiny_blip2(folder, *, text="t5", image_token=True, queries=4):
    "BLIP-2 with a T5 or an OPT; without image_token, as it was saved by older versions."
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    special = ["<pad>", "</s>", "<unk>"] + ["<image>"] * image_token
    words = word_tokenizer(folder, special, pad_token="<pad>", eos_token="</s>")
    if text == "t5":
        said = dict(
            model_type="t5", vocab_size=words + 2, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
        )
        said |= dict(num_decoder_layers=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    else:
        said = dict(model_type="opt", vocab_size=words + 2, hidden_size=16, ffn_dim=32, num_hidden_layers=2)
        said |= dict(num_attention_heads=2, max_position_embeddings=128, word_embed_proj_dim=16)
        said |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
    config = Blip2Config(
        vision_config=small | dict(image_size=16, patch_size=8, initializer_range=0.02),
        qformer_config=small | dict(encoder_hidden_size=16, vocab_size=30),
        text_config=said,
        num_query_tokens=queries,
        image_token_index=3 if image_token else None,
    )
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        model.query_tokens.normal_()
    large(model).save_pretrained(folder)
    _preprocessor(folder, 16)
    return Path(folder)


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_llama(folder, *, template=CHAT):
    "A Llama with a chat template and without a token for padding, as it is published."
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    special = ["<unk>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = word_tokenizer(folder, special, template=template, bos_token="<s>", eos_token="<|end|>")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(
        vocab_size=words, bos_token_id=1, eos_token_id=2, max_position_embeddings=1024, **small
    )
    large(LlamaForCausalLM(config), 3.0).save_pretrained(folder)
    return Path(folder)

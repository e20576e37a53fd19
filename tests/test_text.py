"""Prompts against encode_prompt of the pipelines, on tiny models of the true classes."""

import json, logging, shutil

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from test_encoders import edit, equal, nudge, rewrite

from sdcourse.cache.encoder import bad_rows, finite
from sdcourse.cache.encoders import open_encoder
from sdcourse.cache.text import Prompts, sd3_prompt, sdxl_prompt
from sdcourse.core import UserError
from sdcourse.models.files import DTYPES

CAPTIONS = [
    "a red cat",
    "",
    "A photo of the large dog, with glasses and a hat!",
    "smiling face",
    "naïve 東京 🙂",
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    for name in ("sd15", "sdxl", "sd3"):
        getattr(tiny, f"tiny_{name}")(base / name)
    tiny.tiny_sd3(base / "sd3_clips", t5_too=False)
    return base


def pipeline(folder, dtype=torch.float32, **parts):
    "The pipeline itself, its encoders frozen."
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **parts)
    for m in pipe.components.values():
        if isinstance(m, torch.nn.Module):
            m.eval().requires_grad_(False)
    return pipe


PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


# ---- the pipelines
@PRECISIONS
def test_sd15(zoo, precision):
    want, negative = pipeline(zoo / "sd15", DTYPES[precision]).encode_prompt(CAPTIONS, "cpu", 1, True)
    out = Prompts(zoo / "sd15", precision=precision).encode(CAPTIONS)
    assert torch.equal(out["text_encoder.hidden"], want.float()) and torch.equal(
        out["text_encoder.hidden"][1], negative[0].float()
    )
    assert (
        out["text_encoder.hidden"].shape == (5, 77, 16)
        and (out["text_encoder.hidden"][0] - out["text_encoder.hidden"][1]).abs().mean() > 0.1
    )


@PRECISIONS
def test_sdxl(zoo, precision):
    with torch.no_grad():
        want, _, pooled, _ = pipeline(zoo / "sdxl", DTYPES[precision]).encode_prompt(
            CAPTIONS, device="cpu", do_classifier_free_guidance=False
        )
    columns = Prompts(zoo / "sdxl", precision=precision).encode(CAPTIONS)
    hidden, vector = sdxl_prompt(columns)
    assert torch.equal(hidden, want.float()) and torch.equal(vector, pooled.float())
    assert hidden.shape == (5, 77, 36) and vector.shape == (5, 12)
    second = {k: v for k, v in columns.items() if k.startswith("text_encoder_2")}
    assert torch.equal(sdxl_prompt(second)[0], hidden[..., 16:])  # the refiner has the second one only
    with pytest.raises(UserError, match="no column text_encoder_2.hidden: there are text_encoder.hidden"):
        sdxl_prompt({"text_encoder.hidden": hidden})


@PRECISIONS
@pytest.mark.parametrize("length", [256, 77])
def test_sd3(zoo, precision, length):
    with torch.no_grad():
        want, _, pooled, _ = pipeline(zoo / "sd3", DTYPES[precision]).encode_prompt(
            CAPTIONS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
        )
    columns = Prompts(zoo / "sd3", precision=precision, t5_length=length).encode(CAPTIONS)
    hidden, vector = sd3_prompt(columns)
    assert torch.equal(hidden, want.float()) and torch.equal(vector, pooled.float())
    assert hidden.shape == (5, 77 + length, 48) and vector.shape == (5, 32) and not hidden[:, :77, 40:].any()


def test_sd3_without_t5(zoo):
    with torch.no_grad():
        want, _, pooled, _ = pipeline(zoo / "sd3_clips", text_encoder_3=None, tokenizer_3=None).encode_prompt(
            CAPTIONS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=20
        )
    columns = Prompts(zoo / "sd3_clips").encode(CAPTIONS)
    hidden, vector = sd3_prompt(columns, t5_length=20, width=48)
    assert torch.equal(hidden, want) and torch.equal(vector, pooled)
    equal(Prompts(zoo / "sd3", only=("text_encoder", "text_encoder_2")).encode(CAPTIONS), columns)
    with pytest.raises(UserError, match="no column text_encoder_2.hidden"):
        sd3_prompt({k: v for k, v in columns.items() if k.startswith("text_encoder.")})


# ---- columns
def test_columns_of_each_class(zoo):
    from transformers import CLIPTextModel, CLIPTokenizer

    out = Prompts(zoo / "sd15").encode(CAPTIONS)
    assert list(out) == ["text_encoder.hidden", "text_encoder.mask", "text_encoder.pooled"]
    assert list(Prompts(zoo / "sd3").encode(CAPTIONS))[-2:] == [
        "text_encoder_3.hidden",
        "text_encoder_3.mask",
    ]
    ids = CLIPTokenizer.from_pretrained(zoo / "sd15/tokenizer")(
        CAPTIONS, padding="max_length", return_tensors="pt"
    )
    model = CLIPTextModel.from_pretrained(zoo / "sd15/text_encoder").eval().requires_grad_(False)
    found = model(ids.input_ids)
    assert torch.equal(out["text_encoder.pooled"], found.pooler_output) and torch.equal(
        out["text_encoder.mask"], ids.attention_mask.bool()
    )
    assert out["text_encoder.mask"].sum(1)[:2].tolist() == [5, 2]  # begin, a, red, cat, end | begin, end
    assert torch.equal(
        out["text_encoder.pooled"],
        out["text_encoder.hidden"][torch.arange(5), out["text_encoder.mask"].sum(1) - 1],
    )  # at the first end sign


def test_facts(zoo):
    facts = Prompts(zoo / "sd3", t5_length=40).facts["encoders"]
    assert {n: (f["length"], f["width"], f["layer"], f["pooled"]) for n, f in facts.items()} == {
        "text_encoder": (77, 16, "penultimate", 12),
        "text_encoder_2": (77, 24, "penultimate", 20),
        "text_encoder_3": (40, 48, "last", None),
    }
    assert Prompts(zoo / "sd15").facts["encoders"]["text_encoder"]["layer"] == "last"


def test_a_list_of_folders(zoo):
    "Any set: a CLIP of one pipeline with the T5 of another."
    mixed = Prompts(
        [
            (zoo / "sd15/tokenizer", zoo / "sd15/text_encoder"),
            (zoo / "sd3/tokenizer_3", zoo / "sd3/text_encoder_3"),
        ]
    )
    clip, three = Prompts(zoo / "sd15").encode(CAPTIONS), Prompts(zoo / "sd3").encode(CAPTIONS)
    out = mixed.encode(CAPTIONS)
    equal(out, clip | {n.replace("_3", "_2"): t for n, t in three.items() if "_3" in n})
    deep = Prompts([(zoo / "sd15/tokenizer", zoo / "sd15/text_encoder")], layer="penultimate").encode(
        CAPTIONS
    )["text_encoder.hidden"]
    model = mixed.parts["text_encoder"][1]
    with torch.no_grad():
        last = model.final_layer_norm(
            model.encoder.layers[-1](deep, attention_mask=torch.full((77, 77), -1e9).triu(1)[None, None])
        )
    assert (
        last - clip["text_encoder.hidden"]
    ).abs().max() < 1e-4  # one block and the norm lie between the two


def test_whole_models_give_their_text_half(zoo, tmp_path):
    "A CLIPModel, a T5 with its decoder, and a UMT5, each with its tokenizer beside it."
    from transformers import (
        CLIPModel,
        CLIPTokenizer,
        T5Config,
        T5ForConditionalGeneration,
        T5Tokenizer,
        UMT5Config,
        UMT5EncoderModel,
    )

    words, pieces = tiny.clip_tokenizer(tmp_path / "clip", length=20), tiny.t5_tokenizer(tmp_path / "t5")
    tiny.t5_tokenizer(tmp_path / "umt5")
    tiny.tiny_clip(tmp_path / "clip", words=words, length=20)
    sizes = dict(
        vocab_size=pieces,
        d_model=24,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    tiny.large(T5ForConditionalGeneration(T5Config(**sizes)), 1.5).save_pretrained(tmp_path / "t5")
    tiny.large(UMT5EncoderModel(UMT5Config(**sizes)), 1.5).save_pretrained(tmp_path / "umt5")
    out = Prompts([(tmp_path / n, tmp_path / n) for n in ("clip", "t5", "umt5")], t5_length=30).encode(
        CAPTIONS
    )
    ids = lambda cls, name, n: (
        cls.from_pretrained(tmp_path / name)(
            CAPTIONS, padding="max_length", max_length=n, truncation=True, return_tensors="pt"
        ).input_ids
    )
    half = lambda cls, name: cls.from_pretrained(tmp_path / name).eval().requires_grad_(False)
    clip = half(CLIPModel, "clip")
    found = clip.text_model(ids(CLIPTokenizer, "clip", 20))
    assert torch.equal(out["text_encoder.hidden"], found.last_hidden_state) and torch.equal(
        out["text_encoder.pooled"], clip.text_projection(found.pooler_output)
    )
    assert torch.equal(
        out["text_encoder_2.hidden"],
        half(T5ForConditionalGeneration, "t5").encoder(ids(T5Tokenizer, "t5", 30)).last_hidden_state,
    )
    assert torch.equal(
        out["text_encoder_3.hidden"],
        half(UMT5EncoderModel, "umt5")(ids(T5Tokenizer, "umt5", 30)).last_hidden_state,
    )


def test_a_list_holds_pairs(zoo):
    with pytest.raises(UserError, match="expected pairs"):
        Prompts([zoo / "sd15/text_encoder"])


def test_the_mask_is_used_where_the_config_says_so(zoo, tmp_path):
    shutil.copytree(zoo / "sd15", tmp_path / "m")
    edit(tmp_path / "m/text_encoder/config.json", use_attention_mask=True)
    out = Prompts(tmp_path / "m").encode(CAPTIONS)["text_encoder.hidden"]
    assert torch.equal(out, pipeline(tmp_path / "m").encode_prompt(CAPTIONS, "cpu", 1, False)[0])
    plain = Prompts(zoo / "sd15").encode(CAPTIONS)
    assert (
        not torch.equal(out, plain["text_encoder.hidden"])
        and Prompts(tmp_path / "m").key["encoders"]["text_encoder"]["masked"]
    )


def test_long_captions_are_cut_and_counted(zoo, caplog):
    enc, long = Prompts(zoo / "sd3", t5_length=20), "red cat " * 50
    with caplog.at_level(logging.WARNING, "sdcourse"):
        out = enc.encode([long, "a cat", long])
        enc.encode([long])
    assert (
        enc.cut == {"text_encoder": 3, "text_encoder_2": 3, "text_encoder_3": 3} and len(caplog.records) == 3
    )
    assert (
        out["text_encoder.hidden"].shape[1] == 77
        and out["text_encoder_3.hidden"].shape[1] == 20
        and out["text_encoder.mask"][0].all()
    )
    assert torch.equal(out["text_encoder.hidden"][0], enc.encode([long[:340]])["text_encoder.hidden"][0])
    fits = Prompts(zoo / "sd15")
    fits.encode(["cat " * 75])  # 75 and two signs: just fits
    assert fits.cut == {"text_encoder": 0}
    fits.encode(["cat " * 76])
    assert fits.cut == {"text_encoder": 1}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_neighbours_do_not_matter(zoo, name):
    enc = Prompts(zoo / name)
    whole, alone = enc.encode(CAPTIONS), [enc.encode([c]) for c in CAPTIONS]
    for n, t in whole.items():
        assert (t.float() - torch.cat([a[n] for a in alone]).float()).abs().max() <= 1e-5 * max(
            1, t.float().abs().max()
        )


@pytest.mark.parametrize("batch", ["a cat", ["a cat", None], [b"cat"]])
def test_captions_are_text(zoo, batch):
    with pytest.raises(UserError, match="expected a list of captions"):
        Prompts(zoo / "sd15").encode(batch)


# ---- float16
@pytest.fixture
def loud(zoo, tmp_path):
    "An SD3 whose T5 leaves float16 in its first attention."
    shutil.copytree(zoo / "sd3", tmp_path / "loud")

    def change(w):
        for n in ("v", "o"):
            w[f"encoder.block.0.layer.0.SelfAttention.{n}.weight"] *= 2e3

    rewrite(tmp_path / "loud/text_encoder_3", change)
    return tmp_path / "loud"


def test_a_clipped_t5_is_noticed(loud):
    "transformers clips what overflows in a float16 T5, and the result is finite and wrong."
    with torch.no_grad():
        silent = pipeline(loud, torch.float16).encode_prompt(
            CAPTIONS, None, None, device="cpu", do_classifier_free_guidance=False
        )[0]
    assert silent.isfinite().all()
    enc = Prompts(loud, precision="fp16", only=("text_encoder_3",))
    assert bad_rows(enc.encode(CAPTIONS)).any()
    dtypes = [p.dtype for p in enc.models[0].parameters()]
    assert torch.float32 in dtypes  # transformers keeps some matrices of a T5 in float32
    first, again = (finite(enc, CAPTIONS, CAPTIONS) for _ in range(2))
    equal(first, again)
    assert dtypes == [p.dtype for p in enc.models[0].parameters()] and enc.retried > 0
    assert max(enc.cut.values()) == 0
    full = Prompts(loud, only=("text_encoder_3",)).encode(CAPTIONS)["text_encoder_3.hidden"]
    worst = (silent[:, 77:].float() - full).abs().max(), (first["text_encoder_3.hidden"] - full).abs().max()
    assert worst[1] < 0.05 * worst[0]


def test_cut_captions_are_counted_once_when_done_twice(loud):
    enc = Prompts(loud, precision="fp16", t5_length=5)
    finite(enc, CAPTIONS, CAPTIONS)
    assert enc.retried > 0 and enc.cut["text_encoder_3"] == sum(
        len(i) > 5 for i in enc.parts["text_encoder_3"][0](CAPTIONS).input_ids
    )


# ---- the key
@pytest.mark.parametrize(
    "what",
    ["nothing", "moved", "weights", "precision", "layer", "length", "tokenizer", "config", "only", "unused"],
)
def test_the_key_knows_what_decides(zoo, tmp_path, what):
    shutil.copytree(zoo / "sd3", tmp_path / "m")
    where, options = tmp_path / "m", {}
    key = Prompts(where).key
    if what == "moved":
        where = where.rename(tmp_path / "elsewhere")
    if what == "weights":
        nudge(where / "text_encoder_2")
    if what == "precision":
        options = {"precision": "fp16"}
    if what == "layer":
        options = {"layer": "last"}
    if what == "length":
        options = {"t5_length": 77}
    if what == "tokenizer":
        edit(where / "tokenizer_2/tokenizer_config.json", pad_token="!")
    if what == "config":
        edit(where / "text_encoder/config.json", hidden_act="gelu")
    if what == "only":
        options = {"only": ("text_encoder",)}
    if what == "unused":
        nudge(where / "transformer", "diffusion_pytorch_model.safetensors")  # no encoder
    changed = open_encoder("prompts", where, **options).key
    assert (changed == key) == (what in ("nothing", "moved", "unused")) and changed == json.loads(
        json.dumps(changed)
    )


# ---- where they come from
def test_weights_with_published_names(zoo, tmp_path):
    "Published CLIPs have text_model. before each name, and SD1.5 has position_ids too."
    for name, source in (("sd15", "text_encoder"), ("sdxl", "text_encoder_2")):
        shutil.copytree(zoo / name, tmp_path / name)
        file = tmp_path / name / source / "model.safetensors"
        w = {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
        w = {k if k.startswith("text_projection") else f"text_model.{k}": v for k, v in w.items()} | {
            "text_model.embeddings.position_ids": torch.arange(77)[None]
        }
        save_file(w, file, {"format": "pt"})
        equal(Prompts(tmp_path / name).encode(CAPTIONS), Prompts(zoo / name).encode(CAPTIONS))


def test_t5_in_shards(zoo, tmp_path):
    from transformers import T5EncoderModel

    shutil.copytree(zoo / "sd3", tmp_path / "m")
    where = tmp_path / "m/text_encoder_3"
    (where / "model.safetensors").unlink()
    T5EncoderModel.from_pretrained(zoo / "sd3/text_encoder_3").save_pretrained(where, max_shard_size="40KB")
    assert (where / "model.safetensors.index.json").is_file()
    equal(Prompts(tmp_path / "m").encode(CAPTIONS), Prompts(zoo / "sd3").encode(CAPTIONS))


@pytest.mark.parametrize(
    "break_it, text",
    [
        (
            lambda m: shutil.rmtree(m / "text_encoder_3"),
            r"text_encoder_3: no such folder; the pipeline names it: fetch it, or leave it out",
        ),
        (
            lambda m: shutil.rmtree(m / "tokenizer_2"),
            r"tokenizer_2: no tokenizer.json and no vocab.json \+ merges.txt",
        ),
        (
            lambda m: (m / "tokenizer/merges.txt").unlink(),
            r"tokenizer: no tokenizer.json and no vocab.json \+ merges.txt",
        ),
        (
            lambda m: (m / "tokenizer_3/tokenizer.json").unlink(),
            r"tokenizer_3: no tokenizer.json and no spiece.model",
        ),
        (
            lambda m: (m / "text_encoder/model.safetensors").rename(m / "text_encoder/pytorch_model.bin"),
            "pytorch_model.bin is a pickle",
        ),
        (lambda m: (m / "tokenizer/vocab.json").write_text("{"), "cannot be loaded as CLIPTokenizer"),
        (
            lambda m: (m / "tokenizer/vocab.json").write_text(
                json.dumps(json.loads((m / "tokenizer/vocab.json").read_text()) | {"extra": 9999})
            ),
            "has more words than",
        ),
        (
            lambda m: rewrite(m / "text_encoder_2", lambda w: w.pop("text_projection.weight")),
            "1 weights of CLIPTextModelWithProjection are not in its files, "
            "the first is text_projection.weight",
        ),
    ],
)
def test_a_broken_pipeline_is_refused(zoo, tmp_path, break_it, text):
    shutil.copytree(zoo / "sd3", tmp_path / "m")
    break_it(tmp_path / "m")
    with pytest.raises(UserError, match=text) as e:
        Prompts(tmp_path / "m")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(layer="first"), "give auto, last or penultimate"),
        (dict(t5_length=1), "give 2 or more"),
        (dict(only=("text_encoder_4",)), "no text_encoder_4: did you mean"),
        (dict(only="text_encoder_4"), "no text_encoder_4: did you mean"),
    ],
)
def test_wrong_options_are_refused(zoo, options, text):
    with pytest.raises(UserError, match=text):
        Prompts(zoo / "sd3", **options)


# ---- true sizes, without memory
def clip_config(width, layers, heads, projection):
    return dict(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        max_position_embeddings=77,
    )


def test_true_sizes(zoo):
    "CLIP-L, bigG and T5-XXL on the meta device: what the SD3 and the SDXL model take."
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    enc = Prompts(zoo / "sd3")
    with torch.device("meta"):
        models = [
            CLIPTextModelWithProjection(CLIPTextConfig(**clip_config(768, 12, 12, 768))),
            CLIPTextModelWithProjection(CLIPTextConfig(**clip_config(1280, 32, 20, 1280))),
            T5EncoderModel(
                T5Config(
                    vocab_size=32128,
                    d_model=4096,
                    d_kv=64,
                    d_ff=10240,
                    num_layers=24,
                    num_heads=64,
                    feed_forward_proj="gated-gelu",
                )
            ),
        ]
    enc.parts = {n: (t, m, how) for (n, (t, _, how)), m in zip(enc.parts.items(), models)}
    enc.device = torch.device("meta")
    with torch.no_grad():
        columns = enc.run(["a cat"])
    assert [t.shape for t in sd3_prompt(columns)] == [(1, 333, 4096), (1, 2048)]
    assert [t.shape for t in sdxl_prompt(columns)] == [(1, 77, 2048), (1, 1280)]
    assert 4.7e9 < sum(p.numel() for p in models[2].parameters()) < 4.8e9

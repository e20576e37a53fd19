"""Maps of words and concepts, and affinities: each against its definition written out."""

import time

import pytest
import tiny_models
import torch

from sdcourse.attention import maps
from sdcourse.attention.hooks import Seen, network_of, tap_of
from sdcourse.attention.maps import (
    AFFINITIES,
    Field,
    call_maps,
    concept_maps,
    ends_apart,
    grid_of,
    occurrences,
    prompt_tokens,
    text_of,
    token_maps,
    word_map,
)
from sdcourse.core import UserError
from test_hooks import PROMPT, draw, pipeline

SEEN = "a glowing cat, a Cat"


def seen(kind="cross", *, n=16, m=5, pictures=1, heads=2, d=4, seed=0, **more):
    "A call with random numbers."
    g = torch.Generator().manual_seed(seed)
    shape = dict(q=n, k=m, v=m, out=n)
    made = {x: torch.randn(pictures, heads, size, d, generator=g) for x, size in shape.items()}
    return Seen("x", 0, kind, **made, scale=0.5, **more)


@pytest.fixture(scope="module")
def tokenizers():
    return dict(zip(("clip", "t5"), tiny_models.tokenizers("clip", "t5")))


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_word_is_all_of_its_tokens_and_occurrences_stay_apart(tokenizers, kind):
    tokens = prompt_tokens(tokenizers[kind], SEEN, 77)
    assert len(tokens) == 77
    glowing, cats = occurrences(tokens, SEEN, "glowing"), occurrences(tokens, SEEN, "cat")
    assert len(glowing) == 1 and len(glowing[0]) > 1 and len(cats) == 2
    at = [tokens[i] for i in glowing[0]]
    assert SEEN[min(t.start for t in at) : max(t.end for t in at)].strip() == "glowing"
    assert max(cats[0]) < min(cats[1]) and not set(cats[0]) & set(glowing[0])
    kinds = [t.kind for t in tokens]
    words = kinds.count("word")
    begin = ["begin"] * (kind == "clip")
    assert kinds == begin + ["word"] * words + ["end"] + ["padding"] * (76 - words - len(begin))


def test_words_that_are_not_there_name_the_nearest(tokenizers):
    tokens = prompt_tokens(tokenizers["clip"], SEEN)
    with pytest.raises(UserError, match="'glow': is not in the prompt; there are glowing"):
        occurrences(tokens, SEEN, "glow")
    with pytest.raises(UserError, match="empty word"):
        occurrences(tokens, SEEN, " ")
    long = "a " * 80 + "cat"
    with pytest.raises(UserError, match="'cat': stands behind the 75 tokens"):
        occurrences(prompt_tokens(tokenizers["clip"], long), long, "cat")
    assert occurrences(prompt_tokens(tokenizers["clip"], "a 🐈 cat"), "a 🐈 cat", "cat")[0]


def test_a_mean_of_heads_layers_and_steps():
    calls = [seen(seed=0), seen(seed=1), seen(n=4, seed=2)]
    found = token_maps(calls, 5)
    assert found.shape == (5, 4, 4) and torch.allclose(found.sum(0), torch.ones(4, 4), atol=1e-5)
    fine = [c.weights(range(16)).mean(0).mT.unflatten(1, (4, 4)) for c in calls[:2]]
    coarse = calls[2].weights(range(4)).mean(0).mT.unflatten(1, (2, 2))[None]
    coarse = torch.nn.functional.interpolate(coarse, (4, 4), mode="bilinear")[0]
    assert torch.allclose(found, (fine[0] + fine[1] + coarse) / 3, atol=1e-6)
    one = token_maps(calls[:1], 5, heads=[1])
    assert torch.allclose(one, calls[0].weights(range(16))[1].mT.unflatten(1, (4, 4)), atol=1e-6)
    assert torch.allclose(word_map(found, [1, 3]), (found[1] + found[3]) / 2)
    with pytest.raises(UserError, match="head 2: this layer has heads 0 to 1"):
        token_maps(calls[:1], 5, heads=[2])


def test_text_stands_behind_the_patches_of_a_joint_attention():
    call = seen("joint", n=21, m=21)
    whole = call.weights(range(21))
    assert torch.allclose(call_maps(call, 5), whole[:, :16, 16:].mT, atol=1e-6)
    assert torch.allclose(call_maps(call, 5, rows=[4]), whole[:, :16, 20:].mT, atol=1e-6)
    for wrong in (seen("self", n=16, m=16), seen(m=6)):
        with pytest.raises(UserError, match="do not look at 5 rows of text"):
            call_maps(wrong, 5)


def test_ends_and_padding_are_apart(tokenizers):
    tokens = prompt_tokens(tokenizers["clip"], "a cat", 6)
    each = torch.arange(6.0)[:, None, None].expand(6, 2, 2)
    assert {k: v[0, 0].item() for k, v in ends_apart(each, tokens).items()} == {
        "begin": 0,
        "end": 3,
        "padding": 9,
    }


def test_grids():
    assert grid_of(64) == (8, 8) and grid_of(6 * 9, (2, 3)) == (6, 9) and grid_of(15, (512, 832)) == (3, 5)
    with pytest.raises(UserError, match="17 patches fill no grid of 1 to 1"):
        grid_of(17)


@pytest.mark.parametrize("make", ["tiny_sd15", "tiny_sdxl", "tiny_sd3"])
def test_concepts_are_seen_by_nobody(built, make):
    "What the network gives is what it gave."
    pipe = pipeline(built, getattr(tiny_models, make))
    with tap_of(pipe, 1, steps=[1], inputs=True) as tap:
        draw(pipe)
    args, kwargs = tap.inputs[1]
    with torch.no_grad():
        was = network_of(pipe)(*args, **kwargs)[0]
    found, now = concept_maps(pipe, tap, 1, ["dog", "smiling face"])
    assert list(found) == ["dog", "smiling face"] and (now - was).abs().max() <= 1e-4 * was.abs().max()
    assert all(m.ndim == 2 and 0 < m.min() <= m.max() < 1 for m in found.values())
    assert (found["dog"] - found["smiling face"]).abs().max() > 1e-5
    with pytest.raises(UserError, match="step 0: its inputs were not kept"):
        concept_maps(pipe, tap, 0, ["dog"])


def test_a_concept_gets_what_an_equal_word_gets(built, monkeypatch):
    "A weight w among the words is w / (1 + w) beside an equal word."
    pipe = pipeline(built, tiny_models.tiny_sd15)
    with tap_of(pipe, 1, steps=[1], inputs=True, blocks=["mid_block*attn2"]) as tap:
        draw(pipe)
    embeds = tap.inputs[1][1]["encoder_hidden_states"]
    monkeypatch.setattr(maps, "concept_rows", lambda *_: embeds[-1, [3]])
    found, _ = concept_maps(pipe, tap, 1, ["red"], blocks=["mid_block*attn2"])
    w = call_maps(tap.calls[0], 77, rows=[3])
    assert torch.allclose(found["red"].flatten(), (w / (1 + w)).mean((0, 1)), rtol=1e-2)


def test_the_five_affinities_of_two_pictures(tokenizers):
    tokens = prompt_tokens(tokenizers["clip"], "a cat", 6)
    call = seen("joint", n=4 + 6, m=4 + 6, pictures=3)
    field = Field([call, call], [tokens, tokens], pictures=(0, 2))
    places = [0, 1, 2, 3, 4, 5, 6, 7]  # patches, then begin, two words and end; no padding
    assert [(n.picture, n.patch, n.text) for n in field.nodes[:5]] == [(0, i, -1) for i in range(4)] + [
        (0, -1, 0)
    ]
    assert len(field.nodes) == 16

    def both(x):
        return torch.cat([x[p][:, places] for p in (0, 2)], 1)

    weight = (both(call.q) @ both(call.k).mT * call.scale).softmax(-1).mean(0)
    assert torch.allclose(field.matrix("weight"), weight, atol=1e-5)
    for kind, (name,) in {k: v for k, v in AFFINITIES.items() if k != "weight"}.items():
        x = both(getattr(call, name)).transpose(0, 1).flatten(1)
        direct = (1 + torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)) / 2
        assert torch.allclose(field.matrix(kind), direct, atol=1e-5), kind
        assert torch.allclose(field.rows([9], kind), direct[9:10], atol=1e-5)
        assert field.features(kind).shape == (16, 2 * 8)


def test_clicks(tokenizers):
    tokens = prompt_tokens(tokenizers["clip"], "a cat", 6)
    field = Field([seen("joint", n=4 + 6, m=4 + 6, pictures=2)], [tokens, tokens], pictures=(0, 1))
    assert field.node(1, at=(0.9, 0.1)) == 8 + 2 and field.node(0, row=1) == 5
    for click, says in (
        (dict(at=(1.0, 0.5)), "outside; click inside the picture"),
        (dict(row=5), "padding, or of another picture"),
    ):
        with pytest.raises(UserError, match=says):
            field.node(0, **click)
    for which in ([16], [-1]):
        with pytest.raises(UserError, match="there are 0 to 15"):
            field.rows(which)


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (
            lambda: Field([seen("self", m=16)], [], pictures=(0, 1, 2, 3)),
            "4 pictures in one affinity: give 1 to 3",
        ),
        (lambda: Field([seen("self", m=16), seen("self", n=4, m=4)], []), r"layers of \[4, 16\] patches"),
        (lambda: Field([seen()], []), "choose blocks of self-attention"),
        (
            lambda: Field([seen("self", m=16)], []).rows([0], "weights"),
            "affinity 'weights': give one of weight, query",
        ),
        (lambda: Field([seen("self", m=16)], []).features("weight"), "weights are no features"),
        (
            lambda: Field([Seen("x", 0, "self", *[torch.ones(1, 1, 4, 2)] * 2)], []).rows([0], "value"),
            "v was not kept",
        ),
    ],
)
def test_what_has_no_affinity_is_one_line(work, says):
    with pytest.raises(UserError, match=says):
        work()


def test_a_row_of_three_pictures_is_there_at_once():
    "1,024 patches each; the second click has what the first one made."
    field = Field([seen("self", n=1024, m=1024, pictures=3, heads=8, d=40)], [], pictures=(0, 1, 2))
    field.rows([0])
    times = []
    for i in range(5):
        begin = time.process_time()
        field.rows([i])
        times.append(time.process_time() - begin)
    assert min(times) <= 0.1


def test_text_of_each_family(built):
    lengths = dict(tiny_sd15=77, tiny_sdxl=77, tiny_sd3=77 + 256)
    for make, length in lengths.items():
        pipe = pipeline(built, getattr(tiny_models, make))
        tokens = text_of(pipe, PROMPT)
        assert len(tokens) == length
        assert len(occurrences(tokens, PROMPT, "cat")[0]) == 1 + (make == "tiny_sd3")
        with tap_of(pipe, 1, steps=[0]) as tap:
            draw(pipe)
        calls = [c for c in tap.calls if c.kind != "self"]
        assert calls and torch.isfinite(token_maps(calls, length)).all()

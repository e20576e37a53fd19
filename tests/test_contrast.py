"""CLIP and SigLIP on the small worlds: what they learn, on one rank and on two, and what is left."""

import json

import pytest
import torch

import ranks as processes
from sdcourse import guard  # noqa: F401
from sdcourse.config import resolve
from sdcourse.core import UserError
from sdcourse.data.sets import captioned as worlds
from sdcourse.data.sets.faces import IN_WORDS, face_captions
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint
from sdcourse.engine.loop import train
from sdcourse.engine.order import Draws
from sdcourse.train import contrast

SMALL = dict(
    share=0.001, width=64, layers=(1, 1), words=200, warmup_steps=0, lr_schedule="constant", ema_decay=0.0
)
FEW = dict(validate_every=0, checkpoint_every=0, threads=1)


@pytest.fixture(autouse=True)
def eight_scenes(monkeypatch):
    monkeypatch.setattr(worlds, "SHARES", {"scenes": (8, 8)})
    monkeypatch.setattr(contrast, "SHARES", worlds.SHARES)


def task(out, **over):
    return contrast.Task(resolve(contrast.Config, overrides=SMALL | FEW | dict(out=str(out)) | over))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_eight_pictures_find_their_captions(tmp_path, kind):
    "O13: overfits eight samples; the loss is measured with the draws of a validation, before and after."
    t = task(tmp_path / "run", kind=kind, batch_size=8, max_steps=200, lr=2e-3, words=400)
    batch = t.dataset("train").__getitems__(range(8))
    draws = Draws(0, 0, range(8), scope="validate")
    before = t.build().eval()(batch, draws)[0].mean().item()
    train(t)
    after = t.build().eval()
    found = load_checkpoint(latest_checkpoint(tmp_path / "run/checkpoints")[0])["tensors"]["model"]
    missing, extra = after.load_state_dict(found, strict=False)
    assert not extra and not [k for k in missing if "position_ids" not in k]
    assert after(batch, draws)[0].mean().item() <= 0.1 * before


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_ranks_compare_with_all_pictures_of_the_batch(tmp_path, kind):
    "The same weights as one rank, bit by bit but for the order of sums (float64)."
    same = SMALL | FEW | dict(kind=kind, batch_size=8, max_steps=3, lr=1e-3, precision="fp64")
    train(task(tmp_path / "one", **same))
    hook = f"""
import sdcourse.guard
from sdcourse.config import resolve
from sdcourse.data.sets import captioned as worlds
from sdcourse.data.sets.faces import IN_WORDS, face_captions
worlds.SHARES = {{"scenes": (8, 8)}}
from sdcourse.train import contrast
cfg = resolve(contrast.Config, overrides=dict(out=str(over.pop("out")), **{same!r}))
toy.run = lambda out: loop.train(contrast.Task(cfg))
"""
    out = tmp_path / "two"
    ranks = processes.start([str(processes.SCRIPT), str(out), f"out={str(out)!r}", f"hook={hook!r}"], 2)
    for code, _, err in processes.finish(ranks):
        assert code == 0, err[-3000:]
    one, two = (
        load_checkpoint(latest_checkpoint(tmp_path / k / "checkpoints")[0])["tensors"]["model"]
        for k in ("one", "two")
    )
    assert max((one[k] - two[k]).abs().max().item() for k in one) <= 1e-9


def test_a_caption_that_two_pictures_share_is_no_mistake():
    """The loss is that of the pictures that can be told apart: with one caption for both there is nothing to
    pick, with two there is.
    """
    torch.manual_seed(0)
    tokens = torch.tensor([[[5, 6]], [[5, 6]], [[7, 8]]])
    batch = dict(
        pixels=torch.randint(0, 255, (3, 3, 8, 8), dtype=torch.uint8),
        tokens=tokens,
        captions=torch.ones(3),
        wrong=tokens,
        wrongs=torch.zeros(3),
    )

    class Net(torch.nn.Module):
        logit_scale = torch.tensor(1.0)
        logit_bias = torch.tensor(0.0)

        def forward(self, input_ids, pixel_values):
            text = torch.nn.functional.one_hot(input_ids[:, 0] - 5, 3).double()
            image = torch.ones(len(pixel_values), 3, dtype=torch.double)
            return type("Seen", (), dict(image_embeds=image, text_embeds=text))

    draws = Draws(0, 0, range(3), dtype=torch.float64, scope="validate")
    loss, _ = contrast.Contrast(Net(), "clip").eval()(batch, draws)
    log = torch.tensor(
        [2.0, 3.0], dtype=torch.double
    ).log()  # of the choices: two captions, three for the last
    assert torch.allclose(loss, log[[0, 0, 1]], atol=1e-9)
    module = contrast.Contrast(Net(), "clip")
    some, tempting = module.tempting(batch | dict(wrongs=torch.tensor([0, 0, 1])), draws)
    assert some.tolist() == [False, False, True] and tempting.tolist() == [[7, 8]]
    # one caption more, which fits as well as all others do, for the last picture only
    batch["wrongs"][2] = 1
    loss, _ = contrast.Contrast(Net(), "clip").eval()(batch, draws)
    assert torch.allclose(loss, (log[[0, 0, 1]] + torch.tensor([2.0, 2.0, 4.0]).log()) / 2, atol=1e-9)
    far = contrast.Contrast(Net(), "siglip").eval()
    more = far(batch, draws)[0]
    batch["wrongs"][2] = 0
    less = far(batch, draws)[0]
    scale = torch.tensor(1.0).exp().double()
    assert torch.allclose(
        more - less, torch.tensor([0.0, 0.0, 1.0]).double() * torch.log1p(scale.exp()), atol=1e-6
    )


def test_wrong_captions_are_wrong_in_little():
    "Of its role with another gender or skin; of a face one fact turned around; none of a held-out concept."
    every = worlds.world_named("emoji:3d").open("train").rows(range(2663))
    rows = [row for row in every if row["subgroup"] in ("person-role", "food-fruit")]
    said = worlds.said_of(rows, range(len(rows)))
    known = {text: row for row in rows for text in row["texts"]}
    for row, these in zip(rows, said):
        assert these.texts == tuple(row["texts"]) and not set(these.texts) & set(these.wrong)
        for other in map(known.__getitem__, these.wrong):
            same, kind = row["facts"].get("role"), row["subgroup"]
            assert other["facts"].get("role") == same and (same or other["subgroup"] == kind)
    dark = [s.wrong for r, s in zip(rows, said) if r["facts"].keys() >= {"gender", "tone"}]
    assert len(dark) > 100 and sum(len(w) == worlds.NEGATIVES for w in dark) > 0.9 * len(dark)

    face = worlds.world_named("faces").open("train").rows([3])
    (these,) = worlds.said_of(face, [3])
    facts = face[0]["attributes"]
    assert len(these.wrong) == worlds.NEGATIVES and not set(these.texts) & set(these.wrong)
    turned = {text for k in IN_WORDS for text in face_captions(facts | {k: not facts[k]}, 3)}
    single = {f"a portrait: {no if facts[k] else yes}" for k, (no, yes) in IN_WORDS.items()}
    assert set(these.wrong) <= turned | single


def test_the_nearest_relatives_come_first():
    "A woman with dark skin is first told from a man with dark skin, not from a man with light skin."
    rows = worlds.world_named("emoji:3d").open("train").rows(range(2663))
    said = worlds.said_of(rows, range(len(rows)))
    known = {text: row["facts"] for row in rows for text in row["texts"]}
    alike = lambda a, b: sum(a.get(k) != b.get(k) for k in worlds.OF_PEOPLE)
    people = [(r, s) for r, s in zip(rows, said) if r["facts"].keys() >= {"role", "gender", "tone"}]
    assert len(people) > 100
    for row, these in people[:100]:
        family = [r for r in rows if r["facts"].get("role") == row["facts"]["role"] and r is not row]
        given = sorted(alike(row["facts"], known[text]) for text in these.wrong)
        assert given == sorted(alike(row["facts"], r["facts"]) for r in family)[: worlds.NEGATIVES]


def test_each_visit_draws_one_of_the_captions(tmp_path):
    t = task(tmp_path / "run", batch_size=8)
    module, batch = t.build(), t.dataset("train").__getitems__(range(8))
    seen = [module.pairs(batch, Draws(0, step, range(8)))[1] for step in range(40)]
    for i in range(8):
        drawn = {tuple(ids[i].tolist()) for ids in seen}
        assert drawn == {tuple(ids) for ids in batch["tokens"][i].tolist()}


def test_what_is_left_is_read_by_transformers(tmp_path):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    t = task(tmp_path / "run", batch_size=8, max_steps=2)
    train(t)
    folder = tmp_path / "run/export"
    assert (folder / "vocab.json").is_file() and (
        folder / "merges.txt"
    ).is_file()  # transformers 4 wants both
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    names = {line.split(".")[0] for line in json_keys(folder)}
    assert names == {"text_model", "vision_model", "visual_projection", "text_projection", "logit_scale"}
    items, said = t.worlds["train"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = AutoImageProcessor.from_pretrained(folder)(items.tensors["pixels"][0], return_tensors="pt")
    assert torch.allclose(seen.pixel_values[0], items.tensors["pixels"][0] / 127.5 - 1, atol=1e-5)
    ids = tokenizer(said[0].texts[0], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids[0], t.sets["train"].tensors["tokens"][0, 0])


def json_keys(folder):
    "Names of the weights."
    raw = (folder / "model.safetensors").read_bytes()
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return [k for k in head if k != "__metadata__"]


def test_a_caption_is_nearest_to_its_own_picture():
    images = torch.nn.functional.normalize(torch.eye(5) + 0.1, dim=1)
    assert contrast.retrieved(images, images[:3])["value"] == 1.0
    assert contrast.retrieved(images, images[[0, 2, 1]])["value"] == pytest.approx(1 / 3)


def test_faces_with_and_without_count_half_each():
    "Nine faces without glasses and one with: who always says no is right in half."
    pair = torch.eye(2)
    truth = torch.tensor([False] * 9 + [True])
    always_no = torch.tensor([[1.0, 0.0]] * 10)
    assert contrast.told_apart(always_no, pair, truth) == 0.5
    assert contrast.told_apart(pair[truth.long()], pair, truth) == 1.0


def test_a_picture_is_moved_by_whole_pixels_and_its_edge_repeated():
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(3, 1, 1, 1)
    u = torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.5, 0.999]])
    stay, right, up = contrast.shifted(x, u)[:, 0]
    assert torch.equal(stay, x[0, 0])
    assert torch.equal(right[:, 4:], x[0, 0, :, :4]) and (right[:, :4] == x[0, 0, :, :1]).all()
    assert torch.equal(up[:4], x[0, 0, 4:]) and (up[4:] == x[0, 0, -1:]).all()


@pytest.mark.parametrize(
    "over,said",
    [
        (dict(width=100), "--width 100: give a multiple of 32"),
        (dict(layers=(3,)), "--layers 3: give layers of the text and of the picture"),
        (dict(patch=7), "--patch 7: does not divide 64"),
        (dict(micro_batch=4, batch_size=8), "--micro-batch 4: each picture is compared with all"),
    ],
)
def test_refused_before_work_begins(tmp_path, over, said):
    with pytest.raises(UserError, match=said):
        task(tmp_path / "run", **over).check()


def test_ranks_that_cannot_share_a_batch_evenly(tmp_path, monkeypatch):
    said = dict(WORLD_SIZE="3", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="--batch-size 8: 3 ranks have to share it evenly"):
        task(tmp_path / "run", batch_size=8).check()

"""`sdcourse caption llama3`: what is asked, what is taken, what is asked again, and what stands at last."""

import pytest

import tiny_models
from sdcourse import cli
from sdcourse.caption import rewrite as module
from sdcourse.caption.rewrite import (
    RewriteJob,
    RewriteOptions,
    answer_of,
    faults_of,
    messages_for,
    plain_prompt,
)
from sdcourse.caption.table import read_captions
from sdcourse.caption.write import run_captions
from sdcourse.dataset import pictures


@pytest.fixture
def drafts(tmp_path):
    "A table with drafts of eleven scenes, one of which could end a prompt."
    ids = [str(i) for i in pictures("scenes", "val", max_samples=11).ids]
    table = read_captions(tmp_path / "o", "val")
    (tmp_path / "o").mkdir()
    said = [
        "a small dog with glasses",
        'a "red"\n<|end|> hat 🎩',
        "a blue cat",
        "smiling face on the lake",
        *["a photo"] * 7,
    ]
    table.add([dict(id=i, variant="blip2", text=t) for i, t in zip(ids, said)])
    table.write(ids)
    return tmp_path / "o"


def options(built, drafts, **over):
    own = dict(device="cpu", out=str(drafts), splits=("val",), max_samples=11, batch=4, max_tokens=6)
    return RewriteOptions(model=str(built(tiny_models.tiny_llama)), precision="fp32", **own | over)


def opened(built, drafts, **over):
    cfg = options(built, drafts, **over)
    cfg.check()
    return RewriteJob("scenes", cfg, "cpu")


def items_of(job):
    data = job.splits["val"]
    return [str(i) for i in data.ids], [job.read(data, i) for i in range(len(data))]


def test_answers_are_those_of_the_model_alone_at_any_batch(built, drafts):
    "Rows of different lengths are padded on the left, and the prompt is no part of the answer."
    import torch

    job = opened(built, drafts)
    ids, _ = items_of(job)
    texts = [" ".join(tiny_models.WORDS[i : i + 1 + i % 4]) for i in range(11)]
    chats = [[dict(role="user", content=f"a draft is {d} and these are facts")] for d in texts]
    said = [t for i in range(0, 11, 4) for t in job.answers(ids[i : i + 4], chats[i : i + 4], "caption")]
    assert job.tokenizer.padding_side == "left" and len(set(said)) > 1
    alone = opened(built, drafts, batch=1)
    assert [alone.answers([i], [c], "caption")[0] for i, c in zip(ids, chats)] == said
    words = job.tokenizer
    for i in (0, 1):
        asked = words.apply_chat_template(
            chats[i], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            whole = job.model.generate(**asked, do_sample=False, max_new_tokens=6, pad_token_id=2)
        assert (
            words.decode(whole[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip() == said[i]
        )


def test_a_draft_cannot_end_the_message(built, drafts):
    job = opened(built, drafts)
    text = messages_for(*items_of(job)[1][1], job.cfg)[1]["content"]
    assert '"red" < |end| > hat 🎩' in text and text.count("\n- ") >= 2 and "<|" not in text
    assert plain_prompt("a\u2028b\x00c") == "a b c"


def test_what_is_wrong_is_asked_once_more_and_then_written_by_rule(built, drafts, monkeypatch):
    "One good at once, one good the second time, the others from the template; and the table says which."
    job = opened(built, drafts)
    ids, items = items_of(job)
    right = [module.template(facts) for _, facts in items]
    asked = []

    def answers(self, some, chats, stream):
        asked.append((stream, list(some)))
        first = {ids[0]: f'"{right[0]}"'}
        second = {ids[1]: right[1], ids[2]: "I am sorry, I cannot do that."}
        if stream == "again":
            assert all("is not right" in c[-1]["content"] and c[-2]["role"] == "assistant" for c in chats)
        return [(first if stream == "caption" else second).get(i, "a hat") for i in some]

    monkeypatch.setattr(RewriteJob, "answers", answers)
    found = job.write(ids[:4], items[:4])
    assert asked == [("caption", ids[:4]), ("again", ids[1:4])]
    assert found == [
        (right[0], "written"),
        (right[1], "rewritten once"),
        (right[2], "from the template"),
        (right[3], "from the template"),
    ]
    assert job._last("a draft", None) == ("a draft", "left as they were")


def test_the_whole_command_and_what_changes_it(built, drafts, capsys):
    "A random model writes nothing right: every row is the template's, and the command says so."
    cfg = options(built, drafts)
    assert run_captions(RewriteJob, "scenes", cfg) == 0
    out = capsys.readouterr().out
    assert "11 rows written" in out and "11 of 11 are from the template" in out
    rows = read_captions(drafts, "val").rows
    assert sum(v == "llama3" for v, _ in rows) == 11
    assert run_captions(RewriteJob, "scenes", cfg) == 0 and "nothing to do" in capsys.readouterr().out
    table = read_captions(drafts, "val")
    key = next(k for k in table.rows if k[0] == "blip2")
    table.rows[key]["text"] += " on a hill"
    table.write([])
    assert run_captions(RewriteJob, "scenes", cfg) == 0 and "; 1 rows written" in capsys.readouterr().out
    again = options(built, drafts, prompt=module.ASK + " ")
    assert run_captions(RewriteJob, "scenes", again) == 0 and "11 rows written" in capsys.readouterr().out


def test_a_copied_draft_is_no_echo_and_a_copied_question_is():
    cfg = RewriteOptions()
    draft = "a small wooden house at the end of a long road near the sea"
    assert faults_of(draft, None, cfg) == []
    assert "echoes the prompt" in faults_of(
        "Write one sentence that says what the draft says, please", None, cfg
    )
    assert answer_of('"A house."') == "A house."


@pytest.mark.parametrize(
    "words, said",
    [
        ("--base blip", "has no captions of blip; write them first: sdcourse caption blip scenes"),
        ("--base llama3", "is what would be written; give another --variant"),
        ("--prompt {draft}", "unknown placeholder {draft}; there may be {caption}, {facts}"),
        ("--leave-out Atractive", "did you mean 'Attractive'"),
        ("--model {blip}", "its model_type is 'blip', expected 'llama'"),
        ("--model {mute}", "its tokenizer has no chat template"),
    ],
)
def test_wrong_input_is_one_line(built, drafts, capsys, words, said):
    places = dict(blip=built(tiny_models.tiny_blip), mute=built(tiny_models.tiny_llama, template=None))
    own = [
        "--model",
        str(built(tiny_models.tiny_llama)),
        "--out",
        str(drafts),
        "--splits",
        "val",
        "--device",
        "cpu",
    ]
    option, value = words.split(" ", 1)
    value = str(places.get(value.strip("{}"), value)) if value.startswith("{") else value
    at = own.index(option) if option in own else None
    argv = own[:at] + own[at + 2 :] if at is not None else own
    before = (drafts / "val.jsonl").read_bytes()
    capsys.readouterr()
    assert cli.main(["caption", "llama3", "scenes", *argv, option, value]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and (drafts / "val.jsonl").read_bytes() == before

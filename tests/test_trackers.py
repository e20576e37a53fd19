"""Metrics that survive crashes, trackers that cannot hurt, a card and an upload."""

import json, logging, math, os, subprocess, sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from sdcourse.config import TrainConfig
from sdcourse.core import UserError, read_json
from sdcourse.engine import trackers as track
from sdcourse.engine.trackers import (
    Metrics,
    Tracker,
    check_tracker,
    model_card,
    check_hub,
    push_to_hub,
    read_metrics,
    tracker,
)

ROW = dict(
    step=10,
    samples=1280,
    epoch=0.9,
    loss=0.5,
    loss_by_t=[0.25, None],
    grad_norm=1.5,
    lr=1e-3,
    images_per_s=100.0,
    mfu=None,
    peak_memory_gb=0.5,
    data_wait=0.01,
    skipped=0,
    seconds=3.5,
)


def rows(folder, *steps):
    for step in steps:
        Metrics(folder).log({**ROW, "step": step})


def steps(folder):
    return [r["step"] for r in read_metrics(folder)]


# ---- metrics.jsonl
def test_rows_come_back_as_they_were(tmp_path):
    Metrics(tmp_path).log(ROW)
    assert read_metrics(tmp_path) == [ROW]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    m = Metrics(tmp_path)
    m.log(ROW)
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    Metrics(tmp_path).log(
        dict(
            step=1,
            loss=math.nan,
            grad_norm=np.float32(math.inf),
            loss_by_t=[-math.inf, np.float32(0.5)],
            more={"x": math.nan},
        )
    )
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path) == [
        dict(step=1, loss=None, grad_norm=None, loss_by_t=[None, 0.5], more={"x": None})
    ]


@pytest.mark.parametrize(
    "checkpoint, kept", [(30, [10, 20, 30]), (35, [10, 20, 30]), (0, []), (99, [10, 20, 30, 40, 50])]
)
def test_resume_drops_newer_rows_and_steps_stay_monotone(tmp_path, checkpoint, kept):
    rows(tmp_path, 10, 20, 30, 40, 50)
    Metrics(tmp_path).truncate(checkpoint)
    assert steps(tmp_path) == kept
    rows(tmp_path, 110, 120)
    assert steps(tmp_path) == sorted(set(steps(tmp_path)))


def test_a_torn_last_line_is_dropped_and_the_rest_stays_byte_for_byte(tmp_path):
    rows(tmp_path, 10, 20)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"step": 30, "lo', b'{"step": 30}', b"\0\0\0\xff"):
        path.write_bytes(whole + torn)
        assert steps(tmp_path) == [10, 20]
        Metrics(tmp_path).truncate(20)
        assert path.read_bytes() == whole
        rows(tmp_path, 30)
        assert steps(tmp_path) == [10, 20, 30]
        path.write_bytes(whole)


def test_truncate_is_atomic(tmp_path, monkeypatch):
    rows(tmp_path, 10, 20)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdcourse.core.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        Metrics(tmp_path).truncate(10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    rows(tmp_path, 10)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write("oops\n")
    rows(tmp_path, 20)
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_no_file_no_rows(tmp_path):
    Metrics(tmp_path).truncate(5)
    assert read_metrics(tmp_path) == [] and list(tmp_path.iterdir()) == []


# ---- trackers
def test_tensorboard_is_read_back_without_duplicates_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "s.png")
    for start in (0, 3):
        t = tracker("tensorboard", tmp_path, {"lr": 1e-3}, step=start)
        for step in range(start + 1, 6):
            t.log({**ROW, "loss": 10.0 * start + step}, step)
        t.images(tmp_path / "s.png", 5)
        t.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 34.0),
        (5, 35.0),
    ]
    assert (
        {"loss_by_t/0", "grad_norm", "lr"} <= set(events.Tags()["scalars"])
        and "loss_by_t/1" not in events.Tags()["scalars"]
        and "mfu" not in events.Tags()["scalars"]
    )
    assert [(e.step, e.width) for e in events.Images("samples")] == [(5, 12)]


WANDB = """
import sys, pathlib
from sdcourse.engine.trackers import tracker
folder, start = pathlib.Path(sys.argv[1]), int(sys.argv[2])
t = tracker("wandb", folder, {"lr": 1e-3}, step=start)
for step in range(start + 1, start + 4): t.log(dict(step=step, loss=float(step), loss_by_t=[None, 0.5]), step)
t.images(folder/"s.png", start + 3)
assert t.backend is not None
t.close()
"""


def records(file):
    "The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."
    raw, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue  # the rest of a block is padding
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        whole, at = whole + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""  # 1: whole record, 4: last part of one


def offline_runs(folder):
    "Id, config and history of each offline run in `folder`, oldest first."
    from wandb.proto import wandb_internal_pb2 as pb

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        found = SimpleNamespace(id=None, config={}, history=[])
        for data in records(file):
            record = pb.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                found.id, found.config = (
                    record.run.run_id,
                    {u.key: json.loads(u.value_json) for u in record.run.config.update},
                )
            if record.WhichOneof("record_type") == "history":
                found.history.append(
                    {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                )
        yield found


def test_wandb_offline_and_resumed_under_the_same_id(tmp_path):
    pytest.importorskip("wandb")
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "s.png")
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | dict(
        WANDB_MODE="offline", HOME=str(tmp_path)
    )
    ids = []
    for start in (0, 3):
        subprocess.run([sys.executable, "-c", WANDB, str(tmp_path), str(start)], env=env, check=True)
        ids.append(read_json(tmp_path / "tracker.json")["wandb_id"])
    first, second = offline_runs(tmp_path)
    assert ids[0] == ids[1] == first.id == second.id and first.config["lr"] == 1e-3
    got = [
        (r["_step"], r["loss"], r["loss_by_t/1"])
        for run in (first, second)
        for r in run.history
        if "loss" in r
    ]
    assert got == [(s, float(s), 0.5) for s in range(1, 7)]


def test_a_key_is_asked_for_before_the_work(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        check_tracker("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker("wandb")


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_pip_command(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {kind}"):
        tracker(kind, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_no_tracker_makes_no_files(tmp_path):
    t = tracker("none", tmp_path, {})
    t.log(ROW, 10)
    t.images("nowhere.png", 10)
    t.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("breaks", ["make", "log", "images", "close"])
def test_a_failing_tracker_warns_once_and_is_off(breaks, caplog):
    calls = []

    class Guest:
        def __init__(self):
            self.do("make")

        def do(self, name):
            calls.append(name)
            if name == breaks:
                raise ConnectionError("no\nserver")

        def log(self, row, step):
            self.do("log")

        def images(self, path, step):
            self.do("images")

        def close(self):
            self.do("close")

    with caplog.at_level(logging.WARNING, "sdcourse"):
        t = Tracker(Guest)
        for _ in range(2):
            t.log(ROW, 1)
            t.images("x", 1)
        t.close()
    assert len(caplog.records) == 1 and "no server" in caplog.text and calls.count(breaks) == 1


# ---- card
def card(folder, **more):
    base = dict(
        title="A flow DiT that draws digits",
        data="Digits, CC BY 4.0",
        steps=1500,
        config=vars(TrainConfig(out="/home/me/x")) | {"data": "/home/me/latents"},
        metrics={
            "accuracy": dict(value=0.98412, n=500, low=0.9691, high=0.9921),
            "frechet": 1.23456,
            "other": dict(value=2.0, n=3, floor=0.5),
            "copies": dict(closer=0.01, real_distance=3.0),
        },
        usage="from sdcourse.models.dit import FlowDiTPipeline",
    )
    return model_card(folder, **{**base, **more}).read_text()


def test_card_has_valid_front_matter_and_all_parts(tmp_path):
    (tmp_path / "samples").mkdir()
    text = card(
        tmp_path, image=tmp_path / "samples" / "a.png", tags=("dit",), sections={"Limits": "Digits only."}
    )
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["library_name"] == "diffusers" and head["license"] == "apache-2.0" and "dit" in head["tags"]
    for part in (
        "# A flow DiT that draws digits",
        "CC BY 4.0",
        "| optimizer steps | 1500 |",
        "| accuracy | 0.984 (N 500, 95 % low 0.969, 95 % high 0.992) |",
        "| frechet | 1.23 |",
        "| other | 2 (N 3, floor 0.5) |",
        "| copies | closer 0.01, real distance 3 |",
        "Digits only.",
        "```python\nfrom sdcourse",
        "| lr | 0.0001 |",
        "| data | latents |",
        "| torch | 2",
        "![samples](samples/a.png)",
        "git commit",
    ):
        assert part in body, part
    assert "/home/me" not in text and str(tmp_path) not in text


def test_a_card_names_the_library_that_loads_the_model(tmp_path):
    "Not diffusers for what a judge or CLIP is; the shipped ones say it too."
    from sdcourse.models.shipped import MODELS, shipped_folder
    from sdcourse.train import contrast, judge

    config = SimpleNamespace(kind="clip", world="digits")
    for module in (contrast, judge):
        of = SimpleNamespace(config=config, sets={"train": [0]})
        assert module.Task.card(of)["library"] == "transformers"
    text = card(tmp_path, library="transformers", tags=("clip",))
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "transformers" and head["tags"] == ["sdcourse", "clip"]
    for name, row in MODELS.items():
        kind = row.loader.partition(":")[0]
        assert f"library_name: {kind}\n" in (shipped_folder(name) / "README.md").read_text()


def test_card_is_read_by_the_hub_library_and_needs_no_tracker(tmp_path):
    card(tmp_path)
    code = f"""
import sys
sys.modules['wandb'] = sys.modules['tensorboard'] = None
from sdcourse.engine.trackers import model_card
facts = dict(title='t', data='d', steps=1, config={{}}, metrics={{}}, usage='pass')
model_card({str(tmp_path)!r}, **facts)
assert 'torch' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    from huggingface_hub import ModelCard

    assert ModelCard.load(tmp_path / "README.md").data.library_name == "diffusers"


def test_a_bar_or_line_break_in_a_value_does_not_break_the_table(tmp_path):
    assert "| a | x\\|y z |" in card(tmp_path, config={"a": "x|y\nz"})


# ---- hub
class Api:
    def __init__(self, token):
        self.calls = [("token", token)]
        Api.last = self

    def create_repo(self, repo_id, **kw):
        self.calls.append(("create", repo_id, kw))
        return SimpleNamespace(repo_id="me/" + repo_id)

    def upload_folder(self, **kw):
        self.calls.append(("upload", kw))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub that can be reached, and a home folder where nobody has logged in: the file for the token."
    place = tmp_path / "token"
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return place


@pytest.mark.parametrize("login", [True, False])
def test_push_uploads_export_and_card_with_the_token_of_the_environment(tmp_path, monkeypatch, hub, login):
    "Or with that of hf auth login."
    hub.write_text("secret") if login else monkeypatch.setenv("HF_TOKEN", "secret")
    check_hub("digits")
    assert push_to_hub(tmp_path, "digits")
    token, create, model, rest = Api.last.calls
    assert token[1] == "secret" and create[1] == "digits" and create[2] == dict(exist_ok=True, private=True)
    assert model[1]["folder_path"] == tmp_path / "export" and model[1]["repo_id"] == "me/digits"
    assert "README.md" in rest[1]["allow_patterns"] and not any(
        "checkpoint" in p for p in rest[1]["allow_patterns"]
    )


def test_a_push_that_cannot_work_is_refused_before_the_training(tmp_path, monkeypatch, hub):
    from toy import run

    for offline, words in ((False, "no token; run hf auth login, or set HF_TOKEN"), (True, "HF_HUB_OFFLINE")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=f"^--push-to-hub me/x: {words}"):
            run(tmp_path / "run", push_to_hub="me/x")
    assert not (tmp_path / "run").exists()
    check_hub("")  # nobody asks for it


def test_a_failed_push_is_a_warning_that_says_how_to_repeat(tmp_path, monkeypatch, caplog):
    class Down(Api):
        def create_repo(self, *_, **__):
            raise ConnectionError("hub\nis down")

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Down)
    with caplog.at_level(logging.WARNING, "sdcourse"):
        assert push_to_hub(tmp_path, "digits") is None
    assert "hf upload digits" in caplog.text and "hub is down" in caplog.text and "secret" not in caplog.text


def test_track_needs_no_torch():
    code = """
import sys, sdcourse.engine.trackers
assert not {'torch', 'wandb', 'tensorboard', 'huggingface_hub'} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_project_and_name_of_a_run_in_wandb(tmp_path, monkeypatch):
    from types import ModuleType, SimpleNamespace

    asked = []
    fake = ModuleType("wandb")
    fake.__spec__ = SimpleNamespace(name="wandb")
    fake.Image, fake.Settings = None, lambda **how: None
    fake.init = lambda **how: asked.append((how["project"], how["name"])) or SimpleNamespace(id="a")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for more in ({}, dict(tracker_project="mine", tracker_name="first")):
        tracker("wandb", tmp_path, more)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    tracker("wandb", tmp_path, {})
    assert asked == [("sdcourse", tmp_path.name), ("mine", "first"), ("theirs", tmp_path.name)]

"""Options: one dataclass, four layers, one line for each mistake; run folders that are never overwritten."""

import dataclasses, os, subprocess, sys, tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from sdcourse.config import (
    BelowOne,
    Free,
    NonNegative,
    Options,
    Positive,
    Range,
    Share,
    TrainConfig,
    check_run_folder,
    fixed,
    kinds,
    load_config,
    notes,
    parse_args,
    resolve,
    run_diff,
    save_config,
    to_yaml,
)
from sdcourse.core import UserError


@dataclass
class Config(TrainConfig):
    lr: float = 2e-3  # peak learning rate (measured here)
    size: Literal["tiny/2", "XL/2"] = "tiny/2"  # of the model
    interval: tuple[float, float] = (0.0, 1.0)  # guidance acts in this range of t, 100 % by default
    presets: ClassVar[dict] = {"tiny": {"batch_size": 64}, "full": {"batch_size": 256, "size": "XL/2"}}


def refusal(fn, *args, **kwargs):
    with pytest.raises(UserError) as e:
        fn(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def run(line):
    return parse_args(Config, line.split(), "prog")[0]


# ---- help
def test_help_covers_every_field_own_and_inherited():
    found = notes(Config)
    assert list(found) == [f.name for f in fields(Config)] and all(found.values())
    assert found["lr"] == "peak learning rate (measured here)" and found["seed"] == notes(TrainConfig)["seed"]


def test_help_of_a_class_in_a_notebook_cell_has_no_comments_of_its_own(capsys):
    space = {"__name__": "__main__", "dataclass": dataclass, "TrainConfig": TrainConfig}
    exec("@dataclass\nclass InCell(TrainConfig):\n    depth: int = 4 # blocks\n", space)
    assert notes(space["InCell"])["depth"] == "" and notes(space["InCell"])["lr"] == notes(TrainConfig)["lr"]
    with pytest.raises(SystemExit):
        parse_args(space["InCell"], ["--help"], "prog")
    assert "--depth X [a whole number; default 4]" in " ".join(capsys.readouterr().out.split())


def test_help_page_names_default_of_the_preset_type_and_source(capsys):
    with pytest.raises(SystemExit) as e:
        run("--preset full --help")
    page = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    about = "images per optimizer step over all ranks (DiT and SiT: 256)"
    assert f"{about} [a whole number, greater than 0 and at most 1048576; default 256]" in page
    assert (
        "default 0.002" in page
        and "one of tiny/2, XL/2; default 'XL/2'" in page
        and "100 % by default" in page
    )
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") + " " in page


# ---- ranges
@dataclass
class Ranged(Options):
    n: Positive[int] = 1
    m: Free[NonNegative[float]] = 0.0
    p: Share[float] = 0.5
    q: BelowOne[float] = 0.5
    k: Free[Annotated[int, Range(-1, 7)]] = 0


ENDS = {
    "n": ([1], [0, -1], "greater than 0"),
    "m": ([0, 0.1], [-0.1], "at least 0"),
    "p": ([0, 1], [-0.1, 1.1], "at least 0 and at most 1"),
    "q": ([0, 0.99], [-0.1, 1], "at least 0 and less than 1"),
    "k": ([-1, 7], [-2, 8], "at least -1 and at most 7"),
}


@pytest.mark.parametrize("name", ENDS)
def test_ranges_are_refused_everywhere_and_shown(name, capsys, tmp_path):
    good, bad, text = ENDS[name]
    for value in good:
        parse_args(Ranged, [f"--{name}={value}"], "prog")
        Ranged(**{name: value}).check()
    for value in bad:
        shown = kinds(Ranged)[name].type(value)
        assert (
            refusal(parse_args, Ranged, [f"--{name}={value}"], "prog") == f"--{name} {shown}: must be {text}"
        )
        assert refusal(Ranged(**{name: shown}).check) == f"--{name} {shown}: must be {text}"
        (tmp_path / "a.yaml").write_text(f"{name}: {value}\n")
        assert refusal(resolve, Ranged, file=tmp_path / "a.yaml").endswith(
            f"a.yaml: {name} {shown}: must be {text}"
        )
    with pytest.raises(SystemExit):
        parse_args(Ranged, ["--help"], "prog")
    page = " ".join(capsys.readouterr().out.split())
    assert f"number, {text}; default" in page and page.index("resumes") < page.index("number, at least -1")


def test_what_a_type_says():
    found = kinds(Ranged)
    assert (
        [k for k in found if found[k].free] == ["m", "k"]
        and found["k"].type is int
        and found["k"].range == Range(-1, 7)
    )
    assert fixed(Ranged(n=3)) == {"n": 3, "p": 0.5, "q": 0.5}


# ---- layers and types
def test_layers_the_last_one_wins(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("batch_size: 32\nlr: 1e-4\nseed: 5\n")
    got = resolve(Config, preset="full", file=file, overrides={"seed": 7})
    assert (got.batch_size, got.lr, got.seed, got.size, got.max_steps) == (32, 1e-4, 7, "XL/2", 1000)
    assert run(f"--preset full --config {file} --seed 7") == got


def test_notebook_yaml_and_command_line_are_one_object(tmp_path):
    cfg = Config(batch_size=64, lr=3e-4, compile=True, interval=(0.1, 0.9), tracker="wandb")
    assert run("--lr 3e-4 --compile --interval 0.1,0.9 --tracker wandb") == cfg
    (tmp_path / "a.yaml").write_text(to_yaml(cfg))
    assert resolve(Config, file=tmp_path / "a.yaml") == cfg
    save_config(tmp_path / "config.yaml", cfg, {"world": 2})
    assert resolve(Config, file=tmp_path / "config.yaml") == cfg


@pytest.mark.parametrize(
    "line, want",
    [
        ("--force", True),
        ("--force true", True),
        ("--force --no-force", False),
        ("--force=false", False),
        ("", False),
    ],
)
def test_bool_on_the_command_line(line, want):
    assert run(line).force is want


@pytest.mark.parametrize(
    "line, words",
    [
        ("--batch-sizes 3", ["--batch-sizes", "'--batch-size'"]),
        ("--lr fast", ["--lr", "a number", "'fast'"]),
        ("--max-steps 2.5", ["--max-steps", "whole"]),
        ("--tracker wanb", ["--tracker", "'wandb'"]),
        ("--preset ful", ["'full'"]),
        ("--force maybe", ["--force", "true or false"]),
        ("--max-step 3", ["--max-step:", "'--max-steps'"]),
        ("--lr", ["--lr", "expected one argument"]),
        ("flow", ["flow"]),
        ("--lr nan", ["--lr"]),
        ("--interval 1", ["--interval", "2 values"]),
        ("--config missing.yaml", ["missing.yaml"]),
    ],
)
def test_command_line_mistakes(line, words):
    text = refusal(run, line)
    assert all(w in text for w in words), text


@pytest.mark.parametrize(
    "content, words",
    [
        ("lrate: 1", ["bad.yaml: lrate", "'lr'"]),
        ("lr: fast", ["bad.yaml: lr", "'fast'"]),
        ("resume: no", ["resume", "text", "False"]),
        ("max_steps: true", ["max_steps"]),
        ("[1, 2]", ["bad.yaml", "mapping"]),
        ("a: [", ["bad.yaml", "not valid YAML"]),
        ("config: 3", ["config", "unknown option"]),
    ],
)
def test_yaml_mistakes_name_file_and_key(tmp_path, content, words):
    (tmp_path / "bad.yaml").write_text(content)
    text = refusal(resolve, Config, file=tmp_path / "bad.yaml")
    assert all(w in text for w in words), text


def test_a_typo_in_a_preset_is_found():
    bad = type("Bad", (Config,), {"presets": {"tiny": {"lrr": 1}}})
    assert "preset tiny: lrr" in refusal(resolve, bad)


# ---- combinations
@pytest.mark.parametrize(
    "bad, option",
    [
        (dict(max_steps=0), "--max-steps"),
        (dict(lr=-1.0), "--lr"),
        (dict(seed=-1), "--seed"),
        (dict(log_every=0), "--log-every"),
        (dict(keep=0), "--keep"),
        (dict(micro_batch=-1), "--micro-batch"),
        (dict(ema_decay=1.0), "--ema-decay"),
        (dict(lr_end=1e-5), "--lr-schedule"),
        (dict(lr_end=0.1, lr_schedule="cosine"), "--lr-end"),
        (dict(device="gpu"), "--device"),
        (dict(optimizer="sgd"), "--optimizer"),
        (dict(resume="nevr"), "--resume"),
        (dict(push_to_hub="a/b/c"), "--push-to-hub"),
        (dict(batch_size="8" * 9 + "x"), "--batch-size"),
        (dict(batch_size=2**21), "--batch-size"),
    ],
)
def test_check_names_the_option(bad, option):
    assert option in refusal(Config(**bad).check)


def test_batch_smaller_than_the_ranks_is_refused():
    Config(batch_size=4).check(world=4)
    assert "--batch-size 3" in refusal(Config(batch_size=3).check, world=4)


def test_fp16_on_cpu_is_refused():
    Config(precision="fp16", device="cuda").check()
    assert "--precision" in refusal(Config(precision="fp16", device="cpu").check)


def test_all_presets_pass_their_check():
    for preset in Config.presets:
        resolve(Config, preset=preset).check()


def test_a_smoke_run_shorter_than_the_warm_up_is_allowed():
    TrainConfig(max_steps=30, warmup_steps=1000, lr_schedule="cosine").check()


# ---- what a run remembers
def test_config_yaml_holds_options_versions_commit_and_facts(tmp_path):
    save_config(tmp_path / "config.yaml", Config(), {"data": {"digits": "ab12"}, "threads": 2})
    found = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(found["config"]) == {f.name for f in fields(Config)}
    assert (
        found["versions"]["torch"]
        and "git_commit" in found
        and found["data"] == {"digits": "ab12"}
        and found["threads"] == 2
    )


def test_run_diff_reports_fixed_fields_only(tmp_path):
    save_config(tmp_path / "config.yaml", Config(), {})
    old = load_config(tmp_path / "config.yaml")
    free = dict(
        log_every=1,
        num_workers=2,
        micro_batch=8,
        out="x",
        compile=True,
        tracker="wandb",
        resume="never",
        keep=5,
    )
    assert run_diff(old, Config()) == [] == run_diff(old, Config(**free))
    assert run_diff(old, Config(lr=3e-4, interval=(0.0, 0.5), **free)) == [
        "lr: 0.002 -> 0.0003",
        "interval: [0.0, 1.0] -> [0.0, 0.5]",
    ]


def test_run_diff_with_options_that_came_or_went():
    old = {"config": {"lr": 2e-3, "cfg_drop": 0.1}}
    assert run_diff(old, Config()) == ["cfg_drop: 0.1 -> no such option"]
    assert "size: tiny/2 -> XL/2" in run_diff(old, Config(size="XL/2"))


def test_every_shared_option_is_marked_as_agreed():
    free = """
        out max_seconds stop_before requeue_code hang_seconds micro_batch compile gradient_checkpointing
        num_workers threads log_every validate_every checkpoint_every keep max_bad_steps resume force
        device tracker tracker_project tracker_name push_to_hub dry_run ema_cpu attention
    """
    marked = [f.name for f in fields(TrainConfig) if "free" in getattr(f.type, "__metadata__", ())]
    assert set(marked) == set(free.split()) and Free[int].__metadata__ == ("free",)


# ---- run folders
def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")
    }


def a_run(folder, step=None):
    folder.mkdir()
    save_config(folder / "config.yaml", Config(), {})
    if step:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder


def test_new_empty_and_own_folders_are_taken(tmp_path):
    assert check_run_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b" and tree(tmp_path / "a") == {
        "b": None
    }
    assert check_run_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "a" / "b" / "slurm-7.out").touch()
    check_run_folder(tmp_path / "a" / "b")
    check_run_folder(a_run(tmp_path / "c", step=5))
    check_run_folder(a_run(tmp_path / "d"), resume="never")


@pytest.mark.parametrize("files", [{"thesis.tex": "x"}, {"config.yaml": "lr: 3\n"}, {"sub/x": "1"}])
def test_foreign_folder_is_refused_and_untouched(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    text = refusal(check_run_folder, tmp_path)
    assert str(tmp_path) in text and "--out" in text and tree(tmp_path) == before


def test_never_refuses_a_folder_with_checkpoints(tmp_path):
    folder = a_run(tmp_path / "r", step=7)
    before = tree(folder)
    assert "--resume never" in refusal(check_run_folder, folder, resume="never") and tree(folder) == before


def test_unwritable_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "--out" in refusal(check_run_folder, path)
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid():
        locked.chmod(0o500)
        assert "cannot be written" in refusal(check_run_folder, locked)
        locked.chmod(0o700)

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdcourse.config.tempfile.TemporaryFile", full)
    assert "No space left" in refusal(check_run_folder, locked) and tree(locked) == {}


def test_config_needs_no_torch():
    code = "import sys, sdcourse.config; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dataclass_replace_keeps_type():
    assert isinstance(dataclasses.replace(Config(), out="x"), Config)


# ---- faults.md B: files and values that people write
def written(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text, words",
    [
        ("lr: 1e-3\nseed: 1\nlr: 1e-5\n", ["lr is there twice", "line 3"]),
        ("config: {lr: 1e-3}\nbatch_size: 3\n", ["batch_size", "beside config:", "below config:"]),
        ("config: {lr: 1e-3}\nversions: {}\nbatch_size: 3\n", ["batch_size", "beside config:"]),
        ("config: {lr: 1e-3}\nthreads: 3\n", ["threads", "beside config:"]),
        ("max_steps: 1:30\n", ["max_steps", "whole number", "1:30"]),
        ("lr: 1:30.5\n", ["lr", "a number"]),
        (f"lr: 1{'0' * 400}\n", ["lr", "too large"]),
        (f"seed: {2**64}\n", ["seed", "too large"]),
        (f"seed: '{2**64}'\n", ["seed", "too large"]),
        (f"seed: 1{'0' * 5000}\n", ["a.yaml"]),
        ("[" * 3000, ["a.yaml"]),
        ("lr: 2020-13-45\n", ["a.yaml"]),
        ("lr: 1e-3\n".encode("utf-16"), ["UTF-8"]),
        ("? [a, b]\n: 1\n", ["a.yaml"]),
        ("lr:\t1e-3\n", ["not valid YAML", "line 1"]),
        ("out: 2020-01-02\n", ["out: expected text"]),
        ("lr: null\n", ["lr: expected a number", "None"]),
        ("lr: .nan\n", ["lr: expected a number", "nan"]),
        ("lr: .inf\n", ["lr: expected a number", "inf"]),
        ("seed: {a: 1}\n", ["seed: expected a whole number"]),
        ("out: [a]\n", ["out: expected text"]),
        ("lr: !!python/object/apply:os.system ['exit 3']\n", ["not valid YAML", "line 1"]),
        ("lr: 1e-3\n---\nseed: 1\n", ["not valid YAML", "single document"]),
        ("", ["mapping of options"]),
        ("lr: *x\n", ["not valid YAML", "undefined alias"]),
        ("max_steps: 1e5\n", ["max_steps: expected a whole number", "1e5"]),
        ("LR: 1e-3\n", ["LR: unknown option", "'lr'"]),
        ("batch-size: 3\n", ["batch-size: unknown option", "'batch_size'"]),
        ('out: "C:\\x"\n', ["not valid YAML", "line 1"]),
    ],
)
def test_files_that_are_refused_in_one_line(tmp_path, text, words):
    said = refusal(resolve, Config, file=written(tmp_path, text))
    assert "\n" not in said and len(said) < 600 and all(w in said for w in words), said


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("batch_size: 010\n", "batch_size", 10),
        ("\ufefflr: 1e-4\n", "lr", 1e-4),
        ("base: &b {lr: 3e-4}\n", None, None),
        ("batch_size: 0x10\n", "batch_size", 16),
        ("out: ~/runs/x\n", "out", os.path.expanduser("~/runs/x")),
        ("out: C:\\runs\n", "out", "C:\\runs"),
        ("force: yes\n", "force", True),
        ("force: off\n", "force", False),
        ("lr: 1e-4\n", "lr", 1e-4),
        ("lr: &x 3e-4\nweight_decay: *x\n", "weight_decay", 3e-4),
        ("<<: {lr: 3e-4}\n", "lr", 3e-4),
        ("config: {lr: 3e-4}\nversions: {}\nthreads: 3\nworld: 1\n", "lr", 3e-4),
        (f"seed: {2**64 - 1}\n", "seed", 2**64 - 1),
    ],
)
def test_files_that_are_read_as_they_look(tmp_path, text, name, value):
    path = written(tmp_path, text)
    if name:
        assert getattr(resolve(Config, file=path), name) == value
    else:
        assert "base" in refusal(resolve, Config, file=path)


def test_a_folder_is_no_file_of_options(tmp_path):
    assert "cannot be read; give an existing YAML file" in refusal(resolve, Config, file=tmp_path)


def test_a_merge_key_may_be_overridden(tmp_path):
    path = written(tmp_path, "config: &b {lr: 3e-4, seed: 4}\nversions: {<<: *b, lr: 1}\n")
    assert resolve(Config, file=path).seed == 4


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=30), max_size=5))
@settings(max_examples=100)
def test_any_mapping_that_we_write_we_read(found):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_text(yaml.safe_dump(found), encoding="utf-8")
        assert load_config(path) == found


@given(st.binary(max_size=60))
@settings(max_examples=200)
def test_any_bytes_are_options_or_one_line(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_bytes(data)
        try:
            resolve(Config, file=path)
        except UserError as e:
            assert "\n" not in str(e)


@given(
    st.sampled_from(["lr", "seed", "batch_size", "interval", "tracker", "force", "out"]), st.text(max_size=30)
)
@settings(max_examples=200)
def test_any_text_is_a_value_or_one_line(name, text):
    try:
        cfg = resolve(Config, overrides={name: text})
        if name == "seed":
            assert 0 <= cfg.seed < 2**64
    except UserError as e:
        assert name in str(e)


def test_home_means_home_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        run("--out=~/x").out == Config(out="~/x").out == f"{tmp_path}/x" and Config(out="a~/x").out == "a~/x"
    )
    save_config(tmp_path / "config.yaml", Config(), {})
    old = load_config(tmp_path / "config.yaml")
    old["config"]["size"] = "~/m"  # of a run before this was so
    assert run_diff(old, Config(size="~/m")) == []
    (tmp_path / "a.yaml").write_text("lr: 3e-4\n")
    assert run("--config=~/a.yaml").lr == 3e-4


@pytest.mark.parametrize(
    "line", ["--config a --config b", "--config=a --config b", "--preset tiny --preset full"]
)
def test_two_files_or_presets_are_refused(line):
    assert "twice" in refusal(run, line)


def test_an_out_that_no_file_system_takes_is_one_line():
    assert "--out" in refusal(check_run_folder, "/tmp/" + "x" * 300)
    assert "--out" in refusal(check_run_folder, "/tmp/a\0b")
    assert "--resume" in refusal(Config(resume="x" * 300).check)


@pytest.mark.parametrize("name", ["run/checkpoints", "data", "moved"])
def test_resume_with_no_checkpoint_says_what_to_give(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is no checkpoint.*give a folder RUN/checkpoints/step-…"):
        TrainConfig(resume=str(tmp_path / name)).check()


@pytest.mark.parametrize("word", ["latest", "AUTO"])
def test_other_words_for_a_checkpoint_say_which_there_are(word):
    said = refusal(Config(resume=word).check)
    assert f"--resume {word}: no such folder; use auto, never or a checkpoint folder" in said


def test_resume_with_a_run_says_what_to_give(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    said = refusal(Config(resume=str(tmp_path)).check)
    assert f"--out {tmp_path}" in said and "checkpoints/step-" in said


def test_beta2_of_another_optimizer_is_refused():
    said = refusal(Config(beta2=0.5, optimizer="torch.optim.SGD").check)
    assert "--beta2 0.5" in said and "no effect" in said
    Config(optimizer="torch.optim.SGD").check()

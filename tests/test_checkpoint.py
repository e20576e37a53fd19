"""Guarantees of sdcourse.engine.checkpoint: whatever dies, whatever rots, the newest whole checkpoint is
found, and nothing else counts.
"""

import io, json, os, random, re, resource, shutil, signal, sys

import pytest
import torch
from bench_checkpoint import counted, measured
from safetensors.torch import load_file, save_file

from sdcourse.core import UserError, sha256
from sdcourse.engine import checkpoint
from sdcourse.engine.checkpoint import (
    checkpoint_bytes,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    verify_checkpoint,
)

FILES = "manifest.json model.safetensors optimizer.pt state.json".split()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """SIGKILL takes nothing from the system that it has: to force it to disk would only take time here. The
    other files of tests do.
    """
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def content(step, n=8):
    "What a run at `step` holds: every number in it is the step."
    t = torch.full((n,), float(step))
    return dict(
        tensors={"model": {"w": t, "b": t[:2]}},
        objects={"optimizer": {"state": {0: {"m": t.clone()}}, "lr": [1e-3]}},
        state={"step": step},
    )


def save(root, step, keep=2, n=8):
    return save_checkpoint(root, step, **content(step, n), keep=keep)


def check_whole(folder):
    "The checkpoint loads and every part of it is of the step in its name."
    step, got = int(folder.name[5:]), load_checkpoint(folder, need=("model", "optimizer"))
    assert got["state"] == {"step": step}
    for t in (*got["tensors"]["model"].values(), got["objects"]["optimizer"]["state"][0]["m"]):
        assert bool((t == step).all())


def names(root):
    return sorted(p.name for p in root.iterdir())


def one_line(info):
    assert str(info.value).strip() and "\n" not in str(info.value)
    return str(info.value)


def in_child(fn):
    "Run `fn` in a forked child; the wait status."
    if (pid := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            fn()
            os._exit(0)
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
        os._exit(1)
    return os.waitpid(pid, 0)[1]


def rewrite_manifest(folder, change):
    "Change the manifest and write it as the library would: what an attacker can do."
    m = json.loads((folder / "manifest.json").read_text())
    change(m)
    (folder / "manifest.json").write_text(checkpoint._dump(m))


def rehash(folder, name):
    "Make the manifest vouch for what now is in the file."
    p = folder / name
    rewrite_manifest(
        folder, lambda m: m["files"].__setitem__(name, dict(sha256=sha256(p), bytes=p.stat().st_size))
    )


def flip(path, at, mask=1):
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


# ---- what is saved is what comes back


def test_round_trip_is_exact(tmp_path):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=g)
    tied = torch.nn.Parameter(torch.randn(3, 3, generator=g))
    tensors = dict(
        model={
            "embed": tied,
            "head": tied,
            "transposed": base.t(),
            "slice": base[1:3],
            "expanded": base[:1].expand(5, 4),
            "nhwc": torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last),
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            **{
                str(d): torch.randn(7, generator=g, dtype=torch.float64).mul(9).to(d)
                for d in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
            },
        },
        ema={"embed": tied.detach() * 0.5},
    )
    m = torch.nn.Linear(4, 2)
    opt = torch.optim.AdamW(m.parameters(), lr=1 / 3)
    m(base).sum().backward()
    opt.step()
    state = {"step": 7, "lr": 0.1 + 0.2, "names": ["a"], "none": None}
    got = load_checkpoint(
        save_checkpoint(
            tmp_path / "a" / "b", 7, tensors=tensors, objects={"optimizer": opt.state_dict()}, state=state
        )
    )
    assert (
        got["state"] == state
        and got["tensors"].keys() == tensors.keys()
        and got["objects"].keys() == {"optimizer"}
    )
    for part, named in tensors.items():
        for name, t in named.items():
            back = got["tensors"][part][name]
            assert back.dtype == t.dtype and back.shape == t.shape and torch.equal(back, t), name
    new = torch.optim.AdamW(m.parameters())
    new.load_state_dict(got["objects"]["optimizer"])
    assert str(new.state_dict()) == str(opt.state_dict())


def test_a_safetensors_file_is_the_library_s_own(tmp_path):
    "Byte for byte, with one dtype of each width; with several of one width it loads all the same."
    g = torch.Generator().manual_seed(0)
    named = {
        f"é{k}.{d}": torch.randn(shape, generator=g).mul(9).to(d)
        for d in (torch.float64, torch.float32, torch.bfloat16, torch.int8)
        for k, shape in enumerate([(3, 5), (), (0, 2), (7,)])
    }
    for step, found in enumerate(
        (
            named,
            {},
            {
                "w": torch.ones(3, dtype=torch.float16),
                "v": torch.ones(3, dtype=torch.bfloat16),
                "u": torch.ones(3, 2, dtype=torch.bool),
            },
        )
    ):
        path = (
            save_checkpoint(tmp_path, step, tensors={"model": found}, objects={}, state={})
            / "model.safetensors"
        )
        save_file(found, tmp_path / "theirs")
        if step < 2:
            assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
        back = load_file(path)
        assert list(load_checkpoint(path.parent)["tensors"]["model"]) == sorted(
            found
        )  # the library gives them in any order
        assert back.keys() == found.keys() and all(
            torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in found.items()
        )


def test_checkpoints_of_before_load(tmp_path):
    "Written by the library and by torch to a path, hashed afterwards: so they lie on people's disks."
    folder, c = tmp_path / "step-00000012", content(12)
    folder.mkdir()
    save_file({k: t.clone() for k, t in c["tensors"]["model"].items()}, folder / "model.safetensors")
    torch.save(c["objects"]["optimizer"], folder / "optimizer.pt")
    (folder / "state.json").write_text(checkpoint._dump(c["state"]))
    files = {p.name: dict(sha256=sha256(p), bytes=p.stat().st_size) for p in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(checkpoint._dump(dict(format=1, step=12, files=files)))
    check_whole(folder)
    assert latest_checkpoint(tmp_path) == (folder, [])


def test_loaded_tensors_outlive_the_files(tmp_path):
    folder = save(tmp_path, 5, n=300_000)
    got = load_checkpoint(folder)
    for name in FILES:
        (folder / name).write_bytes(b"x" * (folder / name).stat().st_size)
    assert bool((got["tensors"]["model"]["w"] == 5).all()) and bool(
        (got["objects"]["optimizer"]["state"][0]["m"] == 5).all()
    )


def test_checkpoint_bytes_is_close(tmp_path):
    c = content(1, n=100_000)
    folder = save_checkpoint(tmp_path, 1, **c)
    assert (
        abs(checkpoint_bytes(c["tensors"], c["objects"]) - sum(p.stat().st_size for p in folder.iterdir()))
        < 8192
    )
    assert (
        checkpoint_bytes({"model": {"w": torch.empty(1000, 1000, device="meta", dtype=torch.bfloat16)}})
        == 2_000_000
    )


def test_valid_step_is_left_as_it_is_and_broken_one_replaced(tmp_path):
    folder = save(tmp_path, 3)
    before = (folder.stat().st_ino, sha256(folder / "manifest.json"))
    assert save_checkpoint(tmp_path, 3, tensors={}, objects={}, state={}) == folder
    assert before == (folder.stat().st_ino, sha256(folder / "manifest.json"))
    flip(folder / "model.safetensors", -1)
    save(tmp_path, 3)
    check_whole(folder)
    assert names(tmp_path) == ["step-00000003"]


# ---- the newest valid one


def test_latest_goes_by_step_number(tmp_path):
    for step in (100_000_000, 99_999_999):
        save(tmp_path, step, keep=9, n=8 if step > 99_999_999 else 50_000)
    os.utime(tmp_path / "step-100000000", (1, 1))
    assert latest_checkpoint(tmp_path) == (tmp_path / "step-100000000", [])


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") == (None, []) and load_latest(tmp_path / "absent") == (
        None,
        None,
        [],
    )
    (tmp_path / ".step-00000001.1.tmp").mkdir()
    (tmp_path / "step-by-step.txt").touch()
    assert latest_checkpoint(tmp_path) == (None, [])


def test_three_broken_newer_ones_are_passed_over_and_named(tmp_path):  # R14
    for step in (100, 200, 300, 400):
        save(tmp_path, step, keep=9)
    flip(tmp_path / "step-00000200" / "model.safetensors", -5)
    (tmp_path / "step-00000300" / "optimizer.pt").unlink()
    os.truncate(tmp_path / "step-00000400" / "state.json", 3)
    best, skipped = latest_checkpoint(tmp_path)
    assert best == tmp_path / "step-00000100" and len(skipped) == 3
    for text, step, file in zip(
        skipped, (400, 300, 200), ("state.json", "optimizer.pt", "model.safetensors")
    ):
        assert f"step-00000{step}/{file}" in text
    check_whole(best)
    path, loaded, reasons = load_latest(tmp_path, need=("model", "optimizer"))
    assert path == best and reasons == skipped and loaded["state"] == {"step": 100}


def test_none_valid_is_an_error(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    for step in (1, 2):
        flip(tmp_path / f"step-0000000{step}" / "state.json", 2)
    for fn in (latest_checkpoint, load_latest):
        with pytest.raises(UserError) as e:
            fn(tmp_path)
        assert "none of 2" in one_line(e) and "step-00000002" in str(e.value)


def test_renamed_copy_is_refused(tmp_path):
    shutil.copytree(save(tmp_path, 5), tmp_path / "step-00000009")
    best, skipped = latest_checkpoint(tmp_path)
    assert best.name == "step-00000005" and "belongs to step 5" in skipped[0]


def test_relative_and_linked_paths_load(tmp_path, monkeypatch):
    folder = save(tmp_path, 5)
    (tmp_path / "best").symlink_to(folder.name)
    monkeypatch.chdir(folder)
    assert load_checkpoint(".")["state"] == load_checkpoint("../best")["state"] == {"step": 5}


# ---- damage


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_seen(tmp_path, name):
    path = save(tmp_path, 12) / name
    good = path.read_bytes()
    for at in range(len(good)) if len(good) < 1000 else random.Random(0).sample(range(len(good)), 250):
        for mask in (
            (1, 42) if path.suffix == ".json" else (1,)
        ):  # 42 makes a newline of a space, which is the same to JSON
            path.write_bytes(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :])
            with pytest.raises(UserError):
                verify_checkpoint(path.parent)
    path.write_bytes(good)
    verify_checkpoint(path.parent)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "unreadable", "empty", "truncated", "longer", "altered"])
def test_damaged_file_is_an_error(tmp_path, name, damage):  # R13
    path = save(tmp_path, 12) / name
    if damage == "altered":
        flip(path, 3)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b" ")
    elif damage == "empty":
        os.truncate(path, 0)
    else:
        path.unlink()
    if damage == "unreadable":
        path.mkdir()
    for fn in (verify_checkpoint, load_checkpoint):
        with pytest.raises(UserError) as e:
            fn(path.parent)
        assert name in one_line(e)
    with pytest.raises(UserError):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", FILES[1:])
def test_altered_numbers_are_not_loaded(tmp_path, name):
    "Every file still parses; only its hash tells."
    path = save(tmp_path, 12, n=100) / name
    old, new = (
        (b"12", b"13")
        if name == "state.json"
        else (torch.tensor([12.0, 12.0]).numpy().tobytes(), torch.tensor([12.0, 13.0]).numpy().tobytes())
    )
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(UserError) as e:
        load_checkpoint(path.parent)
    assert f"{name}: altered" in one_line(e)


def test_forbidden_file_is_an_error(
    tmp_path, monkeypatch
):  # R13; by a patch, because root may read everything
    folder = save(tmp_path, 12)

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "sha256", forbidden)
    with pytest.raises(UserError) as e:
        load_checkpoint(folder)
    assert "Permission denied" in one_line(e) and "step-00000012/" in str(e.value)


@pytest.mark.parametrize(
    "foreign",
    ["../evil.safetensors", "/etc/passwd", "..", "sub/x.pt", "a\\b.pt", "x.py", ".hidden.pt", "x.pt\n"],
)
def test_foreign_names_in_the_manifest_are_refused(tmp_path, foreign):
    save_file({"w": torch.ones(1)}, tmp_path / "evil.safetensors")
    folder = save(tmp_path / "c", 1)
    save_file({"w": torch.ones(1)}, tmp_path / "c" / "evil.safetensors")
    entry = dict(
        sha256=sha256(tmp_path / "evil.safetensors"), bytes=(tmp_path / "evil.safetensors").stat().st_size
    )
    rewrite_manifest(folder, lambda m: m["files"].__setitem__(foreign, entry))
    with pytest.raises(UserError) as e:
        load_checkpoint(folder)
    assert "foreign file name" in one_line(e)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format=2),
        lambda m: m.pop("format"),
        lambda m: m.update(step=None),
        lambda m: m.update(step=[1]),
        lambda m: m.update(files=[]),
        lambda m: m.pop("files"),
        lambda m: m["files"].update({"state.json": 3}),
        lambda m: m["files"]["state.json"].pop("sha256"),
        lambda m: m["files"]["state.json"].update(bytes="4"),
        lambda m: m["files"].pop("state.json"),
    ],
)
def test_odd_manifests_are_refused(tmp_path, change):
    folder = save(tmp_path, 1)
    rewrite_manifest(folder, change)
    with pytest.raises(UserError) as e:
        load_checkpoint(folder)
    one_line(e)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"files": NaN}', "[" * 100_000, '"\\ud800"', "\xff"])
def test_nonsense_manifests_are_refused(tmp_path, text):
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError) as e:
        load_checkpoint(folder)
    assert "manifest.json" in one_line(e)


def test_unlisted_files_are_not_loaded_and_needed_ones_are_asked_for(tmp_path):
    folder = save(tmp_path, 1)
    torch.save({"x": 1}, folder / "extra.pt")
    assert load_checkpoint(folder)["objects"].keys() == {"optimizer"}
    for fn, where in (
        (load_checkpoint, folder),
        (load_latest, tmp_path),
    ):  # a resume does not pass over it: an older one would not help
        with pytest.raises(UserError) as e:
            fn(where, need=("model", "ema"))
        assert one_line(e).startswith(f"{folder}: it holds no ema")


# ---- code in files


class Program:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_with_a_right_hash_is_not_run(tmp_path):
    folder = save(tmp_path / "c", 1)
    torch.save({"state": Program(str(tmp_path / "it-ran"))}, folder / "optimizer.pt")
    rehash(folder, "optimizer.pt")
    verify_checkpoint(folder)
    for fn, where in ((load_checkpoint, folder), (load_latest, tmp_path / "c")):
        with pytest.raises(UserError) as e:
            fn(where)
        assert (
            "optimizer.pt" in one_line(e) and "mkdir" in str(e.value) and not (tmp_path / "it-ran").exists()
        )


def test_unreadable_objects_are_refused_at_saving(tmp_path):
    save(tmp_path / "c", 1)
    with pytest.raises(UserError) as e:
        save_checkpoint(
            tmp_path / "c", 2, tensors={}, objects={"optimizer": Program(str(tmp_path / "it-ran"))}, state={}
        )
    assert "optimizer.pt" in one_line(e) and not (tmp_path / "it-ran").exists()
    assert names(tmp_path / "c") == ["step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_garbage_with_a_right_hash_is_refused(tmp_path, name):
    folder = save(tmp_path, 1)
    (folder / name).write_bytes(b"\xff" * 100)
    rehash(folder, name)
    with pytest.raises(UserError) as e:
        load_checkpoint(folder)
    assert name in one_line(e)


# ---- pruning and leftovers


def test_prune_counts_whole_ones_and_leaves_later_steps(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=9)
    os.truncate(tmp_path / "step-00000030" / "model.safetensors", 100)
    save(tmp_path, 35, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000035", "step-00000040"]
    flip(tmp_path / "step-00000035" / "manifest.json", 3)
    (tmp_path / "step-00000040" / "optimizer.pt").unlink()
    save(tmp_path, 45, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000045"]
    with pytest.raises(UserError, match="keep"):
        save(tmp_path, 50, keep=0)


def test_rot_in_an_older_one_is_found_when_it_is_loaded(tmp_path):
    """Pruning goes by sizes, so it counts as kept; loading passes it over; what was proved in this save
    stays, whatever the others are.
    """
    for step in (10, 20):
        save(tmp_path, step, keep=9)
    flip(tmp_path / "step-00000020" / "model.safetensors", -5)
    new = save(tmp_path, 30, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000030"] and latest_checkpoint(tmp_path) == (new, [])
    flip(tmp_path / "step-00000030" / "model.safetensors", -5)
    with pytest.raises(UserError, match="none of 2"):
        load_latest(tmp_path)
    new = save(tmp_path, 30, keep=2)
    assert load_latest(tmp_path)[0] == new


def test_leftovers_of_the_dead_go_those_of_the_living_stay(tmp_path):
    if (dead := os.fork()) == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    wake, hold = os.pipe()
    if (alive := os.fork()) == 0:
        os.close(hold)
        os.read(wake, 1)
        os._exit(0)
    try:
        gone = [
            f".step-00000007.{dead}.tmp",
            f".step-00000006.old.{dead}.tmp",
            f".step-00000007.{os.getpid()}.tmp",
        ]
        stay = [f".step-00000007.{alive}.tmp", ".step-7.tmp", "notes"]
        for name in gone + stay:
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_text("half")
        save(tmp_path, 8)
        assert names(tmp_path) == sorted(stay + ["step-00000008"])
    finally:
        os.close(hold)
        os.waitpid(alive, 0)


# ---- the disk


@pytest.mark.parametrize("limit", [100, 5_000, 100_000, 1_000_000, 1_300_000])
def test_full_disk_leaves_the_old_one(
    tmp_path, limit
):  # R5: every file but the last few bytes, the first file, the optimizer …
    save(tmp_path, 1, keep=1, n=200_000)
    big = content(2, n=300_000)
    big["objects"]["optimizer"]["more"] = torch.zeros(50_000)

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save_checkpoint(tmp_path, 2, **big, keep=1)
        except UserError as e:
            assert "\n" not in str(e) and "step-00000002: not saved" in str(e) and "intact" in str(e)
            os._exit(7)

    assert os.waitstatus_to_exitcode(in_child(child)) == 7
    assert names(tmp_path) == ["step-00000001"] and latest_checkpoint(tmp_path)[1] == []
    check_whole(tmp_path / "step-00000001")


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_failing_calls_leave_the_old_one(tmp_path, monkeypatch, call):
    save(tmp_path, 1, keep=1)

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, call, fails)
        with pytest.raises(UserError) as e:
            save(tmp_path, 2, keep=1)
    assert "No space left" in one_line(e) and names(tmp_path) == ["step-00000001"]
    check_whole(tmp_path / "step-00000001")


@pytest.mark.parametrize(
    "module,call", [(checkpoint, "_content"), (checkpoint, "fsync_path"), (os, "rename")]
)
def test_disk_that_lies_keeps_the_old_one(tmp_path, monkeypatch, module, call):
    """The bytes rot after they were written, before the manifest, before the force to disk or before the look
    after the rename: the new one is refused, the old one not pruned.
    """
    save(tmp_path, 1, keep=1)
    real, rotten = getattr(module, call), []

    def rots(*args, **kwargs):
        if not rotten:
            rotten.extend(tmp_path.glob(".step-00000002.*/model.safetensors"))
        if rotten and rotten[0].exists():
            flip(rotten[0], -1)
        rotten.append("once")
        return real(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(module, call, rots)
        with pytest.raises(UserError, match="model.safetensors: altered"):
            save(tmp_path, 2, keep=1)
    best, skipped = latest_checkpoint(tmp_path)
    assert best.name == "step-00000001" and len(skipped) == 1


# ---- what it costs


def test_bytes_of_a_save_and_of_a_resume(tmp_path):
    """By the system's own count. A save: written once, read back once, hashed on both ways. A resume: hashed
    once; a torch file is read twice, others once.
    """
    for step in (1, 2):
        save(tmp_path, step, n=1_000_000)
    load_latest(tmp_path)
    with counted() as saved:
        folder = save(tmp_path, 3, n=1_000_000)
    size = sum(p.stat().st_size for p in folder.iterdir())
    with counted() as resumed:
        assert load_latest(tmp_path)[0] == folder
    assert (
        size <= saved["written"] < 1.01 * size
        and size <= saved["read"] < 1.02 * size
        and size * 1.99 < saved["hashed"] < 2.01 * size
    )
    assert resumed["read"] < 1.52 * size and size * 0.99 < resumed["hashed"] < 1.01 * size


def test_no_second_copy_in_memory(tmp_path):
    """A save copies no tensor that lies on the CPU row by row; a resume holds one safetensors file twice at
    most.
    """
    many = dict(
        tensors={"model": {str(k): torch.full((500_000,), float(k)) for k in range(20)}},
        objects={"optimizer": {k: torch.full((500_000,), float(k)) for k in range(20)}},
        state={},
    )
    saved = measured(lambda: save_checkpoint(tmp_path, 1, **many), checkpoint)
    resumed = measured(lambda: load_latest(tmp_path), checkpoint)
    assert saved["memory"] < 25e6 and resumed["memory"] < 105e6, (
        saved,
        resumed,
    )  # 40 MB of weights, 40 MB of optimizer state; 15 MB is for code and threads


def test_older_ones_are_judged_by_manifest_and_size(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    trace = trace_of(tmp_path, lambda: save(tmp_path, 4, keep=3))
    read = [paths[0] for event, *paths in trace if event == "read"]
    assert sorted(p for p in read if re.match("step-0000000[123]/", p)) == [
        "step-00000002/manifest.json",
        "step-00000003/manifest.json",
    ]
    assert sorted(p for p in read if p.startswith("step-00000004/")) == sorted(
        f"step-00000004/{name}" for name in FILES[:1] + FILES
    )  # is it there already?
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_the_system_is_asked_to_forget_before_the_look(tmp_path, monkeypatch):
    """Each file after it was forced to disk; the disk answers, not a copy in memory. Where this cannot be
    asked, a save works all the same.
    """
    asked, forced, fsync_path = [], [], checkpoint.fsync_path

    def force(path):
        forced.append(os.stat(path).st_ino)
        fsync_path(path)

    def forget(fd, start, length, advice):
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED) and forced[-1] == os.fstat(fd).st_ino
        asked.append(forced[-1])
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(checkpoint, "fsync_path", force)
    monkeypatch.setattr(os, "posix_fadvise", forget, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    folder = save(tmp_path, 1)
    assert sorted(asked) == sorted(p.stat().st_ino for p in folder.iterdir())
    monkeypatch.delattr(os, "posix_fadvise")
    check_whole(save(tmp_path, 2))


def test_a_write_that_takes_less_than_it_was_given(tmp_path, monkeypatch):
    "Linux takes 2 GB at a time: the rest is given again, and hashed once."

    class Little(io.FileIO):
        def write(self, data):
            return super().write(memoryview(data)[: max(1, len(data) // 2)])

    class Hashed(checkpoint._Hashed, Little):
        pass

    monkeypatch.setattr(checkpoint, "_Hashed", Hashed)
    check_whole(save(tmp_path, 1, n=100_000))


# ---- the trace of a save, and death at each of its calls


def watch(root, seen):
    """In a forked child: call `seen(event, path, …)` before each file operation at `root`. Audit hooks cannot
    be removed; the child goes away.
    """

    def hook(event, args):
        if event == "open":
            event, paths = "write" if args[2] & (os.O_WRONLY | os.O_RDWR) else "read", args[:1]
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            paths = args[:1]
        elif event == "os.rename":
            paths = args[:2]
        else:
            return
        if isinstance(paths[0], int):
            return
        paths = [os.fsdecode(p) for p in paths]
        if any(p.startswith(str(root)) or not os.path.isabs(p) for p in paths):
            seen(event, *paths)  # rmtree works with names relative to an open folder

    write, fsync_path = checkpoint._Hashed.write, checkpoint.fsync_path

    def written(
        file, data
    ):  # no hook sees a write: `seen` gets its size and a function that writes its first bytes
        data = bytes(data)

        def part(n):
            return write(file, data[:n])

        seen("bytes", str(file.name), len(data), part)
        return write(file, data)

    def forced(path):
        seen("fsync_path", str(path))
        fsync_path(path)

    checkpoint._Hashed.write, checkpoint.fsync_path = written, forced
    sys.addaudithook(hook)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def trace_of(root, fn):
    "The file operations of `fn`, one (event, path, …) each, with the root and the process number left out."
    read, write = os.pipe()

    def child():
        def seen(event, *paths):
            os.write(
                write,
                json.dumps(
                    [
                        event,
                        *[
                            re.sub(r"\.\d+\.tmp", ".tmp", os.path.relpath(p, root) if os.path.isabs(p) else p)
                            for p in paths
                            if isinstance(p, str)
                        ],
                    ]
                ).encode()
                + b"\n",
            )

        watch(root, seen)
        fn()

    status = in_child(child)
    os.close(write)
    with open(read) as f:
        lines = [tuple(json.loads(line)) for line in f]
    assert status == 0
    return lines


def test_order_of_a_save(tmp_path):  # R6
    save(tmp_path, 1, keep=1)
    trace = trace_of(tmp_path, lambda: save(tmp_path, 2, keep=1))
    tmp, new, old = ".step-00000002.tmp", "step-00000002", "step-00000001"
    renamed = trace.index(("os.rename", tmp, new))
    forced = {paths[0]: i for i, (event, *paths) in enumerate(trace) if event == "fsync_path"}
    written = {name: trace.index(("write", f"{tmp}/{name}")) for name in FILES}
    assert all(("bytes", f"{tmp}/{name}") in trace for name in FILES)
    assert max(written, key=written.get) == "manifest.json"
    for name in FILES:
        assert written["manifest.json"] < forced[f"{tmp}/{name}"] < forced[tmp] < renamed < forced["."]
    read = {paths[0]: i for i, (event, *paths) in enumerate(trace) if event == "read" and i > forced["."]}
    verified = max(read[f"{new}/{name}"] for name in FILES)
    taken = [
        i
        for i, (event, *paths) in enumerate(trace)
        if event in ("os.remove", "os.rmdir") or event == "os.rename" and paths[0] == old
    ]
    assert len(taken) >= 6 and min(taken) > verified and trace[min(taken)][0] == "os.rename"
    assert names(tmp_path) == [new]


@pytest.mark.parametrize("keep,mess", [(1, False), (2, True)])
def test_death_before_every_call(tmp_path, keep, mess):  # R4, every instant that can matter
    """Killed at its n-th file operation, for all n, a save leaves a whole checkpoint that is not older, and
    no half one.

    The mess: a broken checkpoint of this step, to be replaced, and what dead processes left. Reading changes
    nothing, so no death comes before it.
    """

    def start(root):
        for step in (1, 2):
            save(root, step, keep=2)
        if not mess:
            return
        save(root, 3, keep=3)
        flip(root / "step-00000003" / "model.safetensors", -1)
        shutil.copytree(root / "step-00000002", root / ".step-00000003.999999999.tmp")
        shutil.copytree(root / "step-00000002", root / ".step-00000001.old.999999999.tmp")

    start(tmp_path / "start")
    best, n, status = [], 0, -1
    while status != 0:
        n += 1
        root = tmp_path / f"at-{n}"
        shutil.copytree(tmp_path / "start", root)

        def child():
            count = iter(range(1, 10**6))

            def seen(event, path, *write):
                if event != "read" and next(count) == n:
                    die()
                if event == "bytes" and next(count) == n:  # once more, with half of them written
                    size, part = write
                    part(size // 2)
                    die()

            watch(root, seen)
            save(root, 3, keep)

        status = in_child(child)
        assert status in (0, signal.SIGKILL)
        folder, skipped = latest_checkpoint(root)
        assert len(skipped) <= mess and all(
            "step-00000003/model.safetensors: altered" in s for s in skipped
        ), f"a half checkpoint stands after operation {n}: {skipped}"
        assert int(folder.name[5:]) >= 2
        check_whole(folder)
        best.append(folder.name)
        save(root, 4, keep)
        assert (
            names(root) == ["step-00000004"]
            if keep == 1
            else names(root)[1] == "step-00000004" and len(names(root)) == 2
        )
        shutil.rmtree(root)
    assert n > 25 and sorted(best) == best and {"step-00000002", "step-00000003"} == set(best)


def test_fifty_kills(tmp_path):  # R4
    """A child saves again and again and is killed at a random place, fifty times, in one folder that lives
    through all of it.

    The place is a number of bytes written, so that no clock is asked; each other file operation weighs as
    much as 400 bytes. The disk changes only in such operations: a death between two of them leaves what a
    death right before the next one leaves.
    """
    n, rng = 2000, random.Random(0)  # two files of 8 kB and two small ones: a save weighs about 40,000
    for step in (1, 2, 3):
        save(tmp_path, step, n=n)
    last, inside, saves = 3, 0, 0
    for trial in range(50):
        left, before = rng.randrange(100_000), names(tmp_path)
        read, told = os.pipe()

        def seen(event, path, *write):
            nonlocal left
            size, part = write if event == "bytes" else (400, None)
            if left < size:
                if part:
                    part(left)
                die()
            left -= size

        def child():
            watch(tmp_path, seen)
            for step in range(last + 1, last + 1000):
                save(tmp_path, step, n=n)
                os.write(told, step.to_bytes(8, "little"))

        status = in_child(child)
        os.close(told)
        with open(read, "rb") as f:
            returned = f.read()
        assert status == signal.SIGKILL, "the child died by itself"
        if returned:
            last = int.from_bytes(returned[-8:], "little")
        saves += len(returned) // 8
        inside += any(name.endswith(".tmp") and name not in before for name in names(tmp_path))
        folder, skipped = latest_checkpoint(tmp_path)
        assert skipped == [] and last <= int(folder.name[5:]) <= last + 1, (
            f"kill {trial}: {folder} after {last} had returned, {skipped}"
        )
        check_whole(folder)
        last = int(folder.name[5:])
    print(f"{inside} of 50 kills hit a save in the middle, {saves} saves returned")
    assert inside >= 25 and saves >= 25, (
        f"{inside} of 50 kills hit a save in the middle, {saves} saves returned: the test has lost its teeth"
    )

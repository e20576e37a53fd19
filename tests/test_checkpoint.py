"Guarantees of sdcourse.train.checkpoint: whatever dies, whatever rots, the newest whole checkpoint is found, and nothing else counts."
import json, os, random, re, resource, shutil, signal, sys, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdcourse.core import UserError, sha256
from sdcourse.train import checkpoint
from sdcourse.train.checkpoint import checkpoint_bytes, latest_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint

FILES = "manifest.json model.safetensors optimizer.pt state.json".split()

def content(step, n=8):
    "What a run at `step` holds: every number in it is the step."
    t = torch.full((n,), float(step))
    return dict(tensors={"model": {"w": t, "b": t[:2]}}, objects={"optimizer": {"state": {0: {"m": t.clone()}}, "lr": [1e-3]}}, state={"step": step})

def save(root, step, keep=2, n=8): return save_checkpoint(root, step, **content(step, n), keep=keep)

def check_whole(folder):
    "The checkpoint loads and every part of it is of the step in its name."
    step, got = int(folder.name[5:]), load_checkpoint(folder, need=("model", "optimizer"))
    assert got["state"] == {"step": step}
    for t in (*got["tensors"]["model"].values(), got["objects"]["optimizer"]["state"][0]["m"]): assert bool((t == step).all())

def names(root): return sorted(p.name for p in root.iterdir())

def one_line(info): assert str(info.value).strip() and "\n" not in str(info.value); return str(info.value)

def in_child(fn):
    "Run `fn` in a forked child; the wait status."
    if (pid := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            fn()
            os._exit(0)
        except BaseException as e: os.write(2, f"{type(e).__name__}: {e}\n".encode())
        os._exit(1)
    return os.waitpid(pid, 0)[1]

def rewrite_manifest(folder, change):
    "Change the manifest and write it as the library would: what an attacker can do."
    m = json.loads((folder/"manifest.json").read_text())
    change(m)
    (folder/"manifest.json").write_text(checkpoint._dump(m))

def rehash(folder, name):
    "Make the manifest vouch for what now is in the file."
    p = folder/name
    rewrite_manifest(folder, lambda m: m["files"].__setitem__(name, dict(sha256=sha256(p), bytes=p.stat().st_size)))

def flip(path, at, mask=1):
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)

# ---- what is saved is what comes back

def test_round_trip_is_exact(tmp_path):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=g)
    tied = torch.nn.Parameter(torch.randn(3, 3, generator=g))
    tensors = dict(model={"embed": tied, "head": tied, "transposed": base.t(), "slice": base[1:3], "expanded": base[:1].expand(5, 4),
                          "nhwc": torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3),
                          **{str(d): torch.randn(7, generator=g, dtype=torch.float64).mul(9).to(d) for d in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)}},
                   ema={"embed": tied.detach() * .5})
    m = torch.nn.Linear(4, 2)
    opt = torch.optim.AdamW(m.parameters(), lr=1/3)
    m(base).sum().backward()
    opt.step()
    state = {"step": 7, "lr": 0.1 + 0.2, "names": ["a"], "none": None}
    got = load_checkpoint(save_checkpoint(tmp_path/"a"/"b", 7, tensors=tensors, objects={"optimizer": opt.state_dict()}, state=state))
    assert got["state"] == state and got["tensors"].keys() == tensors.keys() and got["objects"].keys() == {"optimizer"}
    for part, named in tensors.items():
        for name, t in named.items():
            back = got["tensors"][part][name]
            assert back.dtype == t.dtype and back.shape == t.shape and torch.equal(back, t), name
    new = torch.optim.AdamW(m.parameters())
    new.load_state_dict(got["objects"]["optimizer"])
    assert str(new.state_dict()) == str(opt.state_dict())

def test_loaded_tensors_outlive_the_files(tmp_path):
    folder = save(tmp_path, 5, n=300_000)
    got = load_checkpoint(folder)
    for name in FILES: (folder/name).write_bytes(b"x" * (folder/name).stat().st_size)
    assert bool((got["tensors"]["model"]["w"] == 5).all()) and bool((got["objects"]["optimizer"]["state"][0]["m"] == 5).all())

def test_checkpoint_bytes_is_close(tmp_path):
    c = content(1, n=100_000)
    folder = save_checkpoint(tmp_path, 1, **c)
    assert abs(checkpoint_bytes(c["tensors"], c["objects"]) - sum(p.stat().st_size for p in folder.iterdir())) < 8192
    assert checkpoint_bytes({"model": {"w": torch.empty(1000, 1000, device="meta", dtype=torch.bfloat16)}}) == 2_000_000

def test_valid_step_is_left_as_it_is_and_broken_one_replaced(tmp_path):
    folder = save(tmp_path, 3)
    before = (folder.stat().st_ino, sha256(folder/"manifest.json"))
    assert save_checkpoint(tmp_path, 3, tensors={}, objects={}, state={}) == folder
    assert before == (folder.stat().st_ino, sha256(folder/"manifest.json"))
    flip(folder/"model.safetensors", -1)
    save(tmp_path, 3)
    check_whole(folder)
    assert names(tmp_path) == ["step-00000003"]

# ---- the newest valid one

def test_latest_goes_by_step_number(tmp_path):
    for step in (100_000_000, 99_999_999): save(tmp_path, step, keep=9, n=8 if step > 99_999_999 else 50_000)
    os.utime(tmp_path/"step-100000000", (1, 1))
    assert latest_checkpoint(tmp_path) == (tmp_path/"step-100000000", [])

def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path/"absent") == (None, [])
    (tmp_path/".step-00000001.1.tmp").mkdir()
    (tmp_path/"step-by-step.txt").touch()
    assert latest_checkpoint(tmp_path) == (None, [])

def test_three_broken_newer_ones_are_passed_over_and_named(tmp_path):  # R14
    for step in (100, 200, 300, 400): save(tmp_path, step, keep=9)
    flip(tmp_path/"step-00000200"/"model.safetensors", -5)
    (tmp_path/"step-00000300"/"optimizer.pt").unlink()
    os.truncate(tmp_path/"step-00000400"/"state.json", 3)
    best, skipped = latest_checkpoint(tmp_path)
    assert best == tmp_path/"step-00000100" and len(skipped) == 3
    for text, step, file in zip(skipped, (400, 300, 200), ("state.json", "optimizer.pt", "model.safetensors")): assert f"step-00000{step}/{file}" in text
    check_whole(best)

def test_none_valid_is_an_error(tmp_path):
    for step in (1, 2): save(tmp_path, step)
    for step in (1, 2): flip(tmp_path/f"step-0000000{step}"/"state.json", 2)
    with pytest.raises(UserError) as e: latest_checkpoint(tmp_path)
    assert "none of 2" in one_line(e) and "step-00000002" in str(e.value)

def test_renamed_copy_is_refused(tmp_path):
    shutil.copytree(save(tmp_path, 5), tmp_path/"step-00000009")
    best, skipped = latest_checkpoint(tmp_path)
    assert best.name == "step-00000005" and "belongs to step 5" in skipped[0]

def test_relative_and_linked_paths_load(tmp_path, monkeypatch):
    folder = save(tmp_path, 5)
    (tmp_path/"best").symlink_to(folder.name)
    monkeypatch.chdir(folder)
    assert load_checkpoint(".")["state"] == load_checkpoint("../best")["state"] == {"step": 5}

# ---- damage

@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_seen(tmp_path, name):
    path = save(tmp_path, 12)/name
    good = path.read_bytes()
    for at in range(len(good)) if len(good) < 1000 else random.Random(0).sample(range(len(good)), 250):
        for mask in (1, 42):  # 42 makes a newline of a space, which is the same to JSON
            flip(path, at, mask)
            with pytest.raises(UserError): verify_checkpoint(path.parent)
            path.write_bytes(good)
    verify_checkpoint(path.parent)

@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "unreadable", "empty", "truncated", "longer", "altered"])
def test_damaged_file_is_an_error(tmp_path, name, damage):  # R13
    path = save(tmp_path, 12)/name
    if damage == "altered": flip(path, 3)
    elif damage == "truncated": os.truncate(path, path.stat().st_size - 1)
    elif damage == "longer": path.write_bytes(path.read_bytes() + b" ")
    elif damage == "empty": os.truncate(path, 0)
    else: path.unlink()
    if damage == "unreadable": path.mkdir()
    for fn in (verify_checkpoint, load_checkpoint):
        with pytest.raises(UserError) as e: fn(path.parent)
        assert name in one_line(e)
    with pytest.raises(UserError): latest_checkpoint(tmp_path)

def test_forbidden_file_is_an_error(tmp_path, monkeypatch):  # R13; by a patch, because root may read everything
    folder = save(tmp_path, 12)
    def forbidden(path): raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(checkpoint, "sha256", forbidden)
    with pytest.raises(UserError) as e: load_checkpoint(folder)
    assert "Permission denied" in one_line(e) and "step-00000012/" in str(e.value)

@pytest.mark.parametrize("foreign", ["../evil.safetensors", "/etc/passwd", "..", "sub/x.pt", "a\\b.pt", "x.py", ".hidden.pt", "x.pt\n"])
def test_foreign_names_in_the_manifest_are_refused(tmp_path, foreign):
    save_file({"w": torch.ones(1)}, tmp_path/"evil.safetensors")
    folder = save(tmp_path/"c", 1)
    save_file({"w": torch.ones(1)}, tmp_path/"c"/"evil.safetensors")
    entry = dict(sha256=sha256(tmp_path/"evil.safetensors"), bytes=(tmp_path/"evil.safetensors").stat().st_size)
    rewrite_manifest(folder, lambda m: m["files"].__setitem__(foreign, entry))
    with pytest.raises(UserError) as e: load_checkpoint(folder)
    assert "foreign file name" in one_line(e)

@pytest.mark.parametrize("change", [
    lambda m: m.update(format=2), lambda m: m.pop("format"), lambda m: m.update(step=None), lambda m: m.update(step=[1]), lambda m: m.update(files=[]), lambda m: m.pop("files"),
    lambda m: m["files"].update({"state.json": 3}), lambda m: m["files"]["state.json"].pop("sha256"), lambda m: m["files"]["state.json"].update(bytes="4"), lambda m: m["files"].pop("state.json")])
def test_odd_manifests_are_refused(tmp_path, change):
    folder = save(tmp_path, 1)
    rewrite_manifest(folder, change)
    with pytest.raises(UserError) as e: load_checkpoint(folder)
    one_line(e)

@pytest.mark.parametrize("text", ["", "[]", "null", '{"files": NaN}', "[" * 100_000, '"\\ud800"', "\xff"])
def test_nonsense_manifests_are_refused(tmp_path, text):
    folder = save(tmp_path, 1)
    (folder/"manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError) as e: load_checkpoint(folder)
    assert "manifest.json" in one_line(e)

def test_unlisted_files_are_not_loaded_and_needed_ones_are_asked_for(tmp_path):
    folder = save(tmp_path, 1)
    torch.save({"x": 1}, folder/"extra.pt")
    assert load_checkpoint(folder)["objects"].keys() == {"optimizer"}
    with pytest.raises(UserError) as e: load_checkpoint(folder, need=("model", "ema"))
    assert "holds no ema" in one_line(e)

# ---- code in files

class Program:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

def test_code_with_a_right_hash_is_not_run(tmp_path):
    folder = save(tmp_path/"c", 1)
    torch.save({"state": Program(str(tmp_path/"it-ran"))}, folder/"optimizer.pt")
    rehash(folder, "optimizer.pt")
    verify_checkpoint(folder)
    with pytest.raises(UserError) as e: load_checkpoint(folder)
    assert "optimizer.pt" in one_line(e) and "mkdir" in str(e.value) and not (tmp_path/"it-ran").exists()

def test_unreadable_objects_are_refused_at_saving(tmp_path):
    save(tmp_path/"c", 1)
    with pytest.raises(UserError) as e: save_checkpoint(tmp_path/"c", 2, tensors={}, objects={"optimizer": Program(str(tmp_path/"it-ran"))}, state={})
    assert "optimizer.pt" in one_line(e) and not (tmp_path/"it-ran").exists()
    assert names(tmp_path/"c") == ["step-00000001"]

@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_garbage_with_a_right_hash_is_refused(tmp_path, name):
    folder = save(tmp_path, 1)
    (folder/name).write_bytes(b"\xff" * 100)
    rehash(folder, name)
    with pytest.raises(UserError) as e: load_checkpoint(folder)
    assert name in one_line(e)

# ---- pruning and leftovers

def test_prune_counts_valid_ones_and_leaves_later_steps(tmp_path):
    for step in (10, 20, 30, 40): save(tmp_path, step, keep=9)
    flip(tmp_path/"step-00000020"/"model.safetensors", -5)
    save(tmp_path, 35, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000035", "step-00000040"]
    flip(tmp_path/"step-00000035"/"model.safetensors", -5)
    save(tmp_path, 45, keep=3)
    assert names(tmp_path) == ["step-00000030", "step-00000040", "step-00000045"]
    with pytest.raises(UserError, match="keep"): save(tmp_path, 50, keep=0)

def test_leftovers_of_the_dead_go_those_of_the_living_stay(tmp_path):
    if (dead := os.fork()) == 0: os._exit(0)
    os.waitpid(dead, 0)
    wake, hold = os.pipe()
    if (alive := os.fork()) == 0:
        os.close(hold)
        os.read(wake, 1)
        os._exit(0)
    try:
        gone = [f".step-00000007.{dead}.tmp", f".step-00000006.old.{dead}.tmp", f".step-00000007.{os.getpid()}.tmp"]
        stay = [f".step-00000007.{alive}.tmp", ".step-7.tmp", "notes"]
        for name in gone + stay:
            (tmp_path/name).mkdir()
            (tmp_path/name/"model.safetensors").write_text("half")
        save(tmp_path, 8)
        assert names(tmp_path) == sorted(stay + ["step-00000008"])
    finally:
        os.close(hold)
        os.waitpid(alive, 0)

# ---- the disk

@pytest.mark.parametrize("limit", [100, 5_000, 100_000, 1_000_000, 1_300_000])
def test_full_disk_leaves_the_old_one(tmp_path, limit):  # R5: every file but the last few bytes, the first file, the optimizer …
    save(tmp_path, 1, keep=1, n=200_000)
    big = content(2, n=300_000)
    big["objects"]["optimizer"]["more"] = torch.zeros(50_000)
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: save_checkpoint(tmp_path, 2, **big, keep=1)
        except UserError as e: assert "\n" not in str(e) and "step-00000002: not saved" in str(e) and "intact" in str(e); os._exit(7)
    assert os.waitstatus_to_exitcode(in_child(child)) == 7
    assert names(tmp_path) == ["step-00000001"] and latest_checkpoint(tmp_path)[1] == []
    check_whole(tmp_path/"step-00000001")

@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_failing_calls_leave_the_old_one(tmp_path, monkeypatch, call):
    save(tmp_path, 1, keep=1)
    def fails(*args, **kwargs): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, call, fails)
        with pytest.raises(UserError) as e: save(tmp_path, 2, keep=1)
    assert "No space left" in one_line(e) and names(tmp_path) == ["step-00000001"]
    check_whole(tmp_path/"step-00000001")

def test_disk_that_lies_keeps_the_old_one(tmp_path, monkeypatch):
    "The bytes rot between writing and the look after the rename: the new one is refused, the old one not pruned."
    save(tmp_path, 1, keep=1)
    def rotten(src, dst, real=os.rename):
        flip(Path(src)/"model.safetensors", -1)
        real(src, dst)
    with monkeypatch.context() as m:
        m.setattr(os, "rename", rotten)
        with pytest.raises(UserError, match="sha256"): save(tmp_path, 2, keep=1)
    best, skipped = latest_checkpoint(tmp_path)
    assert best.name == "step-00000001" and len(skipped) == 1

# ---- the trace of a save, and death at each of its calls

def watch(root, seen):
    "In a forked child: call `seen(event, path, …)` before each file operation at `root`. Audit hooks cannot be removed; the child goes away."
    def hook(event, args):
        if event == "open": event, paths = "write" if args[2] & (os.O_WRONLY | os.O_RDWR) else "read", args[:1]
        elif event in ("os.mkdir", "os.remove", "os.rmdir"): paths = args[:1]
        elif event == "os.rename": paths = args[:2]
        else: return
        if isinstance(paths[0], int): return
        paths = [os.fsdecode(p) for p in paths]
        if any(p.startswith(str(root)) or not os.path.isabs(p) for p in paths): seen(event, *paths)  # rmtree works with names relative to an open folder
    def before(module, name, path_of):
        real = getattr(module, name)
        def wrapped(*args, **kwargs):
            seen(name, path_of(*args))
            out = real(*args, **kwargs)
            if name in ("save", "save_file"):  # written by C++ and Rust, which no hook sees: die with half a file, too
                size = os.path.getsize(args[1])
                seen("half", args[1], lambda: os.truncate(args[1], size // 2))
            return out
        setattr(module, name, wrapped)
    before(checkpoint, "save_file", lambda named, path: str(path))
    before(torch, "save", lambda obj, path: str(path))
    before(checkpoint, "fsync_path", lambda path: str(path))
    sys.addaudithook(hook)

def trace_of(root, fn):
    "The file operations of `fn`, one (event, path, …) each, with the root and the process number left out."
    read, write = os.pipe()
    def child():
        def seen(event, *paths): os.write(write, json.dumps([event, *[re.sub(r"\.\d+\.tmp", ".tmp", os.path.relpath(p, root) if os.path.isabs(p) else p) for p in paths if isinstance(p, str)]]).encode() + b"\n")
        watch(root, seen)
        fn()
    status = in_child(child)
    os.close(write)
    with open(read) as f: lines = [tuple(json.loads(line)) for line in f]
    assert status == 0
    return lines

def test_order_of_a_save(tmp_path):  # R6
    save(tmp_path, 1, keep=1)
    trace = trace_of(tmp_path, lambda: save(tmp_path, 2, keep=1))
    tmp, new, old = ".step-00000002.tmp", "step-00000002", "step-00000001"
    renamed = trace.index(("os.rename", tmp, new))
    forced = {paths[0]: i for i, (event, *paths) in enumerate(trace) if event == "fsync_path"}
    written = {name: trace.index((event, f"{tmp}/{name}")) for name, event in zip(FILES, ("write", "save_file", "save", "write"))}
    assert max(written, key=written.get) == "manifest.json"
    for name in FILES: assert written["manifest.json"] < forced[f"{tmp}/{name}"] < forced[tmp] < renamed < forced["."]
    read = {paths[0]: i for i, (event, *paths) in enumerate(trace) if event == "read" and i > forced["."]}
    verified = max(read[f"{new}/{name}"] for name in FILES)
    taken = [i for i, (event, *paths) in enumerate(trace) if event in ("os.remove", "os.rmdir") or event == "os.rename" and paths[0] == old]
    assert len(taken) >= 6 and min(taken) > verified and trace[min(taken)][0] == "os.rename"
    assert names(tmp_path) == [new]

@pytest.mark.parametrize("scene", ["keep=1", "keep=2", "replace a broken one", "leftovers"])
def test_death_before_every_call(tmp_path, scene):  # R4, every instant that can matter
    "Killed at its n-th file operation, for all n, a save leaves a whole checkpoint that is not older, and no half one."
    keep = 2 if scene == "keep=2" else 1
    def start(root):
        for step in (1, 2): save(root, step, keep=2)
        if scene == "replace a broken one":
            save(root, 3, keep=3)
            flip(root/"step-00000003"/"model.safetensors", -1)
        if scene == "leftovers":
            shutil.copytree(root/"step-00000002", root/".step-00000003.999999999.tmp")
            shutil.copytree(root/"step-00000002", root/".step-00000001.old.999999999.tmp")
    start(tmp_path/"start")
    best, n, status = [], 0, -1
    while status != 0:
        n += 1
        root = tmp_path/f"at-{n}"
        shutil.copytree(tmp_path/"start", root)
        def child():
            count = iter(range(1, 10**6))
            def seen(event, path, *half):
                if next(count) == n:
                    if event == "half": half[0]()
                    os.kill(os.getpid(), signal.SIGKILL)
            watch(root, seen)
            save(root, 3, keep)
        status = in_child(child)
        assert status in (0, signal.SIGKILL)
        folder, skipped = latest_checkpoint(root)
        assert skipped == [] or scene.startswith("replace"), f"a half checkpoint stands after operation {n}: {skipped}"
        assert int(folder.name[5:]) >= 2
        check_whole(folder)
        best.append(folder.name)
        save(root, 4, keep)
        assert names(root) == ["step-00000004"] if keep == 1 else names(root)[1] == "step-00000004" and len(names(root)) == 2
        shutil.rmtree(root)
    assert n > 25 and sorted(best) == best and {"step-00000002", "step-00000003"} == set(best)

def test_fifty_kills(tmp_path):  # R4
    "A child saves again and again and is killed at a random instant, fifty times, in one folder that lives through all of it."
    n, rng = 500_000, random.Random(0)  # two files of 2 MB and two small ones
    started = time.perf_counter()
    for step in (1, 2, 3): save(tmp_path, step, n=n)
    span = (time.perf_counter() - started) / 3
    last, inside = 3, 0
    for trial in range(50):
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.close(read)
                torch.set_num_threads(1)
                for step in range(last + 1, last + 1000):
                    save(tmp_path, step, n=n)
                    os.write(write, step.to_bytes(8, "little"))
            finally: os._exit(1)
        os.close(write)
        time.sleep(rng.uniform(0, 2.5 * span))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, "the child died by itself"
        with open(read, "rb") as f: returned = f.read()
        if returned: last = int.from_bytes(returned[-8:], "little")
        inside += any(f".{pid}.tmp" in name for name in names(tmp_path))
        folder, skipped = latest_checkpoint(tmp_path)
        assert skipped == [] and last <= int(folder.name[5:]) <= last + 1, f"kill {trial}: {folder} after {last} had returned, {skipped}"
        check_whole(folder)
        last = int(folder.name[5:])
    print(f"{inside} of 50 kills hit a save in the middle, {last} saves, one takes {span*1e3:.0f} ms")
    assert inside >= 15, f"only {inside} of 50 kills hit a save in the middle: the test has lost its teeth"

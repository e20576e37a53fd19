"""What a checkpoint costs, beside a plain write of as many bytes and beside an earlier commit:

    python tools/bench_checkpoint.py [--mb 500] [--before 37ffe71]

A quarter is weights, a quarter their average, half optimizer state: Adam in full. Both sides take turns, each
save and each resume in a forked process. Hashed, read and memory are multiples of the checkpoint's size. Read
is the system's own count (/proc/self/io) and the size of files that are mapped. Memory is the peak above what
the process began with; it includes mapped files. Seconds are the best of --rounds, by the clock and of the
processor.
"""

import argparse, hashlib, json, os, subprocess, tempfile, time, types
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch

from sdcourse.core import fsync_path
from sdcourse.engine import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def _io():
    "What the system counted: bytes this process read and wrote by calls."
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["rchar"]), int(rows["wchar"])


@contextmanager
def counted():
    "A dict that will hold the bytes that were hashed (SHA-256), read and written inside."
    real, new = hashlib.sha256, hashlib.new
    found = dict(hashed=0, read=0, written=0)

    class Counted:
        def __init__(self, data=b""):
            self.inner = real()
            self.update(data)

        def update(self, data):
            found["hashed"] += memoryview(data).nbytes
            self.inner.update(data)

        def hexdigest(self):
            return self.inner.hexdigest()

    def named(name, *args):
        return Counted(*args) if name == "sha256" else new(name, *args)

    hashlib.sha256, hashlib.new = Counted, named
    begin = _io()
    try:
        yield found
    finally:
        found["read"], found["written"] = (b - a for a, b in zip(begin, _io()))
        hashlib.sha256, hashlib.new = real, new


def earlier(commit):
    "The module as it was at a commit, with the size of each file that it maps counted."
    for folder in ("engine", "train"):  # where it lay
        show = ["git", "show", f"{commit}:sdcourse/{folder}/checkpoint.py"]
        source = subprocess.run(show, cwd=ROOT, capture_output=True, text=True)
        if source.returncode == 0:
            break
    if source.returncode:
        raise SystemExit(f"--before {commit}: {source.stderr.strip()}")
    module = types.ModuleType("earlier")
    module.__package__ = checkpoint.__package__
    module.mapped = 0
    exec(compile(source.stdout, f"checkpoint.py at {commit}", "exec"), module.__dict__)
    load_file = module.load_file

    def mapped(path):
        module.mapped += os.path.getsize(path)
        return load_file(path)

    module.load_file = mapped
    return module


def content(mb):
    "Weights, average and optimizer state of a model, `mb` million bytes in all."
    n = mb * 1_000_000 // 4 // 4 // 32

    def numbers(seed):
        return {f"layer.{k}": torch.full((n,), seed + k / 32) for k in range(32)}

    def moments(k):
        return dict(exp_avg=torch.full((n,), k / 7), exp_avg_sq=torch.full((n,), k / 9))

    optimizer = dict(state={k: moments(k) for k in range(32)})
    weights = dict(model=numbers(0), ema=numbers(1))
    return dict(tensors=weights, objects=dict(optimizer=optimizer), state=dict(step=1))


def forget(root):
    "A resume comes after a restart: no file is in memory."
    for path in root.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(key):
    "Bytes of this process, now (VmRSS) or at most so far (VmHWM)."
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[key].split()[0]) * 1024


def measured(fn, module):
    "What `fn()` costs in a forked process."
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            start = memory("VmRSS")
            began, used = time.perf_counter(), time.process_time()
            with counted() as found:
                fn()
            found |= dict(seconds=time.perf_counter() - began, processor=time.process_time() - used)
            found["memory"] = memory("VmHWM") - start
            found["read"] += getattr(module, "mapped", 0)
            os.write(write, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def resume(module, root):
    "As the training loop does it at that commit."
    if hasattr(module, "load_latest"):
        return module.load_latest(root)
    return module.load_checkpoint(module.latest_checkpoint(root)[0])


def plain(root, size):
    "Seconds to write `size` bytes and force them to disk."
    block, path = bytes(2**24), root / "plain"
    began = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    fsync_path(path)
    took = time.perf_counter() - began
    path.unlink()
    return took


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=500, help="size in million bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", default="37ffe71", help="commit to compare with; empty: none")
    options = parser.parse_args()
    sides = dict(before=earlier(options.before)) if options.before else {}
    sides["now"] = checkpoint
    parts, rows, wrote = content(options.mb), defaultdict(list), []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, 3 + options.rounds):
            for name, module in sides.items():
                root = Path(folder) / name
                saved = measured(lambda: module.save_checkpoint(root, step, **parts), module)
                if step < 3:
                    continue  # now there are older ones to keep and to prune
                forget(root)
                rows["save", name].append(saved)
                rows["resume", name].append(measured(lambda: resume(module, root), module))
            size = sum(p.stat().st_size for p in (Path(folder) / f"now/step-{step:08}").iterdir())
            wrote.append(plain(Path(folder), size))
    print(f"{size / 1e6:.0f} MB, 2 kept; a plain write takes {min(wrote):.2f} s\n")
    print("|  |  | hashed | read | seconds | / plain write | processor s | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    for (what, name), found in sorted(rows.items(), reverse=True):
        best, used = (min(row[key] for row in found) for key in ("seconds", "processor"))
        times = (max(row[key] for row in found) / size for key in ("hashed", "read", "memory"))
        hashed, read, peak = (f"{x:.2f}" for x in times)
        ratio = best / min(wrote)
        print(f"| {what} | {name} | {hashed} | {read} | {best:.2f} | {ratio:.2f} | {used:.2f} | {peak} |")


if __name__ == "__main__":
    main()

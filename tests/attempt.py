"""Tests in a patched copy of the checkout, each time in a process of its own; what counts as a failing test.

    with Lanes(2, fork=not warm()) as lanes:                # the checkout as it is now
        lanes.begin(Attempt(("tests/test_x.py::test_it",), patch=(file, old, new)))
        attempt, outcome = lanes.end()                      # of the one that ends first

The process is forked from this one, which has imported what is slow to import, and never sdcourse: a child
imports the copy's own. Without `fork` each one starts a Python. A process between here and the child ends
whatever the child leaves behind. A copy consists of hard links to a private snapshot, and the patched file is
written anew; a test that writes through a link is seen, and the snapshot mended.
"""

import ctypes
import gc
import importlib
import importlib.util
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections import namedtuple
from contextlib import redirect_stdout, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "sdcourse",
    "tests",
    "tools",
    "nbs",
    "slurm",
    "data_manifests",
    ".ci",
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "README.md",
    "LOG.md",
    "log",
    "LICENSE",
)
LEFT_OUT = shutil.ignore_patterns(".ipynb_checkpoints", "runs", "*.gif")
LIMIT = 400  # seconds for one test, more than pytest gives it
LATE = 124  # exit code of an attempt that was ended; `timeout` has the same
STARTED_WITH = dict(os.environ)
SLOW = (
    "numpy",
    "torch",
    "PIL.Image",
    "yaml",
    "safetensors.torch",
    "scipy.stats",
    "scipy.ndimage",
    "scipy.optimize",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "sklearn.model_selection",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "torch.utils.tensorboard",
    "wandb",
)  # imports that pay when the first child has needed them

# patch: (file, old, new)
Attempt = namedtuple("Attempt", "tests patch limit bug", defaults=(None, LIMIT, None))
# cases: {test: passed, failed, error or skipped}; seconds of processor time
Outcome = namedtuple("Outcome", "verdict tail cases seconds")


# ---- a copy
def patched(text, old, new, where):
    "The text with the one occurrence of `old` replaced; Python must still compile."
    times = text.count(old)
    if times != 1:
        raise SystemExit(f"{where}: {old!r} occurs {times} times, and must occur once")
    text = text.replace(old, new)
    if where.endswith(".py"):
        compile(text, where, "exec")
    return text


def snapshot(root, folder):
    "What tests may need, without stored runs. Bytecode comes along: Python holds it against the sources."
    folder.mkdir()
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=LEFT_OUT)
        elif source.exists():
            shutil.copy2(source, folder)


def write_anew(path, text):
    "A new file in the place of a hard link, with the same mode."
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    shutil.copymode(path, fresh)
    fresh.replace(path)


def plant(folder, file, old, new):
    path = folder / file
    for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        stale.unlink()
    write_anew(path, patched(path.read_text(encoding="utf-8"), old, new, file))


def stamps(folder):
    "{file: (time, size)}; what is written through a hard link changes it."
    found = {}
    for p in folder.rglob("*"):
        if p.is_file():
            found[p] = (p.stat().st_mtime_ns, p.stat().st_size)
    return found


# ---- in the child
def inside(path, folder):
    return path.startswith(f"{folder}{os.sep}") or path == str(folder)


def of_checkout(path):
    "Whether a file is the checkout's own, and not of an environment that lies in it."
    return inside(path, ROOT) and not inside(path, sys.prefix)


def files_of_modules():
    "[(name, file)] of all modules that were imported from files."
    files = {name: getattr(module, "__dict__", {}).get("__file__") for name, module in [*sys.modules.items()]}
    return [(name, file) for name, file in files.items() if isinstance(file, str)]


def strangers(folder):
    "Modules of sdcourse and of the tests that do not come from the copy."
    outside = [(name, file) for name, file in files_of_modules() if not inside(file, folder)]
    return [name for name, file in outside if name.split(".")[0] == "sdcourse" or of_checkout(file)]


def environment(folder):
    "As at the start of this process, for the package in `folder`."
    kept = {k: v for k, v in STARTED_WITH.items() if not k.startswith("PYTEST")}
    return kept | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Said:
    "A pytest plugin that keeps how each part of each test ended."

    def __init__(self):
        self.parts = []

    def pytest_runtest_logreport(self, report):
        self.parts.append((report.nodeid, report.when, report.outcome))

    def pytest_collectreport(self, report):
        if not report.passed:
            self.parts.append((report.nodeid, "collect", report.outcome))


def become(folder):
    """Look like a Python that was just started in `folder`: nothing of the checkout is imported or on the
    path.
    """
    os.environ.clear()
    os.environ.update(environment(folder))
    named = STARTED_WITH.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [str(folder), *(p for p in sys.path if p and p not in named and not of_checkout(p))]
    for name, file in files_of_modules():
        if of_checkout(file):
            del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()


def run_tests(work, tests):
    "pytest in this process, on the copy; what it says goes into a file."
    import pytest

    folder = work / "copy"
    become(folder)
    said = Said()
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={folder}", f"--basetemp={work / 'tmp'}"]
    if len(tests) == 1:
        options.append("-x")
    sys.argv = ["pytest", *options, *tests]
    code = int(pytest.main([*options, *tests], plugins=[said]))
    slow = [name for name in SLOW if name in sys.modules]
    words = {"parts": said.parts, "strangers": strangers(folder), "slow": slow}
    (work / "said.json").write_text(json.dumps(words), encoding="utf-8")
    return code


def child(work, tests, fork):
    "Never returns: what the forked process does, with its output in a file."
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    out = os.open(work / "out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(work / "copy")
    if not fork:
        os.execve(sys.executable, [sys.executable, __file__, str(work), *tests], environment(work / "copy"))
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)
    code = run_tests(work, tests)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- between
def children():
    "Pids of the processes whose parent is this one."
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(state[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def adopt():
    "What loses its parent becomes a child of this process, which ends when its own parent does."
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def end_all(group):
    "Kill a process group, and then everything that it left behind."
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while left := children():
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def code_of(pid):
    "The exit code of a child; what was adopted and ends before it is reaped, as PID 1 would do."
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status) & 255


def watch(work, attempt, fork):
    "Fork the child, wait for it, end what it leaves behind; its exit code."

    def late(*_):
        raise TimeoutError

    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    adopt()
    signal.signal(signal.SIGALRM, late)
    pid = os.fork()
    if not pid:
        guarded(child, work, attempt.tests, fork)
    signal.alarm(attempt.limit)
    try:
        return code_of(pid)
    except TimeoutError:
        return LATE
    finally:
        signal.alarm(0)
        end_all(pid)


def guarded(work, *args):
    "Never returns: a forked process that fails must not go on as its parent would."
    code = 125
    try:
        code = work(*args)
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


# ---- here
def warm():
    'Import pytest and its plugins, but nothing of the checkout; why nothing can be forked from here, or "".'
    if sys.platform != "linux":
        return "not on Linux"
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "IN_TEST": "1",
        "MPLBACKEND": "agg",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
    }  # as in conftest.py: an import reads them
    import pytest

    quiet = ("--collect-only", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull)
    with tempfile.TemporaryDirectory() as empty, redirect_stdout(io.StringIO()):
        pytest.main([*quiet, f"--rootdir={empty}", empty])
    return preload(())


def preload(names):
    "Import what is slow to import, as sdcourse would: torchvision comes after its guard; see `warm`."
    spec = importlib.util.spec_from_file_location("guard_of_the_parent", ROOT / "sdcourse" / "guard.py")
    guard = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(guard)
    finder = guard.Finder()
    sys.meta_path.insert(0, finder)
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)
    sys.meta_path.remove(finder)
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    return "" if threads == 1 else f"{threads} threads after {', '.join(names)}"


def read_said(work):
    "What pytest's child has left, or {}."
    path = work / "said.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def judge(work, said, code, limit):
    "(verdict, last lines, cases): passed, failed, or what went wrong."
    tail = "\n".join((work / "out").read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
    if code == LATE:
        return f"no end within {limit} s", tail, {}
    if not said:
        return f"pytest exit code {code}", tail, {}
    if said["strangers"]:
        return "the copy is not what is imported", f"{said['strangers'][:5]}\n{tail}", {}
    cases = {}
    for test, when, outcome in said["parts"]:
        if outcome == "failed" and when != "call":
            cases[test] = "error"
        elif outcome != "passed" or when == "call":
            cases[test] = outcome
    ends = [*cases.values()]
    errors = ends.count("error")
    if code == 0 and "passed" in ends:
        return "passed", tail, cases
    if code == 1 and "failed" in ends and not errors:
        return "failed", tail, cases
    if ends and {*ends} == {"skipped"}:
        return "skipped", tail, cases
    return f"not a failing test (exit code {code}, {errors} errors)", tail, cases


class Lanes:
    "At most `n` attempts at a time, each in a copy of the checkout as it was at the beginning."

    def __init__(self, n, fork, root=ROOT):
        self.n = n
        self.fork = fork
        self.slow = set()  # what children have imported
        self.root = root
        self.begun = 0
        self.running = {}  # pid: (attempt, folder)
        self.doubtful = set()  # those that ran while the snapshot was written to

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="mutants-")).resolve()
        self.master = self.folder / "master"
        self.spare = self.folder / "spare"
        snapshot(self.root, self.master)
        snapshot(self.master, self.spare)
        self.stamps = stamps(self.master)
        return self

    def __exit__(self, *_):
        for pid in self.running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for pid in self.running:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def takes(self, attempt):
        "Whether it may begin now: clusters beside each other make each other's jobs late."
        alone = [a for a, _ in self.running.values() if needs_cluster(a.tests)]
        return len(self.running) < self.n and not (alone and needs_cluster(attempt.tests))

    def begin(self, attempt):
        self.begun += 1
        if missing := [n for n in SLOW if self.fork and n in self.slow and n not in sys.modules]:
            self.preload(missing)
        work = self.folder / str(self.begun)
        shutil.copytree(self.master, work / "copy", copy_function=os.link)
        if attempt.patch:
            plant(work / "copy", *attempt.patch)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            guarded(watch, work, attempt, self.fork)
        self.running[pid] = (attempt, work)

    def preload(self, names):
        self.slow -= {*names}  # those that cannot be imported are not tried again
        if why := preload(names):
            print(f"each test starts a Python from here on: {why}", flush=True)
            self.fork = False

    def end(self):
        "(attempt, outcome) of the one that ends first."
        pid, status, used = self.wait()
        attempt, work = self.running.pop(pid)
        said = read_said(work)
        found = judge(work, said, os.waitstatus_to_exitcode(status), attempt.limit)
        self.slow.update(said.get("slow", ()))
        shutil.rmtree(work, ignore_errors=True)
        self.mend()
        if pid not in self.doubtful:
            return attempt, Outcome(*found, used.ru_utime + used.ru_stime)
        self.doubtful.remove(pid)
        self.begin(attempt)
        return self.end()

    def wait(self):
        "(pid, status, usage) of the first of ours that is done."
        while True:
            for pid in self.running:
                if (done := os.wait4(pid, os.WNOHANG))[0]:
                    return done
            time.sleep(0.02)

    def mend(self):
        "Write anew what a test wrote to through a hard link; whatever ran beside it has to run again."
        spoilt = [p for p, stamp in stamps(self.master).items() if self.stamps[p] != stamp]
        for path in spoilt:
            path.unlink()
            shutil.copy2(self.spare / path.relative_to(self.master), path)
            self.stamps[path] = (path.stat().st_mtime_ns, path.stat().st_size)
        if spoilt:
            self.doubtful.update(self.running)


def needs_cluster(tests):
    return any("test_slurm" in t for t in tests)


if __name__ == "__main__":
    sys.exit(run_tests(Path(sys.argv[1]), sys.argv[2:]))

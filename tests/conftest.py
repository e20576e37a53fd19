"""Every test runs offline, on one thread, on the package that lies beside this folder."""

import os, signal, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT / "tests" / "offline"


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background


def first(path, *rest):
    return os.pathsep.join(
        dict.fromkeys(
            [*map(str, (path, *rest)), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        )
    )


os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "IN_TEST": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": first(OFFLINE, ROOT),
}  # child processes: the same package, the same block
for key in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(key, None)
for folder in (OFFLINE, ROOT / "tools", ROOT):  # the last one comes first
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import runpy

runpy.run_path(str(OFFLINE / "sitecustomize.py"))

import hypothesis
import pytest
import sdcourse
from share import pytest_addoption, pytest_configure  # noqa: F401

if Path(sdcourse.__file__).resolve().parent != ROOT / "sdcourse":
    raise RuntimeError(f"the tests of {ROOT} would test {sdcourse.__file__}")


# The same examples everywhere: a property test fails in a change that breaks it, or never.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(autouse=True)
def one_thread():
    "A test that changes the number of threads does not change it for the next one."
    yield
    torch = sys.modules.get("torch")
    if torch and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """`smoke(task)`: (words, what a fresh Python said that was started with them, its seconds of processor
    time, its run folder) of thirty steps, as a reader starts them, made once per session.
    """
    found = {}

    def of(task):
        if task not in found:
            out = tmp_path_factory.mktemp(task) / "run"
            words = ["-m", "sdcourse.train", task, "--preset", "tiny", "--max-steps", "30", "--out", str(out)]
            found[task] = (words, *spent(words), out)
        return found[task]

    return of


def spent(words):
    "(process, seconds of processor time) of a fresh Python that has ended, with what it said."
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen([sys.executable, *map(str, words)], stdout=out, stderr=err)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        said = [f.seek(0) or f.read() for f in (out, err)]
    return subprocess.CompletedProcess(words, child.returncode, *said), used.ru_utime + used.ru_stime


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """`built(make, **options)`: the folder that `make(folder, **options)` fills, made once per session. Who
    changes one, changes a copy.
    """
    from sdcourse.models.files import quiet

    home, states = tmp_path_factory.mktemp("built"), {}

    def state(folder):
        return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}

    def of(make, **options):
        folder = home / "-".join([make.__name__, *(f"{k}={v}" for k, v in options.items())])
        if folder not in states:
            with quiet():  # a bar would be among the errors of the test that came first
                make(folder, **options)
            states[folder] = state(folder)
        return folder

    yield of
    changed = [folder.name for folder, before in states.items() if state(folder) != before]
    assert not changed, f"a test changed what others read: {changed}"

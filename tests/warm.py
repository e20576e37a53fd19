"""Processes that run our code and need not import torch again: they are forked from one parent that has done
so.

`start(argv)` is `subprocess.Popen([sys.executable, *argv])` and `run(argv)` is `subprocess.run(…)` for a
script, `-m module` or `-c code`, with an environment, a folder, files for what it says and a session of its
own. It ends as Python ends, but for the second in which Python takes all modules to pieces. `first` holds
imports that the parent makes before it forks; what it does not name the child imports itself. The parent is
started when it is first asked for and has one thread (a fork of a process whose OpenMP threads have run
hangs); it ends with whoever started it, and all its children with it. What tests how a process starts
(torchrun, `python -m`, a signal during imports, an import that must not be heavy) does not belong here.
"""

import atexit, importlib, json, os, runpy, select, signal, socket, subprocess, sys, tempfile, threading, types
from pathlib import Path

LOOP = """
import torch, torch._dynamo # the compiler is imported in the first step of any optimizer: 3 s
import psutil, sdcourse.engine.loop, PIL.Image
from sdcourse.engine.preflight import peak_flops
# measured once, on one thread
for dtype in (torch.float32, torch.float64): peak_flops(torch.device("cpu"), dtype)
"""
MODELS = (
    LOOP
    + """
import sdcourse.models.home, sdcourse.models.dit
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer
"""
)
LIMIT = 120  # seconds that a child may take: less than half the limit of a test, and ten times what most take
LONG = 280  # for those that train for real
MOST = 1 << 20  # bytes of a request


class Child:
    "As much of `subprocess.Popen` as tests need."

    def __init__(self, argv, env, cwd, first):
        self.args, self.returncode = [str(a) for a in argv], None
        self._said = [tempfile.TemporaryFile() for _ in range(2)]
        ours, theirs = os.pipe()
        self._status = os.fdopen(ours, "rb", buffering=0)
        request = dict(
            argv=self.args, env={str(k): str(v) for k, v in env.items()}, cwd=str(cwd), first=first
        )
        try:
            socket.send_fds(
                _parent().socket, [json.dumps(request).encode()], [*(f.fileno() for f in self._said), theirs]
            )
        finally:
            os.close(theirs)
        self.pid = self._hear()

    def _hear(self):
        "The next number that the parent says of this child."
        said = self._status.read(8)
        if not said:
            raise RuntimeError(f"the parent of warm processes has ended: {_parent().last_words()}")
        return int.from_bytes(said, "little", signed=True)

    def poll(self):
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = self._hear()
        return self.returncode

    def wait(self, timeout=LIMIT):
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout=LIMIT):
        self.wait(timeout)
        return self.said(), self.said(1)

    def said(self, which=0):
        "What is in its stdout, or in its stderr (1), by now."
        return os.pread(self._said[which].fileno(), os.fstat(self._said[which].fileno()).st_size, 0).decode(
            errors="replace"
        )

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(argv, *, env=None, cwd=None, first=LOOP):
    "A process on its way; what it says is kept in files."
    return Child(argv, os.environ if env is None else env, os.getcwd() if cwd is None else cwd, first)


def run(argv, *, timeout=LIMIT, check=False, **how):
    "A process that has ended, with its output as text."
    child = start(argv, **how)
    try:
        said = child.communicate(timeout)
    finally:
        child.kill()
    if check and child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args, *said)
    return subprocess.CompletedProcess(child.args, child.returncode, *said)


# ---- the parent, seen from a test
class Parent:
    def __init__(self):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.errors = tempfile.TemporaryFile()
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=env,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                start_new_session=True,
            )

    def last_words(self):
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-800:]


_parents = {}  # by process: a forked test starts its own


def _parent():
    if os.getpid() not in _parents:
        _parents[os.getpid()] = Parent()
    return _parents[os.getpid()]


# ---- the parent itself
def serve(asked):
    "Fork a child for each request and say how each one ends; returns (request, its files) in the child."
    alive = {}  # pidfd: (pid, pipe)
    while True:
        ready, _, _ = select.select([asked, *alive], [], [])
        for fd in [fd for fd in ready if fd in alive]:
            pid, status = alive.pop(fd)
            tell(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os.close(fd)
            os.close(status)
        if asked not in ready:
            continue
        data, files, _, _ = socket.recv_fds(asked, MOST, 3)
        if not data:
            for pid, _ in alive.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        request, (out, err, status) = json.loads(data), files
        prepare(request["first"])
        if (pid := os.fork()) == 0:
            for fd in [asked.detach(), status, *alive, *(pipe for _, pipe in alive.values())]:
                os.close(fd)
            return request, (out, err)
        os.close(out)
        os.close(err)
        tell(status, pid)
        alive[os.pidfd_open(pid)] = pid, status


def tell(status, number):
    "To somebody who may have left."
    try:
        os.write(status, number.to_bytes(8, "little", signed=True))
    except BrokenPipeError:
        pass


def prepare(first):
    "What fails here fails again in the child, where somebody sees it."
    try:
        exec(first, {})
    except Exception:
        pass


def become(request, out, err):
    "Be the process that was asked for."
    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    what, *rest = request["argv"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if what == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    if what == "-c":
        sys.path[0], sys.argv, code = "", ["-c", *rest[1:]], compile(rest[0], "<string>", "exec")
    else:
        sys.path[0], sys.argv, code = (
            str(Path(what).resolve().parent),
            [what, *rest],
            compile(Path(what).read_text(encoding="utf-8"), what, "exec"),
        )
        main.__file__ = what
    importlib.invalidate_caches()
    exec(code, main.__dict__)


def leave(request, files):
    "Run, and end with the code of Python."
    code = 0
    try:
        become(request, *files)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
    except BaseException as e:
        code = 1
        sys.excepthook(type(e), e, e.__traceback__)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    leave(*serve(socket.socket(fileno=int(sys.argv[1]))))

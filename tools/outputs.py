"""Run notebooks as nbdev_test does, and keep their outputs.

    python tools/outputs.py write [NB ...]
        run and store outputs: of the named notebooks, or of all whose code changed since their last run
    python tools/outputs.py check [NB ...]
        run the named notebooks, or all, and compare: texts exactly, pictures by kind
    python tools/outputs.py stale [NB ...]
        run nothing: name those whose code changed since their last run, and outputs that should not be kept

A run leaves the hash of the code cells in the notebook's metadata (`sdcourse.code`). Each notebook runs in a
process of its own.
"""

import hashlib, json, os, re, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 3600  # seconds: a notebook that hangs
UNWANTED = {  # what a stored text must not hold
    "an absolute path": r"(?<![\w.:/~-])/(?:home|root|work|Users|tmp|var|usr|opt|mnt|private|data)/[\w.]",
    "a progress bar": r"\r|\b(?:it/s|s/it)\b|[█▏▎▍▌▋▊▉]",
    "a wall time": r"\bWall time\b|\bCPU times\b|\bin \d+(?:\.\d+)? ?(?:s|sec|seconds|ms)\b",
    "a memory address": r"\bat 0x[0-9a-f]{6,}",
}


def notebooks(names=()):
    "The named notebooks, or all that nbdev exports and tests."
    if names:
        return [Path(n).resolve() for n in names]
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [p for p in found if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def code_hash(nb):
    "SHA-256 of the code cells."
    cells = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()


def texts(output):
    "The texts in one output."
    data = output.get("data", {})
    parts = [
        output.get("text", ""),
        *(v for k, v in data.items() if k.startswith("text/")),
        output.get("traceback", ""),
    ]
    return ["".join(p) for p in parts if p]


def unwanted(nb):
    "What in the stored outputs a reader elsewhere could not reproduce, one line each."
    for i, cell in enumerate(nb["cells"]):
        for out in cell.get("outputs", []):
            if out["output_type"] == "error":
                yield f"cell {i}: an error ({out.get('ename')})"
            if out.get("name") == "stderr":
                yield f"cell {i}: text on stderr ({texts(out)[0][:80]!r})"
            for text in texts(out):
                for what, pattern in UNWANTED.items():
                    m = re.search(pattern, text)
                    if m:
                        yield f"cell {i}: {what} ({text[max(0, m.start() - 20) : m.end() + 20]!r})"


def stale(path):
    "Why the stored outputs of one notebook cannot be trusted, one line each."
    nb = load(path)
    if nb["metadata"].get("sdcourse", {}).get("code") != code_hash(nb):
        yield "its code changed since its outputs were stored"
    yield from unwanted(nb)


def run_here(path):
    "Run a notebook in this process by nbdev_test's rules; {cell id: outputs} of the cells that ran."
    os.environ["IN_TEST"] = "1"
    sys.path.insert(0, str(ROOT))
    from execnb.shell import CaptureShell
    from fastcore.basics import str2bool
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    os.chdir(path.parent)
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if str2bool(getattr(nb, "frontmatter_", {}).get("skip_exec", False)):
        return {}
    flags = set(get_config().tst_flags.split())
    shell, ran = CaptureShell(path), {}

    def skip(cell):
        if cell.cell_type != "code" or "nbdev_export" + "(" in cell.source:
            return True
        marks = getattr(cell, "directives_", None) or {}
        if marks.get("eval:", [""])[0].lower() == "false" or flags & marks.keys():
            return True
        cell["outputs"], ran[cell.id] = [], cell  # a cell that says nothing any more keeps nothing

    try:
        shell.run_all(nb, exc_stop=True, preproc=skip)
    except BaseException:
        raise SystemExit(shell.prettytb(fname=path.name))
    return {i: list(c.get("outputs", [])) for i, c in ran.items()}


def run(path):
    "The notebook at `path` after a run in a fresh process, clean; None when a cell failed."
    env = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(ROOT / "build" / "mpl"),
        **os.environ,
    }
    out = ROOT / "build" / f"outputs-{os.getpid()}.json"
    out.parent.mkdir(exist_ok=True)
    try:
        done = subprocess.run([sys.executable, __file__, "one", str(path), str(out)], env=env, timeout=LIMIT)
        if done.returncode:
            return None
        outputs = load(out)
    except subprocess.TimeoutExpired:
        return print(f"{path.name}: stopped after {LIMIT} s", file=sys.stderr)
    finally:
        out.unlink(missing_ok=True)
    nb = load(path)
    for cell in nb["cells"]:
        if cell["id"] in outputs:
            cell["outputs"] = outputs[cell["id"]]
    return cleaned(nb)


def cleaned(nb):
    "As nbdev_clean leaves it, with the hash of its code and a kernel that JupyterLab need not ask for."
    from nbdev.clean import clean_nb

    clean_nb(nb, allowed_metadata_keys=["sdcourse"], clean_ids=True)
    nb["metadata"].pop("jupytext", None)
    nb["metadata"] |= {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
        "sdcourse": {"code": code_hash(nb)},
    }
    return nb


def stable(output):
    "What of an output must be the same in every run."
    data = output.get("data", {})
    return [
        output["output_type"],
        output.get("name"),
        "".join(output.get("text", "")),
        {k: "".join(v) if k in ("text/plain", "text/markdown") else k for k, v in data.items()},
    ]


def differences(old, new):
    "One line for each cell whose stored outputs differ from a new run's."
    for i, (a, b) in enumerate(zip(old["cells"], new["cells"])):
        x, y = ([stable(o) for o in c.get("outputs", [])] for c in (a, b))
        if x != y:
            yield f"cell {i}: stored {str(x)[:300]}\n         now    {str(y)[:300]}"


def one(path, out):
    "In the child process: run and hand the outputs over."
    ran = run_here(Path(path).resolve())
    from execnb.nbio import nb2dict

    Path(out).write_text(json.dumps(nb2dict(ran)), encoding="utf-8")


def main(mode, *names):
    if mode == "one":
        return one(*names)
    bad = 0
    for path in notebooks(names):
        where, start, said = path.relative_to(ROOT), time.time(), []
        if mode == "stale":
            said = list(stale(path))
        elif mode == "check" or names or any(stale(path)):
            print(f"-- {where}", flush=True)
            new = run(path)
            if new is None:
                said = ["did not run to its end"]
            elif mode == "check":
                said = list(differences(load(path), new))
            else:
                from execnb.nbio import write_nb, dict2nb

                write_nb(dict2nb(new), path)
                said = list(unwanted(new))
            print(f"   {time.time() - start:.0f} s", flush=True)
        for line in said:
            print(f"{where}: {line}", file=sys.stderr, flush=True)
        bad += bool(said)
    print(f"{bad} notebooks to look at" if bad else "outputs are fresh" if mode != "write" else "done")
    return int(bad > 0)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("write", "check", "stale", "one"):
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))

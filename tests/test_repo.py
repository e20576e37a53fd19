"""The repository: one source for every value, nothing generated out of step, sizes within their budgets,
nothing that is unsafe or that holds only on one machine.
"""

import ast, base64, json, os, re, shutil, signal, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings, strategies

import budgets, in_step, lock, outputs, page, readme

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = outputs.notebooks()
MODULES = budgets.modules()
TASKS = [
    n
    for n, p in MODULES.items()
    if "class Task" in p.read_text(encoding="utf-8") and n != "sdcourse.engine.loop"
]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def cfg():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


# ---- one source
def test_settings_agree():
    assert not list(in_step.settings(ROOT))


def test_a_drift_is_found(tmp_path):
    for f in ("settings.ini", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / f, tmp_path)
    (tmp_path / "sdcourse").mkdir()
    shutil.copy(ROOT / "sdcourse/__init__.py", tmp_path / "sdcourse")
    assert not list(in_step.settings(tmp_path))
    changes = {
        "pyproject.toml": ('requires-python = ">=3.11"', 'requires-python = ">=3.9"'),
        "sdcourse/__init__.py": ('__version__ = "', '__version__ = "9'),
        "constraints.txt": ("\nnumpy==", "\nnumpie=="),
        "settings.ini": ("requirements = torch>=", "requirements = unheard-of torch>="),
    }
    for name, (old, new) in changes.items():
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
        assert len(list(in_step.settings(tmp_path))) == 1, name
        (tmp_path / name).write_text(text, encoding="utf-8")


def test_constraints_are_plain_and_satisfy_settings():
    from packaging.requirements import Requirement

    lines = [
        l
        for l in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not l.startswith("#")
    ]
    pinned = dict(l.split("==") for l in lines)
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.!]+", l) for l in lines), (
        "name==version, without hash, index or local version"
    )
    assert pinned["torch"] == "2.13.0" and pinned["nbdev"] == "2.4.14" and len(lines) == len(pinned) > 150
    for key in cfg():
        for req in map(Requirement, cfg()[key].split() if key.endswith("requirements") else ()):
            assert pinned[re.sub(r"[-_.]+", "-", req.name).lower()] in req.specifier, req


def test_setup_reads_settings(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version", "--license", "--url"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed here; pip brings its own")
    assert done.stdout.split()[-4:] == [cfg()["lib_name"], cfg()["version"], "Apache-2.0", cfg()["git_url"]]


def test_package_imports_only_what_it_declares():
    "Every package that a module imports comes with the base install or with an extra."
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    declared = {
        re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", r)[0]).lower()
        for k in cfg()
        if k.endswith("requirements")
        for r in cfg()[k].split()
    }
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for top in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"sdcourse"}:
                have = {d.lower().replace("_", "-") for d in owners.get(top, [top])}
                assert have & declared, f"{name} imports {top}, which settings.ini does not ask for"


# ---- nothing out of step, and the checks can fail
@pytest.fixture
def tree(tmp_path):
    "A small checkout: two notebooks and the modules they export."
    for name in ("90_core", "check/00_check"):
        (tmp_path / f"nbs/{name}").parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"nbs/{name}.ipynb", tmp_path / f"nbs/{name}.ipynb")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "sdcourse").mkdir()
    (tmp_path / "sdcourse/__init__.py").write_text('__version__ = "0.0.0"\n')
    (tmp_path / "sdcourse/by_hand.py").write_text("x = 1\n")
    assert not list(in_step.nbdev(tmp_path, "nbdev_export")) and not list(
        in_step.nbdev(tmp_path, "nbdev_clean")
    )
    return tmp_path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_export_in_step(tree):
    assert in_step.export(tree) == []
    edit(tree / "sdcourse/core.py", "difflib", "DIFFLIB")
    assert in_step.export(tree) == ["sdcourse/core.py: not what its notebook exports (make sync)"]
    edit(tree / "sdcourse/core.py", "DIFFLIB", "difflib")
    (tree / "sdcourse/old.py").write_text(f"# {in_step.MARKER}\n")
    assert in_step.export(tree) == ["sdcourse/old.py: no notebook exports it"]
    (tree / "sdcourse/old.py").unlink()
    (tree / "sdcourse/check/__init__.py").unlink()
    assert in_step.export(tree) == ["sdcourse/check/__init__.py: not what its notebook exports (make sync)"]


def test_names_and_layout(tree):
    for folder in ("tools", "tests"):
        (tree / folder).mkdir()
    (tree / "setup.py").write_text("")
    shutil.copy(ROOT / "pyproject.toml", tree)
    assert list(in_step.ruff(tree)) == []
    (tree / "tools/a.py").write_text("x = no_such_name\n")
    assert [line.split(":")[0] for line in in_step.ruff(tree)] == ["tools/a.py"]
    (tree / "tools/a.py").write_text("if 1: x = 1\n")
    (tree / "sdcourse/by_hand.py").write_text("if 1: x = 1\n")
    assert [line.split(":")[0] for line in in_step.ruff(tree)] == ["tools/a.py"]


def test_notebooks_clean(tree):
    assert in_step.clean(tree) == []
    path = tree / "nbs/90_core.ipynb"
    nb = json.loads(path.read_text(encoding="utf-8"))
    next(c for c in nb["cells"] if c["cell_type"] == "code")["execution_count"] = 7
    path.write_text(json.dumps(nb), encoding="utf-8")
    assert in_step.clean(tree) == ["nbs/90_core.ipynb: not clean (make sync)"]


def stored(outputs_=(), source="1 + 1"):
    nb = {
        "cells": [
            {"cell_type": "code", "id": "a", "source": [source], "outputs": list(outputs_)},
            {"cell_type": "markdown", "id": "b", "source": ["words"]},
        ],
        "metadata": {},
    }
    nb["metadata"]["sdcourse"] = {"code": outputs.code_hash(nb)}
    return nb


def stale(tmp_path, nb):
    (tmp_path / "x.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    return list(outputs.stale(tmp_path / "x.ipynb"))


def test_stale_outputs_are_found(tmp_path):
    nb = stored()
    assert stale(tmp_path, nb) == []
    nb["cells"][1]["source"] = ["other words"]
    assert stale(tmp_path, nb) == []
    nb["cells"][0]["source"] = ["1 + 2"]
    assert stale(tmp_path, nb) == ["its code changed since its outputs were stored"]


@pytest.mark.parametrize(
    "text, what",
    [
        ("saved to /" + "home/me/x.png", "an absolute path"),
        ("50%|███  | 5/10 [00:01, 4.9it/s]", "a progress bar"),
        ("trained in 12.3 s", "a wall time"),
        ("<Foo at 0x7f12345678>", "a memory address"),
    ],
)
def test_outputs_of_one_machine_are_found(tmp_path, text, what):
    said = stale(tmp_path, stored([{"output_type": "stream", "name": "stdout", "text": [text]}]))
    assert said and all(s.startswith(f"cell 0: {what}") for s in said)
    assert stale(
        tmp_path, stored([{"output_type": "execute_result", "data": {"text/plain": [text]}, "metadata": {}}])
    )
    assert stale(tmp_path, stored([{"output_type": "stream", "name": "stderr", "text": ["a warning"]}]))
    assert stale(tmp_path, stored([{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]))
    harmless = (
        "runs/x/samples.png, 3/10 of the classes, t in [0, 1], loss 0.123, https://example.org/home/page"
    )
    assert not stale(tmp_path, stored([{"output_type": "stream", "name": "stdout", "text": [harmless]}]))


def test_a_run_stores_what_nbdev_test_sees(tmp_path):
    "Outputs are written for cells that run, kept for cells that are skipped, and compared text by text."
    nb = {
        "cells": [
            {
                "cell_type": "code",
                "id": "a",
                "metadata": {},
                "execution_count": 3,
                "outputs": [],
                "source": ["import os\n", "os.environ.get('IN_TEST'), 6 * 7"],
            },
            {
                "cell_type": "code",
                "id": "b",
                "metadata": {},
                "execution_count": 4,
                "outputs": [{"output_type": "stream", "name": "stdout", "text": ["kept"]}],
                "source": ["#| eval: false\n", "raise ValueError"],
            },
        ],
        "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    folder = ROOT / "build" / f"nb-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        path = folder / "x.ipynb"
        path.write_text(json.dumps(nb), encoding="utf-8")
        assert outputs.main("write", str(path)) == 0 and outputs.main("check", str(path)) == 0
        new = outputs.load(path)
        assert (
            new["cells"][0]["outputs"][0]["data"]["text/plain"] == ["('1', 42)"]
            and new["cells"][1]["outputs"] == nb["cells"][1]["outputs"]
        )
        assert (
            new["metadata"]["kernelspec"]["name"] == "python3"
            and not list(outputs.stale(path))
            and new["cells"][0]["execution_count"] is None
        )
        edit(path, "('1', 42)", "('1', 43)")
        assert outputs.main("check", str(path)) == 1
        edit(path, "6 * 7", "6 * no_such_name")
        before = path.read_bytes()
        assert outputs.main("write", str(path)) == 1 and path.read_bytes() == before
    finally:
        shutil.rmtree(folder)


def test_readme_of_cells():
    nb = {
        "cells": [
            {
                "cell_type": "markdown",
                "source": ["# T\n", "[a](00_x.ipynb) [b](../LICENSE) [c](https://e.org/x.ipynb)"],
            },
            {"cell_type": "code", "source": ["#| hide\n", "secret"], "outputs": []},
            {
                "cell_type": "code",
                "source": ["1 + 1"],
                "outputs": [{"output_type": "execute_result", "data": {"text/plain": ["2"]}}],
            },
        ]
    }
    text = "# T\n[a](nbs/00_x.ipynb) [b](LICENSE) [c](https://e.org/x.ipynb)"
    code = "```python\n1 + 1\n```\n\n```text\n2\n```\n"
    assert readme.render(nb) == f"{readme.MARK}\n\n{text}\n\n{code}"


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [l for l in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#|mailto:", l)]
    assert links and not [l for l in links if not (ROOT / l.split("#")[0]).exists()]
    assert "make train" in text and "make test" in text


def broken_links(nb):
    "Links in the text of a notebook that lead to no file."
    cells = json.loads(nb.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    links = [
        l.split("#")[0] for l in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#|mailto:", l)
    ]
    return [l for l in links if not (nb.parent / l).exists()]


def test_links_of_notebooks_lead_somewhere(tmp_path):
    found = {str(p.relative_to(ROOT)): broken_links(p) for p in (ROOT / "nbs").rglob("*.ipynb")}
    assert not {k: v for k, v in found.items() if v}
    moved = tmp_path / "moved.ipynb"
    moved.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["[a](gone.ipynb#b)"]}]}))
    assert broken_links(moved) == ["gone.ipynb"]


# ---- make
def make(*args):
    "As a person would call it, also when this runs under a `make` that hands its flags down."
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    env = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    }
    return subprocess.run(["make", *args], cwd=ROOT, env=env, capture_output=True, text=True)


def test_make_help_names_every_target():
    rules = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert rules <= set(re.findall(r"(?m)^  make (\w+)", make("help").stdout))


def test_old_python_is_refused_in_one_line(tmp_path):
    "Nothing is created, and the one line says what to do."
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$1" in -V) echo "Python 3.8.1" ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["sh", str(ROOT / "tools/env.sh"), str(tmp_path / "a b/.venv"), ""],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(old)},
    )
    assert done.returncode == 1 and done.stdout == ""
    what = f"Python 3.11 or newer is needed, and {old} is Python 3.8.1"
    assert done.stderr == f"error: {what}: install one, or say PYTHON=/path/to/python\n"
    assert not (tmp_path / "a b").exists()


# ---- the log
def entries():
    "(file, heading, body) of every entry of log/, the newest file first."
    for path in sorted((ROOT / "log").glob("*.md"), reverse=True):
        for entry in re.split(r"(?m)^## ", path.read_text(encoding="utf-8"))[1:]:
            heading, _, body = entry.partition("\n")
            yield path, heading, body


def test_entries_of_the_log():
    for path, heading, body in entries():
        date, _, finding = heading.partition(" · ")
        assert re.fullmatch(path.stem + r"-\d\d", date), heading
        assert 10 <= len(finding) <= 110, heading
        told = finding.removesuffix(" (negative)").removesuffix(" (status)")
        assert not re.search(r"\((negative|status)|[\s.:]$", told, re.IGNORECASE), heading
        assert len(body.split()) > 5, heading
        assert max(map(len, body.splitlines())) <= 200, heading


def test_headings_of_the_log_tell_its_story():
    "Newest first, none twice; `make log` prints them, and LOG.md names every file."
    headings = [heading for _, heading, _ in entries()]
    findings = {heading.partition(" · ")[2] for heading in headings}
    dates = [heading[:10] for heading in headings]
    assert len(findings) == len(headings) > 100
    assert dates == sorted(dates, reverse=True)
    assert make("log").stdout.splitlines() == headings
    text = (ROOT / "LOG.md").read_text(encoding="utf-8")
    assert all(f"(log/{path.name})" in text for path, _, _ in entries())


def test_a_page_shows_what_a_learner_reads(tmp_path):
    """Text, code, outputs; each figure is a file; what is hidden stays out, and pictures of the text are
    found.
    """
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg=="
    code = dict(cell_type="code", metadata={}, execution_count=None)
    figure = dict(output_type="display_data", data={"image/png": dot}, metadata={})
    cells = [
        dict(cell_type="markdown", id="a", metadata={}, source="# Why\n![a](pictures/a.png)"),
        code | dict(id="b", source="#| hide\nsecret = 1", outputs=[]),
        code | dict(id="c", source="shown = 2", outputs=[figure]),
    ]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"")
    (tmp_path / "x.ipynb").write_text(
        json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    )
    page.main([str(tmp_path / "x.ipynb"), str(tmp_path / "out")])
    text = (tmp_path / "out/x.html").read_text(encoding="utf-8")
    [picture] = (tmp_path / "out/x_files").iterdir()
    assert picture.name == "x_001_0.png"
    assert picture.read_bytes() == base64.b64decode(dot) and f"x_files/{picture.name}" in text
    assert "Why" in text and "shown" in text and "secret" not in text
    assert (tmp_path / "pictures/a.png").as_uri() in text


# ---- sizes of files (DESIGN 8)
def test_notebook_sizes():
    assert len(NOTEBOOKS) > 50 and not {
        name_of(p): n for p in NOTEBOOKS if (n := p.stat().st_size) > budgets.MOST["notebook"]
    }


def test_weights_size():
    sizes = {
        p: p.stat().st_size
        for p in (ROOT / "sdcourse").rglob("*")
        if p.suffix in (".safetensors", ".bin", ".pt", ".npz")
    }
    assert sum(sizes.values()) <= budgets.MOST["weights"]


# ---- nothing unsafe, nothing of one machine
ABSOLUTE = r"(?<![\w.:/])/(?:home|root|work|Users|mnt)/\w"
UNSAFE = {
    "an absolute path": ABSOLUTE,
    "a pickle": (
        r"\bpickle\.loads?\(|\bimport pickle\b|weights_only\s*=\s*False"
        r"|allow_pickle\s*=\s*True|joblib\.load"
    ),
    "a fixed device": r"\.cuda\(\)|torch\.device\([\"']cuda(:\d+)?[\"']\s*\)|map_location\s*=\s*[\"']cuda",
    "a shell install": r"(?m)^\s*[!%]\s*pip ",
}


def texts(path):
    "The text of a file; for a notebook the sources and the texts of its outputs."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8", errors="replace")
    nb = outputs.load(path)
    return "\n".join(
        ["".join(c["source"]) for c in nb["cells"]]
        + [t for c in nb["cells"] for o in c.get("outputs", []) for t in outputs.texts(o)]
    )


def unsafe(text):
    return {what: m.group(0) for what, pattern in UNSAFE.items() if (m := re.search(pattern, text))}


def test_nothing_unsafe():
    said = [f"x = /{'home'}/me/x", "pickle.load(f)", "x.cuda()", "!pip install x"]
    assert [list(unsafe(s)) for s in said] == [[what] for what in UNSAFE]  # each pattern finds what it is for
    assert not {name_of(p): found for p in (*NOTEBOOKS, *MODULES.values()) if (found := unsafe(texts(p)))}


def test_no_absolute_paths_elsewhere():
    files = [
        p
        for d in ("tests", "tools", ".ci", "slurm", "data_manifests", "log")
        for p in (ROOT / d).rglob("*")
        if p.is_file() and p.suffix != ".pyc" and p != Path(__file__).resolve()
    ]
    files += [
        ROOT / f for f in ("README.md", "LOG.md", "Makefile", "settings.ini", "setup.py", "constraints.txt")
    ]
    assert not {
        str(p): m.group(0)
        for p in files
        if (m := re.search(ABSOLUTE, p.read_text(encoding="utf-8", errors="replace").replace("/home/me", "")))
    }  # a test may speak of an invented home


def test_torch_load_takes_weights_only():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(
                    k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
                ), name


def imports(path):
    "{package: its first import, as (cell, line)} of a notebook."
    first = {}
    for i, cell in enumerate(c for c in outputs.load(path)["cells"] if c["cell_type"] == "code"):
        for j, line in enumerate("".join(cell["source"]).splitlines()):
            if m := re.match(
                r"(?:import|from)\s+(sdcourse|diffusers|transformers|torchvision|lpips|pytorch_fid)\b", line
            ):
                first.setdefault(m[1], (i, j))
    return first


def test_sdcourse_is_imported_before_vision_libraries():
    "In notebooks: the torchvision guard must be in place first."
    found = {name_of(p): imports(p) for p in NOTEBOOKS}
    heavy = {
        name: [where for package, where in first.items() if package != "sdcourse"]
        for name, first in found.items()
    }
    assert sum(map(bool, heavy.values())) > 5
    assert not [
        name
        for name, first in found.items()
        if heavy[name] and first.get("sdcourse", (9999, 0)) > min(heavy[name])
    ]


# ---- the command line without torch
def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("argv", [["--help"], ["prepare", "--help"], ["cache"], ["train", "--help"]])
def test_help_needs_no_torch(argv):
    done = run(
        f"import sys; from sdcourse.cli import main; code = main({argv}); "
        "print(code, 'torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    assert done.stdout.splitlines()[-1] == "0 False False", done.stderr


def test_nearest_verb():
    done = run("import sys; from sdcourse.cli import main; sys.exit(main(['docter']))")
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: unknown verb 'docter': did you mean 'doctor'?\n",
    )


def test_every_row_of_the_table_can_be_called():
    """Functions and options exist, a function takes what stands in its row, and every class of options
    refuses by itself.
    """
    import inspect
    from sdcourse.cli import VERBS, WORDS, choices
    from sdcourse.config import Options, notes
    from sdcourse.core import named

    for verb, row in VERBS.items():
        assert row.text, verb
        if not row.call:
            assert choices(verb), verb
            continue
        call, names = named(row.call), row.places.removesuffix(" …").split()
        given = [[]] if row.options == WORDS else [*names, *["options"] * bool(row.options)]
        inspect.signature(call).bind(*given, **dict(flag=None) if row.through else {})
        if row.through:
            assert callable(named(row.through))
        if row.options in ("", WORDS):
            continue
        options = named(f"{row.call.partition(':')[0]}:{row.options}")
        assert issubclass(options, Options) and all(notes(options).values()), verb


def test_what_a_verb_gets(monkeypatch):
    "Places one by one, or as a list; checked options; the exit code is the function's."
    import types
    from dataclasses import dataclass
    from sdcourse import cli
    from sdcourse.config import Options, Positive
    from sdcourse.core import UserError

    @dataclass
    class Toy(Options):
        size: Positive[int] = 1  # pixels

        def check(self):
            super().check()
            if self.size == 13:
                raise UserError("--size 13: is refused")

    got = []

    def call(*given):
        got.append(given)
        return 5

    def through(function, *given):
        return function("first", *given)

    monkeypatch.setitem(sys.modules, "toy_verbs", types.SimpleNamespace(Toy=Toy, call=call, through=through))
    rows = {
        "one": ("IN OUT", "Toy", ""),
        "many": ("IN …", "Toy", ""),
        "none": ("", "", ""),
        "by": ("OUT", "Toy", "toy_verbs:through"),
        "raw": ("TASK", cli.WORDS, ""),
    }
    for name, (places, options, by) in rows.items():
        monkeypatch.setitem(cli.VERBS, name, cli.Verb("a toy", places, "toy_verbs:call", options, by))
    for line in ("one a b --size 3", "many a b c", "none", "by a", "raw --help x"):
        assert cli.run(line.split()) == 5
    assert got == [
        ("a", "b", Toy(3)),
        (["a", "b", "c"], Toy()),
        (),
        ("first", "a", Toy()),
        (["--help", "x"],),
    ]
    for line, words in (
        ("one a", "expected IN OUT"),
        ("one a b c", "expected IN OUT"),
        ("many", "expected IN …"),
        ("none x", "expected no words"),
        ("none --size 3", "there are no options"),
        ("one a b --size 0", "--size 0: must be greater than 0"),
        ("one a b --size 13", "is refused"),
        ("one a b --sise 3", "did you mean '--size'"),
    ):
        with pytest.raises(UserError, match=words):
            cli.run(line.split())
    assert len(got) == 5


# ---- doctor
def test_doctor_reports(capsys):
    from sdcourse import cli

    assert cli.run(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in (
        "torch ",
        "not the tested version",
        "torchvision",
        "cpu",
        "memory",
        "offline mode  ",
        "on (HF_HUB_OFFLINE)",
        "jupyter kernel",
        "lacking",
    ):
        assert word in said, word


def test_doctor_finds_other_versions_and_missing_packages(tmp_path, monkeypatch):
    from sdcourse.commands import doctor
    from importlib.metadata import version

    lock = tmp_path / "constraints.txt"
    lock.write_text(f"torch=={version('torch').split('+')[0]}\nnumpy==0.1\nnever-heard-of==1.0\n")
    assert doctor.report(lock)["not the tested version"] == [f"numpy {version('numpy')}, tested with 0.1"]
    monkeypatch.setattr(
        doctor,
        "requires",
        lambda name: [
            "torch>=2.8",
            "never-heard-of>=1",
            "nor-of-this[all]; extra == 'track'",
            'nor-that==1; python_version > "3" and extra == "track"',
        ],
    )
    assert doctor.missing_packages()["00 what diffusion is"] == (["never-heard-of"], "")
    assert doctor.missing_packages()["trackers (--tracker)"] == (
        ["never-heard-of", "nor-of-this", "nor-that"],
        "track",
    )
    assert any(
        line.startswith(
            "trackers (--tracker): never-heard-of nor-of-this nor-that   (pip install -c constraints.txt -e"
        )
        for line in doctor.report(lock)["lacking"]
    )
    assert doctor.doctor() == 1


def test_doctor_names_extras_that_exist():
    from sdcourse.commands import doctor

    assert all(doctor.needed(extra) for extra in doctor.LESSONS.values())


# ---- nbdev_test's word is not enough
def test_false_passes_of_nbdev_test_are_seen():
    import test as tool  # tools/test.py

    assert Path(tool.__file__).parent == ROOT / "tools"
    a, b = Path("nbs/a.ipynb"), Path("nbs/b.ipynb")
    ran = ["Starting nbs/a.ipynb", "- Completed nbs/a.ipynb", "- Completed nbs/b.ipynb"]
    assert tool.judge(0, [*ran, "Success."], [a, b]) == (2, [])
    assert tool.judge(0, ["No files were eligible for testing"], [a, b]) == (
        0,
        ["nbs/a.ipynb: not run", "nbs/b.ipynb: not run"],
    )
    assert tool.judge(0, [*ran[:2], "Success."], [a, b]) == (1, ["nbs/b.ipynb: not run"])
    assert tool.judge(0, ran, [a, b])[1] == ["nbdev_test: exit code 0, no success line"]
    assert tool.judge(3, [*ran, "Success."], [a, b])[1] == ["nbdev_test: exit code 3, success line"]
    failed = [*ran, "", "nbdev Tests Failed On The Following Notebooks:", "=" * 50, "\ta.ipynb"]
    assert tool.judge(1, failed, [a, b]) == (1, ["a.ipynb: failed"])
    assert tool.expected() == NOTEBOOKS


def test_the_last_line_counts_what_ran(tmp_path, monkeypatch, capsys):
    import test as tool

    monkeypatch.setattr(tool, "RESULTS", tmp_path)

    def last():
        return tool.total(), capsys.readouterr().out.splitlines()[-1]

    assert last() == (1, "0 passed, 4 failed")
    tool.keep("check", 0, 0)
    tool.keep("notebooks", 20, 0)
    tool.keep("tests", 100, 0, skipped=2)
    assert last() == (1, "120 passed, 1 failed")  # the tests that read a clock left no result
    tool.keep("alone", 3, 0)
    assert last() == (0, "123 passed, 0 failed")
    tool.keep("mutants", 0, 1, caught=24, total=25, names=["survived: one"])
    assert tool.total() and capsys.readouterr().out.splitlines()[-2:] == [
        "  survived: one",
        "123 passed, 1 failed",
    ]


def test_what_failed_is_named_with_its_error():
    import test as tool

    report = """<testsuite><testcase classname="tests.test_a" name="test_b"/>
    <testcase classname="tests.test_a" name="test_c"><failure message="assert 1 == 2&#10;more"/></testcase>
    <testcase classname="tests.test_a" name="test_d"><error message="broke"/></testcase></testsuite>"""
    found = tool.red(ElementTree.fromstring(report))
    assert found == ["tests.test_a::test_c: assert 1 == 2", "tests.test_a::test_d: broke"]


def test_property_tests_are_the_same_everywhere():
    "A random example would be red in a change that has nothing to do with it, and a planted bug green."
    seen = []

    @settings(max_examples=20)
    @given(strategies.integers())
    def run(number):
        seen.append(number)

    run()
    first = seen[:]
    seen.clear()
    run()
    assert len(first) == 20 and seen == first


def test_what_hangs_is_ended_and_what_is_slow_is_not(monkeypatch, capsys):
    import test as tool

    monkeypatch.setattr(tool, "SILENCE", 3.0)
    code = "import subprocess, sys, time\nfor i in range(5): print(i, flush=True); time.sleep(.9)\n{}"
    slow = tool.stream([sys.executable, "-c", code.format("")], "nb")
    assert slow == (0, ["0", "1", "2", "3", "4"]) and "nb| 4" in capsys.readouterr().out
    child = 'subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])'  # it has the pipe, too
    assert tool.stream([sys.executable, "-c", code.format(child)], "nb")[0] == -signal.SIGKILL


def test_every_pin_is_for_the_oldest_python():
    """A pin that wants a newer patch of Python stops the whole installation there; pip says only that
    versions conflict.
    """
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    from importlib.metadata import PackageNotFoundError, version

    def here(name):
        try:
            return version(name).split("+")[0] == pins[name]
        except PackageNotFoundError:
            return False

    same = [n for n in pins if here(n)]
    assert len(same) > 40 and lock.too_new(same) == []

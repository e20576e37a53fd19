"""A folder of the package is a floor: it knows only those below it, and no two modules know each other.
Imports inside functions count, and so do names that tables hold as text (`sdcourse.x.y:z`); the table of
verbs alone may name everything, for it imports nothing before a verb is typed.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdcourse"
KNOWS = {  # from the ground up: floor or module at the top, and what it may know
    "": "guard",
    "guard": "",
    "core": "",
    "config": "core",
    "plot": "core",
    "diffusion": "core",
    "cli": "core config",
    "engine": "core config",
    "data": "core config engine",
    "data.sets": "core config plot data",
    "models": "core config diffusion data.sets",
    "dataset": "core engine data data.sets",
    "cache": "core config engine data data.sets models dataset",
    "evaluation": "core config plot engine data data.sets models dataset cache",
    "caption": "core config engine data data.sets models dataset cache evaluation",
    "attention": "core",
    "train": "core config plot diffusion cli engine data data.sets models dataset cache evaluation",
    "commands": "core config guard plot engine data models dataset cache evaluation attention train",
    "check": "config diffusion data models train",
}
ABOVE_ALL = "cli"  # whose table names every verb


def modules():
    "{dotted name: file}, without the index that nbdev keeps."
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name != "_modidx":
            found[re.sub(r"\.?__init__$", "", name)] = path
    return found


def floor(module):
    "The folder, or the module itself at the top."
    return module if module in KNOWS else module.rpartition(".")[0]


def named_in(module, path, known):
    "Modules of the package that a module imports, anywhere in it, or names in a text."
    parts = ["sdcourse", *module.split(".")] if module else ["sdcourse"]
    home = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*home[: len(home) + 1 - node.level], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            names = [base, *(f"{base}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and module != ABOVE_ALL:
            names = re.findall(r"(?<!\w)(sdcourse(?:\.\w+)+):\w", node.value)
        else:
            continue
        for name in names:
            name = name.removeprefix("sdcourse").removeprefix(".")
            if name in known and name not in ("", module):
                yield name


@cache
def arrows():
    "{module: modules that it knows}."
    known = modules()
    return {name: frozenset(named_in(name, path, known)) for name, path in known.items()}


def test_the_table_goes_from_the_ground_up():
    below = []
    for name, knows in KNOWS.items():
        assert {*knows.split()} <= {*below, "guard"}, name
        below.append(name)


def test_no_arrow_leads_up():
    up = [
        f"{a} -> {b}"
        for a, found in arrows().items()
        for b in found
        if floor(a) != floor(b) and floor(b) not in KNOWS[floor(a)].split()
    ]
    assert not up


def test_no_floor_has_leave_that_it_does_not_use():
    used = {(floor(a), floor(b)) for a, found in arrows().items() for b in found}
    assert not {(a, b) for a, knows in KNOWS.items() for b in knows.split()} - used


def test_no_circle():
    left = dict(arrows())
    while free := [a for a, found in left.items() if not found & left.keys()]:
        for a in free:
            del left[a]
    assert not left, "each of these leads to a circle, or is in one"


def exported():
    "{notebook, without suffix: the module that it exports}."
    found = {}
    for path in sorted((ROOT / "nbs").rglob("[!.]*.ipynb")):
        text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
        name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        if module := re.search(r"#\| default_exp (\S+)", text):
            found[name] = module[1]
    return found


def test_notebooks_lie_where_their_modules_lie():
    "NN_name.ipynb exports name.py, and the folders are the same; a lesson at the top exports into its floor."
    special = {"check.check": "check.__init__", "train.main": "train.__main__"}
    for name, module in exported().items():
        if re.fullmatch(r"0\d[ab]?_\w+", name):
            continue  # a lesson
        place = re.sub(r"(^|/)\d\d_", r"\1", name).replace("/", ".")
        assert special.get(place, place) == module, name


def test_readme_shows_a_line_for_each_module():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"(?m)^  - \[\w+\]\(nbs/(\S+)\.ipynb\): \S", text)
    assert sorted(shown) == sorted(exported())

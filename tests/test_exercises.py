"""Every exercise works both ways: the stub fails as "not done yet", the solution passes, a typical wrong
answer gets its own hint.
"""

import ast, json, re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = sorted((ROOT / "sdcourse/check").glob("lesson*.py"))


def lesson_of(check):
    "The notebook in nbs/ that `check.lesson06a` belongs to."
    found = list((ROOT / "nbs").glob(f"{check.stem.removeprefix('lesson')}_*.ipynb"))
    assert len(found) == 1, f"{check.stem}: {len(found)} lessons with this number"
    return found[0]


def cells(notebook):
    "The sources of the code cells that may run."
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    found = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    return [s for s in found if not re.search(r"(?m)^#\|\s*eval:\s*false|^[%!]", s)]


def exercises(check):
    "The names ex1, ex2 … that a check module defines."
    tree = ast.parse(check.read_text(encoding="utf-8"))
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and re.fullmatch(r"ex\d+", n.name)]


def hints_of(check):
    "The sentences in the lists `hints=[(wrong function, hint), …]` of a check module."
    tree = ast.parse(check.read_text(encoding="utf-8"))
    lists = [n.value for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "hints"]
    return [ast.literal_eval(pair.elts[1]) for each in lists for pair in each.elts]


def is_import(source):
    body = ast.parse(source).body
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def calls(source, name):
    "The calls `….ex1(answer)` in a source."
    return [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == name
    ]


@cache
def lesson(notebook):
    "(imports, code cells) of a lesson."
    all_ = cells(notebook)
    return [s for s in all_ if is_import(s)], all_


def stub_of(notebook, name):
    """The cell that defines the stub and the call that asks for the verdict, which stands in it or in the
    next cell.
    """
    _, code = lesson(notebook)
    asked = [(i, c) for i, s in enumerate(code) for c in calls(s, name)]
    assert len(asked) == 1, f"{notebook.name}: {name} is asked {len(asked)} times"
    i, call = asked[0]
    stub = next((s for s in (code[i], code[max(i - 1, 0)]) if "raise NotImplementedError" in s), None)
    assert stub, f"{notebook.name}: no stub before {name}"
    return stub, call


@cache
def solved(notebook):
    "The names that a solutions notebook leaves when it has run from top to bottom."
    space = {"__name__": "solutions"}
    for source in cells(notebook):
        exec(compile(source, notebook.name, "exec"), space)
    return space


PAIRS = [pytest.param(c, name, id=f"{c.stem}-{name}") for c in CHECKS for name in exercises(c)]


def test_there_are_exercises():
    assert CHECKS
    for check in CHECKS:
        assert 4 <= len(exercises(check)) <= 8 and exercises(check) == [
            f"ex{i + 1}" for i in range(len(exercises(check)))
        ], check.stem


def test_every_stub_is_asked_for():
    "A stub without a check would never tell the learner anything."
    for check in CHECKS:
        code = "\n".join(lesson(lesson_of(check))[1])
        assert len(re.findall(r"raise NotImplementedError", code)) == len(exercises(check)), check.stem


@pytest.mark.parametrize("check, name", PAIRS)
def test_a_stub_is_not_done_yet(check, name):
    notebook = lesson_of(check)
    stub, call = stub_of(notebook, name)
    space = {"__name__": "lesson"}
    for source in lesson(notebook)[0]:
        exec(compile(source, notebook.name, "exec"), space)
    exec(compile(stub, notebook.name, "exec"), space)
    verdict = eval(compile(ast.Expression(call), notebook.name, "eval"), space)
    assert not verdict.ok and "not done yet" in verdict.text


@pytest.mark.parametrize("check, name", PAIRS)
def test_a_solution_passes_and_a_wrong_answer_gets_its_hint(check, name):
    import importlib

    notebook = ROOT / "nbs/solutions" / lesson_of(check).name
    assert notebook.exists(), f"no solutions for {check.stem}"
    space, ask = solved(notebook), getattr(importlib.import_module(f"sdcourse.check.{check.stem}"), name)
    right, wrong = space[f"answer{name[2:]}"], space[f"wrong{name[2:]}"]
    assert ask(right).ok, ask(right).text
    verdict = ask(wrong)
    assert not verdict.ok and "Hint: " in verdict.text, verdict.text
    source = "\n".join(cells(notebook))
    assert re.search(rf"assert check\.{name}\(answer\d+\)\.ok", source) and re.search(
        rf"assert not check\.{name}\(wrong\d+\)\.ok and", source
    )


def test_hints_differ():
    "Two mistakes of one lesson are not answered with the same sentence."
    for check in CHECKS:
        hints = hints_of(check)
        assert len(hints) >= len(exercises(check)) and len(hints) == len(set(hints)), check.stem

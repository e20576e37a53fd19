"""A line of code says one thing: at most 110 characters, 140 for docments and rows of data; functions have
one subject; a public name is defined once.
"""

import ast
import json
from collections import defaultdict
from pathlib import Path

import budgets
import outputs

ROOT = Path(__file__).resolve().parent.parent
TWICE = {  # public names that may be defined more than once, and why
    "Config": "of each task",
    "Task": "of each task, and the engine's",
    "PRESETS": "of each task",
    "USAGE": "of each task's card",
}
SEVERAL = set(TWICE)


def is_data(node):
    "Whether an expression is a table: constants and names, and containers and calls of them."
    if isinstance(node, (ast.Constant, ast.Name, ast.Attribute)):
        return True
    if isinstance(node, ast.Dict):
        return all(is_data(v) for v in [*filter(None, node.keys), *node.values])
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return all(map(is_data, node.elts))
    if isinstance(node, ast.Call):
        return all(map(is_data, [node.func, *node.args, *(k.value for k in node.keywords)]))
    if isinstance(node, ast.BinOp):
        return is_data(node.left) and is_data(node.right)
    return isinstance(node, ast.UnaryOp) and is_data(node.operand)


def may_be_longer(tree, lines):
    "Numbers of lines with docments, and of lines of tables in a module or class."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found |= {n for n in range(node.lineno, node.body[0].lineno) if " # " in lines[n - 1]}
        for child in getattr(node, "body", []) if isinstance(node, (ast.Module, ast.ClassDef)) else []:
            own = range(child.lineno, child.end_lineno + 1)
            if isinstance(child, ast.AnnAssign):
                found |= {n for n in own if " # " in lines[n - 1]}
            if isinstance(child, (ast.Assign, ast.AnnAssign)) and child.value and is_data(child.value):
                found |= set(own)
    return found


def too_long(source):
    "(number of a line, its characters) beyond what it may have."
    lines = source.split("\n")
    longer = may_be_longer(ast.parse(source), lines)
    for n, line in enumerate(lines, 1):
        if len(line) > (140 if n in longer else budgets.MOST["line"]) and not line.startswith("# AUTOGEN"):
            yield n, len(line)


def code_of(notebook):
    "(id, code) of each cell, without magics."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%%"):
            lines = source.split("\n")
            yield cell["id"], "\n".join("" if x.lstrip().startswith(("%", "!")) else x for x in lines)


def test_lines_of_notebooks():
    found = [
        f"{nb.relative_to(ROOT)}: cell {cell}, line {n}: {size} characters"
        for nb in outputs.notebooks()
        for cell, source in code_of(nb)
        for n, size in too_long(source)
    ]
    assert not found, "\n".join(found)


def test_lines_of_tests_and_tools():
    files = [p for folder in ("tests", "tools") for p in sorted((ROOT / folder).glob("*.py"))]
    found = [
        f"{p.relative_to(ROOT)}:{n}: {size} characters"
        for p in files
        if p.name != "planted.py"  # a table of texts to be found and replaced
        for n, size in too_long(p.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_functions_have_one_subject():
    found = [
        f"{module}.{name}: {nodes} AST nodes"
        for module, path in budgets.modules().items()
        for name, nodes in budgets.functions(path.read_text(encoding="utf-8"))
        if nodes > budgets.MOST["nodes"]
    ]
    assert not found, "\n".join(found)


def test_a_public_name_is_defined_once():
    homes = defaultdict(list)
    for module, path in budgets.modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in ast.literal_eval(node.value):
                    homes[name].append(module)
    twice = {name: found for name, found in homes.items() if len(found) > 1}
    exercises = {name for name in twice if name.startswith("ex") and name[2:].isdigit()}
    unknown = {name: found for name, found in twice.items() if name not in exercises | SEVERAL}
    assert not unknown and len(SEVERAL) <= 10


def test_what_is_too_long_is_found():
    table = f"ROWS = {{\n    {'x' * 120!r}: 1,\n}}\n"
    docment = f"def f(\n    x, # {'y' * 115}\n):\n    return x\n"
    code = f"def f(x):\n    return x + {'z' * 110}\n"
    assert not list(too_long(table)) and not list(too_long(docment)) and list(too_long(code)) == [(2, 125)]
    assert list(too_long(docment.replace("y" * 115, "y" * 140))) and list(too_long(f"# {'w' * 120}\n"))


def test_cells_of_lessons():
    "At most 30 lines, unless a cell is one class; what stands around the class counts."
    lessons = [p for p in outputs.notebooks() if p.parent == ROOT / "nbs" and p.name[0] == "0"]
    found = []
    for nb in lessons:
        for cell, source in code_of(nb):
            classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
            longest = max((n.end_lineno - n.lineno + 1 for n in classes), default=0)
            rest = len(source.split("\n")) - longest
            if max(rest, rest + longest if longest < 15 else 0) > 30:
                found.append(f"{nb.name}: cell {cell} has {rest + longest} lines")
    assert len(lessons) >= 7 and not found, "\n".join(found)

"""Sizes and start-up times beside their budgets.   python tools/budgets.py

Sizes are gated by tests/test_repo.py, which uses the counts below. Times are printed and never a test: a busy machine is no defect.

A *code line* is a line that holds code: blank lines, comments alone on their line, docstrings and the `__all__` that nbdev writes do
not count, and a signature is one line, however many lines its documented parameters take. The *engine* is what
`sdcourse.train.loop` and `python -m sdcourse.train` import from this package, directly or not, as far as its notebook lies in nbs/engine: a task is
not part of it, and neither are the table of verbs and a lesson's own module (`sdcourse.dist` is that of lesson 09).
"""
import ast, io, os, subprocess, sys, time, tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ("sdcourse.train.loop", "sdcourse.train.__main__")
DOOR = "sdcourse.cli" # the table of verbs, through which `python -m sdcourse.train` goes too
MOST = {"engine": 1200, "task": 300, "module": 400, "function": 25, "notebook": 600 * 1024, "weights": 24 * 2**20}
TIMES = { # command: (arguments, seconds)
    "import sdcourse": (["-c", "import sdcourse"], 0.3),
    "sdcourse --help": (["-c", "import sys; from sdcourse.cli import main; sys.exit(main(['--help']))"], 1.0),
    "python -m sdcourse.train --help": (["-m", "sdcourse.train", "--help"], 1.0),
    "python -m sdcourse.train flow_dit --help": (["-m", "sdcourse.train", "flow_dit", "--help"], 2.5),
}


def code_lines(source):
    "The numbers of the lines that hold code."
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): docs |= set(range(node.lineno + 1, node.body[0].lineno))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__": docs |= set(range(node.lineno, node.end_lineno + 1))
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {n for t in tokens if t.type not in skip for n in range(t.start[0], t.end[0] + 1)} - docs


def modules(root=ROOT):
    "Dotted name -> path of every module of the package, but nbdev's index."
    found = {}
    for p in sorted((root / "sdcourse").rglob("*.py")):
        parts = p.relative_to(root).with_suffix("").parts
        if p.name != "_modidx.py": found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = p
    return found


def imported(name, path, known):
    "The modules of this package that a module imports, at its top or inside its functions."
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name in known)
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (n for n in (source, *(f"{source}.{a.name}" for a in node.names)) if n in known)


def closure(names, known):
    "All modules that `names` import, themselves included; packages without code do not matter."
    found, queue = set(), [n for n in names if n in known]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += imported(name, known[name], known)
    return found


def engine(known):
    "The modules of the engine, and the lessons' modules that it imports."
    found = closure(ENGINE, known) - {DOOR}
    lessons = {n for n in found if "/engine/" not in known[n].read_text(encoding="utf-8").partition("File to edit:")[2].partition("\n")[0]}
    return found - lessons, {n for n in lessons if code_lines(known[n].read_text(encoding="utf-8"))}


def functions(source):
    "(name, 1 + code lines of the body) of every function."
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): yield node.name, 1 + len(lines & set(range(node.body[0].lineno, node.end_lineno + 1)))


def seconds(argv):
    "The better of three starts."
    env, best = os.environ | {"PYTHONPATH": str(ROOT)}, 1e9
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - start)
    return best


def main():
    known = modules()
    count = {n: len(code_lines(p.read_text(encoding="utf-8"))) for n, p in known.items()}
    own, lessons = engine(known)
    print(f"engine: {sum(count[n] for n in own)} code lines of at most {MOST['engine']}, and {sum(count[n] for n in lessons)} of lessons that it stands on")
    for n in sorted(own | lessons, key=count.get, reverse=True): print(f"  {count[n]:5} {n}{' (a lesson)' if n in lessons else ''}")
    for what, (argv, most) in TIMES.items():
        try: took = seconds(argv)
        except subprocess.CalledProcessError as e: print(f"{what}: failed with exit code {e.returncode}"); continue
        print(f"{what}: {took:.2f} s of at most {most} s{'' if took <= most else '   <-- over'}")


if __name__ == "__main__": main()

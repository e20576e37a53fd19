"""Start-up times and sizes beside their budgets.   python tools/budgets.py

Sizes are told by content, not by lines: lines can be made long. tests/test_repo.py gates files; the rest is
printed. Times are printed and never a test: a busy machine is no defect.
"""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = {"notebook": 600 * 1024, "weights": 48 * 2**20, "nodes": 250, "line": 110}
TIMES = {  # command: (arguments, seconds)
    "import sdcourse": (["-c", "import sdcourse"], 0.3),
    "sdcourse --help": (["-c", "import sys; from sdcourse.cli import main; sys.exit(main(['--help']))"], 1.0),
    "python -m sdcourse.train --help": (["-m", "sdcourse.train", "--help"], 1.0),
    "python -m sdcourse.train flow_dit --help": (["-m", "sdcourse.train", "flow_dit", "--help"], 2.5),
}


def modules(root=ROOT):
    "Dotted name -> path of every module of the package, but nbdev's index."
    found = {}
    for p in sorted((root / "sdcourse").rglob("*.py")):
        parts = p.relative_to(root).with_suffix("").parts
        if p.name != "_modidx.py":
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = p
    return found


def functions(source):
    "(name, AST nodes) of every function."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, sum(1 for _ in ast.walk(node))


def seconds(argv):
    "The best of three starts."
    env, best = os.environ | {"PYTHONPATH": str(ROOT)}, 1e9
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - start)
    return best


def main():
    sources = [p.read_text(encoding="utf-8") for p in modules().values()]
    nodes = [n for source in sources for _, n in functions(source)]
    lines = [len(line) for source in sources for line in source.splitlines()]
    large, long = sum(n > MOST["nodes"] for n in nodes), sum(n > MOST["line"] for n in lines)
    print(f"functions of more than {MOST['nodes']} nodes: {large} of {len(nodes)}")
    print(f"lines of more than {MOST['line']} characters: {long} of {len(lines)}")
    for what, (argv, most) in TIMES.items():
        try:
            took = seconds(argv)
        except subprocess.CalledProcessError as e:
            print(f"{what}: failed with exit code {e.returncode}")
            continue
        print(f"{what}: {took:.2f} s of at most {most} s{'' if took <= most else '   <-- over'}")


if __name__ == "__main__":
    main()

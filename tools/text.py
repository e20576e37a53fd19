"""Edit a notebook as text.   python tools/text.py out NB  -> .nbtext/NAME.py      python tools/text.py in NB  <- .nbtext/NAME.py

The text is jupytext's percent format; it is a working copy and never committed. `in` keeps cell ids and stored outputs, creates
the notebook when it is new, and cleans it. Two notebooks of one name share a text file: edit one at a time.
"""
import subprocess, sys
from pathlib import Path

from nbformat import NO_CONVERT, read, write

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
JUPYTEXT = [sys.executable, "-m", "jupytext", "-q"]


def out(nb):
    "Notebook -> text."
    text = ROOT / ".nbtext" / f"{nb.stem}.py"
    text.parent.mkdir(exist_ok=True)
    subprocess.run([*JUPYTEXT, "--to", "py:percent", "--opt", "cell_metadata_filter=-all", str(nb), "-o", str(text)], check=True)
    print(text.relative_to(ROOT))


def back(nb):
    "Text -> notebook."
    text, kept = ROOT / ".nbtext" / f"{nb.stem}.py", {}
    if nb.exists(): kept = read(nb, NO_CONVERT).metadata.get("sdcourse", {})
    nb.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*JUPYTEXT, *(["--update"] if nb.exists() else []), "--to", "ipynb", str(text), "-o", str(nb)], check=True)
    new = read(nb, NO_CONVERT)
    new.metadata = {"kernelspec": KERNEL, **({"sdcourse": kept} if kept else {})}
    write(new, nb)
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", "--fname", str(nb)], check=True)
    print(nb)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("in", "out"): raise SystemExit(__doc__)
    (back if sys.argv[1] == "in" else out)(Path(sys.argv[2]))

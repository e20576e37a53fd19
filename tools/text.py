"""Edit a notebook as text.

    python tools/text.py out NB  -> .nbtext/…
    python tools/text.py in NB  <- .nbtext/…

The text is jupytext's percent format; it is a working copy and never committed: nbs/engine/00_order.ipynb is
.nbtext/engine/00_order.py. `in` keeps cell ids and stored outputs, creates the notebook when it is new, and
cleans it.
"""

import subprocess, sys
from pathlib import Path

from nbformat import NO_CONVERT, read, write

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
JUPYTEXT = [sys.executable, "-m", "jupytext", "-q"]


def text_of(nb):
    "Where the text of a notebook lies."
    return ROOT / ".nbtext" / nb.resolve().relative_to(ROOT / "nbs").with_suffix(".py")


def out(nb):
    "Notebook -> text."
    text = text_of(nb)
    text.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [*JUPYTEXT, "--to", "py:percent", "--opt", "cell_metadata_filter=-all", str(nb), "-o", str(text)],
        check=True,
    )
    print(text.relative_to(ROOT))


def back(nb):
    "Text -> notebook."
    text, kept = text_of(nb), {}
    if not text.exists():
        raise SystemExit(f"{text.relative_to(ROOT)} is not there: make text NB={nb}")
    if nb.exists():
        kept = read(nb, NO_CONVERT).metadata.get("sdcourse", {})
    nb.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [*JUPYTEXT, *(["--update"] if nb.exists() else []), "--to", "ipynb", str(text), "-o", str(nb)],
        check=True,
    )
    new = read(nb, NO_CONVERT)
    new.metadata = {"kernelspec": KERNEL, **({"sdcourse": kept} if kept else {})}
    write(new, nb)
    subprocess.run(
        [sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", "--fname", str(nb)],
        check=True,
    )
    print(nb)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("in", "out"):
        raise SystemExit(__doc__)
    (back if sys.argv[1] == "in" else out)(Path(sys.argv[2]))

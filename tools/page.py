"""A notebook as one HTML page and its pictures, to be read as a learner would.

    python tools/page.py NB [OUT]

Nothing runs: the stored outputs are shown. The page is OUT/NAME.html and every figure a file in
OUT/NAME_files, in the order of the notebook; OUT is build/page. Cells that say `#| hide` stay out.
"""

import re
import sys
from pathlib import Path

from nbconvert import HTMLExporter
from nbconvert.writers import FilesWriter
from nbformat import NO_CONVERT, read
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = r"(?m)^#\|\s*(hide|include:\s*false)"


def page(path, out):
    "Write the page; its path."
    nb = read(path, NO_CONVERT)
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and re.search(HIDDEN, c.source))]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relinked(cell.source, path.parent)
    names = "{unique_key}_{cell_index:03}_{index}{extension}"  # so that a sorted list is in order
    extract = Config(
        {
            "ExtractOutputPreprocessor": {"enabled": True, "output_filename_template": names},
            "FilesWriter": {"build_directory": str(out)},
        }
    )
    resources = {
        "unique_key": path.stem,
        "output_files_dir": f"{path.stem}_files",
        "metadata": {"name": path.stem},
    }
    body, found = HTMLExporter(config=extract).from_notebook_node(nb, resources)
    FilesWriter(config=extract).write(body, found, notebook_name=path.stem)
    return out / f"{path.stem}.html"


def relinked(text, home):
    "Pictures of the text are looked for where the notebook is."

    def one(m):
        place = home / m[2]
        return f"{m[1]}{place.resolve().as_uri()}{m[3]}" if place.is_file() else m[0]

    return re.sub(r"(!\[[^\]]*\]\()([^)\s]+)(\))", one, text)


def main(argv):
    if not 1 <= len(argv) <= 2 or not argv[0].endswith(".ipynb"):
        raise SystemExit(__doc__)
    path = Path(argv[0])
    if not path.is_file():
        raise SystemExit(f"{path}: no such notebook")
    out = Path(argv[1]) if argv[1:] else ROOT / "build" / "page"
    out.mkdir(parents=True, exist_ok=True)
    written = page(path, out)
    pictures = (
        sum(1 for _ in (out / f"{path.stem}_files").glob("*")) if (out / f"{path.stem}_files").is_dir() else 0
    )
    print(f"{written}: one page, {pictures} pictures")


if __name__ == "__main__":
    main(sys.argv[1:])

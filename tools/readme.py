"""Write README.md from nbs/index.ipynb.   python tools/readme.py [--check]

Markdown cells as they are; code cells as Python blocks with their stored outputs. Cells that say `#| hide` stay out.
"""
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
MARK = "<!-- Written by tools/readme.py from nbs/index.ipynb: change the notebook, then `make readme`. -->"


def fence(text, language):
    "A code block, or nothing for an empty text."
    return f"```{language}\n{text.strip()}\n```" if text.strip() else ""


def shown(output):
    "One stored output as markdown."
    data = output.get("data", {})
    if "text/markdown" in data: return "".join(data["text/markdown"])
    return fence("".join(output.get("text") or data.get("text/plain") or ""), "text")


def block(cell):
    "One cell as markdown."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source.strip()
    if cell["cell_type"] != "code" or re.search(r"(?m)^#\|\s*(hide|include:\s*false)", source): return ""
    code = re.sub(r"(?m)^#\|.*\n?", "", source)
    return "\n\n".join(p for p in [fence(code, "python"), *map(shown, cell.get("outputs", []))] if p)


def render(nb):
    "The whole page. Links are relative to nbs/ there and to the root here."
    page = "\n\n".join(b for b in map(block, nb["cells"]) if b)
    page = re.sub(r"\]\((?!https?:|mailto:|#|\.\./)", "](nbs/", page).replace("](../", "](")
    return f"{MARK}\n\n{page}\n"


def main(argv):
    new = render(json.loads(SOURCE.read_text(encoding="utf-8")))
    if "--check" not in argv: return TARGET.write_text(new, encoding="utf-8") and 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == new: return 0
    print("README.md is not what nbs/index.ipynb says: make readme", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

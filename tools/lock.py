"""Write constraints.txt: what this environment has of the packages of settings.ini and of all that they need.

python tools/lock.py           write it (after an upgrade that the tests have passed with)
"""

import re, sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "3.11.2"  # of the Pythons that every pin must admit: Debian 12 has it
HEAD = """\
# The versions that the tests ran with (Python {python}). \
pip takes it as `-c constraints.txt`: it installs nothing by itself.
# Written by tools/lock.py. No hashes and no index: \
a CPU or a CUDA build of torch has the same version number.
"""


def wanted():
    "All requirement texts of settings.ini."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = ini["DEFAULT"]
    return [r for k in cfg if k == "requirements" or k.endswith("_requirements") for r in cfg[k].split()]


def closure(texts):
    "name -> version of everything installed that `texts` need, directly or not."
    found, queue = {}, [(Requirement(t), ("",)) for t in texts]
    seen = set()
    while queue:
        req, extras = queue.pop()
        if req.marker and not any(req.marker.evaluate({"extra": e}) for e in extras):
            continue
        name = re.sub(r"[-_.]+", "-", req.name).lower()
        mine = ("", *sorted(req.extras))
        if (name, mine) in seen:
            continue
        seen.add((name, mine))
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            print(f"not installed here: {req}", file=sys.stderr)
            continue
        found[name] = dist.version.split("+")[0]
        queue += [(Requirement(r), mine) for r in dist.requires or []]
    return found


def too_new(pins):
    "Pinned packages, as installed here, that the oldest Python cannot have."

    def admits(name):
        return OLDEST in SpecifierSet(distribution(name).metadata["Requires-Python"] or "")

    return [n for n in pins if not admits(n)]


if __name__ == "__main__":
    pins = closure(wanted())
    if odd := too_new(pins):
        sys.exit(f"{', '.join(odd)}: not for Python {OLDEST}; install an older version, then lock again")
    text = HEAD.format(python="%d.%d" % sys.version_info[:2]) + "".join(
        f"{n}=={v}\n" for n, v in sorted(pins.items())
    )
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8")
    print(f"{len(pins)} packages")

"""Build sdcourse from settings.ini, the file that nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
NEEDED = """
lib_name lib_path version min_python license description author author_email keywords git_url status audience requirements
""".split()
STATUS = {"1": "Planning", "2": "Pre-Alpha", "3": "Alpha", "4": "Beta", "5": "Production/Stable"}
SPDX = {"apache2": "Apache-2.0"}


def settings(path):
    "The [DEFAULT] section; only `=` separates, so that a value may hold a colon."
    parser = ConfigParser(delimiters=["="])
    with open(path, encoding="utf-8") as f: parser.read_file(f)
    lacking = [k for k in NEEDED if not parser["DEFAULT"].get(k)]
    if lacking: raise SystemExit(f"settings.ini lacks: {' '.join(lacking)}")
    return parser["DEFAULT"]


cfg = settings(ROOT / "settings.ini")
readme = ROOT / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=SPDX.get(cfg["license"], cfg["license"]),
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {cfg['status']} - {STATUS[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        "Programming Language :: Python :: 3 :: Only",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=[*find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]), f"{cfg['lib_name']}.data_manifests"],
    package_dir={f"{cfg['lib_name']}.data_manifests": "data_manifests"},  # the folder at the top; an installed package carries it inside
    package_data={f"{cfg['lib_name']}.data_manifests": ["*.json"]},
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): cfg[k].split() for k in cfg if k.endswith("_requirements")},
    entry_points={
        "console_scripts": cfg.get("console_scripts", "").split(),
        "nbdev": [f"{cfg['lib_path']} = {cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)

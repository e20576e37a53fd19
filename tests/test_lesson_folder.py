"""Lessons find what they trained while nothing changed on which it depends, and only where they are told to
look.
"""

import json
import shutil
from pathlib import Path

import pytest

import sdcourse
import sdcourse.core as core


@pytest.fixture
def place(tmp_path, monkeypatch):
    "Write a lesson and a package of one module, and ask where the lesson works."
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core, "__file__", str(package / "core.py"))

    def ask(code="train(1)", text="text", module="x = 1", weights=b"w"):
        cells = [
            dict(cell_type="code", source=[code], outputs=[text]),
            dict(cell_type="markdown", source=[text]),
        ]
        Path("lesson.ipynb").write_text(json.dumps(dict(cells=cells)))
        (package / "core.py").write_text(module)
        (package / "model.safetensors").write_bytes(weights)
        return core.lesson_folder("lesson")

    return ask


def test_what_is_found_again(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SDCOURSE_KEEP", str(tmp_path / "kept"))
    first = place()
    (first / "run").mkdir()
    assert place(text="better text") == first and (first / "run").is_dir()
    for change in (dict(code="train(2)"), dict(module="x = 2"), dict(weights=b"v")):
        other = place(**change)
        assert (
            other != first and other.is_dir() and not first.exists()
        )  # what nobody can find again is removed
    monkeypatch.setattr(core, "versions", lambda: dict(torch="9.9"))
    assert place() != first


def test_a_reader_begins_anew(place, monkeypatch):
    monkeypatch.delenv("SDCOURSE_KEEP", raising=False)
    one, two = place(), place()
    assert one != two and one.is_dir() and not any(one.iterdir())
    assert Path(sdcourse.__file__).parent not in one.parents
    shutil.rmtree(one)

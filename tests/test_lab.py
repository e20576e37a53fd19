"""The lessons in a real JupyterLab, in a real browser: Run All ends without an error, and a progress bar is
drawn as a widget.
"""

import json
from pathlib import Path

import pytest

import lab_shot

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
BAR = [
    [
        "from sdcourse.core import progress\n",
        "import time\n",
        "for _ in progress(range(60), desc='sixty'): time.sleep(0.05)",
    ],
    ["6 * 7"],
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "(address, page) of a server on a copy of the lessons."
    pytest.importorskip("playwright.sync_api", reason="NO BROWSER TEST: playwright is not installed")
    if not lab_shot.chromium():
        pytest.skip("NO BROWSER TEST: no chromium here (apt-get install chromium)")
    work, home = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("home")
    lab_shot.copy_of_lessons(work)
    cells = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": s,
        }
        for i, s in enumerate(BAR)
    ]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    (work / "bar.ipynb").write_text(
        json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    cells[1]["source"] = ["1 / 0"]
    (work / "error.ipynb").write_text(
        json.dumps({"cells": cells[1:], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    with lab_shot.jupyter_lab(work, home) as url, lab_shot.browser_page() as page:
        yield url, page


def run_all(lab, path, seconds=500):
    url, page = lab
    lab_shot.open_notebook(page, url, path)
    lab_shot.start_all(page)
    return lab_shot.finish(page, seconds)


def test_an_error_is_seen(lab):
    assert lab_shot.errors(run_all(lab, "error.ipynb")) == ["ZeroDivisionError: division by zero"]


def test_progress_is_a_widget(lab):
    "`tqdm.auto` draws a bar of widgets in JupyterLab, not a line of text on stderr."
    url, page = lab
    lab_shot.open_notebook(page, url, "bar.ipynb")
    lab_shot.start_all(page)
    page.wait_for_selector(".jupyter-widgets .progress-bar, .widget-hprogress", timeout=120_000)
    assert "sixty" in page.locator(".widget-hbox").first.inner_text()
    said = lab_shot.finish(page, 120)
    assert not lab_shot.errors(said) and all(o["kind"] != "stream" for cell in said for o in cell)


@pytest.mark.parametrize("path", ["nbs/check/00_check.ipynb", "nbs/00_diffusion.ipynb"])
def test_a_lesson_runs_from_top_to_bottom(lab, path):
    said = run_all(lab, path)
    assert not lab_shot.errors(said)
    assert not [
        o for cell in said for o in cell if "application/vnd.jupyter.widget-view+json" in o["types"]
    ]  # finished bars are gone
    picture = ROOT / "build/shots" / f"{Path(path).stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    lab[1].screenshot(path=picture)
    assert picture.stat().st_size > 20_000

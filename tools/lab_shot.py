"""Run notebooks in a real JupyterLab in a real browser, and keep pictures of every page.

    python tools/lab_shot.py NB [NB ...]

The pictures are build/shots/NAME-01.png …; the exit code is 1 when a cell ends in an error.

For a reader who wants to see a lesson as a learner does, and for tests/test_lab.py. Needs Chromium (apt-get
install chromium) and the Python package playwright; no browser is downloaded. The notebook runs on a copy, so
nothing in the checkout changes.
"""

import json, os, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "sdcourse"
QUIET = {  # no question about news, no empty page after the last cell, every cell drawn
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {
        "scrollPastEnd": False,
        "windowingMode": "none",
    },
}
ALL_DONE = """() => {
  const models = [...jupyterapp.shell.currentWidget.content.widgets].map(c => c.model);
  const cells = models.filter(m => m.type === 'code' && m.sharedModel.getSource().trim());
  const failed = cells.some(m => m.outputs.toJSON().some(o => o.output_type === 'error'));
  const done = cells.every(m => m.executionCount && m.executionState !== 'running');
  return cells.some(m => m.executionCount) && (failed || done);
}"""
OUTPUTS = """() => {
  const models = jupyterapp.shell.currentWidget.content.widgets.map(c => c.model);
  const told = o => ({
    kind: o.output_type,
    said: o.output_type === 'error' ? o.ename + ': ' + o.evalue : '',
    types: Object.keys(o.data || {}),
  });
  return models.filter(m => m.type === 'code').map(m => m.outputs.toJSON().map(told));
}"""
READY = """async () => {
  const w = jupyterapp.shell.currentWidget;
  await w.context.ready;
  await w.sessionContext.ready;
  await w.sessionContext.session.kernel.info;
}"""
NO_SIDEBAR = """() => {
  const a = jupyterapp;
  if (!a.shell.leftCollapsed) a.commands.execute('application:toggle-left-area');
}"""


def chromium():
    "The path of a browser, or None."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyter_lab(folder, home):
    "A server on `folder` with a home of its own; its address. It ends with the block, kernels included."
    settings = Path(home, ".jupyter/lab/user-settings")
    for name, value in QUIET.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / name).write_text(json.dumps(value))
    port = free_port()
    env = {
        k: v for k, v in os.environ.items() if k not in ("IN_TEST", "MPLBACKEND", "PYTEST_CURRENT_TEST")
    } | {"HOME": str(home), "HF_HUB_OFFLINE": "1"}
    argv = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True",
    ]
    with open(Path(home, "jupyter.log"), "wb") as log:
        server = subprocess.Popen(
            argv,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api?token={TOKEN}", timeout=2).close()
                break
            except OSError:
                time.sleep(0.25)
            if server.poll() is not None:
                raise RuntimeError(Path(home, "jupyter.log").read_text()[-2000:])
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@contextmanager
def browser_page():
    "A page of the system's Chromium."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser.new_page(viewport={"width": 1280, "height": 1400})
        finally:
            browser.close()


def open_notebook(page, url, path):
    "Open a notebook and wait for its kernel: the status bar says idle before there is one."
    page.goto(f"{url}/lab/tree/{path}?token={TOKEN}&reset", wait_until="domcontentloaded")
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext", timeout=60_000)
    page.evaluate(READY)


def start_all(page):
    "Run > Run All Cells, by the menu, as a person does."
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').first.click()


def finish(page, seconds):
    "Wait until every cell has run or one has failed; the outputs of the code cells."
    page.wait_for_function(ALL_DONE, timeout=seconds * 1000)
    return page.evaluate(OUTPUTS)


def errors(outputs):
    return [o["said"] for cell in outputs for o in cell if o["kind"] == "error"]


def shots(page, stem):
    "Pictures of the whole notebook, one screen after the other."
    stem.parent.mkdir(parents=True, exist_ok=True)
    for old in stem.parent.glob(f"{stem.name}-*.png"):
        old.unlink()
    page.evaluate(NO_SIDEBAR)
    page.wait_for_timeout(500)
    area = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer").first
    area.evaluate("e => e.scrollTop = 0")
    for i in range(1, 200):
        page.wait_for_timeout(400)
        page.screenshot(path=f"{stem}-{i:02}.png")
        moved = area.evaluate(
            "e => { const was = e.scrollTop; e.scrollTop += e.clientHeight - 80; return e.scrollTop > was; }"
        )
        if not moved:
            return i


def copy_of_lessons(folder):
    "The notebooks and what lies beside them, to run without changing the checkout."
    shutil.copytree(
        ROOT / "nbs", Path(folder) / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs")
    )


def main(names):
    if not names:
        raise SystemExit(__doc__)
    if not chromium():
        raise SystemExit("no chromium: apt-get install chromium")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    bad = 0
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as work:
        copy_of_lessons(work)
        with jupyter_lab(work, home) as url, browser_page() as page:
            for rel in (Path(n).resolve().relative_to(ROOT) for n in names):
                start = time.time()
                open_notebook(page, url, rel)
                start_all(page)
                said = errors(finish(page, 900))
                stem = ROOT / "build/shots" / "-".join(rel.with_suffix("").parts[1:])
                seconds = time.time() - start
                found = f"{shots(page, stem)} pictures in {stem.parent.relative_to(ROOT)}"
                print(f"{rel}: {seconds:.0f} s, {found}", *said, sep="\n  ", flush=True)
                bad += bool(said)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""The torchvision guard: defines the missing operators only where torchvision's own library does not load."""

import os, subprocess, sys, textwrap

import pytest

NMS = "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def python(code, **env):
    "Run `code` in a fresh process; (exit code, stdout, last line of stderr)."
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ | env
    )
    return done.returncode, done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


@pytest.fixture(scope="module")
def loads():
    "Whether torchvision works here without help."
    code, _, said = python("import torchvision")
    if code:
        assert "operator torchvision::nms does not exist" in said
    return not code


def test_import_works_with_sdcourse(loads):
    code, out, said = python("""
        import sdcourse
        import torchvision, torch
        from sdcourse import guard
        from torchvision.transforms.functional import resize
        resize(torch.zeros(3, 8, 8), [4, 4])
        print(torch.ops.torchvision.nms.default._schema); print(guard.state())""")
    assert code == 0, said
    schema, state = out.splitlines()
    assert schema == NMS
    assert state.startswith("idle" if loads else "defined: nms, qnms")


def test_vision_classes_import():
    code, _, said = python("""
        import sdcourse
        from transformers import CLIPImageProcessor, SiglipImageProcessor, CLIPVisionModel
        from diffusers import AutoencoderKL, DiTPipeline, StableDiffusionPipeline, StableDiffusion3Pipeline
        CLIPImageProcessor(), SiglipImageProcessor()""")
    assert code == 0, said


STUB = """
    import sys
    import sdcourse
    import torch
    from sdcourse import guard
    guard.load_library = lambda folder: {why!r}
    import torchvision
    schemas = [str(s) for s in torch._C._jit_get_all_schemas() if s.name == "torchvision::nms"]
    print(len(guard._kept), guard.state())
"""


def test_nothing_is_defined_where_the_library_loads(tmp_path):
    "A stub of torchvision, and a library that is said to load."
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    code, out, said = python(STUB.format(why=""), PYTHONPATH=path)
    assert code == 0, said
    assert out == "0 idle: torchvision's own library loads"
    code, out, said = python(STUB.format(why="no such symbol"), PYTHONPATH=path)
    assert code == 0, said
    assert out == "1 defined: nms, qnms (torchvision's library does not load: no such symbol)"


def test_operators_declared_by_others_stay():
    code, out, said = python("""
        import torch
        mine = torch.library.Library("torchvision", "DEF")
        mine.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import sdcourse
        from sdcourse import guard
        print(guard.define_operators(), guard.define_operators())""")
    assert (code, out) == (0, "['qnms'] []"), said


def test_late_import_and_absence(tmp_path):
    (tmp_path / "torchvision.py").write_text("")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    code, out, _ = python("import torchvision, sdcourse; print(sdcourse.guard.state())", PYTHONPATH=path)
    assert (code, out) == (0, "off: torchvision was imported before sdcourse")
    code, out, _ = python("""
        import sdcourse, importlib.util
        print(importlib.util.find_spec('no_such_module'), sdcourse.guard.state())""")
    assert (code, out) == (0, "None waiting: torchvision has not been imported")


def test_a_failing_guard_lets_the_import_go_on(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("here = True")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    code, out, said = python(
        """
        import sdcourse
        from sdcourse import guard
        guard.prepare = lambda folder: 1 / 0
        import torchvision
        print(torchvision.here, guard.state())""",
        PYTHONPATH=path,
    )
    assert (code, out) == (0, "True failed: ZeroDivisionError: division by zero"), said


def test_import_is_light():
    "`import sdcourse` brings no torch, no numpy, and one finder, however often it is installed."
    code, out, _ = python("""
        import sys
        import sdcourse
        sdcourse.guard.install()
        sdcourse.guard.install()
        heavy = [m for m in ("torch", "numpy", "diffusers", "torchvision") if m in sys.modules]
        print(heavy, sum(type(f).__name__ == "Finder" for f in sys.meta_path))""")
    assert (code, out) == (0, "[] 1")

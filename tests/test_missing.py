"""U5: weights that are not there, or want a licence accepted, are one line before anything heavy is imported;
what lies on the disk wins, and nobody asks the network.
"""

import json
import os
import subprocess
import sys

import pytest

from sdcourse.core import UserError
from sdcourse.models import files

# who asks for an address or connects is written down and refused; nothing forbids to ask the hub
CODE = """
import json, sys, time
asked = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        asked.append(event)
        raise OSError("no network")
sys.addaudithook(hook)
import torch
torch_there = time.process_time() # of the whole process, its start included
before = time.process_time()
from sdcourse.cli import main
code, found = [], []
for words in json.loads(sys.argv[1]):
    begin = time.process_time()
    code.append(main(words))
    found.append(time.process_time() - begin)
heavy = {"diffusers", "transformers", "peft", "accelerate", "datasets"} & set(sys.modules)
whole = time.process_time() - before
print(json.dumps([code, found, sorted(heavy), asked, whole, time.process_time() / torch_there]))
"""
FULL = [["train", "sd15", "--preset", p] for p in ("full", "onepiece", "8gb", "24gb")]
OTHERS = [
    ["train", "flow_dit", "--data", "{data}", "--vae", "stabilityai/sd-vae-ft-ema"],
    ["train", "flow_dit", "--preset", "full"],
    ["train", "sd15", "--preset", "tiny", "--model", "nowhere/at-all"],
    ["cache", "latents", "{data}", "{out}", "--model", "owner/gated"],
    ["cache", "prompts", "{data}", "{out}", "--model", "owner/gated"],
    ["cache", "features", "{data}", "{out}", "--model", "owner/gated"],
    ["generate", "owner/gated", "{out}"],
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from test_fill import pictures

    return pictures(tmp_path_factory.mktemp("missing") / "data", n=4, val=2)


def said(commands, home):
    "(codes, seconds of each, heavy modules, questions to the network, seconds, all by torch); errors."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env |= dict(PYTHONPATH=str(files.__file__).rsplit("/sdcourse/", 1)[0], HF_HOME=str(home / "hub"))
    words = [sys.executable, "-c", CODE, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr.strip().splitlines()


@pytest.mark.parametrize("commands", [FULL[:1], FULL + OTHERS], ids=["one", "all"])
def test_absent_weights_are_one_line_at_once(tmp_path, data, commands):
    "Two seconds of processor: of an idle core torch takes 1.1, and more beside others; 0.9 are ours."
    out = tmp_path / "out"
    commands = [[w.format(data=data, out=out) for w in words] for words in commands]
    commands = [[*w, "--out", str(out)] if w[0] == "train" else w for w in commands]
    (codes, seconds, heavy, asked, whole, _), lines = said(commands, tmp_path)
    assert codes == [2] * len(commands) and len(lines) == len(commands), lines
    for line in lines:
        assert line.startswith("error: ") and "Traceback" not in line and len(line) < 400, line
        assert any(word in line for word in ("hf download", "sdcourse cache", "give ")), line  # a remedy
    assert not heavy and not asked
    assert max(seconds[1:], default=0) < 0.9 and (len(commands) > 1 or whole < 0.9)
    assert not out.exists()


@pytest.mark.alone
def test_all_of_it_takes_two_seconds(tmp_path):
    """U5: where Python and torch take 1.1 s, as on the machine of the criterion, the end comes before 2 s: in
    processor time, so that neither a slow clock nor a busy processor counts.
    """
    (codes, *_, ratio), lines = said([[*FULL[0], "--out", "r"]], tmp_path)
    assert codes == [2] and len(lines) == 1
    assert ratio <= 2 / 1.1, ratio


def test_a_folder_wins_over_the_hub_of_the_same_name(tmp_path, monkeypatch):
    import huggingface_hub

    def never(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/model").mkdir(parents=True)
    assert files.local_folder("owner/model").resolve() == tmp_path / "owner/model"


def test_the_hub_is_asked_for_what_is_there_and_for_nothing_else(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def absent(name, **how):
        asked.append(how)
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(UserError, match="owner/gated: no such folder, .*hf download owner/gated"):
        files.local_folder("owner/gated")
    assert asked == [{"local_files_only": True, "revision": None}]

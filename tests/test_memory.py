"""X3: four times the pictures, no more memory: `scan`, `shards`, `cache` and `evaluate`."""

import json
import sys

import numpy as np
import pytest
import tiny_models
import warm
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")

# The peak of each call. A first one of few pictures has loaded imports and models.
CODE = """
import json, sys
import torch
torch.set_num_threads(1)
from sdcourse import cli
from sdcourse.core import use_cpu
use_cpu(1, "cuda") # what is freed goes back, and a peak is one
import sdcourse.evaluation.pairwise as pairs
pairs.ssim = lambda a, b: torch.zeros(len(a)) # a minute of its own
def kilobytes(key):
    for line in open("/proc/self/status"):
        if line.startswith(key): return int(line.split()[1])
found = []
for words in json.loads(sys.argv[1]):
    open("/proc/self/clear_refs", "w").write("5") # forget the peak so far
    if cli.run(words): sys.exit(1)
    found.append(kilobytes("VmHWM"))
print(json.dumps(found))
"""
SIZES = (20, 100, 400)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Folders of 20, 100 and 400 pictures of 256 pixels; noise, so that a file is as large as its pixels."
    home = tmp_path_factory.mktemp("memory")
    rng = np.random.default_rng(0)
    for n in SIZES:
        (home / f"{n}/train").mkdir(parents=True)
        rows = [json.dumps({"file_name": f"{i:03}.png", "text": "a"}) + "\n" for i in range(n)]
        (home / f"{n}/train/metadata.jsonl").write_text("".join(rows))
    for i in range(max(SIZES)):
        one = home / f"{max(SIZES)}/train/{i:03}.png"
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(one, compress_level=0)
        for n in SIZES[:-1]:
            if i < n:
                (home / f"{n}/train/{i:03}.png").hardlink_to(one)
    return home


CPU = ["--device", "cpu", "--threads", "1"]
COMMANDS = {
    "scan": ["scan", "{home}/{n}", "--workers", "1", "--out", "{out}/{n}.json"],
    "shards": ["shards", "{home}/{n}", "{out}/{n}"],
    "cache latents": [
        *["cache", "latents", "{home}/{n}", "{out}/{n}", "--model", "{vae}", "--size", "64"],
        *["--encode-batch", "5", "--shard-bytes", "50000", "--workers", "1", "--device", "cpu"],
    ],
    "cache features": [
        *["cache", "features", "{home}/{n}", "{out}/{n}", "--model", "{dino}"],
        *["--encode-batch", "5", "--shard-bytes", "50000", "--workers", "1", "--device", "cpu"],
    ],
    "evaluate": [
        *["evaluate", "{home}/{n}", "--reference", "{home}/{n}", "--split", "train", "--out", "{out}/{n}"],
        *["--extractor", "tiny-scenes", "--metrics", "fd,kid,pairs", "--draws", "2", "--batch", "10", *CPU],
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_memory_does_not_grow_with_the_pictures(name, home, tmp_path, built):
    "A tenth at most, and less than half of what the other pictures take."
    models = dict(vae=built(tiny_models.tiny_vae), dino=built(tiny_models.tiny_dino))
    calls = [[w.format(home=home, out=tmp_path, n=n, **models) for w in COMMANDS[name]] for n in SIZES]
    done = warm.run(["-c", CODE, json.dumps(calls)], first=warm.MODELS, timeout=warm.LONG)
    assert done.returncode == 0, done.stderr[-2000:]
    _, few, many = json.loads(done.stdout.splitlines()[-1])
    assert many <= 1.1 * few and many - few <= 300 * 256 * 256 * 3 / 2 / 1024, (few, many)

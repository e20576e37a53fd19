"""How much faster is preparing photos in parallel?   python tools/bench_prepare.py [photos] [workers] [rounds]

Makes photos of 1024 x 768 pixels (300, or as many as you say) in a temporary folder and lets `sdcourse prepare unsplash` make them small (512) with one worker and with
several (4: while one waits for the disk another computes), in turn, each in a process of its own. Prints every round and the ratio of the medians. On a machine that does other things the ratio says nothing.
"""
import statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
from PIL import Image

RUN = "import sys; from sdcourse.cli import main; sys.exit(main(sys.argv[1:]))"


def photos(folder, n):
    "A table and n JPEGs that compress like photographs: smooth shapes with fine grain."
    rng = np.random.default_rng(0)
    for i in range(n):
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1024, 768), Image.Resampling.BICUBIC)
        grain = np.asarray(shapes).astype(np.int16) + rng.integers(-8, 9, (768, 1024, 1), dtype=np.int16)
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    rows = "".join(f"p{i}\tfile:{i}.jpg\tphoto {i}\n" for i in range(n))
    (folder / "photos.tsv000").write_text("photo_id\tphoto_image_url\tai_description\n" + rows)


def seconds(folder, out, workers):
    "By the clock, without the start of Python."
    idle = time.perf_counter()
    subprocess.run([sys.executable, "-c", RUN, "prepare", "unsplash", str(folder), str(out), "--workers", str(workers), "--limit", "1"], check=True, stdout=subprocess.DEVNULL)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", RUN, "prepare", "unsplash", str(folder), f"{out}-all", "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin - (begin - idle)


def main(n=300, workers=4, rounds=3):
    took = {1: [], workers: []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "in").mkdir()
        photos(folder / "in", n)
        for r in range(rounds):
            for w in took: took[w].append(seconds(folder / "in", folder / f"out-{r}-{w}", w))
            print(f"round {r + 1}: " + ", ".join(f"{w} worker{'s' * (w > 1)} {t[-1]:.2f} s" for w, t in took.items()), flush=True)
    one, many = (statistics.median(t) for t in took.values())
    print(f"{n} photos: {one:.2f} s with one worker, {many:.2f} s with {workers}: {one / many:.2f} times as fast, {n / many:.0f} photos/s")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))

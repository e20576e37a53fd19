"""How much faster is preparing photos in parallel?   python tools/bench_prepare.py [photos] [workers] [rounds]

Makes photos of 1024 x 768 pixels (300, or as many as you say) in a temporary folder and lets `sdcourse prepare unsplash` make them small (512) with one worker and with
several (4: while one waits for the disk another computes), in turn, each in a process of its own; the start of Python is measured apart and taken off. Prints for every
round the seconds and how many cores other programs took meanwhile: where that is not near 0, the ratio says little.
"""
import resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import psutil
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


def timed(*argv):
    "(seconds, cores that others took) of a command."
    busy = lambda: sum(v for k, v in psutil.cpu_times()._asdict().items() if k in ("user", "nice", "system", "steal"))
    ours = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start, all_, own = time.perf_counter(), busy(), ours()
    subprocess.run([sys.executable, "-c", RUN, "prepare", "unsplash", *map(str, argv)], check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - start
    return took, max(0, busy() - all_ - ours() + own) / took


def main(n=300, workers=4, rounds=3):
    took = {1: [], workers: []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "in").mkdir()
        photos(folder / "in", n)
        for r in range(rounds):
            said = []
            for w in took:
                idle, _ = timed(folder / "in", folder / f"one-{r}-{w}", "--workers", w, "--limit", 1)
                whole, others = timed(folder / "in", folder / f"all-{r}-{w}", "--workers", w)
                took[w].append(whole - idle)
                said.append(f"{w} worker{'s' * (w > 1)} {took[w][-1]:.2f} s (others took {others:.1f} cores)")
            print(f"round {r + 1}: {', '.join(said)}: {took[1][-1] / took[workers][-1]:.2f} times as fast", flush=True)
    one, many = (statistics.median(t) for t in took.values())
    print(f"{n} photos, medians: {one:.2f} s with one worker, {many:.2f} s with {workers}: {one / many:.2f} times as fast, {n / many:.0f} photos/s")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))

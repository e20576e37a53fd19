"""What two large sets of features cost: seconds and peak memory of Fréchet and kernel distance.

    python tools/record_memory.py [--pictures 50000] [--width 2048] [--most 4]

The features are random numbers of the width of Inception, given as float32, on one thread. Ends with 1 when
the process once held more than `--most` GB, the features themselves included.
"""

import argparse, json, resource, sys, time

import torch

from sdcourse.evaluation.distances import kid
from sdcourse.evaluation.stats import frechet


def features(n, width, seed):
    "Two sets a little apart, as positive as those of Inception."
    g = torch.Generator().manual_seed(seed)
    return torch.empty(n, width).normal_(0.02 * seed, 1.0, generator=g).abs_()


def peak():
    "GB that this process held at most, so far."
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measured(what, a, b):
    "Value, seconds and peak of one distance."
    begin = time.perf_counter()
    cpu = time.process_time()
    value = what(a, b)
    return dict(
        value=value,
        seconds=round(time.perf_counter() - begin, 1),
        processor=round(time.process_time() - cpu, 1),
        peak_gb=round(peak(), 2),
    )


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--pictures", type=int, default=50_000)
    ask.add_argument("--width", type=int, default=2048)
    ask.add_argument("--most", type=float, default=4.0)
    args = ask.parse_args()
    torch.set_num_threads(1)
    a, b = (features(args.pictures, args.width, seed) for seed in (0, 1))
    print(
        json.dumps(dict(pictures=args.pictures, width=args.width, features_gb=round(peak(), 2))), flush=True
    )
    for name, what in (("FD", frechet), ("KID", kid)):
        print(json.dumps({name: measured(what, a, b)}), flush=True)
    return int(peak() > args.most)


if __name__ == "__main__":
    raise SystemExit(main())

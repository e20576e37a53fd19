"""Our evaluation beside the libraries that people use, in one run, in turn:

    python tools/bench_evaluation.py [fid] [kid] [lpips] [--pictures 100] [--size 256] [--rounds 2]

Both sides get the same random weights (the published ones are not here), so values are compared too. fid is
end to end: from two folders of PNGs to one number, by pytorch-fid's own function and by ours. kid and lpips
are compared with torchmetrics, which is no dependency of the course: pip install torchmetrics, or put it on
PYTHONPATH.
"""

import argparse, os, sys, tempfile, time
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import sdcourse  # noqa: F401  (guards torchvision)
from sdcourse.dataset import pictures
from sdcourse.evaluation.distances import kid
from sdcourse.evaluation.features import Inception, stats_of
from sdcourse.evaluation.pairwise import Lpips
from sdcourse.evaluation.stats import frechet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def folder(path, n, size, level):
    "Smooth random colours as PNG."
    from PIL import Image

    rng = np.random.default_rng(level)
    (path / "train").mkdir(parents=True)
    for i in range(n):
        Image.fromarray(rng.integers(level, 256, (7, 7, 3)).astype(np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        ).save(path / f"train/{i:05}.png")
    return path


def fid(args):
    "(theirs, ours): functions that return a distance."
    from pytorch_fid import fid_score, inception
    from test_features import random_weights

    state, home = random_weights.__wrapped__(), Path(args.work)
    sets = [folder(home / name, args.pictures, args.size, level) for name, level in (("a", 0), ("b", 60))]
    inception.load_state_dict_from_url = lambda *_, **__: state

    def theirs():
        return float(
            fid_score.calculate_fid_given_paths(
                [str(s / "train") for s in sets], 50, "cpu", 2048, min(len(os.sched_getaffinity(0)), 8)
            )
        )

    def ours():
        net = Inception(state)
        return frechet(*(stats_of(net, pictures(s)) for s in sets))

    return theirs, ours


def kernel(args):
    "KID of 2,048 numbers per picture."
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = (
        torch.randn(args.features, 2048, generator=torch.Generator().manual_seed(s)) + 0.1 * s for s in (0, 1)
    )

    def theirs():  # as many subsets as ours leaves out, of all pictures
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=20, subset_size=args.features)
        metric.update(a, real=False)
        metric.update(b, real=True)
        return metric.compute()[0].item()

    return theirs, lambda: kid(a, b)["value"]


def lpips(args):
    "LPIPS of an AlexNet with random weights."
    import torchvision
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    torch.manual_seed(0)
    net = torchvision.models.alexnet(weights=None)
    mine, other = (
        Lpips("alex", net.state_dict()),
        _NoTrainLpips(net="alex", pretrained=False, pnet_rand=True).eval(),
    )
    for k, p in other.net.state_dict(keep_vars=True).items():
        p.data.copy_(net.state_dict()[f"features.{k.split('.', 1)[1]}"])
    for i in range(5):
        getattr(other, f"lin{i}").model[-1].weight.data.copy_(getattr(mine.net, f"lin{i}").model[-1].weight)
    a, b = (
        torch.randint(
            0,
            256,
            (args.pictures, 3, args.size, args.size),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(s),
        )
        for s in (0, 1)
    )

    def theirs():
        with torch.no_grad():
            return other(a.float() / 127.5 - 1, b.float() / 127.5 - 1).mean().item()

    return theirs, lambda: mine(a, b).mean().item()


KINDS = {"fid": (fid, "pytorch-fid"), "kid": (kernel, "torchmetrics"), "lpips": (lpips, "torchmetrics")}


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("kinds", nargs="*", choices=[*KINDS, []], default=[])
    ask.add_argument("--pictures", type=int, default=100)
    ask.add_argument("--size", type=int, default=256)
    ask.add_argument("--features", type=int, default=1000)
    ask.add_argument("--rounds", type=int, default=2)
    args = ask.parse_args()
    with tempfile.TemporaryDirectory() as args.work:
        for kind in args.kinds or KINDS:
            make, name = KINDS[kind]
            both, times, values = make(SimpleNamespace(**vars(args))), [[], []], [0, 0]
            for _ in range(args.rounds):
                for i, fn in enumerate(both):
                    begin = time.perf_counter()
                    with open(os.devnull, "w") as quiet, redirect_stderr(quiet):
                        values[i] = fn()
                    times[i].append(time.perf_counter() - begin)
            ratios = [a / b for a, b in zip(*times)]
            theirs, ours, ratio = (", ".join(f"{x:.2f}" for x in xs) for xs in (*times, ratios))
            told = f"{name} {values[0]:.7g} in {theirs} s; ours {values[1]:.7g} in {ours} s; ratio {ratio}"
            print(f"{kind}: {told}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

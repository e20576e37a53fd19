"""A task small enough to train in milliseconds: a two-layer net learns the flow to 50 points in the plane."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sdcourse.config import TrainConfig
from sdcourse.engine.loop import Task, train


@dataclass
class ToyConfig(TrainConfig):
    dropout: float = 0.0  # probability
    items: int = 50  # data points
    poison: int = -1  # this item has a NaN
    nan_at: int = -1  # the loss of this step is NaN


class Points(torch.utils.data.Dataset):
    def __init__(self, n, seed=0, poison=-1):
        self.ids = np.arange(100, 100 + n)
        self.x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
        if poison >= 0:
            self.x[poison] = float("nan")

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return dict(id=int(self.ids[i]), x=self.x[i])


class ToyNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 32), nn.Linear(32, 2)])
        self.drop, self.nan_at = nn.Dropout(config.dropout), config.nan_at
        self.register_parameter("frozen", nn.Parameter(torch.ones(1), requires_grad=False))

    def forward(self, batch, draws):
        x0 = batch["x"]
        eps, t = draws.normal("noise", (2,)), draws.uniform("time")
        xt = x0 + t[:, None] * (eps - x0)
        v = self.blocks[1](self.drop(torch.tanh(self.blocks[0](torch.cat([xt, t[:, None]], 1)))))
        loss = (v.to(eps.dtype) - (eps - x0)).square().mean(1)
        return loss * float("nan") if draws.step == self.nan_at else loss, t


class ToyTask(Task):
    name = "toy"

    def build(self):
        return ToyNet(self.config)

    def dataset(self, split):
        return (
            Points(self.config.items, poison=self.config.poison) if split == "train" else Points(13, seed=1)
        )

    def blocks(self, module):
        return list(module.blocks)

    def flops(self, module):
        return 6.0 * (3 * 32 + 32 * 2)

    def sample(self, module, path):
        Image.new("L", (2, 2)).save(path)

    def measure(self, module):
        return dict(weight=module.blocks[0].weight.norm().item())

    def export(self, module, folder):
        Path(folder).mkdir(exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in module.state_dict().items()}, Path(folder) / "model.safetensors"
        )


def config(out, **over):
    "A configuration for tests: CPU, one run of 12 steps with batches of 8."
    return ToyConfig(
        **{
            **dict(
                out=str(out),
                max_steps=12,
                batch_size=8,
                lr=1e-2,
                device="cpu",
                log_every=3,
                checkpoint_every=0,
                ema_decay=0.9,
                clip=1.0,
            ),
            **over,
        }
    )


def run(out, **over):
    "Train the toy task in `out`."
    return train(ToyTask(config(out, **over)))

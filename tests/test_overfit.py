"""O13 of the small networks that the course ships: eight pictures are learned by heart, by the engine.

Those of the flow DiT and of Stable Diffusion stand with their trainers.
"""

import pytest
import torch

from sdcourse.config import resolve
from sdcourse.engine.loop import Run, train, validation_loss
from sdcourse.train import judge, vae

SMALL = {
    judge: dict(world="digits", widths=(16, 32), depths=(1, 1), patch=1, share=0.05, lr=1e-2, max_steps=200),
    vae: dict(widths=(16, 16), side=24, share=0.01, lr=5e-3, max_steps=200),
}


@pytest.mark.parametrize("module", SMALL, ids=lambda m: m.__name__.split(".")[-1])
def test_eight_pictures_are_learned_by_heart(tmp_path, module):
    "The loss without variation and on fixed draws: a tenth of the first one is left."
    over = dict(out=str(tmp_path), batch_size=8, warmup_steps=0, lr_schedule="constant", ema_decay=0.0)
    over |= dict(device="cpu", log_every=300, checkpoint_every=0, validate_every=0)
    task = module.Task(resolve(module.Config, overrides=over | SMALL[module]))
    data = task.dataset("train")
    eight = data.where(torch.arange(len(data)) < 8)
    task.dataset = lambda split: eight
    task.measure = lambda net: {}
    task.sample = lambda *_: None
    first = validation_loss(Run(task))
    row = train(task).metrics
    assert row["step"] <= 300 and row["val_loss"] <= 0.1 * first, (first, row)

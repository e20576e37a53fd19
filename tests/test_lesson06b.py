"""What lesson 06b claims of its task beyond `test_flow_dit`: separate streams, separate splits, one seed per
image, a null class that no label can reach.
"""

import torch

from sdcourse.config import resolve
from sdcourse.engine.order import Draws
from sdcourse.cache.latents import draw_latents
from sdcourse.train.flow_dit import Config, Task


def task(**over):
    return Task(resolve(Config, overrides=dict(size="tiny/4", device="cpu", num_inference_steps=2) | over))


def test_posterior_noise_and_path_noise_are_independent():
    """z = mean + std * noise must not use the noise that the path adds, or the network sees less than it
    should.
    """
    n, draws = 512, Draws(0, 0, range(512))
    batch = dict(
        mean=torch.zeros(n, 2, 1, 4, 4), std=torch.ones(n, 2, 1, 4, 4), label=torch.zeros(n, dtype=torch.long)
    )
    x0 = draw_latents(batch, draws, flip=False, shift=0.0, scale=1.0)
    eps = draws.normal("noise", x0.shape[1:])
    assert abs((x0 * eps).mean()) < 0.05 and abs(x0.std() - 1) < 0.05


def test_training_and_held_out_digits_are_disjoint():
    ids = [set(task().dataset(split).ids.tolist()) for split in ("train", "validate")]
    assert not ids[0] & ids[1] and len(ids[0]) == 1437 and len(ids[1]) == 360


def test_one_seed_per_image_in_any_batch():
    """Image i depends on seeds[i] and labels[i] only; a network that does something, so that the labels
    matter.
    """
    t = task()
    module = t.build().eval()
    for p in module.dit.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    many = t.images(module, [0, 1, 2, 3], [7, 8, 9, 7])
    assert (t.images(module, [2], [9]) - many[2:3]).abs().max() < 1e-4
    assert (many[0] - many[3]).abs().max() > 1e-3  # same seed, other class
    assert (t.images(module, [2], [7]) - many[2:3]).abs().max() > 1e-3  # same class, other seed


def test_guidance_options_of_the_configuration_reach_the_samples():
    module = task().build().eval()
    for p in module.dit.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))

    def drawn(**over):
        return task(**over).images(module, [1, 2], [1, 2])

    plain = drawn(guidance_scale=1.0)
    assert not torch.equal(plain, drawn(guidance_scale=3.0))
    assert torch.equal(
        plain, drawn(guidance_scale=3.0, guidance_interval=(0.01, 0.02))
    )  # no step of the sampler falls in there
    assert not torch.equal(plain, drawn(guidance_scale=1.0, sampler="euler"))

"""Samplers: from pure noise to a video, each a plain function over a denoiser.

A denoiser answers one question: given the noisy video x at step t, what is the clean one? What the network
behind it really predicts, how it is guided and how the answer is clipped is its own business (see
`GaussianDiffusion.denoiser`). A sampler goes down a list of steps and decides how to get from one to the
next; that is all by which samplers differ:

    denoise(x, t) -> x0          x, x0 (b c f h w) in [-1, 1], t an int
    alpha_bar                    the schedule, float64 (T), on the CPU
    steps                        the t to visit, falling; the last one leads to the clean video

Every coefficient is a Python float from the float64 schedule: exact, the same on every device, and no
step waits for the device.
"""

from typing import Callable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .noise_schedule import posterior, to_noise

Denoiser = Callable[[Tensor, int], Tensor]


def spaced_steps(timesteps: int, count: int | None) -> list[int]:
    """`count` of the steps T-1 .. 0, evenly spaced and beginning at the last ('trailing'); None: all of them."""
    count = timesteps if count is None else count
    if not 1 <= count <= timesteps:
        raise ValueError(f'steps={count}: the model was trained with {timesteps} steps, so give 1 to {timesteps}')
    return [round(timesteps - i * timesteps / count) - 1 for i in range(count)]


def levels(alpha_bar: Tensor, steps: list[int], progress: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each step: t, its alpha bar, and the alpha bar of the step that comes next (1, the clean video, at the end)."""
    clean = torch.ones((), dtype=alpha_bar.dtype)
    following = [alpha_bar[t] for t in steps[1:]] + [clean]
    for t, after in zip(tqdm(steps, desc='sampling', disable=not progress, leave=False), following):
        yield t, alpha_bar[t], after


def ddpm(
    denoise: Denoiser, x: Tensor, alpha_bar: Tensor, steps: list[int],
    *, generator: torch.Generator | None = None, progress: bool = False,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2): draw from q(x_next | x, x0)."""
    for t, here, after in levels(alpha_bar, steps, progress):
        x0 = denoise(x, t)
        a, b, variance = (c.item() for c in posterior(here, after))
        x = a * x0 + b * x
        if variance > 0:
            x = x + variance ** 0.5 * randn_like(x, generator)
    return x


def ddim(
    denoise: Denoiser, x: Tensor, alpha_bar: Tensor, steps: list[int],
    *, eta: float = 0., generator: torch.Generator | None = None, progress: bool = False,
) -> Tensor:
    """Keep the noise that x implies and only lower its share (Song et al. 2020, arXiv 2010.02502, eq. 12).

    Deterministic, and good with few steps. `eta` replaces a part of the noise by fresh noise; 1 replaces as
    much as ancestral sampling does.
    """
    for t, here, after in levels(alpha_bar, steps, progress):
        x0 = denoise(x, t)
        noise = to_noise(x0, x, here.sqrt().item(), (1 - here).sqrt().item())
        fresh = eta ** 2 * posterior(here, after)[2]  # variance of the fresh noise
        x = after.sqrt().item() * x0 + (1 - after - fresh).clamp(min=0).sqrt().item() * noise
        if fresh > 0:
            x = x + fresh.sqrt().item() * randn_like(x, generator)
    return x


SAMPLERS = {'ddpm': ddpm, 'ddim': ddim}


def randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

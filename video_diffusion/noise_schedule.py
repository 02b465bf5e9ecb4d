"""How much noise each diffusion step holds, and what follows from it.

A noisy video is x_t = alpha_t x_0 + sigma_t noise, with alpha_t^2 + sigma_t^2 = 1 (Ho et al. 2020, arXiv
2006.11239, who write alpha_t^2 as "alpha bar"). A schedule is the table of alpha bar for t = 0 .. T-1, from
nearly 1, a clean video, to nearly 0, pure noise. It is computed in float64: near both ends the differences
that matter are smaller than float32 can tell apart.

A network may be asked for the noise, for v = alpha noise - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512),
which stays well-scaled at both ends, or for x_0. `to_x0` and `to_noise` turn any of them into what a
sampler needs.
"""

import math

import torch
from torch import Tensor

OBJECTIVES = ('noise', 'v', 'x0')


def cosine_schedule(timesteps: int, offset: float = 0.008, max_beta: float = 0.9999) -> Tensor:
    """alpha bar falls like a squared cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17): float64 (timesteps).

    `offset` keeps the first steps from being too small; no step may remove more than `max_beta` of the signal.
    """
    progress = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((progress + offset) / (1 + offset) * math.pi / 2) ** 2
    beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, max_beta)
    return torch.cumprod(1 - beta, dim=0)


def shifted(alpha_bar: Tensor, shift: float) -> Tensor:
    """The schedule with its signal-to-noise ratio alpha_bar / (1 - alpha_bar) divided by `shift`.

    The pixels of a video say much the same many times over. What a clip shows and where it moves can be made out
    under noise that hides any single pixel, so that is where those things are decided, and with the plain
    schedule few steps lie there (Hoogeboom et al. 2023, arXiv 2301.11093; CogVideoX shifts by 3).
    """
    if not shift > 0:
        raise ValueError(f'schedule_shift={shift}: give a positive number, 1 for the plain schedule')
    return alpha_bar / (shift + (1 - shift) * alpha_bar)


def posterior(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_prev | x_t, x_0) is a Gaussian: its mean is a x_0 + b x_t, its variance c (DDPM, eq. 7). Returns a, b, c."""
    beta = 1 - alpha_bar / alpha_bar_prev
    a = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    b = (alpha_bar / alpha_bar_prev).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    c = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return a, b, c


def target(objective: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is asked to predict."""
    return {'noise': noise, 'x0': x0, 'v': alpha * noise - sigma * x0}[objective]


def to_x0(objective: str, output: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The clean video that a prediction implies, for the noisy video x."""
    if objective == 'noise':
        return (x - sigma * output) / alpha
    if objective == 'v':
        return alpha * x - sigma * output
    return output


def to_noise(x0: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The noise that a clean video implies, for the noisy video x."""
    return (x - alpha * x0) / sigma

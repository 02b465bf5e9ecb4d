"""How much noise each diffusion step holds, and what follows from it.

A noisy video is x_t = alpha_t x_0 + sigma_t noise, with alpha_t^2 + sigma_t^2 = 1 (Ho et al. 2020, arXiv
2006.11239, who write alpha_t^2 as "alpha bar"). A schedule is the table of alpha bar for t = 0 .. T-1, from
nearly 1, a clean video, to nearly 0, pure noise. It is computed in float64: near both ends the differences
that matter are smaller than float32 can tell apart.

    >>> zero_snr(shifted(scaled_linear_schedule(1000), 3.))      # CogVideoX's
"""

import math

import torch
from torch import Tensor

from ..checks import number, one_of, whole


def cosine_schedule(timesteps: int, offset: float = 0.008, max_beta: float = 0.9999) -> Tensor:
    """alpha bar falls like a squared cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17): float64 (timesteps).

    `offset` keeps the first steps from being too small; no step may remove more than `max_beta` of the signal.
    """
    progress = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((progress + offset) / (1 + offset) * math.pi / 2) ** 2
    beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, max_beta)
    return torch.cumprod(1 - beta, dim=0)


def linear_schedule(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """beta, the share of the signal that a step removes, grows linearly (Ho et al. 2020, whose numbers are for 1000 steps)."""
    return torch.cumprod(1 - torch.linspace(start, end, timesteps, dtype=torch.float64), dim=0)


def scaled_linear_schedule(timesteps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """sqrt(beta) grows linearly: the schedule of latent models (Rombach et al. 2021, arXiv 2112.10752), for 1000 steps too."""
    return torch.cumprod(1 - torch.linspace(start ** 0.5, end ** 0.5, timesteps, dtype=torch.float64) ** 2, dim=0)


SCHEDULES = {'cosine': cosine_schedule, 'linear': linear_schedule, 'scaled_linear': scaled_linear_schedule}


def shifted(alpha_bar: Tensor, shift: float) -> Tensor:
    """The schedule with its signal-to-noise ratio alpha_bar / (1 - alpha_bar) divided by `shift`.

    The pixels of a video say much the same many times over. What a clip shows and where it moves can be made out
    under noise that hides any single pixel, so that is where those things are decided, and with the plain
    schedule few steps lie there (Hoogeboom et al. 2023, arXiv 2301.11093; CogVideoX shifts by 3).
    """
    number('schedule_shift', shift, above=0)
    return alpha_bar / (shift + (1 - shift) * alpha_bar)


def zero_snr(alpha_bar: Tensor) -> Tensor:
    """The schedule with alpha moved and stretched so that the first step stays and the last is 0, pure noise.

    Sampling starts from pure noise. Where the last step of training still holds a trace of the clip, the network
    learns to read brightness off it, and pure noise then says "medium" (Lin et al. 2023, arXiv 2305.08891).
    """
    alpha = alpha_bar.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


def build_schedule(name: str, timesteps: int, shift: float = 1., rescale: bool = False) -> Tensor:
    """A schedule by name, shifted, and then with `zero_snr` if asked to `rescale`, which is CogVideoX's order."""
    one_of('schedule', name, SCHEDULES)
    whole('timesteps', timesteps, 2 if rescale else 1)        # with zero-SNR the first step is not the last
    with torch.device('cpu'):                                 # where a model is made of shapes alone, this is not
        alpha_bar = shifted(SCHEDULES[name](timesteps), shift)
    alpha_bar = zero_snr(alpha_bar) if rescale else alpha_bar
    if alpha_bar[-1] > 0.01:
        raise ValueError(f'schedule={name!r} with timesteps={timesteps} leaves {alpha_bar[-1].sqrt():.0%} of the signal at the '
                         'last step, but sampling starts from noise alone: give more timesteps, or zero_snr=True')
    return alpha_bar


def posterior(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_prev | x_t, x_0) is a Gaussian: its mean is a x_0 + b x_t, its variance c (DDPM, eq. 7). Returns a, b, c."""
    beta = 1 - alpha_bar / alpha_bar_prev
    a = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    b = (alpha_bar / alpha_bar_prev).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    c = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return a, b, c

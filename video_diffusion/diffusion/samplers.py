"""Samplers: from pure noise to a video, each a plain function over a denoiser.

A denoiser answers one question: given the noisy video x at step t, what is the clean one? What the network
behind it really predicts, how it is guided and how the answer is clipped is its own business (see
`GaussianDiffusion.denoiser`), and so is anything that wants to watch or to bend the way: wrap the denoiser. A
sampler goes down a list of steps and decides how to get from one to the next; that is all by which samplers differ:

    denoise(x, t) -> x0          x, x0 (b c f h w) in [-1, 1], t an int
    alpha_bar                    the schedule, float64 (T), on the CPU
    steps                        the t to visit, falling; the last one leads to the clean video

Or `steps` is a matrix of frame_levels.py, and t a row of it: every frame goes its own way, and stays where its level does.

There are two ways to take a step, and two ideas of where to go:

                                 towards x0 as it looks now          towards x0 as it will look halfway
    fresh noise for the old      ddpm                                dpmpp_2m_sde
    the same noise, less of it   ddim                                dpmpp_2m

Every coefficient is a Python float from the float64 schedule: exact, the same on every device, and no
step waits for the device. They hold at both ends: from alpha = 0 (see `zero_snr`) and to the clean video.
"""

import math
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import one_of
from .noise_schedule import posterior
from .objective import to_noise

Denoiser = Callable[[Tensor, int | Tensor], Tensor]
Steps = list[int] | Tensor
Progress = bool | Callable[[Steps], Iterable[int | Tensor]]    # a bar or none; or what hands out the steps, or raises

SPACINGS = ('trailing', 'leading', 'linspace', 'cosine')


def spaced_steps(timesteps: int, count: int | None, spacing: str = 'trailing') -> list[int]:
    """`count` of the steps T-1 .. 0, falling; None: all of them (names of those evenly spaced as in arXiv 2305.08891, table 2).

    'trailing' begins at T-1, where the training noise is purest, and is the one to use. 'leading' ends at 0, but begins
    below T-1 with a video that is noisier than the network is told; 'linspace' does both, and its step to 0 gains little.
    'cosine' takes most of its steps where there is much noise and motion is decided: for three or five steps (see RESULTS.md).
    """
    count = timesteps if count is None else count
    if not 1 <= count <= timesteps:
        raise ValueError(f'steps={count}: the model was trained with {timesteps} steps, so give 1 to {timesteps}')
    one_of('spacing', spacing, SPACINGS)
    if spacing == 'leading':
        return [i * (timesteps // count) for i in reversed(range(count))]
    if spacing == 'linspace' and count > 1:  # of one step, the first
        return [round(i * (timesteps - 1) / (count - 1)) for i in reversed(range(count))]
    if spacing == 'cosine':
        steps = []
        for i in range(count):               # each step once: of very many the first would lie too near to one another
            t = round(timesteps * math.cos(math.pi / 2 * i / count)) - 1
            steps.append(max(count - 1 - i, min(t, steps[-1] - 1 if steps else t)))
        return steps
    return [round(timesteps - i * timesteps / count) - 1 for i in range(count)]


def recorded(denoise: Denoiser, way: list[Tensor]) -> Denoiser:
    """The same denoiser, which also appends every noisy video that it is shown to `way`."""
    def denoise_and_record(x, t):
        way.append(x)
        return denoise(x, t)
    return denoise_and_record


def levels(alpha_bar: Tensor, steps: Steps, progress: Progress) -> Iterator[tuple[int | Tensor, Tensor, Tensor]]:
    """For each step: t, its alpha bar, and the alpha bar of the step that comes next (1, the clean video, at the end).
    From a matrix (rows b f) or (rows f) they come shaped (b 1 f 1 1), to multiply videos with."""
    alpha_bar = torch.cat((alpha_bar, alpha_bar.new_ones(1)))            # the last, -1, is that of the clean video
    if isinstance(steps, list):
        way = [alpha_bar[t] for t in [*steps, -1]]
    else:                                                                # its last row is where the way ends
        way, steps = alpha_bar[steps].view(len(steps), -1, 1, steps.shape[-1], 1, 1), steps[:-1]
    watched = progress(steps) if callable(progress) else bar(steps, progress)
    for t, here, after in zip(watched, way[:-1], way[1:]):
        yield t, here, after


def bar(steps: Steps, shown: bool = True) -> tqdm:
    return tqdm(steps, desc='sampling', disable=not shown, leave=False)


def ddpm(denoise: Denoiser, x: Tensor, alpha_bar: Tensor, steps: Steps,
         *, generator: torch.Generator | None = None, progress: Progress = False) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2): the one to trust, given all steps."""
    for t, here, after in levels(alpha_bar, steps, progress):
        x = fresh_step(x, denoise(x, t), here, after, generator)
    return x


def ddim(denoise: Denoiser, x: Tensor, alpha_bar: Tensor, steps: Steps,
         *, eta: float = 0., generator: torch.Generator | None = None, progress: Progress = False) -> Tensor:
    """Keep the noise that x implies and only lower its share (Song et al. 2020, arXiv 2010.02502, eq. 12).

    Deterministic, and good with few steps. `eta` replaces a part of the noise by fresh noise; 1 replaces as
    much as ancestral sampling does.
    """
    for t, here, after in levels(alpha_bar, steps, progress):
        x = kept_step(x, denoise(x, t), here, after, eta, generator)
    return x


def dpmpp_2m(denoise: Denoiser, x: Tensor, alpha_bar: Tensor, steps: Steps,
             *, generator: torch.Generator | None = None, progress: Progress = False) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2): DDIM that looks half a step ahead.

    Deterministic. Twice the steps, equal in log-SNR, leave a quarter of the error; with DDIM half of it.
    """
    del generator                                                   # nothing here is drawn
    before = None
    for t, here, after in levels(alpha_bar, steps, progress):
        x0 = denoise(x, t)
        x = kept_step(x, halfway(x0, before, here, after), here, after)
        before = x0, here
    return x


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, alpha_bar: Tensor, steps: Steps,
                 *, generator: torch.Generator | None = None, progress: Progress = False) -> Tensor:
    """The same for ancestral sampling (SDE-DPM-Solver++ 2M, as in CogVideoX): fresh noise repairs earlier mistakes."""
    before = None
    for t, here, after in levels(alpha_bar, steps, progress):
        x0 = denoise(x, t)
        x = fresh_step(x, halfway(x0, before, here, after), here, after, generator)
        before = x0, here
    return x


SAMPLERS = {'ddpm': ddpm, 'ddim': ddim, 'dpm++2m': dpmpp_2m, 'dpm++2m_sde': dpmpp_2m_sde}


def ddim_invert(denoise: Denoiser, video: Tensor, alpha_bar: Tensor, steps: list[int], *, progress: bool = False) -> Tensor:
    """DDIM upwards: the noise from which `ddim`, taking the same steps down, comes back to about this video.

    Going down, a step from t asks the denoiser at t; going up, t is not known yet, so the step asks where it stands. The
    two differ by less the smaller the steps are. The clean video counts as step 0, the cleanest the network knows.
    """
    x, upwards = video, [0] + [t for t in reversed(steps) if t > 0]
    for t, following in zip(upwards[:-1], tqdm(upwards[1:], desc='inverting', disable=not progress, leave=False)):
        x = kept_step(x, denoise(x, t), alpha_bar[t], alpha_bar[following])
    return x


# The two ways to take a step, from the level `here` to the level `after` (alpha bars)

def fresh_step(x: Tensor, x0: Tensor, here: Tensor, after: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from q(x_after | x, x0)."""
    a, b, variance = posterior(here, after)
    moved = number(a, x) * x0 + number(b, x) * x
    if (variance > 0).any():
        moved = moved + number(variance.sqrt(), x) * randn_like(x, generator)
    return moved_only(moved, x, here, after)


def kept_step(x: Tensor, x0: Tensor, here: Tensor, after: Tensor, eta: float = 0.,
              generator: torch.Generator | None = None) -> Tensor:
    """Mix x0 anew with the noise that was in x; `eta` of that noise is fresh."""
    noise = to_noise(x0, x, number(here.sqrt(), x), number((1 - here).sqrt(), x))
    fresh = eta ** 2 * posterior(here, after)[2] if eta else torch.zeros_like(after)     # variance of the fresh noise
    moved = number(after.sqrt(), x) * x0 + number((1 - after - fresh).clamp(min=0).sqrt(), x) * noise
    if (fresh > 0).any():
        moved = moved + number(fresh.sqrt(), x) * randn_like(x, generator)
    return moved_only(moved, x, here, after)


def halfway(x0: Tensor, before: tuple[Tensor, Tensor] | None, here: Tensor, after: Tensor) -> Tensor:
    """x0 as it will look in the middle of the step, on the line through what it was `before` (x0, level) and is now.

    Time is half the log of the signal-to-noise ratio, in which a denoiser's answer changes smoothly. It has no beginning
    (alpha = 0) and no end (the clean video): a line from or to infinity is flat.
    """
    if before is None:
        return x0
    x0_before, level = before
    ratio = (after.logit() - here.logit()) / (here.logit() - level.logit())
    ratio = torch.where((after < 1) & (here != level), ratio, 0)         # a frame that has only begun to move has no line yet
    return x0 + number(ratio / 2, x0) * (x0 - x0_before)


def moved_only(moved: Tensor, x: Tensor, here: Tensor, after: Tensor) -> Tensor:
    """Frames whose level stays the same stay as they are, clean ones too, from which no noise can be told."""
    return moved if here.ndim == 0 else torch.where((here == after).to(x.device), x, moved)


def number(c: Tensor, x: Tensor) -> float | Tensor:
    """A coefficient of all frames is a float, those of each frame (b 1 f 1 1) are like x."""
    return c.item() if c.ndim == 0 else c.to(x)


def randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

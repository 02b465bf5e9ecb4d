"""How the learning rate changes over a run: plain functions from the step to a factor of the full rate.

    >>> torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(total=1000, warmup=50))

Functions of the step have no state: a resumed run needs nothing but its step.
"""

import math
from typing import Callable, Sequence

from ..checks import whole

Schedule = Callable[[int], float]


def constant(warmup: int = 0) -> Schedule:
    """Rises over `warmup` steps and stays."""
    whole('warmup', warmup, 0)
    return lambda step: min(1., (step + 1) / (warmup + 1))


def warmup_cosine(total: int, warmup: int = 0, final: float = 0.) -> Schedule:
    """Rises over `warmup` steps, then falls along half a cosine, to `final` at step `total`."""
    rise = constant(warmup)

    def factor(step):
        progress = min(1., max(0., (step - warmup) / max(1, total - warmup)))
        return rise(step) * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
    return factor


def cycles(lengths: Sequence[int], maxima: Sequence[float], warmup: int = 0, final: float = 0.) -> Schedule:
    """One `warmup_cosine` after another, each with its own length and height; the last one repeats (SGDR, 1608.03983)."""
    if len(lengths) != len(maxima) or not lengths or min(lengths) < 1:
        raise ValueError(f'lengths={lengths}, maxima={maxima}: give each cycle a length of 1 or more, and a maximum')

    def factor(step):
        number = 0
        while step >= lengths[number]:
            step -= lengths[number]
            number = min(number + 1, len(lengths) - 1)
        return maxima[number] * warmup_cosine(lengths[number], warmup, final)(step)
    return factor

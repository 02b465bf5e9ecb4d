"""Guidance: follow the condition more closely than the data did, and keep the pixels in range while doing so.

A network trained with its condition now and then dropped knows two predictions, with the condition and without.
Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) goes from the second through the first and on, `scale`
times as far. "Without" may also be another condition, a negative prompt: what the video shall not be.

    >>> guide(with_cond, without, scale=6., rescale=0.7)
    >>> [round(dynamic_scale(6., i / 4, exponent=5), 1) for i in range(5)]      # little at first, then all of it
    [1.0, 1.0, 1.0, 1.8, 7.0]
"""

import math
from functools import partial
from typing import Sequence

import torch
from torch import Tensor, nn

Cond = Tensor | Sequence[str] | None             # what videos are to follow: (b cond_dim), or a caption for each, or nothing


def guide(with_cond: Tensor, without: Tensor, scale: float, rescale: float = 0.) -> Tensor:
    """Scale 1 is the plain conditional prediction (b c f h w), 0 the unconditional one, more exaggerates the difference.

    A large scale also stretches the prediction, and the video comes out overexposed. `rescale` (0 to 1) takes this share
    of the stretch back, sample by sample (Lin et al. 2023, arXiv 2305.08891, section 3.4, who use 0.7).
    """
    guided = without + (with_cond - without) * scale
    if rescale == 0:
        return guided
    ratio = with_cond.std(dim=(1, 2, 3, 4), keepdim=True) / guided.std(dim=(1, 2, 3, 4), keepdim=True)      # b 1 1 1 1
    return guided * (rescale * ratio + 1 - rescale)


def predict(network: nn.Module, x: Tensor, t: Tensor, cond: Tensor | None, scale: float, negative: Tensor | None = None,
            rescale: float = 0., known: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The guided answer (b c f h w) of a network that, like Unet3D, has `forward_with_cond_scale`.

    All that is taken for granted is the public package's signature, whose scales 1 and 0 give the two predictions.
    """
    ask = network.forward_with_cond_scale
    if known is not None:  # frames and their mask, for a network that takes them
        ask = partial(ask, known=known[0], known_mask=known[1])
    if negative is None and (scale in (0, 1) or cond is None):
        return ask(x, t, cond=cond, cond_scale=scale)
    with_cond = ask(x, t, cond=cond, cond_scale=1.)
    without = ask(x, t, cond=cond, cond_scale=0.) if negative is None else ask(x, t, cond=negative, cond_scale=1.)
    return guide(with_cond, without, scale, rescale)


def for_batch(negative: Tensor | None, cond: Tensor | None) -> Tensor | None:
    """A negative condition, given once or for each video, for as many videos as `cond` (b cond_dim) is for."""
    if negative is None:
        return None
    if len(negative) not in (1, len(cond)):
        raise ValueError(f'negative for {len(negative)} videos and cond for {len(cond)}: give one, or as many')
    return negative.expand(len(cond), *negative.shape[1:])


def dynamic_scale(scale: float, progress: float, exponent: float) -> float:
    """A scale that grows from 1 to 1 + scale as progress goes from 0 to 1 (CogVideoX, whose exponent is 5).

    Under much noise the two predictions agree on little but the mean, and exaggerating that costs variety.
    """
    return 1 + scale * (1 - math.cos(math.pi * progress ** exponent)) / 2


def wave_scale(scale: float, t: int, steps: int) -> float:
    """What CogVideoX's own code and diffusers really do, and did for the authors' videos: as progress they take (steps - t) /
    steps, where t counts not the sampler's steps, but the 1000 of training. That is far below 0, its fifth power goes to
    millions, and the cosine jumps about from step to step, and the scale between 1 and 1 + scale."""
    return dynamic_scale(scale, (steps - t) / steps, 5)


def clip(x0: Tensor, percentile: float | None = None) -> Tensor:
    """Back into [-1, 1].

    With a percentile the bound is that percentile of each sample's own values, and what is left is scaled down by it:
    guidance then saturates fewer pixels (dynamic thresholding, Saharia et al. 2022, arXiv 2205.11487, section 2.3).
    """
    if percentile is None:
        return x0.clamp(-1, 1)
    bound = torch.stack([one.abs().flatten().quantile(percentile) for one in x0])
    bound = bound.clamp(min=1).view(-1, 1, 1, 1, 1)
    return x0.clamp(-bound, bound) / bound

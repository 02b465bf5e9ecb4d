"""Longer videos than a model draws: window after window, each beginning with the last frames of the one before.

    known   x x . . . . . .                                                        diffusion.sample_long(14, cond)
                        x x . . . . . .

The network never sees more than one window, so memory does not grow, and a video may go on for as long as one likes. What the
model itself has drawn is nearly right, and nearly is passed on from window to window: where frames have noise of their own
(frame_levels.py), those of a window before are shown under a little of it, `known_noise`, by which the network knows them.

A video may be told what happens first, and then: of a list of captions each holds for its share of the windows.
"""

import math
from dataclasses import replace
from itertools import groupby
from typing import Sequence

import torch
from torch import Tensor

from ..checks import number
from . import frame_levels, known_frames
from .guidance import Cond
from .sampling import Sampling


def sample_long(
    diffusion, num_frames: int, cond: Cond = None, cond_scale: float = 1., batch_size: int = 16,
    *,
    overlap: int | None = None,                   # frames that a window shares with the one before; None: 3 in 4, about
    later_cond_scale: float | None = None,        # after the first window; 0 where cond says how a video begins
    first_frames: Tensor | None = None, negative: Cond = None,
    seed: int | None = None, progress: bool = True,
    **settings,                                   # as in sample
) -> Tensor:
    """Videos (b c num_frames h w) in [0, 1], on the CPU, of any length: a method of GaussianDiffusion and of LatentDiffusion."""
    window, lengths = diffusion.num_frames, diffusion.whole_lengths()
    if getattr(diffusion, 'low_res', None):
        raise ValueError(f'the model enlarges clips of {window} frames, and cannot make them longer')
    settings = Sampling(cond_scale=cond_scale, **settings)
    if overlap is None:                           # from half of a window a motion is drawn on less surely
        overlap = max((length for length in lengths if length <= 3 * window // 4), default=1)
    if not overlap < window <= num_frames or overlap not in (1, *lengths):
        raise ValueError(f'num_frames={num_frames}, overlap={overlap}: the model draws {window} frames at a time, so give '
                         f'{window} frames or more and an overlap of {", ".join(map(str, lengths))}')
    number('later_cond_scale', later_cond_scale)
    later = settings if later_cond_scale is None else replace(settings, cond_scale=later_cond_scale)
    if later_cond_scale in (0, 1):                # without guidance, and without its refinements
        later = replace(later, guidance_rescale=0., dynamic_guidance=None, wave_guidance=False)
    if later.known_noise is None and (later.known_by or known_frames.best_way(diffusion)) == 'level':
        least = 2 / diffusion.num_timesteps                      # at level 0 they would be the truth
        later = replace(later, known_noise=min(max(frame_levels.DRAWN, least), frame_levels.LOW))
    later_negative = negative if later.cond_scale not in (0, 1) else None
    later.check(diffusion.num_timesteps, has_cond=cond is not None, negative=later_negative is not None, has_known=True,
                frame_noise=diffusion.frame_noise)
    conds = by_window(cond, windows=1 + math.ceil((num_frames - window) / (window - overlap)))
    untold = dict(known_by=None, frame_guidance=None, history_scale=1.) if first_frames is None else {}
    first = {**settings.changed(), 'known_noise': 0., **untold}  # frames that are given are right
    parts = [diffusion.sample(conds[0], batch_size=batch_size, first_frames=first_frames, seed=seed, negative=negative,
                              progress=progress, **first).cpu()]
    for cond in conds[1:]:
        seed = None if seed is None else seed + 1_000_003        # far from the seeds of other batches
        last = torch.cat(parts[-overlap:], dim=2)[:, :, -overlap:]
        following = diffusion.sample(cond, batch_size=len(last), first_frames=last, seed=seed, negative=later_negative,
                                     progress=progress, **later.changed()).cpu()
        parts.append(following[:, :, overlap:])
    return torch.cat(parts, dim=2)[:, :, :num_frames]


def by_window(cond: Tensor | Sequence | None, windows: int) -> list:
    """The cond of each window. For a video it may be a list: what happens first, then next, for equally long."""
    if cond is None or isinstance(cond, (Tensor, str)) or all(isinstance(one, str) for one in cond):
        return [cond] * windows
    cond = [[one] if isinstance(one, str) else list(one) for one in cond]
    if not all(cond):
        raise ValueError('the list of captions of a video is empty: give one caption or more for each')
    most = max(len(list(groupby(captions))) for captions in cond)
    if most > windows:
        raise ValueError(f'a video of {windows} windows cannot show {most} captions one after the other: make it longer, or its '
                         'windows share less (overlap)')
    return [[captions[i * len(captions) // windows] for captions in cond] for i in range(windows)]

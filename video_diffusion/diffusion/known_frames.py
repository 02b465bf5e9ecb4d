"""Known frames: predict a video from its beginning, fill its middle, make it longer.

Some frames of a clip are given, and the sampler is to invent the others so that they fit. A mask says which are known;
video prediction knows a beginning, in-betweening knows both ends, and it is one call for all:

    known   x x . . . . . .     diffusion.sample(first_frames=video[:, :, :2])
    known   x . . . . . . x     diffusion.sample(known=video, known_mask=mask)
    known   x x . . . . . .                                                        diffusion.sample_long(14, cond)
                        x x . . . . . .   window after window, each begins with the last frames of the one before

Whatever the network answers, the known frames are known: `replaced` puts them into its answer, and the sampler then
carries them along under just the noise of each step. All three ways do that; they differ in what the *other* frames
learn from it:

- 'replace': nothing else. The network sees the known frames as noisy as the rest and cannot know that they are certain,
  so early on, under much noise, the others go their own way.
- 'guide': how wrong is the network about the known frames? The gradient of that error with respect to the noisy video
  says how the unknown frames must change for it to be less wrong, and its answer is moved that way (reconstruction
  guidance, Ho et al. 2022, arXiv 2204.03458, section 3.1). Each step costs a backward pass.
- 'network': `Unet3D(cond_frames=True)` sees the known frames, clean, and their mask as more input channels. It has
  been trained so (`GaussianDiffusion(prob_cond_frames=0.5)`), now and then with none, to draw from nothing too.

The first two work with any trained model. Videos here are (b c f h w) in [-1, 1], masks (b f) bool.
"""

from typing import Sequence

import torch
from torch import Tensor

from ..checks import number
from .samplers import Denoiser

WAYS = ('network', 'guide', 'replace')


def replaced(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """The denoiser, corrected in the known frames."""
    mask = mask[:, None, :, None, None]

    def denoise_the_others(x: Tensor, t: int) -> Tensor:
        return torch.where(mask, known, denoise(x, t))
    return denoise_the_others


def guided(denoise: Denoiser, known: Tensor, mask: Tensor, alpha: Tensor, weight: float, limit: float = 1.) -> Denoiser:
    """The denoiser, its answer moved to where it would have been less wrong about the known frames.

    `alpha` (timesteps) is the share of signal in the noisy video, `limit` the bound of a clean one.
    """
    mask = mask[:, None, :, None, None]

    def denoise_consistently(x: Tensor, t: int) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise(x, t)
            error = (known - x0).square().mul(mask).sum()
            gradient, = torch.autograd.grad(error, x)
        return (x0.detach() - weight * alpha[t] / 2 * gradient).clamp(-limit, limit)
    return denoise_consistently


def beginning(first_frames: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """A beginning (b c k h w) as the known frames of a clip (b c f h w), and their mask (f)."""
    length = first_frames.shape[2] if first_frames.ndim == 5 else 0
    if not 1 <= length < frames:
        raise ValueError(f'first_frames has shape {tuple(first_frames.shape)}: expected (batch, channels, 1 to {frames - 1} '
                         f'frames, height, width), for the model draws clips of {frames} frames')
    unknown = first_frames[:, :, -1:].expand(-1, -1, frames - length, -1, -1)  # never looked at
    return torch.cat((first_frames, unknown), dim=2), torch.arange(frames) < length


def for_batch(known: Tensor, mask: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """Known frames and mask, given for one video or for each, (f) or (b f), for a batch: (b c f h w), (b f)."""
    frames = known.shape[2]
    if len(known) not in (1, batch):
        raise ValueError(f'known frames of {len(known)} videos for a batch of {batch}: give one, or as many')
    if mask is None or mask.dtype != torch.bool or mask.shape not in ((frames,), (1, frames), (batch, frames)):
        given = 'nothing' if mask is None else f'{mask.dtype} of shape {tuple(mask.shape)}'
        raise ValueError(f'known_mask says which frames are known: expected bools of shape ({frames},) or ({batch}, {frames}), '
                         f'got {given}')
    return known.expand(batch, -1, -1, -1, -1), mask.to(known.device).expand(batch, frames)


def draw_mask(
    count: int, frames: int, prob: float, device: torch.device, generator: torch.Generator | None, end_too: float = 0.5,
) -> Tensor:
    """Masks to train with (count f): nothing is known with 1 - prob; else a beginning, and by `end_too` the end as well."""
    where = dict(device=device, generator=generator)
    frame = torch.arange(frames, device=device)
    length = torch.randint(1, max(2, frames), (count, 1), **where)           # all but one at the most
    any_known, end = (torch.rand((count, 1), **where) < share for share in (prob, end_too))
    end = end & (length < frames - 1)                                        # something is left to invent
    return any_known & ((frame < length) | (end & (frame == frames - 1)))


def check_given(first_frames: Tensor | None, known: Tensor | None, mask: Tensor | None) -> None:
    """Known frames come in one of two ways, whole."""
    if first_frames is not None and (known is not None or mask is not None):
        raise ValueError('first_frames says all about the known frames: leave known and known_mask out, or give only them')
    if (known is None) != (mask is None):
        raise ValueError('known and known_mask belong together: give the videos and which of their frames are known')


def window_by_window(
    diffusion, num_frames: int, cond: Tensor | Sequence[str] | None, batch_size: int, settings, negative, *,
    overlap: int | None, later_cond_scale: float | None, first_frames: Tensor | None, seed: int | None, progress: bool,
) -> Tensor:
    """Videos (b c num_frames h w) from a `diffusion` that draws fewer frames at a time: see GaussianDiffusion.sample_long."""
    window = diffusion.num_frames
    overlap = max(1, window // 2) if overlap is None else overlap
    if not 1 <= overlap < window <= num_frames:
        raise ValueError(f'num_frames={num_frames}, overlap={overlap}: the model draws {window} frames at a time, so give '
                         f'{window} frames or more and an overlap of 1 to {window - 1}')
    number('later_cond_scale', later_cond_scale)
    later = settings.later(later_cond_scale)
    later_negative = negative if later.cond_scale not in (0, 1) else None
    later.check(diffusion.num_timesteps, has_cond=cond is not None, negative=later_negative is not None, has_known=True)
    video = diffusion.sample(cond, batch_size=batch_size, first_frames=first_frames, seed=seed, negative=negative,
                             progress=progress, **settings.changed()).cpu()
    while video.shape[2] < num_frames:
        seed = None if seed is None else seed + 1_000_003  # far from the seeds of other batches
        following = diffusion.sample(cond, batch_size=len(video), first_frames=video[:, :, -overlap:], seed=seed,
                                     negative=later_negative, progress=progress, **later.changed()).cpu()
        video = torch.cat((video, following[:, :, overlap:]), dim=2)
    return video[:, :, :num_frames]

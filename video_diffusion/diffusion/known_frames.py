"""Known frames: predict a video from its beginning, fill its middle.

Some frames of a clip are given, and the sampler is to invent the others so that they fit. A mask says which are known;
video prediction knows a beginning, in-betweening knows both ends, and it is one call for all:

    known   x x . . . . . .     diffusion.sample(first_frames=video[:, :, :2])
    known   x . . . . . . x     diffusion.sample(known=video, known_mask=mask)

Whatever the network answers, the known frames come out as they went in; latents that a network is told ('network') come out
only about right. The ways differ in what the *others* learn from them:

- 'level': in a model whose frames have noise of their own (frame_levels.py), known frames are without noise, and the network
  is told so. There is nothing else to it. `known_noise` gives them a little, where they are not to be trusted to the last
  pixel, and `history_scale` leads away from what the network would draw, did it not see them (history guidance, Song et al.
  2025, arXiv 2502.06764): above 1 the video keeps more closely to what it is told.
- 'network': `Unet3D(cond_frames=True)` sees the known frames, clean, and their mask as more input channels. It has
  been trained so (`GaussianDiffusion(prob_cond_frames=0.5)`), now and then with none, to draw from nothing too.
- 'guide', for any model: how wrong is the network about the known frames? The gradient of that error with respect to the
  noisy video says how the others must change for it to be less wrong, and its answer is moved that way (reconstruction
  guidance, Ho et al. 2022, arXiv 2204.03458, section 3.1). Each step costs a backward pass.
- 'replace', for any model: they learn nothing. The network sees the known frames as noisy as the rest and cannot know that
  they are certain, so early on, under much noise, the others go their own way.

Videos here are (b c f h w) in [-1, 1], masks (b f) bool.
"""

import torch
from torch import Tensor

from ..checks import tensor
from .frame_levels import CLEAN
from .samplers import Denoiser

WAYS = ('level', 'network', 'guide', 'replace')


def best_way(diffusion) -> str:
    """What a GaussianDiffusion was trained for."""
    return 'level' if diffusion.frame_noise == 'independent' else 'network' if diffusion.prob_cond_frames else 'guide'


def at_level(levels: Tensor, noise: Tensor, known: Tensor, mask: Tensor, level: int, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix of levels (rows f), in which known frames stay at theirs: (rows b f), without the rows in which nothing else
    moves; and the noise, with them in it."""
    if level != CLEAN:
        known = alpha_bar[level].sqrt().item() * known + (1 - alpha_bar[level]).sqrt().item() * noise
    levels = torch.where(mask.cpu(), level, levels[:, None])
    moves = (levels[1:] != levels[:-1]).flatten(1).any(dim=1)
    levels = torch.cat((levels[:-1][moves], levels[-1:]))
    return levels, torch.where(mask[:, None, :, None, None], known, noise)


def led_by_known(denoise: Denoiser, noise: Tensor, mask: Tensor, scale: float, last: int, limit: float = 1.) -> Denoiser:
    """The denoiser, led away from what it answers where the known frames are hidden: pure noise, at the last step."""
    def denoise_by_known(x: Tensor, t: Tensor) -> Tensor:
        unseen = denoise(torch.where(mask[:, None, :, None, None], noise, x), torch.where(mask.cpu(), last, t))
        return torch.lerp(unseen, denoise(x, t), scale).clamp(-limit, limit)
    return denoise_by_known


def replaced(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """The denoiser, corrected in the known frames."""
    return lambda x, t: torch.where(mask[:, None, :, None, None], known, denoise(x, t))


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


def given(first_frames: Tensor | None, known: Tensor | None, mask: Tensor | None,
          frames: int) -> tuple[Tensor | None, Tensor | None]:
    """Known frames come in one of two ways, whole: as a beginning (b c k h w), or as what is returned, (b c f h w) and a mask."""
    if first_frames is None:
        if (known is None) != (mask is None):
            raise ValueError('known and known_mask belong together: give the videos and which of their frames are known')
        return known, mask
    if known is not None or mask is not None:
        raise ValueError('first_frames says all about the known frames: leave known and known_mask out, or give only them')
    tensor('first_frames', first_frames)
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
    mask = mask if mask is None else torch.as_tensor(mask)
    if mask is None or mask.dtype != torch.bool or mask.shape not in ((frames,), (1, frames), (batch, frames)):
        given = 'nothing' if mask is None else f'{mask.dtype} of shape {tuple(mask.shape)}'
        raise ValueError(f'known_mask says which frames are known: expected bools of shape ({frames},) or ({batch}, {frames}), '
                         f'got {given}')
    known, mask = known.expand(batch, -1, -1, -1, -1), mask.to(known.device).expand(batch, frames)
    return torch.where(mask[:, None, :, None, None], known, 0), mask               # what is unknown may be NaN

"""Known frames: predict a video from its beginning, fill the middle, go on for ever.

Some frames of a clip are given, the sampler is to invent the others so that they fit. A mask (b f) says
which are known; video prediction knows a prefix, in-betweening both ends, and it is one call for all:

    known   x x . . . . . .     diffusion.sample(first_frames=video[:, :, :2])
    known   x . . . . . . x     diffusion.sample(known=video, known_mask=mask)

There are three ways. The first two need nothing of the network but that it has learnt to draw clips, and are
wrappers around the one question that every sampler asks, `denoise(x, t) -> x0`:

- `replaced`: whatever the network answers, the known frames are known. The sampler then carries them along with
  just the noise of each step. But the network's answer for the other frames is made from all of x, and nothing
  tells it that some of those frames are certain: it drifts from them where they are still noisy.
- `guided`: reconstruction guidance (Ho et al. 2022, arXiv 2204.03458, section 3.1). How wrong is the network about
  the known frames? The gradient of that error with respect to the noisy *unknown* frames says how those must
  change for it to be less wrong, and its answer is moved that way. Costs a backward pass in each step.
- `Unet3D(cond_frames=True)`: the network is trained for it, sees the known frames and the mask as more input
  channels, and sometimes (`draw_mask`) nothing, so that it can still draw from nothing.

Here videos are (b c f h w) in [-1, 1]; `mask` is (b 1 f 1 1), True where known.
"""

import torch
from torch import Tensor

from .samplers import Denoiser

METHODS = ('network', 'replace', 'guide')


def replaced(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """Known frames come out as they are."""
    def answer(x: Tensor, t: int) -> Tensor:
        return torch.where(mask, known, denoise(x, t))
    return answer


def guided(denoise: Denoiser, known: Tensor, mask: Tensor, alpha: Tensor, weight: float) -> Denoiser:
    """Known frames come out as they are, and the others are moved to where the network would have foreseen them.

    `alpha` (T) is the share of signal in x of each step; the paper's weight grows from 1 where the steps are many to 5
    and more where they are few.
    """
    def answer(x: Tensor, t: int) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise(x, t)
            error = (known - x0).square().mul(mask).sum()
        gradient, = torch.autograd.grad(error, x)
        moved = x0.detach() - weight * alpha[t] / 2 * gradient
        return torch.where(mask, known, moved.clamp(-1, 1))
    return answer


def draw_mask(count: int, frames: int, prob: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(count f) for training: nothing is known with 1 - `prob`; else a beginning, for half of the clips the end too."""
    where = dict(device=device, generator=generator)
    length = torch.randint(1, max(2, frames - 1), (count, 1), **where)
    some, ends = (torch.rand((2, count, 1), **where) < torch.tensor([prob, 0.5], device=device)[:, None, None])
    frame = torch.arange(frames, device=device)
    return some & ((frame < length) | ends & (frame == frames - 1))


def place(first_frames: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """A beginning (b c k h w) as a clip (b c f h w), black where unknown, and its mask (f)."""
    b, c, k, h, w = first_frames.shape
    if not 1 <= k < frames:
        raise ValueError(f'{k} first frames: the model draws clips of {frames}, so give 1 to {frames - 1}')
    rest = first_frames.new_zeros(b, c, frames - k, h, w)
    return torch.cat((first_frames, rest), dim=2), torch.arange(frames, device=first_frames.device) < k

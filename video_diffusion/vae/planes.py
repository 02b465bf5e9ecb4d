"""The VAE's group norm, condition and SiLU by the kernels of a GPU (norm_kernels.py), where no gradients are asked for.

    frame_moments(x, groups)             b c f h w -> mean and sum of squared deviations, b groups f each
    conditioned_silu(x, scale, ...)      b c f h w -> b c f h w

    combine(mean, deviation, counts)     the statistics of parts to those of the whole, of frames and of processes too

Half of a decoder's time went to the first two, in lines of torch that read and write the feature map once for each operation.
"""

import torch
from torch import Tensor

from ..networks import fused

NUMBERS = fused.NUMBERS              # of a plane in a tile


def combine(mean: Tensor, deviation: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Means and sums of squared deviations of parts, (... p), to the whole's, (... 1) (Chan et al. 1979)."""
    whole = (mean * (counts / counts.sum())).sum(-1, keepdim=True)
    return whole, (deviation + counts * (mean - whole) ** 2).sum(-1, keepdim=True)


def fits_planes(x: Tensor) -> bool:
    """Whether the next two take it."""
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return fused.fits(x) and plain and x.stride()[-2:] == (x.shape[-1], 1)


@fused.operation('frame_moments(Tensor x, int groups) -> (Tensor, Tensor)',
                 fake=lambda x, groups: tuple(fused.floats(x, len(x), groups, x.shape[2]) for _ in range(2)))
def frame_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of every frame's groups of channels, (b groups f) each."""
    b, c, f, h, w = x.shape
    tiles = -(-h * w // NUMBERS)
    share = -(-tiles // max(1, 4096 // (b * groups * f))) * NUMBERS
    splits = -(-h * w // share)
    mean, spread, number = (fused.floats(x, b, groups, f, splits) for _ in range(3))
    fused.launch('frame_moments', x, (b * groups * f, splits), x, mean, spread, number, h * w, f, groups, c // groups,
                 *x.stride()[:3], share, R=NUMBERS)
    mean, spread = combine(mean, spread, number[0, 0, 0])                               # of every plane the shares are alike
    return mean.squeeze(-1), spread.squeeze(-1)


@fused.operation('conditioned_silu(Tensor x, Tensor scale, Tensor shift, Tensor? gain=None, Tensor? offset=None,'
                 ' Tensor? latent=None) -> Tensor', fake=lambda x, *_: x.new_empty(x.shape))
def conditioned_silu(x: Tensor, scale: Tensor, shift: Tensor, gain: Tensor | None = None, offset: Tensor | None = None,
                     latent: Tensor | None = None) -> Tensor:
    """silu((x scale + shift) gain + offset): scale and shift (b c f|1 1 1) in float32; gain and offset (b c fz hz wz), stretched to
    the frames, of which each has its `latent` (f), and to height and width."""
    b, c, f, h, w = x.shape
    scale, shift, z = scale.contiguous(), shift.contiguous(), (1, 1, 1)
    if gain is not None:
        gain, offset, z = gain.contiguous(), offset.contiguous(), gain.shape[2:]
    y = x.new_empty(x.shape)
    fused.launch('conditioned_silu', x, (b * c * f, -(-h * w // NUMBERS)), x, y, scale, shift, gain, offset, latent, h * w, w, f, c,
                 *x.stride()[:3], scale.shape[2] > 1, *z, h // z[1], w // z[2], R=NUMBERS, CONDITIONED=gain is not None)
    return y

"""What the causal VAE is made of: conditioned norm, residual block, half and double the size.

Every norm here is followed by SiLU and a causal convolution, and `normed_conv` is that triple. With gradients
it does what it says. Without, the norm's statistics are taken first; then a few frames at a time are
normalised, put through SiLU and the convolution, and written to the output, which may be the memory of the
input. So a residual block holds two feature maps, its input and its output; a plain one holds five or more.

Shapes: x b c f h w is the feature map, z b c fz hz wz the latent that conditions the decoder's norms.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.unet_blocks import per_frame
from . import planes
from .context_parallel import CausalConv3d, GroupNorm, Piece, at_once, empty_clip, steps


class Norm(GroupNorm):
    """Group norm and SiLU; in the decoder the latent sets scale and offset, place by place.

    A 1x1x1 convolution commutes with nearest resizing: it runs on the small latent, its result is broadcast.
    """

    def __init__(self, groups: int, channels: int, scope: str, latent_channels: int | None = None):
        super().__init__(groups, channels, scope)
        self.conditioned = latent_channels is not None
        if self.conditioned:
            self.gain = nn.Conv3d(latent_channels, channels, 1)
            self.offset = nn.Conv3d(latent_channels, channels, 1)

    def prepare(self, x: Tensor, z: Tensor | None, piece: Piece):
        """Returns a function: (start, stop) -> those frames of x, normalised, conditioned, through SiLU."""
        scale, shift = self.scale_and_shift(x, piece)                                   # b c f|1 1 1
        if self.conditioned:
            gain, offset = self.gain(z), self.offset(z)                                 # b c fz hz wz
            latent_of = stretched_index(z.shape[2], x.shape[2], piece.first, x.device)  # (f,)

        def frames(start: int, stop: int) -> Tensor:
            part = x[:, :, start:stop]                                                  # b c f h w
            a, b = (t[:, :, start:stop] if t.shape[2] > 1 else t for t in (scale, shift))
            if planes.fits_planes(x):
                latents = (gain, offset, latent_of[start:stop]) if self.conditioned else ()
                return planes.conditioned_silu(part, a, b, *latents)
            if not self.conditioned:
                return silu(torch.addcmul(b, part, a).to(x.dtype))
            # Stretched in time and width only; over the rows of one latent row it is broadcast.
            at, wide = latent_of[start:stop], x.shape[-1] // z.shape[-1]
            gain_here, offset_here = (t.index_select(2, at).repeat_interleave(wide, -1) for t in (gain, offset))    # b c f hz w
            # (part * a + b) * gain + offset = part * (a * gain) + (b * gain + offset)
            a, b = a * gain_here, torch.addcmul(offset_here, b, gain_here)
            rows = part.unflatten(3, (z.shape[3], -1))                                  # b c f hz h/hz w
            return silu(torch.addcmul(b.unsqueeze(4), rows, a.unsqueeze(4)).to(x.dtype).flatten(3, 4))
        return frames


def silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())


def stretched_index(short: int, long: int, first: bool, device) -> Tensor:
    """Nearest resizing in time, (long,): a special first frame to the first frame, the rest to the rest."""
    index = torch.arange(long, device=device)
    if first:
        return (index - 1) // max(1, (long - 1) // max(1, short - 1)) + 1
    return index // (long // short)


def normed_conv(x: Tensor, norm: Norm, conv: CausalConv3d, z: Tensor | None, piece: Piece,
                dropout: nn.Dropout | None = None, reuse: bool = False) -> Tensor:
    """norm, SiLU, dropout, causal convolution; `reuse` says that x is not needed afterwards."""
    prepare = norm.prepare(x, z, piece)
    drops = dropout is not None and dropout.p > 0 and dropout.training
    if not at_once() and not drops:
        return conv.in_steps(x, prepare, piece, reuse)
    normed = prepare(0, x.shape[2])
    return conv(dropout(normed) if drops else normed, piece)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm, dropout: float):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, z: Tensor | None, piece: Piece) -> Tensor:
        h = normed_conv(x, self.norm1, self.conv1, z, piece)                              # b out f h w
        h = normed_conv(h, self.norm2, self.conv2, z, piece, self.dropout, reuse=True)    # b out f h w
        if at_once():
            return h + self.shortcut(x)
        for start, stop in steps(x):                 # no third feature map for the sum
            h[:, :, start:stop] += self.shortcut(x[:, :, start:stop])
        return h


class Downsample(nn.Module):
    """Halves height and width by a 3x3 convolution per frame, time by averaging pairs before it."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, piece: Piece) -> tuple[Tensor, Piece]:
        frames = (x.shape[2] + piece.first) // 2 if self.time else x.shape[2]
        return per_frames(self.shrink, x, frames, piece.first), piece.resampled(0.5) if self.time else piece

    def shrink(self, x: Tensor, first: bool) -> Tensor:
        if self.time:
            kept, pairs = x[:, :, :int(first)], x[:, :, int(first):]
            x = torch.cat([kept, (pairs[:, :, ::2] + pairs[:, :, 1::2]) / 2], dim=2)
        x = F.pad(x, (0, 1, 0, 1))                                          # right and bottom
        return per_frame(self.conv, x)


class Upsample(nn.Module):
    """Doubles height and width (nearest, then a 3x3 convolution per frame); time, where asked, by repetition.

    Repeated frames stay alike under a convolution per frame, so time is doubled after it.
    """

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, piece: Piece) -> tuple[Tensor, Piece]:
        frames = 2 * x.shape[2] - piece.first if self.time else x.shape[2]
        return per_frames(self.enlarge, x, frames, piece.first), piece.resampled(2) if self.time else piece

    def enlarge(self, x: Tensor, first: bool) -> Tensor:
        x = per_frame(lambda frame: doubled_conv(frame, self.conv), x)
        return x.index_select(2, stretched_index(x.shape[2], 2 * x.shape[2] - first, first, x.device)) if self.time else x


def doubled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(twice the size of x, nearest), a 3x3 convolution with padding 1: (n c h w) -> (n c 2h 2w).

    An output pixel sees nine pixels, but only four different ones. One 4x4 transposed convolution of stride 2, whose
    weights are sums of the nine, takes each of them once: 4/9 of the multiplications, and no doubled input in memory.
    """
    kernel = F.avg_pool2d(conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)     # out in 4 4
    return F.conv_transpose2d(x, kernel.transpose(0, 1), conv.bias, stride=2, padding=1)


def per_frames(function, x: Tensor, frames_out: int, first: bool) -> Tensor:
    """function(x, first), a few frames at a time where no gradient is needed."""
    if at_once():
        return function(x, first)
    out, at = None, 0
    for start, stop in steps(x, first):
        y = function(x[:, :, start:stop], first and start == 0)
        out = empty_clip(y, frames_out) if out is None else out
        out[:, :, at:at + y.shape[2]] = y
        at += y.shape[2]
    return out


def stem(x: Tensor, conv: CausalConv3d, piece: Piece) -> Tensor:
    if at_once():
        return conv(x, piece)
    return conv.in_steps(x, lambda start, stop: x[:, :, start:stop], piece)


class Level(nn.Module):
    """Residual blocks at one resolution, and the way to the next one (None after the last)."""

    def __init__(self, channels: list[int], norm, dropout: float, resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList([ResnetBlock(a, b, norm, dropout) for a, b in pairwise(channels)])
        self.resample = resample

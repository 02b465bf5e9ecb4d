"""What the U-Net is made of beside attention: a number as a vector, convolutions that see every frame alone, ResNet blocks.

    x (b c f h w) -- conv -- group norm -- FiLM (time and condition) -- SiLU -- conv -- group norm -- SiLU -- + --> y
      `------------------------------- 1x1x1 conv, or nothing ----------------------------------------------'

What time and condition say comes as (b 1 n), for all frames of a clip, or as (b f n), where each frame has a time of its own.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import fused
from .recompute import little, on_cpu, plainly, recompute


class SinusoidalEmbedding(nn.Module):
    """A number as sines and cosines of geometrically spaced frequencies, from 1 down to 1 / 10000."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        exponent = torch.arange(half, device=time.device) * (-math.log(10000) / (half - 1))
        angle = time[..., None] * exponent.exp()
        return torch.cat((angle.sin(), angle.cos()), dim=-1)  # (... dim)


LARGE = 2 ** 20         # numbers of a weight, 4 MB


class FrameConv(nn.Conv2d):
    """A 1 x k x k convolution: a 2-D one that sees every frame as an image of its own."""

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        bias = self.bias if with_bias else None
        if self.weight.numel() < LARGE or not on_cpu(x):
            return per_frame(lambda x: self._conv_forward(x, self.weight, bias), x)
        # The gradient of such a weight would leave the cache and come back for every frame; for a clip, an image of three
        # axes to the same kernel, it does so once. Not channels-last, or the weight would be copied into that layout, too.
        y = F.conv3d(x.contiguous(), self.weight.unsqueeze(2), bias, (1, *self.stride), (0, *self.padding))
        return y.contiguous(memory_format=torch.channels_last_3d)


class FrameConvTranspose(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        return per_frame(super().forward, x)


def per_frame(function, x: Tensor) -> Tensor:
    """Fold the frames into the batch and back. In channels-last memory neither copies."""
    y = function(rearrange(x, 'b c f h w -> (b f) c h w'))
    return rearrange(y, '(b f) c h w -> b c f h w', b=x.shape[0])


class Block(nn.Module):
    """Convolution, group norm over the whole clip, FiLM (a scale and a shift per channel), SiLU."""

    def __init__(self, dim_in: int, dim_out: int, groups: int):
        super().__init__()
        self.conv = FrameConv(dim_in, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, dim_out)

    def convolve(self, x: Tensor) -> Tensor:
        """x (b c f h w). What is fused on a GPU adds the bias too."""
        return self.conv(x, with_bias=not fused.fits(x))

    def activate(self, x: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        """All but the convolution: x (b c f h w), scale_shift (b 1 2c) or (b f 2c)."""
        if fused.fits(x):
            return fused.norm_film_silu(x, self.conv.bias, self.norm, scale_shift)
        if scale_shift is None and on_cpu(x):
            return F.silu(self.norm(x))
        gain, bias = self.norm.weight[None, None], self.norm.bias[None, None]          # 1 1 c
        if scale_shift is not None:
            # FiLM is x * (scale + 1) + shift. The norm's own gain and bias join it, and x is scaled only once.
            scale, shift = scale_shift.chunk(2, dim=-1)
            gain, bias = gain * (scale + 1), bias * (scale + 1) + shift
        return F.silu(self.normed(x, *(rearrange(values, 'b f c -> b c f 1 1') for values in (gain, bias))))

    def normed(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        """x (b c f h w) with its groups normalised, times gain, plus bias (b c f 1 1), in the layout that x has.

        A CPU's group norm knows channels-last. That of a GPU would copy x into another layout, and the next convolution back.
        """
        groups, eps = self.norm.num_groups, self.norm.eps
        if on_cpu(x):
            return torch.addcmul(bias, F.group_norm(x, groups, eps=eps), gain)
        width = torch.promote_types(x.dtype, torch.float32)                  # half precision is too short for such a sum
        var, mean = torch.var_mean(x.to(width).unflatten(1, (groups, -1)), dim=(2, 3, 4, 5), correction=0, keepdim=True)
        rstd, mean = (each.repeat_interleave(x.shape[1] // groups, dim=1)[:, :, 0] for each in ((var + eps).rsqrt(), mean))
        gain = gain * rstd                                                   # b c f 1 1
        return torch.addcmul(bias - mean * gain, x, gain).to(x.dtype)


class ResnetBlock(nn.Module):
    """Two blocks and a shortcut; the first block is modulated by the time-and-condition vector, if there is one."""

    def __init__(self, dim_in: int, dim_out: int, *, groups: int, emb_dim: int | None = None):
        super().__init__()
        self.little = little(dim_out)
        self.to_scale_shift = nn.Linear(emb_dim, 2 * dim_out) if emb_dim else None
        self.block1 = Block(dim_in, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups)
        self.shortcut = FrameConv(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """`skip`: more channels of the input, from the other side of the U."""
        scale_shift = self.to_scale_shift(F.silu(emb)) if self.to_scale_shift else None
        call = recompute if 8 * x.numel() >= self.little else plainly           # eight tensors would be kept
        shortcut, h = self.read(x) if skip is None else call(self.read, x, skip)
        h = call(self.between, h, scale_shift)
        return call(self.block2.activate, h) + shortcut

    def read(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return self.shortcut(x), self.block1.convolve(x)

    def between(self, h: Tensor, scale_shift: Tensor | None) -> Tensor:
        return self.block2.convolve(self.block1.activate(h, scale_shift))

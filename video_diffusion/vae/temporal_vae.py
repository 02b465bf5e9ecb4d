"""A VAE whose encoder sees images and whose decoder sees time: the autoencoder of Stable Video Diffusion.

Blattmann et al. 2023 (arXiv 2311.15127) took the autoencoder of an image model and taught only its decoder
about time, so that decoded frames do not flicker. Height and width are compressed 8x, time is not.

    video     b 3 f 256 256                        the encoder: images, each frame alone
    latent    b 4 f  32  32
    video     b 3 f 256 256                        the decoder: every residual block is two,

        x -> spatial block, 3x3 on each frame -> s -> temporal block, 3x1x1 -> t      s + weight * (t - s)

The temporal block is itself residual, t = s + r, so the blend is `s + weight * r`, weight = sigmoid of one
learnt number. Frames that `image_only` marks have weight 0: they do not depend on the other frames at all.

Compare causal_vae.py, which compresses time too, treats it in the encoder as well and never looks ahead.

**Memory.** Feature maps are channels-last, b f h w c in memory: then a frame is an image and (f, h w) is one, too,
without a copy. Without gradients a frame at a time goes through the spatial block; the temporal block takes the
statistics of its norms first and then needs three frames at a time, so that two feature maps are all there is.

    vae = TemporalVAE()
    z = vae.encode(video).mode()                   # (1, 3, 14, 256, 256) -> (1, 4, 14, 32, 32)
    video = vae.decode(z, chunk=8, tile=256)       # optional: 8 frames at a time, tiles of 256 pixels, blended
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..networks import unet_blocks
from ..networks.attention import SpatialSelfAttention
from ..networks.recompute import plainly, recompute
from .causal_blocks import doubled_conv, silu
from .causal_vae import fit_latent, fit_video, refuse_bad_pieces, widths
from .context_parallel import at_once, empty_clip, steps
from .gaussian import DiagonalGaussian
from .tiling import in_chunks, in_tiles


class ImageBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, and a shortcut: (n c h w). `upsample`: double the size before."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, upsample: bool = False):
        super().__init__()
        self.upsample = nn.Conv2d(in_channels, in_channels, 3, padding=1) if upsample else None
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample is not None:
            x = doubled_conv(x, self.upsample)                                       # n in 2h 2w
        h = self.conv1(silu(self.norm1(x)))                                          # n out h w
        h = self.conv2(silu(self.norm2(h)))
        return h.add_(self.shortcut(x))                  # no gradient asks for what a convolution put out


class TemporalConv(nn.Conv2d):
    """A 3x1x1 convolution, as a 2-D one of 3x1 over (f, h w): the same numbers, and on a CPU twice as fast."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, (3, 1))

    def forward(self, x: Tensor, pad: int = 1) -> Tensor:
        y = F.conv2d(x.flatten(3), self.weight, self.bias, padding=(pad, 0))         # b c f (h w)
        return y.unflatten(3, x.shape[3:])


class ClipNorm(nn.GroupNorm):
    """Group norm over all frames of a clip and SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(super().forward(x))

    def prepare(self, x: Tensor):
        """Without gradients, a few frames at a time: a function (start, stop) -> those frames of forward(x)."""
        b, c, _, h, w = x.shape
        # torch's group norm tells the statistics of each frame; equal parts combine to the whole's.
        wide = torch.promote_types(x.dtype, torch.float32)               # half precision is too short for a square of them
        means, rstds = zip(*[torch.native_group_norm(frame.to(wide), None, None, b, c, h * w, self.num_groups, self.eps)[1:]
                             for frame in x.unbind(2)])
        mean, var = torch.stack(means, -1), torch.stack(rstds, -1) ** -2 - self.eps                 # b g f
        rstd, mean = (var.mean(-1) + mean.var(-1, unbiased=False) + self.eps).rsqrt(), mean.mean(-1)
        rstd, mean = (t.repeat_interleave(c // self.num_groups, dim=1) for t in (rstd, mean))       # b c
        scale = rstd * self.weight
        shift = self.bias - mean * scale
        scale, shift = (t[:, :, None, None, None] for t in (scale, shift))
        return lambda start, stop: silu(torch.addcmul(shift, x[:, :, start:stop], scale).to(x.dtype))


def normed_conv(x: Tensor, norm: ClipNorm, conv: TemporalConv, reuse: bool = False) -> Tensor:
    """conv(norm(x)); `reuse` says that x is not needed afterwards."""
    if at_once():
        return conv(norm(x))
    frames, normed, cuts = x.shape[2], norm.prepare(x), steps(x, unit=1)
    out = x if reuse else torch.empty_like(x)
    window = empty_clip(x, 2 + cuts[0][1])                                           # frames start-1 ... stop
    window[:, :, :1] = 0                                                             # nothing is before the clip
    window[:, :, 1:2] = normed(0, 1)
    for start, stop in cuts:
        here = window[:, :, :2 + stop - start]
        if stop < frames:
            here[:, :, 2:] = normed(start + 1, stop + 1)
        else:
            here[:, :, 2:-1] = normed(start + 1, stop)
            here[:, :, -1:] = 0                                                      # and nothing after it
        out[:, :, start:stop] = conv(here, pad=0)
        window[:, :, :2] = here[:, :, -2:].clone()
    return out


class TemporalBlock(nn.Module):
    """Norm over the clip, SiLU, 3x1x1 convolution, twice, added with a learnt weight: (b c f h w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm1 = ClipNorm(groups, channels)
        self.conv1 = TemporalConv(channels)
        self.norm2 = ClipNorm(groups, channels)
        self.conv2 = TemporalConv(channels)
        self.mix = nn.Parameter(torch.zeros(1))                                      # the weight before the sigmoid

    def forward(self, x: Tensor, image_only: Tensor | None) -> Tensor:
        h = normed_conv(x, self.norm1, self.conv1)
        h = normed_conv(h, self.norm2, self.conv2, reuse=True)
        weight = self.mix.sigmoid()
        if image_only is not None:
            weight = weight * ~image_only[:, None, :, None, None]                    # b 1 f 1 1
        return torch.addcmul(x, h, weight.to(x.dtype), out=None if at_once() else x)


def video_block(spatial: nn.Module, channels: int, groups: int) -> nn.ModuleDict:
    return nn.ModuleDict({'spatial': spatial, 'temporal': TemporalBlock(channels, groups)})


def per_frame(function, x: Tensor, growth: float = 1., reuse: bool = False) -> Tensor:
    """function on every frame as an image of its own; without gradients a few frames at a time (see `steps`), and
    with `reuse` in the memory of x, where they fit."""
    if at_once():
        return unet_blocks.per_frame(function, x)
    out = None
    for start, stop in steps(x, unit=1, growth=growth):
        y = unet_blocks.per_frame(function, x[:, :, start:stop])
        if out is None:
            out = x if reuse and y.shape[1] == x.shape[1] and y.shape[3:] == x.shape[3:] else empty_clip(y, x.shape[2])
        out[:, :, start:stop] = y
    return out


class ImageLevel(nn.Module):
    """Blocks at one resolution, and the way to the next one (None after the last)."""

    def __init__(self, channels: list[int], groups: int, downsample: bool):
        super().__init__()
        self.blocks = nn.ModuleList([ImageBlock(a, b, groups) for a, b in pairwise(channels)])
        self.downsample = nn.Conv2d(channels[-1], channels[-1], 3, stride=2) if downsample else None


class Encoder(nn.Module):
    """A frame (n c h w) -> mean and log-variance (n 2*latent h/8 w/8)."""

    def __init__(self, in_channels: int, latent_channels: int, dims: list[int], blocks: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, dims[0], 3, padding=1)
        self.levels = nn.ModuleList([
            ImageLevel([before, *[here] * blocks], groups, downsample=i < len(dims) - 1)
            for i, (before, here) in enumerate(pairwise([dims[0], *dims]))])
        self.middle1 = ImageBlock(dims[-1], dims[-1], groups)
        self.middle_attention = SpatialSelfAttention(dims[-1], groups)
        self.middle2 = ImageBlock(dims[-1], dims[-1], groups)
        self.norm_out = nn.GroupNorm(groups, dims[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(dims[-1], 2 * latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)

    def forward(self, x: Tensor, run) -> Tensor:
        x = self.conv_in(x)                                                          # n dims[0] h w
        for level in self.levels:
            for block in level.blocks:
                x = run(block, x)
            if level.downsample is not None:
                x = level.downsample(F.pad(x, (0, 1, 0, 1)))                         # right and bottom
        for block in (self.middle1, self.middle_attention, self.middle2):
            x = run(block, x)                                                        # n dims[-1] hz wz
        return self.quant_conv(self.conv_out(silu(self.norm_out(x))))


class Decoder(nn.Module):
    """Latents (b latent f hz wz) -> video (b out f h w)."""

    def __init__(self, out_channels: int, latent_channels: int, dims: list[int], blocks: int, groups: int):
        super().__init__()
        dims = dims[::-1]
        self.conv_in = nn.Conv2d(latent_channels, dims[0], 3, padding=1)
        top = dims[0]
        self.middle = nn.ModuleList([video_block(ImageBlock(top, top, groups), top, groups)])
        if blocks > 1:        # with one block per level the public network has one block in the middle, no attention
            spatial = nn.Sequential(SpatialSelfAttention(top, groups), ImageBlock(top, top, groups))
            self.middle.append(video_block(spatial, top, groups))
        self.levels = nn.ModuleList([
            nn.ModuleList([video_block(ImageBlock(before, here, groups, upsample=i > 0), here, groups),
                           *[video_block(ImageBlock(here, here, groups), here, groups) for _ in range(blocks)]])
            for i, (before, here) in enumerate(pairwise([top, *dims]))])
        self.norm_out = nn.GroupNorm(groups, dims[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(dims[-1], out_channels, 3, padding=1)
        self.time_conv_out = TemporalConv(out_channels)

    def forward(self, z: Tensor, image_only: Tensor | None, run) -> Tensor:
        z = z.contiguous(memory_format=torch.channels_last_3d)
        x = per_frame(self.conv_in, z, growth=self.conv_in.out_channels / z.shape[1])           # b dims[0] f hz wz
        for level in [self.middle, *self.levels]:
            for block in level:       # two calls, so that the input of the first is freed before the second needs memory
                x = run(per_frame, block['spatial'], x, 4, True)
                x = run(block['temporal'], x, image_only)                                       # at last b dims[-1] f h w
        x = per_frame(lambda frames: self.conv_out(silu(self.norm_out(frames))), x)             # b out f h w
        y = self.time_conv_out(x)
        if image_only is None:
            return y
        alone = rearrange(x, 'b c f h w -> (b f) c 1 h w')                                      # a clip of one frame each
        alone = rearrange(self.time_conv_out(alone), '(b f) c 1 h w -> b c f h w', b=x.shape[0])
        return torch.where(image_only[:, None, :, None, None], alone, y)


class TemporalVAE(nn.Module):
    scaling_factor = 0.18215        # of the pretrained weights: latents times this have unit variance

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        dim: int = 128,                       # channels of the first level
        dim_mults: tuple = (1, 2, 4, 4),      # channels of each level, in dims; h and w halve between levels
        blocks_per_level: int = 2,            # in the encoder; the decoder has one more
        norm_groups: int = 32,
        gradient_checkpointing: bool = False, # recompute blocks in the backward pass: less memory, more time
    ):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        dims = widths(self.config)
        self.time_compression, self.space_compression = 1, 2 ** (len(dims) - 1)
        self.latent_channels, self.out_channels = latent_channels, out_channels
        self._run = partial(recompute, draws=True) if gradient_checkpointing else plainly
        self.encoder = Encoder(in_channels, latent_channels, dims, blocks_per_level, norm_groups)
        self.decoder = Decoder(out_channels, latent_channels, dims, blocks_per_level, norm_groups)

    def forward(self, video: Tensor, sample: bool = True, generator: torch.Generator | None = None,
                image_only: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """(b c f h w) in [0, 1] -> its reconstruction and the posterior; `sample=False` decodes the mode."""
        posterior = self.encode(video)
        z = posterior.sample(generator) if sample else posterior.mode()
        return self.decode(z, image_only=image_only), posterior

    def encode(self, video: Tensor, chunk: int | None = None, tile: int | None = None) -> DiagonalGaussian:
        """(b c f h w) in [0, 1] -> the distribution over latents (b latent_channels f h/8 w/8).

        `chunk` frames at a time, which changes nothing, in tiles of `tile` pixels, which changes the norms' statistics.
        """
        video = fit_video(self, video)
        refuse_bad_pieces(self, chunk, tile, 1)
        moments = in_tiles(lambda part: self._moments(part, chunk), video, tile, 1 / self.space_compression)
        return DiagonalGaussian.from_moments(moments)

    def decode(self, z: Tensor, frames: int | None = None, chunk: int | None = None, tile: int | None = None,
               image_only: Tensor | None = None) -> Tensor:
        """Latents (b latent_channels f hz wz) -> video (b c f h w), [0, 1] but not clamped.

        `image_only` (b f), bool: these frames are images and have nothing to do with their neighbours. `chunk`
        frames at a time, in tiles of `tile` pixels, both blended where they overlap: close to the whole, not equal.
        `frames`, if given, must be f: time is not compressed here, as it is in the other VAE.
        """
        z = fit_latent(self, z)
        refuse_bad_pieces(self, chunk, tile, 1)
        if frames not in (None, z.shape[2]):
            raise ValueError(f'frames={frames}: {z.shape[2]} latent frames stand for as many frames')
        if image_only is not None and (image_only.dtype != torch.bool or image_only.shape != (z.shape[0], z.shape[2])):
            raise ValueError(f'image_only of shape {tuple(image_only.shape)}, {image_only.dtype}: give one bool '
                             f'for each frame, ({z.shape[0]}, {z.shape[2]})')
        scale = self.space_compression
        return in_tiles(lambda part: self._video(part, chunk, image_only), z, tile and tile // scale, scale)

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, where losses are balanced (`vae_loss.adaptive_weight`)."""
        return self.decoder.time_conv_out.weight

    def _moments(self, video: Tensor, chunk: int | None) -> Tensor:
        x = (video * 2 - 1).contiguous(memory_format=torch.channels_last_3d)
        growth = self.config['dim'] / x.shape[1]                     # frame -> first feature map
        return torch.cat([per_frame(lambda frames: self.encoder(frames, self._run), part, growth)
                          for part in x.split(chunk or x.shape[2], dim=2)], dim=2)

    def _video(self, z: Tensor, chunk: int | None, image_only: Tensor | None) -> Tensor:
        def decode(start, stop):
            return self.decoder(z[:, :, start:stop], image_only if image_only is None else image_only[:, start:stop], self._run)
        x = in_chunks(decode, z.shape[2], chunk) if chunk is not None else decode(0, z.shape[2])
        return (x + 1) / 2

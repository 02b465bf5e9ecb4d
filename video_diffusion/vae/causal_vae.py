"""A causal video VAE: 4x less time, 8x less height and width, and no frame depends on a later one.

The 3D causal VAE of CogVideoX (Yang et al. 2024, arXiv 2408.06072, section 2.1). Video in [0, 1], seen from
outside; inside it is [-1, 1].

    video    b  3 17 64 64     f0 | f1 f2 f3 f4 | f5 f6 f7 f8 | ...      1 + 4k frames
    latent   b 16  5  8  8     z0 |     z1      |     z2      | ...      1 + k frames

The special first frame is compressed in space only, so that one network reads images and videos. A clip of
4k frames has none: k latent frames. Which of the two a clip is gets decided once, in `encode` and `decode`,
and is handed down in a `Piece`; no layer guesses it from the number of frames before it.

Levels: the encoder halves height and width between levels, and time as well at its first log2(time_compression)
halvings; the decoder doubles them, time as well at *its* first so many doublings. The decoder's norms are conditioned on
the latent (Zheng et al. 2022, arXiv 2209.09002): `group_norm(x) * gain(z) + offset(z)`, z stretched to the size of x.

`norm_scope='clip'` takes the norms' statistics over all frames at hand, as the pretrained weights expect;
then only the convolutions are causal. With `'frame'` the whole VAE is, and streaming is exact.

    vae = CausalVAE()
    z = vae.encode(video).mode()                  # (1, 3, 49, 256, 256) -> (1, 16, 13, 32, 32)
    video = vae.decode(z, chunk=2, tile=256)      # optional: 2 latent frames at a time, tiles of 256 pixels
    for frames in vae.decode_stream(latents):     # an endless video in constant memory
        ...
"""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Iterable, Iterator

import torch
from torch import Tensor, nn

from .. import checks
from ..networks.recompute import plainly, recompute
from .causal_blocks import Downsample, Level, Norm, Upsample, normed_conv, stem
from .context_parallel import CausalConv3d, Piece
from .frame_shares import agree_on_counts, agree_on_shares, has_special_first_frame, share_of_noise
from .gaussian import DiagonalGaussian
from .tiling import in_tiles


class Encoder(nn.Module):
    def __init__(self, in_channels, latent_channels, dim, dims, blocks, time_levels, norm, dropout):
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, dim)
        self.levels = nn.ModuleList([
            Level([before, *[here] * blocks], norm, dropout,
                  Downsample(here, time=i < time_levels) if i < len(dims) - 1 else None)
            for i, (before, here) in enumerate(pairwise([dim, *dims]))])
        self.middle = Level([dims[-1]] * 3, norm, dropout, None)
        self.norm_out = norm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * latent_channels)

    def forward(self, x: Tensor, piece: Piece, run) -> Tensor:
        x = stem(x, self.conv_in, piece)                               # b dim f h w
        for level in [*self.levels, self.middle]:
            for block in level.blocks:
                x = run(block, x, None, piece)
            if level.resample is not None:
                x, piece = level.resample(x, piece)                    # at last b dims[-1] fz hz wz
        return normed_conv(x, self.norm_out, self.conv_out, None, piece)     # b 2*latent fz hz wz


class Decoder(nn.Module):
    def __init__(self, out_channels, latent_channels, dims, blocks, time_levels, norm, dropout):
        super().__init__()
        dims = dims[::-1]
        self.conv_in = CausalConv3d(latent_channels, dims[0])
        self.middle = Level([dims[0]] * 3, norm, dropout, None)
        self.levels = nn.ModuleList([
            Level([before, *[here] * (blocks + 1)], norm, dropout,
                  Upsample(here, time=i < time_levels) if i < len(dims) - 1 else None)
            for i, (before, here) in enumerate(pairwise([dims[0], *dims]))])
        self.norm_out = norm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], out_channels)

    def forward(self, z: Tensor, piece: Piece, run) -> Tensor:
        x = stem(z, self.conv_in, piece)                               # b dims[0] fz hz wz
        for level in [self.middle, *self.levels]:
            for block in level.blocks:
                x = run(block, x, z, piece)
            if level.resample is not None:
                x, piece = level.resample(x, piece)                    # at last b dims[-1] f h w
        return normed_conv(x, self.norm_out, self.conv_out, z, piece)  # b out f h w


class CausalVAE(nn.Module):
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        dim: int = 128,                       # channels after the first convolution
        dim_mults: tuple = (1, 2, 2, 4),      # channels of each level, in dims; h and w halve between levels
        blocks_per_level: int = 3,            # in the encoder; the decoder has one more
        time_compression: int = 4,            # 1, 2, 4 or 8
        norm_groups: int = 32,
        norm_scope: str = 'clip',             # as pretrained weights expect; 'frame' for strict causality
        dropout: float = 0.,
        gradient_checkpointing: bool = False, # recompute blocks in the backward pass: less memory, more time
    ):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        dims = widths(self.config)
        if time_compression not in (1, 2, 4, 8) or time_compression > 2 ** (len(dims) - 1):
            raise ValueError(f'time_compression={time_compression}: give 1, 2, 4 or 8, at most 2 per step between levels; '
                             f'{len(dims)} levels allow {min(8, 2 ** (len(dims) - 1))}')
        checks.one_of('norm_scope', norm_scope, ('clip', 'frame'))
        checks.number('dropout', dropout, 0, 0.99)
        time_levels = int(math.log2(time_compression))
        self.time_compression, self.space_compression = time_compression, 2 ** (len(dims) - 1)
        self.latent_channels, self.out_channels = latent_channels, out_channels
        self._run = partial(recompute, draws=True) if gradient_checkpointing else plainly
        self.group = None                     # processes that share a clip's frames, see context_parallel

        def norm(channels): return Norm(norm_groups, channels, norm_scope)
        def conditioned_norm(channels): return Norm(norm_groups, channels, norm_scope, latent_channels)
        self.encoder = Encoder(in_channels, latent_channels, dim, dims, blocks_per_level, time_levels, norm, dropout)
        self.decoder = Decoder(out_channels, latent_channels, dims, blocks_per_level, time_levels, conditioned_norm, dropout)

    def forward(self, video: Tensor, sample: bool = True, generator=None) -> tuple[Tensor, DiagonalGaussian]:
        """(b c f h w) in [0, 1] -> its reconstruction and the posterior; `sample=False` decodes the mode."""
        posterior = self.encode(video)
        frames, z = video.shape[2], posterior.mode()
        if self.group is not None:
            frames = sum(agree_on_counts(video, self.group))                          # of the whole clip
            if sample:
                z = z + posterior.std * share_of_noise(z, self.group, generator)
        elif sample:
            z = posterior.sample(generator)
        return self.decode(z, frames), posterior

    def encode(self, video: Tensor, chunk: int | None = None, tile: int | None = None) -> DiagonalGaussian:
        """(b c f h w) in [0, 1] -> the distribution over latents (b latent_channels fz h/8 w/8).

        `chunk` frames at a time (a multiple of `time_compression`) in tiles of `tile` pixels: less memory.
        With norm_scope 'frame' chunks change nothing; otherwise, and with tiles, the norms' statistics do.
        """
        video = fit_video(self, video)
        unit = self.time_compression
        refuse_bad_pieces(self, chunk, tile, unit)

        def moments(part: Tensor) -> Tensor:
            return self._through(self.encoder, part * 2 - 1, chunk, partial(has_special_first_frame, compression=unit), unit)
        return DiagonalGaussian.from_moments(in_tiles(moments, video, tile, 1 / self.space_compression))

    def decode(self, z: Tensor, frames: int | None = None, chunk: int | None = None, tile: int | None = None) -> Tensor:
        """Latents (b latent_channels fz hz wz) -> video (b c f h w), [0, 1] but not clamped.

        fz latent frames become 1 + 4 (fz - 1) frames, or `frames=4 * fz` where no first frame was kept apart.
        `chunk` latent frames at a time, in tiles of `tile` pixels: see `encode`.
        """
        z = fit_latent(self, z)
        scale = self.space_compression
        refuse_bad_pieces(self, chunk, tile, 1)

        def pixels(part: Tensor) -> Tensor:
            return (self._through(self.decoder, part, chunk, partial(self._special, frames=frames), 1) + 1) / 2
        return in_tiles(pixels, z, tile and tile // scale, scale)

    def encode_stream(self, frame_chunks: Iterable[Tensor], first_frame: bool = True) -> Iterator[DiagonalGaussian]:
        """Chunks of any number of frames -> distributions over the latent frames that they complete.

        `first_frame`: the video begins with the special frame that is kept apart (1 + 4k frames) or not (4k).
        """
        parts = (chunk * 2 - 1 for chunk in self._whole_latents(frame_chunks, first_frame))
        for moments in self._stream(self.encoder, parts, first_frame):
            yield DiagonalGaussian.from_moments(moments)

    def decode_stream(self, z_chunks: Iterable[Tensor], first_frame: bool = True) -> Iterator[Tensor]:
        """Chunks of any number of latent frames -> the frames they stand for, in constant memory."""
        for frames in self._stream(self.decoder, z_chunks, first_frame):
            yield (frames + 1) / 2

    def context_parallel(self, group) -> 'CausalVAE':
        """From now on each process of `group` hands in and gets back its own frames; None ends that."""
        self.group = group
        return self

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, where losses are balanced (`vae_loss.adaptive_weight`)."""
        return self.decoder.conv_out.weight

    def _through(self, network: nn.Module, x: Tensor, chunk: int | None, special, unit: int) -> Tensor:
        """network(x): all frames of a clip, chunk by chunk, or those that this process holds, a multiple of `unit`.

        special(f): whether the first of f frames, which are the whole clip, is a special one.
        """
        if self.group is None:
            first = special(x.shape[2])
            if chunk is None:
                return network(x, Piece(first), self._run)
            return torch.cat(list(self._stream(network, chunks(x, chunk), first)), dim=2)
        if chunk is not None:
            raise ValueError(f'chunk={chunk}: in a context-parallel group a process has all its frames at once, give no chunk')
        shares = agree_on_shares(x, self.group, unit)
        whole = sum(shares.counts)
        shares = replace(shares, special=special(whole))
        if x.shape[2] == 0:
            return self._nothing(network, x)
        alone = x.shape[2] == whole                                # an image is the first process's business
        return network(x, Piece(shares.special and shares.rank == 0, shares=None if alone else shares), self._run)

    def _nothing(self, network: nn.Module, x: Tensor) -> Tensor:
        """No frames, in the shape they would have; they hang on x and network, so that backward() works."""
        down = network is self.encoder
        size = [n // self.space_compression if down else n * self.space_compression for n in x.shape[3:]]
        channels = network.conv_out.bias + x.sum()                       # (c,)
        return channels[:, None, None, None].expand(x.shape[0], -1, 0, *size)

    def _stream(self, network: nn.Module, parts: Iterable[Tensor], special: bool) -> Iterator[Tensor]:
        """What each convolution saw last goes from one part to the next in `past`, and nowhere else."""
        past, first = None, special
        for part in parts:
            future = {}
            yield network(part, Piece(first, past, future), self._run)
            past, first = future, False

    def _whole_latents(self, frame_chunks: Iterable[Tensor], first_frame: bool) -> Iterator[Tensor]:
        """Regroups frames so that every chunk completes its last latent frame."""
        waiting, extra = None, int(first_frame)
        for chunk in frame_chunks:
            waiting = chunk if waiting is None else torch.cat([waiting, chunk], dim=2)
            ready = (waiting.shape[2] - extra) // self.time_compression * self.time_compression + extra
            if ready > 0:
                yield waiting[:, :, :ready]
                waiting, extra = waiting[:, :, ready:].clone(), 0
        if waiting is not None and waiting.shape[2] > 0:
            form = '1 + a multiple' if first_frame else 'a multiple'
            raise ValueError(f'{waiting.shape[2]} frames are left at the end of the stream: '
                             f'time is compressed, so give {form} of {self.time_compression}')

    def _special(self, latents: int, frames: int | None) -> bool:
        """Is the first latent frame one single frame? Decided here, for the whole clip."""
        with_first, without = 1 + self.time_compression * (latents - 1), self.time_compression * latents
        if frames not in (None, with_first, without):
            raise ValueError(f'frames={frames}: {latents} latent frames stand for {with_first} frames, '
                             f'or for {without} without a special first frame')
        return frames in (None, with_first)


def chunks(x: Tensor, length: int) -> list[Tensor]:
    """Cuts time into chunks; the remainder joins the first one, where the special first frame is."""
    whole = max(1, x.shape[2] // length)
    return x.split([x.shape[2] - (whole - 1) * length, *[length] * (whole - 1)], dim=2)


def fit_video(vae: nn.Module, video: Tensor) -> Tensor:
    """A video that this VAE can encode, in the precision of its weights."""
    checks.tensor('video', video)
    if video.ndim != 5:
        raise ValueError(f'a video of shape {tuple(video.shape)}: give (batch, channels, frames, height, width)')
    checks.floats_in_0_1(video)
    channels, c = vae.config['in_channels'], vae.space_compression
    if video.shape[1] != channels:
        raise ValueError(f'a video of {video.shape[1]} channels: this VAE was built with in_channels={channels}')
    if any(n % c for n in video.shape[3:]):
        h, w = (max(c, round(n / c) * c) for n in video.shape[3:])
        raise ValueError(f'{video.shape[3]} x {video.shape[4]} pixels: height and width are compressed '
                         f'by {c}, so give multiples of {c} (nearest: {h} x {w})')
    return video.to(next(vae.parameters()).dtype)


def fit_latent(vae: nn.Module, z: Tensor) -> Tensor:
    checks.tensor('z', z)
    if z.ndim != 5 or z.shape[1] != vae.latent_channels:
        raise ValueError(f'latents of shape {tuple(z.shape)}: give (batch, {vae.latent_channels}, frames, height, width)')
    return z.to(next(vae.parameters()).dtype)


def refuse_bad_pieces(vae: nn.Module, chunk: int | None, tile: int | None, unit: int):
    c = vae.space_compression
    if chunk is not None and (chunk < 1 or chunk % unit):
        raise ValueError(f'chunk={chunk}: give a multiple of {unit} frames')
    if tile is not None and (tile < 4 * c or tile % c):
        raise ValueError(f'tile={tile}: give a multiple of {c} pixels, {4 * c} or more')


def widths(config: dict) -> list[int]:
    """The channels of each level of a VAE with these settings, if there can be one."""
    for name in ('in_channels', 'out_channels', 'latent_channels', 'dim', 'blocks_per_level', 'norm_groups'):
        checks.whole(name, config[name], 1, 100 if name == 'blocks_per_level' else math.inf)
    if not 1 <= len(config['dim_mults']) <= 10:
        raise ValueError(f'dim_mults has {len(config["dim_mults"])} entries: give one for each level, of which there are 1 to 10')
    dims = [round(config['dim'] * mult) for mult in config['dim_mults']]
    for channels in dims:
        if channels < 1 or channels % config['norm_groups']:
            raise ValueError(f'norm_groups={config["norm_groups"]} does not divide the {channels} channels of a level: '
                             'choose dim and dim_mults so that it does')
    return dims

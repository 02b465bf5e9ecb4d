"""Unet3D: the space-time-factorised U-Net of "Video Diffusion Models" (Ho et al. 2022, arXiv 2204.03458).

An image U-Net becomes a video U-Net in two steps. Its convolutions and spatial attention stay 2-D and see
each frame alone (kernels are 1 x k x k); and after every spatial attention comes a temporal attention, in
which each pixel position looks at itself in the other frames. That is all the time there is in the
network, so any number of frames can be given, and with temporal attention held back ("focus on the
present") the same weights are an image model.

                       x (b c f h w) in [-1, 1], time (b) or (b f), cond (b cond_dim)
                       |
    1x7x7 conv, temporal attention ----------------------------------------------------- skip --.
                       |                                                                         |
    level: 2 ResNet blocks, spatial linear attention, temporal attention -- skip --.   last ResNet block,
                       | 1x4x4 conv, stride 2                                       |     1x1x1 conv
    level: the same, more channels ----------- skip --.        level: the same, mirrored <-------'
                       | ...                           |            | 1x4x4 transposed conv
    middle: block, spatial attention, temporal attention, block -> ...

Most of the work is done where pixels are most and say least. With `patch=2` squares of 2x2 pixels are one pixel with four times
the channels, on the way in and on the way out (Hoogeboom et al. 2023, arXiv 2301.11093): a quarter of the work, and where x0 is
asked for hardly a loss, for an outline is drawn by channels just as well.

    >>> unet = Unet3D(dim=64, dim_mults=(1, 2, 4, 8))
    >>> unet(torch.randn(1, 3, 10, 32, 32), torch.tensor([500])).shape
    torch.Size([1, 3, 10, 32, 32])
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

from ..checks import one_of, whole
from .attention import RelativePositionBias, SpatialAttention, SpatialLinearAttention, TemporalAttention, TextAttention, rotations
from .recompute import recompute
from .text import masked_mean
from .unet_blocks import FrameConv, FrameConvTranspose, ResnetBlock, SinusoidalEmbedding

BLOCKS = ResnetBlock, SpatialAttention, SpatialLinearAttention, TemporalAttention, TextAttention  # all Levels are made of


class Level(nn.Module):
    """All that happens at one resolution of one side of the U."""

    def __init__(self, dim_in: int, dim_out: int, *, resnet: dict, spatial: nn.Module, temporal: nn.Module, text: nn.Module | None):
        super().__init__()
        self.block1 = ResnetBlock(dim_in, dim_out, **resnet)
        self.block2 = ResnetBlock(dim_out, dim_out, **resnet)
        self.spatial_attention = spatial
        self.temporal_attention = temporal
        self.text_attention = text

    def forward(self, x: Tensor, emb: Tensor, along_time: tuple, text: tuple[Tensor, Tensor] | None,
                skip: Tensor | None = None) -> Tensor:
        x = self.block1(x, emb, skip)
        x = self.block2(x, emb)
        x = self.spatial_attention(x)
        if text is not None:
            x = self.text_attention(x, *text)
        return self.temporal_attention(x, *along_time)


class Unet3D(nn.Module):
    def __init__(
        self,
        dim: int,                            # channels of the first level; every other width is a multiple
        cond_dim: int | None = None,         # size of the condition vector; None: unconditional
        out_dim: int | None = None,          # channels of the output; None: as the input
        dim_mults: tuple[int, ...] = (1, 2, 4, 8),  # width of each level
        channels: int = 3,
        attn_heads: int = 8,
        attn_dim_head: int = 32,             # features per head of the temporal attention
        use_bert_text_cond: bool = False,    # condition on BERT embeddings: cond_dim is 768
        init_dim: int | None = None,         # channels after the first convolution; None: dim
        init_kernel_size: int = 7,
        use_sparse_linear_attn: bool = True,  # spatial linear attention at every level
        block_type: str = 'resnet',          # the only one there is: for scripts of the public package, which names it
        resnet_groups: int = 8,
        cond_frames: bool = False,           # known frames and their mask are more input channels; see known_frames.py
        text_tokens: bool = False,           # cond is a caption's tokens (b n cond_dim), for every pixel to look at
        *,
        patch: int = 1,                      # side of the square of pixels that the network takes for one
        frame_numbers: bool = False,         # tell each frame its number; else all that is seen is how far apart frames are
        checkpoint_activations: bool = False,  # compute every block again in the backward pass: less memory, more time
    ):
        super().__init__()
        # All that is needed to build this network again; checkpoints store it.
        self.config = {k: v for k, v in locals().items() if k not in ('self', '__class__', 'checkpoint_activations')}
        one_of('block_type', block_type, ('resnet',))
        check_sizes(self.config | dict(init_dim=init_dim or dim))
        self.channels, self.patch, self.cond_frames, self.text_tokens = channels, (1, patch, patch), cond_frames, text_tokens
        self.use_bert_text_cond = use_bert_text_cond
        self.cond_dim = 768 if use_bert_text_cond else cond_dim         # the width of BERT
        self.has_cond = self.cond_dim is not None
        if text_tokens and not self.has_cond:
            raise ValueError('text_tokens=True: give cond_dim, the width of the tokens')

        # Time and condition become one vector that every block but the last is modulated by.
        time_dim = 4 * dim
        self.time_mlp = nn.Sequential(
            SinusoidalEmbedding(dim), nn.Linear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))
        self.number_mlp = nn.Sequential(SinusoidalEmbedding(dim), nn.Linear(dim, time_dim)) if frame_numbers else None
        self.null_cond = nn.Parameter(torch.randn(1, self.cond_dim)) if self.has_cond else None

        resnet = dict(groups=resnet_groups, emb_dim=time_dim + (self.cond_dim or 0))
        with torch.device('cpu'):                # it computes buffers that no checkpoint holds
            rotary = RotaryEmbedding(min(32, attn_dim_head), cache_if_possible=False)

        def temporal(width):
            return TemporalAttention(width, attn_heads, attn_dim_head, rotary)

        def text(width):
            return TextAttention(width, attn_heads, time_dim) if text_tokens else None

        def level(width_in, width_out):
            spatial = SpatialLinearAttention(width_out, attn_heads) if use_sparse_linear_attn else nn.Identity()
            return Level(width_in, width_out, resnet=resnet, spatial=spatial, temporal=temporal(width_out), text=text(width_out))

        init_dim = init_dim or dim
        self.init_conv = FrameConv((2 * channels + 1 if cond_frames else channels) * patch ** 2, init_dim, init_kernel_size,
                                   padding=init_kernel_size // 2)
        self.init_temporal_attention = temporal(init_dim)
        self.time_bias = RelativePositionBias(attn_heads)

        widths = [init_dim] + [dim * mult for mult in dim_mults]
        pairs = list(zip(widths[:-1], widths[1:]))  # (in, out) of each level
        self.downs = nn.ModuleList(level(narrow, wide) for narrow, wide in pairs)
        self.downsamples = nn.ModuleList(
            [FrameConv(wide, wide, 4, stride=2, padding=1) for _, wide in pairs[:-1]] + [nn.Identity()])

        self.mid_block1 = ResnetBlock(widths[-1], widths[-1], **resnet)
        self.mid_spatial_attention = SpatialAttention(widths[-1], attn_heads)
        self.mid_text_attention = text(widths[-1])
        self.mid_temporal_attention = temporal(widths[-1])
        self.mid_block2 = ResnetBlock(widths[-1], widths[-1], **resnet)

        pairs.reverse()
        self.ups = nn.ModuleList(level(2 * wide, narrow) for narrow, wide in pairs)
        self.upsamples = nn.ModuleList(
            [FrameConvTranspose(narrow, narrow, 4, stride=2, padding=1) for narrow, _ in pairs[:-1]] + [nn.Identity()])

        self.final_block = ResnetBlock(2 * init_dim, dim, groups=resnet_groups)
        self.final_conv = FrameConv(dim, (out_dim or channels) * patch ** 2, 1)

        if text_tokens:
            self.to_tokens = nn.Sequential(nn.LayerNorm(self.cond_dim), nn.Linear(self.cond_dim, time_dim))
            self.null_token = nn.Parameter(torch.randn(1, 1, time_dim))   # always there, so that there is one to look at

        if checkpoint_activations:
            self.recompute_blocks()

    def recompute_blocks(self) -> None:
        """What is computed again, and what by default: see recompute.py. Now small attention layers too, and convolutions."""
        for block in self.modules():
            if isinstance(block, ResnetBlock):
                block.forward, block.little = partial(recompute, block.forward), math.inf        # once is enough
            elif isinstance(block, BLOCKS):
                block.little = 0

    def forward(
        self,
        x: Tensor,                                   # (b c f h w), noisy video in [-1, 1] plus noise
        time: Tensor,                                # (b), diffusion step; or (b f), where each frame is as noisy as it likes
        cond: Tensor | None = None,                  # (b cond_dim); with text_tokens (b n cond_dim), rows of zeros are padding
        null_cond_prob: float = 0.,                  # drop the condition of a sample with this probability
        focus_present_mask: Tensor | None = None,    # (b) bool: in these samples no frame sees another
        prob_focus_present: float = 0.,              # without a mask: draw one with this probability
        null_cond_mask: Tensor | None = None,        # (b) bool: drop the condition of these samples instead
        known: Tensor | None = None,                 # (b c f h w): known frames in [-1, 1], with `cond_frames` only
        known_mask: Tensor | None = None,            # (b f) bool: which of them are known; None: no frame is
    ) -> Tensor:
        self.check(x, time, cond)
        b, _, f = x.shape[:3]
        if self.cond_frames:
            x = with_known_frames(x, known, known_mask)  # (b 2c+1 f h w)
        elif known is not None:
            raise ValueError('known frames were given, but this model was built without cond_frames=True')
        bias, frames_alone = self.temporal_bias(b, f, focus_present_mask, prob_focus_present)
        turn = rotations(f, self.init_temporal_attention.rotary, self.init_temporal_attention.dim_head)
        along_time = bias, turn, frames_alone

        _, p, q = self.patch
        given, dtype = x.dtype, self.init_conv.weight.dtype     # the whole network may be in half or in double precision
        x = rearrange(x.to(dtype), 'b c f (h p) (w q) -> b (c p q) f h w', p=p, q=q)
        x = x.contiguous(memory_format=torch.channels_last_3d)  # see attention.py on the layout
        x = self.init_conv(x)
        # The public package never applies the mask to this first attention; pretrained weights expect that.
        x = self.init_temporal_attention(x, self.time_bias(f), turn)
        first = x

        emb, text = self.embed(time.view(b, -1), f, dtype), None                # (b 1 n) or (b f n)
        if self.has_cond:
            if null_cond_mask is None:
                null_cond_mask = bernoulli(b, null_cond_prob, x.device)
            if self.text_tokens:
                cond, text = self.read_tokens(cond.to(emb.dtype), null_cond_mask)
            cond = torch.where(null_cond_mask[:, None], self.null_cond, cond.to(emb.dtype))
            emb = torch.cat((emb, cond[:, None].expand(-1, emb.shape[1], -1)), dim=-1)

        skips = []
        for level, downsample in zip(self.downs, self.downsamples):
            x = level(x, emb, along_time, text)
            skips.append(x)
            x = downsample(x)

        x = self.mid_block1(x, emb)
        x = self.mid_spatial_attention(x)
        if text is not None:
            x = self.mid_text_attention(x, *text)
        x = self.mid_temporal_attention(x, *along_time)
        x = self.mid_block2(x, emb)

        for level, upsample in zip(self.ups, self.upsamples):
            x = level(x, emb, along_time, text, skips.pop())
            x = upsample(x)

        x = self.final_block(x, None, first)
        x = rearrange(self.final_conv(x), 'b (c p q) f h w -> b c f (h p) (w q)', p=p, q=q)
        return x.to(given) if dtype != torch.float32 else x

    def embed(self, time: Tensor, frames: int, dtype: torch.dtype) -> Tensor:
        """Steps (b 1) or (b f) as vectors (b 1 time_dim) or (b f time_dim); with the numbers of the frames, always the latter."""
        def through(mlp, numbers):
            return mlp[1:](mlp[0](numbers).to(dtype))

        x = through(self.time_mlp, time)
        return x if self.number_mlp is None else x + through(self.number_mlp, torch.arange(frames, device=time.device))

    def forward_with_cond_scale(
        self, x: Tensor, time: Tensor, cond: Tensor | None = None, focus_present_mask: Tensor | None = None,
        prob_focus_present: float = 0., known: Tensor | None = None, known_mask: Tensor | None = None, *, cond_scale: float = 2.,
    ) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598): from the unconditional prediction towards, and past, the
        conditional one. Scale 1 is the plain conditional forward, 0 the unconditional one."""
        frames = dict(focus_present_mask=focus_present_mask, prob_focus_present=prob_focus_present,
                      known=known, known_mask=known_mask)
        if cond_scale == 0 and self.has_cond:
            return self(x, time, cond, null_cond_prob=1., **frames)
        with_cond = self(x, time, cond, **frames)
        if cond_scale == 1 or not self.has_cond:
            return with_cond
        without = self(x, time, cond, null_cond_prob=1., **frames)
        return torch.lerp(without, with_cond, cond_scale)

    def read_tokens(self, cond: Tensor, null_mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens (b n cond_dim) -> their mean (b cond_dim), and what pixels look at: (b 1+n time_dim) with mask (b 1+n)."""
        keep = (cond != 0).any(dim=-1)
        tokens = torch.cat((self.null_token.expand(len(cond), -1, -1), self.to_tokens(cond)), dim=1)
        return masked_mean(cond, keep), (tokens, F.pad(keep & ~null_mask[:, None], (1, 0), value=True))

    def temporal_bias(self, batch: int, frames: int, mask: Tensor | None, prob: float) -> tuple[Tensor, bool]:
        """The bias of all temporal attentions, and whether they reduce to their values.

        A sample that focuses on the present gets minus infinity for every frame but its own.
        """
        bias = self.time_bias(frames)  # (heads f f)
        if mask is None and 0 < prob < 1:
            mask = bernoulli(batch, prob, bias.device)
        if mask is None:
            return bias, prob >= 1 or frames == 1
        others = ~torch.eye(frames, dtype=torch.bool, device=bias.device)
        hidden = mask[:, None, None, None, None] & others  # (b 1 1 f f)
        return bias.masked_fill(hidden, -math.inf), False

    def check(self, x: Tensor, time: Tensor, cond: Tensor | None) -> None:
        """Say what is wrong with an input before a layer deep inside says something else."""
        if x.ndim != 5 or x.shape[1] != self.channels:
            raise ValueError(f'the video has shape {tuple(x.shape)}: expected '
                             f'(batch, {self.channels} channels, frames, height, width)')
        b, _, f, h, w = x.shape
        if time.shape not in ((b,), (b, f)):
            raise ValueError(f'time has shape {tuple(time.shape)}: expected ({b},), a step for each video, or ({b}, {f}), one for '
                             'each frame')
        step = self.patch[1] * 2 ** (len(self.downs) - 1)
        of_patches = f' of patches of {self.patch[1]}' if self.patch[1] > 1 else ''
        if h % step or w % step:
            raise ValueError(f'frames of {h}x{w}: with {len(self.downs)} levels{of_patches}, height and width must be '
                             f'multiples of {step} ({step}, {2 * step}, {3 * step}, ...)')
        if not self.has_cond and cond is not None:
            raise ValueError('cond was given, but this model was built without cond_dim')
        expected = f'({b}, {"tokens, " if self.text_tokens else ""}{self.cond_dim})'
        if self.has_cond and cond is None:
            raise ValueError(f'this model is conditional: give cond, a tensor of shape {expected}')
        fits = cond is None or cond.ndim == 2 + self.text_tokens and cond.shape[::cond.ndim - 1] == (b, self.cond_dim)
        if not fits:
            raise ValueError(f'cond has shape {tuple(cond.shape)}: expected {expected}')


def check_sizes(config: dict) -> None:
    for name in ('channels', 'attn_heads', 'resnet_groups', 'init_dim', 'patch'):
        whole(name, config[name], 1)
    for mult in config['dim_mults']:
        whole('dim_mults', mult, 1)
    dim, kernel, groups = config['dim'], config['init_kernel_size'], config['resnet_groups']
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f'init_kernel_size={kernel}: give an odd size, so that the output keeps its size')
    for name in ('dim', 'attn_dim_head'):
        if config[name] < 4 or config[name] % 2:
            raise ValueError(f'{name}={config[name]}: give an even number, 4 or more, for it is taken in pairs')
    if dim % groups:
        raise ValueError(f'dim={dim}, resnet_groups={groups}: give a width that can be divided into so many groups')


def with_known_frames(x: Tensor, known: Tensor | None, mask: Tensor | None) -> Tensor:
    """x (b c f h w) with two more sets of channels: the known frames, 0 where unknown, and 1 where they are known."""
    mask = torch.zeros_like(x[:, :1]) if mask is None else mask[:, None, :, None, None].expand_as(x[:, :1]).to(x.dtype)
    known = torch.zeros_like(x) if known is None else known * mask
    return torch.cat((x, known, mask), dim=1)


def bernoulli(count: int, prob: float, device: torch.device) -> Tensor:
    """(count) bools, each True with the given probability; 0 and 1 are certain."""
    return torch.rand(count, device=device) < prob

"""Where a token is. To attention a clip is a heap of tokens without order; here they learn their frame, row and column.

    sincos   sines and cosines of its place, added to a token once (as in arXiv 1706.03762, in three axes)
    rope     its place as angles, by which the queries and keys of every block are turned (arXiv 2104.09864): their product then
             depends on how far apart two tokens are, and not on where
    learned  a row of a table for every token: nn.Parameter, see dit.py. It knows one size of clips, and no other

A token (f, h, w) of a grid has three places, and its channels, in order, are shared out between them:

    sincos   a quarter frame | three eighths column | three eighths row        sines first; columns and rows are 1 / 1.875 apart
    rope     a quarter frame | three eighths row | three eighths column        of a head; channels 2i and 2i + 1 are a pair

so it is in CogVideoX (arXiv 2408.06072), and whoever mixes up rows and columns will not see it in square clips.

    >>> sincos((13, 30, 45), 1920).shape               # f h w tokens of 1920 channels
    torch.Size([17550, 1920])
    >>> q = turn(q, *rope((13, 30, 45), 64))           # q (b n heads d): n tokens, d channels of each head
"""

import math

import torch
from torch import Tensor

SPACING = 1.875                  # sincos: what pretrained models know is a grid of 32 x 48, on 60 x 90
Grid = tuple[int, int, int]      # tokens per clip, column and row: f, h, w


def angles(position: Tensor, dim: int) -> Tensor:
    """(n) -> (n dim/2): each position times frequencies from 1 down to nearly 1 / 10000, in its own precision."""
    half = dim // 2
    power = -math.log(10000) * torch.arange(half, dtype=position.dtype, device=position.device) / half
    return position[:, None] * power.exp()


def step_waves(step: Tensor, dim: int) -> Tensor:
    """Steps of the diffusion (b) -> (b dim). In float32: at step 999 its rounding is what pretrained models have learned."""
    angle = angles(step.float(), dim)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def over_grid(frame: Tensor, row: Tensor, column: Tensor, order: str) -> Tensor:
    """Three axes (f i), (h j), (w k) -> (f h w, i+j+k): for every token what its places say, in the order asked for."""
    size = frame.shape[0], row.shape[0], column.shape[0]              # len would make constants of them in torch.export
    places = dict(f=frame[:, None, None], h=row[None, :, None], w=column[None, None, :])
    return torch.cat([places[axis].expand(*size, -1) for axis in order], dim=-1).flatten(0, 2)


def exact_on(device: torch.device | None) -> torch.device | None:
    """Where to compute in float64 for this device: there, so that nobody waits for a copy, or on the CPU if it has none."""
    return torch.device('cpu') if device is not None and device.type == 'mps' else device


def sincos(grid: Grid, dim: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(f h w, dim), to add to tokens."""
    def waves(length, width, spacing=1.):
        angle = angles((torch.arange(length, device=exact_on(device)) / spacing).double(), width)
        return torch.cat((angle.sin(), angle.cos()), dim=-1).to(dtype).to(device)     # rounded where there is float64
    frames, height, width = grid
    return over_grid(waves(frames, dim // 4), waves(height, dim // 8 * 3, SPACING), waves(width, dim // 8 * 3, SPACING), 'fwh')


def rope(grid: Grid, dim_head: int, text: int = 0, device: torch.device | None = None,
         dtype: torch.dtype = torch.float32, native: Grid | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines (text + f h w, dim_head) for `turn`. The first rows, those of text, are not turned. `native`: the grid
    that a model was trained on; frames of another size are laid into it."""
    places = [torch.arange(length, device=exact_on(device)).double() for length in grid]
    if native is not None and tuple(grid[1:]) != tuple(native[1:]):
        places[1:] = laid_into(native[1:], grid[1:], exact_on(device))
    shares = dim_head // 4, dim_head // 8 * 3, dim_head // 8 * 3
    frames, height, width = (angles(place, share) for place, share in zip(places, shares))
    angle = over_grid(frames, height, width, 'fhw').repeat_interleave(2, dim=-1)
    angle = torch.cat((angle.new_zeros(text, dim_head), angle))
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def laid_into(native: tuple[int, int], given: tuple[int, int], device: torch.device | None = None) -> list[Tensor]:
    """Places of rows and columns of a frame that is stretched or shrunk until it just fits into the native one, in whose middle it
    lies: one twice as large is the same picture, finer. In the numbers of diffusers, which are a little off where it is moved."""
    scale, places = min(most / length for most, length in zip(native, given)), []
    for most, length in zip(native, given):
        side = round(scale * length)
        start = round((most - side) / 2)
        places.append(torch.linspace(start, (start + side) * (length - 1) / length, length, dtype=torch.float64, device=device))
    return places


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b n heads d), every pair of channels turned by its angle; cos and sin (n d). (a, b) -> (a cos - b sin, b cos + a sin)"""
    dtype, x = x.dtype, x.to(cos.dtype)
    odd_even = x.unflatten(-1, (-1, 2))
    swapped = torch.stack((-odd_even[..., 1], odd_even[..., 0]), dim=-1).flatten(-2)
    return torch.addcmul(x * cos[:, None], swapped, sin[:, None]).to(dtype)

"""Large frames in tiles that overlap: memory for one tile instead of one frame.

Neighbouring tiles share a quarter of their width. There one fades out while the other fades in, in a straight
line, and their weights add up to 1, so that no seam is left where the tiles disagree a little:

    left tile     1    1    1    1   .8   .6   .4   .2
    right tile                       .2   .4   .6   .8    1    1    1    1

Tiles do disagree: each has norm statistics of its own, and sees zeros beyond its border. The result is close
to that of the whole frame, the closer the larger the tiles.
"""

from typing import Callable

import torch
from torch import Tensor


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, scale: float) -> Tensor:
    """function(x), tile by tile; it changes height and width by `scale`. `tile` is in pixels of x; None: all at once."""
    if tile is None:
        return function(x)
    overlap = max(1, round(tile // 4 * scale) / scale)              # whole pixels on both sides
    rows, columns = (starts(n, tile, int(overlap)) for n in x.shape[3:])
    height, width = (round(n * scale) for n in x.shape[3:])
    whole = None
    for top in rows:
        for left in columns:
            part = function(x[..., top:top + tile, left:left + tile])     # b c f h w
            down, right = round(top * scale), round(left * scale)
            part = part * fade(part.shape[3], down, height, overlap * scale, part).unsqueeze(1)
            part = part * fade(part.shape[4], right, width, overlap * scale, part)
            whole = part.new_zeros(*part.shape[:3], height, width) if whole is None else whole
            whole[..., down:down + part.shape[3], right:right + part.shape[4]] += part
    return whole


def in_chunks(function: Callable[[int, int], Tensor], frames: int, chunk: int) -> Tensor:
    """The same along time: function(start, stop) -> those frames (b c f h w), `chunk` frames at a time."""
    overlap = chunk // 4
    whole = None
    for start in starts(frames, chunk, overlap):
        part = function(start, min(start + chunk, frames))
        part = part * fade(part.shape[2], start, frames, overlap, part)[:, None, None]
        whole = part.new_zeros(*part.shape[:2], frames, *part.shape[3:]) if whole is None else whole
        whole[:, :, start:start + part.shape[2]] += part
    return whole


def starts(size: int, tile: int, overlap: int) -> list[int]:
    return list(range(0, max(1, size - overlap), tile - overlap))


def fade(length: int, start: int, whole: int, overlap: float, like: Tensor) -> Tensor:
    """(length,): rises to 1 over the overlap with the tile before, falls over that with the tile after."""
    steps = (torch.arange(length, device=like.device) + 0.5) / overlap
    rise = steps.clamp(max=1.) if start > 0 else torch.ones_like(steps)
    fall = steps.flip(0).clamp(max=1.) if start + length < whole else torch.ones_like(steps)
    return (rise * fall).to(like.dtype)

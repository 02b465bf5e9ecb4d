"""What every reader of clips shares: which frames are wanted, how large, and how a file may fail.

A reader (gif.py, mp4.py) turns a file into a stream of (seconds, picture), closed by (end, None).  The rest is the same for all:

    nearest    0.00  0.03  0.07  0.10  0.13  0.17 ...  30 frames per second
               0.00                    0.13       ...  8 per second: those that are nearest in time, never "every 4th"
    fit        each picture is scaled and cut to the wanted size as it comes, so that a long film needs no memory
    collect    bytes (c f h w)

Files come from anywhere.  Whatever goes wrong inside one ends as one ValueError that names it, and limits keep a small file from
filling the memory: a picture has up to 2^25 pixels (8K film), a GIF 2^23 (4K), and the frames that are kept up to 512 MB.
"""

import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = {1: 'grey', 3: 'RGB', 4: 'RGBA'}
MAX_PIXELS = 2**25              # of one picture
MAX_BYTES = 2**29               # of a picture file, and of all frames that are kept of any file
Size = tuple[int, int]          # height, width


def check_ending(path, ending: str, what: str) -> None:
    """Players believe the name of a file."""
    if Path(path).suffix.lower() not in ('', f'.{ending}'):
        raise ValueError(f'{path}: this writes {what}')


@contextmanager
def naming(path) -> Iterator[None]:
    """Whatever goes wrong inside is the file's fault, and the error says which file."""
    if not stat.S_ISREG(os.stat(path).st_mode):                         # reading a pipe might never end
        raise ValueError(f'{path} cannot be read: it is not a regular file')
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f'{path} cannot be read: {str(error) or type(error).__name__}') from error


def nearest(timed: Iterable, fps: float, start: int = 0, num_frames: int | None = None) -> Iterator:
    """Of (seconds, frame) those nearest to start / fps, (start + 1) / fps, ...; until the film ends, or there are enough. A single
    picture is no film, and comes once."""
    wanted = islice(count(start), num_frames)
    target = next(wanted, None)
    for number, ((seconds, frame), (later, following)) in enumerate(pairwise(timed)):
        until = (later if number else min(later, 1 / fps)) if following is None else (seconds + later) / 2
        while target is not None and target / fps < until - 1e-6:
            yield frame
            target = next(wanted, None)
        if target is None:
            return


def count_frames(frames: int, rate: float, fps: float | None) -> int:
    """How many there are at `fps` of a clip that has so many at `rate`."""
    return frames if fps is None or frames == 1 else max(1, math.ceil(frames / rate * fps - 1e-6))


def collect(path, frames: Iterable[Tensor], start: int = 0) -> Tensor:
    """Frames (c h w), one after the other, as bytes (c f h w)."""
    kept, size = [], 0
    for frame in frames:
        size += frame.nbytes
        if size > MAX_BYTES:
            raise ValueError(f'{path} has more than {MAX_BYTES >> 20} MB of pixels: ask for fewer frames (num_frames=...)')
        kept.append(frame)
    if not kept:
        raise ValueError(f'{path} cannot be read: there is no frame number {start} in it')
    return torch.stack(kept, dim=1)


def fit(pixels: np.ndarray, size: Size | None) -> Tensor:
    """A copy of a picture (h w c) as (c h w), of the wanted size."""
    picture = torch.from_numpy(np.array(pixels, order='C')).permute(2, 0, 1)
    return picture if size is None else resize_and_crop(picture[:, None], size)[:, 0]


def resize_and_crop(clip: Tensor, size: Size) -> Tensor:
    """Bytes (c f h w) scaled until they just cover `size`, then the middle of that."""
    h, w = clip.shape[-2:]
    if (h, w) != size:
        # Of a needle most would be cut off, but only after it was scaled to something huge.
        clip = middle(clip, (min(h, 16 * math.ceil(w * size[0] / size[1])), min(w, 16 * math.ceil(h * size[1] / size[0]))))
        scaled = covering(clip.shape[-2:], size)
        if clip.shape[-2:] != scaled:
            frames = clip.transpose(0, 1)                                   # f c h w; bytes of few channels resize fast
            clip = F.interpolate(frames, scaled, mode='bilinear', antialias=True).transpose(0, 1)
        clip = middle(clip, size)
    return clip.contiguous()


def covering(given: Size, size: Size) -> Size:
    """The smallest size of the given proportions that covers `size`."""
    scale = max(size[0] / given[0], size[1] / given[1])
    return max(size[0], round(given[0] * scale)), max(size[1], round(given[1] * scale))


def middle(pictures: Tensor, size: Size) -> Tensor:
    """Of pictures (... h w)."""
    top, left = (pictures.shape[-2] - size[0]) // 2, (pictures.shape[-1] - size[1]) // 2
    return pictures[..., top:top + size[0], left:left + size[1]]


def grey(rgb: np.ndarray) -> np.ndarray:
    """Colours (... 3) as grey (... 1), weighed as Pillow does, and television before it."""
    return (rgb @ np.array([19595, 38470, 7471], np.uint32) + 0x8000 >> 16)[..., None].astype(np.uint8)


def check_size(height: int, width: int, most: int | None = None) -> Size:
    most = most or MAX_PIXELS
    if not 0 < height * width <= most:                                      # damage must not fill the memory
        raise ValueError(f'it claims {width} x {height} pixels, and up to {most} are read')
    return height, width


def check_request(channels: int = 3, fps: float | None = None, start: int = 0, num_frames: int | None = None) -> None:
    if channels not in CHANNELS:
        raise ValueError(f'channels={channels}: give 1 (grey), 3 (RGB) or 4 (RGBA)')
    if fps is not None and not 0 < fps <= 1000:
        raise ValueError(f'fps={fps}: give the frames per second, above 0 and up to 1000, or None for those of the file')
    if start < 0 or num_frames is not None and num_frames < 1:
        raise ValueError(f'start={start}, num_frames={num_frames}: give a start of 0 or more, and 1 frame or more')


def read_bytes(path) -> bytes:
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f'it is larger than {MAX_BYTES >> 20} MB, the most that is read of a picture file')
    return Path(path).read_bytes()

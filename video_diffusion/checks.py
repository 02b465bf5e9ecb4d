"""Settings that make sense, or one sentence that says what to give: each is checked once, in the class that it belongs to.

    >>> number('eta', 1.5, 0, 1)
    ValueError: eta=1.5: give a number from 0 to 1
    >>> whole('steps', 0, 1)
    ValueError: steps=0: give a whole number, 1 or more
"""

import math
import warnings
from typing import Iterable

from einops import EinopsError
from einops_exts import check_shape
from torch import Tensor


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        kind = 'numpy.ndarray' if type(x).__name__ == 'ndarray' else type(x).__name__
        hint = 'give .sample() or .mode() of it' if hasattr(x, 'mode') else 'give a torch.Tensor (torch.from_numpy)'
        raise TypeError(f'{name} is a {kind}: {hint}')


def instance(name: str, x: object, *kinds: type) -> None:
    if not isinstance(x, kinds):
        given = f'the class {x.__name__}' if isinstance(x, type) else f'a {type(x).__name__}'
        raise TypeError(f'{name} is {given}: give a {" or a ".join(kind.__name__ for kind in kinds)}')


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f'{name}={value!r}: give one of {", ".join(map(repr, allowed))}')


def number(name: str, value: float | None, low: float = -math.inf, high: float = math.inf, *, above: float | None = None) -> None:
    """Finite, from `low` to `high`, or `above` a number that is not allowed itself. None means that nothing was set, and passes."""
    if value is None:
        return
    fits = not isinstance(value, str) and low <= value <= high and math.isfinite(value) and (above is None or value > above)
    if not fits:
        raise ValueError(f'{name}={value!r}: give a number {bounds(low, high, above)}'.rstrip())


def whole(name: str, value: int | None, low: int, high: float = math.inf) -> None:
    if value is not None and not (isinstance(value, int) and low <= value <= high):
        raise ValueError(f'{name}={value!r}: give a whole number, {bounds(low, high, None)}')


def bounds(low: float, high: float, above: float | None) -> str:
    if above is not None:
        return f'above {above}' + (f', at most {high}' if math.isfinite(high) else '')
    if math.isfinite(low) and math.isfinite(high):
        return f'from {low} to {high}'
    return f'{low} or more' if math.isfinite(low) else 'that is finite'


def video_shape(video: Tensor, channels: int, num_frames: int, height: int, width: int) -> None:
    tensor('video', video)
    try:
        check_shape(video, 'b c f h w', c=channels, f=num_frames, h=height, w=width)
    except EinopsError:
        expected = f'(batch, {channels}, {num_frames}, {height}, {width})'
        raise ValueError(f'the video has shape {tuple(video.shape)}: expected {expected}, that is '
                         '(batch, channels, num_frames, height, width)') from None


def floats_in_0_1(video: Tensor) -> Tensor:
    """The video, if it is what a user means by one, as far as that is known without waiting for a GPU: bytes are no floats,
    those of a file that nobody divided by 255 are too large, and half of those in [-1, 1] too small."""
    tensor('video', video)
    known = video.device.type == 'cpu' and video.numel()
    if not video.is_floating_point() or known and video.max() > 10:
        raise ValueError(f'a video of {video.dtype}, up to {video.max().item():.4g}: expected floats in [0, 1] (divide by 255)')
    if known and (least := video.min()) < -0.5:
        warnings.warn(f'a video with numbers down to {least.item():.3g}: expected floats in [0, 1]; of one in [-1, 1] give '
                      '(video + 1) / 2', stacklevel=4)
    return video

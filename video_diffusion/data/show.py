"""Look at a video in a notebook: the last line of a cell that says `show(video)` plays it.

    show(video)                 # (c f h w)
    show(samples)               # (b c f h w), a grid
    show(samples, scale=1)      # as small as they are

Small clips are enlarged until a person can see them; so are the GIFs that trainers and scripts write for looking at.
"""

import base64
import tempfile
from pathlib import Path

from torch import Tensor

from .gif import video_tensor_to_gif


class Shown:
    """A video that a notebook plays and a terminal names."""

    def __init__(self, gif: bytes, shape: tuple[int, ...]):
        self.gif, self.shape = gif, shape

    def _repr_html_(self) -> str:
        return f'<img src="data:image/gif;base64,{base64.b64encode(self.gif).decode()}">'

    def __repr__(self) -> str:
        *batch, channels, frames, height, width = self.shape
        many = f'{batch[0]} videos of ' if batch else 'a video of '
        return f'<{many}{frames} frames, {height}x{width}, {channels} channels; in a notebook it plays>'


def show(video: Tensor, scale: int | None = None, duration: int = 120) -> Shown:
    """A clip (c f h w), or a batch (b c f h w) as a grid, in [0, 1]; `scale` None: until a person can see it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'shown.gif'
        video_tensor_to_gif(video, path, duration, scale=scale)
        return Shown(path.read_bytes(), tuple(video.shape))

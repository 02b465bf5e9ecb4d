"""What train.py and sample.py need beside the library: errors in one line, an allocator that suits tensors, clips to train on."""

import ctypes
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from ..data import shapes
from ..data.folder import ClipFolder
from ..distributed import Processes


@contextmanager
def one_line_errors(name: str):
    """End with one sentence and exit code 2 where the user can help it; other errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f'{name}: {error}', file=sys.stderr)
        sys.exit(2)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next tensor of that size (Linux; elsewhere nothing happens).

    By default it returns every block above 32 MB to the system and takes it back at the next step, page by
    page, each page zeroed first: with large clips that costs a CPU more than half of its time.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        most_mapped_blocks, trim_threshold = -4, -1  # names of glibc's mallopt parameters
        libc.mallopt(most_mapped_blocks, 0)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)
    except (OSError, AttributeError):
        pass  # not glibc


def draw_toy_world(folder: Path, count: int, size: int, frames: int, processes: Processes) -> Path:
    """The toy world in `folder`, drawn if it is not there yet."""
    if processes.is_main and not folder.exists():
        print(f'drawing {count} clips into {folder}')
        unfinished = folder.with_name(folder.name + '.unfinished')
        shutil.rmtree(unfinished, ignore_errors=True)
        shapes.make_shapes(unfinished, count, size, frames)
        unfinished.rename(folder)
    processes.any(False)  # the others wait here until it is drawn
    clips = ClipFolder(folder)
    there = len(clips.paths), *clips.shape()
    if there != (count, frames, size, size):
        raise ValueError(f'{folder} holds {there[0]} clips of {there[1]} frames of {there[2]}x{there[3]}, not the toy '
                         f'world asked for ({count} clips of {frames} frames of {size}x{size}): remove it first')
    return folder


def like_the_clips(clips: ClipFolder, most_frames: int, largest: int, multiple: int) -> tuple[int, int, int]:
    """Frames, height and width like those of the clips, but not too large for a first run; sides are multiples."""
    frames, height, width = clips.shape()
    shrink = min(1., largest / max(height, width))
    height, width = (max(multiple, round(side * shrink) // multiple * multiple) for side in (height, width))
    return min(frames, most_frames), height, width

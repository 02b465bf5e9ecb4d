"""A folder of clips, and perhaps captions, as training batches.

    my_gifs/a.gif   my_gifs/a.txt   my_gifs/deep/er/b.gif   my_gifs/deep/er/b.txt
or  my_gifs/videos/a.gif            my_gifs/labels/a.txt

`GifDataset` turns one file into one clip of a fixed size; decoded clips stay in memory, so each file is
read once.  Training wants more: an endless shuffled sequence that can stop anywhere, go on exactly
there, and be shared by several processes without anybody seeing a clip twice.  All three are the same
wish, that the p-th clip of the sequence depends on p and the seed alone:

    position    0 1 2 3 4 | 5 6 7 8 9 | 10 ...      epoch = position // number of clips
    clip        3 0 4 1 2 | 1 4 3 2 0 |  2 ...      each epoch a permutation seeded by (seed, epoch)
                ----- -------- ------               batches of 3: two processes take every second one

    dataset = GifDataset('my_gifs', image_size=64)
    video = dataset[0]                                          # (c f h w), floats in [0, 1]
    for videos in batches(dataset, batch_size=8, start=1000):   # (b c f h w), bytes, from batch 1000 on
        ...
"""

import hashlib
import os
import warnings
from collections.abc import Iterator
from copy import copy
from itertools import count
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .gif import check_channels, read_frames

CLIPS, IMAGES = ('gif',), ('png', 'jpg', 'jpeg')


class GifDataset(Dataset):
    """The clips below `folder`, sorted by path.  `dataset[i]` is a video (c f h w) with floats in [0, 1],
    or (video, caption) where the folder has captions."""

    def __init__(
        self,
        folder,
        image_size: int | tuple[int, int],      # or (height, width): clips are scaled to cover it and cropped
        channels: int = 3,                      # 1 grey, 3 RGB, 4 RGBA
        num_frames: int = 16,
        horizontal_flip: bool = False,          # mirror half of the clips, drawn anew each time
        force_num_frames: bool = True,          # False: every clip keeps its own length
        exts: tuple[str, ...] = CLIPS,          # 'webp', 'png' and what else Pillow reads work too
        *,
        random_window: bool = False,            # from long clips take any num_frames, not the first
        seed: int = 0,                          # for the flips and windows of dataset[i]
        strict: bool = False,                   # True: a damaged file is an error, not a warning
        cache_bytes: int = 2**30,               # memory for decoded clips
    ):
        check_channels(channels)
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(self.size) != 2 or min(self.size) < 1 or num_frames < 1:
            raise ValueError(f'image_size={image_size}, num_frames={num_frames}: expected positive numbers, '
                             'and one or two (height, width) for the size')
        self.channels, self.horizontal_flip = channels, horizontal_flip
        self.num_frames = num_frames if force_num_frames else None
        self.random_window = random_window and force_num_frames
        self.seed, self.strict, self.cache_bytes = seed, strict, cache_bytes
        self.cache, self.cached_bytes = {}, 0
        self.bad, self.generators = set(), {}
        self.paths = without_damaged(find_clips(folder, exts), strict)
        self.captions = read_captions(self.paths)           # one str for each clip, or None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        if not -len(self) <= index < len(self):
            raise IndexError(f'clip {index} of {len(self)}')
        clip, caption = self.clip_and_caption(index % len(self), self.own_generator())
        video = self.floats(clip)
        return video if caption is None else (video, caption)

    def hold_out(self, count: int) -> 'GifDataset':
        """Takes `count` clips, from all over the folder, out of this dataset; they become one of their own."""
        if not 0 < count < len(self):
            raise ValueError(f'cannot hold out {count} of {len(self)} clips to measure on: there must be one more than that '
                             'to train on')
        chosen = {i * len(self) // count for i in range(count)}
        rest = copy(self)
        for dataset, inside in ((rest, True), (self, False)):
            kept = [i for i in range(len(dataset)) if (i in chosen) == inside]
            dataset.paths = [dataset.paths[i] for i in kept]
            dataset.captions = dataset.captions and [dataset.captions[i] for i in kept]
            dataset.cache, dataset.cached_bytes, dataset.bad, dataset.generators = {}, 0, set(), {}
        return rest

    def clip(self, index: int, generator: torch.Generator | None = None) -> Tensor:
        """The clip as bytes (c f h w); without a generator not flipped, and its first frames."""
        return self.clip_and_caption(index, generator)[0]

    @staticmethod
    def floats(clips: Tensor) -> Tensor:
        """What a model takes: a batch of bytes as floats in [0, 1]."""
        return clips.float() / 255

    def clip_and_caption(self, index: int, generator: torch.Generator | None = None):
        index, frames = self.readable(index)
        length = frames.shape[1]
        window, flip = (0., 1.) if generator is None else torch.rand(2, generator=generator).tolist()
        start = int(window * max(1, length - self.num_frames + 1)) if self.random_window else 0
        # A short clip stands still at its end: black frames would teach the model to fade to black.
        chosen = torch.arange(start, start + (self.num_frames or length)).clamp(max=length - 1)
        clip = frames[:, chosen]                                                            # a copy
        if self.horizontal_flip and flip < 0.5:
            clip = clip.flip(-1)
        return clip, self.captions and self.captions[index]

    def frames(self, index: int) -> Tensor:
        """All frames that may be asked for, resized: bytes (c f h w), from the cache if they are there."""
        if index in self.cache:
            return self.cache[index]
        needed = None if self.random_window else self.num_frames
        frames = resize_and_crop(read_frames(self.paths[index], self.channels, num_frames=needed), self.size)
        worker = get_worker_info()                          # worker processes share the budget
        if self.cached_bytes + frames.nbytes <= self.cache_bytes // (worker.num_workers if worker else 1):
            self.cache[index] = frames
            self.cached_bytes += frames.nbytes
        return frames

    def readable(self, index: int) -> tuple[int, Tensor]:
        """The clip `index`, or the next one where it turns out to be damaged: (its index, its frames)."""
        for candidate in (i % len(self) for i in range(index, index + len(self))):
            if candidate in self.bad:
                continue
            try:
                return candidate, self.frames(candidate)
            except (ValueError, OSError) as error:
                if self.strict:
                    raise
                self.bad.add(candidate)
                warnings.warn(f'{error} (skipped, as {len(self.bad)} of {len(self)} clips so far: '
                              'the next one stands in for it)')
        raise ValueError(f'no clip can be read any more: all {len(self)} files are damaged or gone')

    def own_generator(self) -> torch.Generator:
        """What dataset[i] draws from; each worker process of a DataLoader has its own, seeded by PyTorch."""
        worker = get_worker_info()
        key = worker.seed if worker else 0
        if key not in self.generators:
            self.generators[key] = seeded_generator(self.seed, key)
        return self.generators[key]

    @property
    def fits_in_cache(self) -> bool:
        """An estimate; where clips keep their own length, or wait whole for a window, from a few of them."""
        frames = self.num_frames
        if frames is None or self.random_window:
            frames = median(shape[0] for shape in some_shapes(self.paths))
        return len(self) * self.channels * frames * self.size[0] * self.size[1] <= self.cache_bytes


class ClipStream(Dataset):
    """The endless sequence of training clips: `stream[p]` is the p-th one ever drawn, as bytes (c f h w),
    or (bytes, caption).  It has no state that matters, so any process can ask for any position."""

    def __init__(self, dataset: GifDataset, seed: int = 0):
        self.dataset, self.seed = dataset, seed
        self.epoch, self.order = None, None                 # the permutation of the epoch asked for last

    def __getitem__(self, position: int):
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self.epoch:
            generator = seeded_generator(self.seed, 'epoch', epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.dataset), generator=generator)
        generator = seeded_generator(self.seed, 'clip', position)
        clip, caption = self.dataset.clip_and_caption(self.order[place].item(), generator)
        return clip if caption is None else (clip, caption)


def batches(dataset: GifDataset, batch_size: int, *, seed: int = 0, start: int = 0, rank: int = 0,
            world_size: int = 1, num_workers: int | None = None, pin_memory: bool = False) -> Iterator:
    """Endless batches of bytes (b c f h w), or (batch, list of captions).

    Begins as if `start` batches had been taken already.  With several processes each takes its share
    (`rank` of `world_size`): together they see what one process with a larger batch would see.
    `num_workers=None` decodes here if all clips fit into the cache, else ahead, in up to 4 processes."""
    if batch_size < 1 or start < 0 or not 0 <= rank < world_size:
        raise ValueError(f'batch_size={batch_size}, start={start}, rank={rank}, world_size={world_size}: '
                         'expected batch_size > 0, start >= 0 and 0 <= rank < world_size')
    if dataset.num_frames is None:
        raise ValueError('clips of different lengths cannot be one batch: use force_num_frames=True')
    if num_workers is None:
        num_workers = 0 if dataset.fits_in_cache else min(4, os.cpu_count())
    first_positions = ((n * world_size + rank) * batch_size for n in count(start))
    loader = DataLoader(
        ClipStream(dataset, seed),
        batch_sampler=(range(first, first + batch_size) for first in first_positions),
        num_workers=num_workers, collate_fn=stack_clips, pin_memory=pin_memory,
        generator=torch.Generator(),                        # else it would draw from the global one, unasked
    )
    return iter(loader)


def stack_clips(clips: list):
    if isinstance(clips[0], Tensor):
        return torch.stack(clips)                           # b c f h w
    videos, captions = zip(*clips)
    return torch.stack(videos), list(captions)


def seeded_generator(*key, device: torch.device | str = 'cpu') -> torch.Generator:
    """The same key, the same numbers, in every process; other keys, unrelated numbers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], 'little'))


def resize_and_crop(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """Bytes (c f h w) scaled until they just cover `size`, then the middle of that."""
    height, width = size
    h, w = clip.shape[-2:]
    if (h, w) != size:
        scale = max(height / h, width / w)
        scaled = max(height, round(h * scale)), max(width, round(w * scale))
        frames = clip.transpose(0, 1)                       # f c h w; bytes of few channels resize fast
        clip = F.interpolate(frames, scaled, mode='bilinear', antialias=True).transpose(0, 1)
        top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
        clip = clip[..., top:top + height, left:left + width]
    return clip.contiguous()


# ------------------------------------------------------------------------------------- finding files


def find_clips(folder, exts: tuple[str, ...] = CLIPS) -> list[Path]:
    """All files below `folder` with one of these endings, sorted."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'there is no folder {folder}')
    endings = {'.' + ext.lower().lstrip('.') for ext in ([exts] if isinstance(exts, str) else exts)}
    paths = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in endings)
    if not paths:
        raise ValueError(f'no clip in {folder}: looked for files ending in {", ".join(sorted(endings))}, '
                         'in its subfolders too')
    return paths


def without_damaged(paths: list[Path], strict: bool) -> list[Path]:
    """A look at both ends of each file finds what is empty, foreign or cut off; damage inside shows later."""
    whole, damaged = [], []
    for path in paths:
        try:
            check_ends(path)
            whole.append(path)
        except ValueError:
            if strict:
                raise
            damaged.append(str(path))
    if not whole:
        raise ValueError(f'none of the {len(paths)} clips can be read: {shorten(damaged)}')
    if damaged:
        warnings.warn(f'skipped {len(damaged)} of {len(paths)} files that cannot be read: {shorten(damaged)}')
    return whole


def check_ends(path: Path) -> None:
    """Only a file without the first or last bytes of a GIF has to prove by decoding that it can be read."""
    with open(path, 'rb') as file:
        start = file.read(6)
        file.seek(max(0, path.stat().st_size - 1))
        end = file.read(1)
    is_gif = start in (b'GIF87a', b'GIF89a')
    if not is_gif or end != b';':
        read_frames(path, num_frames=None if is_gif else 1)


def shorten(names: list[str], limit: int = 10) -> str:
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')


def read_captions(paths: list[Path]) -> list[str] | None:
    captions = [read_caption(path) for path in paths]
    missing = [str(path) for path, caption in zip(paths, captions) if not caption]
    if len(missing) == len(paths):
        return None
    if missing:
        raise ValueError(f'{len(missing)} of {len(paths)} clips have no caption, {missing[0]} for one: '
                         'give each clip a text file of its name, or none')
    return captions


def read_caption(clip: Path) -> str:
    """From clip.txt beside it, or from labels/ beside its folder videos/; '' if there is none."""
    places = [clip.with_suffix('.txt')]
    if 'videos' in clip.parts[:-1]:
        at = len(clip.parts) - 1 - clip.parts[::-1].index('videos')         # the innermost one
        places.append(Path(*clip.parts[:at], 'labels', *clip.parts[at + 1:]).with_suffix('.txt'))
    for place in filter(Path.is_file, places):
        try:
            return ' '.join(place.read_text(encoding='utf-8-sig').split())  # newlines fold to spaces
        except UnicodeDecodeError:
            raise ValueError(f'{place} is not UTF-8: save the caption as UTF-8 text') from None
    return ''


def clip_shape(folder, exts: tuple[str, ...] = CLIPS) -> tuple[int, int, int]:
    """(frames, height, width) that suit a folder: the median length and the smallest size of a few clips."""
    shapes = some_shapes(find_clips(folder, exts))
    frames, heights, widths = zip(*shapes)
    return int(median(frames)), min(heights), min(widths)


def some_shapes(paths: list[Path], enough: int = 16) -> list[tuple[int, int, int]]:
    shapes = []
    for path in paths:
        try:
            shapes.append(tuple(read_frames(path, channels=1).shape[1:]))
        except (ValueError, OSError):
            continue                                        # GifDataset is the one that reports it
        if len(shapes) == enough:
            break
    if not shapes:
        raise ValueError(f'none of the {len(paths)} clips can be read: {shorten([str(p) for p in paths])}')
    return shapes

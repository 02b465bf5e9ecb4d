"""A folder of clips, and perhaps captions (folder.py), as training batches.

`GifDataset` turns files, GIFs or films, into clips of a fixed size; decoded clips stay in memory, so each file is
read once.  Of a recording that is much longer than a clip only a window is read, another one each time:

    |------------------------- recording -------------------------|         clips_per_video=3, random_window=True:
    |  [window]           |       [window]     |        [window]  |         one from each third, anew in each epoch

Training wants more: an endless shuffled sequence that can stop anywhere, go on exactly
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

import atexit
import hashlib
import math
import os
import signal
import warnings
import weakref
from collections.abc import Iterator
from copy import copy
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .folder import CLIPS, ClipFolder, all_texts, clip_shape, read_clip
from .frames import check_request, count_frames

LONG = 8                # a recording so many times as long as a clip is read in windows, and not kept in memory


class GifDataset(Dataset):
    """The clips below `folder`, sorted by path.  `dataset[i]` is a video (c f h w) with floats in [0, 1],
    or (video, caption) where the folder has captions."""

    def __init__(
        self,
        folder,                                 # its name, or a ClipFolder
        image_size: int | tuple[int, int],      # or (height, width): clips are scaled to cover it and cropped
        channels: int = 3,                      # 1 grey, 3 RGB, 4 RGBA
        num_frames: int = 16,
        horizontal_flip: bool = False,          # mirror half of the clips, drawn anew each time
        force_num_frames: bool = True,          # False: every clip keeps its own length
        exts: tuple[str, ...] = CLIPS,          # pictures work too: 'webp', 'png', 'jpg', 'bmp'
        *,
        fps: float | None = None,               # frames per second, whatever the files have; None: every frame
        random_window: bool = False,            # from long clips take any num_frames, not the first
        clips_per_video: int = 1,               # each file counts as so many clips, from as many equal stretches of it
        seed: int = 0,                          # for the flips and windows of dataset[i]
        strict: bool = False,                   # True: a damaged file is an error, not a warning
        cache_bytes: int = 2**30,               # memory for decoded clips
    ):
        check_request(channels, fps)
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(self.size) != 2 or min(self.size) < 1 or num_frames < 1:
            raise ValueError(f'image_size={image_size}, num_frames={num_frames}: expected positive numbers, '
                             'and one or two (height, width) for the size')
        if clips_per_video < 1 or clips_per_video > 1 and not force_num_frames:
            raise ValueError(f'clips_per_video={clips_per_video}: give 1 or more, and above 1 only with force_num_frames=True')
        self.channels, self.horizontal_flip, self.rate = channels, horizontal_flip, fps
        self.num_frames = num_frames if force_num_frames else None
        self.random_window = random_window and force_num_frames
        self.seed, self.strict, self.cache_bytes, self.clips_per_video = seed, strict, cache_bytes, clips_per_video
        self.source = folder if isinstance(folder, ClipFolder) else ClipFolder(folder, exts, strict)
        stretches = range(clips_per_video)
        self.paths = [path for path in self.source.paths for _ in stretches]
        self.parts = [part for _ in self.source.paths for part in stretches]
        self.captions = self.source.captions and [caption for caption in self.source.captions for _ in stretches]
        self.forget()

    def forget(self) -> None:
        """All that is known about clips by their number."""
        self.cache, self.cached_bytes, self.lengths = {}, 0, {}
        self.bad, self.generators, self.windows, self.cuts = set(), {}, 0, 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        if not -len(self) <= index < len(self):
            raise IndexError(f'clip {index} of {len(self)}')
        clip, caption = self.clip_and_caption(index % len(self), self.own_generator())
        video = self.floats(clip)
        return video if caption is None else (video, caption)

    def warn_of_short_clips(self) -> None:
        """Of those that are clips at all: pictures are known to stand still."""
        frames = self.source.shape(self.rate)[0]
        if 1 < frames < (self.num_frames or 0):
            warnings.warn(f'half of the clips of {self.source} have {frames} frames or fewer: up to {self.num_frames} their last '
                          'one stands still, and the model will learn that; give longer clips, or fewer frames', stacklevel=3)

    def hold_out(self, count: int) -> 'GifDataset':
        """Takes `count` clips, from all over the folder, out of this dataset; they become one of their own.

        Clips of one file may overlap, so of several files those that they come from are not trained on at all."""
        if not 0 < count < len(self):
            raise ValueError(f'cannot hold out {count} of {len(self)} clips to measure on: there must be one more than that '
                             'to train on')
        files = list(dict.fromkeys(self.paths))
        apart = math.ceil(count / self.clips_per_video)
        if apart >= len(files) > 1:
            raise ValueError(f'cannot hold out {count} of {len(self)} clips to measure on: they come from {len(files)} files, and '
                             'one or more of these are to train on')
        chosen = {files[i * len(files) // apart] for i in range(apart)}
        theirs = [i for i, path in enumerate(self.paths) if path in chosen]
        taken = {theirs[i * len(theirs) // count] for i in range(count)}
        left = taken if len(files) == 1 else set(theirs)
        rest = copy(self)
        for dataset, kept in ((rest, sorted(taken)), (self, [i for i in range(len(self)) if i not in left])):
            dataset.paths = [dataset.paths[i] for i in kept]
            dataset.parts = [dataset.parts[i] for i in kept]
            dataset.captions = dataset.captions and [dataset.captions[i] for i in kept]
            dataset.forget()
        return rest

    def clip(self, index: int, generator: torch.Generator | None = None) -> Tensor:
        """The clip as bytes (c f h w); without a generator not flipped, and its first frames."""
        return self.clip_and_caption(index, generator)[0]

    @staticmethod
    def floats(clips: Tensor) -> Tensor:
        """What a model takes: a batch of bytes as floats in [0, 1]."""
        return clips.float() / 255

    def clip_and_caption(self, index: int, generator: torch.Generator | None = None):
        place, flip = (0., 1.) if generator is None else torch.rand(2, generator=generator).tolist()
        index, clip, begin = self.readable(index, place)
        if self.random_window and generator is not None:
            self.windows += 1
            if has_cut(clip):
                index, clip, begin = self.without_cut(index, generator)
        if self.horizontal_flip and flip < 0.5:
            clip = clip.flip(-1)
        return clip, self.captions and self.caption(index, begin)

    def texts(self) -> set[str]:
        """All captions that its clips may have."""
        moves = self.random_window or self.clips_per_video > 1
        return all_texts(self.captions) if moves else set(map(str, self.captions))

    def caption(self, index: int, begin: int) -> str:
        """What the clip shows from that frame on, counted at our rate."""
        caption = self.captions[index]
        if not getattr(caption, 'later', None):
            return caption
        return caption.at(begin if self.rate is None else begin * clip_shape(self.paths[index])[1] / self.rate)

    def without_cut(self, index: int, generator: torch.Generator) -> tuple[int, Tensor, int]:
        """Another window, for a change of scene is not motion; of four that have one, the last."""
        self.cuts += 1
        if self.cuts & self.cuts - 1 == 0:                  # 1, 2, 4, 8, ...: a worker process cannot say it at the end
            warnings.warn(f'{self.cuts} of {self.windows} windows had a change of scene in them and were drawn again')
        for _ in range(4):
            index, clip, begin = self.readable(index, torch.rand(1, generator=generator).item())
            if not has_cut(clip):
                break
        return index, clip, begin

    def window(self, index: int, place: float) -> tuple[Tensor, int]:
        """num_frames of a clip, resized, as bytes (c f h w): those that begin at `place`, from 0 (the first) to 1; and the
        number of the first of them."""
        begin, end = self.stretch(index)
        if self.random_window and end - begin > LONG * self.num_frames:
            begin += int(place * (end - begin - self.num_frames + 1))
            return stand_still(self.read(index, begin, self.num_frames), self.num_frames), begin
        frames = self.cache.get(index)
        if frames is None:
            frames = self.read(index, begin, end - begin if self.random_window else self.num_frames)
            self.remember(index, frames)
        length = frames.shape[1]
        start = int(place * max(1, length - self.num_frames + 1)) if self.random_window else 0
        return stand_still(frames[:, start:][:, :self.num_frames].clone(), self.num_frames or length), begin + start

    def stretch(self, index: int) -> tuple[int, int]:
        """From which to which frame of its file the clip may be taken."""
        if not self.random_window and self.clips_per_video == 1:
            return 0, 0                                     # its first frames: no need to know how long it is
        path, part = self.paths[index], self.parts[index]
        if path not in self.lengths:
            frames, rate, _, _ = clip_shape(path)
            self.lengths[path] = count_frames(frames, rate, self.rate)
        length = self.lengths[path]
        begin = min(length * part // self.clips_per_video, max(0, length - self.num_frames))
        return begin, min(length, max(begin + self.num_frames, length * (part + 1) // self.clips_per_video))

    def read(self, index: int, start: int, num_frames: int | None) -> Tensor:
        return read_clip(self.paths[index], self.channels, num_frames=num_frames, start=start, fps=self.rate, size=self.size)

    def remember(self, index: int, frames: Tensor) -> None:
        worker = get_worker_info()                          # worker processes share the budget
        if self.cached_bytes + frames.nbytes <= self.cache_bytes // (worker.num_workers if worker else 1):
            self.cache[index] = frames
            self.cached_bytes += frames.nbytes

    def readable(self, index: int, place: float = 0.) -> tuple[int, Tensor, int]:
        """A window of the clip `index`, or of the next one where it turns out to be damaged: its index, its frames, the first."""
        for candidate in (i % len(self) for i in range(index, index + len(self))):
            if candidate in self.bad:
                continue
            try:
                return candidate, *self.window(candidate, place)
            except (ValueError, OSError) as error:
                if self.strict:
                    raise
                self.bad.add(candidate)
                warnings.warn(f'{error} (skipped, as {len(self.bad)} of {len(self)} clips so far: the next one stands in for it)')
        raise ValueError(f'no clip can be read any more: all {len(self)} files are damaged or gone')

    def own_generator(self) -> torch.Generator:
        """What dataset[i] draws from; each worker process of a DataLoader has its own, seeded by PyTorch."""
        worker = get_worker_info()
        key = worker.seed if worker else 0
        if key not in self.generators:
            self.generators[key] = seeded_generator(self.seed, key)
        return self.generators[key]

    @property
    def fps(self) -> float:
        """Frames per second of the clips."""
        return self.rate or self.source.fps

    @property
    def fits_in_cache(self) -> bool:
        """An estimate; where clips keep their own length, or wait whole for a window, from a few of them."""
        frames = self.num_frames
        if frames is None or self.random_window:
            frames = self.source.shape(self.rate)[0]
            if self.random_window and frames > LONG * self.num_frames * self.clips_per_video:
                return False
        return len(self) * self.channels * frames * self.size[0] * self.size[1] <= self.cache_bytes


def stand_still(clip: Tensor, num_frames: int) -> Tensor:
    """A short clip repeats its last frame: black ones would teach the model to fade to black."""
    missing = num_frames - clip.shape[1]
    return clip if missing <= 0 else torch.cat([clip, clip[:, -1:].expand(-1, missing, -1, -1)], dim=1)


def has_cut(clip: Tensor) -> bool:
    """Whether some frame differs from the one before far more than others do on average (bytes c f h w)."""
    change = (clip[:, 1:].float() - clip[:, :-1].float()).abs().mean(dim=(0, 2, 3))
    change = change[:(change > 0).sum() and change.nonzero().max() + 1]     # without the end, where a short clip stands still
    if len(change) < 2:
        return False
    others = (change.sum() - change.max()) / (len(change) - 1)
    return bool(change.max() > 15 + 4 * others)


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
    return start_deaf(loader) if num_workers else iter(loader)


def start_deaf(loader: DataLoader) -> Iterator:
    """The loader's iterator.  Ctrl-C, the end of a batch job and a closed terminal reach all processes: the main one then
    saves, and for that needs workers that go on.  They inherit which signals are blocked, so at no moment do they hear one."""
    if hasattr(signal, 'pthread_sigmask'):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        iterator = iter(loader)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        iterator = iter(loader)
    # At its end Python sends its children SIGTERM and waits for them, for ever: before that, ours are told in another way.
    alive = weakref.ref(iterator)
    atexit.register(lambda: alive() is not None and alive()._shutdown_workers())
    return iterator


def stack_clips(clips: list):
    if isinstance(clips[0], Tensor):
        return torch.stack(clips)                           # b c f h w
    videos, captions = zip(*clips)
    return torch.stack(videos), list(captions)


def seeded_generator(*key, device: torch.device | str = 'cpu') -> torch.Generator:
    """The same key, the same numbers, in every process; other keys, unrelated numbers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], 'little'))

"""The clips in a folder, and what their captions say: one walk, and each caption is read once.

    my_clips/a.gif          my_clips/a.txt           beside it: a text file of the same name
    my_clips/videos/b.mp4   my_clips/labels/b.txt    or in labels/, beside the folder videos/
    my_clips/c/d.webm       my_clips/metadata.csv    or all in one table, as on the Hugging Face hub:

        file_name,text
        c/d.webm,a red ball rolls

What happens changes in a long clip. Its text file may say from which frame on, counted from 0, each caption is true, and a
window of the clip (GifDataset(random_window=True)) has the one that is true where it begins:

    0: a red ball rolls to a wall
    41: a red ball rolls back

A folder of 100,000 clips takes seconds to look through, so do it once:

    clips = ClipFolder('my_clips')
    frames, height, width = clips.shape()
    dataset = GifDataset(clips, (height, width), num_frames=frames)     # which would take the name of the folder as well
"""

import csv
import os
import re
import warnings
from functools import cached_property
from pathlib import Path
from statistics import median

from torch import Tensor

from .frames import count_frames, naming
from .gif import GIF, picture_shape, read_frames, video_tensor_to_gif
from .mp4 import import_av, read_video, video_shape, video_tensor_to_mp4

VIDEOS = ('mp4', 'webm', 'mov', 'mkv', 'avi')
CLIPS, IMAGES = ('gif', *VIDEOS), ('png', 'jpg', 'jpeg')
LOOKED_AT = 16                                  # clips that tell the shape of all
MAX_CAPTION = 2**16                             # bytes: a page of text has 3,000
PICTURE_STARTS = (b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff', b'RIFF')
VIDEO_BOXES = (b'ftyp', b'moov', b'mdat', b'wide', b'free', b'skip')        # mp4 and mov: after the length of the box


def read_clip(path, channels: int = 3, **how) -> Tensor:
    """Bytes (c f h w) of any file that may be a clip; `how` is what read_frames in gif.py takes."""
    return (read_video if is_video(path) else read_frames)(path, channels, **how)


def write_clip(video: Tensor, path, fps: float, scale: int | None = 1) -> None:
    """A clip (c f h w), or a batch as a grid, as an mp4 or a GIF: as `path` ends. It appears whole or not at all."""
    unfinished = Path(path).with_name(f'unfinished-{Path(path).name}')
    try:
        if is_video(path):
            video_tensor_to_mp4(video, unfinished, fps, scale=scale)
        else:
            # What is faster than 50 pictures a second plays at 10, as browsers have it.
            video_tensor_to_gif(video, unfinished, duration=max(20, round(1000 / fps)), scale=scale)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def clip_shape(path) -> tuple[int, float, int, int]:
    """(frames, frames per second, height, width) of a file, without decoding it."""
    return (video_shape if is_video(path) else picture_shape)(path)


def is_video(path) -> bool:
    return Path(path).suffix[1:].lower() in VIDEOS


class ClipFolder:
    """All files below `folder` with one of these endings that look whole: `paths`, sorted, and `captions`, or None; those who
    need none need not have them read."""

    def __init__(self, folder, exts: tuple[str, ...] = CLIPS, strict: bool = False, captions: bool = True):
        self.folder = Path(folder)
        found, tables = walk(self.folder, exts)
        if any(map(is_video, found)):
            import_av()
        self.paths = without_damaged(found, strict)
        self.captions = read_captions(self.paths, tables) if captions else None

    def __str__(self) -> str:
        return str(self.folder)

    def shape(self, fps: float | None = None) -> tuple[int, int, int]:
        """(frames, height, width) that suit the folder: the median length and the smallest size of a few clips."""
        frames, rates, heights, widths = zip(*self.some_shapes)
        return int(median(map(count_frames, frames, rates, [fps] * len(rates)))), min(heights), min(widths)

    @property
    def fps(self) -> float:
        """Frames per second: the median of a few clips."""
        return median(rate for _, rate, _, _ in self.some_shapes)

    @cached_property
    def some_shapes(self) -> list[tuple[int, float, int, int]]:
        shapes = []
        for path in sorted(self.paths, key=lambda path: path.suffix[1:].lower() in IMAGES):     # pictures last
            try:
                shapes.append(clip_shape(path))
            except (ValueError, OSError):
                continue                                    # GifDataset is the one that reports it
            if len(shapes) == LOOKED_AT:
                break
        if not shapes:
            raise ValueError(f'none of the {len(self.paths)} clips can be read: {shorten(self.paths)}')
        return shapes


def walk(folder: Path, exts: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """The files with one of these endings, sorted, and the tables of captions."""
    if not folder.is_dir():
        raise FileNotFoundError(f'there is no folder {folder}')
    endings = tuple('.' + ext.lower().lstrip('.') for ext in ([exts] if isinstance(exts, str) else exts))
    found, tables = [], []
    for place, _, names in os.walk(folder):
        found += [os.path.join(place, name) for name in names if name.lower().endswith(endings)]
        tables += [os.path.join(place, name) for name in names if name == 'metadata.csv']
    if not found:
        raise ValueError(f'no clip in {folder}: looked for files ending in {", ".join(endings)}, in its subfolders too')
    return [Path(name) for name in sorted(found, key=lambda name: name.split(os.sep))], tables


def without_damaged(paths: list[Path], strict: bool) -> list[Path]:
    """A look at both ends of each file finds what is empty, foreign or cut off; damage inside shows later."""
    whole, damaged = [], []
    for path in paths:
        try:
            check_ends(path)
            whole.append(path)
        except (ValueError, OSError):
            if strict:
                raise
            damaged.append(path)
    if not whole:
        raise ValueError(f'none of the {len(paths)} clips can be read: {shorten(damaged)}')
    if damaged:
        warnings.warn(f'skipped {len(damaged)} of {len(paths)} files that cannot be read: {shorten(damaged)}')
    return whole


def check_ends(path: Path) -> None:
    """Only a file without the first or last bytes of its kind has to prove by decoding that it can be read."""
    with naming(path), open(path, 'rb') as file:
        start = file.read(12)
        if start.startswith(GIF):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b';':
                read_frames(path, size=(1, 1))
        elif is_video(path):
            if start[4:8] not in VIDEO_BOXES and start[:4] not in (b'\x1aE\xdf\xa3', b'RIFF'):     # mkv and webm, avi
                clip_shape(path)
        elif not start.startswith(PICTURE_STARTS):
            read_frames(path, num_frames=1, size=(1, 1))


def shorten(names: list, limit: int = 10) -> str:
    return ', '.join(map(str, names[:limit])) + (f' and {len(names) - limit} more' if len(names) > limit else '')


# ------------------------------------------------------------------------------------- captions


class Caption(str):
    """What a clip shows at first; `later` has (frame, text) for what it shows from other frames on."""
    later: list[tuple[int, str]] = []

    def at(self, frame: float) -> str:
        return [str(self), *(text for first, text in self.later if first <= frame)][-1]


def all_texts(captions: list[str]) -> set[str]:
    """All that windows of clips with these captions may be told."""
    return {text for caption in captions for text in (str(caption), *(text for _, text in getattr(caption, 'later', ())))}


def read_captions(paths: list[Path], tables: list[str]) -> list[str] | None:
    listed = {}
    for table in tables:
        listed |= read_table(table)
    captions = [read_caption(path) or listed.get(os.path.normpath(path), '') for path in paths]
    missing = [path for path, caption in zip(paths, captions) if not caption]
    if len(missing) == len(paths) and any(listed.values()):
        one = next(filter(listed.get, listed))
        raise ValueError(f'metadata.csv has captions, but of no clip that is read: {one}, for one, is not')
    if len(missing) == len(paths):
        return None
    if missing:
        raise ValueError(f'{len(missing)} of {len(paths)} clips have no caption, {missing[0]} for one: '
                         'give each clip a text file of its name, or a line in metadata.csv, or none')
    return captions


def read_caption(clip: Path) -> str:
    """From clip.txt beside it, or from labels/ beside its folder videos/; '' if there is none."""
    places = [clip.with_suffix('.txt')]
    if 'videos' in clip.parts[:-1]:
        at = len(clip.parts) - 1 - clip.parts[::-1].index('videos')         # the innermost one
        places.append(Path(*clip.parts[:at], 'labels', *clip.parts[at + 1:]).with_suffix('.txt'))
    for place in filter(Path.is_file, places):
        with open(place, 'rb') as file:
            text = file.read(MAX_CAPTION + 1)
        if len(text) > MAX_CAPTION:
            raise ValueError(f'{place} is too long for a caption: up to {MAX_CAPTION} bytes are read')
        try:
            return by_frame(text.decode('utf-8-sig'), place)
        except UnicodeDecodeError:
            raise ValueError(f'{place} is not UTF-8: save the caption as UTF-8 text') from None
    return ''


def by_frame(text: str, place) -> Caption:
    """A caption, whose newlines fold to spaces; or, where every line begins with a frame, several."""
    lines = [re.fullmatch(r'\s*(\d{1,9}):(.*\S.*)', line) for line in text.splitlines() if line.strip()]
    if len(lines) < 2 or None in lines:
        return Caption(' '.join(text.split()))
    frames, texts = [int(line[1]) for line in lines], [' '.join(line[2].split()) for line in lines]
    if frames[0] != 0 or frames != sorted(set(frames)):
        raise ValueError(f'{place} has a caption for each of the frames {frames}: let the first be 0, and each later than the last')
    caption = Caption(texts[0])
    caption.later = list(zip(frames[1:], texts[1:]))
    return caption


def read_table(table: str) -> dict[str, str]:
    """{path of a clip: its caption}"""
    try:
        with open(table, newline='', encoding='utf-8-sig') as file:
            rows = csv.DictReader(file)
            columns = [next((name for name in rows.fieldnames or () if name in names), None)
                       for names in (('file_name', 'file'), ('text', 'caption'))]
            if None in columns:
                raise ValueError('its first line must name the columns: file_name,text or file,caption')
            pairs = [(row[columns[0]], row[columns[1]]) for row in rows]
    except (ValueError, csv.Error) as error:                                # UnicodeDecodeError is a ValueError
        raise ValueError(f'{table} cannot be read: {error}') from None
    place = os.path.dirname(table)
    return {os.path.normpath(os.path.join(place, name)): ' '.join((words or '').split()) for name, words in pairs if name}

"""Video files in and out, as tensors (c f h w) with floats in [0, 1].  Needs PyAV: pip install -e '.[video]'

A film is kept as differences.  Only a key frame, one in some hundred, can be read alone; every other one says what changed since
frames before it (and, as frames are not stored in the order in which they show, after it).  So to read from the middle:

    key ........ key ........ key ...        1. jump to the last key frame before the first frame wanted
                 ^-----######                2. decode from there (-), keep what is wanted (#), stop

Each frame carries the time at which it shows, and these times, not the numbers of frames, say which frames are taken: films of
25, 29.97 or any varying number of frames per second come out at the one that is asked for.

    video = video_to_tensor('clip.mp4', fps=8, num_frames=16)       # (3, 16, height, width): two seconds
    video_tensor_to_mp4(video, 'copy.mp4', fps=8)                   # H.264, which every browser plays
    video_tensor_to_mp4(samples, 'grid.mp4')                        # (b, c, f, h, w): one grid of moving pictures
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from torch import Tensor

from .frames import MAX_PIXELS, Size, check_ending, check_request, check_size, collect, covering, fit, grey, naming, nearest
from .gif import Pictures

FORMATS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi'   # others, such as play lists, would open more files, or the network
BT709, TELEVISION = 1, 1                                # how colours become brightness and two differences, from 16 to 235

# ------------------------------------------------------------------------------------- reading


def video_to_tensor(path, channels: int = 3, fps: float | None = None, num_frames: int | None = None, start: int = 0) -> Tensor:
    """Read a film as floats in [0, 1], (c f h w).  `fps=None` takes every frame, else those nearest in time to what is asked;
    `start` is counted in such frames."""
    return read_video(path, channels, num_frames=num_frames, start=start, fps=fps).float() / 255


def read_video(path, channels: int = 3, *, num_frames: int | None = None, start: int = 0, fps: float | None = None,
               size: Size | None = None) -> Tensor:
    """The same as uint8, scaled and cut to `size` on the way if there is one.  No more is decoded than has to be."""
    check_request(channels, fps, start, num_frames)
    with naming(path), opened(path) as (container, stream):
        rate = fps or float(stream.average_rate)
        timed = timed_frames(path, container, stream, begin=start / rate)
        # Without fps all frames that come are taken: where their rate varies, the clock of `nearest` would leave some out.
        later = (frame for seconds, frame in timed if frame is not None and seconds >= (start - 0.5) / rate)
        frames = nearest(timed, fps, start, num_frames) if fps else islice(later, num_frames)
        return collect(path, map(partial(picture, converter(), channels, size), frames), start)


def video_shape(path) -> tuple[int, float, int, int]:
    """(frames, frames per second, height, width): from the head of the file; where it does not count its frames, we do."""
    with naming(path), opened(path) as (container, stream):
        rate = float(stream.average_rate)
        frames = stream.frames or round(float((stream.duration or 0) * stream.time_base or (container.duration or 0) / 1e6) * rate)
        first, packets = None, 0
        for packet in container.demux(stream):
            first, packets = first or next(iter(decode(packet) or []), None), packets + (packet.size > 0)
            if first and frames:
                break
        if first is None:
            raise ValueError('no frame of it can be decoded')
        size = (first.height, first.width)[::-1 if turns(first) % 2 else 1]
        return frames or packets, rate, *size


@contextmanager
def opened(path) -> Iterator[tuple]:
    """The file and its first film; nothing else is opened."""
    limits = {'max_pixels': str(MAX_PIXELS)}
    whitelists = {'format_whitelist': FORMATS, 'protocol_whitelist': 'file'}
    with import_av().open(f'file:{path}', options=limits, container_options=whitelists) as container:
        if not container.streams.video:
            raise ValueError('there is no film in it')
        stream = container.streams.video[0]
        check_size(stream.codec_context.height, stream.codec_context.width)
        if not stream.average_rate:
            raise ValueError('it does not say how many frames per second it has')
        stream.codec_context.options = limits
        stream.codec_context.thread_count = 1                               # the clips of a batch are read at once, by workers
        yield container, stream


def import_av():
    try:
        import av
    except ImportError:
        raise ImportError("films (mp4, webm, mov, mkv, avi) are read and written by PyAV: pip install -e '.[video]'") from None
    return av


def timed_frames(path, container, stream, begin: float) -> Iterator[tuple]:
    """(seconds, frame) from the key frame before `begin` on, then (end, None); without what damage has touched."""
    unit, offset = float(stream.time_base), stream.start_time or 0
    if begin > 0:       # a little earlier, because the index of a file may hold when frames are decoded, not when they show
        container.seek(max(0, int((begin - 16 / float(stream.average_rate)) / unit)) + offset, stream=stream)
    damaged_at, lost, end = None, 0, 0.
    for packet in container.demux(stream):
        frames = decode(packet)
        if frames is None:
            damaged_at, lost = packet.pts or packet.dts or 0, lost + 1
        for frame in frames or []:
            now = frame.pts if frame.pts is not None else frame.dts or 0
            if damaged_at is not None and not (frame.key_frame and now >= damaged_at):
                lost += 1                                   # until the next key frame, all that follows builds on it
                continue
            damaged_at = None
            end = (now + (frame.duration or 0) - offset) * unit
            yield (now - offset) * unit, frame
    if lost:
        warnings.warn(f'{path} is damaged: {lost} frames were left out')
    yield end, None


def decode(packet) -> list | None:
    """The frames that are complete with it; None if it is damaged."""
    try:
        frames = packet.decode()
    except import_av().error.FFmpegError:
        return None
    return None if any(frame.is_corrupt for frame in frames) else frames


def turns(frame) -> int:
    """How many quarters to turn it, against the clock: cameras turn a picture by a note, not by its pixels."""
    return round(frame.rotation / 90) % 4


def converter():
    """Turns frames from one kind of pixels into another.  What it does by default is fast and a good 1 of 255 too dark."""
    reformatter, how = import_av().video.reformatter, import_av().video.reformatter.Interpolation
    exact = how.BILINEAR | how.ACCURATE_RND | how.FULL_CHR_H_INT
    return partial(reformatter.VideoReformatter().reformat, interpolation=exact, threads=1)


def picture(convert, channels: int, size: Size | None, frame) -> Tensor:
    """A frame as bytes (c h w), of the wanted size: scaled by what decodes it, for that is much faster."""
    height, width = frame.height, frame.width
    if size is not None:
        covered = covering((height, width), size[::-1] if turns(frame) % 2 else size)
        if covered[0] * covered[1] < height * width:
            height, width = covered
    pixels = convert(frame, width, height, 'rgb24').to_ndarray()            # h w c
    if turns(frame):
        pixels = np.rot90(pixels, turns(frame))
    if channels == 1:
        pixels = grey(pixels)
    elif channels == 4:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)
    return fit(pixels, size)


# ------------------------------------------------------------------------------------- writing


def video_tensor_to_mp4(tensor: Tensor, path, fps: float = 8, crf: int = 18, lossless: bool = False, *,
                        scale: int | None = 1) -> None:
    """Write a clip (c f h w), or a batch (b c f h w) as one grid, as H.264; transparency is lost.

    `crf` is how coarse it may be: 0 is best, 18 looks like the original, 51 is worst.  H.264 keeps colours at half the
    resolution, so sides are even: an odd one is padded by one row or column, and a warning says so.  `lossless` keeps every
    bit of every colour, for files that are to be read again rather than watched: no browser plays them.  `scale` as in a GIF."""
    if not (0 < fps <= 1000 and 0 <= crf <= 51):
        raise ValueError(f'fps={fps}, crf={crf}: give a rate above 0 and up to 1000, and a crf from 0 to 51')
    check_ending(path, 'mp4', 'an mp4; video_tensor_to_gif writes GIFs')
    av, pictures = import_av(), Pictures(tensor, scale).each()                 # which complains before there is a file
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    first = next(pictures)
    odd = [0 if lossless else side % 2 for side in first.shape[:2]]
    if any(odd):
        warnings.warn(f'{path}: H.264 wants even sides: {first.shape[0]} x {first.shape[1]} pixels get another row or column')
    convert, options = converter(), {'qp': '0'} if lossless else {'crf': str(crf)}
    with av.open(f'file:{path}', 'w', format='mp4', container_options={'movflags': '+faststart'}) as container:
        stream = container.add_stream('libx264rgb' if lossless else 'libx264', Fraction(fps).limit_denominator(1001), options)
        stream.height, stream.width = first.shape[0] + odd[0], first.shape[1] + odd[1]
        stream.pix_fmt = 'rgb24' if lossless else 'yuv420p'
        if not lossless:
            stream.codec_context.colorspace, stream.codec_context.color_range = BT709, TELEVISION
        for number, pixels in enumerate(chain([first], pictures)):
            pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
            pixels = np.pad(pixels, [(0, odd[0]), (0, odd[1]), (0, 0)], mode='edge')        # h w c
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), 'rgb24')
            if not lossless:
                frame = convert(frame, format='yuv420p', dst_colorspace=BT709, dst_color_range=TELEVISION)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

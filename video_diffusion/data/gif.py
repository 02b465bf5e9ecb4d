"""GIF files in and out, as tensors (c f h w) with floats in [0, 1].

A GIF is a stack of small stickers.  The file names a canvas and up to 256 colours; every frame is a
rectangle of palette indices (compressed with LZW) that is stuck onto the canvas, where one index may
mean "leave what is there".  After the frame was shown its `disposal` says what happens to the sticker:

    0, 1  it stays          2  its rectangle is wiped          3  what was below it comes back

So a frame cannot be read alone: the picture is what all stickers up to it make together.  The blocks
of the file are walked here, in Python, and only LZW is left to Pillow.  Pillow can compose frames too,
but it lets a disposal leak into the next frame, mixes up grey and coloured palettes, takes a file that
was cut off for a shorter clip, and merges equal frames when it writes.

Format: https://www.w3.org/Graphics/GIF/spec-gif89a.txt

    video = gif_to_tensor('clip.gif')             # (3, frames, height, width)
    video_tensor_to_gif(video, 'copy.gif')        # the same frames again
    video_tensor_to_gif(samples, 'grid.gif')      # (b, c, f, h, w): one grid of moving pictures
"""

import io
import math
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}           # channels -> what Pillow calls them
GREYS = np.array([(i, i, i, 255) for i in range(256)], np.uint8).view(np.uint32)[:, 0]  # the default palette
END, EXTENSION, IMAGE = 0x3B, 0x21, 0x2C        # the first byte of each kind of block
GRAPHIC_CONTROL = 0xF9                          # the extension with disposal and transparency

# ------------------------------------------------------------------------------------- reading


def gif_to_tensor(path, channels: int = 3, *, num_frames: int | None = None, start: int = 0) -> Tensor:
    """Read a clip as floats in [0, 1], (c f h w).  What is transparent comes out black (and, with
    four channels, with alpha 0).  `num_frames=None` reads to the end."""
    return read_frames(path, channels, num_frames=num_frames, start=start).contiguous().float() / 255


def read_frames(path, channels: int = 3, *, num_frames: int | None = None, start: int = 0) -> Tensor:
    """The same as uint8, a view of memory in the order f h w c.  Later frames are not decoded.
    A file that cannot be read, or was cut off before the last frame asked for, is a ValueError."""
    check_channels(channels)
    data = Path(path).read_bytes()
    stop = None if num_frames is None else start + num_frames
    stickers = gif_frames(data, channels) if data[:4] == b'GIF8' else other_frames(data, channels)
    frames = []
    try:
        for frame in islice(stickers, start, stop):
            frames.append(frame)
    except (IndexError, struct.error):
        whole = start + len(frames)
        raise ValueError(f'{path} is damaged: the file is cut off after {whole} whole frames') from None
    except (ValueError, OSError) as error:
        raise ValueError(f'{path} cannot be read: {error}') from error
    if not frames:
        raise ValueError(f'{path} cannot be read: there is no frame number {start} in it')
    pixels = np.stack(frames)[..., None].view(np.uint8)[..., :channels]     # f h w c
    return rearrange(torch.from_numpy(pixels.copy()), 'f h w c -> c f h w')


def gif_frames(data: bytes, channels: int):
    """Yield the canvas after each frame: (h w), one uint32 per pixel that holds its four bytes RGBA."""
    width, height, flags = struct.unpack('<HHB', data[6:11])
    canvas = np.zeros(checked_size(height, width), np.uint32)
    global_palette, position = read_palette(data, 13, flags, channels, default=GREYS)
    disposal, transparent = 0, None
    while data[position] != END:
        kind, position = data[position], position + 1
        if kind == EXTENSION:
            if data[position] == GRAPHIC_CONTROL:
                disposal = data[position + 2] >> 2 & 7
                transparent = data[position + 5] if data[position + 2] & 1 else None
            position = skip_blocks(data, position + 1)
        elif kind == IMAGE:
            x, y, w, h, flags = struct.unpack('<HHHHB', data[position:position + 9])
            palette, lzw = read_palette(data, position + 9, flags, channels, default=global_palette)
            position = skip_blocks(data, lzw + 1)
            interlaced, code_size = bool(flags & 64), data[lzw]
            sticker = Image.frombytes('L', checked_size(h, w)[::-1], data[lzw + 1:position],
                                      'gif', code_size, interlaced, -1)
            indices = np.asarray(sticker)[:max(0, height - y), :max(0, width - x)]  # what lies on the canvas
            below = canvas[y:y + h, x:x + w]
            before = below.copy()                                           # what disposal 3 brings back
            np.copyto(below, palette[indices], where=True if transparent is None else indices != transparent)
            yield canvas.copy()
            if disposal in (2, 3):
                below[:] = before if disposal == 3 else 0
            disposal, transparent = 0, None                                 # they hold for one frame only
        elif kind != 0:                                                     # stray zeros do no harm
            raise ValueError(f'unknown block 0x{kind:02x} at byte {position - 1}')


def read_palette(data: bytes, position: int, flags: int, channels: int, default: np.ndarray):
    """Flag bits say if colours follow, and how many: (256 colours as uint32, position after them)."""
    if not flags & 128:
        return default, position
    end = position + 3 * (2 << (flags & 7))
    data[end]                                                               # IndexError if it is cut here
    rgb = np.frombuffer(data[position:end], np.uint8).reshape(-1, 3)
    if channels == 1:                                                       # grey, weighed as Pillow does
        rgb = (rgb @ np.array([19595, 38470, 7471], np.uint32) + 0x8000 >> 16)[:, None]
    rgba = np.zeros((256, 4), np.uint8)
    rgba[:len(rgb), :3], rgba[:, 3] = rgb, 255
    return rgba.view(np.uint32)[:, 0], end


def skip_blocks(data: bytes, position: int) -> int:
    """Data comes in blocks, each behind its length; a block of length 0 ends them."""
    while data[position]:
        position += data[position] + 1
    return position + 1


def other_frames(data: bytes, channels: int):
    """The same for whatever else Pillow opens: WebP, APNG, or a still picture as a clip of one frame."""
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError('it is not a picture that Pillow knows' if data else 'it is empty') from None
    for frame in ImageSequence.Iterator(image):
        rgba = frame.convert('RGBA')
        on_black = Image.composite(rgba, Image.new('RGBA', rgba.size), rgba.getchannel('A'))
        if channels == 1:
            on_black = on_black.convert('L').convert('RGBA')
        yield np.asarray(on_black).view(np.uint32)[..., 0]


def checked_size(height: int, width: int) -> tuple[int, int]:
    if not 0 < height * width <= Image.MAX_IMAGE_PIXELS:            # damage must not fill the memory
        raise ValueError(f'it claims {width} x {height} pixels')
    return height, width


def check_channels(channels: int) -> None:
    if channels not in MODES:
        raise ValueError(f'channels={channels}: give 1 (grey), 3 (RGB) or 4 (RGBA)')


# ------------------------------------------------------------------------------------- writing


def video_tensor_to_gif(tensor: Tensor, path, duration: int = 120, loop: int = 0, optimize: bool = True):
    """Write a clip (c f h w), or a batch (b c f h w) as one grid, and return its frames as PIL images.

    Values are clamped to [0, 1].  `duration` is how long a frame shows, in milliseconds (GIF counts
    hundredths of a second); `loop` is how often to repeat, 0 for ever.  All frames share one palette,
    so colours do not flicker: exact when the whole clip has at most 256 colours, without dithering.
    With four channels a pixel is either opaque or (alpha below one half) transparent.
    `optimize` leaves out the pixels that a frame shares with the one before: a smaller file that
    looks the same."""
    video = tile(tensor) if tensor.ndim == 5 else tensor
    check_video(video, expected='(c, f, h, w) or (b, c, f, h, w)')
    video = (video.detach().float().clamp(0, 1) * 255).round().byte().cpu()
    pixels = rearrange(video, 'c f h w -> f h w c').numpy()
    opaque = pixels[..., 3] >= 128 if pixels.shape[-1] == 4 else np.ones(pixels.shape[:3], bool)
    indices, palette = share_palette(pixels, opaque)                        # f h w, at most 256 x 3
    if not (0 <= duration < 655355 and 0 <= loop < 65536):
        raise ValueError(f'duration={duration}, loop={loop}: a GIF counts up to 655350 ms and 65535 loops')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(encode(indices, palette, opaque, round(duration / 10), loop, optimize))
    return [Image.fromarray(frame.squeeze(-1) if len(video) == 1 else frame) for frame in pixels]


def tile(videos: Tensor) -> Tensor:
    """(b c f h w) -> (c f H W): a grid as square as can be, read row by row, black where no video is left."""
    if videos.ndim != 5 or 0 in videos.shape:
        raise ValueError(f'tile expects videos (b, c, f, h, w), not {tuple(videos.shape)}')
    columns = math.ceil(math.sqrt(len(videos)))
    rows = math.ceil(len(videos) / columns)
    missing = rows * columns - len(videos)
    videos = F.pad(videos, (2, 2, 2, 2, 0, 0, 0, 0, 0, missing))            # 2 pixels around each
    return rearrange(videos, '(rows columns) c f h w -> c f (rows h) (columns w)', rows=rows)


def check_video(video: Tensor, expected: str) -> None:
    if video.ndim != 4 or len(video) not in MODES or 0 in video.shape:
        raise ValueError(f'a video of shape {tuple(video.shape)}: expected {expected}, 1, 3 or 4 channels')
    if not video.is_floating_point():
        raise ValueError(f'a video of {video.dtype}: expected floats in [0, 1] (divide bytes by 255)')
    if video.isnan().any():
        raise ValueError('the video has NaN in it: look for the step that made them before saving it')


def share_palette(pixels: np.ndarray, opaque: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One palette for all frames, so that a colour never flickers: (indices f h w, colours n 3)."""
    packed = np.zeros((*opaque.shape, 4), np.uint8)                         # the fourth byte stays 0
    seen = pixels[opaque][:, :3]
    packed[..., :3] = seen[:1].max(axis=0, initial=0)                       # holes must not add a colour
    packed[opaque, :3] = seen                                               # one channel spreads to three
    film = Image.fromarray(rearrange(packed, 'f h w c -> (f h) w c'))       # the frames in one tall picture
    limit = 256 if opaque.all() else 255                                    # one index is for "transparent"
    if film.getcolors(limit) is not None:                                   # few colours: keep each as it is
        colours, indices = np.unique(packed.view(np.uint32), return_inverse=True)
        return indices.reshape(opaque.shape), colours.view(np.uint8).reshape(-1, 4)[:, :3]
    rgb = packed.reshape(1, -1, 4)[..., :3]
    some = np.ascontiguousarray(rgb[:, ::rgb.shape[1] // 2**14 | 1])        # the choice takes long; 16,384 do
    chosen = Image.fromarray(some).quantize(255, Image.Quantize.MEDIANCUT)
    indices = film.convert('RGB').quantize(palette=chosen, dither=Image.Dither.NONE)
    return np.asarray(indices).reshape(opaque.shape), np.array(chosen.getpalette(), np.uint8).reshape(-1, 3)


def encode(indices, palette, opaque, hundredths: int, loop: int, optimize: bool) -> bytes:
    """The bytes of a GIF.  Pillow would do it, but joins equal frames: here every frame gets its block."""
    height, width = indices.shape[1:]
    keep, wipe = 1, 2
    clear = len(palette) if len(palette) < 256 else None                    # the index that changes nothing
    if not opaque.all():
        indices, disposal = np.where(opaque, indices, clear), wipe          # else old pixels show through
    else:
        disposal = keep
        if optimize and clear is not None:
            same = indices[1:] == indices[:-1]
            indices = np.concatenate([indices[:1], np.where(same, clear, indices[1:])])
    bits = max(1, (len(palette) + (clear is not None) - 1).bit_length())
    table = palette.tobytes().ljust(3 << bits, b'\0')
    out = [b'GIF89a', struct.pack('<HHBBB', width, height, 0x80 | bits - 1, 0, 0), table,
           b'!\xff\x0bNETSCAPE2.0\x03\x01', struct.pack('<HB', loop, 0)]
    for frame in indices.astype(np.uint8):
        control = disposal << 2 | (clear is not None)
        out += [struct.pack('<BBBBHBB', EXTENSION, GRAPHIC_CONTROL, 4, control, hundredths, clear or 0, 0),
                struct.pack('<BHHHHB', IMAGE, 0, 0, width, height, 0),
                b'\x08', Image.fromarray(frame).tobytes('gif', 'L', 8, 0), b'\0']
    return b''.join(out) + bytes([END])

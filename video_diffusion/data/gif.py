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
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from ..checks import tensor as check_tensor
from ..checks import whole
from .frames import CHANNELS, Size, check_ending, check_request, check_size, collect, fit, grey, naming, nearest, read_bytes

GREYS = np.array([(i, i, i, 255) for i in range(256)], np.uint8).view(np.uint32)[:, 0]  # the default palette
GIF = b'GIF8'                                   # so such a file begins
END, EXTENSION, IMAGE = 0x3B, 0x21, 0x2C        # the first byte of each kind of block
GRAPHIC_CONTROL = 0xF9                          # the extension with disposal and transparency
LEAST_SIDE = 96                                 # pixels that a person can see
MAX_CANVAS = 2**23                              # pixels: those of a 4K film, and no GIF is so large
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP')        # of pictures: others would let Pillow start other programs
ORIENTATION, Turn = 0x0112, Image.Transpose     # EXIF's number for how to turn a photo
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM,
         5: Turn.TRANSPOSE, 6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}
SIDEWAYS = (Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90)

# ------------------------------------------------------------------------------------- reading


def gif_to_tensor(path, channels: int = 3, *, num_frames: int | None = None, start: int = 0, fps: float | None = None) -> Tensor:
    """Read a clip as floats in [0, 1], (c f h w).  What is transparent comes out black (and, with
    four channels, with alpha 0).  `num_frames=None` reads to the end; `fps` takes the frames that show at that rate."""
    return read_frames(path, channels, num_frames=num_frames, start=start, fps=fps).float() / 255


def read_frames(path, channels: int = 3, *, num_frames: int | None = None, start: int = 0, fps: float | None = None,
                size: Size | None = None) -> Tensor:
    """The same as uint8, scaled and cut to `size` on the way if there is one.  Later frames are not decoded.
    A file that cannot be read, or was cut off before the last frame asked for, is a ValueError."""
    check_request(channels, fps, start, num_frames)
    with naming(path):
        data = read_bytes(path)
        timed = gif_frames(data, channels) if data.startswith(GIF) else other_frames(data, channels, size)
        if fps is None:
            timed = islice(timed, start, None if num_frames is None else start + num_frames)
        fitted = ((seconds, None if rgba is None else fit(rgba[..., :channels], size)) for seconds, rgba in timed)
        frames = nearest(fitted, fps, start, num_frames) if fps else (frame for _, frame in fitted if frame is not None)
        return collect(path, frames, start)


def picture_shape(path) -> tuple[int, float, int, int]:
    """(frames, frames per second, height, width), found without decoding a frame."""
    with naming(path):
        data = read_bytes(path)
        if data.startswith(GIF):
            seconds = [block[-1] for block in image_blocks(data)]
            if not seconds:
                raise ValueError('there is no frame in it')
            width, height = struct.unpack('<HH', data[6:10])
            return len(seconds), len(seconds) / max(sum(seconds), 1e-3), height, width
        image = open_picture(data)
        frames = 1 if image.format == 'MPO' else getattr(image, 'n_frames', 1)
        height, width = image.size if turn_of(image) in SIDEWAYS else image.size[::-1]
        return frames, 1000 / (image.info.get('duration') or 100), height, width


def gif_frames(data: bytes, channels: int) -> Iterator[tuple[float, np.ndarray | None]]:
    """Yield when each frame shows and the canvas then, RGBA (h w 4), the same memory every time.  At last comes (end, None)."""
    whole, now = 0, 0.
    try:
        width, height, flags = struct.unpack('<HHB', data[6:11])
        canvas = np.zeros(check_size(height, width, MAX_CANVAS), np.uint32)     # one number holds the four bytes of a pixel
        data[13 + palette_bytes(flags)]                                     # IndexError if it is cut before
        global_palette = read_palette(data, 13, flags, channels, default=GREYS)
        for start, end, disposal, transparent, seconds in image_blocks(data):
            x, y, w, h, own_flags = struct.unpack('<HHHHB', data[start:start + 9])
            palette = read_palette(data, start + 9, own_flags, channels, default=global_palette)
            lzw = start + 9 + palette_bytes(own_flags)
            interlaced, code_size = bool(own_flags & 64), data[lzw]
            sticker = Image.frombytes('L', check_size(h, w, MAX_CANVAS)[::-1], data[lzw + 1:end], 'gif', code_size, interlaced, -1)
            indices = np.asarray(sticker)[:max(0, height - y), :max(0, width - x)]  # what lies on the canvas
            below = canvas[y:y + h, x:x + w]
            before = below.copy() if disposal == 3 else 0                   # what comes back, or wipes it
            np.copyto(below, palette[indices], where=True if transparent is None else indices != transparent)
            yield now, canvas.view(np.uint8).reshape(height, width, 4)
            whole, now = whole + 1, now + seconds
            if disposal in (2, 3):
                below[:] = before
    except (IndexError, struct.error):
        raise ValueError(f'it is damaged, the file is cut off after {whole} whole frames') from None
    yield now, None


def image_blocks(data: bytes) -> Iterator[tuple[int, int, int, int | None, float]]:
    """Yield of each frame where it starts and ends, its disposal, what index is transparent, and how long it shows."""
    position = 13 + palette_bytes(data[10])
    nothing_said = 0, None, 0.1
    disposal, transparent, seconds = nothing_said
    while data[position] != END:
        kind, position = data[position], position + 1
        if kind == EXTENSION:
            if data[position] == GRAPHIC_CONTROL:
                flags, hundredths, index = struct.unpack('<BHB', data[position + 2:position + 6])
                disposal, transparent = flags >> 2 & 7, index if flags & 1 else None
                seconds = hundredths / 100 if hundredths > 1 else 0.1       # as browsers do
            position = skip_blocks(data, position + 1)
        elif kind == IMAGE:
            start = position
            position = skip_blocks(data, start + 10 + palette_bytes(data[start + 8]))
            yield start, position, disposal, transparent, seconds
            disposal, transparent, seconds = nothing_said                   # it held for one frame only
        elif kind != 0:                                                     # stray zeros do no harm
            raise ValueError(f'unknown block 0x{kind:02x} at byte {position - 1}')


def palette_bytes(flags: int) -> int:
    """Flag bits say if colours follow, and how many."""
    return 3 * (2 << (flags & 7)) if flags & 128 else 0


def read_palette(data: bytes, position: int, flags: int, channels: int, default: np.ndarray) -> np.ndarray:
    """256 colours, as uint32."""
    if not flags & 128:
        return default
    rgb = np.frombuffer(data[position:position + palette_bytes(flags)], np.uint8).reshape(-1, 3)
    rgba = np.zeros((256, 4), np.uint8)
    rgba[:len(rgb), :3], rgba[:, 3] = grey(rgb) if channels == 1 else rgb, 255
    return rgba.view(np.uint32)[:, 0]


def skip_blocks(data: bytes, position: int) -> int:
    """Data comes in blocks, each behind its length; a block of length 0 ends them."""
    while data[position]:
        position += data[position] + 1
    return position + 1


def other_frames(data: bytes, channels: int, size: Size | None) -> Iterator[tuple[float, np.ndarray | None]]:
    """The same for other pictures: WebP, APNG, or a still one as a clip of one frame."""
    image, now, shrink = open_picture(data), 0., 1
    turn = turn_of(image)
    if size is not None:                                                    # large photos: fast and roughly to twice the size
        size = size[::-1] if turn in SIDEWAYS else size
        image.draft(None, (2 * size[1], 2 * size[0]))                       # a JPEG can be decoded smaller than it is
        shrink = max(1, min(image.height // (2 * size[0]), image.width // (2 * size[1])))
    check_size(image.height, image.width)
    # A JPEG with more than one picture is not a film: phones put a small copy behind the large one.
    for frame in [image] if image.format == 'MPO' else ImageSequence.Iterator(image):
        until = now + (frame.info.get('duration') or 100) / 1000
        if frame.mode.startswith('I'):                                      # 16 bits a pixel: to Pillow all is white from 256 on
            frame = Image.fromarray((np.asarray(frame) >> 8).astype(np.uint8))
        rgba = (frame if frame.mode == 'RGBA' else frame.convert('RGBA')).reduce(shrink)
        rgba = rgba if turn is None else rgba.transpose(turn)
        on_black = Image.composite(rgba, Image.new('RGBA', rgba.size), rgba.getchannel('A'))
        on_black.putalpha(rgba.getchannel('A'))
        if channels == 1:
            on_black = on_black.convert('L').convert('RGBA')
        yield now, np.asarray(on_black)
        now = until
    yield now, None


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How to turn a photo upright: phones write down how they were held, and do not turn the picture."""
    return TURNS.get(Image.Image.getexif(image).get(ORIENTATION))           # that of a PNG would decode it


def open_picture(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f'it is not a picture: GIF, {", ".join(FORMATS)}' if data else 'it is empty') from None


# ------------------------------------------------------------------------------------- writing


def video_tensor_to_gif(tensor: Tensor, path, duration: int = 120, loop: int = 0, optimize: bool = True, *,
                        scale: int | None = 1) -> Sequence[Image.Image]:
    """Write a clip (c f h w), or a batch (b c f h w) as one grid, and return its frames as PIL images.

    Values are clamped to [0, 1].  `duration` is how long a frame shows, in milliseconds (GIF counts
    hundredths of a second); `loop` is how often to repeat, 0 for ever.  All frames share one palette,
    so colours do not flicker: exact when the whole clip has at most 256 colours, without dithering.
    With four channels a pixel is either opaque or (alpha below one half) transparent.
    `optimize` leaves out the pixels that a frame shares with the one before: a smaller file that
    looks the same.  `scale` repeats every pixel so often each way; None: until a person can see them."""
    pictures = Pictures(tensor, scale)
    check_ending(path, 'gif', 'a GIF; video_tensor_to_mp4 writes films')
    if 0 < duration < 10:
        raise ValueError(f'duration={duration}: it is in milliseconds, and a GIF counts hundredths of a second: give 10 or more')
    if not (0 <= duration < 655355 and 0 <= loop < 65536):
        raise ValueError(f'duration={duration}, loop={loop}: a GIF counts up to 655350 ms and 65535 loops')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:
        file.writelines(encode(pictures, round(duration / 10), loop, optimize))
    return pictures


class Pictures(Sequence):
    """The frames of a clip, or of the grid of a batch, as a list of PIL images would have them. Each is made when it is asked for,
    for a long film is large: as it is given the floats are there already, and its bytes, enlarged, need never be there at once."""

    def __init__(self, tensor: Tensor, scale: int | None = 1):
        whole('scale', scale, 1)
        check_tensor('video', tensor)
        video = tensor if tensor.ndim == 5 else tensor[None]
        if tensor.ndim not in (4, 5) or video.shape[1] not in CHANNELS or 0 in video.shape:
            raise ValueError(f'a video of shape {tuple(tensor.shape)}: expected (c, f, h, w) or (b, c, f, h, w), '
                             '1, 3 or 4 channels')
        if not video.is_floating_point():
            raise ValueError(f'a video of {video.dtype}: expected floats in [0, 1] (divide bytes by 255)')
        if any(frame.isnan().any() for frame in video.unbind(dim=2)):
            raise ValueError('the video has NaN in it: look for the step that made them before saving it')
        if any(((frame > 10) & frame.isfinite()).any() for frame in video.unbind(dim=2)):
            raise ValueError(f'the video has values up to {video.max().item():.4g}: expected floats in [0, 1] (divide by 255)')
        self.video, self.is_batch = video.detach(), tensor.ndim == 5
        # Clips of 16 pixels are stamps on a screen of today: hard pixels show what a model drew, not what a browser made of it.
        self.scale = scale or math.ceil(LEAST_SIDE / max(video.shape[-2:]))

    def __len__(self) -> int:
        return self.video.shape[2]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        pixels = self.pixels(range(len(self))[index])
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def pixels(self, number: int) -> np.ndarray:
        """One of them as bytes (h w c)."""
        frame = self.video[:, :, number:number + 1]                         # b c 1 h w
        frame = frame.repeat_interleave(self.scale, dim=-2).repeat_interleave(self.scale, dim=-1)
        frame = (tile(frame) if self.is_batch else frame[0]).float().clamp(0, 1)
        return rearrange((frame * 255).round().byte().cpu(), 'c 1 h w -> h w c').numpy()

    def each(self) -> Iterator[np.ndarray]:
        return map(self.pixels, range(len(self)))


def tile(videos: Tensor) -> Tensor:
    """(b c f h w) -> (c f H W): a grid as square as can be, read row by row, black where no video is left."""
    columns = math.ceil(math.sqrt(len(videos)))
    rows = math.ceil(len(videos) / columns)
    missing = rows * columns - len(videos)
    videos = F.pad(videos, (2, 2, 2, 2, 0, 0, 0, 0, 0, missing))            # 2 pixels around each
    return rearrange(videos, '(rows columns) c f h w -> c f (rows h) (columns w)', rows=rows)


def share_palette(pictures: Pictures, limit: int) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """One palette for all frames, so that a colour never flickers: (colours n 3, what makes indices h w of a picture)."""
    opaque = (picture[is_opaque(picture)][:1, :3] for picture in pictures.each())
    filler = next((colour for colour in opaque if len(colour)), 0)          # holes must not add a colour
    colours = np.zeros(0, np.uint32)
    for picture in pictures.each():
        if Image.fromarray(packed(picture, filler)).getcolors(limit) is None or len(colours) > limit:
            break
        colours = np.union1d(colours, packed(picture, filler).view(np.uint32))
    else:
        if len(colours) <= limit:                                           # few colours: keep each as it is
            return (colours.view(np.uint8).reshape(-1, 4)[:, :3],
                    lambda picture: np.searchsorted(colours, packed(picture, filler).view(np.uint32)[..., 0]))
    area = math.prod(pictures.pixels(0).shape[:2])
    # The choice takes long, so some 16,384 pixels stand for all.
    frame, place = divmod(np.arange(0, len(pictures) * area, len(pictures) * area // 2**14 | 1), area)
    some = np.empty((len(frame), 3), np.uint8)
    for number, picture in enumerate(pictures.each()):
        some[frame == number] = packed(picture, filler).reshape(-1, 4)[place[frame == number], :3]
    chosen = Image.fromarray(some[None]).quantize(255, Image.Quantize.MEDIANCUT)
    return (np.array(chosen.getpalette(), np.uint8).reshape(-1, 3),
            lambda picture: np.asarray(Image.fromarray(packed(picture, filler)).convert('RGB').quantize(
                palette=chosen, dither=Image.Dither.NONE)))


def is_opaque(picture: np.ndarray) -> np.ndarray:
    return picture[..., 3] >= 128 if picture.shape[-1] == 4 else np.ones(picture.shape[:2], bool)


def packed(picture: np.ndarray, filler) -> np.ndarray:
    """Three colours and a zero (h w 4), where the picture has a hole the filler."""
    colours = np.zeros((*picture.shape[:2], 4), np.uint8)
    colours[..., :3] = np.where(is_opaque(picture)[..., None], picture[..., :3], filler)     # one channel spreads to three
    return colours


def encode(pictures: Pictures, hundredths: int, loop: int, optimize: bool) -> Iterator[bytes]:
    """The bytes of a GIF.  Pillow would do it, but joins equal frames: here every frame gets its block."""
    height, width, channels = pictures.pixels(0).shape
    has_holes = channels == 4 and not all(is_opaque(picture).all() for picture in pictures.each())
    palette, indices_of = share_palette(pictures, limit=255 if has_holes else 256)   # one index is for "transparent"
    disposal = 2 if has_holes else 1                                        # 2 wipes: else old pixels would show through the holes
    clear = len(palette) if len(palette) < 256 else None                    # the index that changes nothing
    bits = max(1, (len(palette) + (clear is not None) - 1).bit_length())
    yield b'GIF89a' + struct.pack('<HHBBB', width, height, 0x80 | bits - 1, 0, 0) + palette.tobytes().ljust(3 << bits, b'\0')
    yield b'!\xff\x0bNETSCAPE2.0\x03\x01' + struct.pack('<HB', loop, 0)
    before = None
    for picture in pictures.each():
        indices = indices_of(picture)
        unchanged = indices == before if optimize and before is not None and clear is not None else False
        before = None if has_holes else indices
        shown = np.where(unchanged | ~is_opaque(picture), 0 if clear is None else clear, indices).astype(np.uint8)
        control = disposal << 2 | (clear is not None)
        yield struct.pack('<BBBBHBB', EXTENSION, GRAPHIC_CONTROL, 4, control, hundredths, clear or 0, 0)
        yield struct.pack('<BHHHHB', IMAGE, 0, 0, width, height, 0)
        yield b'\x08' + Image.fromarray(shown).tobytes('gif', 'L', 8, 0) + b'\0'
    yield bytes([END])

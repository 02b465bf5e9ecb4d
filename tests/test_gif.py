"""GIFs in and out.  The files read here are written byte by byte in this file, and what they should look
like is computed pixel by pixel from the same description, so neither Pillow nor our reader is its own judge.

    pytest tests/test_gif.py
"""

import base64
import random
import struct
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from video_diffusion import show
from video_diffusion.data.frames import naming
from video_diffusion.data.gif import gif_to_tensor, read_frames, tile, video_tensor_to_gif

# ------------------------------------------------------------- a second, slow and plain, writer and composer


@dataclass
class Sticker:
    x: int
    y: int
    indices: list               # rows of palette indices
    disposal: int = 0
    transparent: int | None = None
    palette: list | None = None  # local colours
    interlaced: bool = False
    size: tuple = field(init=False)

    def __post_init__(self):
        self.size = (len(self.indices[0]), len(self.indices))


def plain_lzw(values):
    """LZW that never grows its table: 9-bit codes, with a clear code (256) before it would."""
    codes = []
    for i, value in enumerate(values):
        codes += [256, value] if i % 200 == 0 else [value]
    bits = ''.join(f'{code:09b}'[::-1] for code in codes + [257])
    bits += '0' * (-len(bits) % 8)
    data = bytes(int(bits[i:i + 8][::-1], 2) for i in range(0, len(bits), 8))
    blocks = [data[i:i + 255] for i in range(0, len(data), 255)]
    return b'\x08' + b''.join(bytes([len(b)]) + b for b in blocks) + b'\0'


def table(palette):
    bits = max(1, (len(palette) - 1).bit_length())
    return 0x80 | bits - 1, b''.join(bytes(c) for c in palette).ljust(3 << bits, b'\0')


def write_gif(path, width, height, stickers, palette=None):
    flags, colours = table(palette) if palette else (0, b'')
    out = b'GIF89a' + struct.pack('<HHBBB', width, height, flags, 0, 0) + colours
    out += b'!\xfe\x05hello\x00'                                             # a comment, to be skipped
    for s in stickers:
        control = s.disposal << 2 | (s.transparent is not None)
        if control:                                                         # the oldest files have none
            out += b'!\xf9\x04' + struct.pack('<BHBB', control, 10, s.transparent or 0, 0)
        flags, colours = table(s.palette) if s.palette else (0, b'')
        rows = range(s.size[1])
        if s.interlaced:
            flags |= 0x40
            rows = [*rows[0::8], *rows[4::8], *rows[2::4], *rows[1::2]]
        out += b',' + struct.pack('<HHHHB', s.x, s.y, *s.size, flags) + colours
        out += plain_lzw([value for row in rows for value in s.indices[row]])
    path.write_bytes(out + b';')
    return path


def compose(width, height, stickers, palette=None):
    """(4 f h w) bytes, one pixel at a time."""
    palette = palette or [(i, i, i) for i in range(256)]
    nothing = (0, 0, 0, 0)
    canvas = {(x, y): nothing for x in range(width) for y in range(height)}
    film = []
    for s in stickers:
        before = dict(canvas)
        covered = [(s.x + i, s.y + j, v) for j, row in enumerate(s.indices) for i, v in enumerate(row)]
        covered = [(x, y, v) for x, y, v in covered if (x, y) in canvas]
        for x, y, value in covered:
            if value != s.transparent:
                canvas[x, y] = (*(s.palette or palette)[value], 255)
        film.append([[canvas[x, y] for x in range(width)] for y in range(height)])
        for x, y, _ in covered:
            if s.disposal in (2, 3):
                canvas[x, y] = nothing if s.disposal == 2 else before[x, y]
    return torch.tensor(film, dtype=torch.uint8).permute(3, 0, 1, 2)


COLOURS = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 240, 230), (9, 8, 7)]
OTHERS = [(1, 2, 3), (200, 100, 50), (77, 88, 99), (255, 255, 255)]


def random_stickers(rng, width, height, count, disposals, inside=True):
    """Partial frames with all that the format allows; the first one covers the canvas half of the time."""
    stickers = []
    for number in range(count):
        x, y = rng.randrange(width), rng.randrange(height)
        w, h = (rng.randint(1, width - x), rng.randint(1, height - y)) if inside else (rng.randint(1, 9), 4)
        if number == 0 and rng.random() < 0.5:
            x, y, w, h = 0, 0, width, height
        palette = rng.choice([None, OTHERS])
        top = len(palette or COLOURS) - 1
        stickers.append(Sticker(
            x, y, [[rng.randint(0, top) for _ in range(w)] for _ in range(h)], rng.choice(disposals),
            rng.choice([None, rng.randint(0, top)]), palette, rng.random() < 0.3))
    return stickers


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize('disposals', [[0], [1], [2], [3], [0, 1, 2, 3]])
@pytest.mark.parametrize('inside', [True, False])
def test_frames_are_composed_as_the_format_says(tmp_path, disposals, inside):
    rng = random.Random(repr((disposals, inside)))
    for case in range(20):
        stickers = random_stickers(rng, 11, 9, 6, disposals, inside)
        path = write_gif(tmp_path / f'{case}.gif', 11, 9, stickers, COLOURS)
        expected = compose(11, 9, stickers, COLOURS)
        assert torch.equal(read_frames(path, 4), expected)
        assert torch.equal(read_frames(path, 3), expected[:3])              # transparent is black


def test_a_disposal_holds_for_one_frame_only(tmp_path):
    """Pillow 13 lets it leak: there the second sticker is wiped as the first was."""
    dot = [[1]]
    stickers = [Sticker(0, 0, dot, disposal=2), Sticker(1, 0, dot, disposal=0), Sticker(2, 0, dot)]
    path = write_gif(tmp_path / 'a.gif', 3, 1, stickers, COLOURS)
    assert read_frames(path, 4)[3, :, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 255, 255]]


def test_grey_file_with_a_coloured_frame(tmp_path):
    stickers = [Sticker(0, 0, [[7, 200]]), Sticker(0, 0, [[1]], palette=OTHERS)]
    path = write_gif(tmp_path / 'a.gif', 2, 1, stickers)
    assert torch.equal(read_frames(path, 4), compose(2, 1, stickers))
    assert read_frames(path)[:, 1, 0].T.tolist() == [[200, 100, 50], [200, 200, 200]]


def test_grey_is_weighed_as_pillow_weighs_it(tmp_path):
    rng = random.Random(1)
    palette = [tuple(rng.randrange(256) for _ in range(3)) for _ in range(256)]
    path = write_gif(tmp_path / 'a.gif', 256, 1, [Sticker(0, 0, [list(range(256))])], palette)
    expected = np.asarray(Image.open(path).convert('RGB').convert('L'))
    assert np.array_equal(read_frames(path, 1)[0, 0], expected)


def test_agrees_with_pillow_on_what_pillow_writes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 3, (5, 16, 20, 3), np.uint8) * 90
    frames = [Image.fromarray(frame) for frame in pixels]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:], duration=50)
    assert np.array_equal(read_frames(tmp_path / 'a.gif').permute(1, 2, 3, 0), pixels)


def test_start_and_num_frames_are_a_slice(tmp_path):
    stickers = random_stickers(random.Random(3), 7, 6, 8, [0, 2, 3])
    path = write_gif(tmp_path / 'a.gif', 7, 6, stickers, COLOURS)
    whole = gif_to_tensor(path)
    assert whole.dtype == torch.float32 and whole.is_contiguous() and whole.max() <= 1
    assert torch.equal(gif_to_tensor(path, 3, start=2, num_frames=3), whole[:, 2:5])
    assert torch.equal(gif_to_tensor(path, start=6, num_frames=9), whole[:, 6:])
    with pytest.raises(ValueError, match='a.gif.*no frame number 8'):
        gif_to_tensor(path, start=8)


def test_later_frames_are_not_decoded(tmp_path):
    path = write_gif(tmp_path / 'a.gif', 4, 4, [Sticker(0, 0, [[1] * 4] * 4)] * 5, COLOURS)
    path.write_bytes(path.read_bytes()[:-20])                               # the fifth frame is damaged
    assert gif_to_tensor(path, num_frames=4).shape == (3, 4, 4, 4)
    with pytest.raises(ValueError, match='a.gif'):
        gif_to_tensor(path, num_frames=5)


def test_every_cut_is_noticed(tmp_path):
    stickers = random_stickers(random.Random(5), 6, 5, 3, [0, 1], True)
    whole = write_gif(tmp_path / 'whole.gif', 6, 5, stickers, COLOURS).read_bytes()
    for length in range(len(whole)):
        path = tmp_path / 'cut.gif'
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match='cut.gif.*cut off' if length > 3 else 'cut.gif'):
            read_frames(path)


@pytest.mark.parametrize('content, says', [
    (b'', 'it is empty'), (b'hello, this is text', 'not a picture'), (b'GIF89a', 'cut off'),
    (b'GIF89a' + b'\xff' * 7 + b'x' * 900, '65535 x 65535'),
    (b'GIF89a\1\0\1\0\0\0\0\x77;', 'unknown block 0x77'),
])
def test_a_damaged_file_is_named(tmp_path, content, says):
    (tmp_path / 'bad.gif').write_bytes(content)
    with pytest.raises(ValueError, match=f'bad.gif.*{says}'):
        gif_to_tensor(tmp_path / 'bad.gif')


def test_a_missing_file_and_odd_channels(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.gif'):
        gif_to_tensor(tmp_path / 'nowhere.gif')
    with pytest.raises(ValueError, match='channels=2'):
        gif_to_tensor(tmp_path / 'nowhere.gif', 2)


def test_other_pictures_that_pillow_knows(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
    pixels[..., 3] = np.where(pixels[..., 3] > 99, 255, 0)
    Image.fromarray(pixels).save(tmp_path / 'still.png')
    expected = np.where(pixels[..., 3:] > 0, pixels, 0)
    assert np.array_equal(read_frames(tmp_path / 'still.png', 4)[:, 0].permute(1, 2, 0), expected)
    grey = np.asarray(Image.fromarray(expected[..., :3].copy()).convert('L'))
    assert np.array_equal(read_frames(tmp_path / 'still.png', 1)[0, 0], grey)


# ------------------------------------------------------------------------------------- writing


def pillow_frames(path, mode):
    return [np.asarray(frame.convert(mode)) for frame in ImageSequence.Iterator(Image.open(path))]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 4]), st.integers(1, 256), st.integers(1, 5),
       st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_few_colours_come_back_exactly(tmp_path_factory, seed, channels, colours, f, h, w, optimize):
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (min(colours, 255) if channels == 4 else colours, channels), np.uint8)
    if channels == 4:
        palette[:, 3] = rng.choice([0, 255], len(palette))
        palette[palette[:, 3] == 0] = 0                                     # the transparent keep no colour
    pixels = palette[rng.integers(0, len(palette), (f, h, w))]              # f h w c
    video = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 255
    path = tmp_path_factory.getbasetemp() / 'round_trip.gif'
    frames = video_tensor_to_gif(video, path, optimize=optimize)
    assert torch.equal(gif_to_tensor(path, channels), video)
    mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}[channels]
    assert [frame.mode for frame in frames] == [mode] * f
    shown = pillow_frames(path, mode)                                       # other programs see the same
    assert all(np.array_equal(a, frame) for a, frame in zip(shown, frames, strict=True))


def test_all_256_colours_fit(tmp_path):
    video = torch.arange(256).view(1, 1, 16, 16).repeat(1, 3, 1, 1) / 255
    video_tensor_to_gif(video, tmp_path / 'a.gif')
    assert torch.equal(gif_to_tensor(tmp_path / 'a.gif', 1), video)


def test_255_colours_and_transparent_fit(tmp_path):
    video = torch.ones(4, 2, 16, 16)
    video[:3] = torch.arange(256).view(1, 1, 16, 16) / 255
    video[:, :, 0, 0] = 0
    video_tensor_to_gif(video, tmp_path / 'a.gif')
    assert torch.equal(gif_to_tensor(tmp_path / 'a.gif', 4), video)


@pytest.mark.parametrize('optimize', [True, False])
def test_equal_frames_stay_apart_and_keep_their_time(tmp_path, optimize):
    video = torch.full((3, 7, 8, 8), 0.2)
    video_tensor_to_gif(video, tmp_path / 'a.gif', duration=90, loop=3, optimize=optimize)
    image = Image.open(tmp_path / 'a.gif')
    durations = [frame.info['duration'] for frame in ImageSequence.Iterator(image)]
    assert durations == [90] * 7 and image.info['loop'] == 3
    assert gif_to_tensor(tmp_path / 'a.gif').shape == (3, 7, 8, 8)


def test_optimize_makes_it_smaller(tmp_path):
    video = torch.rand(3, 1, 32, 32).mul(4).round().div(4).repeat(1, 10, 1, 1)
    for name in (True, False):
        video_tensor_to_gif(video, tmp_path / f'{name}.gif', optimize=name)
    sizes = [(tmp_path / f'{name}.gif').stat().st_size for name in (True, False)]
    assert sizes[0] < sizes[1] / 2


def test_many_colours_share_one_palette_and_do_not_flicker(tmp_path):
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(3, 1, 48, 48, generator=generator)                   # 2,304 colours
    moving = torch.rand(3, 6, 16, 48, generator=generator)
    video = torch.cat([still.repeat(1, 6, 1, 1), moving], dim=2)
    video_tensor_to_gif(video, tmp_path / 'a.gif')
    back = gif_to_tensor(tmp_path / 'a.gif')
    assert torch.equal(back[:, :, :48], back[:, :1, :48].repeat(1, 6, 1, 1))
    assert (back - video).abs().mean() < 0.06
    assert len(back.flatten(1).unique(dim=1).T) <= 256


def test_values_are_clamped_rounded_and_folders_made(tmp_path):
    video = torch.tensor([-1., 0.4999, 0.9999, 7., float('inf')]).view(1, 1, 1, 5)
    video_tensor_to_gif(video.bfloat16().requires_grad_(), tmp_path / 'new' / 'er' / 'a.gif')
    back = gif_to_tensor(tmp_path / 'new' / 'er' / 'a.gif', 1) * 255
    assert back.round().flatten().tolist() == [0, 128, 255, 255, 255]


@pytest.mark.parametrize('count, grid', [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (5, (2, 3)), (9, (3, 3))])
def test_tile(count, grid):
    videos = torch.rand(count, 3, 2, 4, 6) * 0.5 + 0.5
    film = tile(videos)
    assert film.shape == (3, 2, grid[0] * 8, grid[1] * 10)
    rest = film.clone()
    for i, video in enumerate(videos):
        top, left = i // grid[1] * 8 + 2, i % grid[1] * 10 + 2
        assert torch.equal(film[..., top:top + 4, left:left + 6], video)
        rest[..., top:top + 4, left:left + 6] = 0
    assert rest.abs().max() == 0                                            # border, missing cells: black


def test_a_batch_is_written_as_its_grid(tmp_path):
    videos = torch.randint(0, 2, (3, 3, 4, 5, 5)).float()
    video_tensor_to_gif(videos, tmp_path / 'a.gif')
    assert torch.equal(gif_to_tensor(tmp_path / 'a.gif'), tile(videos))


@pytest.mark.parametrize('video, says', [
    (torch.zeros(3, 8, 8), r'\(3, 8, 8\)'), (torch.zeros(2, 4, 8, 8), r'\(2, 4, 8, 8\).*1, 3 or 4'),
    (torch.zeros(3, 0, 8, 8), 'expected'), (torch.zeros(2, 3, 0, 8, 8), 'expected'),
    (torch.zeros(3, 4, 8, 8, dtype=torch.uint8), 'uint8'), (torch.full((3, 1, 2, 2), float('nan')), 'NaN'),
])
def test_bad_videos(tmp_path, video, says):
    with pytest.raises(ValueError, match=says):
        video_tensor_to_gif(video, tmp_path / 'a.gif')
    assert not (tmp_path / 'a.gif').exists()


@pytest.mark.parametrize('arguments', [{'duration': -1}, {'duration': 10**6}, {'loop': -1}, {'loop': 2**16}])
def test_bad_times(tmp_path, arguments):
    with pytest.raises(ValueError, match='duration=.*loop='):
        video_tensor_to_gif(torch.zeros(1, 1, 2, 2), tmp_path / 'a.gif', **arguments)


def test_small_clips_are_enlarged_with_hard_pixels(tmp_path):
    video = torch.randint(0, 2, (2, 3, 4, 5, 7)).float()                    # few colours: all are kept
    frames = video_tensor_to_gif(video, tmp_path / 'seen.gif', scale=None)
    scale = 14                                                              # 7 * 14 is the first multiple above 96
    assert frames[0].size == (2 * (7 * scale + 4), 5 * scale + 4)           # two side by side, 2 pixels around each
    read = gif_to_tensor(tmp_path / 'seen.gif')
    for number, clip in enumerate(video):
        part = read[:, :, 2:2 + 5 * scale, number * (7 * scale + 4) + 2:][..., :7 * scale]
        assert torch.equal(part, clip.repeat_interleave(scale, 2).repeat_interleave(scale, 3))
    large = torch.zeros(3, 1, 2, 97)
    assert video_tensor_to_gif(large, tmp_path / 'large.gif', scale=None)[0].size == (97, 2)
    with pytest.raises(ValueError, match='scale=0: give a whole number'):
        video_tensor_to_gif(large, tmp_path / 'none.gif', scale=0)


def test_show_plays_in_a_notebook_and_says_what_it_is_elsewhere(tmp_path):
    video = torch.rand(2, 3, 4, 5, 6)
    video_tensor_to_gif(video, tmp_path / 'a.gif', duration=50, scale=3)
    shown = show(video, scale=3, duration=50)
    assert base64.b64decode(shown._repr_html_().split('base64,')[1].split('"')[0]) == (tmp_path / 'a.gif').read_bytes()
    assert repr(shown) == '<2 videos of 4 frames, 5x6, 3 channels; in a notebook it plays>'
    assert repr(show(video[0])) == '<a video of 4 frames, 5x6, 3 channels; in a notebook it plays>'


@pytest.mark.parametrize('name, duration, says', [
    ('x.mp4', 120, 'x.mp4: this writes a GIF; video_tensor_to_mp4 writes films'), ('x.png', 120, 'this writes a GIF'),
    ('x.gif', 9, 'duration=9: it is in milliseconds'), ('x.gif', 0.12, 'milliseconds')])
def test_a_file_is_what_its_name_says_and_time_is_in_milliseconds(tmp_path, name, duration, says):
    with pytest.raises(ValueError, match=says):
        video_tensor_to_gif(torch.zeros(1, 1, 2, 2), tmp_path / name, duration)
    assert not list(tmp_path.iterdir())
    video_tensor_to_gif(torch.zeros(1, 1, 2, 2), tmp_path / 'X.GIF', 10)


def test_an_error_without_words_is_told_by_its_name(tmp_path):
    (tmp_path / 'a.gif').touch()
    with pytest.raises(ValueError, match='a.gif cannot be read: ZeroDivisionError'):
        with naming(tmp_path / 'a.gif'):
            raise ZeroDivisionError

"""Films in and out.  Every frame of the films written here says its number by its brightness, so that a test sees which frames
came; what is lossless must come back bit by bit.

    pytest tests/test_mp4.py
"""

import math
import os
import random
import re
import socket
import struct
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import video_diffusion.data.mp4 as mp4
from video_diffusion import GifDataset, video_tensor_to_gif, video_tensor_to_mp4, video_to_tensor
from video_diffusion.data.folder import clip_shape, read_clip
from video_diffusion.data.frames import resize_and_crop
from video_diffusion.data.gif import gif_to_tensor, tile

av = pytest.importorskip('av')
STEP = 4                                                    # of brightness, from frame to frame


def film(path, count=40, rate=30, codec='libx264', times=None, height=16, width=24, key_every=8, bframes=2, noise=0):
    """`times` are in frames, where they do not follow each other evenly."""
    options = {'g': str(key_every)} | ({'bf': str(bframes), 'sc_threshold': '0'} if codec == 'libx264' else {})
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, Fraction(rate).limit_denominator(1001), options)
        stream.height, stream.width, stream.pix_fmt = height, width, 'yuv420p'
        stream.codec_context.bit_rate = 10**6
        draw = np.random.default_rng(0)
        for number in range(count):
            grain = draw.integers(-noise, noise + 1, (height, width, 1)).repeat(3, 2)
            frame = av.VideoFrame.from_ndarray((40 + STEP * number + grain).astype(np.uint8), 'rgb24')
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(video):
    return ((video.mean(dim=(0, 2, 3)) * 255 - 40) / STEP).round().int().tolist()


def lossless(path, frames=20, height=7, width=10, channels=3, seed=0, **options):
    video = torch.randint(0, 256, (channels, frames, height, width), generator=torch.Generator().manual_seed(seed)) / 255
    video_tensor_to_mp4(video, path, lossless=True, **options)
    return video


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


# ------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize('channels', [1, 3])
def test_lossless_is_exact(tmp_path, channels):
    video = lossless(tmp_path / 'a.mp4', channels=channels)
    assert torch.equal(video_to_tensor(tmp_path / 'a.mp4', channels), video)
    assert torch.equal(video_to_tensor(tmp_path / 'a.mp4', channels, start=5, num_frames=3), video[:, 5:8])
    assert torch.equal(video_to_tensor(tmp_path / 'a.mp4', channels, start=18, num_frames=9), video[:, 18:])
    assert torch.equal(video_to_tensor(tmp_path / 'a.mp4', 4)[3], torch.ones(20, 7, 10))


def test_h264_is_close_and_plays_in_a_browser(tmp_path):
    y, x, t = torch.meshgrid(torch.arange(48.), torch.arange(64.), torch.arange(12.), indexing='ij')
    waves = [torch.sin((x + 2 * t) / 9), torch.cos(y / 7 + t / 5), torch.sin((x + y) / 20)]
    video = torch.stack(waves).permute(0, 3, 1, 2) * 0.4 + 0.5
    video_tensor_to_mp4(video, tmp_path / 'new' / 'er' / 'a.mp4')
    back = video_to_tensor(tmp_path / 'new' / 'er' / 'a.mp4')
    assert -10 * math.log10((back - video).square().mean()) > 35
    assert (back - video).mean(dim=(1, 2, 3)).abs().max() < 0.004           # no colour is darker or lighter than it was
    with av.open(str(tmp_path / 'new' / 'er' / 'a.mp4')) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ('h264', 'yuv420p', 8)
    video_tensor_to_mp4(video, tmp_path / 'coarse.mp4', crf=40)
    assert (tmp_path / 'coarse.mp4').stat().st_size < (tmp_path / 'new' / 'er' / 'a.mp4').stat().st_size * 0.7


def test_odd_sides_get_another_row_and_a_warning(tmp_path):
    video = (torch.arange(13) / 20 + torch.arange(9)[:, None] / 30).expand(3, 2, 9, 13)
    with pytest.warns(UserWarning, match='9 x 13'):
        video_tensor_to_mp4(video, tmp_path / 'a.mp4', crf=0)
    back = video_to_tensor(tmp_path / 'a.mp4')
    assert back.shape == (3, 2, 10, 14) and (back[..., :9, :13] - video).abs().max() < 0.03
    assert (back[..., :9, 13] - video[..., 12]).abs().max() < 0.03


def test_a_batch_is_its_grid_and_the_rate_is_kept(tmp_path):
    videos = torch.randint(0, 256, (3, 3, 4, 5, 6)) / 255
    video_tensor_to_mp4(videos, tmp_path / 'a.mp4', fps=29.97, lossless=True)
    assert torch.equal(video_to_tensor(tmp_path / 'a.mp4'), tile(videos))
    assert clip_shape(tmp_path / 'a.mp4') == (4, pytest.approx(29.97), 18, 20)


@pytest.mark.parametrize('arguments, says', [({'fps': 0}, 'fps=0'), ({'fps': math.nan}, 'fps=nan'), ({'crf': 52}, 'crf=52')])
def test_bad_settings(tmp_path, arguments, says):
    with pytest.raises(ValueError, match=says):
        video_tensor_to_mp4(torch.zeros(3, 2, 4, 4), tmp_path / 'a.mp4', **arguments)
    with pytest.raises(ValueError, match='NaN'):
        video_tensor_to_mp4(torch.tensor([0., math.nan]).view(1, 2, 1, 1), tmp_path / 'a.mp4')
    assert not (tmp_path / 'a.mp4').exists()


# ------------------------------------------------------------------------------------- time


@pytest.mark.parametrize('rate', [12, 24, 25, 29.97, 30, 60])
@pytest.mark.parametrize('fps', [5, 8, 10, 24, 40])
def test_frames_are_the_nearest_in_time(tmp_path, rate, fps):
    film(tmp_path / 'a.mp4', rate=rate)
    got = numbers(video_to_tensor(tmp_path / 'a.mp4', fps=fps))
    assert len(got) == math.ceil(40 / rate * fps - 1e-6)
    for place, number in enumerate(got):
        assert abs(number / rate - place / fps) <= 0.5 / rate + 1e-6 or number == 39
    assert numbers(video_to_tensor(tmp_path / 'a.mp4', fps=fps, start=2, num_frames=3)) == got[2:5]


def test_times_decide_where_the_rate_varies(tmp_path):
    times = [0, 1, 2, 10, 11, 12, 20, 30]
    film(tmp_path / 'a.mp4', count=8, rate=10, times=times)
    assert numbers(video_to_tensor(tmp_path / 'a.mp4')) == list(range(8))
    expected = [min(range(8), key=lambda n: (abs(times[n] / 10 - i / 2), -n)) for i in range(7)]
    assert numbers(video_to_tensor(tmp_path / 'a.mp4', fps=2)) == expected


def test_gifs_have_times_too(tmp_path):
    video = (torch.arange(12) * 20 / 255).view(1, 12, 1, 1).expand(3, 12, 4, 4)
    video_tensor_to_gif(video, tmp_path / 'a.gif', duration=50)             # 20 per second
    assert (gif_to_tensor(tmp_path / 'a.gif', fps=8)[0, :, 0, 0] * 255 / 20).round().tolist() == [0, 3, 5, 8, 10]
    assert (gif_to_tensor(tmp_path / 'a.gif', fps=40)[0, :, 0, 0] * 255 / 20).round().tolist()[:5] == [0, 1, 1, 2, 2]
    assert clip_shape(tmp_path / 'a.gif') == (12, 20, 4, 4)
    video_tensor_to_gif(video, tmp_path / 'a.gif', duration=0)              # as fast as can be: browsers show ten per second
    assert clip_shape(tmp_path / 'a.gif')[1] == pytest.approx(10)


@pytest.mark.parametrize('name, codec', [('a.mp4', 'libx264'), ('a.mkv', 'libx264'), ('a.mov', 'libx264'), ('a.webm', 'libvpx-vp9'), ('a.avi', 'mpeg4')])
def test_the_middle_of_a_film_is_read_alone(tmp_path, monkeypatch, name, codec):
    film(tmp_path / name, count=50, rate=24, codec=codec)
    assert clip_shape(tmp_path / name)[::2] == (50, 16) and clip_shape(tmp_path / name)[1] == pytest.approx(24, rel=1e-3)
    assert numbers(video_to_tensor(tmp_path / name)) == list(range(50))
    decoded, decode = [], mp4.decode
    monkeypatch.setattr(mp4, 'decode', lambda packet: decoded.append(packet) or decode(packet))
    for start in range(0, 50, 7):
        decoded.clear()
        assert numbers(video_to_tensor(tmp_path / name, start=start, num_frames=3)) == list(range(start, min(50, start + 3)))
        assert len(decoded) < 40 or name == 'a.webm'
    with pytest.raises(ValueError, match=f'{name}.*no frame number 50'):
        video_to_tensor(tmp_path / name, start=50)


@pytest.mark.parametrize('angle', [0, 90, 180, -90])
def test_rotation_is_honoured(tmp_path, angle):
    path = tmp_path / 'a.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', 8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, 'yuv420p'
        stream.set_display_rotation(angle)
        picture = np.zeros((32, 48, 3), np.uint8)
        picture[:16, :24] = 255                                             # white at the upper left
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, 'rgb24')))
        container.mux(stream.encode())
    data = path.read_bytes()                                                # what the head of the file says: x' = a x + c y
    a, b, _, c, d = (value / 2**16 for value in struct.unpack('>5i', data[data.index(b'tkhd') + 44:][:20]))
    video = video_to_tensor(path)
    height, width = video.shape[2:]
    assert (height, width) == ((48, 32) if a == 0 else (32, 48)) and clip_shape(path)[2:] == (height, width)
    x, y = (-12 * a - 8 * c, -12 * b - 8 * d)                               # where the white quarter goes, from the middle
    assert video[:, 0, round(height / 2 + y), round(width / 2 + x)].min() > 0.9
    assert video[:, 0, round(height / 2 - y), round(width / 2 - x)].max() < 0.1
    assert read_clip(path, size=(8, 8)).shape == (3, 1, 8, 8)


def test_scaled_on_the_way(tmp_path):
    y, x = torch.meshgrid(torch.arange(60.), torch.arange(96.), indexing='ij')
    video = torch.stack([torch.sin(x / 8), torch.cos(y / 6), torch.sin((x + y) / 9)])[:, None].expand(3, 3, -1, -1) * 0.4 + 0.5
    video_tensor_to_mp4(video, tmp_path / 'a.mp4', lossless=True)
    for size in ((20, 24), (60, 96), (8, 40), (90, 120)):
        expected = resize_and_crop((video * 255).round().byte(), size)
        assert (read_clip(tmp_path / 'a.mp4', size=size).float() - expected.float()).abs().mean() < 2


# ------------------------------------------------------------------------------------- what is no film


def test_damaged_frames_are_left_out_with_one_warning(tmp_path):
    film(tmp_path / 'a.mp4', count=40, key_every=8, bframes=0, noise=20, height=64, width=96)
    whole = video_to_tensor(tmp_path / 'a.mp4')
    with av.open(str(tmp_path / 'a.mp4')) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = bytearray((tmp_path / 'a.mp4').read_bytes())
    data[places[18] + 9:places[19]] = random.Random(0).randbytes(places[19] - places[18] - 9)
    (tmp_path / 'a.mp4').write_bytes(data)
    with pytest.warns(UserWarning, match='a.mp4 is damaged: 6 frames were left out') as caught:
        video = video_to_tensor(tmp_path / 'a.mp4')
    assert len(caught) == 1 and numbers(video) == [*range(18), *range(24, 40)]
    assert torch.equal(video, torch.cat([whole[:, :18], whole[:, 24:]], dim=1))
    assert numbers(video_to_tensor(tmp_path / 'a.mp4', start=2, num_frames=9)) == list(range(2, 11))    # damage elsewhere


@pytest.mark.parametrize('content', [
    b'', b'hello, this is text', b'\0\0\0\x18ftypmp42' + b'x' * 99, b'GIF89a',
    b'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n', b'ffconcat version 1.0\nfile good.mp4\n'])
def test_what_is_no_film_is_named(tmp_path, content):
    film(tmp_path / 'good.mp4', count=2)
    (tmp_path / 'bad.mp4').write_bytes(content)
    for read in (video_to_tensor, clip_shape):
        with pytest.raises(ValueError, match='bad.mp4 cannot be read'):
            read(tmp_path / 'bad.mp4')


def test_sound_alone_and_giants_and_odd_requests(tmp_path, monkeypatch):
    with av.open(str(tmp_path / 'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', 44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
        frame.sample_rate = 44100
        container.mux(stream.encode(frame)), container.mux(stream.encode())
    with pytest.raises(ValueError, match='sound.mp4.*no film in it'):
        video_to_tensor(tmp_path / 'sound.mp4')
    film(tmp_path / 'a.mp4', count=2)
    with monkeypatch.context() as patch:
        patch.setattr('video_diffusion.data.frames.MAX_PIXELS', 16 * 24 - 1)
        with pytest.raises(ValueError, match='a.mp4.*24 x 16 pixels'):
            video_to_tensor(tmp_path / 'a.mp4')
    for arguments in ({'channels': 2}, {'fps': 0}, {'fps': math.inf}, {'start': -1}, {'num_frames': 0}):
        with pytest.raises(ValueError, match=re.escape(f'{list(arguments)[0]}=')):
            video_to_tensor(tmp_path / 'a.mp4', **arguments)
    with pytest.raises(FileNotFoundError, match='nowhere.mp4'):
        video_to_tensor(tmp_path / 'nowhere.mp4')


def test_more_than_the_memory_takes_is_refused(tmp_path, monkeypatch):
    film(tmp_path / 'a.mp4', count=10)
    monkeypatch.setattr('video_diffusion.data.frames.MAX_BYTES', 5 * 16 * 24 * 3)
    assert video_to_tensor(tmp_path / 'a.mp4', num_frames=5).shape[1] == 5
    with pytest.raises(ValueError, match='a.mp4 has more than.*num_frames'):
        video_to_tensor(tmp_path / 'a.mp4', num_frames=6)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
@pytest.mark.parametrize('ending', ['mp4', 'gif'])
def test_only_regular_files_are_opened(tmp_path, ending):
    os.mkfifo(tmp_path / f'pipe.{ending}')
    (tmp_path / f'folder.{ending}').mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / f'socket.{ending}'))
    for name in ('pipe', 'folder', 'socket'):
        with pytest.raises(ValueError, match=f'{name}.{ending}.*not a regular file'):
            read_clip(tmp_path / f'{name}.{ending}')


def test_without_pyav_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    film(tmp_path / 'a.mp4', count=2)
    monkeypatch.setitem(sys.modules, 'av', None)
    for call in (lambda: video_to_tensor(tmp_path / 'a.mp4'), lambda: GifDataset(tmp_path, 8),
                 lambda: video_tensor_to_mp4(torch.zeros(3, 2, 4, 4), tmp_path / 'b.mp4')):
        with pytest.raises(ImportError, match=r"pip install -e '\.\[video\]'"):
            call()


def test_a_hundred_damaged_films(tmp_path, slow):
    """Good ones are used, bad ones are named, and nothing else happens: bytes turned, cut out, put in, cut off."""
    rng = random.Random(0)
    whole = film(tmp_path / 'whole.mp4', count=24, key_every=4, noise=40).read_bytes()
    count = 2000 if slow else 100
    for number in range(count):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 10])):
            place, size = rng.randrange(len(data)), rng.randrange(1, 40)
            change = rng.choice(['turn'] * 4 + ['zero', 'zero', 'cut', 'put', 'end'])
            if change == 'end':
                del data[max(place, 8):]
            elif change == 'cut':
                del data[place:place + size]
            else:
                piece = bytes(size) if change == 'zero' else rng.randbytes(size)
                data[place:place + (0 if change == 'put' else size)] = piece
            if len(data) < 50:
                break
        (tmp_path / f'{number:02}.mp4').write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        data = GifDataset(tmp_path, 8, num_frames=4, random_window=True)
        for index in range(len(data)):
            assert data[index].shape == (3, 4, 8, 8)
    said = ' '.join(str(warning.message) for warning in caught)
    used = [path.name for i, path in enumerate(data.paths) if i not in data.bad]
    for number in range(count):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                clip_shape(tmp_path / f'{number:02}.mp4'), video_to_tensor(tmp_path / f'{number:02}.mp4', num_frames=1)
        except ValueError as error:
            assert f'{number:02}.mp4' in str(error)
            assert f'{number:02}.mp4' in said or 'more' in said
    assert 'whole.mp4' in used and 0.2 * count < len(used) < 0.9 * count


PEAK = '''
import os, sys, torch
sys.path.insert(0, sys.argv[2])
from bench_vae import peak, reset_peak
from video_diffusion import show, video_tensor_to_gif, video_tensor_to_mp4
for write in (lambda video: video_tensor_to_mp4(video, sys.argv[1], scale=2), lambda video: video_tensor_to_gif(video, sys.argv[1], scale=2), show):
    for frames in (50, 1000):
        if os.fork() == 0:                                                  # as fresh as after the imports
            write(torch.rand(3, 2, 64, 64))
            video = torch.rand(3, 1, 64, 64).repeat(1, frames, 1, 1)
            before = reset_peak(video.device)
            kept = write(video)
            print(peak(video.device) - before, flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
'''


@pytest.mark.slow
def test_writing_a_long_film_takes_no_more_memory_than_a_short_one(tmp_path):
    done = subprocess.run([sys.executable, '-c', PEAK, tmp_path / 'a', Path(__file__).parent], capture_output=True, check=True, timeout=120)
    growth = [int(line) for line in done.stdout.split()]
    for how, short, long in zip(('mp4', 'gif', 'show'), growth[::2], growth[1::2], strict=True):
        assert long < short + 12e6, how                                     # its frames as floats are 188 MB, as bytes 47


def test_a_gif_is_not_written_as_a_film(tmp_path):
    with pytest.raises(ValueError, match='x.gif: this writes an mp4; video_tensor_to_gif writes GIFs'):
        video_tensor_to_mp4(torch.rand(3, 2, 4, 4), tmp_path / 'x.gif')
    assert not list(tmp_path.iterdir())

"""Folders as people have them: captions in three places, odd files, hostile files, very many files.

    pytest tests/test_folder.py
"""

import io
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import video_diffusion.data.folder as folder_module
import video_diffusion.data.gif as gif_module
from video_diffusion import ClipFolder, GifDataset, video_tensor_to_gif
from video_diffusion.data.folder import CLIPS, IMAGES, clip_shape, read_clip, write_clip
from video_diffusion.data.frames import resize_and_crop


def save(path, frames=4, height=8, width=8, duration=120):
    video_tensor_to_gif(torch.rand(3, frames, height, width).mul(3).round() / 3, path, duration=duration)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ('a', 'b', 'deep/c'):
        save(tmp_path / 'clips' / f'{name}.gif')
    return tmp_path / 'clips'


# ------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize('columns', ['file_name,text', 'file,caption', 'more,file_name,text'])
def test_captions_in_a_table(folder, columns):
    before = 'x,' if columns.startswith('more') else ''
    (folder / 'metadata.csv').write_text(f'\ufeff{columns}\n{before}a.gif,"one,\ntwo"\n{before}./b.gif,grün\n{before}lost.gif,\n')
    (folder / 'deep' / 'metadata.csv').write_text('file_name,text\nc.gif,three\n')
    assert GifDataset(folder, 8).captions == ['one, two', 'grün', 'three']
    (folder / 'a.txt').write_text('beside it')
    assert ClipFolder(folder).captions == ['beside it', 'grün', 'three']
    assert ClipFolder(folder / 'deep' / '..').captions == ['beside it', 'grün', 'three']     # by another name
    assert ClipFolder(folder, captions=False).captions is None
    (folder / 'deep' / 'metadata.csv').unlink()
    with pytest.raises(ValueError, match=r'1 of 3 clips have no caption, .*c\.gif.*metadata\.csv'):
        ClipFolder(folder)


def test_a_table_of_other_clips_is_no_silence(folder):
    (folder / 'metadata.csv').write_text('file_name,text\na.gif,\ntrain/a.gif,one\n')
    with pytest.raises(ValueError, match=r'metadata\.csv has captions, but of no clip that is read: .*train/a\.gif, for one'):
        ClipFolder(folder)
    (folder / 'metadata.csv').write_text('file_name,text\na.gif,\n')               # nothing is said of any
    assert ClipFolder(folder).captions is None


def test_a_window_has_the_caption_that_is_true_where_it_begins(tmp_path):
    """The frames of the file tell their number by their grey; at another rate the captions stay where they are."""
    video = (torch.arange(24).float() * 10 / 255).view(1, 24, 1, 1).expand(3, -1, 8, 8)
    video_tensor_to_gif(video, tmp_path / 'a.gif', duration=100)
    (tmp_path / 'a.txt').write_text('0: goes\n\n  9:  comes back \n20: 3: stops\n')
    assert ClipFolder(tmp_path).captions == ['goes']
    for fps, factor in ((None, 1), (5, 2)):
        data = GifDataset(tmp_path, 8, num_frames=4, random_window=True, fps=fps)
        seen = {}
        for _ in range(150):
            window, caption = data[0]
            seen[round(window[0, 0, 0, 0].item() * 255 / 10)] = caption
        assert set(seen) == set(range(0, 24 - 4 * factor + 1, factor))
        assert seen == {begin: 'goes' if begin < 9 else 'comes back' if begin < 20 else '3: stops' for begin in seen}
    parts = GifDataset(tmp_path, 8, num_frames=4, clips_per_video=3)
    assert [parts[i][1] for i in range(3)] == [parts.caption(i, parts.stretch(i)[0]) for i in range(3)] == [
        'goes', 'goes', 'comes back']
    assert GifDataset(tmp_path, 8, num_frames=4)[0][1] == 'goes'


@pytest.mark.parametrize('text, caption', [
    ('0: one line alone', '0: one line alone'), ('a red\nball', 'a red ball'), ('0: a\nand b', '0: a and b'), ('12:30\nat noon', '12:30 at noon')])
def test_a_caption_with_a_number_in_it_is_still_a_caption(folder, text, caption):
    for name in ('a', 'b', 'deep/c'):
        (folder / f'{name}.txt').write_text(text)
    assert ClipFolder(folder).captions == [caption] * 3 and not ClipFolder(folder).captions[0].later


@pytest.mark.parametrize('text', ['1: a\n5: b', '0: a\n5: b\n5: c', '0: a\n7: b\n5: c'])
def test_captions_out_of_order_get_a_sentence(folder, text):
    (folder / 'a.txt').write_text(text)
    with pytest.raises(ValueError, match=r'a\.txt has a caption for each of the frames \[.*let the first be 0'):
        ClipFolder(folder)


@pytest.mark.parametrize('table, says', [
    (b'name,text\na.gif,b\n', 'first line'), (b'', 'first line'), (b'file_name,text\na.gif,\xff\n', 'decode'),
    (b'file_name,text\na.gif,' + b'x' * 10**6, 'field larger'), (b'file_name,text\na.gif\n', 'no caption')])
def test_a_bad_table_is_named(folder, table, says):
    (folder / 'b.txt').write_text('a caption')
    (folder / 'metadata.csv').write_bytes(table)
    with pytest.raises(ValueError, match=f'(metadata.csv cannot be read: .*)?{says}'):
        ClipFolder(folder)


def test_a_caption_has_an_end(folder):
    for name in ('a', 'b', 'deep/c'):
        (folder / f'{name}.txt').write_text('word ' * 10000)
    assert len(ClipFolder(folder).captions[0]) == 49999
    (folder / 'a.txt').write_text('word ' * 2 * 10**6)
    tracemalloc.start()
    with pytest.raises(ValueError, match='a.txt is too long for a caption: up to 65536 bytes'):
        ClipFolder(folder)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


# ------------------------------------------------------------------------------------- odd and hostile files


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_odd_files_do_not_stop_a_folder(folder):
    os.mkfifo(folder / 'pipe.gif')
    os.symlink('nowhere', folder / 'dangling.gif'), os.symlink('loop.gif', folder / 'loop.gif')
    os.symlink(folder / 'a.gif', folder / 'link.gif')                       # as good as what it points to
    save(folder / 'folder.gif' / 'd.gif')
    os.mkfifo(folder / 'a.txt')
    with pytest.warns(UserWarning) as caught:
        clips = ClipFolder(folder)
    assert [path.name for path in clips.paths] == ['a.gif', 'b.gif', 'c.gif', 'd.gif', 'link.gif']
    message = str(caught[0].message)
    assert len(caught) == 1 and 'skipped 3 of 8' in message and all(name in message for name in ('pipe', 'dangling', 'loop'))
    with pytest.raises((ValueError, OSError), match='dangling'):
        ClipFolder(folder, strict=True)


def png(width, height, data):
    """A file of one colour that may claim any size."""
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', data) + chunk(b'IEND', b'')


@pytest.mark.parametrize('content, says', [
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch /tmp/x) (w) file\n', 'not a picture'),
    (png(30000, 30000, zlib.compress(bytes(30001 * 3000))), 'pixels'), (png(8, 8, b'no zlib'), 'cannot be read'),
    (png(8, 8, zlib.compress(bytes(20))), 'cannot be read')])
def test_pictures_that_are_none(tmp_path, monkeypatch, content, says):
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: pytest.fail('another program was started'))
    (tmp_path / 'a.gif').write_bytes(content)
    with pytest.raises(ValueError, match=f'a.gif.*{says}'):
        read_clip(tmp_path / 'a.gif', size=(8, 8))


def gif_of_dots(path, width, height, frames):
    """A large canvas and small stickers: a few bytes for each picture."""
    sticker = b',' + struct.pack('<HHHHB', 0, 0, 1, 1, 0) + b'\x02\x02D\x01\0'
    path.write_bytes(b'GIF89a' + struct.pack('<HHBBB', width, height, 0x80, 0, 0) + bytes(6) + sticker * frames + b';')
    return path


@pytest.mark.slow
def test_small_files_stay_small_in_memory(tmp_path, monkeypatch):
    decoded, frombytes = [], Image.frombytes
    monkeypatch.setattr(gif_module.Image, 'frombytes', lambda *a: decoded.append(1) or frombytes(*a))
    gif_of_dots(tmp_path / 'large.gif', 9400, 9400, 40), gif_of_dots(tmp_path / 'long.gif', 500, 500, 3000)
    gif_of_dots(tmp_path / 'needle.gif', 30000, 1, 40)
    tracemalloc.start()
    with pytest.raises(ValueError, match='large.gif.*9400 x 9400 pixels'):
        read_clip(tmp_path / 'large.gif', num_frames=8, size=(16, 16))
    assert clip_shape(tmp_path / 'long.gif')[0] == 3000 and not decoded
    assert read_clip(tmp_path / 'long.gif', num_frames=8, size=(16, 16)).shape == (3, 8, 16, 16) and len(decoded) == 8
    assert read_clip(tmp_path / 'long.gif', start=2900, size=(16, 16)).shape == (3, 100, 16, 16)
    assert read_clip(tmp_path / 'needle.gif', size=(256, 256)).shape == (3, 40, 256, 256)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    monkeypatch.setattr('video_diffusion.data.frames.MAX_BYTES', 10 * 500 * 500 * 3)
    with pytest.raises(ValueError, match='long.gif has more than .*num_frames'):
        read_clip(tmp_path / 'long.gif')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['gif', 'png'])
def test_a_hostile_file_takes_no_gigabyte(tmp_path, kind):
    """The largest picture that is taken, of a GIF with stickers that cover it and come back: in its own process, to measure it."""
    if kind == 'gif':
        compressed = Image.new('L', (4096, 2048)).tobytes('gif', 'L', 8, 0)
        head = b'GIF89a' + struct.pack('<HHBBB', 4096, 2048, 0x80, 0, 0) + bytes(6)
        sticker = b'!\xf9\x04\x0c\0\0\0\0,' + struct.pack('<HHHHB', 0, 0, 4096, 2048, 0) + b'\x08' + compressed + b'\0'
        (tmp_path / 'a.gif').write_bytes(head + sticker * 2 + b';')
    else:
        Image.new('RGBA', (8192, 4096)).save(tmp_path / 'a.png', compress_level=1)
    code = f"""
from resource import RUSAGE_SELF, getrusage
from video_diffusion.data.folder import read_clip
before = getrusage(RUSAGE_SELF).ru_maxrss
read_clip({str(tmp_path / f"a.{kind}")!r}, size=(16, 16))
print(getrusage(RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3.5e5                                           # kilobytes, beyond those of PyTorch


def test_every_damage_of_a_picture_is_the_one_error(tmp_path, slow):
    rng, image = random.Random(0), Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8))
    files = {'gif': save(tmp_path / 'whole.gif').read_bytes()}
    for kind in ('png', 'jpeg', 'webp', 'bmp'):
        with io.BytesIO() as out:
            image.save(out, kind)
            files[kind] = out.getvalue()
    errors = 0
    for _ in range(12000 if slow else 400):
        kind = rng.choice(list(files))
        data = bytearray(files[kind])
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / f'a.{kind}').write_bytes(data[:rng.choice([len(data), rng.randrange(len(data))])])
        for read in (lambda path: read_clip(path, size=(8, 8)), clip_shape):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    read(tmp_path / f'a.{kind}')
            except ValueError as error:
                assert str(error).startswith(f'{tmp_path}/a.{kind}'), error
                errors += 1
    assert errors > 100


def test_a_photo_of_a_phone(tmp_path):
    """Large, and with a small copy of itself behind it, which is no second frame."""
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8).repeat(60, 0).repeat(60, 1))
    large.save(tmp_path / 'a.jpg', 'MPO', save_all=True, append_images=[large.resize((40, 30))])
    assert clip_shape(tmp_path / 'a.jpg')[0] == 1
    small, whole = read_clip(tmp_path / 'a.jpg', size=(30, 40)), read_clip(tmp_path / 'a.jpg')
    assert small.shape == (3, 1, 30, 40) and whole.shape == (3, 1, 1800, 2400)
    assert (small.float() - resize_and_crop(whole, (30, 40)).float()).abs().mean() < 6


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photo_stands_upright_however_the_phone_was_held(tmp_path, orientation):
    """Eight ways to write the same picture; reading it small, too, in the right proportions."""
    upright = Image.new('RGB', (200, 80), 'black')
    upright.paste('red', (0, 0, 100, 40)), upright.paste('blue', (100, 40, 200, 80))
    Turn = Image.Transpose
    written = {1: None, 2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_90,
               7: Turn.TRANSVERSE, 8: Turn.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if written is None else upright.transpose(written)).save(tmp_path / 'a.jpg', quality=95, exif=exif)
    assert clip_shape(tmp_path / 'a.jpg') == (1, 10, 80, 200)
    for clip in (read_clip(tmp_path / 'a.jpg'), read_clip(tmp_path / 'a.jpg', size=(8, 20))):
        corners = clip[:, 0].float()[:, [1, 1, -2, -2], [1, -2, 1, -2]] / 255
        assert (corners.round() == torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])).all(), corners


def test_the_size_of_a_picture_is_known_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new('L', (8000, 8000)).save(tmp_path / 'a.png')
    monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.load', lambda self: pytest.fail('it was decoded'))
    assert clip_shape(tmp_path / 'a.png') == (1, 10, 8000, 8000)
    with pytest.raises(ValueError, match='up to 33554432 are read'):
        read_clip(tmp_path / 'a.png')


def test_pictures_of_many_bits_and_half_transparent_ones(tmp_path):
    Image.fromarray(np.array([[0, 0x8000, 0xffff]], np.uint16)).save(tmp_path / 'a.png')
    assert read_clip(tmp_path / 'a.png', 1).flatten().tolist() == [0, 128, 255]
    Image.new('RGBA', (2, 2), (200, 200, 200, 128)).save(tmp_path / 'b.png')
    assert read_clip(tmp_path / 'b.png', 4)[:, 0, 0, 0].tolist() == [100, 100, 100, 128]


@pytest.mark.parametrize('name', ['a.png', 'a.gif'])
def test_a_single_picture_is_no_film_at_any_rate(tmp_path, name):
    Image.new('RGB', (4, 4), 'red').save(tmp_path / name)
    for fps in (1, 24, 60):
        assert read_clip(tmp_path / name, fps=fps).shape == (3, 1, 4, 4)
        assert ClipFolder(tmp_path, CLIPS + IMAGES).shape(fps)[0] == 1


def test_a_gif_of_a_fast_clip_plays_as_fast_as_a_gif_can(tmp_path):
    for fps, plays in ((10, 10), (60, 50), (120, 50), (1000, 50)):
        write_clip(torch.rand(3, 4, 8, 8), tmp_path / 'a.gif', fps)
        assert clip_shape(tmp_path / 'a.gif')[1] == pytest.approx(plays)


# ------------------------------------------------------------------------------------- large folders


def test_a_folder_is_walked_once_and_a_caption_read_once(folder, monkeypatch):
    for path in list(folder.rglob('*.gif')):
        path.with_suffix('.txt').write_text(path.stem)
    walks, reads, walk, read = [], [], os.walk, folder_module.read_caption
    monkeypatch.setattr(folder_module.os, 'walk', lambda top: walks.append(top) or walk(top))
    monkeypatch.setattr(folder_module, 'read_caption', lambda path: reads.append(path) or read(path))
    clips = ClipFolder(folder)
    clips.shape(), clips.fps
    data = GifDataset(clips, 8, num_frames=2)
    assert data.captions == ['a', 'b', 'c'] and len(data) == 3 and data.fits_in_cache
    assert len(walks) == 1 and len(reads) == 3 and str(clips) == str(folder)


def test_no_picture_is_decoded_at_the_start(folder, monkeypatch):
    for kind in ('png', 'jpg'):
        Image.new('RGB', (20, 12), 'red').save(folder / f'photo.{kind}')
    for name in ('read_frames', 'clip_shape'):
        monkeypatch.setattr(folder_module, name, lambda *a, **k: pytest.fail('a file was decoded'))
    clips = ClipFolder(folder, CLIPS + IMAGES)
    assert len(clips.paths) == 5
    monkeypatch.undo()
    assert clips.shape() == (4, 8, 8)                                       # of clips, for there are some
    assert GifDataset(clips, 8, num_frames=2)[4][:, 1].mean(dim=(1, 2)).tolist() == pytest.approx([1, 0, 0], abs=0.01)


def test_the_rate_of_a_folder(folder):
    assert ClipFolder(folder).fps == pytest.approx(1 / 0.12)
    save(folder / 'd.gif', frames=40, duration=50), save(folder / 'e.gif', frames=40, duration=50), save(folder / 'f.gif', 40, duration=50)
    save(folder / 'g.gif', frames=40, duration=50)
    clips = ClipFolder(folder)
    assert clips.fps == pytest.approx(20) and clips.shape() == (40, 8, 8) and clips.shape(fps=5) == (10, 8, 8)
    assert GifDataset(clips, 8).fps == pytest.approx(20) and GifDataset(clips, 8, fps=5).fps == 5


@pytest.mark.slow
def test_a_hundred_thousand_clips(tmp_path, slow):
    """Twenty seconds, of one core and not of a clock that others move too, and 200 MB; in its own process, to measure it. Without
    --slow a twentieth of that."""
    count = 100_000 if slow else 5_000
    one = save(tmp_path / 'one.gif').read_bytes()
    for i in range(count):
        if i % 1000 == 0:
            (tmp_path / 'clips' / f'{i // 1000:03}').mkdir(parents=True)
        name = tmp_path / 'clips' / f'{i // 1000:03}' / f'{i:06}'
        name.with_suffix('.gif').write_bytes(one), name.with_suffix('.txt').write_text(f'clip number {i}')
    code = f'''
import resource, time
import video_diffusion
from video_diffusion.data.dataset import batches
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = memory(), time.process_time()
clips = video_diffusion.ClipFolder({str(tmp_path / "clips")!r})
clips.shape()
data = video_diffusion.GifDataset(clips, 8, num_frames=4, cache_bytes=2**20)
there = time.process_time()
next(batches(data, 16))
print(there - start, time.process_time() - there, memory() - before)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    seconds, first_batch, megabytes = map(float, done.stdout.split())
    print(f'{seconds:.1f} s, first batch after {first_batch:.1f} s more, {megabytes:.0f} MB')
    assert seconds < 2 + 18 * count / 100_000 and first_batch < 5 and megabytes < 60 + 140 * count / 100_000

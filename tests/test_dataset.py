"""A folder of clips as training batches: sizes, captions, damage, order, cache.

    pytest tests/test_dataset.py
"""

import itertools
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

import video_diffusion.data.dataset as dataset_module
from video_diffusion.data.dataset import ClipStream, GifDataset, batches, has_cut, stand_still
from video_diffusion.data.folder import ClipFolder, read_clip
from video_diffusion.data.frames import resize_and_crop
from video_diffusion.data.gif import gif_to_tensor, video_tensor_to_gif
from video_diffusion.data.mp4 import video_tensor_to_mp4


def save(path, frames=4, height=8, width=8, seed=0):
    """A clip of few colours, whose first pixel counts its frames."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 4, (3, frames, height, width), generator=generator) / 5
    video[:, :, 0, 0] = torch.arange(frames) * 5 / 255
    video_tensor_to_gif(video, path)
    return gif_to_tensor(path)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(['b', 'a', 'deep/er/c', 'd', 'e']):
        save(tmp_path / 'clips' / f'{name}.gif', frames=4, seed=i)
    return tmp_path / 'clips'


def frame_numbers(clip):
    return (clip[0, :, 0, 0] / 5).round().int().tolist()


# ------------------------------------------------------------------------------------- clips


def test_finds_all_sorted_and_reads_floats(folder):
    (folder / 'notes.md').write_text('no clip')
    (folder / 'b.gif').rename(folder / 'b.GIF')
    data = GifDataset(folder, 8, num_frames=4)
    assert [path.name for path in data.paths] == ['a.gif', 'b.GIF', 'd.gif', 'c.gif', 'e.gif']
    assert data.captions is None and len(data) == 5
    assert data[0].dtype == torch.float32 and torch.equal(data[0], gif_to_tensor(folder / 'a.gif'))
    assert torch.equal(data[-1], data[4]) and len(list(data)) == 5          # iteration ends
    with pytest.raises(IndexError):
        data[5]


def test_held_out_clips_leave_the_folder_and_keep_their_captions(folder):
    for path in folder.rglob('*.gif'):
        path.with_suffix('.txt').write_text(f'this is {path.stem}')
    data = GifDataset(folder, 8, num_frames=4)
    data[0], data[2]                                                        # in the cache, by their old numbers
    held = data.hold_out(2)
    assert [path.stem for path in held.paths] == ['a', 'd'] and [path.stem for path in data.paths] == ['b', 'c', 'e']
    for dataset in (held, data):
        for path, (video, caption) in zip(dataset.paths, dataset):
            assert torch.equal(video, gif_to_tensor(path)) and caption == f'this is {path.stem}'
    for count in (0, 3):
        with pytest.raises(ValueError, match=f'cannot hold out {count} of 3 clips'):
            data.hold_out(count)


def test_endings(folder):
    (folder / 'd.gif').rename(folder / 'd.webp')
    assert len(GifDataset(folder, 8, exts=['webp'])) == 1
    assert len(GifDataset(folder, 8, exts=('.WEBP', 'gif'))) == 5
    assert len(GifDataset(folder, 8, exts='gif')) == 4


def test_long_clips_are_cut_short_ones_stand_still(tmp_path):
    save(tmp_path / 'long.gif', 9), save(tmp_path / 'short.gif', 3)
    long, short = GifDataset(tmp_path, 8, num_frames=5)
    assert frame_numbers(long * 255) == [0, 1, 2, 3, 4]
    assert frame_numbers(short * 255) == [0, 1, 2, 2, 2]
    assert torch.equal(short[:, 4], short[:, 2])
    own_length = GifDataset(tmp_path, 8, num_frames=5, force_num_frames=False)
    assert [clip.shape[1] for clip in own_length] == [9, 3]


def test_only_needed_frames_are_decoded(folder, monkeypatch):
    asked = []
    spy = lambda *a, **k: asked.append(k) or read_clip(*a, **k)
    monkeypatch.setattr(dataset_module, 'read_clip', spy)
    GifDataset(folder, 8, num_frames=2)[0]
    assert asked == [{'num_frames': 2, 'start': 0, 'fps': None, 'size': (8, 8)}]


def test_random_window(tmp_path):
    save(tmp_path / 'a.gif', 7), save(tmp_path / 'b.gif', 2)
    data = GifDataset(tmp_path, 8, num_frames=3, random_window=True)
    starts = set()
    for _ in range(100):
        numbers = frame_numbers(data[0] * 255)
        starts.add(numbers[0])
        assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert starts == {0, 1, 2, 3, 4}                                        # the last start included
    assert frame_numbers(data[1] * 255) == [0, 1, 1]
    draws = [[GifDataset(tmp_path, 8, num_frames=3, random_window=True, seed=s)] * 9 for s in (1, 1, 2)]
    draws = [[frame_numbers(d[0] * 255)[0] for d in ds] for ds in draws]
    assert draws[0] == draws[1] != draws[2]


def test_flip_is_drawn_once_for_the_clip_and_leaves_the_cache_alone(folder):
    plain = GifDataset(folder, 8, num_frames=4)
    data = GifDataset(folder, 8, num_frames=4, horizontal_flip=True)
    flipped = 0
    for _ in range(40):
        video = data[0]
        flipped += torch.equal(video, plain[0].flip(-1))
        assert torch.equal(video, plain[0]) or torch.equal(video, plain[0].flip(-1))
    assert 8 < flipped < 32
    assert torch.equal(data.clip(0), plain.clip(0))                         # no generator, no flip
    data.clip(0).zero_()                                                    # writing into a clip is harmless
    assert torch.equal(data.clip(0), plain.clip(0))


def test_own_loader_draws_other_flips_in_each_worker_and_epoch(tmp_path):
    for i in range(16):
        save(tmp_path / f'{i:02}.gif', 1, seed=0)
    data = GifDataset(tmp_path, 8, num_frames=1, horizontal_flip=True)
    data[0]
    plain = GifDataset(tmp_path, 8, num_frames=1)[0]
    loader = DataLoader(data, batch_size=1, num_workers=2, generator=torch.Generator().manual_seed(0))
    epochs = [[torch.equal(video[0], plain) for video in loader] for _ in range(2)]
    assert epochs[0] != epochs[1] and epochs[0][0::2] != epochs[0][1::2]


# ------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize('given, size', [
    ((8, 8), (8, 8)), ((8, 14), (8, 8)), ((20, 9), (8, 8)), ((5, 6), (8, 8)), ((17, 31), (8, 12)),
    ((31, 17), (12, 8)), ((7, 100), (8, 4)),
])
def test_sizes(tmp_path, given, size):
    save(tmp_path / 'a.gif', 2, *given)
    assert GifDataset(tmp_path, size, num_frames=2)[0].shape == (3, 2, *size)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_resize_equals_torchvision(channels):
    functional = pytest.importorskip('torchvision.transforms.v2.functional')
    clip = torch.randint(0, 256, (channels, 5, 40, 30), dtype=torch.uint8)
    expected = functional.center_crop(functional.resize(clip, [32, 24], antialias=True), [20, 24])
    for given in (clip, clip.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)):     # any memory order
        resized = resize_and_crop(given, (20, 24))
        assert resized.is_contiguous() and torch.equal(resized, expected)


def test_crop_is_the_middle():
    clip = torch.arange(9, dtype=torch.uint8).expand(3, 2, 4, 9)
    assert resize_and_crop(clip, (4, 5))[0, 0, 0].tolist() == [2, 3, 4, 5, 6]
    assert resize_and_crop(clip, (4, 9)).equal(clip)


@pytest.mark.parametrize('arguments', [
    {'image_size': 0}, {'image_size': (8, 8, 8)}, {'image_size': 8, 'num_frames': 0},
])
def test_bad_sizes(folder, arguments):
    with pytest.raises(ValueError, match='image_size=.*num_frames='):
        GifDataset(folder, **arguments)
    with pytest.raises(ValueError, match='channels=5'):
        GifDataset(folder, 8, channels=5)


def test_channels(folder):
    assert [GifDataset(folder, 8, channels=c)[0].shape[0] for c in (1, 3, 4)] == [1, 3, 4]


# ------------------------------------------------------------------------------------- captions


def test_captions_beside_the_clips(folder):
    for path in sorted(folder.rglob('*.gif')):
        path.with_suffix('.txt').write_text(f'\ufeff ein grüner\nBall {path.stem} \r\n', encoding='utf-8')
    data = GifDataset(folder, 8, num_frames=4)
    assert data.captions[3] == 'ein grüner Ball c'
    video, caption = data[0]
    assert caption == 'ein grüner Ball a' and torch.equal(video, gif_to_tensor(folder / 'a.gif'))
    clip, caption = ClipStream(data)[7]
    assert clip.dtype == torch.uint8 and caption in data.captions
    clips, captions = next(batches(data, 3))
    assert clips.shape == (3, 3, 4, 8, 8)
    for clip, caption in zip(clips, captions):
        assert torch.equal(clip, data.clip(data.captions.index(caption)))


@pytest.mark.parametrize('root', ['set', 'set/videos'])
def test_captions_in_labels_beside_videos(tmp_path, root):
    """Also when the folder `videos` itself is given, and another folder of that name is further up."""
    base = tmp_path / 'videos' / 'set'
    save(base / 'videos' / 'a.gif', seed=1), save(base / 'videos' / 'deep' / 'b.gif', seed=2)
    (base / 'labels' / 'deep').mkdir(parents=True)
    (base / 'labels' / 'a.txt').write_text('one'), (base / 'labels' / 'deep' / 'b.txt').write_text('two')
    assert GifDataset(tmp_path / 'videos' / root, 8).captions == ['one', 'two']


def test_some_captions_are_an_error_that_counts_and_names(folder):
    for name in 'abe':
        (folder / f'{name}.txt').write_text('words')
    (folder / 'd.txt').write_text(' \n')                                    # empty is missing
    with pytest.raises(ValueError, match=r'2 of 5 clips have no caption, .*d\.gif'):
        GifDataset(folder, 8)


def test_caption_that_is_not_utf8(folder):
    (folder / 'a.txt').write_bytes('grün'.encode('latin-1'))
    with pytest.raises(ValueError, match='a.txt is not UTF-8'):
        GifDataset(folder, 8)


# ------------------------------------------------------------------------------------- recordings


def count_up(path, frames, width=8, cuts=()):
    """A recording whose frames are as bright as their number, and jump at cuts; lossless where it is an mp4."""
    level = torch.arange(frames) + sum((torch.arange(frames) >= cut).int() * 90 for cut in cuts)
    video = (level / 255).view(1, frames, 1, 1).expand(3, frames, 8, width)
    if path.suffix == '.gif':
        video_tensor_to_gif(video, path, duration=100)
    else:
        pytest.importorskip('av')
        video_tensor_to_mp4(video, path, fps=10, lossless=True)


def levels(clip):
    return (clip[0, :, 4, 4] * 255).round().int().tolist() if clip.is_floating_point() else clip[0, :, 4, 4].tolist()


def test_gifs_and_films_side_by_side_at_one_rate(tmp_path):
    count_up(tmp_path / 'a.gif', 20), count_up(tmp_path / 'b.mp4', 30)
    a, b = GifDataset(tmp_path, 8, num_frames=6)
    assert levels(a) == levels(b) == [0, 1, 2, 3, 4, 5]
    a, b = GifDataset(tmp_path, 8, num_frames=6, fps=4)
    assert levels(a) == levels(b) == [0, 3, 5, 8, 10, 13]                   # of 10 per second: nearest in time, later at a tie
    assert GifDataset(tmp_path, 8, num_frames=6).fps == pytest.approx(10)


@pytest.mark.parametrize('name', ['a.gif', 'a.mp4'])
@pytest.mark.parametrize('fps', [None, 5])
def test_of_a_long_recording_only_a_window_is_read(tmp_path, monkeypatch, name, fps):
    count_up(tmp_path / name, 120)
    asked = []
    spy = lambda *a, **k: asked.append((k['start'], k['num_frames'])) or read_clip(*a, **k)
    monkeypatch.setattr(dataset_module, 'read_clip', spy)
    data = GifDataset(tmp_path, 8, num_frames=3, random_window=True, fps=fps)
    step, last = (1, 117) if fps is None else (2, 57)
    starts = set()
    for _ in range(60):
        numbers = levels(data[0])
        starts.add(numbers[0] // step)
        assert numbers == [numbers[0] + i * step for i in range(3)]
    assert all(frames == 3 for _, frames in asked) and {start for start, _ in asked} == starts
    assert not data.cache and not data.fits_in_cache and len(starts) > 20 and min(starts) < last / 4 and max(starts) > last * 3 / 4
    assert torch.equal(data.clip(0), read_clip(tmp_path / name, num_frames=3, fps=fps))


def test_a_recording_as_several_clips(tmp_path):
    count_up(tmp_path / 'a.mp4', 40), count_up(tmp_path / 'b.gif', 4)
    for name in 'ab':
        (tmp_path / f'{name}.txt').write_text(name)
    data = GifDataset(tmp_path, 8, num_frames=3, clips_per_video=4)
    assert len(data) == 8 and data.captions == [*'aaaabbbb']
    assert [levels(clip) for clip, _ in data] == [[n, n + 1, n + 2] for n in (0, 10, 20, 30, 0, 1, 1, 1)]
    data = GifDataset(tmp_path, 8, num_frames=3, clips_per_video=4, random_window=True)
    for _ in range(30):
        for part in range(4):
            first, *_, last = levels(data[part][0])
            assert 10 * part <= first and last < 10 * (part + 1)
    held = data.hold_out(3)                                                  # the parts of b.gif overlap: of no file are some trained on
    assert [(p.name, part) for p, part in zip(held.paths, held.parts)] == [('a.mp4', 0), ('a.mp4', 1), ('a.mp4', 2)]
    assert levels(held.clip(1)) == [10, 11, 12] and [path.name for path in data.paths] == ['b.gif'] * 4
    with pytest.raises(ValueError, match='cannot hold out 5 of 8 clips .* they come from 2 files'):
        GifDataset(tmp_path, 8, num_frames=3, clips_per_video=4).hold_out(5)
    (tmp_path / 'b.gif').unlink()
    data = GifDataset(tmp_path, 8, num_frames=3, clips_per_video=4)          # of a single film, some parts
    held = data.hold_out(2)
    assert (held.parts, data.parts) == ([0, 2], [1, 3])
    count_up(tmp_path / 'b.gif', 4)
    with pytest.raises(ValueError, match='clips_per_video=0'):
        GifDataset(tmp_path, 8, clips_per_video=0)
    with pytest.raises(ValueError, match='clips_per_video=2.*force_num_frames'):
        GifDataset(tmp_path, 8, clips_per_video=2, force_num_frames=False)


def test_windows_with_a_cut_are_drawn_again(tmp_path):
    count_up(tmp_path / 'a.gif', 60, cuts=(20, 41))
    data = GifDataset(tmp_path, 8, num_frames=6, random_window=True)
    with pytest.warns(UserWarning, match='windows had a change of scene') as caught:
        for position in range(100):
            numbers = levels(ClipStream(data)[position])
            assert numbers == list(range(numbers[0], numbers[0] + 6))
    assert 5 < data.cuts < 40 and data.windows == 100
    assert str(caught[-1].message).startswith(f'{2 ** (data.cuts.bit_length() - 1)} of ')
    again = GifDataset(tmp_path, 8, num_frames=6, random_window=True)
    with pytest.warns(UserWarning):
        assert all(torch.equal(ClipStream(again)[p], ClipStream(data)[p]) for p in reversed(range(30)))     # still no state


def test_motion_is_no_cut():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 8, 16, 16), generator=generator, dtype=torch.uint8)       # every frame is another
    texture = torch.stack([noise[:, 0].roll(n, -1) for n in range(8)], dim=1)
    slides = noise[:, :1].repeat(1, 8, 1, 1)
    short = stand_still(noise[:, :2], 8)
    doubled = texture[:, [0, 0, 1, 1, 2, 2, 3, 3]]                          # a film of 15 per second, read at 30
    assert not any(map(has_cut, (noise, texture, slides, short, doubled, noise[:, :1])))
    slides[:, 5:] = noise[:, 1:2]
    slides[:, :, 0, 0] = torch.arange(8) * 9                                # a little motion before and after
    assert has_cut(slides)


# ------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='no process groups here')
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_signals_to_the_whole_group_leave_the_workers_alive(folder, name):
    """As Ctrl-C, torchrun and a closed terminal send them: the main process takes note and goes on as long as it likes."""
    code = f'''
import os, signal, sys
from video_diffusion import GifDataset
from video_diffusion.data.dataset import batches
noted = []
signal.signal(signal.{name}, lambda *_: noted.append(1))
data = batches(GifDataset({str(folder)!r}, 8, num_frames=2), 2, num_workers=2)
next(data)
os.killpg(0, signal.{name})
for _ in range(20):
    next(data)
print("saved" if noted else "no signal")
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, start_new_session=True, timeout=120)
    assert done.stdout == 'saved\n' and done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------- damage


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        GifDataset(tmp_path / 'nowhere', 8)
    with pytest.raises(ValueError, match=r'no clip in .*\.webp, \.gif'):
        GifDataset(tmp_path, 8, exts=('webp', 'gif'))


def test_damage_that_shows_at_the_ends_is_skipped_with_one_warning(folder):
    (folder / 'x.gif').write_bytes(b'')
    (folder / 'y.gif').write_text('text, not a gif')
    (folder / 'z.gif').write_bytes((folder / 'a.gif').read_bytes()[:-20])
    with pytest.warns(UserWarning) as caught:
        data = GifDataset(folder, 8)
    assert len(caught) == 1 and len(data) == 5
    message = str(caught[0].message)
    assert 'skipped 3 of 8' in message and all(f'{name}.gif' in message for name in 'xyz')
    with pytest.raises(ValueError, match='x.gif'):
        GifDataset(folder, 8, strict=True)


def test_bytes_behind_the_end_are_no_damage(folder):
    with open(folder / 'a.gif', 'ab') as file:
        file.write(b'trailing')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(GifDataset(folder, 8, strict=True)) == 5


def spoil(path):
    """Damage in the middle: both ends look well."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2:-1] = bytes([0x77]) * (len(data) - len(data) // 2 - 1)
    path.write_bytes(data)


def test_damage_inside_is_replaced_by_the_next_clip_with_its_caption(folder):
    for path in list(folder.rglob('*.gif')):
        path.with_suffix('.txt').write_text(path.stem)
    expected = GifDataset(folder, 8)[2]
    spoil(folder / 'b.gif')
    data = GifDataset(folder, 8)
    assert len(data) == 5
    with pytest.warns(UserWarning, match='b.gif') as caught:
        for _ in range(3):
            video, caption = data[1]
            assert torch.equal(video, expected[0]) and caption == expected[1] == 'd'
    assert len(caught) == 1 and '1 of 5' in str(caught[0].message)
    with pytest.raises(ValueError, match='b.gif'):
        GifDataset(folder, 8, strict=True)[1]


def test_the_last_clip_is_replaced_by_the_first_and_none_is_an_error(folder):
    data = GifDataset(folder, 8, cache_bytes=0)
    first = data[0]
    (folder / 'e.gif').unlink()                                             # gone after the start
    with pytest.warns(UserWarning, match='e.gif'):
        assert torch.equal(data[4], first)
    for path in data.paths[:-1]:
        spoil(path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='all 5 files'):
        data[0]
    with pytest.raises(ValueError, match='none of the 2 clips'):
        (folder / 'only').mkdir()
        (folder / 'only' / 'a.gif').touch(), (folder / 'only' / 'b.gif').touch()
        GifDataset(folder / 'only', 8)


# ------------------------------------------------------------------------------------- cache


def test_cache_keeps_to_its_budget(folder, monkeypatch):
    reads = []
    spy = lambda *a, **k: reads.append(a) or read_clip(*a, **k)
    monkeypatch.setattr(dataset_module, 'read_clip', spy)
    one = 3 * 4 * 8 * 8
    for budget, cached in [(0, 0), (one - 1, 0), (one, 1), (3 * one + 5, 3), (5 * one, 5), (2**30, 5)]:
        reads.clear()
        data = GifDataset(folder, 8, num_frames=4, cache_bytes=budget)
        first, second = list(data), list(data)
        assert len(data.cache) == cached and len(reads) == 10 - cached
        assert sum(frames.nbytes for frames in data.cache.values()) == data.cached_bytes <= budget
        assert all(map(torch.equal, first, second))
        assert data.fits_in_cache == (cached == 5)


def test_fits_in_cache_where_clips_stay_whole(tmp_path):
    save(tmp_path / 'a.gif', 20), save(tmp_path / 'b.gif', 10)
    whole = 3 * 30 * 8 * 8
    for options in ({'random_window': True}, {'force_num_frames': False}):
        for budget in (whole, whole - 1):
            data = GifDataset(tmp_path, 8, num_frames=2, cache_bytes=budget, **options)
            assert data.fits_in_cache == (budget == whole)


def test_dataset_travels_to_other_processes(folder):
    data = GifDataset(folder, 8, horizontal_flip=True)
    data[0]
    assert torch.equal(pickle.loads(pickle.dumps(data)).clip(1), data.clip(1))


# ------------------------------------------------------------------------------------- the stream


@pytest.fixture
def varied(tmp_path):
    for i in range(7):
        save(tmp_path / f'{i}.gif', 9, seed=i)
    return GifDataset(tmp_path, 8, num_frames=3, horizontal_flip=True, random_window=True)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_stream_is_a_pure_function_of_position(varied):
    forward = [ClipStream(varied, seed=5)[p] for p in range(30)]            # a fresh stream each
    stream = ClipStream(varied, seed=5)
    torch.manual_seed(1)
    for p in reversed(range(30)):
        assert torch.equal(stream[p], forward[p])
    assert any(not torch.equal(ClipStream(varied, seed=6)[p], forward[p]) for p in range(7))


def test_each_epoch_shows_each_clip_once_in_another_order(varied):
    varied.horizontal_flip = varied.random_window = False
    known = [varied.clip(i) for i in range(7)]
    stream = ClipStream(varied)
    shown = [next(i for i, clip in enumerate(known) if torch.equal(clip, stream[p])) for p in range(28)]
    epochs = [shown[i:i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_windows_and_flips_change_from_epoch_to_epoch(varied):
    shown = {bytes(ClipStream(varied)[p].numpy().tobytes()) for p in range(7 * 8)}
    assert len(shown) > 30                                                  # 7 clips, 8 epochs: few repeats


def test_draws_depend_on_seed_and_position(tmp_path):
    save(tmp_path / 'only.gif', 9)
    data = GifDataset(tmp_path, 8, num_frames=3, random_window=True)
    starts = [[frame_numbers(ClipStream(data, seed)[p])[0] for p in range(12)] for seed in (0, 1)]
    assert starts[0] != starts[1] and len(set(starts[0])) > 3


def test_batches_follow_the_stream_and_resume(varied):
    shown = take(batches(varied, 4, seed=3), 6)                             # over the epoch's border
    stream = ClipStream(varied, seed=3)
    assert torch.equal(torch.cat(shown), torch.stack([stream[p] for p in range(24)]))
    assert torch.equal(torch.stack(take(batches(varied, 4, seed=3, start=2), 4)), torch.stack(shown[2:]))
    assert shown[0].dtype == torch.uint8 and shown[0].shape == (4, 3, 3, 8, 8)


def test_two_processes_see_what_one_would(varied):
    one = take(batches(varied, 6, start=1), 5)
    two = [take(batches(varied, 3, start=1, rank=rank, world_size=2), 5) for rank in (0, 1)]
    for whole, *parts in zip(one, *two):
        assert torch.equal(whole, torch.cat(parts))


def test_workers_bring_the_same_batches_and_leave_the_global_generator_alone(varied):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    here, there = take(batches(varied, 4, num_workers=0), 6), take(batches(varied, 4, num_workers=2), 6)
    assert all(map(torch.equal, here, there))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_start_only_if_the_cache_is_too_small(varied):
    assert batches(varied, 2)._num_workers == 0
    varied.cache_bytes = 1000
    assert batches(varied, 2)._num_workers == min(4, os.cpu_count())


def test_workers_share_the_budget(varied, monkeypatch):
    class Worker:
        num_workers = 4
    monkeypatch.setattr(dataset_module, 'get_worker_info', lambda: Worker)
    varied.cache_bytes = 8 * varied.read(0, 0, None).nbytes
    for i in range(7):
        varied.clip(i)
    assert len(varied.cache) == 2


@pytest.mark.parametrize('arguments', [
    {'batch_size': 0}, {'batch_size': 2, 'start': -1}, {'batch_size': 2, 'rank': 1},
    {'batch_size': 2, 'rank': -1, 'world_size': 2},
])
def test_bad_batches(varied, arguments):
    with pytest.raises(ValueError, match='batch_size=.*rank='):
        batches(varied, **arguments)
    varied.num_frames = None
    with pytest.raises(ValueError, match='force_num_frames=True'):
        batches(varied, 2)


def test_clip_shape(tmp_path):
    for i, (frames, height, width) in enumerate([(5, 8, 20), (9, 10, 12), (7, 30, 16)]):
        save(tmp_path / f'{i}.gif', frames, height, width)
    (tmp_path / '9.gif').write_bytes(b'')
    assert ClipFolder(tmp_path).shape() == (7, 8, 12)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'a.gif').touch()
    with pytest.raises(ValueError, match='none of the 1 clips'):
        ClipFolder(tmp_path / 'empty').shape()

"""How fast clips come: films read by GifDataset against PyAV's plain loop, which does nothing but decode and convert.

    python tests/bench_loader.py                 # draws its own films; needs PyAV
    python tests/bench_loader.py my_films/

All read the same frames of the same files. The plain loop makes them RGB at their own size, as decord does, if it is installed;
ours are scaled, cut, checked and stacked besides. Clips per second of one core (of its time, not of the clock's, for machines
are shared); goal: 0.9.
"""

import argparse
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import av
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from video_diffusion import ClipFolder, GifDataset, video_tensor_to_mp4


def draw_films(folder: Path, count: int = 8, frames: int = 96, height: int = 240, width: int = 320) -> None:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    for number in range(count):
        waves = [torch.sin((x + (number + 2) * t) / 9) * torch.cos((y - t) / 7) for t in range(frames)]
        film = torch.stack(waves).mul(0.4).add(0.5).expand(3, -1, -1, -1)
        video_tensor_to_mp4(film + 0.05 * torch.rand(film.shape), folder / f'{number}.mp4', fps=30)


def plain(paths: list[Path], num_frames: int) -> None:
    for path in paths:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0), start=1):
                frame.to_ndarray(format='rgb24')
                if number == num_frames:
                    break


def decord(paths: list[Path], num_frames: int) -> None:
    from decord import VideoReader
    for path in paths:
        VideoReader(str(path), num_threads=1).get_batch(list(range(num_frames))).asnumpy()


def rate(work, clips: int, repeats: int = 5) -> float:
    """The best of some tries."""
    best = float('inf')
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return clips / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?')
    parser.add_argument('--num-frames', type=int, default=16)
    parser.add_argument('--image-size', type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.folder is None:
            draw_films(Path(temporary))
        folder = ClipFolder(args.folder or temporary, ('mp4', 'webm', 'mov', 'mkv', 'avi'))
        count = len(folder.paths)

        def ours(**how):
            data = GifDataset(folder, args.image_size, num_frames=args.num_frames, cache_bytes=0, **how)
            for index in range(count):
                data.clip_and_caption(index, torch.Generator().manual_seed(index))

        base = rate(lambda: plain(folder.paths, args.num_frames), count)
        print(f'{count} films, {args.num_frames} frames each, at {args.image_size} pixels')
        print(f'plain loop of PyAV       {base:7.1f} clips/s')
        speed = rate(ours, count)
        print(f'GifDataset               {speed:7.1f} clips/s, {speed / base:.2f} of it')
        print(f'windows from anywhere    {rate(lambda: ours(random_window=True), count):7.1f} clips/s: from the last key frame on')
        if find_spec('decord'):
            print(f'decord                   {rate(lambda: decord(folder.paths, args.num_frames), count):7.1f} clips/s')


if __name__ == '__main__':
    main()

"""Does the model go on from frames? The toy world's judge on clips that are predicted, filled in, and made longer.

    python train.py --frame-noise independent --steps 3000
    python tests/bench_frames.py results/ --sampler ddpm --steps 16 --cond-scale 2

Unseen clips are drawn again from their captions alone, from their first 2 frames with captions and without, and from both ends;
right is what is lawful and has the clip's own shape, colour and direction, and from both ends what is lawful. Then videos
longer than the model's own are drawn from captions, window by window, the later windows without: how many are lawful as a
whole, how many in every 8 frames in a row, and for how many frames are they?
"""

import argparse
import json
import time

import torch
from torch import Tensor

from video_diffusion import GaussianDiffusion, shapes, video_tensor_to_gif
from video_diffusion.diffusion.known_frames import WAYS
from video_diffusion.distributed import best_device
from video_diffusion.training.memory import keep_freed_memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint')
    parser.add_argument('--count', type=int, default=64)
    parser.add_argument('--steps', type=int, default=25)
    parser.add_argument('--sampler', default='ddim')
    parser.add_argument('--ways', nargs='+', choices=WAYS, help='how frames are made to fit known ones (default: as it was trained)')
    parser.add_argument('--history-scale', type=float, default=1.)
    parser.add_argument('--frames', type=int, nargs='*', default=[32], help='lengths of long videos')
    parser.add_argument('--cond-scale', type=float, default=1., help='where captions alone are given')
    parser.add_argument('--later-words', type=int, default=0, help='later windows of long videos are told so many words of the caption')
    parser.add_argument('--overlap', type=int, help='frames that their windows share (default: as sample_long)')
    parser.add_argument('--known-noise', type=float, help='under which a window sees those of the window before')
    parser.add_argument('--only-long', action='store_true')
    parser.add_argument('--out', help='folder for GIFs of what was drawn')
    args = parser.parse_args()
    keep_freed_memory()
    diffusion = GaussianDiffusion.from_checkpoint(args.checkpoint).to(best_device())
    for way in args.ways or [None]:
        if not args.only_long:
            short(diffusion, way, args)
        for frames in args.frames:
            long(diffusion, way, frames, args)


def short(diffusion: GaussianDiffusion, way: str | None, args: argparse.Namespace) -> None:
    frames = diffusion.num_frames
    clips, captions = zip(*(shapes.random_clip(10 ** 9 + i, diffusion.height, frames) for i in range(args.count)))
    clips = torch.stack(clips).to(diffusion.alpha.device)
    first, ends = torch.arange(frames) < 2, torch.arange(frames) % (frames - 1) == 0
    has_words = getattr(diffusion.denoise_fn, 'has_cond', False)
    for name, mask, scale in [('from captions alone', None, args.cond_scale), ('2 frames and captions', first, 1.), ('2 frames', first, 0.),
                              ('both ends and captions', ends, 1.), ('both ends', ends, 0.)]:
        if scale and not has_words:
            continue
        how = {} if mask is None else dict(known_mask=mask, known_by=way, history_scale=args.history_scale)
        drawn = in_batches(args.count, lambda rows: diffusion.sample(
            list(captions[rows]) if has_words else None, scale, len(clips[rows]), seed=rows.start, sampler=args.sampler,
            steps=args.steps, progress=False, **how, **({} if mask is None else dict(known=clips[rows]))))
        report(name, way, drawn, args, captions=captions)


def long(diffusion: GaussianDiffusion, way: str | None, frames: int, args: argparse.Namespace) -> None:
    words = shapes.captions()
    prompts = [words[i * len(words) // args.count] for i in range(args.count)]
    has_words = getattr(diffusion.denoise_fn, 'has_cond', False)
    if args.later_words:                                          # there are no more windows than frames
        prompts = [[prompt, *[' '.join(prompt.split()[:args.later_words])] * frames] for prompt in prompts]
    later_scale = None if not has_words else 1. if args.later_words else 0.
    drawn = in_batches(args.count, lambda rows: diffusion.sample_long(
        frames, prompts[rows] if has_words else None, args.cond_scale, len(prompts[rows]), overlap=args.overlap, seed=rows.start,
        later_cond_scale=later_scale, known_by=way, known_noise=args.known_noise, history_scale=args.history_scale,
        sampler=args.sampler, steps=args.steps, progress=False))
    lasted = lawful_frames(drawn)
    every8 = 100 * sum(count == frames for count in lasted) / len(lasted)
    report(f'{frames} frames', way, drawn, args, lawful_by_8=every8, frames_until_broken=sum(lasted) / len(lasted))


def lawful_frames(videos: Tensor, window: int = 8) -> list[int]:
    """Frames of each clip (b c f h w) until the first broken law: all of them, if none is.

    For over a hundred frames the smallest error of speed adds up to more than any path may be off. So the laws are asked of every
    `window` frames in a row, and of all of them that they show the same shape in the same colour.
    """
    frames = videos.shape[2]
    first = shapes.grade_batch(videos[:, :, :window])
    counts = [frames if one.lawful else 0 for one in first]
    for end in range(window + 1, frames + 1):
        for clip, now in enumerate(shapes.grade_batch(videos[:, :, end - window:end])):
            if not now.lawful or (now.shape, now.colour) != (first[clip].shape, first[clip].colour):
                counts[clip] = min(counts[clip], end - 1)            # frame end - 1 is the one that broke it
    return counts


def in_batches(count: int, draw, size: int = 16) -> Tensor:
    return torch.cat([draw(slice(i, min(count, i + size))).cpu() for i in range(0, count, size)])


def report(name: str, way: str | None, drawn: Tensor, args: argparse.Namespace, captions=None, **more) -> None:
    grades = shapes.grade_all(drawn, captions)
    if captions is not None:
        more['right'] = grades['both']
    more |= dict(lawful=grades['lawful'], why=grades['why'], cpu_seconds=round(time.process_time()))
    print(json.dumps({'case': name, 'way': way, **more}), flush=True)
    if args.out:
        video_tensor_to_gif(drawn[:16], f'{args.out}/{name.replace(" ", "-")}-{way}.gif')


if __name__ == '__main__':
    main()

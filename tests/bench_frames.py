"""Does the model continue a clip? The toy world's judge on predicted and on prolonged clips.

    python train.py --known-frames 0.5 && python tests/bench_frames.py results/ --captions

Predicts unseen clips from their first 2 frames, and with --captions from what they say, in each of the three ways of
known_frames.py; a prediction is right if it is lawful and has the shape, the colour and the direction of the clip. Then
draws clips of 4 times the length of the model's own, window by window; they should be lawful. A model that reads
captions gets one for the first window, and with --later-cond-scale for the others.
"""

import argparse
import json

import torch

from video_diffusion import GaussianDiffusion, shapes, video_tensor_to_gif
from video_diffusion.distributed import best_device
from video_diffusion.training.memory import keep_freed_memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint')
    parser.add_argument('--count', type=int, default=64)
    parser.add_argument('--steps', type=int, default=25)
    parser.add_argument('--sampler', default='ddim')
    parser.add_argument('--ways', nargs='+', default=['network', 'guide', 'replace'])
    parser.add_argument('--weights', nargs='+', type=float, default=[5.], help='of guidance by frames')
    parser.add_argument('--overlap', type=int, default=4, help='frames that the windows of long clips share')
    parser.add_argument('--captions', action='store_true', help='predict from the captions, too')
    parser.add_argument('--later-cond-scale', type=float, default=0., help='guidance of the later windows of long clips')
    parser.add_argument('--short', action='store_true', help='no long clips')
    parser.add_argument('--out', help='folder for GIFs of what was drawn')
    args = parser.parse_args()
    keep_freed_memory()
    device = best_device()
    diffusion = GaussianDiffusion.from_checkpoint(args.checkpoint).to(device)
    sampling = dict(sampler=args.sampler, steps=args.steps, progress=False)
    clips, captions = zip(*(shapes.random_clip(10 ** 9 + i, diffusion.height, diffusion.num_frames) for i in range(args.count)))
    clips = torch.stack(clips)
    words = chunks(captions) if getattr(diffusion.denoise_fn, 'has_cond', False) else [None] * len(chunks(captions))
    scale = 1. if words[0] is None else 2. if args.captions else 0.
    results = []

    def report(name, videos, true):
        results.append({'case': name, **true, **shapes.grade_all(videos)})
        print(f'{name}: {results[-1]}', flush=True)
        if args.out:
            video_tensor_to_gif(videos[:16], f'{args.out}/{name.replace(" ", "-")}.gif')

    for way, weight in [(way, weight) for way in args.ways for weight in (args.weights if way == 'guide' else [0.])]:
        name = f'{way} {weight}' if way == 'guide' else way
        how = dict(sampling, known_by=way, frame_guidance=weight)
        drawn = torch.cat([
            diffusion.sample(cond, scale, len(first), first_frames=first.to(device), seed=i, **how).cpu()
            for i, (first, cond) in enumerate(zip(clips[:, :, :2].split(16), words))])
        grades = [shapes.grade(video) for video in drawn]
        right = [grade.lawful and grade.follows(caption) for grade, caption in zip(grades, captions)]
        report(name, drawn, {'right': 100 * sum(right) / len(right)})
        if not args.short:
            guided = dict(cond_scale=2., later_cond_scale=args.later_cond_scale) if words[0] else {}
            report(f'long {name}', torch.cat([
                diffusion.sample_long(4 * diffusion.num_frames, cond, overlap=args.overlap, seed=i, **guided, **how)
                for i, cond in enumerate(words)]), {})
    print(json.dumps(results))


def chunks(items, size=16):
    return [list(items[i:i + size]) for i in range(0, len(items), size)]


if __name__ == '__main__':
    main()

#!/usr/bin/env python
"""Train a video diffusion model.

    python train.py                      # on a toy world of moving shapes that it draws itself
    python train.py my_gifs/             # on your own GIFs, with captions (clip.txt beside clip.gif) or without
    python train.py my_gifs/ --resume    # go on where the run in --results stopped
    torchrun --nproc_per_node=4 train.py my_gifs/ --amp
"""

import argparse
import os
import shutil
from pathlib import Path

from video_diffusion import (
    GaussianDiffusion, Trainer, Unet3D, WordEncoder, checkpoint, distributed, lr_schedule, shapes, video_tensor_to_gif)
from video_diffusion.dataset import clip_shape, find_clips, read_captions
from video_diffusion.noise_schedule import SCHEDULES
from video_diffusion.samplers import SAMPLERS
from video_diffusion.script import keep_freed_memory, one_line_errors
from video_diffusion.trainer import sample_many

# What a flag that is not given means. The CPU column trains the toy world in about ten minutes on two cores.
DEFAULTS = {
    #                    CPU         GPU
    'image_size':       (16,         32),       # of the toy world; your clips keep their size up to max_size
    'num_frames':       (8,          8),        # of the toy world; your clips their length up to max_frames
    'max_size':         (32,         64),
    'max_frames':       (8,          16),
    'dim':              (16,         64),       # a thin first level: on a CPU the full resolution costs the most
    'dim_mults':        ((1, 4, 8),  (1, 2, 4)),
    'attn_dim_head':    (8,          32),
    'linear_attention': (False,      True),
    'batch_size':       (8,          64),
    'lr':               (2e-3,       5e-4),
    'steps':            (1400,       10000),
    'sample_every':     (350,        1000),
}


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    def default(name):
        cpu, gpu = (' '.join(map(str, v)) if isinstance(v, tuple) else v for v in DEFAULTS[name])
        return f'(default: {cpu} on a CPU, {gpu} on a GPU)' if cpu != gpu else f'(default: {cpu})'

    add('folder', nargs='?', help='clips to train on; without it the toy world is drawn into data/shapes')
    add('--results', default='results', help='where checkpoints, samples and the log go (default: results)')
    add('--resume', action='store_true', help='go on from the newest checkpoint in --results')
    add('--steps', type=int, help=f'optimiser steps {default("steps")}')
    add('--batch-size', type=int, help=f'clips per forward pass of each process {default("batch_size")}')
    add('--accumulate', type=int, default=1, help='forward passes per step (default: 1)')
    add('--lr', type=float, help=f'learning rate, reached after --warmup steps {default("lr")}')
    add('--warmup', type=int, default=50, help='steps of warm-up, before a cosine decay to zero (default: 50)')
    add('--image-size', type=int, nargs='+', metavar='N', help='side, or height and width (default: as the clips, but '
        f'at most {DEFAULTS["max_size"][0]} on a CPU and {DEFAULTS["max_size"][1]} on a GPU; toy world {default("image_size")})')
    add('--num-frames', type=int, help='frames per clip (default: as the clips, but at most '
        f'{DEFAULTS["max_frames"][0]} on a CPU and {DEFAULTS["max_frames"][1]} on a GPU; toy world: {DEFAULTS["num_frames"][0]})')
    add('--channels', type=int, default=3, help='1 grey, 3 RGB, 4 RGBA (default: 3)')
    add('--dim', type=int, help=f'width of the network {default("dim")}')
    add('--dim-mults', type=int, nargs='+', metavar='M', help=f'width of each level {default("dim_mults")}')
    add('--attn-dim-head', type=int, help=f'width of each of the 8 heads of temporal attention {default("attn_dim_head")}')
    add('--linear-attention', action=argparse.BooleanOptionalAction,
        help='spatial linear attention at every level (default: off on a CPU, on on a GPU)')
    add('--frame-embedding', action=argparse.BooleanOptionalAction, default=True,
        help='tell the network which frame is the first: motion is learnt much sooner (default: on)')
    add('--unconditional', action='store_true', help='do not use the captions')
    add('--objective', default='v', choices=('v', 'noise', 'x0'), help='what the network predicts (default: v)')
    add('--loss', default='l2', choices=('l1', 'l2'), help='(default: l2)')
    add('--timesteps', type=int, default=1000, help='diffusion steps (default: 1000)')
    add('--schedule', default='cosine', choices=tuple(SCHEDULES), help='how the noise grows (default: cosine)')
    add('--schedule-shift', type=float, default=1., help='above 1: more noise at every step (default: 1)')
    add('--zero-snr', action='store_true', help='let the last step be pure noise (not with --objective noise)')
    add('--min-snr', type=float, metavar='GAMMA', help='weigh steps by min(snr, GAMMA), 5 is usual (default: all alike)')
    add('--offset-noise', type=float, default=0., help='share of noise that is one value per clip and channel (default: 0)')
    add('--null-cond-prob', type=float, default=0.1, help='how often captions are dropped in training (default: 0.1)')
    add('--known-frames', type=float, default=0., metavar='SHARE', help='share of clips of which the network is told the '
        'first frames, or the first and the last, so that it learns to continue clips (default: 0)')
    add('--focus-present', type=float, default=0., help='share of clips trained as unrelated images (default: 0)')
    add('--flip', action='store_true', help='mirror half of the clips (not where captions say left and right)')
    add('--random-window', action='store_true', help='from clips longer than --num-frames take any part, not the first')
    add('--ema-decay', type=float, default=0.995, help='of the averaged weights (default: 0.995)')
    add('--max-grad-norm', type=float, default=1., help='(default: 1)')
    add('--amp', action='store_true', help='train in bf16 or fp16 where the hardware has it')
    add('--sample-every', type=int, help=f'steps between checkpoints with samples {default("sample_every")}')
    add('--sample-rows', type=int, default=4, help='samples per checkpoint: the square of this (default: 4)')
    add('--sampler', default='ddim', choices=tuple(SAMPLERS), help='of the samples (default: ddim)')
    add('--sample-steps', type=int, default=25, help='steps of the sampler (default: 25)')
    add('--cond-scale', type=float, default=2., help='guidance of the samples towards their captions (default: 2)')
    add('--toy-clips', type=int, default=4000, help='clips of the toy world (default: 4000)')
    add('--seed', type=int, default=0, help='(default: 0)')
    add('--strict', action='store_true', help='a damaged clip is an error, not a warning')
    add('--device', help='cpu, cuda, mps (default: the fastest there is)')
    return parser.parse_args(argv)


def main() -> None:
    args = flags()
    keep_freed_memory()
    processes = distributed.init(device=args.device)
    fill_in_defaults(args, on_gpu=processes.device.type != 'cpu')
    results = Path(args.results)
    if not args.resume and checkpoint.milestones(results):
        raise ValueError(f'{results} already holds a run: go on with it by --resume, or choose another --results')

    trainer = build_trainer(args, processes)
    if args.resume:
        trainer.load(-1)
    trainer.train(prob_focus_present=args.focus_present)
    if trainer.step == args.steps and args.folder is None:
        grade_toy_world(args, trainer)
    if processes.is_main:
        report(trainer)
    distributed.close()


def fill_in_defaults(args: argparse.Namespace, on_gpu: bool) -> None:
    """What was not given depends on the device; the size of the clips only where we draw them."""
    for name, values in DEFAULTS.items():
        depends_on_clips = args.folder is not None and name in ('image_size', 'num_frames')
        if getattr(args, name, None) is None and not depends_on_clips:
            setattr(args, name, values[on_gpu])
    if isinstance(args.image_size, list):
        if len(args.image_size) > 2:
            raise ValueError(f'--image-size {" ".join(map(str, args.image_size))}: give one number, or height and width')
        args.image_size = args.image_size[0] if len(args.image_size) == 1 else tuple(args.image_size)


def build_trainer(args: argparse.Namespace, processes: distributed.Processes) -> Trainer:
    folder = args.folder or draw_toy_world(args, processes)
    frames, height, width = clip_size(args, folder)
    captioned = not args.unconditional and read_captions(find_clips(folder)) is not None
    encoder = WordEncoder() if captioned else None
    unet = Unet3D(args.dim, dim_mults=tuple(args.dim_mults), channels=args.channels,
                  attn_dim_head=args.attn_dim_head, use_sparse_linear_attn=args.linear_attention,
                  cond_dim=encoder.dim if encoder else None, frame_embedding=args.frame_embedding,
                  cond_frames=args.known_frames > 0)
    diffusion = GaussianDiffusion(
        unet, image_size=(height, width), num_frames=frames, channels=args.channels, timesteps=args.timesteps,
        loss_type=args.loss, objective=args.objective, text_encoder=encoder, schedule=args.schedule,
        schedule_shift=args.schedule_shift, zero_snr=args.zero_snr, min_snr_gamma=args.min_snr, offset_noise=args.offset_noise,
        prob_cond_frames=args.known_frames)
    if processes.is_main:
        weights = sum(p.numel() for p in diffusion.parameters())
        print(f'{frames} frames of {height}x{width}, {weights / 1e6:.1f} million weights, on {processes.device}')
    return Trainer(
        diffusion, folder, train_batch_size=args.batch_size, gradient_accumulate_every=args.accumulate,
        train_num_steps=args.steps, train_lr=args.lr, lr_schedule=lr_schedule.warmup_cosine(args.steps, args.warmup),
        max_grad_norm=args.max_grad_norm, amp=args.amp, null_cond_prob=args.null_cond_prob,
        ema_decay=args.ema_decay, ema_warmup=True, step_start_ema=0, update_ema_every=1,
        horizontal_flip=args.flip, random_window=args.random_window, strict=args.strict,
        save_and_sample_every=args.sample_every, num_sample_rows=args.sample_rows, results_folder=args.results,
        cond_scale=args.cond_scale, sampler=args.sampler, sample_steps=args.sample_steps, seed=args.seed, processes=processes)


def draw_toy_world(args: argparse.Namespace, processes: distributed.Processes) -> Path:
    """data/shapes, drawn if it is not there yet."""
    folder = Path('data/shapes')
    size, frames = args.image_size, args.num_frames
    if not isinstance(size, int):
        raise ValueError(f'--image-size {" ".join(map(str, size))}: the toy world is square, so give one number')
    if processes.is_main and not folder.exists():
        print(f'drawing {args.toy_clips} clips into {folder}')
        unfinished = folder.with_name('shapes.unfinished')
        shutil.rmtree(unfinished, ignore_errors=True)
        shapes.make_shapes(unfinished, args.toy_clips, size, frames)
        unfinished.rename(folder)
    processes.any(False)  # the others wait here until it is drawn
    there = len(find_clips(folder)), *clip_shape(folder)
    if there != (args.toy_clips, frames, size, size):
        raise ValueError(f'{folder} holds {there[0]} clips of {there[1]} frames of {there[2]}x{there[3]}, not the toy '
                         f'world asked for ({args.toy_clips} clips of {frames} frames of {size}x{size}): remove it first')
    return folder


def clip_size(args: argparse.Namespace, folder: str | Path) -> tuple[int, int, int]:
    """Frames, height and width to train on: as the flags say, or like the clips but not too large for a first run."""
    frames, height, width = clip_shape(folder)
    if args.image_size is None:
        shrink = min(1., args.max_size / max(height, width))
        step = 2 ** (len(args.dim_mults) - 1)  # the network halves its frames so often
        height, width = (max(step, round(side * shrink) // step * step) for side in (height, width))
    elif isinstance(args.image_size, int):
        height = width = args.image_size
    else:
        height, width = args.image_size
    return args.num_frames or min(frames, args.max_frames), height, width


def report(trainer: Trainer) -> None:
    results = trainer.results_folder
    print(f'checkpoints, samples and log.csv are in {results}{os.sep}, the newest checkpoint is '
          f'{checkpoint.newest(results).name}')
    example = f' --prompt "{trainer.dataset.captions[0]}"' if trainer.use_captions else ''
    print(f'to sample from it: python sample.py {results}{example}')


def grade_toy_world(args: argparse.Namespace, trainer: Trainer) -> None:
    """Ask for 64 clips of the toy world and say how many obey its laws and their captions."""
    count = 64
    captions = shapes.captions()
    prompts = [captions[i * len(captions) // count] for i in range(count)] if trainer.use_captions else None
    with trainer.ema.average_parameters():
        videos = sample_many(trainer.diffusion, prompts, count, batch_size=args.batch_size, seed=args.seed + 1,
                             processes=trainer.processes, **trainer.sampling)
    if trainer.processes.is_main:
        video_tensor_to_gif(videos, trainer.results_folder / 'graded.gif')
        grades = shapes.grade_all(videos, prompts)
        print(f'grade of {count} clips: {grades["lawful"]:.0f}% lawful'
              + (f', {grades["caption_true"]:.0f}% caption-true, {grades["both"]:.0f}% both' if prompts else ''))


if __name__ == '__main__':
    with one_line_errors('train.py'):
        main()

#!/usr/bin/env python
"""Train a video diffusion model, or a video VAE.

    python train.py                      # on a toy world of moving shapes that it draws itself
    python train.py my_gifs/             # on your own GIFs, with captions (clip.txt beside clip.gif) or without
    python train.py my_gifs/ --stage vae # first a VAE, whose latents are smaller than pixels
    python train.py my_gifs/ --vae results_vae/    # then a diffusion model in these latents
    python train.py my_gifs/ --resume    # go on where the run in --results stopped
    torchrun --nproc_per_node=4 train.py my_gifs/ --amp
    torchrun --nproc_per_node=4 train.py my_gifs/ --dim 256 --shard     # each process holds a quarter of the model
    torchrun --nproc_per_node=4 train.py my_gifs/ --stage vae --context-parallel 2
"""

import argparse
import os
from pathlib import Path

import torch

from video_diffusion import (
    GaussianDiffusion,
    Trainer,
    Unet3D,
    WordEncoder,
    checkpoint,
    distributed,
    lr_schedule,
    shapes,
    video_tensor_to_gif,
)
from video_diffusion.data.folder import CLIPS, IMAGES, ClipFolder
from video_diffusion.diffusion.latent import LatentDiffusion, latent_shape
from video_diffusion.diffusion.noise_schedule import SCHEDULES
from video_diffusion.diffusion.samplers import SAMPLERS
from video_diffusion.training.script import draw_toy_world, keep_freed_memory, like_the_clips, one_line_errors
from video_diffusion.training.trainer import sample_many
from video_diffusion.training.vae_trainer import VAETrainer, start_from
from video_diffusion.vae.causal_vae import CausalVAE
from video_diffusion.vae.frame_shares import fitting_frames
from video_diffusion.vae.temporal_vae import TemporalVAE
from video_diffusion.vae.vae_checkpoint import vae_from_checkpoint
from video_diffusion.vae.vae_loss import PerceptualLoss
from video_diffusion.weights.cogvideox_vae import causal_vae_from_diffusers, causal_vae_from_sat

# What a flag that is not given means, for --stage diffusion | vae. The CPU columns train the toy world in about ten minutes
# on two cores.
DEFAULTS = {
    #                    CPU         GPU           CPU         GPU
    'image_size':       (16,         32,           32,         32),       # of the toy world; yours keep theirs up to max_size
    'num_frames':       (8,          8,            8,          8),        # of the toy world; yours keep theirs up to max_frames
    'max_size':         (32,         64,           32,         128),
    'max_frames':       (8,          16,           8,          17),
    'dim':              (16,         64,           16,         64),       # thin at first: on a CPU the full resolution costs most
    'dim_mults':        ((1, 4, 8),  (1, 2, 4),    (1, 2),     (1, 2, 4)),
    'attn_dim_head':    (8,          32,           None,       None),
    'linear_attention': (False,      True,         None,       None),
    'time_compression': (None,       None,         1,          4),        # on a CPU there is no time to learn it
    'latent_channels':  (None,       None,         4,          4),
    'batch_size':       (8,          64,           8,          16),
    'lr':               (2e-3,       5e-4,         2e-3,       2e-4),
    'steps':            (1600,       10000,        800,        20000),
    'image_steps':      (None,       None,         600,        5000),
    'sample_every':     (800,        1000,         200,        1000),
}


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    groups = {stage: parser.add_argument_group(f'only with --stage {stage}') for stage in ('diffusion', 'vae')}
    add_diffusion, add_vae = (group.add_argument for group in groups.values())

    def default(name):
        columns = [' '.join(map(str, v)) if isinstance(v, tuple) else v for v in DEFAULTS[name]]
        texts = [f'{cpu} on a CPU, {gpu} on a GPU' if cpu != gpu else f'{cpu}' for cpu, gpu in (columns[:2], columns[2:])]
        texts = [text for text in dict.fromkeys(texts) if text != 'None']
        return f'(default: {texts[0]}' + (f'; with --stage vae {texts[1]})' if len(texts) > 1 else ')')

    add('folder', nargs='?', help='clips to train on; without it the toy world is drawn into data/')
    add('--stage', default='diffusion', choices=('diffusion', 'vae'), help='what to train (default: diffusion)')
    add('--results', help='where checkpoints, samples and the log go (default: results; with --stage vae results_vae)')
    add('--resume', action='store_true', help='go on from the newest checkpoint in --results')
    add('--steps', type=int, help=f'optimiser steps {default("steps")}')
    add('--batch-size', type=int, help=f'clips per forward pass of each process {default("batch_size")}')
    add('--accumulate', type=int, default=1, help='forward passes per step (default: 1)')
    add('--lr', type=float, help=f'learning rate, reached after --warmup steps {default("lr")}')
    add('--warmup', type=int, default=50, help='steps of warm-up, before a cosine decay to zero (default: 50)')
    add('--image-size', type=int, nargs='+', metavar='N', help='side, or height and width (default: as the clips, but '
        f'not above {default("max_size")[10:-1]}; of the toy world {default("image_size")[10:-1]})')
    add('--num-frames', type=int, help=f'frames per clip (default: as the clips, but not above {default("max_frames")[10:-1]}; '
        f'of the toy world {default("num_frames")[10:-1]})')
    add('--channels', type=int, default=3, help='1 grey, 3 RGB, 4 RGBA (default: 3; with --vae, those of the VAE)')
    add('--dim', type=int, help=f'width of the network {default("dim")}')
    add('--dim-mults', type=int, nargs='+', metavar='M', help=f'width of each level {default("dim_mults")}')
    add_diffusion('--attn-dim-head', type=int,
                  help=f'width of each of the 8 heads of temporal attention {default("attn_dim_head")}')
    add_diffusion('--linear-attention', action=argparse.BooleanOptionalAction,
        help='spatial linear attention at every level (default: off on a CPU, on on a GPU)')
    add_diffusion('--vae', metavar='RESULTS', help='a trained VAE, its results folder or a checkpoint: diffuse in its latents '
                  '(default: pixels; the toy world is then 32 pixels wide)')
    add_diffusion('--cache-latents', action='store_true', help='encode each clip once, into the folder latents/ beside the VAE')
    add_diffusion('--low-res', type=int, metavar='FACTOR', help='with --vae: learn to enlarge clips so many times (default: '
                  'to draw them from nothing)')
    add_diffusion('--unconditional', action='store_true', help='do not use the captions')
    add_diffusion('--objective', default='v', choices=('v', 'noise', 'x0'), help='what the network predicts (default: v)')
    add('--loss', default='l2', choices=('l1', 'l2'), help='(default: l2)')
    add_diffusion('--timesteps', type=int, default=1000, help='diffusion steps (default: 1000)')
    add_diffusion('--schedule', default='cosine', choices=tuple(SCHEDULES), help='how the noise grows (default: cosine)')
    add_diffusion('--schedule-shift', type=float, default=1., help='above 1: more noise at every step (default: 1)')
    add_diffusion('--zero-snr', action='store_true', help='let the last step be pure noise (not with --objective noise)')
    add_diffusion('--min-snr', type=float, metavar='GAMMA',
                  help='weigh steps by min(snr, GAMMA), 5 is usual (default: all alike)')
    add_diffusion('--offset-noise', type=float, default=0.,
                  help='share of noise that is one value per clip and channel (default: 0)')
    add_diffusion('--null-cond-prob', type=float, default=0.1, help='how often captions are dropped in training (default: 0.1)')
    add_diffusion('--noise-bias', type=float, default=3., help='above 1: train noisy steps more often, so that motion is learnt '
                  'much sooner (default: 3)')
    add_diffusion('--known-frames', type=float, default=0., metavar='SHARE', help='share of clips of which the network is told '
        'the first frames, or the first and the last, so that it learns to continue clips (default: 0)')
    add_diffusion('--images', action='store_true',
                  help='train on the png and jpg files of the folder too, as frames without motion')
    add_diffusion('--focus-present', type=float, default=0., help='share of clips trained as unrelated images (default: 0)')
    add('--flip', action='store_true', help='mirror half of the clips (not where captions say left and right)')
    add('--random-window', action='store_true', help='from clips longer than --num-frames take any part, not the first')
    add('--ema-decay', type=float, default=0.995, help='of the averaged weights (default: 0.995)')
    add('--max-grad-norm', type=float, default=1., help='(default: 1)')
    add('--amp', action='store_true', help='train in bf16 or fp16 where the hardware has it')
    add_diffusion('--compile', action='store_true', help='let torch.compile fuse the network: pays in long runs on a GPU')
    add_diffusion('--shard', action='store_true', help='each process of torchrun holds its share of the weights, their average '
                  'and the moments of Adam, for models that one device cannot hold (not with --compile)')
    add_diffusion('--checkpoint-activations', action='store_true',
                  help='compute every block again in the backward pass: less memory, more time')
    add('--sample-every', type=int, help=f'steps between checkpoints with samples {default("sample_every")}')
    add_diffusion('--sample-rows', type=int, default=4, help='samples per checkpoint: the square of this (default: 4)')
    add_diffusion('--sampler', default='ddpm', choices=tuple(SAMPLERS), help='of the samples (default: ddpm)')
    add_diffusion('--sample-steps', type=int, default=25, help='steps of the sampler (default: 25)')
    add_diffusion('--cond-scale', type=float, default=2., help='guidance of the samples towards their captions (default: 2)')
    add('--toy-clips', type=int, default=4000, help='clips of the toy world (default: 4000)')
    add_vae('--vae-kind', default='causal', choices=('causal', 'temporal'),
            help='temporal: only the decoder sees time, and time is not compressed (default: causal)')
    add_vae('--time-compression', type=int, help=f'1, 2, 4 or 8 {default("time_compression")}')
    add_vae('--latent-channels', type=int, help=default('latent_channels'))
    add_vae('--kl-weight', type=float, default=1e-6, help='(default: 1e-6)')
    add_vae('--perceptual', metavar='FILE', help='weights of VGG16, to compare its features too (default: do not)')
    add_vae('--disc-start', type=int, metavar='STEP', help='from here on a discriminator has a say (default: never)')
    add_vae('--image-share', type=float, default=0.1, help='of the batches are single frames (default: 0.1)')
    add_vae('--image-steps', type=int, help='of the first steps, which see nothing but single frames '
            f'{default("image_steps")[:-1]}, 0 with --init)')
    add_vae('--only-train-decoder', action='store_true', help='leave the encoder and its latents as they are')
    add_vae('--init', metavar='PATH', help='begin with the weights of CogVideoX: its 3d-vae.pt, or a folder of '
        'diffusers; sizes are taken from there (default: random weights)')
    add_vae('--ignore', nargs='+', default=[], metavar='PREFIX', help='with --init: leave the weights whose names begin '
        'so random (default: none)')
    add_vae('--context-parallel', type=int, default=1, help='processes that share the frames of a clip (default: 1)')
    add('--seed', type=int, default=1, help='(default: 1)')
    add('--strict', action='store_true', help='a damaged clip is an error, not a warning')
    add('--device', help='cpu, cuda, mps (default: the fastest there is)')
    args = parser.parse_args(argv)
    for action in groups['vae' if args.stage == 'diffusion' else 'diffusion']._group_actions:
        if getattr(args, action.dest) != action.default:
            raise ValueError(f'{action.option_strings[0]} has no meaning with --stage {args.stage}')
    if args.vae_kind == 'temporal' and (args.init or args.time_compression is not None):
        raise ValueError('--vae-kind temporal: it does not compress time, and --init reads causal VAEs only; leave '
                         '--time-compression and --init out')
    if args.init and (args.dim, args.dim_mults, args.time_compression, args.latent_channels) != (None,) * 4:
        raise ValueError('--init: the sizes of the VAE are those of its weights; leave --dim, --dim-mults, --time-compression '
                         'and --latent-channels out')
    if args.ignore and not args.init:
        raise ValueError('--ignore: names weights that --init is not to take over, and there is no --init')
    return args


def main() -> None:
    args = flags()
    keep_freed_memory()
    processes = distributed.init(device=args.device, context_parallel=args.context_parallel)
    fill_in_defaults(args, on_gpu=processes.device.type != 'cpu')
    if not args.resume and checkpoint.milestones(args.results):
        raise ValueError(f'{args.results} already holds a run: go on with it by --resume, or choose another --results')

    folder = ClipFolder(args.folder or toy_world(args, processes), CLIPS + IMAGES if args.images else CLIPS, args.strict)
    torch.manual_seed(args.seed)                                   # of the first weights; all else has generators of its own
    trainer = (vae_trainer if args.stage == 'vae' else diffusion_trainer)(args, folder, processes)
    if args.resume:
        trainer.load(-1)
    if args.stage == 'vae':
        trainer.train()
    else:
        trainer.train(prob_focus_present=args.focus_present)
        if trainer.step == args.steps and args.folder is None and args.low_res is None:
            grade_toy_world(args, trainer)
    if processes.is_main:
        report(args, trainer)
    distributed.close()


def fill_in_defaults(args: argparse.Namespace, on_gpu: bool) -> None:
    """What was not given depends on the device; the size of the clips only where we draw them."""
    args.results = args.results or ('results_vae' if args.stage == 'vae' else 'results')
    if args.init and args.image_steps is None:
        args.image_steps = 0                     # what these weights know about motion is to be kept
    if args.vae and not args.folder:
        args.image_size = args.image_size or 32  # small clips leave too little of a latent
    for name, values in DEFAULTS.items():
        depends_on_clips = args.folder is not None and name in ('image_size', 'num_frames')
        if getattr(args, name, None) is None and not depends_on_clips:
            setattr(args, name, values[on_gpu + 2 * (args.stage == 'vae')])
    if isinstance(args.image_size, list):
        if len(args.image_size) > 2:
            raise ValueError(f'--image-size {" ".join(map(str, args.image_size))}: give one number, or height and width')
        args.image_size = args.image_size[0] if len(args.image_size) == 1 else tuple(args.image_size)


def toy_world(args: argparse.Namespace, processes: distributed.Processes) -> Path:
    if not isinstance(args.image_size, int):
        raise ValueError(f'--image-size {" ".join(map(str, args.image_size))}: the toy world is square, so give one number')
    folder = Path(f'data/shapes-{args.image_size}' if args.stage == 'vae' or args.vae else 'data/shapes')
    return draw_toy_world(folder, args.toy_clips, args.image_size, args.num_frames, processes)


def clip_size(args: argparse.Namespace, folder: ClipFolder, multiple: int) -> tuple[int, int, int]:
    """Frames, height and width to train on: as the flags say, or like the clips."""
    frames, height, width = like_the_clips(folder, args.max_frames, args.max_size, multiple)
    if isinstance(args.image_size, int):
        height = width = args.image_size
    elif args.image_size is not None:
        height, width = args.image_size
    return args.num_frames or frames, height, width


def say_what_is_trained(size: tuple[int, int, int], model, processes: distributed.Processes) -> None:
    if processes.is_main:
        weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f'{size[0]} frames of {size[1]}x{size[2]}, {weights / 1e6:.1f} million weights, on {processes.device}')


def diffusion_trainer(args: argparse.Namespace, folder: ClipFolder, processes: distributed.Processes) -> Trainer:
    if args.cache_latents and not args.vae:
        raise ValueError('--cache-latents: there are latents only with a VAE, so give --vae too')
    if args.low_res is not None and (not args.vae or args.known_frames):
        raise ValueError('--low-res: clips are enlarged in latents, and the small clip comes where known frames would, so give '
                         '--vae too and leave --known-frames out')
    vae = vae_from_checkpoint(args.vae) if args.vae else None
    told = args.known_frames if args.low_res is None else 1.
    multiple = 2 ** (len(args.dim_mults) - 1) * (vae.space_compression if vae else 1)  # the U-Net halves frames so often
    frames, height, width = clip_size(args, folder, multiple)
    if vae and args.num_frames is None:
        frames = fitting_frames(frames, vae.time_compression)
    channels, *size = latent_shape(vae, frames, (height, width)) if vae else (args.channels, frames, height, width)
    captioned = not args.unconditional and folder.captions is not None
    encoder = WordEncoder() if captioned else None
    unet = Unet3D(args.dim, dim_mults=tuple(args.dim_mults), channels=channels,
                  attn_dim_head=args.attn_dim_head, use_sparse_linear_attn=args.linear_attention,
                  cond_dim=encoder.dim if encoder else None, cond_frames=told > 0,
                  checkpoint_activations=args.checkpoint_activations)
    diffusion = GaussianDiffusion(
        unet, image_size=tuple(size[1:]), num_frames=size[0], channels=channels, latents=vae is not None,
        timesteps=args.timesteps,
        loss_type=args.loss, objective=args.objective, text_encoder=encoder, schedule=args.schedule,
        schedule_shift=args.schedule_shift, zero_snr=args.zero_snr, min_snr_gamma=args.min_snr, offset_noise=args.offset_noise,
        prob_cond_frames=told)
    if vae:
        diffusion = LatentDiffusion(diffusion, vae, num_frames=frames, low_res=args.low_res)
    say_what_is_trained((frames, height, width), diffusion, processes)
    return Trainer(
        diffusion, folder, train_batch_size=args.batch_size, gradient_accumulate_every=args.accumulate,
        train_num_steps=args.steps, train_lr=args.lr, lr_schedule=lr_schedule.warmup_cosine(args.steps, args.warmup),
        max_grad_norm=args.max_grad_norm, amp=args.amp, null_cond_prob=args.null_cond_prob, noise_bias=args.noise_bias,
        ema_decay=args.ema_decay, ema_warmup=True, step_start_ema=0, update_ema_every=1,
        horizontal_flip=args.flip, random_window=args.random_window, strict=args.strict, images=args.images,
        save_and_sample_every=args.sample_every, num_sample_rows=args.sample_rows, results_folder=args.results,
        cond_scale=args.cond_scale, sampler=args.sampler, sample_steps=args.sample_steps, seed=args.seed,
        compile=args.compile, shard=args.shard,
        latent_cache=vae_folder(args.vae) / 'latents' if args.cache_latents else None, processes=processes)


def vae_folder(path: str) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent


def vae_trainer(args: argparse.Namespace, folder: ClipFolder, processes: distributed.Processes) -> VAETrainer:
    if args.init:
        source = causal_vae_from_sat(args.init) if Path(args.init).suffix == '.pt' else causal_vae_from_diffusers(args.init)
        vae = CausalVAE(**source.config)
        start_from(vae, source.state_dict(), args.ignore)
    else:
        groups = max(n for n in (32, 16, 8, 4, 2, 1) if args.dim // 2 % n == 0 or n == 1)  # of two channels or more
        widths = (args.channels, args.channels, args.latent_channels, args.dim, tuple(args.dim_mults))
        vae = (TemporalVAE(*widths, blocks_per_level=1, norm_groups=groups) if args.vae_kind == 'temporal' else
               CausalVAE(*widths, blocks_per_level=1, time_compression=args.time_compression, norm_groups=groups,
                         norm_scope='frame'))
    frames, height, width = clip_size(args, folder, multiple=vae.space_compression)
    if args.num_frames is None:
        frames = fitting_frames(frames, vae.time_compression)
    say_what_is_trained((frames, height, width), vae, processes)
    return VAETrainer(
        vae, folder, image_size=(height, width), num_frames=frames, loss=args.loss, kl_weight=args.kl_weight,
        perceptual=PerceptualLoss(args.perceptual, processes.device) if args.perceptual else None, disc_start=args.disc_start,
        image_share=args.image_share, image_steps=args.image_steps, only_train_decoder=args.only_train_decoder,
        ema_decay=args.ema_decay, train_batch_size=args.batch_size, gradient_accumulate_every=args.accumulate,
        train_num_steps=args.steps, train_lr=args.lr, lr_schedule=lr_schedule.warmup_cosine(args.steps, args.warmup),
        max_grad_norm=args.max_grad_norm, amp=args.amp, horizontal_flip=args.flip, random_window=args.random_window,
        strict=args.strict, save_and_sample_every=args.sample_every, results_folder=args.results, seed=args.seed,
        processes=processes)


def report(args: argparse.Namespace, trainer: Trainer | VAETrainer) -> None:
    results = trainer.results_folder
    print(f'checkpoints, samples and log.csv are in {results}{os.sep}, the newest checkpoint is '
          f'{checkpoint.newest(results).name}')
    if args.stage == 'vae':
        if trainer.measured:
            print(f'{len(trainer.held_out)} clips that it has not been trained on: {trainer.measured["psnr"]:.1f} dB PSNR, '
                  f'{trainer.measured["ssim"]:.3f} SSIM')
        print(f'to see what it makes of a clip: python sample.py {results} --reconstruct {trainer.held_out.paths[0]}')
    else:
        example = f' --prompt "{trainer.dataset.captions[0]}"' if trainer.use_captions else ''
        example += '' if args.low_res is None else ' --low-res small.gif'
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

#!/usr/bin/env python
"""Train a video diffusion model, or a video VAE.

    python train.py                      # on a toy world of moving shapes that it draws itself
    python train.py my_gifs/             # on your own GIFs, with captions (clip.txt beside clip.gif) or without
    python train.py my_films/ --fps 8 --clips-per-video 20 --random-window    # on mp4, webm, mov, mkv, avi (needs .[video])
    python train.py my_gifs/ --stage vae # first a VAE, whose latents are smaller than pixels
    python train.py my_gifs/ --vae results_vae/    # then a diffusion model in these latents
    python train.py --network dit        # a transformer in place of the U-Net
    python train.py my_gifs/ --resume    # go on where the run in --results stopped
    python train.py my_videos/ --model CogVideoX-2b/ --lora 128      # fine-tune a trained model by thin adapters, or all of it
    torchrun --nproc_per_node=4 train.py my_gifs/ --amp
    torchrun --nproc_per_node=4 train.py my_gifs/ --dim 256 --shard     # each process holds a quarter of the model
    torchrun --nproc_per_node=4 train.py my_gifs/ --stage vae --context-parallel 2
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch

from video_diffusion import (
    CausalVAE,
    DiT,
    GaussianDiffusion,
    LatentDiffusion,
    PerceptualLoss,
    TemporalVAE,
    Trainer,
    Unet3D,
    VAETrainer,
    WordEncoder,
    checkpoint,
    distributed,
    latent_shape,
    lr_schedule,
    shapes,
    vae_from_checkpoint,
    video_tensor_to_gif,
)
from video_diffusion.checks import number, whole
from video_diffusion.data.folder import CLIPS, IMAGES, ClipFolder, all_texts
from video_diffusion.diffusion.latent import diffusion_from_state
from video_diffusion.networks.text import word_rows
from video_diffusion.training.finetune import ADAM, begin_with, caches, recipe
from video_diffusion.training.flags import DEFAULTS, FLAGS, D, V, fill_in_defaults, refuse_idle_flags
from video_diffusion.training.memory import estimate
from video_diffusion.training.precision import be_deterministic
from video_diffusion.training.script import draw_toy_world, one_line_errors, parse
from video_diffusion.training.trainer import sample_many
from video_diffusion.training.vae_trainer import start_from
from video_diffusion.vae.frame_shares import fitting_frames
from video_diffusion.weights import causal_vae_from_diffusers, causal_vae_from_sat, cogvideox_defaults, cogvideox_from_folder
from video_diffusion.weights.cogvideox import INDEX


def main() -> None:
    args, given = parse(__doc__, FLAGS, DEFAULTS)
    refuse_idle_flags(args, given)
    if args.deterministic:
        be_deterministic()
    number('timeout', args.timeout, 0, 86400, above=0)
    processes = distributed.init(timedelta(seconds=args.timeout), args.device, args.context_parallel)
    processes.agree(vars(args))
    fill_in_defaults(args, given, on_gpu=processes.device.type != 'cpu')
    if not args.resume and checkpoint.milestones(args.results):
        raise ValueError(f'{args.results} already holds a run: go on with it by --resume, or choose another --results')

    whole('seed', args.seed, 0, 2 ** 63 - 1)
    folder = ClipFolder(args.folder or toy_world(args, processes), CLIPS + IMAGES if args.images else CLIPS, args.strict,
                        captions=args.stage == D and not args.unconditional)
    torch.manual_seed(args.seed)                                   # of the first weights; all else has generators of its own
    make = diffusion_trainer if args.model is None else fine_tuner
    trainer = vae_trainer(args, given, folder, processes) if args.stage == V else make(args, given, folder, processes)
    if args.resume:
        trainer.load(-1)
    if args.stage == V:
        trainer.train()
    else:
        trainer.train(prob_focus_present=args.focus_present)
        if trainer.step == args.steps and not trainer.stop.requested and args.folder is None and args.low_res is None:
            grade_toy_world(args, trainer)
    if processes.is_main:
        report(args, trainer)
    distributed.close()


def toy_world(args: argparse.Namespace, processes: distributed.Processes) -> Path:
    if not isinstance(args.image_size, int):
        raise ValueError(f'--image-size {" ".join(map(str, args.image_size))}: the toy world is square, so give one number')
    folder = Path(f'data/shapes-{args.image_size}')
    frames = (args.num_frames,)
    if args.frame_noise == 'independent':        # a model that goes on for ever learns from windows that begin anywhere, too
        folder, args.random_window = folder.with_name(f'{folder.name}-long'), True
        frames = args.num_frames, 3 * args.num_frames
    return draw_toy_world(folder, args.toy_clips, args.image_size, frames, processes)


def clip_size(args: argparse.Namespace, given: dict, folder: ClipFolder, multiple: int, vae=None) -> tuple[int, int, int]:
    """Frames, height and width to train on: as the flags say, or like the clips but not too large for a first run."""
    frames, height, width = folder.shape(args.fps)
    shrink = min(1., args.max_size / max(height, width))
    height, width = (max(multiple, round(side * shrink) // multiple * multiple) for side in (height, width))
    if isinstance(args.image_size, int):
        height = width = args.image_size
    elif args.image_size is not None:
        height, width = args.image_size
    if height % multiple or width % multiple or min(height, width) < 1:
        raise ValueError(f'--image-size {height} {width}: this model takes sides that are multiples of {multiple} '
                         f'({multiple}, {2 * multiple}, {3 * multiple}, ...)')
    frames = min(frames, args.max_frames) if args.num_frames is None else args.num_frames
    if vae and 'num_frames' not in given:
        frames = fitting_frames(frames, vae.time_compression)
    return frames, height, width


def say_what_is_trained(size: tuple[int, int, int], model, processes: distributed.Processes) -> None:
    if processes.is_main:
        weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f'{size[0]} frames of {size[1]}x{size[2]}, {weights / 1e6:.1f} million weights, on {processes.device}')


def diffusion_trainer(args: argparse.Namespace, given: dict, folder: ClipFolder, processes: distributed.Processes) -> Trainer:
    vae = vae_from_checkpoint(args.vae) if args.vae else None
    if vae and args.folder is None and vae.config['in_channels'] != 3:
        raise ValueError(f'{args.vae} is not a VAE of colours, by which the toy world is told apart: give a folder of your own')
    told = args.known_frames if args.low_res is None else 1.
    dit = args.network == 'dit'
    multiple = args.patch * (1 if dit else 2 ** (len(args.dim_mults) - 1))            # the U-Net halves frames so often
    multiple *= vae.space_compression if vae else 1
    frames, height, width = clip_size(args, given, folder, multiple, vae)
    if dit and not vae and args.num_frames is None:
        frames = max(1, frames // args.frame_patch) * args.frame_patch
    channels, *size = latent_shape(vae, frames, (height, width)) if vae else (args.channels, frames, height, width)
    size[0] += -size[0] % args.frame_patch if dit and vae else 0                      # see latent.py: the first is there twice
    captioned = folder.captions is not None
    if not captioned and given.keys() & {'cond_scale', 'null_cond_prob'}:
        raise ValueError('--cond-scale and --null-cond-prob are for captions, and there are none')
    encoder = WordEncoder() if captioned else None
    if args.frame_numbers is None:
        args.frame_numbers = frames_together(args) and bool(args.vae or args.quick)
    network = new_network(args, channels, encoder, folder.captions if captioned else [], cond_frames=told > 0)
    shift = schedule_shift(args, (frames, height, width), captioned)
    diffusion = GaussianDiffusion(
        network, image_size=tuple(size[1:]), num_frames=size[0], channels=channels, latents=vae is not None,
        timesteps=args.timesteps, loss_type=args.loss, objective=args.objective, text_encoder=encoder, schedule=args.schedule,
        schedule_shift=shift, zero_snr=args.zero_snr, offset_noise=args.offset_noise, prob_cond_frames=told,
        frame_noise=args.frame_noise, **step_weights(args, shift, captioned))
    if vae:
        diffusion = LatentDiffusion(diffusion, vae, num_frames=frames, low_res=args.low_res)
    say_what_is_trained((frames, height, width), diffusion, processes)
    choose_batch(args, given, diffusion, processes)
    if args.noise_bias is None:
        args.noise_bias = 2. if captioned else 1.
    places = caches(args.vae, diffusion, clips_change=False) if args.cache_latents else {}
    return trainer_of(args, diffusion, folder, processes, **places)


def schedule_shift(args: argparse.Namespace, size: tuple[int, int, int], captioned: bool) -> float:
    """Over many pixels noise averages out, so a larger clip needs more of it before only its caption can tell what it shows
    (Hoogeboom et al. 2023, arXiv 2301.11093). 16x16 is what the other settings were chosen at."""
    if args.schedule_shift is None:
        return max(1., size[1] * size[2] / 16 ** 2) if captioned and (not args.vae or frames_together(args)) else 1.
    return args.schedule_shift


def frames_together(args: argparse.Namespace) -> bool:
    """A U-Net whose frames share one noise. In latents these are few and far apart, so it has to be told which is the first."""
    return args.network == 'unet' and args.frame_noise == 'shared'


def step_weights(args: argparse.Namespace, shift: float, captioned: bool) -> dict:
    """See min_snr_weight in objective.py. A shifted schedule has the same steps at so many times less signal."""
    gamma, power = args.min_snr, args.min_snr_power
    measured = frames_together(args) and bool(args.vae or captioned)
    if gamma is None and measured and args.objective == 'x0' and args.loss == 'l2':
        gamma, default = (0.25 / shift, 0.5) if args.vae else (1 / shift, 0.25)
        power = default if power is None else power
    return dict(min_snr_gamma=gamma or None, min_snr_power=1. if power is None else power)


def trainer_of(args: argparse.Namespace, diffusion, folder: ClipFolder, processes: distributed.Processes, **more) -> Trainer:
    if args.cond_scale is None:                 # captions of windows say less than those of whole clips
        args.cond_scale = 2. if diffusion.frame_noise == 'independent' else 1.
    return Trainer(
        diffusion, folder, train_batch_size=args.batch_size, gradient_accumulate_every=args.accumulate,
        train_num_steps=args.steps, train_lr=args.lr, lr_schedule=lr_schedule.warmup_cosine(args.steps, args.warmup),
        max_grad_norm=args.max_grad_norm, amp=args.amp, null_cond_prob=args.null_cond_prob, noise_bias=args.noise_bias,
        muon_lr=args.muon_lr or None, ema_decay=args.ema_decay, ema_warmup=True, step_start_ema=0, update_ema_every=1,
        horizontal_flip=args.flip, random_window=args.random_window, strict=args.strict, images=args.images,
        fps=args.fps, clips_per_video=args.clips_per_video, held_out=args.held_out,
        save_and_sample_every=args.sample_every, num_sample_rows=args.sample_rows, results_folder=args.results,
        cond_scale=args.cond_scale if diffusion.denoise_fn.has_cond else 1., sampler=args.sampler, sample_steps=args.sample_steps,
        seed=args.seed, compile=args.compile, shard=args.shard, processes=processes, **more)


def fine_tuner(args: argparse.Namespace, given: dict, folder: ClipFolder, processes: distributed.Processes) -> Trainer:
    """A run that begins with a trained model: see finetune.py."""
    pretrained = (Path(args.model) / INDEX).is_file()
    if pretrained:
        size = (args.image_size, args.image_size) if isinstance(args.image_size, int) else args.image_size
        diffusion, how = cogvideox_from_folder(args.model, args.num_frames, size), cogvideox_defaults(args.model)
    else:
        if given.keys() & {'num_frames', 'image_size'}:
            raise ValueError(f'--num-frames and --image-size: clips are to be of the size that {args.model} was trained for')
        state = checkpoint.load_run(args.model)
        diffusion, how = diffusion_from_state(state), {'fps': state.get('fps'), **state.get('sampling', {})}
    usual = {flag.dest: flag.default for group in FLAGS.values() for flag in group}
    for name, value in recipe(pretrained, args.lora, how).items():
        if name not in given and getattr(args, name) == usual[name]:                  # nor is the run to be tiny
            setattr(args, name, value)
    args.amp = args.amp or pretrained and args.lora is None and processes.device.type != 'cpu'
    begin_with(diffusion, processes.device, args.lora, args.lora_alpha, args.checkpoint_activations or pretrained)
    say_what_is_trained((diffusion.num_frames, diffusion.height, diffusion.width), diffusion, processes)
    places = caches(args.model, diffusion, clips_change=args.flip or args.random_window)
    return trainer_of(args, diffusion, folder, processes, **places, **(ADAM if pretrained else {}))


def new_network(args: argparse.Namespace, channels: int, encoder: WordEncoder | None, captions: list[str], **how) -> Unet3D | DiT:
    how |= dict(cond_dim=encoder.dim if encoder else None, channels=channels, checkpoint_activations=args.checkpoint_activations)
    if args.network == 'dit':
        longest = max([8, *(len(word_rows(text, 1)) for text in all_texts(captions))])     # or there would be no room for some
        return DiT(args.dim, depth=args.depth, dim_head=args.attn_dim_head, patch=args.patch, frame_patch=args.frame_patch,
                   text_length=longest, **how)
    return Unet3D(args.dim, dim_mults=tuple(args.dim_mults), attn_heads=args.attn_heads, attn_dim_head=args.attn_dim_head,
                  use_sparse_linear_attn=args.linear_attention, patch=args.patch, frame_numbers=args.frame_numbers, **how)


def choose_batch(args: argparse.Namespace, given: dict, diffusion, processes: distributed.Processes) -> None:
    """Say what a step needs. A GPU that has no room for the default batch gets a part of it, and as many more passes in a step."""
    need, asked = estimate(diffusion, bool(args.muon_lr), processes.device), args.batch_size
    if processes.device.type == 'cuda' and 'batch_size' not in given:
        room = torch.cuda.mem_get_info(processes.device)[0]
        while processes.any(not need.fits(args.batch_size, room)):         # of all GPUs the one with least room decides
            args.batch_size //= 2
        if 'accumulate' not in given:
            args.accumulate = asked // args.batch_size
    if processes.is_main:
        print(need.words(args.batch_size))


def vae_trainer(args: argparse.Namespace, given: dict, folder: ClipFolder, processes: distributed.Processes) -> VAETrainer:
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
    frames, height, width = clip_size(args, given, folder, vae.space_compression, vae)
    say_what_is_trained((frames, height, width), vae, processes)
    return VAETrainer(
        vae, folder, image_size=(height, width), num_frames=frames, loss=args.loss, kl_weight=args.kl_weight,
        perceptual=PerceptualLoss(args.perceptual, processes.device) if args.perceptual else None, disc_start=args.disc_start,
        image_share=args.image_share, image_steps=args.image_steps, only_train_decoder=args.only_train_decoder,
        ema_decay=args.ema_decay, train_batch_size=args.batch_size, gradient_accumulate_every=args.accumulate,
        train_num_steps=args.steps, train_lr=args.lr, muon_lr=args.muon_lr or None,
        lr_schedule=lr_schedule.warmup_cosine(args.steps, args.warmup),
        max_grad_norm=args.max_grad_norm, amp=args.amp, horizontal_flip=args.flip, random_window=args.random_window,
        fps=args.fps, clips_per_video=args.clips_per_video, strict=args.strict,
        save_and_sample_every=args.sample_every, results_folder=args.results, seed=args.seed,
        processes=processes)


def report(args: argparse.Namespace, trainer: Trainer | VAETrainer) -> None:
    results = trainer.results_folder
    print(f'checkpoints, samples and log.csv are in {results}{os.sep}, the newest checkpoint is '
          f'{checkpoint.newest(results).name}')
    if args.stage == V:
        if trainer.measured:
            print(f'{len(trainer.held_out)} clips that it has not been trained on: {trainer.measured["psnr"]:.1f} dB PSNR, '
                  f'{trainer.measured["ssim"]:.3f} SSIM')
        print(f'to see what it makes of a clip: python sample.py {results} --reconstruct {trainer.held_out.paths[0]}')
    else:
        example = f' --prompt "{trainer.dataset.captions[0]}"' if trainer.use_captions else ''
        example += '' if args.low_res is None else ' --low-res small.gif'
        example += '' if trainer.asks_for != 'image_scale' else ' --image first.png'
        print(f'to sample from it: python sample.py {results if args.lora is None else f"{args.model} --lora {results}"}{example}')


def grade_toy_world(args: argparse.Namespace, trainer: Trainer) -> None:
    """Ask for 64 clips of the toy world and say how many obey its laws and their captions."""
    count = 64
    captions = shapes.captions()
    prompts = [captions[i * len(captions) // count] for i in range(count)] if trainer.use_captions else None
    with trainer.ema.average_parameters():
        videos = sample_many(trainer.diffusion, prompts, count, batch_size=args.batch_size, seed=args.seed + 1,
                             processes=trainer.processes, **trainer.sampling.changed())
    if trainer.processes.is_main:
        video_tensor_to_gif(videos, trainer.results_folder / 'graded.gif', scale=None)
        grades = shapes.grade_all(videos, prompts)
        print(f'grade of {count} clips: {grades["lawful"]:.0f}% lawful'
              + (f', {grades["caption_true"]:.0f}% caption-true, {grades["both"]:.0f}% both' if prompts else ''))


if __name__ == '__main__':
    with one_line_errors('train.py'):
        main()

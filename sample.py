#!/usr/bin/env python
"""Draw videos from a trained model, or see what a trained VAE makes of a clip.

    python sample.py results/ --prompt "a red circle moving left" --count 4
    python sample.py results/ --prompt "a red circle" --negative "moving up" --sampler dpm++2m --steps 20
    python sample.py results/model-3.pt --prompts-file prompts.txt --out samples/
    python sample.py results/ --prompt "a red circle moving left" --first-frames clip.gif --frames 32
    python sample.py results/ --prompt "a red circle moving left" --low-res small.gif
    torchrun --nproc_per_node=4 sample.py results/ --prompts-file prompts.txt
    python sample.py results_vae/ --reconstruct clip.gif

Everything about the model is read from the checkpoint; the averaged (EMA) weights are used. Writes one GIF per
video and one with all of them, tiled.
"""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from video_diffusion import GaussianDiffusion, checkpoint, distributed, video_tensor_to_gif
from video_diffusion.data.folder import read_clip
from video_diffusion.data.frames import resize_and_crop
from video_diffusion.diffusion.known_frames import WAYS
from video_diffusion.diffusion.latent import LatentDiffusion, diffusion_from_state
from video_diffusion.diffusion.samplers import SAMPLERS
from video_diffusion.training.script import keep_freed_memory, one_line_errors
from video_diffusion.training.trainer import sample_many
from video_diffusion.vae.frame_shares import fitting_frames
from video_diffusion.vae.metrics import psnr
from video_diffusion.vae.vae_checkpoint import vae_from_state


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('checkpoint', help='a results folder, whose newest checkpoint is taken, or a model-<number>.pt')
    add('--prompt', action='append', default=[], metavar='TEXT', help='what to draw; may be given several times')
    add('--prompts-file', help='a text file with one prompt per line')
    add('--count', type=int, help='videos per prompt (default: 1), or in all where there are no prompts (default: 4)')
    add('--cond-scale', type=float, help='guidance towards the prompt, 1 is none (default: as in training)')
    add('--negative', metavar='TEXT', help='what not to draw: guide away from this (default: from no prompt at all)')
    add('--guidance-rescale', type=float, metavar='SHARE', help='0 to 1: take back so much of the contrast that a large '
        '--cond-scale adds (default: 0)')
    add('--dynamic-guidance', type=float, metavar='EXPONENT', help='let guidance grow from 1 to 1 + --cond-scale, the later '
        'the larger the exponent, 5 in CogVideoX (default: the same at every step)')
    add('--sampler', choices=tuple(SAMPLERS), help='(default: as in training)')
    add('--steps', type=int, help='sampling steps (default: as in training)')
    add('--first-frames', '--image', metavar='FILE', help='a GIF or an image with which every video begins (default: none)')
    add('--low-res', metavar='FILE', help='the GIF that a model of train.py --low-res is to enlarge (default: none)')
    add('--known', type=int, metavar='N', help='so many frames of that file, its last ones (default: half as many as the '
        'model draws, or all there are)')
    add('--known-by', choices=WAYS, help='how the other frames are made to fit (default: network if it has been trained '
        'for that, else guide)')
    add('--frames', type=int, help='length of the videos, if longer than the clips of the '
        'training: drawn piece by piece (default: as those)')
    add('--later-cond-scale', type=float, help='--cond-scale after the first piece; 0 where prompts only say how a video '
        'begins (default: as --cond-scale)')
    add('--seed', type=int, default=0, help='(default: 0)')
    add('--reconstruct', metavar='CLIP', help='put this clip through a VAE, there and back')
    add('--out', default='samples', help='folder for the GIFs (default: samples)')
    add('--batch-size', type=int, default=16, help='videos drawn at once (default: 16)')
    add('--device', help='cpu, cuda, mps (default: the fastest there is)')
    return parser.parse_args(argv)


def main() -> None:
    args = flags()
    keep_freed_memory()
    processes = distributed.init(device=args.device)
    state = checkpoint.load_run(args.checkpoint)
    is_vae = 'vae' in state['config']
    if is_vae != bool(args.reconstruct):
        raise ValueError(f'{args.checkpoint} holds ' + ('a VAE: give it a clip with --reconstruct' if is_vae else
                         'a diffusion model: it draws, leave --reconstruct out'))
    if is_vae:
        reconstruct(vae_from_state(state).to(processes.device), args)
    else:
        draw(state, args, processes)
    distributed.close()


def draw(state: dict, args: argparse.Namespace, processes: distributed.Processes) -> None:
    diffusion = diffusion_from_state(state).to(processes.device)
    prompts = read_prompts(args, wanted=diffusion.denoise_fn.has_cond)
    count = len(prompts) if prompts else args.count or 4

    if args.later_cond_scale is not None and args.frames is None:
        raise ValueError('--later-cond-scale is for videos that are drawn piece by piece: give --frames too')
    given = dict(cond_scale=args.cond_scale, sampler=args.sampler, steps=args.steps, negative=args.negative,
                 guidance_rescale=args.guidance_rescale, dynamic_guidance=args.dynamic_guidance, known_by=args.known_by,
                 first_frames=read_first_frames(args, diffusion), low_res=read_low_res(args, diffusion), num_frames=args.frames,
                 later_cond_scale=args.later_cond_scale)
    sampling = {**state['sampling'], **{name: value for name, value in given.items() if value is not None}}
    videos = sample_many(diffusion, prompts, count, batch_size=args.batch_size, seed=args.seed, processes=processes,
                         **sampling)
    if processes.is_main:
        write(videos, prompts, Path(args.out))


@torch.no_grad()
def reconstruct(vae, args: argparse.Namespace) -> None:
    """The clip, cut to a size that fits the VAE, and what is left of it after the latents."""
    clip = read_clip(args.reconstruct, vae.config['in_channels'])                    # c f h w
    frames, height, width = clip.shape[1:]
    unit = vae.space_compression
    size = [max(unit, side // unit * unit) for side in (height, width)]
    clip = resize_and_crop(clip[:, :fitting_frames(frames, vae.time_compression)], size)
    video = clip[None].to(next(vae.parameters()).device).float() / 255
    z = vae.encode(video).mode()
    again = vae.decode(z, video.shape[2]).clamp(0, 1)
    out, name = Path(args.out), Path(args.reconstruct).stem
    video_tensor_to_gif(again[0], out / f'{name}.gif')
    video_tensor_to_gif(torch.cat([video, again, 0.5 + 4 * (again - video)], dim=-1)[0], out / f'{name}-compared.gif')
    print(f'{tuple(video.shape[1:])} -> latents {tuple(z.shape[1:])} -> {out / name}.gif, '
          f'{psnr(video, again).item():.1f} dB PSNR; beside the clip, with four times the difference: {out / name}-compared.gif')


def read_prompts(args: argparse.Namespace, wanted: bool) -> list[str] | None:
    """The prompts, each as often as --count says; None for a model that takes none."""
    prompts = list(args.prompt)
    if args.prompts_file:
        lines = Path(args.prompts_file).read_text(encoding='utf-8').splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if args.count is not None and args.count < 1:
        raise ValueError(f'--count {args.count}: give 1 or more')
    if wanted and not prompts:
        raise ValueError('this model was trained with captions: say what to draw with --prompt or --prompts-file')
    if not wanted and prompts:
        raise ValueError('this model was trained without captions: it draws what it likes, leave the prompts out')
    return [prompt for prompt in prompts for _ in range(args.count or 1)] or None


def read_first_frames(args: argparse.Namespace, diffusion: GaussianDiffusion | LatentDiffusion) -> Tensor | None:
    """The last frames of a file (1 c k h w), as the model sees clips: those that the videos begin with."""
    if args.first_frames is None:
        if args.known is not None or args.known_by is not None:
            raise ValueError('--known and --known-by say what to do with --first-frames: give that too')
        return None
    clip = read_clip(args.first_frames, diffusion.channels, size=(diffusion.height, diffusion.width))
    most = min(clip.shape[1], diffusion.num_frames - 1)
    lengths = diffusion.whole_lengths() if isinstance(diffusion, LatentDiffusion) else range(1, diffusion.num_frames)
    half = max((n for n in lengths if n <= min(most, diffusion.num_frames // 2)), default=1)
    known = half if args.known is None else args.known
    if not 1 <= known <= most:
        raise ValueError(f'--known {known}: {args.first_frames} has {clip.shape[1]} frames and the model draws '
                         f'{diffusion.num_frames}, so give 1 to {most}')
    return clip[None, :, -known:].float().to(diffusion.alpha.device) / 255


def read_low_res(args: argparse.Namespace, diffusion: GaussianDiffusion | LatentDiffusion) -> Tensor | None:
    """A small clip (1 c f h w), of the size that the model enlarges."""
    factor = getattr(diffusion, 'low_res', None)
    if (args.low_res is None) != (factor is None):
        raise ValueError(f'{args.checkpoint} ' + (f'enlarges clips {factor} times: give it one with --low-res' if factor else
                         'was not trained with --low-res: it has no use for a small clip'))
    if factor is None:
        return None
    clip = read_clip(args.low_res, diffusion.channels, size=(diffusion.height // factor, diffusion.width // factor))
    return clip[None, :, :diffusion.num_frames].float() / 255


def write(videos, prompts: list[str] | None, folder: Path) -> None:
    for i, video in enumerate(videos):
        words = '-' + re.sub(r'\W+', '-', prompts[i].lower()).strip('-')[:60] if prompts else ''
        video_tensor_to_gif(video, folder / f'{i:03d}{words}.gif')
    video_tensor_to_gif(videos, folder / 'all.gif')
    print(f'{len(videos)} videos are in {folder}, and all of them side by side in {folder / "all.gif"}')


if __name__ == '__main__':
    with one_line_errors('sample.py'):
        main()

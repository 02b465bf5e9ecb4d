#!/usr/bin/env python
"""Draw videos from a trained model, or see what a trained VAE makes of a clip.

    python sample.py results/ --prompt "a red circle moving left" --count 4
    python sample.py results/model-3.pt --prompts-file prompts.txt --out samples/
    torchrun --nproc_per_node=4 sample.py results/ --prompts-file prompts.txt
    python sample.py results_vae/ --reconstruct clip.gif

Everything about the model is read from the checkpoint; the averaged (EMA) weights are used. Writes one GIF per
video and one with all of them, tiled.
"""

import argparse
import re
from pathlib import Path

import torch

from video_diffusion import GaussianDiffusion, checkpoint, distributed, video_tensor_to_gif
from video_diffusion.dataset import resize_and_crop
from video_diffusion.frame_shares import fitting_frames
from video_diffusion.gif import read_frames
from video_diffusion.metrics import psnr
from video_diffusion.script import keep_freed_memory, one_line_errors
from video_diffusion.trainer import sample_many
from video_diffusion.vae_trainer import vae_from_state


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('checkpoint', help='a results folder, whose newest checkpoint is taken, or a model-<number>.pt')
    add('--prompt', action='append', default=[], metavar='TEXT', help='what to draw; may be given several times')
    add('--prompts-file', help='a text file with one prompt per line')
    add('--count', type=int, help='videos per prompt (default: 1), or in all where there are no prompts (default: 4)')
    add('--cond-scale', type=float, help='guidance towards the prompt, 1 is none (default: as in training)')
    add('--sampler', choices=('ddpm', 'ddim'), help='(default: as in training)')
    add('--steps', type=int, help='sampling steps (default: as in training)')
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
    diffusion = GaussianDiffusion.from_state(state).to(processes.device)
    prompts = read_prompts(args, wanted=diffusion.denoise_fn.has_cond)
    count = len(prompts) if prompts else args.count or 4

    given = dict(cond_scale=args.cond_scale, sampler=args.sampler, steps=args.steps)
    sampling = {**state['sampling'], **{name: value for name, value in given.items() if value is not None}}
    videos = sample_many(diffusion, prompts, count, batch_size=args.batch_size, seed=args.seed, processes=processes,
                         **sampling)
    if processes.is_main:
        write(videos, prompts, Path(args.out))


@torch.no_grad()
def reconstruct(vae, args: argparse.Namespace) -> None:
    """The clip, cut to a size that fits the VAE, and what is left of it after the latents."""
    clip = read_frames(args.reconstruct, vae.config['in_channels'])                    # c f h w
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


def write(videos, prompts: list[str] | None, folder: Path) -> None:
    for i, video in enumerate(videos):
        words = '-' + re.sub(r'\W+', '-', prompts[i].lower()).strip('-')[:60] if prompts else ''
        video_tensor_to_gif(video, folder / f'{i:03d}{words}.gif')
    video_tensor_to_gif(videos, folder / 'all.gif')
    print(f'{len(videos)} videos are in {folder}, and all of them side by side in {folder / "all.gif"}')


if __name__ == '__main__':
    with one_line_errors('sample.py'):
        main()

#!/usr/bin/env python
"""Draw videos from a trained model, or see what a trained VAE makes of a clip.

    python sample.py results/ --prompt "a red circle moving left" --count 4
    python sample.py results/ --prompt "a red circle" --negative "moving up" --sampler dpm++2m --steps 20
    python sample.py results/model-3.pt --prompts-file prompts.txt --out samples/
    python sample.py results/ --prompt "a red ball rolls => a red ball stops" --first-frames clip.gif --frames 128
    python sample.py results/ --prompt "a red circle moving left" --low-res small.gif
    torchrun --nproc_per_node=4 sample.py results/ --prompts-file prompts.txt
    python sample.py results_vae/ --reconstruct clip.gif
    python sample.py CogVideoX-2b/ --prompt "a panda plays the guitar under a tree, ..." --lora my_lora/ --lora-scale 0.8
    python sample.py CogVideoX-5b-I2V/ --prompts-file prompts.txt            # of lines like: a cat wakes up@@cat.png

Everything about the model is read from the checkpoint, whose averaged (EMA) weights are used, or from the folder of a pretrained
CogVideoX, drawn from as its authors do. Writes one GIF (or mp4) per video and one with all of them, tiled.
"""

import argparse
import re
import tempfile
from dataclasses import fields
from itertools import chain, count
from pathlib import Path

import torch
from torch import Tensor

from video_diffusion import GaussianDiffusion, LatentDiffusion, checkpoint, distributed, load_lora, samplers, scale_lora
from video_diffusion.data.folder import clip_shape, read_clip, write_clip
from video_diffusion.data.frames import check_request, resize_and_crop
from video_diffusion.data.mp4 import import_av
from video_diffusion.diffusion.known_frames import WAYS
from video_diffusion.diffusion.latent import diffusion_from_state
from video_diffusion.diffusion.offload import one_at_a_time
from video_diffusion.diffusion.sampling import Sampling
from video_diffusion.training.memory import keep_freed_memory
from video_diffusion.training.script import Flag, one_line_errors, parse
from video_diffusion.training.trainer import sample_many
from video_diffusion.vae.causal_vae import refuse_bad_pieces
from video_diffusion.vae.frame_shares import fitting_frames
from video_diffusion.vae.metrics import psnr
from video_diffusion.vae.vae_checkpoint import vae_from_state
from video_diffusion.weights import cogvideox_defaults, cogvideox_from_folder, lora_from_diffusers
from video_diffusion.weights.cogvideox import INDEX
from video_diffusion.weights.cogvideox_lora import FILE as LORA_FILE

FLAGS = {
    'what': [
        Flag('checkpoint', str, None, 'a results folder (its newest checkpoint is taken), a model-<n>.pt, or a CogVideoX folder'),
        Flag('--text-encoder', str, None, 'name or folder of the frozen text encoder that it was trained with', metavar='NAME'),
        Flag('--lora', str, None, 'adapters to put into it: a results folder of theirs, or a file of diffusers', metavar='PATH'),
        Flag('--lora-scale', float, 1., 'how much of their change to make'),
        Flag('--out', str, 'samples', 'folder for the videos', metavar='FOLDER'),
        Flag('--format', ('gif', 'mp4'), 'gif', 'of what is written; mp4, which CogVideoX writes by default, needs .[video]'),
        Flag('--fps', float, None, 'at which videos play [that of the training clips]', metavar='RATE'),
        Flag('--overwrite', bool, False, 'write over clips that are in --out; else new ones are numbered on'),
        Flag('--seed', int, 0, ''),
        Flag('--batch-size', int, 16, 'videos drawn at once; by CogVideoX one'),
        Flag('--tile', int, None, 'decode latents in tiles of so many pixels, a little apart from whole frames: less memory'),
        Flag('--offload', bool, False, 'on the device only what computes: the text encoder, then the network, then the VAE'),
        Flag('--device', str, None, 'cpu, cuda, mps [the fastest there is]', metavar='NAME'),
        Flag('--debug', bool, False, 'show where in the code an error comes from'),
    ],
    'prompts': [
        Flag('--prompt', str, None, 'what to draw; may be given several times', many='again', metavar='TEXT'),
        Flag('--prompts-file', str, None, 'a text file with one prompt per line, or prompt@@image', metavar='FILE'),
        Flag('--count', int, None, 'videos per prompt [1], or in all where there are no prompts [4]'),
        Flag('--negative', str, None, 'what not to draw: guide away from this, not from no prompt', metavar='TEXT'),
    ],
    'how (what is not given is as in training)': [
        Flag('--sampler', tuple(samplers.SAMPLERS), None, ''),
        Flag('--steps', int, None, 'steps of the sampler'),
        Flag('--spacing', samplers.SPACINGS, None, 'which of all: cosine is for three or five', metavar='NAME'),
        Flag('--cond-scale', float, None, 'guidance towards the prompt, 1 is none'),
        Flag('--guidance-rescale', float, None, '0 to 1: take back so much of the contrast that a large --cond-scale adds'),
        Flag('--dynamic-guidance', float, None, 'exponent: let guidance grow from 1 to 1 + --cond-scale, 5 in CogVideoX'),
        Flag('--wave-guidance', bool, False, 'let it jump about in between, as in the code of CogVideoX'),
    ],
    'from given frames on, and longer': [
        Flag('--first-frames', str, None, 'a clip or an image with which every video begins', metavar='FILE', alias='--image'),
        Flag('--known', int, None, 'so many frames of that file, its last ones [half of what the model draws, or all there are]'),
        Flag('--known-by', WAYS, None, 'how the other frames are made to fit [network if it was trained for that, else guide]'),
        Flag('--frames', int, None, 'length of the videos, if longer than in training: drawn piece by piece, by CogVideoX at once'),
        Flag('--image-size', int, None, 'height and width of videos, of CogVideoX only', many=True),
        Flag('--history-scale', float, None, 'how closely frames keep to known ones [1] (after --frame-noise independent)'),
        Flag('--later-prompt', str, None, '--prompt after the first piece: what it shows, not how it begins', metavar='TEXT'),
        Flag('--later-cond-scale', float, None, '--cond-scale after the first piece; 0 where prompts say how a video begins'),
    ],
    'other models': [
        Flag('--low-res', str, None, 'the clip that a model of train.py --low-res is to enlarge', metavar='FILE'),
        Flag('--reconstruct', str, None, 'put this clip, or its first --frames, through a VAE, there and back', metavar='CLIP'),
    ],
}
SETTINGS = {field.name for field in fields(Sampling)} | {'negative', 'later_cond_scale'}


def main() -> None:
    args, given = parse(__doc__, FLAGS, {})
    if args.checkpoint is None:
        raise ValueError('say which model: a results folder, or a checkpoint in it')
    keep_freed_memory()
    processes = distributed.init(device=args.device)
    pretrained = (Path(args.checkpoint) / INDEX).is_file()
    if args.steps is not None and not args.reconstruct:                # given, or because all is to be tiny
        given['steps'] = args.steps
    if pretrained:
        given = cogvideox_defaults(args.checkpoint) | dict(format='mp4', batch_size=1) | given
        if given['cond_scale'] in (0, 1) and args.negative is None:
            given['negative'] = None                               # '' is one too, and would need guidance
        args = argparse.Namespace(**vars(args) | given)
    state = {'config': {}} if pretrained else checkpoint.load_run(args.checkpoint)
    is_vae = 'vae' in state['config']
    if is_vae != bool(args.reconstruct):
        raise ValueError(f'{args.checkpoint} holds ' + ('a VAE: give it a clip with --reconstruct' if is_vae else
                         'a diffusion model: it draws, leave --reconstruct out'))
    check_request(fps=args.fps)                                    # now, not after an hour of drawing
    if args.format == 'mp4':
        import_av()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.out):                     # can it be written?
        pass
    if is_vae:
        idle = given.keys() - {'checkpoint', 'reconstruct', 'frames', 'out', 'format', 'fps', 'overwrite', 'device', 'debug'}
        if idle:
            raise ValueError(f'--{min(idle).replace("_", "-")} has no meaning with --reconstruct')
        if processes.is_main:                                          # one clip is not shared out
            reconstruct(vae_from_state(state).to(processes.device), args)
    else:
        draw(state, args, given, processes)
    distributed.close()


def draw(state: dict, args: argparse.Namespace, given: dict, processes: distributed.Processes) -> None:
    if state['config']:
        if args.image_size is not None:
            raise ValueError('--image-size is for CogVideoX: other models draw videos of the size that they were trained for')
        diffusion = diffusion_from_state(state, args.text_encoder)
    else:
        if args.text_encoder is not None:
            raise ValueError('--text-encoder is for checkpoints, in which there is none: this folder has its own')
        diffusion = cogvideox_from_folder(args.checkpoint, args.frames, args.image_size)
        args.frames = None                                         # it draws as many at once
        if processes.device.type == 'cpu':
            diffusion.float()                                      # most CPUs are slow at anything shorter
    if args.text_encoder is not None and not diffusion.denoise_fn.has_cond:
        raise ValueError('--text-encoder: this model was trained without captions, leave it out')
    if args.lora is None and 'lora_scale' in given:
        raise ValueError('--lora-scale says how much of what adapters change to make: give --lora too')
    if args.lora is not None:
        put_in_lora(diffusion, args.lora, args.lora_scale)
    if args.tile is not None and not isinstance(diffusion, LatentDiffusion):
        raise ValueError('--tile: this model draws pixels, and has no latents to decode')
    if args.tile is not None:
        refuse_bad_pieces(diffusion.vae, None, args.tile, 1)           # now, not after an hour of drawing
        diffusion.tile = args.tile
    one_at_a_time(diffusion, processes.device) if args.offload else diffusion.to(processes.device)
    prompts = read_prompts(args, wanted=diffusion.denoise_fn.has_cond)
    number = len(prompts) if prompts else args.count or 4
    more_frames = 'give --frames too' if state['config'] else 'CogVideoX draws all of its frames at once'
    for name in ('later_cond_scale', 'later_prompt'):
        if getattr(args, name) is not None and args.frames is None:
            raise ValueError(f'--{name.replace("_", "-")} is for videos that are drawn piece by piece: {more_frames}')
    settings = {**state.get('sampling', {}), **{name: given[name] for name in SETTINGS & given.keys()}}
    fps = state.get('fps')
    first_frames, low_res = read_first_frames(args, diffusion, fps), read_low_res(args, diffusion, fps)
    videos = sample_many(diffusion, in_turn(prompts, args, more_frames), number, batch_size=args.batch_size, seed=args.seed,
                         processes=processes, num_frames=args.frames, first_frames=first_frames, low_res=low_res, **settings)
    if processes.is_main:
        write(videos, prompts, args, fps=args.fps or state.get('fps', 1 / 0.12))


def put_in_lora(diffusion: GaussianDiffusion | LatentDiffusion, path: str, scale: float) -> None:
    if path.endswith('.safetensors') or (Path(path) / LORA_FILE).is_file():
        lora_from_diffusers(diffusion, path)
        scale_lora(diffusion, scale)
    else:
        load_lora(diffusion, path, scale)


@torch.no_grad()
def reconstruct(vae, args: argparse.Namespace) -> None:
    """The clip, cut to a size that fits the VAE, and what is left of it after the latents."""
    fps = args.fps or clip_shape(args.reconstruct)[1]
    clip = read_clip(args.reconstruct, vae.config['in_channels'], fps=args.fps, num_frames=args.frames)        # c f h w
    frames, height, width = clip.shape[1:]
    unit = vae.space_compression
    size = [max(unit, side // unit * unit) for side in (height, width)]
    clip = resize_and_crop(clip[:, :fitting_frames(frames, vae.time_compression)], size)
    video = clip[None].to(next(vae.parameters()).device).float() / 255
    z = vae.encode(video).mode()
    again = vae.decode(z, video.shape[2]).clamp(0, 1)
    stem = Path(args.out) / Path(args.reconstruct).stem
    numbered = ((f'{stem}-reconstructed{number}.{args.format}', f'{stem}-compared{number}.{args.format}')
                for number in chain([''], (f'-{i}' for i in count(2))))
    name, beside = next(names for names in numbered if args.overwrite or not any(Path(name).exists() for name in names))
    write_clip(again[0], name, fps)
    write_clip(torch.cat([video, again, 0.5 + 4 * (again - video)], dim=-1)[0], beside, fps, scale=None)
    print(f'{tuple(video.shape[1:])} -> latents {tuple(z.shape[1:])} -> {name}, {psnr(video, again).item():.1f} dB PSNR; '
          f'beside the clip, with four times the difference: {beside}')


def read_prompts(args: argparse.Namespace, wanted: bool) -> list[str] | None:
    """The prompts, each as often as --count says; None for a model that takes none. Of prompt@@image the images are what the
    videos begin with."""
    prompts = list(args.prompt or [])
    if args.prompts_file:
        try:
            lines = Path(args.prompts_file).read_text(encoding='utf-8-sig').splitlines()
        except UnicodeDecodeError:
            raise ValueError(f'{args.prompts_file} is not UTF-8: save the prompts as UTF-8 text') from None
        prompts += [line.strip() for line in lines if line.strip()]
    split = [prompt.partition('@@') for prompt in prompts]
    images = [image.strip() for _, _, image in split if image]
    if images and (args.first_frames or len(images) < len(prompts)):
        raise ValueError(f'{len(images)} of {len(prompts)} prompts say their image after @@: give all of them one, or all --image')
    args.first_frames = [image for image in images for _ in range(args.count or 1)] or args.first_frames
    prompts = [prompt.strip() for prompt, _, _ in split]
    if args.count is not None and args.count < 1:
        raise ValueError(f'--count {args.count}: give 1 or more')
    if wanted and not prompts:
        raise ValueError('this model was trained with captions: say what to draw with --prompt or --prompts-file')
    if not wanted and prompts:
        raise ValueError('this model was trained without captions: it draws what it likes, leave the prompts out')
    return [prompt for prompt in prompts for _ in range(args.count or 1)] or None


def in_turn(prompts: list[str] | None, args: argparse.Namespace, more_frames: str = 'give --frames too') -> list | None:
    """Prompts for long videos: of "first => next" a list of what happens one after the other; of --later-prompt one that has it
    from the second piece on."""
    if args.later_prompt is not None:
        if prompts is None or any('=>' in prompt for prompt in prompts):
            raise ValueError('--later-prompt follows a --prompt without =>: that says itself what happens in turn')
        return [[prompt, *[args.later_prompt] * args.frames] for prompt in prompts]      # there are no more pieces than frames
    if prompts is None or not any('=>' in prompt for prompt in prompts):
        return prompts
    if args.frames is None:
        raise ValueError(f'=> in a prompt is for videos that are drawn piece by piece: {more_frames}')
    return [[part.strip() for part in prompt.split('=>')] if '=>' in prompt else prompt for prompt in prompts]


def read_first_frames(args: argparse.Namespace, diffusion: GaussianDiffusion | LatentDiffusion, fps: float | None) -> Tensor | None:
    """The last frames of a file (1 c k h w), as the model sees clips, of its size and rate: those that the videos begin with."""
    if args.first_frames is None:
        if args.known is not None or args.known_by is not None:
            raise ValueError('--known and --known-by say what to do with --first-frames: give that too')
        return None
    if isinstance(args.first_frames, list):
        rows = [argparse.Namespace(**{**vars(args), 'first_frames': image}) for image in args.first_frames]
        clips = [read_first_frames(row, diffusion, fps) for row in rows]
        shortest = min(clip.shape[2] for clip in clips)            # all videos of a batch know as many frames
        return torch.cat([clip[:, :, -shortest:] for clip in clips])
    clip = read_clip(args.first_frames, diffusion.channels, fps=fps, size=(diffusion.height, diffusion.width))
    most = min(clip.shape[1], diffusion.num_frames - 1)
    half = max((n for n in diffusion.whole_lengths() if n <= min(most, diffusion.num_frames // 2)), default=1)
    known = half if args.known is None else args.known
    if not 1 <= known <= most:
        raise ValueError(f'--known {known}: {args.first_frames} has {clip.shape[1]} frames and the model draws '
                         f'{diffusion.num_frames}, so give 1 to {most}')
    return clip[None, :, -known:].float().to(diffusion.alpha.device) / 255


def read_low_res(args: argparse.Namespace, diffusion: GaussianDiffusion | LatentDiffusion, fps: float | None) -> Tensor | None:
    """A small clip (1 c f h w), of the size and rate that the model enlarges."""
    factor = getattr(diffusion, 'low_res', None)
    if (args.low_res is None) != (factor is None):
        raise ValueError(f'{args.checkpoint} ' + (f'enlarges clips {factor} times: give it one with --low-res' if factor else
                         'was not trained with --low-res: it has no use for a small clip'))
    if factor is None:
        return None
    clip = read_clip(args.low_res, diffusion.channels, fps=fps, size=(diffusion.height // factor, diffusion.width // factor))
    return clip[None, :, :diffusion.num_frames].float() / 255


def write(videos: Tensor, prompts: list[str] | None, args: argparse.Namespace, fps: float) -> None:
    folder, overwrite = Path(args.out), args.overwrite
    taken = [re.fullmatch(r'(\d{3}|[1-9]\d{3,})(-.*)?', path.stem) for path in folder.glob(f'*.{args.format}')]
    first = 0 if overwrite else max((int(match[1]) + 1 for match in taken if match), default=0)
    for i, video in enumerate(videos):
        words = '-' + re.sub(r'\W+', '-', prompts[i].lower()).strip('-')[:60] if prompts else ''
        write_clip(video, folder / f'{first + i:03d}{words}.{args.format}', fps)
    together = folder / (f'all.{args.format}' if first == 0 else f'all-from-{first:03d}.{args.format}')
    write_clip(videos, together, fps, scale=None)
    print(f'{len(videos)} videos are in {folder}, and all of them side by side in {together}')


if __name__ == '__main__':
    with one_line_errors('sample.py'):
        main()

"""The flags of train.py: one table, which is its help too, what a flag means that is not given, and what means nothing together."""

import argparse

from ..diffusion import samplers
from ..diffusion.noise_schedule import SCHEDULES
from ..diffusion.objective import LOSSES, OBJECTIVES
from .script import Flag

# What a flag means that is not given, where that depends on the device: (CPU, GPU), with --stage vae (CPU, GPU), and with
# --network dit (CPU, GPU) where that is not as for the U-Net. The CPU columns are for about ten minutes on the toy world, which the
# U-Net learns in that time; a transformer, to which nothing is near or far at first, needs far more clips.
DEFAULTS = {
    'image_size':       ((32, 32),               (32, 32), (16, 32)),      # of the toy world; yours keep theirs up to max_size
    'num_frames':       ((8, 8),                 (8, 8)),       # of the toy world; yours keep theirs up to max_frames
    'max_size':         ((32, 64),               (32, 128)),
    'max_frames':       ((8, 16),                (8, 17)),
    'dim':              ((24, 64),               (16, 64), (128, 384)),    # thin at first: there pixels are most
    'depth':            (None,                   None,     (6, 12)),
    'patch':            ((2, 2),                 None,     (4, 2)),        # 1 in latents, which are small as they are
    'frame_patch':      (None,                   None,     (2, 1)),
    'dim_mults':        (((1, 2, 4), (1, 2, 4)), ((1, 2), (1, 2, 4))),
    'attn_heads':       ((2, 4),                 None),
    'attn_dim_head':    ((16, 32),               None,     (32, 64)),
    'linear_attention': ((False, False),         None),
    'time_compression': (None,                   (1, 4)),       # on a CPU there is no time to learn it
    'latent_channels':  (None,                   (4, 4)),
    'batch_size':       ((8, 32),                (8, 16), (16, 32)),
    'objective':        (('x0', 'x0'),           None),         # of x0 the last steps of sampling are free of grain
    'lr':               ((2e-3, 2e-3),           (2e-3, 2e-4), (0.01, 5e-4)),
    'muon_lr':          ((0.01, 0.01),           (0.01, None), (0.04, None)),
    'steps':            ((1500, 4000),           (800, 20000), (2000, 10000)),
    'image_steps':      (None,                   (600, 5000)),
    'sample_every':     ((750, 1000),            (200, 1000), (1000, 1000)),
}
QUICK = dict(image_size=16, patch=1, dim=16, attn_heads=1, steps=1500)       # of pixels so few each is worth a look
D, V = 'diffusion', 'vae'        # flags that only one --stage knows
FLAGS = {
    'what': [
        Flag('folder', str, None, 'clips to train on; without it the toy world is drawn into data/'),
        Flag('--stage', (D, V), D, 'a diffusion model, or a VAE whose latents are smaller than pixels'),
        Flag('--results', str, None, 'where checkpoints, samples and the log go [results; vae results_vae]', metavar='FOLDER'),
        Flag('--resume', bool, False, 'go on from the newest checkpoint in --results'),
        Flag('--seed', int, 1, 'of weights, clips and noise'),
        Flag('--device', str, None, 'cpu, cuda, mps [the fastest there is]', metavar='NAME'),
        Flag('--debug', bool, False, 'show where in the code an error comes from'),
    ],
    'data': [
        Flag('--image-size', int, None, 'side, or height and width; clips of yours keep theirs, up to 32 | 64', many=True),
        Flag('--num-frames', int, None, 'frames per clip; clips of yours keep theirs, up to 8 | 16'),
        Flag('--channels', int, 3, '1 grey, 3 RGB, 4 RGBA'),
        Flag('--quick', bool, False, 'a toy world of 16x16, learnt in half of the time', D),
        Flag('--toy-clips', int, 4000, 'clips of the toy world'),
        Flag('--unconditional', bool, False, 'do not use the captions', D),
        Flag('--images', bool, False, 'train on png and jpg files of the folder too, as frames without motion', D),
        Flag('--flip', bool, False, 'mirror half of the clips (not where captions say left and right)'),
        Flag('--random-window', bool, False, 'from clips longer than --num-frames take any part, not the first'),
        Flag('--fps', float, None, 'frames per second, whatever the files have; those between are left out', metavar='RATE'),
        Flag('--clips-per-video', int, 1, 'each file counts as so many clips, from as many equal stretches of it'),
        Flag('--held-out', int, 0, 'clips never trained on: the loss on them, per noise level, is in log.csv', D),
        Flag('--strict', bool, False, 'a damaged clip is an error, not a warning'),
    ],
    'fine-tuning': [
        Flag('--model', str, None, 'begin with a trained one: a CogVideoX folder, or results of this library', D, metavar='PATH'),
        Flag('--lora', int, None, 'of its weights none learn, but thin matrices of this rank beside them', D, metavar='RANK'),
        Flag('--lora-alpha', float, None, 'how much these count for [as their rank]', D, metavar='ALPHA'),
    ],
    'network': [
        Flag('--network', ('unet', 'dit'), 'unet', 'a U-Net, or a transformer over patches of the clip', D),
        Flag('--dim', int, None, 'width of the first level, or of a token'),
        Flag('--depth', int, None, 'blocks of the transformer', D),
        Flag('--patch', int, None, 'side of the square of pixels that is one to the network', D),
        Flag('--frame-patch', int, None, 'and how many frames of it', D),
        Flag('--dim-mults', int, None, 'width of each level, in --dim', many=True),
        Flag('--attn-heads', int, None, 'heads of temporal attention', D),
        Flag('--attn-dim-head', int, None, 'width of a head', D),
        Flag('--linear-attention', 'switch', None, 'spatial linear attention at every level', D),
        Flag('--frame-numbers', 'switch', None, 'tell the U-Net which frame is the first [in latents, and with --quick]', D),
        Flag('--vae', str, None, 'a trained VAE, its results folder or a checkpoint: diffuse in its latents', D, metavar='RESULTS'),
        Flag('--cache-latents', bool, False, 'encode each clip once, into the folder latents/ beside the VAE', D),
        Flag('--low-res', int, None, 'with --vae: learn to enlarge clips so many times', D, metavar='FACTOR'),
    ],
    'diffusion': [
        Flag('--objective', OBJECTIVES, None, 'what the network predicts', D),
        Flag('--timesteps', int, 1000, 'diffusion steps', D),
        Flag('--schedule', tuple(SCHEDULES), 'cosine', f'how the noise grows: {", ".join(SCHEDULES)}', D, metavar='NAME'),
        Flag('--schedule-shift', float, None, 'above 1: more noise [with captions (side / 16) squared, else 1]', D),
        Flag('--zero-snr', bool, False, 'let the last step be pure noise (not with --objective noise)', D),
        Flag('--min-snr', float, None, 'weigh steps by min(snr, GAMMA); 5 is usual, 0: do not [1 / shift; latents 0.25 / shift]', D,
             metavar='GAMMA'),
        Flag('--min-snr-power', float, None, 'that to this power; 0.5: each step counts as much [0.25; latents 0.5]', D,
             metavar='POWER'),
        Flag('--offset-noise', float, 0., 'share of noise that is one value per clip and channel', D),
        Flag('--noise-bias', float, None, 'above 1: train noisy steps more often, where captions count [2, without captions 1]', D),
        Flag('--null-cond-prob', float, 0.1, 'how often captions are dropped in training', D),
        Flag('--frame-noise', ('shared', 'independent'), 'shared', 'shared, or independent: each frame has its own, to go on from '
             'frames', D, metavar='HOW'),
        Flag('--known-frames', float, 0., 'share of clips whose first frames the network is told, to go on from', D, metavar='P'),
        Flag('--focus-present', float, 0., 'share of clips trained as unrelated images', D),
    ],
    'training': [
        Flag('--steps', int, None, 'optimiser steps'),
        Flag('--batch-size', int, None, 'clips per forward pass of each process'),
        Flag('--accumulate', int, 1, 'forward passes per step'),
        Flag('--lr', float, None, 'learning rate of Adam, after --warmup steps'),
        Flag('--muon-lr', float, None, 'that of Muon, which trains the matrices; 0: Adam trains all'),
        Flag('--warmup', int, 50, 'steps of warm-up, before a cosine decay to zero'),
        Flag('--loss', tuple(LOSSES), 'l2', ''),
        Flag('--ema-decay', float, 0.995, 'of the averaged weights'),
        Flag('--max-grad-norm', float, 1., 'gradients are clipped at this norm'),
        Flag('--amp', bool, False, 'bf16 or fp16 where the hardware has it'),
        Flag('--deterministic', bool, False, 'the same numbers in every run on a GPU, by slower kernels; on a CPU they are anyway'),
        Flag('--compile', bool, False, 'let torch.compile fuse the network: pays in long runs on a GPU', D),
        Flag('--checkpoint-activations', bool, False, 'compute every block again in the backward pass: less memory', D),
    ],
    'samples': [
        Flag('--sample-every', int, None, 'steps between checkpoints with samples'),
        Flag('--sample-rows', int, 4, 'samples per checkpoint: the square of this', D),
        Flag('--sampler', tuple(samplers.SAMPLERS), 'ddpm', ', '.join(samplers.SAMPLERS), D, metavar='NAME'),
        Flag('--sample-steps', int, 16, 'steps of the sampler', D),
        Flag('--cond-scale', float, None, 'guidance towards captions [1, which is none; with --frame-noise independent 2]', D),
    ],
    'several devices (torchrun)': [
        Flag('--shard', bool, False, 'each process holds a share of the weights, for models that one device cannot hold', D),
        Flag('--context-parallel', int, 1, 'processes that share the frames of a clip', V),
        Flag('--timeout', float, 120., 'seconds to wait for a process that is silent; ten times as long while one draws or saves'),
    ],
    'VAE': [
        Flag('--vae-kind', ('causal', 'temporal'), 'causal', 'temporal: only the decoder sees time', V),
        Flag('--time-compression', int, None, '1, 2, 4 or 8', V),
        Flag('--latent-channels', int, None, '', V),
        Flag('--kl-weight', float, 1e-6, '', V),
        Flag('--perceptual', str, None, 'weights of VGG16, to compare its features too', V, metavar='FILE'),
        Flag('--disc-start', int, None, 'from here on a discriminator has a say', V, metavar='STEP'),
        Flag('--image-share', float, 0.1, 'of the batches are single frames', V),
        Flag('--image-steps', int, None, 'of the first steps, which see nothing but single frames; 0 with --init', V),
        Flag('--only-train-decoder', bool, False, 'leave the encoder and its latents as they are', V),
        Flag('--init', str, None, "begin with CogVideoX's weights: its 3d-vae.pt, or a folder of diffusers", V, metavar='PATH'),
        Flag('--ignore', str, (), 'with --init: leave the weights whose names begin so random', V, many=True, metavar='PREFIX'),
    ],
}


def refuse_idle_flags(args: argparse.Namespace, given: dict) -> None:
    """Flags that would do nothing beside the others."""
    for flag in (flag for group in FLAGS.values() for flag in group):
        if flag.dest in given and flag.only not in (None, args.stage):
            raise ValueError(f'{flag.name} has no meaning with --stage {args.stage}')
    of_unet = {'dim_mults', 'attn_heads', 'linear_attention', 'frame_numbers', 'focus_present', 'images', 'frame_noise'}
    of_dit = {'depth', 'frame_patch'}
    of_model = {flag.dest for flag in FLAGS['network'] + FLAGS['diffusion']} - {'null_cond_prob', 'noise_bias'}
    of_model |= {'channels', 'unconditional', 'images', 'loss'}
    idle, beside = given.keys() & (of_unet if args.network == 'dit' else of_dit), f'--network {args.network}'
    if args.model:
        idle, beside = given.keys() & of_model, '--model, which knows that itself'
    if idle:
        raise ValueError(f'--{min(idle).replace("_", "-")} has no meaning with {beside}')
    for idle, sentence in together(args, given):
        if idle:
            raise ValueError(sentence)


def together(args: argparse.Namespace, given: dict) -> list[tuple[bool, str]]:
    """What means nothing together: whether it was given, and what to say then."""
    sizes = {'channels', 'dim', 'dim_mults', 'time_compression', 'latent_channels'}
    return [
        (args.quick and (args.folder or args.vae or args.model or args.image_size or args.network == 'dit'), '--quick: it is a '
         'U-Net in a smaller toy world, so leave folders, --vae, --model, --image-size and --network out'),
        ('toy_clips' in given and args.folder, '--toy-clips: the toy world is drawn only where no folder is given'),
        ('channels' in given and args.vae, '--channels: with --vae they are those of the VAE'),
        ('seed' in given and args.resume, '--seed: a run that goes on keeps its own'),
        (args.channels != 3 and args.stage == D and not args.folder, f'--channels {args.channels}: the toy world is told apart by '
         'its colours; give a folder of your own, or leave it out'),
        (args.vae_kind == 'temporal' and (args.init or 'time_compression' in given), '--vae-kind temporal: it does not compress '
         'time, and --init reads causal VAEs only; leave --time-compression and --init out'),
        (args.init and sizes & given.keys(), '--init: the sizes of the VAE are those of its weights; leave --channels, --dim, '
         '--dim-mults, --time-compression and --latent-channels out'),
        (args.model and not args.folder, '--model: give a folder of clips to fine-tune on'),
        ((args.lora is not None or args.lora_alpha is not None) and not args.model, '--lora and --lora-alpha: adapters lie beside '
         'trained weights, so give --model too'),
        (args.lora_alpha is not None and args.lora is None, '--lora-alpha: it is the strength of adapters, so give --lora too'),
        (args.ignore and not args.init, '--ignore: names weights that --init is not to take over, and there is no --init'),
        (args.cache_latents and not args.vae, '--cache-latents: there are latents only with a VAE, so give --vae too'),
        (args.known_frames and args.frame_noise == 'independent', '--known-frames: with --frame-noise independent known frames are '
         'frames without noise, and need nothing more; leave it out'),
        (args.low_res is not None and (not args.vae or args.known_frames), '--low-res: clips are enlarged in latents, and the '
         'small clip comes where known frames would, so give --vae too and leave --known-frames out'),
    ]


def fill_in_defaults(args: argparse.Namespace, given: dict, on_gpu: bool) -> None:
    """What was not given depends on the device; the size of the clips only where we draw them."""
    args.results = args.results or ('results_vae' if args.stage == V else 'results')
    for name, value in QUICK.items() if args.quick else ():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ('image_steps', 'muon_lr') if args.init else ():         # what these weights know is to be kept: motion is learnt,
        if getattr(args, name) is None:                                  # and Muon turns every matrix by as much, whatever it knows
            setattr(args, name, 0)
    if args.vae and args.network == 'unet' and args.patch is None:
        args.patch = 1
    if 'sample_steps' not in given:
        args.sample_steps = min(args.sample_steps, max(1, args.timesteps))
    for name, columns in DEFAULTS.items() if args.model is None else ():         # a trained model has others: see fine_tuner
        depends_on_clips = args.folder is not None and name in ('image_size', 'num_frames')
        column = columns[2 if args.network == 'dit' and len(columns) > 2 else args.stage == V]
        if getattr(args, name, None) is None and column is not None and not depends_on_clips:
            setattr(args, name, column[on_gpu])
    if isinstance(args.image_size, list):
        if len(args.image_size) > 2:
            raise ValueError(f'--image-size {" ".join(map(str, args.image_size))}: give one number, or height and width')
        args.image_size = args.image_size[0] if len(args.image_size) == 1 else tuple(args.image_size)

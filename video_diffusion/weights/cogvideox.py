"""CogVideoX as a whole: a model folder becomes a LatentDiffusion that draws, and is written back.

    CogVideoX-2b/
        model_index.json         which parts there are
        tokenizer/               captions to numbers of words, 226 of them, \\
        text_encoder/            which T5 reads,                             |  LatentDiffusion
        transformer/             and the DiT follows                         |
        scheduler/               through the steps of a noise schedule       |
        vae/                     in the latents of a causal VAE             /

    >>> diffusion = cogvideox_from_folder('CogVideoX-2b').to('cuda')
    >>> how = cogvideox_defaults('CogVideoX-2b')                     # steps=50, cond_scale=6., negative='', fps=8., ...
    >>> fps = how.pop('fps')
    >>> video = diffusion.sample(['a panda plays the guitar'], **how)

What the authors' numbers are, and what no file says, is here: they decode latents by three frames and then by two, and norms of the
VAE see what is at hand, so that `chunk=2` is part of the model. Only an image is ever told to the models that take one, and 5%
of their training went without. Unconditional is here the caption '', as in diffusers; with `negative=None` no caption is
zeros, as in their own code (SAT), and in training.
"""

import json
from pathlib import Path

import torch

from .. import checkpoint
from ..diffusion.gaussian_diffusion import GaussianDiffusion
from ..diffusion.latent import LatentDiffusion
from ..networks.dit import DiT
from ..networks.text import T5Encoder
from ..vae.causal_vae import CausalVAE
from ..vae.frame_shares import latent_shape
from .cogvideox_dit import dit_from_diffusers, dit_from_sat, dit_to_diffusers
from .cogvideox_vae import causal_vae_from_diffusers, causal_vae_from_sat, causal_vae_to_diffusers
from .files import read_config, write_json

INDEX = 'model_index.json'
PARTS = 'tokenizer', 'text_encoder', 'transformer', 'scheduler', 'vae'
SAMPLERS = {'CogVideoXDDIMScheduler': 'ddim', 'CogVideoXDPMScheduler': 'dpm++2m_sde'}
OBJECTIVES = {'v_prediction': 'v', 'epsilon': 'noise', 'sample': 'x0'}
SCHEDULE = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012, 'trained_betas': None,
            'set_alpha_to_one': True, 'steps_offset': 0}


def cogvideox_from_folder(
    path: str | Path,
    num_frames: int | None = None,             # 1 + 8n; None: those that the folder says, 49 or 81
    image_size: tuple[int, int] | None = None,  # (height, width) in pixels, likewise
    image_scale: float | None = None,          # of the image's latents; None: as the folder says, see LatentDiffusion
) -> LatentDiffusion:
    """A folder as diffusers writes it. The transformer and T5 stay in the precision of their files, but T5 is never in fp16,
    which is too short for it."""
    path = whole_folder(path)
    schedule = read_schedule(path)
    dit = dit_from_diffusers(path / 'transformer')
    vae, kept = causal_vae_from_diffusers(path / 'vae'), read_config(path / 'vae', 'AutoencoderKLCogVideoX', {})
    scale = kept['scaling_factor']
    if dit.cond_frames and image_scale is None:
        image_scale = 1 / scale if kept.get('invert_scale_latents') else scale
    return assembled(dit, vae, path, scale, image_scale, num_frames, image_size, schedule_shift=schedule['snr_shift_scale'],
                     zero_snr=schedule['rescale_betas_zero_snr'], timesteps=schedule['num_train_timesteps'],
                     objective=OBJECTIVES[schedule['prediction_type']])


def cogvideox_from_sat(
    path: str | Path,                          # holds transformer/ and 3d-vae.pt, which may be in vae/
    text_encoder: str | Path,                  # the folder of T5
    num_frames: int | None = None,             # these two as above
    image_size: tuple[int, int] | None = None,
    **transformer,                             # positions, size, text_length: as for dit_from_sat
) -> LatentDiffusion:
    """The files of CogVideoX's own code, and the authors' numbers for them."""
    path = Path(path)
    dit = dit_from_sat(path / 'transformer', **transformer)
    vae = causal_vae_from_sat(next(path.glob('**/3d-vae.pt'), path / '3d-vae.pt'))
    small = dit.positions == 'sincos'
    scale = 1.15258426 if small else 0.7
    image_scale = None if not dit.cond_frames else 1. if dit.patch[0] == 2 else scale
    return assembled(dit, vae, text_encoder, scale, image_scale, num_frames, image_size, schedule_shift=3. if small else 1.)


def assembled(
    dit: DiT, vae: CausalVAE, text_encoder: str | Path, scale: float, image_scale: float | None, num_frames: int | None,
    image_size: tuple[int, int] | None, *, zero_snr: bool = True, objective: str = 'v', **schedule,
) -> LatentDiffusion:
    frames, *size = dit.size
    # What is written in 1.5-5B-I2V is the largest side that its positions allow, both ways.
    size = (96, 170) if size == [300, 300] else size
    num_frames = 1 + vae.time_compression * (frames - 1) if num_frames is None else num_frames
    image_size = tuple(vae.space_compression * side for side in size) if image_size is None else tuple(image_size)
    check_size(dit, vae, num_frames, image_size)
    channels, frames, *size = latent_shape(vae, num_frames, image_size)
    exact = dit.to_patches.weight.dtype == torch.float32
    encoder = T5Encoder(str(text_encoder), dtype='float32' if exact else 'bfloat16', length=dit.text_length)
    diffusion = GaussianDiffusion(
        dit, image_size=tuple(size), num_frames=frames + -frames % dit.patch[0], channels=channels, latents=True, loss_type='l2',
        text_encoder=encoder, schedule='scaled_linear', zero_snr=zero_snr, objective=objective,
        prob_cond_frames=0.95 if dit.cond_frames else 0., **schedule)
    return LatentDiffusion(diffusion, vae, scale, num_frames=num_frames, max_batch=1, chunk=2, image_scale=image_scale)


def check_size(dit: DiT, vae: CausalVAE, num_frames: int, image_size: tuple[int, int]) -> None:
    step = 2 * vae.time_compression            # chunks of two latent frames, after the first
    if num_frames < 1 or num_frames % step != 1:
        raise ValueError(f'num_frames={num_frames}: CogVideoX draws 1 + a multiple of {step} frames, so give '
                         f'{1 + step * max(1, round((num_frames - 1) / step))}')
    unit = vae.space_compression * dit.patch[1]
    if len(image_size) != 2 or any(side % unit or side < unit for side in image_size):
        raise ValueError(f'image_size={image_size}: give multiples of {unit} as height and width')
    native = tuple(vae.space_compression * side for side in dit.size[1:])
    longest = 1 + vae.time_compression * (dit.size[0] - 1)
    if dit.table is not None and (image_size != native or num_frames > longest):
        raise ValueError(f'{num_frames} frames of {image_size[0]}x{image_size[1]}: this model has a learned table of positions and '
                         f'draws up to {longest} frames of {native[0]}x{native[1]} only')


def cogvideox_defaults(path: str | Path) -> dict:
    """How the authors draw with the model of a folder: what to give to `sample`, and at how many frames per second to play it."""
    path = whole_folder(path)
    schedule = read_schedule(path)
    fps = 16. if read_config(path / 'transformer', 'CogVideoXTransformer3DModel', {}).get('patch_size_t') else 8.
    return dict(sampler=SAMPLERS[schedule['_class_name']], spacing=schedule['timestep_spacing'], steps=50, cond_scale=6.,
                negative='', fps=fps)


def read_schedule(path: Path) -> dict:
    return read_config(path / 'scheduler', '|'.join(SAMPLERS), SCHEDULE, 'scheduler_config.json')


def whole_folder(path: str | Path) -> Path:
    path = Path(path)
    missing = [name for name in (INDEX, *PARTS) if not (path / name).exists()]
    if missing:
        raise FileNotFoundError(f'{path} is no whole model: it has no {", no ".join(missing)}; download all of it')
    with checkpoint.blaming(path / INDEX):
        name = json.loads((path / INDEX).read_text())['_class_name']
        if name not in ('CogVideoXPipeline', 'CogVideoXImageToVideoPipeline'):
            raise ValueError(f'it describes a {name}: only a CogVideoXPipeline or CogVideoXImageToVideoPipeline can be read')
    return path


def cogvideox_to_folder(diffusion: LatentDiffusion, folder: str | Path, sampler: str = 'dpm++2m_sde') -> None:
    """For CogVideoXPipeline.from_pretrained, or CogVideoXImageToVideoPipeline's. `sampler`: 'ddim' is the other that it knows."""
    folder, own = Path(folder), diffusion.diffusion
    scale = float(str(diffusion.scale.cpu().numpy()))       # 0.7, and not 0.699999988
    encoder, told = own.text_encoder, diffusion.image_scale
    if told is not None and not any(abs(told / known - 1) < 1e-6 for known in (scale, 1 / scale)):
        raise ValueError(f'image_scale={told}: the folder can say {scale} or {1 / scale} only')
    kind = next(name for name, ours in SAMPLERS.items() if ours == sampler)
    dit_to_diffusers(own.denoise_fn, folder / 'transformer')
    causal_vae_to_diffusers(diffusion.vae, folder / 'vae', scale, invert_scale_latents=told is not None and told > scale)
    encoder.transformer.save_pretrained(folder / 'text_encoder')
    encoder.tokenizer.save_pretrained(folder / 'tokenizer')
    (folder / 'scheduler').mkdir(exist_ok=True)
    objective = next(name for name, ours in OBJECTIVES.items() if ours == own.objective)
    write_json(folder / 'scheduler' / 'scheduler_config.json', {
        '_class_name': kind, **SCHEDULE, 'num_train_timesteps': own.num_timesteps, 'prediction_type': objective,
        'rescale_betas_zero_snr': own.zero_snr, 'snr_shift_scale': own.schedule_shift, 'timestep_spacing': 'trailing'})
    write_json(folder / INDEX, {
        '_class_name': 'CogVideoXPipeline' if told is None else 'CogVideoXImageToVideoPipeline', 'scheduler': ['diffusers', kind],
        'tokenizer': ['transformers', type(encoder.tokenizer).__name__], 'text_encoder': ['transformers', 'T5EncoderModel'],
        'transformer': ['diffusers', 'CogVideoXTransformer3DModel'], 'vae': ['diffusers', 'AutoencoderKLCogVideoX']})

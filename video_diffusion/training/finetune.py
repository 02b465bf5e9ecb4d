"""Fine-tuning: a run that begins with a trained model instead of with noise.

    python train.py my_videos/ --model CogVideoX-2b/ --lora 128      adapters beside a frozen CogVideoX
    python train.py my_videos/ --model CogVideoX-2b/                 all of its weights
    python train.py my_gifs/ --model results/ --lora 8               a model of this library likewise

The step is that of any other run. What differs is what comes before it, and how large a step is:

- Clips and captions are encoded first, each once, to disk: a VAE and a T5 that are three times as large as CogVideoX-2B
  itself would otherwise work in every step on what never changes. A run that is stopped goes on with those that are missing,
  and then T5 leaves the memory.
- What does not learn may be held in half precision; what learns may not, for its steps are smaller than the gaps between
  such numbers. fp16 is made bf16, whose range needs no scaling of losses.
- All that a new network needs, more of the noisy steps and large learning rates, would ruin a trained one.

>>> begin_with(diffusion, torch.device('cuda'), rank=128)
>>> trainer = Trainer(diffusion, 'my_videos', **caches('CogVideoX-2b', diffusion, clips_change=False), weight_decay=1e-4, ...)
"""

from pathlib import Path

import torch

from ..checks import number
from ..diffusion.gaussian_diffusion import GaussianDiffusion
from ..diffusion.latent import LatentDiffusion
from ..networks.lora import add_lora
from ..networks.text import BertEncoder

# Flags of train.py for a run that begins with (CogVideoX or a model of ours, adapters or all weights). CogVideoX's own code takes
# a thousand steps for adapters, half as many for all weights, of 16 clips or more, and so small a rate for the latter. Its
# adapters are scaled by 1 / rank and learn at up to 1e-3; at scale 1, as here, that would be many times too much. None of these
# rates was tried here on more than tiny weights.
RECIPES = {
    ('CogVideoX', 'adapters'): dict(lr=1e-4, steps=1000, batch_size=1, accumulate=16, sample_every=250, sample_rows=1),
    ('CogVideoX', 'all'):      dict(lr=1e-5, steps=500, batch_size=1, accumulate=16, sample_every=250, sample_rows=1),
    ('ours', 'adapters'):      dict(lr=2e-3, steps=400, batch_size=8, sample_every=200),
    ('ours', 'all'):           dict(lr=2e-4, steps=400, batch_size=8, sample_every=200),
}
ADAM = dict(adam_betas=(0.9, 0.95), weight_decay=1e-4)       # as CogVideoX was trained


def recipe(is_cogvideox: bool, rank: int | None, how: dict) -> dict:
    """What the flags that are not given mean. `how` the model is drawn from, and its frames per second, as those of
    cogvideox_defaults or of a checkpoint: its own clips are to look like its training, and so are yours."""
    own = RECIPES['CogVideoX' if is_cogvideox else 'ours', 'all' if rank is None else 'adapters']
    names = dict(sampler='sampler', steps='sample_steps', cond_scale='cond_scale', fps='fps')
    return {**own, 'noise_bias': 1., **{names[name]: value for name, value in how.items() if name in names and value is not None}}


def begin_with(diffusion: GaussianDiffusion | LatentDiffusion, device: torch.device, rank: int | None = None,
               alpha: float | None = None, recompute: bool = False) -> None:
    """Make a trained model ready to learn: with a `rank` adapters beside its weights, else all of them. `recompute`: blocks, in
    the backward pass, which keep twenty times less."""
    network = diffusion.denoise_fn
    number('lora_alpha', alpha, above=0)
    if recompute:
        network.recompute_blocks()
    if rank is None or device.type == 'cpu':                 # most CPUs are slow at anything shorter
        diffusion.float()
    elif next(network.parameters()).dtype == torch.float16:
        network.bfloat16()
    if rank is not None:
        add_lora(diffusion, rank, alpha)


def caches(place: str | Path, diffusion: GaussianDiffusion | LatentDiffusion, clips_change: bool) -> dict:
    """Where in the folder of the model, or of its VAE, a Trainer keeps what the frozen parts say of clips and captions. Clips that
    are flipped, or cut anew each time, are encoded in every step."""
    place = Path(place) if Path(place).is_dir() else Path(place).parent
    clips = isinstance(diffusion, LatentDiffusion) and not clips_change
    captions = isinstance(diffusion.text_encoder, BertEncoder)
    return dict(latent_cache=place / 'latents' if clips else None, caption_cache=place / 'captions' if captions else None)

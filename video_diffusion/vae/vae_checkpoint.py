"""A trained VAE from what a VAETrainer saved, whichever of the two it is.

    vae = vae_from_checkpoint('results_vae')           # the averaged weights; the sizes are read from the file
"""

from pathlib import Path

from torch import nn

from .. import checkpoint
from .causal_vae import CausalVAE
from .temporal_vae import TemporalVAE

VAES = {'CausalVAE': CausalVAE, 'TemporalVAE': TemporalVAE}


def vae_config(vae: nn.Module) -> dict:
    """What a checkpoint says about a VAE."""
    if not hasattr(vae, 'encoder'):
        raise TypeError(f'vae is a {type(vae).__name__}, which has no encoder: give a VAE')
    return {'vae': type(vae).__name__, **vae.config}


def vae_from_config(config: dict) -> nn.Module:
    """An untrained VAE, from that."""
    config = dict(config)
    if config.get('vae') not in VAES:
        raise ValueError('the checkpoint holds no VAE, but a diffusion model: give that of a VAE (train.py --stage vae)')
    return VAES[config.pop('vae')](**config)


def vae_from_state(state: dict) -> nn.Module:
    """The trained VAE, with its averaged weights."""
    return checkpoint.rebuild(vae_from_config, state).eval()


def vae_from_checkpoint(path: str | Path) -> nn.Module:
    """The same from a checkpoint file, or from the newest one of a results folder."""
    return vae_from_state(checkpoint.load_run(path))

"""Read the causal VAE's weights from other projects: diffusers' folders and CogVideoX's own `3d-vae.pt`.

    vae = causal_vae_from_diffusers('CogVideoX-2b/vae')         # config.json and *.safetensors
    vae = causal_vae_from_sat('3d-vae.pt')                      # {'state_dict': ...}
    causal_vae_to_diffusers(vae, 'my-vae')                      # for AutoencoderKLCogVideoX.from_pretrained

The networks are the same, only the names differ; the two tables below are the whole translation.
"""

import re
from functools import partial
from pathlib import Path

from torch import Tensor

from .. import checkpoint
from ..vae.causal_vae import CausalVAE
from .files import read_config, read_safetensors, read_sat, renamed, write_pretrained

# Applied in this order to our name of a parameter; the first line is true of both projects.
SHARED = [
    (r'decoder\.(.*norm\w*)\.(weight|bias)$', r'decoder.\1.norm_layer.\2'),
    (r'\.gain\.', '.conv_y.conv.'),
    (r'\.offset\.', '.conv_b.conv.'),
    (r'\.(conv1|conv2|conv_in|conv_out)\.', r'.\1.conv.'),
]
TO_DIFFUSERS = SHARED + [
    (r'encoder\.levels\.(\d+)\.resample', r'encoder.down_blocks.\1.downsamplers.0'),
    (r'decoder\.levels\.(\d+)\.resample', r'decoder.up_blocks.\1.upsamplers.0'),
    (r'encoder\.levels\.(\d+)\.blocks', r'encoder.down_blocks.\1.resnets'),
    (r'decoder\.levels\.(\d+)\.blocks', r'decoder.up_blocks.\1.resnets'),
    (r'middle\.blocks', 'mid_block.resnets'),
    (r'\.shortcut\.', '.conv_shortcut.'),
]
TO_SAT = SHARED + [
    (r'encoder\.levels\.(\d+)\.resample', r'encoder.down.\1.downsample'),
    (r'decoder\.levels\.(\d+)\.resample', r'decoder.up.\1.upsample'),
    (r'encoder\.levels\.(\d+)\.blocks', r'encoder.down.\1.block'),
    (r'decoder\.levels\.(\d+)\.blocks', r'decoder.up.\1.block'),
    (r'middle\.blocks\.0', 'mid.block_1'),
    (r'middle\.blocks\.1', 'mid.block_2'),
    (r'\.shortcut\.', '.nin_shortcut.'),
]

# What diffusers' configuration may ask for and this network has in one form only.
FIXED = {'act_fn': 'silu', 'norm_eps': 1e-6, 'use_quant_conv': False, 'use_post_quant_conv': False}


def causal_vae_from_diffusers(path: str | Path) -> CausalVAE:
    """A folder, or one file in it, as written by `AutoencoderKLCogVideoX.save_pretrained`, sharded or not."""
    config = read_config(path, 'AutoencoderKLCogVideoX', FIXED)
    return checkpoint.build(vae_of_diffusers, config, read_safetensors(path), path, their_name=partial(renamed, table=TO_DIFFUSERS))


def vae_of_diffusers(config: dict) -> CausalVAE:
    channels = config['block_out_channels']
    return CausalVAE(
        in_channels=config['in_channels'], out_channels=config['out_channels'], latent_channels=config['latent_channels'],
        dim=channels[0], dim_mults=tuple(c / channels[0] for c in channels), blocks_per_level=config['layers_per_block'],
        norm_groups=config['norm_num_groups'], time_compression=int(config['temporal_compression_ratio']))


def causal_vae_to_diffusers(vae: CausalVAE, folder: str | Path, scaling_factor: float = 1.15258426, **more):
    """Writes config.json and the weights; `scaling_factor`, and more if there is any, is noted there for the diffusion model."""
    config = vae.config
    if config['dim_mults'][0] != 1 or config['norm_scope'] != 'clip':
        raise ValueError(f"dim_mults={config['dim_mults']}, norm_scope={config['norm_scope']!r}: diffusers' "
                         "network has the form dim_mults=(1, ...), norm_scope='clip' only")
    channels = [round(config['dim'] * mult) for mult in config['dim_mults']]
    state = {renamed(name, TO_DIFFUSERS): value for name, value in vae.state_dict().items()}
    write_pretrained(folder, state, {
        '_class_name': 'AutoencoderKLCogVideoX', **FIXED,
        'in_channels': config['in_channels'], 'out_channels': config['out_channels'],
        'latent_channels': config['latent_channels'], 'block_out_channels': channels,
        'down_block_types': ['CogVideoXDownBlock3D'] * len(channels), 'up_block_types': ['CogVideoXUpBlock3D'] * len(channels),
        'layers_per_block': config['blocks_per_level'], 'norm_num_groups': config['norm_groups'],
        'temporal_compression_ratio': config['time_compression'], 'scaling_factor': scaling_factor, **more,
    })


def causal_vae_from_sat(path: str | Path, time_compression: int = 4) -> CausalVAE:
    """CogVideoX's `3d-vae.pt`. Its configuration is read off the shapes, all but `time_compression`."""
    state = {name: value for name, value in read_sat(path, "CogVideoX's 3d-vae.pt").items() if not name.startswith('loss.')}
    with checkpoint.blaming(path):
        try:
            config = sat_config(state) | {'time_compression': time_compression}
        except KeyError as error:
            raise ValueError(f'it is not a causal VAE of CogVideoX: it has no {error}') from None
    their_name = partial(sat_name, levels=len(config['dim_mults']))
    return checkpoint.build(lambda config: CausalVAE(**config), config, state, path, their_name=their_name)


def sat_config(state: dict[str, Tensor]) -> dict:
    def count(pattern):
        return len({match[0] for name in state if (match := re.match(pattern, name))})
    dim, in_channels = state['encoder.conv_in.conv.weight'].shape[:2]
    levels = count(r'encoder\.down\.\d+\.')
    channels = [state[f'encoder.down.{i}.block.0.conv1.conv.weight'].shape[0] for i in range(levels)]
    return dict(
        in_channels=in_channels, out_channels=state['decoder.conv_out.conv.weight'].shape[0],
        latent_channels=state['decoder.conv_in.conv.weight'].shape[1], dim=dim,
        dim_mults=tuple(c / dim for c in channels), blocks_per_level=count(r'encoder\.down\.0\.block\.\d+\.'))


def sat_name(name: str, levels: int) -> str:
    """Its decoder counts levels from the finest, ours in the order in which they run."""
    name = re.sub(r'decoder\.levels\.(\d+)', lambda match: f'decoder.levels.{levels - 1 - int(match[1])}', name)
    return renamed(name, TO_SAT)

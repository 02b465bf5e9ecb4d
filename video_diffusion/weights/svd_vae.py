"""Read the weights of diffusers' `AutoencoderKLTemporalDecoder`, and write them back.

    vae = temporal_vae_from_diffusers('stable-video-diffusion/vae')     # config.json and *.safetensors
    temporal_vae_to_diffusers(vae, 'my-vae')

Names are translated by the table below. Two tensors differ in form: queries, keys and values are three layers there and
one here, and a temporal convolution's kernel, 3x1x1 there, has no last axis here (see TemporalConv).
"""

import re
from functools import partial
from pathlib import Path

from .. import checkpoint
from ..vae.temporal_vae import TemporalVAE
from .files import cut, joined, read_config, read_safetensors, renamed, write_pretrained

# Applied in this order to our name of a parameter.
TO_DIFFUSERS = [
    (r'decoder\.middle\.1\.spatial\.0', 'decoder.middle_attention'),
    (r'decoder\.middle\.1\.spatial\.1', 'decoder.middle.1.spatial'),
    (r'decoder\.middle\.(\d)', r'decoder.mid_block.resnets.\1'),
    (r'decoder\.levels\.(\d+)\.0\.spatial\.upsample', lambda m: f'decoder.up_blocks.{int(m[1]) - 1}.upsamplers.0.conv'),
    (r'decoder\.levels\.(\d+)\.', r'decoder.up_blocks.\1.resnets.'),
    (r'\.spatial\.', '.spatial_res_block.'),
    (r'\.temporal\.mix$', '.time_mixer.mix_factor'),
    (r'\.temporal\.', '.temporal_res_block.'),
    (r'encoder\.levels\.(\d+)\.blocks', r'encoder.down_blocks.\1.resnets'),
    (r'encoder\.levels\.(\d+)\.downsample', r'encoder.down_blocks.\1.downsamplers.0.conv'),
    (r'encoder\.middle1', 'encoder.mid_block.resnets.0'),
    (r'encoder\.middle2', 'encoder.mid_block.resnets.1'),
    (r'middle_attention', 'mid_block.attentions.0'),
    (r'attentions\.0\.to_qkv', 'attentions.0'),
    (r'attentions\.0\.norm', 'attentions.0.group_norm'),
    (r'attentions\.0\.to_out', 'attentions.0.to_out.0'),
    (r'encoder\.quant_conv', 'quant_conv'),
    (r'\.norm_out\.', '.conv_norm_out.'),
    (r'\.shortcut\.', '.conv_shortcut.'),
]
PIECES = [(r'.*\.attentions\.0', ('to_q', 'to_k', 'to_v'))]


def temporal_vae_from_diffusers(path: str | Path) -> TemporalVAE:
    """A folder, or one file in it, as written by `AutoencoderKLTemporalDecoder.save_pretrained`, sharded or not."""
    config = read_config(path, 'AutoencoderKLTemporalDecoder', {})
    state = read_safetensors(path)
    with checkpoint.blaming(path):
        # Its decoder creates these and never runs them: with one block per level the attention, with three the third.
        unused = r'decoder\.mid_block\.' + ('attentions' if config['layers_per_block'] == 1 else r'resnets\.([2-9]|\d\d)')
        state = {name: w.squeeze(-1) if w.ndim == 5 else w for name, w in state.items() if not re.match(unused, name)}
        state = joined(state, PIECES)
    return checkpoint.build(vae_of_diffusers, config, state, path, their_name=partial(renamed, table=TO_DIFFUSERS))


def vae_of_diffusers(config: dict) -> TemporalVAE:
    channels = config['block_out_channels']
    vae = TemporalVAE(
        in_channels=config['in_channels'], out_channels=config['out_channels'], latent_channels=config['latent_channels'],
        dim=channels[0], dim_mults=tuple(c / channels[0] for c in channels), blocks_per_level=config['layers_per_block'])
    vae.scaling_factor = float(config['scaling_factor'])
    return vae


def temporal_vae_to_diffusers(vae: TemporalVAE, folder: str | Path):
    """Writes config.json and the weights, for `AutoencoderKLTemporalDecoder.from_pretrained`."""
    config = vae.config
    if config['dim_mults'][0] != 1 or config['norm_groups'] != 32:
        raise ValueError(f"dim_mults={config['dim_mults']}, norm_groups={config['norm_groups']}: diffusers' network has the "
                         'form dim_mults=(1, ...), norm_groups=32 only')
    channels = [round(config['dim'] * mult) for mult in config['dim_mults']]
    state = {renamed(name, TO_DIFFUSERS): w.unsqueeze(-1) if w.shape[2:] == (3, 1) else w for name, w in vae.state_dict().items()}
    write_pretrained(folder, cut(state, PIECES), {
        '_class_name': 'AutoencoderKLTemporalDecoder',
        'in_channels': config['in_channels'], 'out_channels': config['out_channels'],
        'latent_channels': config['latent_channels'], 'block_out_channels': channels,
        'down_block_types': ['DownEncoderBlock2D'] * len(channels),
        'layers_per_block': config['blocks_per_level'], 'scaling_factor': vae.scaling_factor,
    })

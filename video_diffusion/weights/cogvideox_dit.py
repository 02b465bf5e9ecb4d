"""The transformer of CogVideoX: read from diffusers' folders and from the files of its own code (SAT), and written as either.

    dit = dit_from_diffusers('CogVideoX-2b/transformer')          # config.json and *.safetensors
    dit = dit_from_sat('sat/transformer')                         # latest, and <number>/mp_rank_00_model_states.pt
    dit_to_diffusers(dit, 'my-transformer')                       # for CogVideoXTransformer3DModel.from_pretrained
    dit_to_sat(dit, 'my-sat-transformer')

All three are one network under three sets of names, which the tables below translate. What we have as several layers the
others have as one, with the rows of ours below one another:

    ours                                  diffusers                 SAT
    to_q, to_k, to_v                      the same                  query_key_value
    what the norms are told, for          norm1.linear: video,      adaLN_modulations: video's of attention and feed-forward,
    text and for video, in each half      then text; norm2.linear   then the same of text
    from_patches                          a 2-D convolution, or with frame_patch=2 a Linear

A model is loaded in the file's dtype, and its weights stay in the file until they are looked at. One number differs: the last
norm's epsilon is 1e-5 in diffusers and 1e-6 in SAT, which makes for 2e-5 of difference in what comes out.
"""

import re
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from .. import checkpoint
from ..networks.dit import DiT
from ..networks.lora import lora_layers
from ..networks.positions import SPACING, rope, sincos
from .files import cut, joined, read_config, read_safetensors, read_sat, renamed, write_pretrained

# Applied in this order to our name of a parameter.
TO_DIFFUSERS = [
    (r'^from_patches', 'patch_embed.proj'),
    (r'^from_text', 'patch_embed.text_proj'),
    (r'^table$', 'patch_embed.pos_embedding'),
    (r'^(time|ofs)_mlp\.0', r'\1_embedding.linear_1'),
    (r'^(time|ofs)_mlp\.2', r'\1_embedding.linear_2'),
    (r'^norm\.', 'norm_final.'),
    (r'^final_norm', 'norm_out.norm'),
    (r'^final_modulation', 'norm_out.linear'),
    (r'^to_patches', 'proj_out'),
    (r'^blocks', 'transformer_blocks'),
    (r'\.attention_norm\.', '.norm1.'),
    (r'\.feed_forward_norm\.', '.norm2.'),
    (r'\.for_(video|text)\.', r'.linear.\1.'),
    (r'\.(to_q|to_k|to_v)\.', r'.attn1.\1.'),
    (r'\.to_out\.', '.attn1.to_out.0.'),
    (r'\.([qk])_norm\.', r'.attn1.norm_\1.'),
    (r'\.widen\.', '.ff.net.0.proj.'),
    (r'\.narrow\.', '.ff.net.2.'),
]
DIFFUSERS_PIECES = [(r'transformer_blocks\.\d+\.norm[12]\.linear', ('video', 'text'))]
TO_SAT = [
    (r'^from_patches', 'mixins.patch_embed.proj'),
    (r'^from_text', 'mixins.patch_embed.text_proj'),
    (r'^table$', 'mixins.pos_embed.pos_embedding'),
    (r'^(time|ofs)_mlp', r'\1_embed'),
    (r'^norm\.', 'transformer.final_layernorm.'),
    (r'^final_norm', 'mixins.final_layer.norm_final'),
    (r'^final_modulation', 'mixins.final_layer.adaLN_modulation.1'),
    (r'^to_patches', 'mixins.final_layer.linear'),
    (r'^blocks\.(\d+)\.(attention|feed_forward)_norm\.for_(video|text)', r'mixins.adaln_layer.adaLN_modulations.\1.1.\3_\2'),
    (r'^blocks\.(\d+)\.q_norm', r'mixins.adaln_layer.query_layernorm_list.\1'),
    (r'^blocks\.(\d+)\.k_norm', r'mixins.adaln_layer.key_layernorm_list.\1'),
    (r'^blocks', 'transformer.layers'),
    (r'\.attention_norm\.norm\.', '.input_layernorm.'),
    (r'\.feed_forward_norm\.norm\.', '.post_attention_layernorm.'),
    (r'\.to_([qkv])\.', r'.attention.query_key_value.\1.'),
    (r'\.to_out\.', '.attention.dense.'),
    (r'\.widen\.', '.mlp.dense_h_to_4h.'),
    (r'\.narrow\.', '.mlp.dense_4h_to_h.'),
]
SAT_PIECES = [
    (r'transformer\.layers\.\d+\.attention\.query_key_value', ('q', 'k', 'v')),
    (r'mixins\.adaln_layer\.adaLN_modulations\.\d+\.1',
     ('video_attention', 'video_feed_forward', 'text_attention', 'text_feed_forward')),
]
SAT_PREFIX = 'model.diffusion_model.'      # beside it, in files that training has left, the VAE and all of T5
SAT_UNUSED = r'mixins\.pos_embed\.freqs_(sin|cos)|transformer\.position_embeddings\.weight'       # computed, or never looked at
TABLE = 'mixins.pos_embed.pos_embedding'

# What diffusers' configuration may ask for and this network has in one form only.
FIXED = {
    'activation_fn': 'gelu-approximate', 'attention_bias': True, 'dropout': 0.0, 'flip_sin_to_cos': True, 'freq_shift': 0,
    'norm_elementwise_affine': True, 'norm_eps': 1e-5, 'spatial_interpolation_scale': SPACING, 'temporal_compression_ratio': 4,
    'temporal_interpolation_scale': 1.0, 'timestep_activation_fn': 'silu',
}
# What the files of the first models, which are older than these words, mean by leaving them out.
LATER = dict(use_rotary_positional_embeddings=False, use_learned_positional_embeddings=False, patch_size_t=None, ofs_embed_dim=None)


def dit_from_diffusers(path: str | Path) -> DiT:
    """A folder, or one file in it, as written by `CogVideoXTransformer3DModel.save_pretrained`, sharded or not."""
    config = read_config(path, 'CogVideoXTransformer3DModel', FIXED)
    with checkpoint.blaming(f'{path}: its config.json'):
        config = dit_config(config)
    return loaded(config, diffusers_pieces(read_safetensors(path)), diffusers_name, path)


def dit_to_diffusers(dit: DiT, folder: str | Path) -> None:
    """Writes config.json and the weights."""
    config = diffusers_config(dit)
    state = {diffusers_name(name): value for name, value in dit.state_dict().items()}
    write_pretrained(folder, joined(as_convolution(dit, state, 'patch_embed.proj.weight'), DIFFUSERS_PIECES), config)


def dit_from_sat(
    path: str | Path,                              # a file, or the folder with `latest`
    *,
    positions: str | None = None,                  # None: as the file looks, 'sincos' for a width of 1920
    size: tuple[int, int, int] | None = None,      # (f, h, w) of its clips, in latents; None: the published model's
    text_length: int = 226,                        # of version 1.5: 224
) -> DiT:
    """CogVideoX's own files. The rest of the configuration is read off the shapes. Where SAT has trained adapters, this is the
    base that they lie beside, and `lora_from_sat` reads those."""
    path = newest_sat(path)
    state = {name.removeprefix(SAT_PREFIX).replace('.original.', '.'): value
             for name, value in read_sat(path, 'mp_rank_00_model_states.pt').items()
             if name.startswith(SAT_PREFIX) and '.matrix_' not in name}
    try:
        config = sat_config(state, positions, size, text_length)
    except KeyError as error:
        raise ValueError(f'{path} is not a transformer of CogVideoX: it has no {SAT_PREFIX}{error.args[0]}') from None
    if config['positions'] == 'sincos':
        state.pop(TABLE, None)                     # a table of what can be computed
    state = {name: value for name, value in state.items() if not re.fullmatch(SAT_UNUSED, name)}
    return loaded(config, flat_patches(cut(state, SAT_PIECES), 'mixins.patch_embed.proj.weight'), sat_name, path)


def dit_to_sat(dit: DiT, folder: str | Path) -> None:
    """Writes `latest` and 1/mp_rank_00_model_states.pt, with the tables of positions that SAT keeps there."""
    needed_size(dit)
    state = {sat_name(name): value for name, value in dit.state_dict().items()}
    state = joined(as_convolution(dit, state, 'mixins.patch_embed.proj.weight'), SAT_PIECES)
    if dit.patch[0] == 1:                          # version 1.5 computes them
        grid, dtype = dit.grid(needed_size(dit)), dit.to_patches.weight.dtype
        if dit.positions == 'sincos':
            table = sincos(grid, dit.dim, dtype=dtype)
            state[TABLE] = torch.cat((table.new_zeros(dit.text_length, dit.dim), table))[None]
        else:
            angles = zip(('cos', 'sin'), rope(grid, dit.dim_head, dtype=dtype))
            state |= {f'mixins.pos_embed.freqs_{kind}': table for kind, table in angles}
    path = Path(folder) / '1' / 'mp_rank_00_model_states.pt'
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save({'module': {SAT_PREFIX + name: value.cpu() for name, value in state.items()}}, path)
    (Path(folder) / 'latest').write_text('1')


def loaded(config: dict, state: dict[str, Tensor], their_name: Callable[[str], str], path: str | Path) -> DiT:
    dit = checkpoint.build(lambda config: DiT(**config), config, state, path, their_name=their_name, as_they_are=True)
    if dit.table is not None:                      # of which diffusers makes float64, unless its model is cast
        dit.table.data = dit.table.data.to(dit.to_patches.weight.dtype)
    return dit


# Configurations

def dit_config(theirs: dict) -> dict:
    """Our arguments from those of diffusers' CogVideoXTransformer3DModel."""
    theirs = LATER | theirs
    channels, told = theirs['out_channels'], theirs['in_channels'] == 2 * theirs['out_channels']
    time_dim, ofs_dim = theirs['time_embed_dim'], theirs['ofs_embed_dim']
    if theirs['in_channels'] != (1 + told) * channels or ofs_dim not in (None, time_dim):
        raise ValueError(f"in_channels={theirs['in_channels']}, out_channels={channels}, ofs_embed_dim={ofs_dim}: only as many "
                         f'channels out as in, or half of them, and ofs_embed_dim=None or {time_dim} can be read')
    learned, turned = theirs['use_learned_positional_embeddings'], theirs['use_rotary_positional_embeddings']
    return dict(
        dim=theirs['num_attention_heads'] * theirs['attention_head_dim'], cond_dim=theirs['text_embed_dim'], channels=channels,
        depth=theirs['num_layers'], dim_head=theirs['attention_head_dim'], patch=theirs['patch_size'],
        frame_patch=theirs['patch_size_t'] or 1, positions='rope+learned' if learned else 'rope' if turned else 'sincos',
        text_length=theirs['max_text_seq_length'], time_dim=time_dim, cond_frames=told, ofs=ofs_dim is not None,
        size=((theirs['sample_frames'] - 1) // 4 + 1, theirs['sample_height'], theirs['sample_width']))


def diffusers_config(dit: DiT) -> dict:
    own, (frames, height, width) = dit.config, needed_size(dit)
    return {
        '_class_name': 'CogVideoXTransformer3DModel', **FIXED,
        'num_attention_heads': own['dim'] // own['dim_head'], 'attention_head_dim': own['dim_head'],
        'in_channels': own['channels'] * (1 + own['cond_frames']), 'out_channels': own['channels'],
        'time_embed_dim': own['time_dim'], 'ofs_embed_dim': own['time_dim'] if own['ofs'] else None,
        'text_embed_dim': own['cond_dim'], 'num_layers': own['depth'], 'max_text_seq_length': own['text_length'],
        'sample_frames': 4 * (frames - 1) + 1, 'sample_height': height, 'sample_width': width,
        'patch_size': own['patch'], 'patch_size_t': None if own['frame_patch'] == 1 else own['frame_patch'],
        'patch_bias': own['frame_patch'] == 1,     # of version 1.5 it says there is none; there is
        'use_rotary_positional_embeddings': own['positions'] != 'sincos',
        'use_learned_positional_embeddings': own['positions'] == 'rope+learned',
    }


def sat_config(state: dict[str, Tensor], positions: str | None, size: tuple[int, int, int] | None, text_length: int) -> dict:
    patches, text = state['mixins.patch_embed.proj.weight'], state['mixins.patch_embed.text_proj.weight']
    dim, frame_patch, ofs = len(patches), 1 if patches.ndim == 4 else 2, 'ofs_embed.0.weight' in state
    pixels = 4 * frame_patch
    channels = len(state['mixins.final_layer.linear.weight']) // pixels
    if positions is None:
        table, turned = TABLE in state, 'mixins.pos_embed.freqs_sin' in state
        positions = 'rope+learned' if table and turned else 'sincos' if table or dim == 1920 else 'rope'
    if size is None:
        size = (13, 60, 90) if frame_patch == 1 else (21, 300, 300) if ofs else (21, 96, 170)
    return dict(
        dim=dim, cond_dim=text.shape[1], channels=channels, depth=sum('.input_layernorm.weight' in name for name in state),
        dim_head=len(state['mixins.adaln_layer.query_layernorm_list.0.weight']), frame_patch=frame_patch, positions=positions,
        text_length=text_length, size=size, time_dim=len(state['time_embed.0.weight']), ofs=ofs,
        cond_frames=patches[0].numel() // pixels > channels, final_eps=1e-6)


def needed_size(dit: DiT) -> tuple[int, int, int]:
    """The size of its clips, if it is a network that the others can be."""
    if lora_layers(dit):
        raise ValueError('the network has adapters, for which these files have no place: write them with lora_to_diffusers, or '
                         'merge_lora and then remove_lora')
    if not dit.has_cond or dit.patch[1] != 2:
        raise ValueError(f'cond_dim={dit.cond_dim}, patch={dit.patch[1]}: CogVideoX reads text, and patches of 2')
    if dit.size is None:
        raise ValueError('the files say for which clips a model is made: build it with DiT(..., size=(frames, height, width))')
    return dit.size


# Names and forms

diffusers_name, sat_name = partial(renamed, table=TO_DIFFUSERS), partial(renamed, table=TO_SAT)


def diffusers_pieces(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return flat_patches(cut(state, DIFFUSERS_PIECES), 'patch_embed.proj.weight')


def flat_patches(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A convolution as wide as its stride is a Linear on the pixels of a patch, (dim c p q) -> (dim c*p*q)."""
    return state | {name: state[name].flatten(1)} if name in state else state


def as_convolution(dit: DiT, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return state | {name: state[name].unflatten(1, (-1, *dit.patch[1:]))} if dit.patch[0] == 1 else state


def newest_sat(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / 'latest').is_file():
        raise FileNotFoundError(f"{path} holds no file 'latest' with the number of a checkpoint: give the folder `transformer` of "
                                'CogVideoX, or a mp_rank_00_model_states.pt')
    return path / (path / 'latest').read_text().strip() / 'mp_rank_00_model_states.pt'

"""The weights of `video-diffusion-pytorch` 0.6, read and written.

A conversion is a table of names: the best map between two code bases. Where shapes differ, it is by axes
of size one, because the other project writes per-frame layers as 3-D convolutions.

    >>> unet = Unet3D(dim=64)
    >>> unet.load_state_dict(unet_from_lucidrains(torch.load('model-10.pt', weights_only=True)['ema']))
"""

import re

from torch import Tensor

# video-diffusion-pytorch 0.6: the tensors of one layer, theirs -> ours.
RESNET = {
    'mlp.1.weight': 'to_scale_shift.weight', 'mlp.1.bias': 'to_scale_shift.bias',
    'block1.proj.weight': 'block1.conv.weight', 'block1.proj.bias': 'block1.conv.bias',
    'block1.norm.weight': 'block1.norm.weight', 'block1.norm.bias': 'block1.norm.bias',
    'block2.proj.weight': 'block2.conv.weight', 'block2.proj.bias': 'block2.conv.bias',
    'block2.norm.weight': 'block2.norm.weight', 'block2.norm.bias': 'block2.norm.bias',
    'res_conv.weight': 'shortcut.weight', 'res_conv.bias': 'shortcut.bias',
}
ATTENTION = {
    'fn.norm.gamma': 'norm.gain',
    'fn.fn.fn.to_qkv.weight': 'to_qkv.weight', 'fn.fn.fn.to_out.weight': 'to_out.weight',
    'fn.fn.fn.rotary_emb.freqs': 'rotary.freqs',
}
LINEAR_ATTENTION = {
    'fn.norm.gamma': 'norm.gain',
    'fn.fn.to_qkv.weight': 'to_qkv.weight',
    'fn.fn.to_out.weight': 'to_out.weight', 'fn.fn.to_out.bias': 'to_out.bias',
}
LAYER = {'weight': 'weight', 'bias': 'bias'}

# ... and the layers of the network: theirs -> (ours, tensors).
UNET = {
    'init_conv': ('init_conv', LAYER),
    'init_temporal_attn': ('init_temporal_attention', ATTENTION),
    'time_rel_pos_bias': ('time_bias', {'relative_attention_bias.weight': 'bias.weight'}),
    'time_mlp.1': ('time_mlp.1', LAYER),
    'time_mlp.3': ('time_mlp.3', LAYER),
    'mid_block1': ('mid_block1', RESNET),
    'mid_spatial_attn': ('mid_spatial_attention', ATTENTION),
    'mid_temporal_attn': ('mid_temporal_attention', ATTENTION),
    'mid_block2': ('mid_block2', RESNET),
    'final_conv.0': ('final_block', RESNET),
    'final_conv.1': ('final_conv', LAYER),
}
LEVEL = {
    '{side}s.{i}.0': ('{side}s.{i}.block1', RESNET),
    '{side}s.{i}.1': ('{side}s.{i}.block2', RESNET),
    '{side}s.{i}.2': ('{side}s.{i}.spatial_attention', LINEAR_ATTENTION),
    '{side}s.{i}.3': ('{side}s.{i}.temporal_attention', ATTENTION),
    '{side}s.{i}.4': ('{side}samples.{i}', LAYER),
}

# By name, for a shape can mislead: a network with one output channel ends in a convolution of shape (1 c 1 1 1).
GAIN = r'.*\.norm\.gamma$'                                # (1 c 1 1 1) there, (c) here
LINEAR = r'(downs|ups)\.\d+\.2\.fn\.fn\.to_.*weight$'    # linear attention's 1 x 1 convolutions (o i 1 1), (o i) here


def unet_from_lucidrains(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Unet3D or GaussianDiffusion of `video-diffusion-pytorch` 0.6, for our `Unet3D.load_state_dict`."""
    if not isinstance(state_dict, dict):
        raise ValueError(f'{state_dict}: expected the state dict itself, as in unet_from_lucidrains(torch.load(path))')
    prefix = 'denoise_fn.'
    if any(name.startswith(prefix) for name in state_dict):  # a GaussianDiffusion: its schedule is not needed
        state_dict = {name[len(prefix):]: w for name, w in state_dict.items() if name.startswith(prefix)}
    names = unet_names(state_dict)
    unknown = sorted(set(state_dict) - set(names))
    if unknown:
        raise ValueError(f'not the weights of a Unet3D of video-diffusion-pytorch 0.6: it has no {", ".join(unknown)}')
    return {names[name]: squeeze(weight, name) for name, weight in state_dict.items()}


def unet_to_lucidrains(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of our Unet3D, for the `Unet3D.load_state_dict` of `video-diffusion-pytorch` 0.6."""
    names = {ours: theirs for theirs, ours in unet_names(state_dict).items()}
    unknown = sorted(set(state_dict) - set(names))
    if unknown:
        raise ValueError(f'not the weights of a Unet3D: it has no {", ".join(unknown)}')
    return {names[name]: unsqueeze(weight, names[name]) for name, weight in state_dict.items()}


def unet_names(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Every name a network with as many levels as this one can have, theirs -> ours."""
    layers = dict(UNET)
    levels = 1 + max((int(n) for name in state_dict for n in re.findall(r'^downs\.(\d+)\.', name)), default=-1)
    for side in ('down', 'up'):
        for i in range(levels):
            for theirs, (ours, tensors) in LEVEL.items():
                layers[theirs.format(side=side, i=i)] = ours.format(side=side, i=i), tensors
    names = {f'{theirs}.{a}': f'{ours}.{b}' for theirs, (ours, tensors) in layers.items() for a, b in tensors.items()}
    return {'null_cond_emb': 'null_cond', **names}


def squeeze(weight: Tensor, their_name: str) -> Tensor:
    if re.match(GAIN, their_name):
        return weight.flatten()
    if re.match(LINEAR, their_name):
        return weight.flatten(1)
    return weight.squeeze(2) if weight.ndim == 5 else weight      # a convolution frame by frame: (o i 1 k k), (o i k k) here


def unsqueeze(weight: Tensor, their_name: str) -> Tensor:
    if re.match(GAIN, their_name):
        return weight[None, :, None, None, None]
    if re.match(LINEAR, their_name):
        return weight[:, :, None, None]
    return weight.unsqueeze(2) if weight.ndim == 4 else weight

"""A LoRA run: what it saves, and what of it fits which base.

Beside a base of gigabytes adapters are small, and so are their checkpoints: adapters, their average and their moments, and of
the base nothing but a fingerprint. Adapters mean nothing beside any other weights than those they were trained with, so
whoever loads them is asked for just these.

    >>> add_lora(diffusion, rank=8)                       # see networks/lora.py
    >>> Trainer(diffusion, 'my_gifs', results_folder='results_lora').train()     # stops and goes on like any other
    >>> diffusion = diffusion_from_checkpoint('results')  # another day: the base
    >>> load_lora(diffusion, 'results_lora', scale=0.8)
"""

from pathlib import Path
from typing import Container, Iterable

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..networks.lora import adapt, lora_layers, scale_lora


class Learnt:
    """What training changes of a model with adapters: stands for the model where checkpoints are written and read."""

    def __init__(self, model: nn.Module):
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.weights.values()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(state[name])


def lora_config(model: nn.Module) -> dict | None:
    """What a checkpoint has to say of the adapters: which there are, and beside which base. None where there are none."""
    layers = lora_layers(model)
    if any(layer.unmerged is not None for layer in layers.values()):
        raise ValueError('adapters that are merged do not learn: call unmerge_lora first')
    adapters = {name: (layer.rank, layer.alpha) for name, layer in layers.items()}
    return {'layers': adapters, 'base': base_fingerprint(model, Learnt(model).weights)} if layers else None


def check_lora(mine: dict | None, stored: dict | None) -> None:
    """Refuse adapters of another kind than ours, and those of another base, beside which they mean nothing."""
    if (mine is None) != (stored is None):
        raise ValueError('the checkpoint holds ' + ('a whole model, and this run trains adapters beside one' if stored is None else
                         'adapters, and this model has none: call add_lora, or load_lora, on the base they were trained beside'))
    if mine is not None and mine['base'] != stored['base']:
        raise ValueError(f'these adapters were trained beside a base with the fingerprint {stored["base"]}, and this one has '
                         f'{mine["base"]}: give the very weights that their training began with')
    if mine is not None and mine['layers'] != stored['layers']:
        given, expected = (f'{len(layers)} of (rank, alpha) = {", ".join(map(str, sorted(set(layers.values()))))}'
                           for layers in (stored['layers'], mine['layers']))
        raise ValueError(f'the checkpoint holds other adapters than these: {given}, and not {expected}')


def load_lora(diffusion: nn.Module, path: str | Path, scale: float = 1.) -> None:
    """Put what a Trainer saved of a model with adapters, averaged, into its base. A results folder, or one checkpoint."""
    state = checkpoint.load_run(path)
    stored, average = state['config'].get('lora'), state['ema']['average']
    if stored is None:
        raise ValueError(f'{path} holds a whole model and no adapters: draw from it as it is')
    check_lora({**stored, 'base': base_fingerprint(diffusion, average)}, stored)
    adapt(diffusion, stored['layers'])
    diffusion.load_state_dict(average, strict=False)
    scale_lora(diffusion, scale)


def base_fingerprint(diffusion: nn.Module, learnt: Container[str]) -> str:
    """Of all weights but those: network and text encoder; a VAE has a fingerprint of its own. In bf16, so that a base is the
    same in whatever precision it is held."""
    weights = ((name, p.detach().bfloat16()) for name, p in diffusion.named_parameters()
               if name not in learnt and not name.startswith('vae.'))
    return checkpoint.fingerprint(weights)

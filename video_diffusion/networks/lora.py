"""LoRA: teach a trained network something new through two thin matrices beside each frozen one.

Fine-tuning changes a matrix W (out, in) by another one of its size. A change of low rank will do (Hu et al. 2021, arXiv
2106.09685), so W stays as it is and only the two factors of the change are trained:

    x ──── W (out, in), frozen ────────────────────── + ──> y = W x + (alpha / rank) B A x
      └─── A (rank, in) ─── * alpha / rank ─── B (out, rank) ───┘

A starts random and B at zero, so that a new adapter changes nothing. Adapters of rank 128 on the attention of CogVideoX-2B
are 59 million weights where the network has 1,694 million: that much less to average, to keep moments of and to save. Alpha
sets how strong the change is, whatever the rank.

    >>> add_lora(diffusion, rank=8)                       # freezes all else; then train as ever: see training/lora_run.py
    >>> scale_lora(diffusion, 0.8)                        # four fifths of the change that was learnt
    >>> merge_lora(diffusion); remove_lora(diffusion)     # for good: plain layers, whose weights include the change

The functions take a diffusion model, whose network gets the adapters, or any other module.
"""

import math
import re
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = 'to_q', 'to_k', 'to_v', 'to_kv', 'to_qkv', 'to_out'     # what the layers of attention are called in this library


class LoRALinear(nn.Linear):
    """Takes the place of a Linear and keeps its weights, under their names: a checkpoint of the base still fits."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)                          # not Linear's, which would make weights
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter('weight', layer.weight)
        self.register_parameter('bias', layer.bias)
        self.rank, self.alpha, self.strength = rank, alpha, 1.
        # However short the base's numbers are, the small steps of training need long ones.
        where = dict(device=layer.weight.device, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_buffer('unmerged', None, persistent=False)      # the base's weight, while ours holds the change too

    @property
    def scale(self) -> float:
        return self.strength * self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)                                                       # ... out
        if self.unmerged is not None:
            return y
        thin = F.linear(x, self.lora_A.to(x.dtype)) * self.scale                     # ... rank
        return y + F.linear(thin, self.lora_B.to(x.dtype))

    def whole_weight(self) -> Tensor:
        """What multiplies x, for attention that works on weights."""
        if self.unmerged is not None:
            return self.weight
        return self.weight + (self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        if self.unmerged is None:
            self.unmerged = self.weight.clone()
        self.weight.copy_(self.unmerged + self.scale * self.lora_B @ self.lora_A)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.unmerged is not None:
            self.weight.copy_(self.unmerged)              # a subtraction would not give back the last digit
            self.unmerged = None


def add_lora(model: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None) -> None:
    """Freeze `model` and put adapters beside the Linears whose names end in one of `targets`. None: all of attention, and
    alpha = rank."""
    refuse_adapters(model)
    if rank < 1 or rank != int(rank):
        raise ValueError(f'rank={rank}: give 1 or more')
    targets = [targets] if isinstance(targets, str) else targets
    linears = [name for name, module in network_of(model).named_modules() if type(module) is nn.Linear]
    found = {target: [name for name in linears if f'.{name}'.endswith(f'.{target}')] for target in targets or ATTENTION}
    if targets is None:
        found = {target: names for target, names in found.items() if names}
    missing = [target for target, names in found.items() if not names]
    if missing or not found:
        last_words = sorted({re.sub(r'.*\.(?=[a-z_])', '', name) for name in linears})      # to_out, or time_mlp.1
        raise ValueError(f'targets={missing or list(ATTENTION)}: no Linear of the {type(network_of(model)).__name__} is called so. '
                         f'It has {", ".join(last_words) or "none"}')
    chosen = {name for names in found.values() for name in names}
    adapt(model, {name: (rank, rank if alpha is None else alpha) for name in linears if name in chosen})


def adapt(model: nn.Module, layers: dict[str, tuple[int, float]]) -> None:
    """Freeze `model` and give each of these layers of its network an adapter of (rank, alpha)."""
    refuse_adapters(model)
    model.requires_grad_(False)
    for name, (rank, alpha) in layers.items():
        network_of(model).set_submodule(name, LoRALinear(network_of(model).get_submodule(name), rank, alpha))


def refuse_adapters(model: nn.Module) -> None:
    if lora_layers(model):
        raise ValueError(f'the {type(network_of(model)).__name__} has adapters already: take them off with remove_lora')


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Those of the network that have an adapter, by name."""
    return {name: module for name, module in network_of(model).named_modules() if isinstance(module, LoRALinear)}


def scale_lora(model: nn.Module, strength: float) -> None:
    """How much of the change to make: 1 is as trained, 0 none of it."""
    for layer in lora_layers(model).values():
        layer.strength = strength
        if layer.unmerged is not None:
            layer.merge()


def merge_lora(model: nn.Module) -> None:
    """Add the change to the weights themselves: as fast as without adapters, and the base is kept to go back to."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """The base's very weights again, with the adapters beside them."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove_lora(model: nn.Module) -> None:
    """Plain Linears again, frozen, with the weights that they have at this moment: of the base, or merged ones."""
    for name, layer in lora_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device='meta')
        plain.weight, plain.bias = layer.weight, layer.bias
        network_of(model).set_submodule(name, plain)


def network_of(model: nn.Module) -> nn.Module:
    """Of a diffusion model its network; anything else is one."""
    return getattr(model, 'denoise_fn', model)

"""LoRA files of CogVideoX, both ways: those of diffusers and peft, and those of its own code, SAT.

    lora_from_diffusers(dit, 'my-lora')          # a folder with pytorch_lora_weights.safetensors, or one such file
    lora_from_sat(dit, 'sat/lora')               # a checkpoint of SAT's training, of which this takes the adapters alone
    lora_to_diffusers(dit, 'my-lora')            # for CogVideoXPipeline.load_lora_weights
    lora_to_sat(dit, 'my-lora.pt')

What gets lost on the way is the scale, alpha / rank. A file of diffusers need not tell alpha: its readers then take alpha =
rank, and what was trained with alpha 1 and rank 128, as by SAT, comes out 128 times too strong. So what is written here has the
scale multiplied into B, which is right in every reader; and what is read has the alpha that is given, or that of its metadata.

A DiT is given, or the diffusion model around it, which is then frozen all over. The names are those of cogvideox_dit.py.
"""

import json
import re
from pathlib import Path
from typing import Callable

from torch import Tensor, nn

from .. import checkpoint
from ..networks.lora import adapt, lora_layers, network_of
from .cogvideox_dit import SAT_PREFIX, TO_DIFFUSERS, TO_SAT, newest_sat
from .files import read_sat, renamed, safetensors

FILE = 'pytorch_lora_weights.safetensors'
PARTS = [(r'\.q\.lora_(.)$', r'.matrix_\1.0'), (r'\.k\.lora_(.)$', r'.matrix_\1.1'), (r'\.v\.lora_(.)$', r'.matrix_\1.2'),
         (r'\.lora_(.)$', r'.matrix_\1.0')]      # SAT numbers what it has in one layer


def diffusers_name(name: str) -> str:
    """blocks.0.to_q.lora_A -> transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"""
    return 'transformer.' + renamed(name + '.weight', TO_DIFFUSERS)


def sat_name(name: str) -> str:
    """blocks.0.to_v.lora_A -> model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.2"""
    return SAT_PREFIX + renamed(renamed(name, TO_SAT), PARTS)


def lora_from_diffusers(model: nn.Module, path: str | Path, alpha: float | None = None) -> None:
    """Put the adapters of a file into a DiT. `alpha`: if the file does not say it, and it was not the rank."""
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    state = {'transformer.' + re.sub(r'^(base_model\.model\.)?(transformer\.)?', '', name): weight
             for name, weight in safetensors().load_file(path).items()}
    with safetensors().safe_open(path, 'pt') as file:
        settings = json.loads((file.metadata() or {}).get('lora_adapter_metadata', '{}'))
    odd = [name for name in ('alpha_pattern', 'use_rslora', 'use_dora') if settings.get(f'transformer.{name}')]
    if odd:
        raise ValueError(f'{path} was made with {", ".join(odd)}: only adapters whose scale is alpha / rank, with one alpha for '
                         'all, can be read')
    fill(model, state, diffusers_name, settings.get('transformer.lora_alpha') if alpha is None else alpha, path)


def lora_from_sat(model: nn.Module, path: str | Path, alpha: float = 1.) -> None:
    """Put the adapters of a checkpoint, which holds their base and more as well, into a DiT. SAT trains with alpha 1."""
    path = newest_sat(path)
    state = {name: weight for name, weight in read_sat(path, 'mp_rank_00_model_states.pt').items() if '.matrix_' in name}
    fill(model, state, sat_name, alpha, path)


def lora_to_diffusers(model: nn.Module, folder: str | Path) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    safetensors().save_file(adapters(model, diffusers_name), Path(folder) / FILE, metadata={'format': 'pt'})


def lora_to_sat(model: nn.Module, path: str | Path) -> None:
    checkpoint.save({'module': adapters(model, sat_name, alpha=1.)}, path)


def fill(model: nn.Module, state: dict[str, Tensor], their_name: Callable[[str], str], alpha: float | None, path: Path) -> None:
    """Strict: every tensor of the file is used, or an error says which one has no place here. alpha None: the rank."""
    network = network_of(model)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    ours = {their_name(f'{name}.lora_{letter}'): (name, letter) for name in layers for letter in 'AB'}
    unknown = [name for name in state if name not in ours] or ([] if state else ['no adapters'])
    if unknown:
        raise ValueError(f'{path} holds {unknown[0]}: expected adapters for layers of this {type(network).__name__}')
    found = {ours[name]: weight for name, weight in state.items()}
    ranks = {name: len(weight) for (name, letter), weight in found.items() if letter == 'A'}
    for name in {name for name, _ in found}:
        shapes = [tuple(found[name, letter].shape) for letter in 'AB' if (name, letter) in found]
        expected = [(ranks.get(name), layers[name].in_features), (layers[name].out_features, ranks.get(name))]
        if shapes != expected:
            raise ValueError(f'{path}: the adapter of {name} has shapes {shapes}, expected {expected}: it is of another model')
    adapt(model, {name: (rank, rank if alpha is None else alpha) for name, rank in ranks.items()})
    network.load_state_dict({f'{name}.lora_{letter}': weight for (name, letter), weight in found.items()}, strict=False)


def adapters(model: nn.Module, their_name: Callable[[str], str], alpha: float | None = None) -> dict[str, Tensor]:
    """A and B of each layer under their names, for a reader that has this alpha in mind; None: the rank."""
    state = {}
    for name, layer in lora_layers(model).items():
        if re.search(r'\.for_(text|video)$|from_patches$', name):
            raise ValueError(f'{name} has an adapter: in the files of CogVideoX it is no layer of its own, so none can be written')
        their_scale = 1. if alpha is None else alpha / layer.rank
        state[their_name(f'{name}.lora_A')] = layer.lora_A.detach().cpu().contiguous()
        state[their_name(f'{name}.lora_B')] = (layer.lora_B * (layer.scale / their_scale)).detach().cpu().contiguous()
    return state

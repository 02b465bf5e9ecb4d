"""LoRA files of CogVideoX, both ways: those of diffusers and peft, and those of its own code, SAT.

    lora_from_diffusers(dit, 'my-lora')          # a folder with pytorch_lora_weights.safetensors, or one such file
    lora_from_sat(dit, 'mp_rank_00_model_states.pt')
    lora_to_diffusers(dit, 'my-lora')            # for CogVideoXPipeline.load_lora_weights
    lora_to_sat(dit, 'my-lora.pt')

What gets lost on the way is the scale, alpha / rank. A file of diffusers need not tell alpha: its readers then take alpha =
rank, and what was trained with alpha 1 and rank 128, as by SAT, comes out 128 times too strong. So what is written here has the
scale multiplied into B, which is right in every reader; and what is read has the alpha that is given, or that of its metadata.
"""

import json
import re
from pathlib import Path

from torch import Tensor, nn

from .. import checkpoint
from ..networks.lora import adapt, lora_layers, network_of
from .cogvideox_vae import safetensors

FILE = 'pytorch_lora_weights.safetensors'
# Ours -> theirs, within block {0}; {1} is A or B.
TO_DIFFUSERS = {name: f'transformer.transformer_blocks.{{0}}.attn1.{theirs}.lora_{{1}}.weight'
                for name, theirs in dict(to_q='to_q', to_k='to_k', to_v='to_v', to_out='to_out.0').items()}
TO_SAT = {name: f'model.diffusion_model.transformer.layers.{{0}}.attention.{theirs}'
          for name, theirs in dict(to_q='query_key_value.matrix_{1}.0', to_k='query_key_value.matrix_{1}.1',
                                   to_v='query_key_value.matrix_{1}.2', to_out='dense.matrix_{1}.0').items()}


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
    fill(model, state, TO_DIFFUSERS, settings.get('transformer.lora_alpha') if alpha is None else alpha, path)


def lora_from_sat(model: nn.Module, path: str | Path, alpha: float = 1.) -> None:
    """Put the adapters of a checkpoint, which holds its base as well, into a DiT. SAT trains with alpha 1."""
    state = {name: weight for name, weight in checkpoint.load(path)['module'].items() if '.matrix_' in name}
    fill(model, state, TO_SAT, alpha, path)


def fill(model: nn.Module, state: dict[str, Tensor], table: dict[str, str], alpha: float | None, path: str | Path) -> None:
    """Strict: every tensor of the file is used, or an error says which one has no place here."""
    network = network_of(model)
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    names = {their_name(name, letter, table): (name, letter) for name in linears for letter in 'AB'}
    unknown = [name for name in state if name not in names] or ([] if state else ['nothing'])
    if unknown:
        raise ValueError(f'{path} holds {unknown[0]}, which is no adapter for the attention of this {type(network).__name__}')
    pairs = {names[name]: weight for name, weight in state.items()}
    ranks = {name: len(weight) for (name, letter), weight in pairs.items() if letter == 'A'}
    for name in {name for name, _ in pairs}:
        shapes = [tuple(pairs[name, letter].shape) for letter in 'AB' if (name, letter) in pairs]
        expected = [(ranks.get(name), linears[name].in_features), (linears[name].out_features, ranks.get(name))]
        if shapes != expected:
            raise ValueError(f'{path}: the adapter of {name} has shapes {shapes}, expected {expected}: it is of another model')
    adapt(model, {name: (rank, rank if alpha is None else alpha) for name, rank in ranks.items()})
    network.load_state_dict({f'{name}.lora_{letter}': weight for (name, letter), weight in pairs.items()}, strict=False)


def lora_to_diffusers(model: nn.Module, folder: str | Path) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    safetensors().save_file(renamed_adapters(model, TO_DIFFUSERS, alpha=None), Path(folder) / FILE, metadata={'format': 'pt'})


def lora_to_sat(model: nn.Module, path: str | Path) -> None:
    checkpoint.save({'module': renamed_adapters(model, TO_SAT, alpha=1.)}, path)


def renamed_adapters(model: nn.Module, table: dict[str, str], alpha: float | None) -> dict[str, Tensor]:
    """A and B of each layer, for a reader that has this alpha in mind; None: the rank."""
    state = {}
    for name, layer in lora_layers(model).items():
        if their_name(name, 'A', table) is None:
            raise ValueError(f'{name}: the files of CogVideoX have names for adapters of {", ".join(table)} in blocks only')
        their_scale = 1. if alpha is None else alpha / layer.rank
        state[their_name(name, 'A', table)] = layer.lora_A.detach().cpu().contiguous()
        state[their_name(name, 'B', table)] = (layer.lora_B * (layer.scale / their_scale)).detach().cpu().contiguous()
    return state


def their_name(name: str, letter: str, table: dict[str, str]) -> str | None:
    match = re.fullmatch(rf'blocks\.(\d+)\.({"|".join(table)})', name)
    return match and table[match[2]].format(match[1], letter)

"""Files of other projects: read safely, their tensors given our names, and written.

Nothing in a file is executed: safetensors, or `torch.load(weights_only=True)`. Tensors stay where they are, mapped from the
disk into memory page by page as they are looked at, so that what a file holds beside the weights costs nothing.

    >>> state = read_safetensors(path)
    >>> their_name = partial(renamed, table=TO_DIFFUSERS)
    >>> checkpoint.build(lambda config: DiT(**config), config, state, path, their_name=their_name, as_they_are=True)
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint

WEIGHTS = 'diffusion_pytorch_model'           # as diffusers calls them
Pieces = list[tuple[str, tuple[str, ...]]]    # layers (a pattern), and what the equal shares of their rows are called


def renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def cut(state: dict[str, Tensor], table: Pieces) -> dict[str, Tensor]:
    """What is one layer there and several here: `qkv.weight` -> `qkv.q.weight`, `qkv.k.weight`, ... Nothing is copied."""
    pieces = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition('.')
        parts = next((parts for pattern, parts in table if re.fullmatch(pattern, layer)), ())
        pieces |= {f'{layer}.{part}.{kind}': rows for part, rows in zip(parts, value.chunk(len(parts) or 1))} or {name: value}
    return pieces


def joined(pieces: dict[str, Tensor], table: Pieces) -> dict[str, Tensor]:
    """The other way round."""
    state = dict(pieces)
    for name in pieces:
        layer, _, kind = name.rpartition('.')
        layer, _, first = layer.rpartition('.')
        parts = next((parts for pattern, parts in table if parts[0] == first and re.fullmatch(pattern, layer)), ())
        if parts:
            state[f'{layer}.{kind}'] = torch.cat([state.pop(f'{layer}.{part}.{kind}') for part in parts])
    return state


def read_sat(path: str | Path, like: str) -> dict[str, Tensor]:
    """The state dict in a file of SwissArmyTransformer, with which CogVideoX is trained."""
    from numpy import dtype, ndarray
    from numpy._core.multiarray import _reconstruct
    # Training leaves the states of random generators in it, which are arrays of numpy. To make one, no more than this is needed.
    allowed = [_reconstruct, (_reconstruct, 'numpy.core.multiarray._reconstruct'), ndarray, dtype, type(dtype('uint32'))]
    with torch.serialization.safe_globals(allowed):
        saved = checkpoint.load(path, mmap=True)
    for key in ('module', 'model', 'state_dict'):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict) and all(isinstance(name, str) for name in saved[key]):
            return saved[key]
    raise ValueError(f"{path} holds no 'module', 'model' or 'state_dict': expected a file like {like}")


def safetensors():
    try:
        import safetensors.torch  # an extra: imported only where it is used
    except ImportError as error:
        raise ImportError('the files of diffusers need safetensors: pip install "video_diffusion[weights]"') from error
    return safetensors.torch


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    load_file = safetensors().load_file
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob('*.safetensors.index.json')) or sorted(path.glob('*.safetensors'))
    files = [file for file in files if file.name.startswith(f'{WEIGHTS}.safetensors')] or files      # beside half precision, say
    if len(files) != 1:
        raise FileNotFoundError(f'{path} holds {len(files)} .safetensors files, or indexes of such: give the path of one')
    if files[0].suffix == '.json':                       # sharded: the index says which files belong together
        index = files[0]
        with checkpoint.blaming(index):
            names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
            if odd := [name for name in names if Path(name).name != name or not name.endswith('.safetensors')]:
                raise ValueError(f'it names {odd[0]!r:.100}: expected .safetensors files, which must lie beside it')
        files = [index.parent / name for name in names]
    state = {}
    for file in files:
        with checkpoint.blaming(file):
            state |= load_file(file)
    return state


def read_config(path: str | Path, class_name: str, fixed: dict, name: str = 'config.json') -> dict:
    """The config.json that lies in a folder or beside a file; only what `class_name` and `fixed` say can be read."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'there is no file or folder {path}: nothing is fetched, so download it first')
    file = (path if path.is_dir() else path.parent) / name
    if not file.is_file():
        raise FileNotFoundError(f'{file.parent} holds no {name}: give the folder that save_pretrained wrote')
    with checkpoint.blaming(file):
        config = json.loads(file.read_text())
        other = {key: config[key] for key, value in fixed.items() if config.get(key, value) != value}
        if not re.fullmatch(class_name, str(config.get('_class_name'))) or other:
            raise ValueError(f"it describes {config.get('_class_name')} with {other}: only {class_name} with {fixed} can be read")
    return config


def write_pretrained(folder: str | Path, state: dict[str, Tensor], config: dict):
    save_file = safetensors().save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu().contiguous() for name, value in state.items()}
    # Under another name first: what is written may be mapped from the very file that it replaces.
    temporary = folder / f'{WEIGHTS}.safetensors.tmp'
    save_file(state, temporary, metadata={'format': 'pt'})
    temporary.replace(folder / f'{WEIGHTS}.safetensors')
    for older in (*folder.glob(f'{WEIGHTS}.safetensors.index.json'), *folder.glob(f'{WEIGHTS}-*-of-*.safetensors')):
        older.unlink()                                   # in shards: readers would take those first
    write_json(folder / 'config.json', config)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n')

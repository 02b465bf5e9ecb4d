"""Checkpoints that survive a crash in the middle of writing, and that run no code when read.

`save` writes to a temporary file beside the target, flushes it to the disk and renames it. A rename is all or
nothing, so under the target's name there is always one whole checkpoint, the old or the new one.

`load` uses `weights_only=True`: a file can hold tensors, numbers, strings, lists and dicts. An ordinary
pickle can hold instructions to execute, and would.
"""

import hashlib
import inspect
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Callable, Iterable

import torch
from torch import Tensor


def save(state: dict, path: str | Path) -> None:
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        temporary.unlink(missing_ok=True)
        kept = 'the previous one is intact' if path.exists() else 'earlier checkpoints are intact'
        raise OSError(f'cannot save the checkpoint {path}, {kept}: {first_line(error)}') from error


def load(path: str | Path, map_location: str | torch.device = 'cpu', mmap: bool = False) -> dict:
    """`mmap`: leave tensors on the disk until they are looked at."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {path}')
    try:
        return torch.load(path, map_location=map_location, weights_only=True,
                          mmap=mmap and zipfile.is_zipfile(path))      # files older than torch 1.6 are none
    except pickle.UnpicklingError as error:
        raise ValueError(f'{path} is refused: it holds more than weights and settings, which could run code '
                         'on this machine, or it is no checkpoint at all') from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f'{path} is not a checkpoint, or is damaged: {first_line(error)}') from error


def load_run(path: str | Path) -> dict:
    """What a Trainer saved: from one checkpoint file, or from the newest one of a results folder."""
    path = newest(path) if Path(path).is_dir() else Path(path)
    state = load(path)
    if not isinstance(state, dict) or not {'config', 'model', 'ema'} <= state.keys():
        raise ValueError(f'{path} was not written by this library. Weights of video-diffusion-pytorch can be read with '
                         'video_diffusion.weights.unet_from_lucidrains')
    return state


def same_settings(mine: dict | None, stored: dict | None, constructor: Callable) -> bool:
    """Whether two sets of arguments build the same thing. Those that a checkpoint is too old to know had their defaults."""
    defaults = {name: p.default for name, p in inspect.signature(constructor).parameters.items()}
    return (mine and {**defaults, **mine}) == (stored and {**defaults, **stored})


def fingerprint(weights: Iterable[tuple[str, Tensor]], settings: object = ()) -> str:
    """Changes when any of these weights does, or its name, or the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def milestones(folder: str | Path) -> dict[int, Path]:
    """The checkpoints `model-<milestone>.pt` of a results folder, in order."""
    found = {}
    for path in Path(folder).glob('model-*.pt'):
        number = re.fullmatch(r'model-(\d+)\.pt', path.name)
        if number:
            found[int(number[1])] = path
    return dict(sorted(found.items()))


def newest(folder: str | Path) -> Path:
    """The checkpoint of the highest milestone in a results folder."""
    found = milestones(folder)
    if not found:
        raise FileNotFoundError(f'there is no checkpoint in {folder}: looked for model-<number>.pt')
    return found[max(found)]


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

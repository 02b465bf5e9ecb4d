"""Checkpoints that survive a crash in the middle of writing, and that do no harm when read.

`save` writes to a temporary file beside the target, flushes it to the disk and renames it. A rename is all or
nothing, so under the target's name there is always one whole checkpoint, the old or the new one.

`load` uses `weights_only=True`: a file can hold tensors, numbers, strings, lists and dicts. An ordinary
pickle can hold instructions to execute, and would.

`build` makes a module from the settings and weights of a file, and believes neither. A config of one line can ask
for 10^12 channels, so the module is first made on PyTorch's `meta` device, where tensors have a shape and no numbers:

    config ---> module of shapes  --- does each fit the tensor that is there? --->  module with these tensors' numbers

Whatever is wrong with a file, the answer is one ValueError of one sentence.
"""

import hashlib
import inspect
import os
import pickle
import re
import zipfile
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

LARGEST = 2 ** 20              # no size in a config is larger than this
FROZEN = 10_000                # more tensors than a frozen text encoder has, which is part of a model and of no checkpoint


def save(state: dict, path: str | Path) -> None:
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(plain(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        temporary.unlink(missing_ok=True)
        kept = 'the previous one is intact' if path.exists() else 'earlier checkpoints are intact'
        raise OSError(f'cannot save the checkpoint {path}, {kept}: {first_line(error)}') from error


def plain(value):
    """Numbers of numpy, among settings and rates, as Python's: whoever loads nothing but weights and settings refuses numpy's."""
    if type(value).__module__ == 'numpy' and value.ndim == 0:
        return value.item()
    if type(value) is dict:
        return {name: plain(each) for name, each in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def load(path: str | Path, map_location: str | torch.device = 'cpu', mmap: bool = False) -> dict:
    """`mmap`: leave tensors on the disk until they are looked at."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {path}')
    with blaming(path):
        try:
            refuse_packed(path)
            return torch.load(path, map_location=map_location, weights_only=True,
                              mmap=mmap and zipfile.is_zipfile(path))      # files older than torch 1.6 are none
        except pickle.UnpicklingError as error:
            raise ValueError('it holds more than weights and settings, which could run code on this machine, or it is no '
                             'checkpoint at all') from error


def refuse_packed(path: Path) -> None:
    """What PyTorch saves is a zip file that does not compress; one that does could unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                raise ValueError('it unpacks to more than its own size, which no checkpoint does')


@contextmanager
def blaming(source: str | Path):
    """Whatever goes wrong in here is the fault of `source`, and is said in one sentence."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:  # nobody can list what a damaged file makes of the libraries that read it
        kind = '' if isinstance(error, ValueError) else f'not what it should be, or damaged: {type(error).__name__}, '
        raise ValueError(f'{source} is refused: {kind}{first_line(error):.500}') from error


def load_run(path: str | Path) -> dict:
    """What a Trainer saved: from one checkpoint file, or from the newest one of a results folder."""
    path = newest(path) if Path(path).is_dir() else Path(path)
    state = load(path)
    parts = [state.get(name) for name in ('config', 'model', 'ema')] if isinstance(state, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(state['ema'].get('average'), dict):
        raise ValueError(f'{path} was not written by this library. Weights of video-diffusion-pytorch can be read with '
                         'video_diffusion.weights.unet_from_lucidrains')
    return state


# ---- a module from what a file says

def build(constructor: Callable[[dict], nn.Module], config: dict, weights: dict[str, Tensor],
          source: str | Path = 'the checkpoint', **how) -> nn.Module:
    """constructor(config) with these weights, on the CPU, as `fill` does it. No memory is asked for that they do not fill."""
    return fill(hollow(constructor, config, len(weights), source), weights, source, **how)


def expect(kind: str, state: dict) -> None:
    """Refuse what `load_run` read if it holds something else, and say who reads that."""
    held = 'VAE' if 'vae' in state['config'] else 'LatentDiffusion' if 'latent' in state['config'] else 'GaussianDiffusion'
    if held != kind:
        raise ValueError(f'the checkpoint holds a {held}: read it with {"vae" if held == "VAE" else "diffusion"}_from_checkpoint')


def rebuild(constructor: Callable[[dict], nn.Module], state: dict) -> nn.Module:
    """The same, with the averaged weights, from what `load_run` read."""
    return build(constructor, state['config'], {**state['model'], **state['ema']['average']})


def hollow(constructor: Callable[[dict], nn.Module], config: dict, tensors: int, source: str | Path) -> nn.Module:
    """constructor(config) on the meta device, if that has about as many tensors as the file.

    Tensors that the constructor computes and no file holds must say so: `with torch.device('cpu')`.
    """
    number = count(1)

    def refuse_too_many(_module, _name, _parameter):
        if next(number) > tensors + FROZEN:
            raise ValueError(f'its settings ask for a network of far more than the {tensors} tensors that it holds')

    hook = register_module_parameter_registration_hook(refuse_too_many)
    try:
        with blaming(source), torch.device('meta'):
            refuse_odd_settings(config)
            return constructor(config)
    finally:
        hook.remove()


def refuse_odd_settings(config) -> None:
    """Settings are numbers of reasonable size, strings, and lists and dicts of these."""
    if isinstance(config, (dict, list, tuple)):
        for value in config.values() if isinstance(config, dict) else config:
            refuse_odd_settings(value)
    elif not isinstance(config, (str, int, float, type(None))) or isinstance(config, (int, float)) and abs(config) > LARGEST:
        raise ValueError(f'one of its settings is {config!r:.100}: expected text, or a number up to {LARGEST}')


def fill(module: nn.Module, weights: dict[str, Tensor], source: str | Path,
         their_name: Callable[[str], str] = lambda name: name, *, as_they_are: bool = False) -> nn.Module:
    """The module, hollow or not, with copies of these weights. Strict: every tensor is used, every place filled, every
    number finite, or an error lists what is wrong. `their_name`: what one of our names is in `weights`. `as_they_are`: the very
    tensors, in their own dtype, and unread: what is mapped from a disk costs no memory yet."""
    places = module.state_dict()
    names = {their_name(ours): ours for ours in places}
    wrong = [f'missing: {theirs}' for theirs in names if theirs not in weights]
    wrong += [f'not expected: {theirs}' for theirs in weights if theirs not in names]
    found = {ours: weights[theirs] for theirs, ours in names.items() if theirs in weights}
    wrong += [f'{theirs} {fault}' for theirs, ours in names.items()
              if ours in found and (fault := misfit(found[ours], places[ours]))]
    if not wrong:
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in found.values()}
        if sum(value.nbytes for value in found.values()) > 2 * sum(storages.values()):
            wrong = ['its tensors are the same few numbers over and over']
    if not wrong and not as_they_are:
        found = {ours: value.detach().to('cpu', places[ours].dtype, copy=True) for ours, value in found.items()}
        wrong = [f'{name} holds NaN or infinity' for name, _ in module.named_parameters() if not found[name].isfinite().all()]
    if wrong:
        more = f', and {len(wrong) - 10} more' if len(wrong) > 10 else ''
        raise ValueError(f'{source} does not fit the {type(module).__name__}: {", ".join(wrong[:10])}{more}')
    module.load_state_dict(found, assign=True)
    hollow_still = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not hollow_still, f"compute these in a `with torch.device('cpu')`: {hollow_still}"
    return module


def misfit(value, place: Tensor) -> str | None:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return 'is not a tensor of numbers'
    if value.shape != place.shape:
        return f'has shape {tuple(value.shape)}, expected {tuple(place.shape)}'
    if value.is_floating_point() != place.is_floating_point():
        return f'holds {value.dtype}, expected {place.dtype}'
    return None


def moments(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """What an optimizer remembers of each weight, if it is of our kind and fits. Its settings are those of this run."""
    groups = optimizer.state_dict()['param_groups']
    if [len(group['params']) for group in state['param_groups']] != [len(group['params']) for group in groups]:
        raise ValueError('it was trained by another optimizer (Adam, or Muon, which has muon_lr): choose that one')
    weights = [(weight, {'momentum'} if 'momentum' in group else {'step', 'exp_avg', 'exp_avg_sq'})
               for group in optimizer.param_groups for weight in group['params']]
    for number, kept in state['state'].items():
        weight, names = weights[number]
        shapes = {name: () if name == 'step' else tuple(weight.shape) for name in names}
        if {name: tuple(value.shape) for name, value in kept.items() if value.is_floating_point()} != shapes:
            raise ValueError(f'what its optimizer remembers of weight {number} is not of the shape {tuple(weight.shape)}')
    return {'state': state['state'], 'param_groups': groups}


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
    found = [(re.fullmatch(r'model-(\d+)\.pt', path.name), path) for path in Path(folder).glob('model-*.pt')]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def newest(folder: str | Path) -> Path:
    """The checkpoint of the highest milestone in a results folder."""
    found = milestones(folder)
    if not found:
        raise FileNotFoundError(f'there is no checkpoint in {folder}: looked for model-<number>.pt')
    return found[max(found)]


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

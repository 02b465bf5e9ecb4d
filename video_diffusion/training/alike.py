"""What must be the same in all processes of a run, to be compared before it begins: see `Processes.agree`.

One process with another learning rate, or with a clip less, would train all the same, and nobody would ever know.
"""

import os

from .. import checkpoint
from ..data.dataset import GifDataset


def settings_of(arguments: dict, model: dict) -> dict:
    """What must be the same in all processes: those of a trainer's arguments that are numbers and words, and its model."""
    elsewhere = ('folder', 'results_folder', 'latent_cache')         # may have another name on another machine
    plain = {name: value for name, value in arguments.items()
             if name not in elsewhere and isinstance(value, (int, float, str, tuple, type(None)))}
    return plain | {'lr_schedule': [arguments['lr_schedule'](step) for step in (0, 10, 100, 1000)], 'model': model}


def clip_list(dataset: GifDataset) -> str:
    names = [os.path.relpath(path, dataset.source.folder) for path in dataset.paths]
    later = [getattr(caption, 'later', ()) for caption in dataset.captions or ()]
    return f'{len(names)}, fingerprint {checkpoint.fingerprint([], (names, dataset.captions, later))}'

"""An exponential moving average of the weights: the model to sample from.

    average <- decay * average + (1 - decay) * weight

Late in training the weights wander around a good place; their average sits closer to it and samples
visibly better. With `warmup` the decay of update n is at most (1 + n) / (10 + n), so that short runs do not
carry their first steps along for long.

    >>> ema = EMA(model, decay=0.995)
    >>> optimizer.step(); ema.update()
    >>> with ema.average_parameters(): samples = model.sample()      # the model holds the average in here
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import checkpoint


class EMA:
    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False):
        if not 0 <= decay < 1:
            raise ValueError(f'ema_decay={decay}: give a number from 0 to below 1')
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}  # what is frozen is its own average
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}

    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.approach(1 - decay)

    def copy(self) -> None:
        """Forget the past: the average is the weights of this moment."""
        self.approach(1.)

    @torch.no_grad()
    def approach(self, part: float) -> None:
        """Go this part of the way to the weights."""
        # All tensors in one call ("foreach"), in place: a tenth of the time of a loop over them.
        torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), part)

    @contextmanager
    def average_parameters(self):
        """Within, the model holds the average; after, its own weights again, whatever happened."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for name, weight in self.weights.items():
            kept = weight.clone()            # the numbers change places, not the tensors, of which shard.py knows the address
            weight.copy_(self.average[name])
            self.average[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {'average': self.average, 'updates': self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state['updates']
        for name, average in self.average.items():
            if fault := checkpoint.misfit(state['average'][name], average):
                raise ValueError(f'the average of {name} {fault}')
            average.copy_(state['average'][name])

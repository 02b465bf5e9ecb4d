"""A GPU that is not there: tensors on the device called meta have a shape, a type and a layout, and no numbers.

    with fake_gpu() as gpu:
        moved(diffusion)
        loss = diffusion(torch.rand(2, 3, 5, 8, 8, device=GPU))
    assert not gpu.waits

What a real GPU refuses is refused here: to work on tensors of two devices, or to draw for one device with the generator of the
other. So is what makes the host wait for a number (`.item()`, `nonzero`, a boolean index), for there is none. Copies between host
and device that wait are listed in `gpu.waits`, with the line that asks for them. Tensors on the CPU are real, tables and all.
"""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from video_diffusion.networks import recompute

LIBRARY = str(Path(__file__).parent.parent / 'video_diffusion')
GPU = torch.device('meta')
aten = torch.ops.aten
MOVES = aten._to_copy.default, aten.copy_.default            # they may have two devices
LAYOUTS = aten.clone.default, *MOVES
INDEX = aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default


class FakeGenerator(torch.Generator):
    """Says that it is of the device that it was made for."""

    def __new__(cls, device='cpu'):
        self = super().__new__(cls, 'cpu')
        self.claimed = torch.device(device)
        return self

    device = property(lambda self: self.claimed)


def at_home(draw):
    """torch.randn and its like, which refuse the generator of another device."""
    def drawn(*args, generator=None, **kwargs):
        place = torch.device(kwargs.get('device') or 'cpu')
        if generator is not None and generator.device.type != place.type:
            raise RuntimeError(f'a generator of {generator.device} draws for {place}')
        return draw(*args, **kwargs) if place.type != 'cpu' else draw(*args, generator=generator, **kwargs)
    return drawn


class FakeGPU(TorchDispatchMode):
    """Sees every operation, in the backward pass too."""

    def __init__(self):
        super().__init__()
        self.waits, self.copies = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(leaves((*args, *kwargs.values())))
        on_gpu = [tensor.device.type == 'meta' for tensor in tensors]
        if not any(on_gpu):
            result = function(*args, **kwargs)
            if function is aten._to_copy.default and result.device.type == 'meta':       # something is sent there
                self.look_at(function, args, kwargs, tensors, result)
            return result
        if function is aten._to_copy.default and torch.device(kwargs.get('device') or 'meta').type == 'cpu':
            result = torch.zeros_like(tensors[0], dtype=kwargs.get('dtype'), device='cpu')    # a number that nobody knows
        elif function is aten.copy_.default and not on_gpu[0]:
            result = args[0]
        else:
            together = [] if function in MOVES else tensors[:1] if function in INDEX else tensors     # an index may be on the CPU
            if any(tensor.ndim and tensor.device.type == 'cpu' for tensor in together):
                raise RuntimeError(f'{function} is given tensors of both devices at {where()}')
            result = function(*args, **kwargs)
            if function is aten.convolution.default and any(map(is_channels_last, tensors[:2])):
                result = torch.empty_like(result, memory_format=torch.channels_last)         # so cuDNN answers
        self.look_at(function, args, kwargs, tensors, result)
        return result

    def look_at(self, function, args, kwargs, tensors, result) -> None:
        if function in LAYOUTS and isinstance(result, torch.Tensor):
            source = tensors[-1] if function is aten.copy_.default else tensors[0]
            if source.device.type == result.device.type:
                if source.dtype == result.dtype and source.numel() > 1:
                    self.copies.append((where(), tuple(result.shape)))
            elif not (kwargs.get('non_blocking') or len(args) > 2 and args[2]) and not waits_for_nothing(source):
                self.waits.append((where(), tuple(result.shape)))
        elif function in INDEX and any(tensor.device.type == 'cpu' for tensor in tensors[1:]):
            self.waits.append((where(), 'index on the CPU'))


def is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def leaves(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from leaves(value)


@contextmanager
def fake_gpu():
    with pytest.MonkeyPatch.context() as patch, FakeGPU() as gpu:
        patch.setattr(torch, 'Generator', FakeGenerator)
        for name in ('rand', 'randn', 'randint'):
            patch.setattr(torch, name, at_home(getattr(torch, name)))
        patch.setattr(recompute, 'meta_is_cpu', False)       # as it is for an estimate of memory
        patch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())         # the device has none
        yield gpu


def waits_for_nothing(source: torch.Tensor) -> bool:
    """A number that Python knows travels with the kernel."""
    return source.device.type == 'cpu' and source.ndim == 0


def where() -> str:
    """The line of the library that asked."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(LIBRARY):
        frame = frame.f_back
    return 'the test' if frame is None else f'{Path(frame.f_code.co_filename).stem}:{frame.f_lineno}'


def moved(model: nn.Module) -> nn.Module:
    """The model with weights that are on the GPU, in the layout that they have."""
    parts = list(model.modules())
    parts += [part for encoder in parts for part in getattr(vars(encoder).get('transformer'), 'modules', list)()]    # see text.py
    for part in parts:
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(weight.detach().to(GPU, non_blocking=True), requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(GPU, non_blocking=True)
    return model

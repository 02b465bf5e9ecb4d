"""A GPU that is not there: tensors that claim to be on it have a shape, a type and a layout, and no numbers.

    with fake_gpu() as gpu:
        moved(diffusion, gpu.device)
        loss = diffusion(torch.rand(2, 3, 5, 8, 8, device=gpu.device))
    assert not gpu.waits

What a real GPU refuses is refused here: to work on tensors of two devices, or to draw for one device with the generator of the
other. So is what makes the host wait for a number (`.item()`, `nonzero`, a boolean index), for there is none. Copies between host
and device that wait are listed in `gpu.waits`, with the line that asks for them. Tensors on the CPU are real, tables and all.

A device called cuda cannot go backward without CUDA; one called meta can, and is as far from the CPU.
"""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

LIBRARY = str(Path(__file__).parent.parent / 'video_diffusion')
CUDA, META = torch.device('cuda', 0), torch.device('meta')
LAYOUTS = torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


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


class FakeGPU(FakeTensorMode):
    def __init__(self, device: torch.device):
        super().__init__(allow_non_fake_inputs=True)
        self.device, self.waits, self.copies = device, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = torch.device(kwargs.get('device') or 'cpu')
        if target.type == 'cpu' and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return function(*args, **kwargs)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.look_at(function, args, kwargs, tensors, result)
        return result

    def look_at(self, function, args, kwargs, tensors, result) -> None:
        if function in LAYOUTS and isinstance(result, torch.Tensor):
            source = tensors[-1] if function is torch.ops.aten.copy_.default else tensors[0]
            if source.device.type == result.device.type:
                if source.dtype == result.dtype and source.numel() > 1:
                    self.copies.append((where(), tuple(result.shape)))
            elif not (kwargs.get('non_blocking') or len(args) > 2 and args[2]) and not waits_for_nothing(source):
                self.waits.append((where(), tuple(result.shape)))
        elif function is torch.ops.aten.index.Tensor and any(t.device.type == 'cpu' for t in tensors[1:]):
            self.waits.append((where(), 'index on the CPU'))


@contextmanager
def fake_gpu(device: torch.device = CUDA):
    with pytest.MonkeyPatch.context() as patch, FakeGPU(device) as gpu:      # which PyTorch itself enters again and again
        patch.setattr(torch, 'Generator', FakeGenerator)
        for name in ('rand', 'randn', 'randint'):
            patch.setattr(torch, name, at_home(getattr(torch, name)))
        if device.type == 'meta':                            # has no autocast
            patch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
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


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with weights that claim to be on the device, in the layout that they have."""
    parts = list(model.modules())
    parts += [part for encoder in parts for part in getattr(vars(encoder).get('transformer'), 'modules', list)()]    # see text.py
    for part in parts:
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(weight.detach().to(device, non_blocking=True), requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(device, non_blocking=True)
    return model

"""Memory: how much a training step needs, known before it runs, and an allocator that suits tensors.

    weights, their average, the moments of the optimiser     always there
    gradients                                                from the first backward pass of a step to its end
    activations                                              what the backward pass will ask for: grows with the clips
    what an operation needs while it computes                the same

The last three are not guessed at: the step is run with tensors that have shapes and no numbers (PyTorch's device "meta"), with
one clip and with three, and while it runs somebody counts. It is right for a U-Net: for a step on an H100 it says 5699 MB, and
5755 were taken. Of a DiT it says too much: the attention of tensors without numbers writes its n x n weights down, which that of
real ones does not.

    >>> estimate(diffusion).of(batch=64) / 2 ** 30          # GB; mixed precision needs less
"""

import copy
import ctypes
import weakref
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..networks import recompute
from .muon import split


class Need(NamedTuple):
    """Bytes."""
    standing: int
    gradients: int                       # and whatever else does not depend on the number of clips
    per_clip: int

    def of(self, batch: int) -> int:
        return self.standing + self.gradients + batch * self.per_clip

    def fits(self, batch: int, room: int) -> bool:
        """Whether so many bytes have room for the batch, with a fifth left free; less than one clip it cannot be."""
        return batch <= 1 or self.of(batch) <= 0.8 * room

    def words(self, batch: int) -> str:
        return (f'about {self.of(batch) / 2 ** 30:.2f} GB: {self.standing / 2 ** 30:.2f} for weights, average and optimiser, '
                f'{self.per_clip / 2 ** 20:.1f} MB for each of {batch} clips; less with mixed precision')


def estimate(diffusion: nn.Module, muon: bool = False, device: torch.device = torch.device('cpu')) -> Need:
    """Of a training step of this diffusion model on such a device in float32, with Adam or with Muon."""
    learnt = [weight for weight in diffusion.parameters() if weight.requires_grad]
    twice, once = size(learnt), 0
    if muon:
        matrices, others = split(diffusion)
        twice, once = size(others), size(matrices)                       # Muon keeps one moment where Adam has two
    standing = size(diffusion.parameters()) + size(learnt) + 2 * twice + once
    shapes = without_numbers(diffusion)
    recompute.meta_is_cpu = device.type == 'cpu'                         # tensors without numbers stand for those of the device
    try:
        one, three = (peak(lambda: loss_of(shapes, clips).backward(), shapes) for clips in (1, 3))
    finally:
        recompute.meta_is_cpu = True
    per_clip = (three - one) // 2
    return Need(standing, one - per_clip, per_clip)


def size(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def without_numbers(diffusion: nn.Module) -> nn.Module:
    """A copy whose weights have only shapes; captions are not read."""
    memo = {id(weight): nn.Parameter(torch.empty_like(weight, device='meta'), weight.requires_grad)
            for weight in diffusion.parameters()}
    memo |= {id(buffer): torch.empty_like(buffer, device='meta') for buffer in diffusion.buffers()}
    memo |= {id(encoder): nn.Identity() for encoder in (diffusion.text_encoder,) if encoder is not None}
    shapes = copy.deepcopy(diffusion, memo)
    shapes.has_scale = True                                               # of a LatentDiffusion, which else looks at it
    return shapes


def loss_of(shapes: nn.Module, clips: int) -> Tensor:
    network, where = shapes.denoise_fn, dict(device='meta')
    shapes.zero_grad()
    cond = None
    if getattr(network, 'has_cond', False):
        words = (getattr(network, 'text_length', 16),) if getattr(network, 'text_tokens', False) else ()
        cond = torch.zeros(clips, *words, network.cond_dim, **where)
    return shapes(torch.zeros(clips, shapes.channels, shapes.num_frames, shapes.height, shapes.width, **where), cond)


def peak(work: Callable[[], object], model: nn.Module) -> int:
    """The most bytes that the tensors hold that are made in `work`."""
    with Held([*model.parameters(), *model.buffers()]) as held:
        work()
    return held.most


class Held(TorchDispatchMode):
    """Counts the memory of every tensor that is made within, until nobody needs it any more."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                self.hold(tensor.untyped_storage())
        return result

    def hold(self, storage: torch.UntypedStorage) -> None:
        self.alive.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.let_go, storage._cdata, storage.nbytes()).atexit = False

    def let_go(self, address: int, number: int) -> None:
        self.alive.discard(address)
        self.now -= number


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next tensor of that size (Linux; elsewhere nothing happens).

    By default it returns every block above 32 MB to the system and takes it back at the next step, page by
    page, each page zeroed first: with large clips that costs a CPU more than half of its time.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        most_mapped_blocks, trim_threshold = -4, -1  # names of glibc's mallopt parameters
        libc.mallopt(most_mapped_blocks, 0)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)
    except (OSError, AttributeError):
        pass  # not glibc

"""Recomputation: between the forward and the backward pass keep little, and compute the rest again.

Autograd keeps whatever a derivative needs. In an attention layer that is twenty times its input, though computing it again
costs little; behind a norm and a SiLU it is three copies of one tensor, of which one would do. Checkpointing (Chen et al.
2016, arXiv 1604.06174) keeps the inputs of a function alone, and calls it again when its backward pass comes:

    y = recompute(function, x)                   # function(x), in value and gradient; kept is x

The second call ends where the last tensor is found that a derivative needs. A convolution needs what it read and not what
it wrote, so of `conv(silu(norm(x)))` only norm and SiLU are computed twice. The U-Net keeps what its convolutions and its
attention layers read, and nothing else.

    y = in_slices(function, x, dim, width)       # the same for one slice of x after the other

Rows that do not look at each other, as pixels in temporal attention and frames in spatial attention, may take turns, which
changes no number. What a slice becomes on its way, forward and backward, stays in the processor's cache: memory outside it
was measured to be five to ten times slower. A GPU, which wants much work at once, gets one slice.

Where all is small there is nothing to save, and all is kept and computed once. What is small depends on the channels: where they
are many, a layer's products take so long that nobody feels the rest computed twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LITTLE = 7 * 2 ** 19     # numbers, 14 MB: a layer that makes no more of its input keeps them; if it is WIDE, an eighth of that
WIDE = 128
SLICE = 2 ** 20         # numbers that a slice becomes: 4 MB, and in the backward pass a few times that
meta_is_cpu = True      # for what device tensors without numbers stand: see memory.py


def little(channels: int) -> int:
    return LITTLE // 8 if channels >= WIDE else LITTLE


def on_cpu(x: Tensor) -> bool:
    """Whether to do what is fastest on a CPU."""
    return x.device.type == 'cpu' or x.device.type == 'meta' and meta_is_cpu


def recompute(function: Callable, *inputs, draws: bool = False):
    """function(*inputs). Every tensor that needs a gradient is an argument, or a weight of a module. `draws`: the function draws
    random numbers, and is to draw the same ones again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws)


def plainly(function: Callable, *inputs):
    return function(*inputs)


def in_slices(function: Callable, x: Tensor, dim: int, width: int, *others: Tensor) -> Tensor:
    """function(x, *others), slice by slice along `dim`, each recomputed; where x is small, neither.

    `function` is a method of a module and keeps the shape of x (..., c). `width`: channels of the widest thing that it makes of
    x. The module's `little`: what makes fewer numbers is neither cut nor recomputed.
    """
    numbers, module = x[..., 0].numel() * width, function.__self__
    if numbers < module.little:
        return function(x, *others)
    size = max(1, SLICE * x.shape[dim] // numbers)
    if not on_cpu(x) or torch.compiler.is_compiling() or size >= x.shape[dim]:
        return recompute(function, x, *others)
    return Slices.apply(function, dim, size, len(others), x, *others, *(w for w in module.parameters() if w.requires_grad))


def slices(x: Tensor, size: int, dim: int) -> tuple[Tensor, ...]:
    """All of them; of a tensor without numbers two, for the others take no more room: see memory.py."""
    return x.split(size, dim)[:2 if x.device.type == 'meta' else None]


class Slices(torch.autograd.Function):
    """recompute for every slice, which writes where it belongs, so that no slices lie about to be put together."""

    @staticmethod
    def forward(ctx, function, dim, size, number, x, *tensors):
        """tensors: the `number` others of in_slices, and the weights that learn."""
        ctx.function, ctx.dim, ctx.size, ctx.number = function, dim, size, number
        ctx.autocast = torch.get_autocast_dtype('cpu'), torch.is_autocast_enabled('cpu')
        ctx.save_for_backward(x, *tensors)
        out = torch.empty_like(x)
        for part, place in zip(slices(x, size, dim), out.split(size, dim)):
            place.copy_(function(part, *tensors[:number]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *tensors = ctx.saved_tensors
        others = [t.detach().requires_grad_(t.requires_grad) for t in tensors[:ctx.number]]
        learn = [t for t in (*others, *tensors[ctx.number:]) if t.requires_grad]
        # Sums of many slices, for which half precision is too short.
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in learn]
        grad_x = torch.empty_like(x)
        for part, part_grad, place in zip(*(slices(t, ctx.size, ctx.dim) for t in (x, grad, grad_x))):
            with torch.enable_grad(), torch.autocast('cpu', *ctx.autocast):
                part = part.detach().requires_grad_()
                out = ctx.function(part, *others)
            first, *rest = torch.autograd.grad(out, (part, *learn), part_grad, allow_unused=True)
            place.copy_(first)
            for total, more in zip(sums, rest):
                if more is not None:                                 # of a weight that the function does not use
                    total += more
        sums = iter(sums)
        return None, None, None, None, grad_x, *(next(sums).to(t.dtype) if t.requires_grad else None for t in tensors)

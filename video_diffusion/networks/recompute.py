"""Recomputation: between the forward and the backward pass keep little, and compute the rest again.

Autograd keeps whatever an operation's derivative needs. In an attention layer that is twenty times its input, though
computing it again costs little; behind a norm and a SiLU it is three copies of one tensor, of which one would do.
Checkpointing (Chen et al. 2016, arXiv 1604.06174) keeps the inputs of a function alone and calls it again when its
backward pass comes:

    y = recompute(function, x)         # as function(x), in value and gradient; kept is x

What `function` does last decides what the second call costs: it ends where the last tensor is found that a derivative
needs. A convolution needs its input and not its output, so of `conv(silu(norm(x)))` only norm and SiLU are computed twice.
The U-Net recomputes all but its convolutions and projections of the skips in this way; see unet3d.py.

    y = in_slices(function, x, dim, tokens)

does so for one slice of x after the other. Where rows do not look at each other, as pixels in temporal attention and
frames in spatial attention, that changes no number, and all that an attention layer computes on its way, forward and
backward, stays in the processor's cache: measured, memory outside it is five to ten times slower.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CACHED = 2 ** 20        # numbers that the widest rows of a slice hold: 4 MB, and in the backward pass a few times that


def recompute(function: Callable, *inputs):
    """function(*inputs), which must not draw random numbers; its tensors come as inputs or are weights."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def in_slices(function: Callable, x: Tensor, dim: int, width: int, *others: Tensor) -> Tensor:
    """function(x, *others), which keeps the shape of x (..., c), slice by slice along `dim`, recomputed.

    `function` is a method of a module, whose weights get their gradients; `width`: how wide it makes the rows of x.
    """
    rows_of_one = x[..., 0].numel() // x.shape[dim]
    size = max(1, CACHED // (width * rows_of_one))
    if x.device.type != 'cpu' or torch.compiler.is_compiling() or size >= x.shape[dim]:
        return recompute(function, x, *others)
    weights = [w for w in function.__self__.parameters() if w.requires_grad]
    return Slices.apply(function, dim, size, len(others), x, *others, *weights)


class Slices(torch.autograd.Function):
    """in_slices with a backward pass of its own: slice by slice, the forward again and then autograd's derivative of it."""

    @staticmethod
    def forward(ctx, function, dim, size, number, x, *tensors):
        ctx.function, ctx.dim, ctx.size, ctx.number = function, dim, size, number
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        ctx.save_for_backward(x, *tensors)
        out = torch.empty_like(x)
        for part, place in zip(x.split(size, dim), out.split(size, dim)):
            place.copy_(function(part, *tensors[:number]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *tensors = ctx.saved_tensors
        others = [t.detach().requires_grad_(t.requires_grad) for t in tensors[:ctx.number]]
        learning = [t for t in (*others, *tensors[ctx.number:]) if t.requires_grad]
        sums, dx = [torch.zeros_like(t) for t in learning], torch.empty_like(x)
        enabled, dtype = ctx.autocast
        for part, part_grad, place in zip(*(t.split(ctx.size, ctx.dim) for t in (x, grad, dx))):
            with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled):
                part = part.detach().requires_grad_()
                out = ctx.function(part, *others)
            grads = torch.autograd.grad(out, [part, *learning], part_grad, allow_unused=True)
            place.copy_(grads[0])
            for total, more in zip(sums, grads[1:]):
                if more is not None:
                    total += more
        sums = iter(sums)
        return None, None, None, None, dx, *(next(sums) if t.requires_grad else None for t in tensors)

"""Compute in slices, and again in the backward pass: less memory, and on a CPU less time too.

Autograd remembers every intermediate tensor of a function until the backward pass. For a chain of cheap
operations on a large tensor (norm, projection, softmax, ...) that is a poor bargain: writing the
intermediates to memory and reading them back costs more than computing them again. `in_slices` applies
such a chain to one slice of its input at a time, small enough for the processor's cache, keeps only input and
output, and in the backward pass computes each slice once more to differentiate it (the idea of gradient
checkpointing, arXiv 1604.06174, at the grain of a cache).

    y = in_slices(block, x, dim=0, tokens_per_entry=64, uses=module.parameters())       # equals y = block(x)

The gradients are those of the plain function up to the order of summation; tests/test_slices.py shows it.
"""

from typing import Callable, Iterable

import torch
from torch import Tensor


# How many tokens (pixels of a frame, with all their channels) a slice holds. On a CPU a slice should stay
# in cache: the queries, keys and values of 4096 tokens, 256 channels each, are 12 MB. A GPU wants work for
# thousands of threads at once; there slices only bound the memory.
TOKENS_PER_SLICE = {'cpu': 4096, 'other': 2 ** 18}


def in_slices(
    block: Callable[..., Tensor], *xs: Tensor, dim: int, tokens_per_entry: int, uses: Iterable[Tensor],
) -> Tensor:
    """`block(*xs)`, a tensor like xs[0], computed a few entries of axis `dim` (of every x) at a time.

    `block` must treat those entries independently. `uses` names every other tensor that it works with and
    that wants a gradient: parameters and such; one that is left out gets none.
    """
    if torch.compiler.is_compiling():
        return block(*xs)  # the compiler fuses the chain and decides by itself what to recompute
    tokens = TOKENS_PER_SLICE.get(xs[0].device.type, TOKENS_PER_SLICE['other'])
    size = max(1, tokens // tokens_per_entry)
    return InSlices.apply(block, dim, size, len(xs), *xs, *uses)


class InSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, dim, size, count, *tensors):
        ctx.block, ctx.dim, ctx.size, ctx.count = block, dim, size, count
        ctx.save_for_backward(*tensors)
        device = tensors[0].device.type
        ctx.autocast = dict(device_type=device, enabled=torch.is_autocast_enabled(device),
                            dtype=torch.get_autocast_dtype(device), cache_enabled=False)
        xs = [x.detach() for x in tensors[:count]]
        y = torch.empty_like(xs[0])
        for y_slice, *x_slices in zip(*(z.split(size, dim) for z in (y, *xs))):
            y_slice.copy_(block(*x_slices))
        return y

    @staticmethod
    def backward(ctx, grad_y):
        xs, uses = ctx.saved_tensors[:ctx.count], ctx.saved_tensors[ctx.count:]
        learned = [tensor for tensor in uses if tensor.requires_grad]
        grad_xs = [torch.empty_like(x) for x in xs]
        grad_learned = [None] * len(learned)
        for grad_slice, *pieces in zip(*(z.split(ctx.size, ctx.dim) for z in (grad_y, *xs, *grad_xs))):
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                x_slices = [x.detach().requires_grad_() for x in pieces[:ctx.count]]
                y_slice = ctx.block(*x_slices)
            grads = torch.autograd.grad(y_slice, x_slices + learned, grad_slice, allow_unused=True)
            for into, grad in zip(pieces[ctx.count:], grads):
                into.copy_(grad)
            grad_learned = [new if total is None else total.add_(new)
                            for total, new in zip(grad_learned, grads[ctx.count:])]
        grad_learned = iter(grad_learned)
        grad_uses = (next(grad_learned) if tensor.requires_grad else None for tensor in uses)
        return (None, None, None, None, *grad_xs, *grad_uses)

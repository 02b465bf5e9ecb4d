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

CACHED_TOKENS = 2048        # a slice with 8 heads of 32: 6 MB of queries, keys and values


def recompute(function: Callable, *inputs):
    """function(*inputs), which must not draw random numbers; its tensors come as inputs or are weights."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def in_slices(function: Callable, x: Tensor, dim: int, *others) -> Tensor:
    """function(x, *others), which keeps the shape of x (..., c), slice by slice along `dim`, each recomputed."""
    rows_of_one = x[..., 0].numel() // x.shape[dim]
    size = max(1, CACHED_TOKENS // rows_of_one)
    if x.device.type != 'cpu' or torch.compiler.is_compiling() or size >= x.shape[dim]:
        return recompute(function, x, *others)
    return torch.cat([recompute(function, part, *others) for part in x.split(size, dim)], dim)

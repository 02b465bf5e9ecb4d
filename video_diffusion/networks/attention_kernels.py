"""Attention in one pass over memory, in Triton: what a GPU does in place of a dozen operations of torch. See fused.py.

A GPU multiplies far faster than it reads. What surrounds the products of attention over ten frames, a softmax, a bias, copies
from one layout to another, is arithmetic of no weight, and each operation of torch reads and writes the whole video for it.
Here a program loads a tile once, does all of it in registers and writes the result:

    time_forward, time_backward          attention of each pixel along time
    linear_forward, linear_backward      linear attention of a frame's pixels

The backward passes compute the forward pass again from the same tile (Dao et al. 2022, arXiv 2205.14135). In capitals what is
known when a kernel is compiled: R rows of a tile, P its pixels, F frames, D features of a head. All are powers of two, and
what is beyond the real numbers is masked.
"""

import triton
import triton.language as tl

# ---- attention along time: qk (b f n 2*heads*d) and v (b f n heads*d), a tile is P pixels with all their frames, P F D
#
# A program takes every so many-th tile of one clip and head. Of F frames, a power of two, `frames` are real.

@triton.jit
def time_bias(bias, frames, F: tl.constexpr):
    """F F, minus infinity for frames that are not there."""
    i, j = tl.arange(0, F)[:, None], tl.arange(0, F)[None, :]
    values = tl.load(bias + i * frames + j, mask=(i < frames) & (j < frames), other=0.).to(tl.float32)
    return tl.where(j < frames, values, -float('inf'))[None, :, :]


@triton.jit
def time_at(tile, n, frames, by_frame, by_pixel, feature, P: tl.constexpr, F: tl.constexpr, D: tl.constexpr):
    """Where the numbers of a tile lie, and which of them are real."""
    pixel, frame = (tile * P + tl.arange(0, P)).to(tl.int64)[:, None, None], tl.arange(0, F).to(tl.int64)[None, :, None]
    return pixel * by_pixel + frame * by_frame + feature + tl.arange(0, D)[None, None, :], (pixel < n) & (frame < frames)


@triton.jit
def time_weights(q, k, bias, scale, PRECISION: tl.constexpr):
    """P F F"""
    logits = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION) * scale + bias
    weights = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    return weights / tl.sum(weights, 2)[:, :, None]


@triton.jit
def time_forward(qk, v, bias, out, n, frames, heads, scale, bias_b, qk_b, qk_f, qk_n, v_b, v_f, v_n, o_b, o_f, o_n,
                 P: tl.constexpr, F: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    head, first, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    table = time_bias(bias + b * bias_b + head * frames * frames, frames, F)
    for tile in range(first, tl.cdiv(n, P), tl.num_programs(1)):
        at, real = time_at(tile, n, frames, qk_f, qk_n, b * qk_b + head * D, P, F, D)
        at_v, _ = time_at(tile, n, frames, v_f, v_n, b * v_b + head * D, P, F, D)
        at_out, _ = time_at(tile, n, frames, o_f, o_n, b * o_b + head * D, P, F, D)
        q, k = tl.load(qk + at, mask=real, other=0.), tl.load(qk + heads * D + at, mask=real, other=0.)
        values = tl.load(v + at_v, mask=real, other=0.)
        weights = time_weights(q, k, table, scale, PRECISION)
        tl.store(out + at_out, tl.dot(weights.to(values.dtype), values, input_precision=PRECISION), mask=real)


@triton.jit
def time_backward(qk, v, bias, grad, grad_qk, grad_v, grad_bias, n, frames, heads, scale, bias_b,
                  qk_b, qk_f, qk_n, v_b, v_f, v_n, o_b, o_f, o_n,
                  P: tl.constexpr, F: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """What the bias learns is summed over the tiles of a program: grad_bias (programs b heads F F)."""
    head, first, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    table = time_bias(bias + b * bias_b + head * frames * frames, frames, F)
    learnt = tl.zeros((P, F, F), tl.float32)
    for tile in range(first, tl.cdiv(n, P), tl.num_programs(1)):
        at, real = time_at(tile, n, frames, qk_f, qk_n, b * qk_b + head * D, P, F, D)
        at_v, _ = time_at(tile, n, frames, v_f, v_n, b * v_b + head * D, P, F, D)
        at_out, _ = time_at(tile, n, frames, o_f, o_n, b * o_b + head * D, P, F, D)
        q, k = tl.load(qk + at, mask=real, other=0.), tl.load(qk + heads * D + at, mask=real, other=0.)
        values, g = tl.load(v + at_v, mask=real, other=0.), tl.load(grad + at_out, mask=real, other=0.)
        weights = time_weights(q, k, table, scale, PRECISION)
        back = tl.permute(weights, (0, 2, 1)).to(g.dtype)
        tl.store(grad_v + at_v, tl.dot(back, g, input_precision=PRECISION), mask=real)
        slope = tl.dot(g, tl.permute(values, (0, 2, 1)), input_precision=PRECISION)
        slope = weights * (slope - tl.sum(slope * weights, 2)[:, :, None])                  # of the softmax
        learnt += slope
        slope = (slope * scale).to(q.dtype)
        tl.store(grad_qk + at, tl.dot(slope, k, input_precision=PRECISION), mask=real)
        tl.store(grad_qk + heads * D + at, tl.dot(tl.permute(slope, (0, 2, 1)), q, input_precision=PRECISION), mask=real)
    ij = tl.arange(0, F)[:, None] * F + tl.arange(0, F)[None, :]
    tl.store(grad_bias + ((first * tl.num_programs(2) + b) * heads + head) * F * F + ij, tl.sum(learnt, 0))


# ---- linear attention: qkv (b n 3*heads*d), one program for each frame and head

@triton.jit
def softmax_rows(x):
    x = tl.exp(x - tl.max(x, 1)[:, None])
    return x / tl.sum(x, 1)[:, None]


@triton.jit
def linear_forward(qkv, out, context, norm, n, heads, scale, R: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """context (b heads d d) = softmax(k over rows)^T v, summed while the greatest k so far is the unit; norm = log sum exp k."""
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width, feature = heads * D, head * D + tl.arange(0, D)
    greatest = tl.full((D,), -float('inf'), tl.float32)
    total, summary = tl.zeros((D,), tl.float32), tl.zeros((D, D), tl.float32)
    for start in range(0, n, R):
        row = start + tl.arange(0, R)
        at, real = (b * n + row)[:, None] * 3 * width + feature[None, :], (row < n)[:, None]
        k = tl.load(qkv + width + at, mask=real, other=-float('inf')).to(tl.float32)
        v = tl.load(qkv + 2 * width + at, mask=real, other=0.)
        new = tl.maximum(greatest, tl.max(k, 0))
        shrink, k = tl.exp(greatest - new), tl.exp(k - new[None, :])
        total = total * shrink + tl.sum(k, 0)
        summary = summary * shrink[:, None] + tl.dot(tl.trans(k.to(v.dtype)), v, input_precision=PRECISION)
        greatest = new
    summary = summary / total[:, None]
    dd = tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(context + (b * heads + head) * D * D + dd, summary)
    tl.store(norm + (b * heads + head) * D + tl.arange(0, D), greatest + tl.log(total))
    for start in range(0, n, R):
        row = start + tl.arange(0, R)
        at, real = (b * n + row)[:, None] * 3 * width + feature[None, :], (row < n)[:, None]
        q = tl.load(qkv + at, mask=real, other=0.)
        mixed = tl.dot(softmax_rows(q.to(tl.float32)).to(q.dtype), (summary * scale).to(q.dtype), input_precision=PRECISION)
        tl.store(out + (b * n + row)[:, None] * width + feature[None, :], mixed, mask=real)


@triton.jit
def linear_backward(qkv, context, norm, grad, grad_qkv, n, heads, scale, R: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """First the queries, and the slope of the context; then, with it, keys and values.

    The softmax over rows needs sum over rows of softmax(k) times its slope, and that is v^T slope from the right: the sum
    over e of context[d, e] slope[d, e]. So no third pass.
    """
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width, feature = heads * D, head * D + tl.arange(0, D)
    dd = tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    summary = tl.load(context + (b * heads + head) * D * D + dd)
    slope = tl.zeros((D, D), tl.float32)
    for start in range(0, n, R):
        row = start + tl.arange(0, R)
        at, real = (b * n + row)[:, None] * 3 * width + feature[None, :], (row < n)[:, None]
        q = softmax_rows(tl.load(qkv + at, mask=real, other=0.).to(tl.float32))
        g = tl.load(grad + (b * n + row)[:, None] * width + feature[None, :], mask=real, other=0.)
        slope += tl.dot(tl.trans(q.to(g.dtype)), g, input_precision=PRECISION)
        slope_q = tl.dot(g, tl.trans((summary * scale).to(g.dtype)), input_precision=PRECISION)
        tl.store(grad_qkv + at, q * (slope_q - tl.sum(q * slope_q, 1)[:, None]), mask=real)
    slope = (slope * scale).to(qkv.dtype.element_ty)
    mean = tl.sum(summary * slope.to(tl.float32), 1)               # of what is multiplied below, not more exact
    log_total = tl.load(norm + (b * heads + head) * D + tl.arange(0, D))
    for start in range(0, n, R):
        row = start + tl.arange(0, R)
        at, real = (b * n + row)[:, None] * 3 * width + feature[None, :], (row < n)[:, None]
        k = tl.exp(tl.load(qkv + width + at, mask=real, other=0.).to(tl.float32) - log_total[None, :])
        v = tl.load(qkv + 2 * width + at, mask=real, other=0.)
        tl.store(grad_qkv + 2 * width + at, tl.dot(k.to(v.dtype), slope, input_precision=PRECISION), mask=real)
        slope_k = tl.dot(v, tl.trans(slope), input_precision=PRECISION)
        tl.store(grad_qkv + width + at, k * (slope_k - mean[None, :]), mask=real)

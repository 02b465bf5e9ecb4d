"""The kernels of attention_kernels.py and norm_kernels.py as functions of torch, for autograd, autocast and torch.compile.

    along_time(qk, v, bias, heads)       b f n 2*heads*d, b f n heads*d, heads f f or b 1 heads f f -> b f n heads*d
    linearly(qkv, heads)                 b n 3*heads*d -> b n heads*d
    channel_norm(x, gain)                ... c -> ... c
    norm_film_silu(x, norm, ...)         b c f h w, channels-last -> b c f h w

Each equals the lines of torch that stand where it is called, which run where there is no GPU, no Triton, or what does not fit.
To torch.compile the launches are operations of their own, of which it knows the shapes that they return.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import recompute

TRITON = importlib.util.find_spec('triton') is not None
DTYPES = torch.float32, torch.bfloat16, torch.float16
MOST_FRAMES = 64                     # that fit a tile
ROWS = 128                           # of linear attention in a tile
PROGRAMS = 8192                      # of attention along time: each takes every so many-th tile
NUMBERS = 4096                       # of a norm in a tile

library = torch.library.Library('video_diffusion', 'DEF')


def fits(x: Tensor, dim_head: int | None = None, frames: int | None = None) -> bool:
    """Whether the kernels take it: those of norms; with `dim_head` of linear attention, with `frames` too of that along time."""
    if not (TRITON and on_gpu(x) and x.dtype in DTYPES):
        return False
    if dim_head not in (None, 16, 32, 64, 128) or (frames or 0) > MOST_FRAMES:
        return False
    if torch.compiler.is_compiling():
        return True
    real = torch.device('cuda') if x.device.type == 'meta' and torch.cuda.is_available() else x.device
    products = torch.get_autocast_dtype('cuda') if dim_head and torch.is_autocast_enabled('cuda') else x.dtype
    return stages(real, products, dim_head, frames) > 0


@cache
def stages(device: torch.device, dtype: torch.dtype, dim_head: int | None, frames: int | None) -> int:
    """How many tiles a kernel holds at a time, three if they fit this GPU, else one; 0 where it cannot be built."""
    for number in (3, 1):
        try:
            trial(torch.ones(1, frames or 16, 16, 3 * (dim_head or 16), device=device, dtype=dtype), dim_head, frames, number)
            return number
        except torch.OutOfMemoryError:
            raise
        except Exception as error:                          # no C compiler, or a tile that is too large
            reason = error
    warnings.warn(f'Triton builds no kernels here, so slower lines of torch are used: {reason}', stacklevel=3)
    return 0


def trial(x: Tensor, dim_head: int | None, frames: int | None, number: int) -> None:
    """One launch of each: x (1 f 16 3*d)."""
    if dim_head is None:
        channel_norm_forward(x, x[0, 0, 0])
    elif frames is None:
        sums = linearly_forward(x[0], 1)
        linearly_backward(sums[0], x[0], *sums[1:], 1)
    else:
        qk, v = x[..., :2 * dim_head].contiguous(), x[..., 2 * dim_head:].contiguous()
        bias = torch.ones(1, frames, frames, device=x.device)
        along_time_forward(qk, v, bias, 1, number)
        along_time_backward(v, qk, v, bias, 1, number)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda or x.device.type == 'meta' and not recompute.meta_is_cpu


def operation(schema: str, fake: Callable):
    """Make of a function an operation of torch, whose results have the shapes of those of `fake`."""
    name = schema.split('(')[0]

    def keep(function):
        library.define(schema)
        library.impl(name, function, 'CompositeExplicitAutograd')
        torch.library.register_fake(f'video_diffusion::{name}', fake, lib=library)
        return getattr(torch.ops.video_diffusion, name).default
    return keep


def launch(name: str, x: Tensor, grid: tuple[int, ...], *args, **constants) -> None:
    from . import attention_kernels, norm_kernels  # Triton takes a while to import
    kernel = getattr(attention_kernels, name, None) or getattr(norm_kernels, name)
    with torch.cuda.device_of(x):
        kernel[grid](*args, **constants)


def precision(x: Tensor) -> str:
    """Of products of float32."""
    try:
        exact = torch.get_float32_matmul_precision() == 'highest'
    except RuntimeError:                                    # it was set by torch's new names
        exact = torch.backends.cuda.matmul.fp32_precision != 'tf32'
    return 'ieee' if exact or x.dtype != torch.float32 or torch.version.hip else 'tf32'


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def in_rows(x: Tensor) -> Tensor:
    """With its last axis in one piece, and without gaps."""
    dense = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride())) == x.numel()
    return x if x.stride(-1) == 1 and dense else x.contiguous()


def floats(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


# ---- attention along time

def time_sizes(qk: Tensor, v: Tensor, bias: Tensor, heads: int, number: int) -> tuple[int, tuple, dict]:
    """Programs for each clip and head; what both kernels are told as numbers; and what is known when they are compiled."""
    b, f, n, width = v.shape
    frames, strides = max(16, power_of_two(f)), (*qk.stride()[:3], *v.stride()[:3], f * n * width, n * width, width)
    pixels = max(1, 128 // frames)
    numbers = n, f, heads, (width // heads) ** -0.5, bias.stride(0) if bias.ndim == 5 else 0, *strides
    programs = min(-(-n // pixels), max(1, PROGRAMS // (b * heads)))
    number = number or stages(v.device, v.dtype, width // heads, f)
    return programs, numbers, dict(P=pixels, F=frames, D=width // heads, PRECISION=precision(v), num_stages=number)


@operation('along_time(Tensor qk, Tensor v, Tensor bias, int heads, int number=0) -> Tensor',
           fake=lambda qk, v, bias, heads, number=0: v.new_empty(v.shape))
def along_time_forward(qk: Tensor, v: Tensor, bias: Tensor, heads: int, number: int = 0) -> Tensor:
    qk, v, bias = in_rows(qk), in_rows(v), bias.contiguous()
    out = v.new_empty(v.shape)
    programs, numbers, constants = time_sizes(qk, v, bias, heads, number)
    launch('time_forward', v, (heads, programs, len(v)), qk, v, bias, out, *numbers, **constants)
    return out


@operation('along_time_backward(Tensor grad, Tensor qk, Tensor v, Tensor bias, int heads, int number=0)'
           ' -> (Tensor, Tensor, Tensor)',
           fake=lambda grad, qk, v, bias, heads, number=0: (
               torch.empty_like(in_rows(qk)), torch.empty_like(in_rows(v)), bias.new_empty(bias.shape)))
def along_time_backward(grad: Tensor, qk: Tensor, v: Tensor, bias: Tensor, heads: int, number: int = 0) -> tuple[Tensor, ...]:
    grad, qk, v, bias = grad.contiguous(), in_rows(qk), in_rows(v), bias.contiguous()
    grad_qk, grad_v = torch.empty_like(qk), torch.empty_like(v)                 # each in the layout of its own
    programs, numbers, constants = time_sizes(qk, v, bias, heads, number)
    b, f, frames = len(v), v.shape[1], constants['F']
    learnt = floats(v, programs, b, heads, frames, frames)
    launch('time_backward', v, (heads, programs, b), qk, v, bias, grad, grad_qk, grad_v, learnt, *numbers, **constants)
    learnt = learnt[..., :f, :f].sum(0 if bias.ndim == 5 else (0, 1))
    return grad_qk, grad_v, learnt.view_as(bias).to(bias.dtype)


class AlongTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qk, v, bias, heads):
        ctx.heads = heads
        ctx.save_for_backward(qk, v, bias)
        return along_time_forward(qk, v, bias, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *along_time_backward(grad, *ctx.saved_tensors, ctx.heads), None


along_time = AlongTime.apply


# ---- linear attention

def linear_shapes(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty: the result, the context (b heads d d), and the logarithm of the keys' sums (b heads d)."""
    b, n, width = qkv.shape
    d = width // 3 // heads
    return qkv.new_empty(b, n, width // 3), floats(qkv, b, heads, d, d), floats(qkv, b, heads, d)


def linear_sizes(qkv: Tensor, heads: int) -> tuple[tuple, dict]:
    d = qkv.shape[2] // 3 // heads
    return (qkv.shape[1], heads, d ** -0.5), dict(R=ROWS, D=d, PRECISION=precision(qkv))


@operation('linearly(Tensor qkv, int heads) -> (Tensor, Tensor, Tensor)', fake=linear_shapes)
def linearly_forward(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv, results, (numbers, constants) = qkv.contiguous(), linear_shapes(qkv, heads), linear_sizes(qkv, heads)
    launch('linear_forward', qkv, (heads, len(qkv)), qkv, *results, *numbers, **constants)
    return results


@operation('linearly_backward(Tensor grad, Tensor qkv, Tensor context, Tensor norm, int heads) -> Tensor',
           fake=lambda grad, qkv, context, norm, heads: qkv.new_empty(qkv.shape))
def linearly_backward(grad: Tensor, qkv: Tensor, context: Tensor, norm: Tensor, heads: int) -> Tensor:
    grad, qkv, (numbers, constants) = grad.contiguous(), qkv.contiguous(), linear_sizes(qkv, heads)
    grad_qkv = torch.empty_like(qkv)
    launch('linear_backward', qkv, (heads, len(qkv)), qkv, context, norm, grad, grad_qkv, *numbers, **constants)
    return grad_qkv


class Linearly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, heads):
        out, context, norm = linearly_forward(qkv, heads)
        ctx.heads = heads
        ctx.save_for_backward(qkv, context, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return linearly_backward(grad, *ctx.saved_tensors, ctx.heads), None


linearly = Linearly.apply


# ---- layer norm

def norm_sizes(x: Tensor) -> tuple[int, tuple, dict]:
    c = x.shape[-1]
    n, channels = x.numel() // c, power_of_two(c)
    rows = max(1, NUMBERS // channels)
    return -(-n // rows), (n, c, 1e-5), dict(R=rows, C=channels)


@operation('channel_norm(Tensor x, Tensor gain) -> Tensor', fake=lambda x, gain: x.new_empty(x.shape))
def channel_norm_forward(x: Tensor, gain: Tensor) -> Tensor:
    x, y, (tiles, numbers, constants) = x.contiguous(), x.new_empty(x.shape), norm_sizes(x)
    launch('layer_norm', x, (tiles,), x, gain, y, *numbers, **constants)
    return y


@operation('channel_norm_backward(Tensor grad, Tensor x, Tensor gain) -> (Tensor, Tensor)',
           fake=lambda grad, x, gain: (x.new_empty(x.shape), gain.new_empty(gain.shape)))
def channel_norm_backward(grad: Tensor, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, grad_x, (tiles, numbers, constants) = grad.contiguous(), x.contiguous(), x.new_empty(x.shape), norm_sizes(x)
    programs = min(tiles, 1024)
    learnt = floats(x, programs, x.shape[-1])
    launch('layer_norm_backward', x, (programs,), x, gain, grad, grad_x, learnt, *numbers, **constants)
    return grad_x, learnt.sum(0).to(gain.dtype)


class ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain):
        ctx.save_for_backward(x, gain)
        return channel_norm_forward(x, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return channel_norm_backward(grad, *ctx.saved_tensors)


channel_norm = ChannelNorm.apply


# ---- group norm, FiLM, SiLU, with the bias of the convolution before: silu(x a + b)

def act_sizes(x: Tensor, film: Tensor | None) -> tuple[int, tuple[int, int], int, dict]:
    """Frames that have a FiLM of their own; tiles and counts; rows of one count; what kernels know when they are compiled."""
    b, c, f, h, w = x.shape
    k = film.shape[1] if film is not None else 1
    size, channels = f // k * h * w, power_of_two(c)
    rows = max(1, NUMBERS // channels)
    return k, (-(-size // rows), b * k), size, dict(R=rows, C=channels)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def act_shapes(x: Tensor, film: Tensor | None, groups: int) -> tuple[Tensor, ...]:
    """Empty: the result; a and b (b k c); each channel's mean (b c); each group's mean and 1 / deviation (b groups 2)."""
    b, c, k = *x.shape[:2], film.shape[1] if film is not None else 1
    return torch.empty_like(last(x)), floats(x, b, k, c), floats(x, b, k, c), floats(x, b, c), floats(x, b, groups, 2)


@operation('norm_film_silu(Tensor x, Tensor beta, Tensor weight, Tensor bias, Tensor? film, int groups, float eps)'
           ' -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
           fake=lambda x, beta, weight, bias, film, groups, eps: act_shapes(x, film, groups))
def norm_film_silu_forward(x: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, groups: int,
                           eps: float) -> tuple[Tensor, ...]:
    x, (b, c), (k, grid, size, constants) = last(x), x.shape[:2], act_sizes(x, film)
    y, *kept = act_shapes(x, film, groups)
    mean, spread = floats(x, b, k, grid[0], c), floats(x, b, k, grid[0], c)
    launch('moments', x, grid, x, mean, spread, size, c, **constants)
    launch('settle', x, (b, groups), mean, spread, beta, weight, bias, film, *kept, size, grid[0], k, c, c // groups, eps,
           R=constants['R'], T=64, G=power_of_two(c // groups), WITH_FILM=film is not None)
    launch('activate', x, grid, x, y, *kept[:2], size, c, **constants)
    return y, *kept


@operation('norm_film_silu_backward(Tensor grad, Tensor x, Tensor beta, Tensor weight, Tensor bias, Tensor? film, Tensor a,'
           ' Tensor b, Tensor mean, Tensor stats, int groups) -> (Tensor, Tensor, Tensor)',
           fake=lambda grad, x, beta, weight, bias, film, *_: (
               torch.empty_like(last(x)), floats(x, 3, x.shape[1]), torch.empty_like(film if film is not None else weight)))
def norm_film_silu_backward(grad: Tensor, x: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, a: Tensor,
                            b: Tensor, mean: Tensor, stats: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x; what beta, weight and bias learn (3 c); grad_film."""
    grad, x, (k, grid, size, constants) = last(grad), last(x), act_sizes(x, film)
    clips, c = x.shape[:2]
    grad_a, grad_b = floats(x, clips, k, grid[0], c), floats(x, clips, k, grid[0], c)
    launch('slopes', x, grid, x, grad, a, b, grad_a, grad_b, size, c, **constants)
    grad_film, learnt = torch.empty_like(film if film is not None else weight), floats(x, clips, 3, c)
    p, q = floats(x, clips, c), floats(x, clips, c)
    launch('settle_backward', x, (clips, groups), grad_a, grad_b, beta, weight, bias, film, mean, stats, grad_film, p, q, learnt,
           size, grid[0], k, c, c // groups, T=64, G=power_of_two(c // groups), WITH_FILM=film is not None)
    grad_x = torch.empty_like(x)
    launch('deactivate', x, grid, x, grad, grad_x, a, b, p, q, size, k, c, **constants)
    return grad_x, learnt.sum(0), grad_film


class NormFilmSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, beta, weight, bias, film, groups, eps):
        y, *kept = norm_film_silu_forward(x, beta, weight, bias, film, groups, eps)
        ctx.groups = groups
        ctx.save_for_backward(x, beta, weight, bias, film, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept = ctx.saved_tensors
        _, *vectors, film = kept[:5]
        grad_x, learnt, grad_film = norm_film_silu_backward(grad, *kept, ctx.groups)
        learnt = (each.to(of.dtype) for each, of in zip(learnt, vectors))
        return grad_x, *learnt, grad_film if film is not None else None, None, None


def norm_film_silu(x: Tensor, beta: Tensor, norm: nn.GroupNorm, film: Tensor | None) -> Tensor:
    """silu of FiLM of norm(x + beta); beta (c); film: scale and shift, (b 1 2c) or (b f 2c)."""
    film = film.contiguous() if film is not None else None
    return NormFilmSilu.apply(x, beta, norm.weight, norm.bias, film, norm.num_groups, norm.eps)

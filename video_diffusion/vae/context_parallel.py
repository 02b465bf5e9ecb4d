"""Context parallelism: one clip, its frames shared out over several processes, exact in both directions.

A clip too big for one device is cut along time; every process keeps its frames from the first layer to the
last. Only two things in a causal convolutional network look beyond a process's own frames:

    CausalConv3d   frame t sees t-2, t-1 and t, so each process borrows the last two frames of the one before:

                   process 0          process 1          process 2
                   f0 f1 f2 f3 f4     f5 f6 f7 f8        f9 f10 f11 f12
                            '--'---->          '--'---->                    activations, in the forward,
                            <----'--'          <----'--'                    their gradients, in the backward

    GroupNorm      mean and variance run over all frames of the clip: the processes exchange a mean and a sum
                   of squared deviations per group of channels and combine them, never the activations.

Both are exact, gradients too: a borrowed frame's gradient travels back to its owner, who adds it to its own.
What a process computes is therefore one term of the clip's loss: *add up* losses and parameter gradients over
the group (`sum_gradients`). Per causal convolution, each process but the first receives b * c * 2 * h * w numbers,
in the backward pass likewise; per norm over the clip, each process sends its 2 * b * groups numbers to every
other. Nothing else travels but five integers per clip (`agree_on_counts`).

Layers learn what they must know about their frames from a `Piece` handed down with them. It also carries the
state of streaming: the last frames that each convolution has seen. Modules keep nothing between calls.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..networks.recompute import on_cpu
from . import planes
from .frame_shares import BORROWED, AllGather, Shares, memory_format, return_to_owners, start_borrowing


@dataclass(frozen=True)
class Piece:
    """What a layer must know about the frames it is given: decided once for a clip, then handed down."""
    first: bool = True               # they begin with the clip's special first frame, kept apart in time
    past: dict | None = None         # streaming: frames before these, by convolution; None at the start
    future: dict | None = None       # streaming: where each convolution leaves its last frames for the next
    shares: Shares | None = None     # the frames of the same clip that other processes hold

    def resampled(self, factor: float) -> 'Piece':
        """The same piece after time was halved (factor 0.5) or doubled (2)."""
        return self if self.shares is None else replace(self, shares=self.shares.resampled(factor))


# ---- the two layers that look beyond their own frames

class CausalConv3d(nn.Conv3d):
    """Output frame t sees input frames t-2, t-1 and t: two frames are put before the clip, zeros around it.

    Those are copies of the clip's first frame, or the frames of another process or of the last chunk where
    `piece` says that such come before.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, piece: Piece = Piece()) -> Tensor:
        if piece.shares is not None:
            return super().forward(PrependBorrowed.apply(x, piece.shares))
        past = self.frames_before(x[:, :, :1], x[:, :, -BORROWED:], piece)          # b c 2 h w
        if self.sees_one_image(x, piece):
            return self.as_image(x)
        return super().forward(torch.cat([past, x], dim=2))

    @torch.no_grad()
    def forget_the_past(self) -> None:
        """The same answer for an image, and for every frame of a clip the one that it would get as an image."""
        present = self.weight.sum(dim=2)
        self.weight.zero_()
        self.weight[:, :, -1] = present

    @torch.no_grad()
    def in_steps(self, x: Tensor, prepare, piece: Piece, reuse: bool = False) -> Tensor:
        """The same as `forward(prepare(0, f))`, a few frames at a time; prepare(start, stop) reads some of x.

        It goes from the last frame to the first. Nobody looks at a frame again once those after it are done,
        so with `reuse` the output takes the place of x; and what comes before the first frame is needed last,
        when a message from another process has had time to arrive.
        """
        frames, past = x.shape[2], None
        first, last = prepare(0, 1), prepare(max(0, frames - BORROWED), frames)
        if piece.shares is not None:
            arrival = start_borrowing(first, last, piece.shares)
        else:
            past = self.frames_before(first, last, piece)
        if self.sees_one_image(x, piece):
            return self.as_image(first)
        out = None
        for start, stop in reversed(steps(x)):
            inputs = prepare(max(0, start - BORROWED), stop)
            if start < BORROWED:
                past = arrival() if past is None else past
                inputs = torch.cat([past[:, :, start:], inputs], dim=2)
            y = super().forward(inputs)                                           # b c stop-start h w
            if out is None:
                fits = y.shape[1] == x.shape[1] and y.dtype == x.dtype
                out = x if reuse and fits else empty_clip(y, frames)
            out[:, :, start:stop] = y
        return out

    def frames_before(self, first: Tensor, last: Tensor, piece: Piece) -> Tensor:
        """The two frames before a piece, given its `first` and `last` frames; remembers the last."""
        if piece.past is None:
            past = first.expand(-1, -1, BORROWED, -1, -1)
        elif torch.is_grad_enabled():
            past = piece.past[self]              # asked for again where checkpointing recomputes a block
        else:
            past = piece.past.pop(self)          # memory freed at once
        if piece.future is not None:
            piece.future[self] = torch.cat([past, last], dim=2)[:, :, -BORROWED:].clone()
        return past

    def sees_one_image(self, x: Tensor, piece: Piece) -> bool:
        return x.shape[2] == 1 and piece.past is None and piece.shares is None

    def as_image(self, x: Tensor) -> Tensor:
        """All frames under the kernel are the same one, so its weights can be summed over time first."""
        return F.conv2d(x.squeeze(2), self.weight.sum(dim=2), self.bias, padding=self.padding[1:]).unsqueeze(2)


def steps(x: Tensor, first: bool = False, unit: int = 2, growth: float = 1.) -> list[tuple[int, int]]:
    """Cuts f frames into (start, stop), few enough for little memory: a multiple of `unit` frames, and the `first`.

    `growth`: by how much the largest feature map that is made of a frame exceeds the frame.
    """
    most = 2 ** 21 if on_cpu(x) else 2 ** 27                         # numbers; measured on the CPU only
    length = max(1, int(most / (unit * growth * x[:, :, :1].numel()))) * unit
    cuts = [0, *range(length + first, x.shape[2], length), x.shape[2]]
    return list(zip(cuts, cuts[1:]))


def at_once() -> bool:
    """Whether all frames are computed together: for gradients, and for a compiler, to which every step would be another program
    and the number of frames a constant."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def empty_clip(like: Tensor, frames: int) -> Tensor:
    b, c, _, h, w = like.shape
    return torch.empty((b, c, frames, h, w), dtype=like.dtype, device=like.device, memory_format=memory_format(like))


class GroupNorm(nn.GroupNorm):
    """Group norm as `x * scale + shift`; statistics over all frames ('clip') or over each one ('frame')."""

    def __init__(self, groups: int, channels: int, scope: str = 'clip'):
        super().__init__(groups, channels, eps=1e-6)
        self.scope = scope

    def forward(self, x: Tensor, piece: Piece = Piece()) -> Tensor:
        scale, shift = self.scale_and_shift(x, piece)
        return torch.addcmul(shift, x, scale).to(x.dtype)

    def scale_and_shift(self, x: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """In float32 or better, (b c 1 1 1) or with scope 'frame' (b c f 1 1)."""
        moments = frame_moments if torch.compiler.is_compiling() else FrameMoments.apply
        if planes.fits_planes(x):
            moments = planes.frame_moments
        mean, deviation = moments(x, self.num_groups)                     # b g f
        numbers = x[0, 0, 0].numel() * x.shape[1] // self.num_groups      # per frame
        if self.scope == 'clip':
            mean, deviation = planes.combine(mean, deviation, mean.new_ones(x.shape[2]) * numbers)       # b g 1
            counts = [x.shape[2]]
            if piece.shares is not None:                                  # the same of the processes as of the frames
                counts = piece.shares.counts
                own = torch.cat([mean, deviation], dim=-1)                                               # b g 2
                parts = AllGather.apply(own, piece.shares.group, 'group norm statistics')                # p b g 2
                mean, deviation = planes.combine(*parts.permute(3, 1, 2, 0), mean.new_tensor(counts) * numbers)
            numbers *= sum(counts)
        scale = torch.rsqrt(deviation / numbers + self.eps)
        width = x.shape[1] // self.num_groups
        scale, mean = (t.repeat_interleave(width, dim=1) for t in (scale, mean))                  # b c f|1
        scale = scale * self.weight[:, None]
        shift = self.bias[:, None] - mean * scale
        return scale[..., None, None], shift[..., None, None]


def frame_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of every frame's groups of channels: (b c f h w) -> twice (b g f)."""
    numbers = x.unflatten(1, (groups, -1)).to(torch.promote_types(x.dtype, torch.float32))     # b g c f h w
    mean = numbers.mean(dim=(2, 4, 5), keepdim=True)
    return mean[:, :, 0, :, 0, 0], (numbers - mean).square().sum(dim=(2, 4, 5))


class FrameMoments(torch.autograd.Function):
    """frame_moments, by hand because autograd would keep `x - mean`, a copy of the whole feature map, for every norm."""

    @staticmethod
    def forward(ctx, x: Tensor, groups: int):
        exact = torch.promote_types(x.dtype, torch.float32)
        means, deviations = [], []
        for frame in x.unbind(2):                                                     # b c h w
            numbers = frame.reshape(x.shape[0], groups, -1).to(exact)                 # b g n
            mean = numbers.mean(-1, keepdim=True)
            means.append(mean)
            deviations.append((numbers - mean).square_().sum(-1, keepdim=True))
        mean, deviation = torch.cat(means, dim=-1), torch.cat(deviations, dim=-1)
        ctx.save_for_backward(x, mean)
        return mean, deviation

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean: Tensor, grad_deviation: Tensor):
        x, mean = ctx.saved_tensors
        groups = x.unflatten(1, (mean.shape[1], -1))                                  # b g c f h w
        slope = 2. * grad_deviation
        offset = grad_mean / groups[0, 0, :, 0].numel() - slope * mean
        slope, offset = (t[:, :, None, :, None, None] for t in (slope, offset))
        return torch.addcmul(offset, groups, slope).flatten(1, 2).to(x.dtype), None


class PrependBorrowed(torch.autograd.Function):
    """(b c f h w) -> (b c 2+f h w): the frames before come from the processes that own them."""

    @staticmethod
    def forward(ctx, x: Tensor, shares: Shares):
        ctx.shares = shares
        past = start_borrowing(x[:, :, :1], x[:, :, -BORROWED:], shares)()
        return torch.cat([past, x], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_past, grad_x = grad[:, :, :BORROWED], grad[:, :, BORROWED:].clone()
        if ctx.shares.rank == 0:                           # before it stand copies of its own first frame
            grad_x[:, :, :1] += grad_past.sum(dim=2, keepdim=True)
        return_to_owners(grad_past, grad_x, ctx.shares)
        return grad_x, None

"""One clip, its frames shared out over the processes of a group: who holds what, and what travels.

    split_frames    the whole clip, known to every process  ->  this process's share
    gather_frames   this process's share                    ->  the whole clip, in every process

The first process also holds the clip's special first frame (see `causal_vae.py`). Shares may be uneven. Both
functions are differentiable under one convention, which holds for all of context parallelism: the loss is the
*sum* of what the processes compute, each from its own frames, and `sum_gradients` adds up parameter gradients
after the backward pass. (Where every process computes the same loss from a gathered clip, divide it by their
number.) All ranks here are ranks within the group; they become global ranks where a message is sent.

A process that died or hangs makes the others stop when the time-out of the group is up, with an error that
says who waited for whom; that time is given where the group is made (`distributed.py`).
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BORROWED = 2                      # frames before its own that a causal convolution sees: its kernel is 3 long


@dataclass(frozen=True)
class Shares:
    """Which process of the group holds how many frames, at one resolution in time."""
    group: dist.ProcessGroup
    rank: int                     # of this process, within the group
    counts: tuple[int, ...]       # frames of each process
    special: bool                 # the first process begins with the clip's special first frame

    def loans(self) -> dict[tuple[int, int], list[int]]:
        """{(lender, borrower): the lender's frames, -1 for its last}: BORROWED frames before each share.

        A share may be shorter than what the next process borrows; then the one before it lends too. Before
        the clip's first frame stand copies of that frame.
        """
        owner = [(process, i - n) for process, n in enumerate(self.counts) for i in range(n)]
        plan = {}
        for borrower in range(1, len(self.counts)):
            start = sum(self.counts[:borrower])
            for frame in range(start - BORROWED, start):
                lender, index = owner[max(0, frame)]
                plan.setdefault((lender, borrower), []).append(index)
        return plan

    def resampled(self, factor: float) -> 'Shares':
        kept = [int(self.special and process == 0) for process in range(len(self.counts))]
        return replace(self, counts=tuple(one + int((n - one) * factor) for one, n in zip(kept, self.counts)))


# ---- a clip's way into the processes and out again

def has_special_first_frame(frames: int, compression: int) -> bool:
    """1 + 4k frames begin with one that is kept apart in time, 4k frames do not, other numbers do not fit.

    Without it the first four frames of a reconstruction are alike: what comes before them is a copy of them, in every layer.
    """
    if frames > 0 and frames % compression == 0:
        return False
    if frames % compression == 1:
        return True
    low = frames // compression * compression
    with_first = f'nearest: {low + 1} or {low + 1 + compression}'
    without = f'nearest: {low or compression} or {low + compression}'
    raise ValueError(f'{frames} frames: time is compressed by {compression}, so a clip has 1 + a multiple of '
                     f'that ({with_first}), or a multiple without a special first frame ({without})')


def latent_shape(vae: nn.Module, num_frames: int, image_size: int | tuple[int, int]) -> tuple[int, int, int, int]:
    """(channels, frames, height, width) of the latents of videos."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    height, width = (side // vae.space_compression for side in sides)
    special = has_special_first_frame(num_frames, vae.time_compression)
    return vae.latent_channels, special + (num_frames - special) // vae.time_compression, height, width


def fitting_frames(frames: int, compression: int) -> int:
    """The most of them that are 1 + 4k. Of 4k a decoder makes the first four alike: it sees nothing before them."""
    kept = max(1, frames - (frames - 1) % compression)
    return compression if kept == 1 and frames >= compression else kept            # and not a single one, which would stand still


def split_frames(x: Tensor, group: dist.ProcessGroup, time_compression: int = 1) -> Tensor:
    """(b c f h w) -> this process's share of f; for a video give the `time_compression` of its VAE.

    The shares differ by at most one latent frame.
    """
    special = has_special_first_frame(x.shape[2], time_compression)
    latents = -(-x.shape[2] // time_compression)
    refuse_idle_processes(latents, group)
    shares = [latents // group.size() + (p < latents % group.size()) for p in range(group.size())]
    counts = [n * time_compression for n in shares]
    counts[0] -= (time_compression - 1) * special                  # the special first frame is one, not four
    return SplitFrames.apply(x, group, counts)


def gather_frames(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This process's share -> the whole clip (b c f h w), in every process."""
    counts = agree_on_counts(x, group)
    padded = torch.cat([x, x.new_zeros(*x.shape[:2], max(counts) - x.shape[2], *x.shape[3:])], dim=2)
    parts = AllGather.apply(padded, group, 'frames')
    return torch.cat([part[:, :, :n] for part, n in zip(parts, counts)], dim=2)


def sum_gradients(parameters, group: dist.ProcessGroup):
    """After backward(): adds up every parameter's gradient over the group, in every process, in one message per dtype."""
    kinds = {}
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:                    # a process without frames
                parameter.grad = torch.zeros_like(parameter)
            kinds.setdefault(parameter.dtype, []).append(parameter.grad)
    for grads in kinds.values():
        flat = torch.cat([grad.flatten() for grad in grads])
        with named_errors('parameter gradients', group):
            dist.all_reduce(flat, group=group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view(grad.shape))


def share_of_noise(x: Tensor, group: dist.ProcessGroup, generator: torch.Generator | None = None) -> Tensor:
    """Noise for this process's frames, cut from the clip's: those seeded alike do not draw the same twice."""
    counts = agree_on_counts(x, group)
    shape = (*x.shape[:2], sum(counts), *x.shape[3:])
    whole = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
    return whole.split(counts, dim=2)[group.rank()]


def agree_on_shares(x: Tensor, group: dist.ProcessGroup, compression: int = 1) -> Shares:
    """The `Shares` of the clip that x is a part of, checked. An image is the first process's alone."""
    counts = agree_on_counts(x, group)
    special = has_special_first_frame(sum(counts), compression)
    refuse_idle_processes(-(-sum(counts) // compression), group)
    alone = counts[0] == sum(counts)
    if any((n - (special and p == 0)) % compression or (n == 0 and not alone) for p, n in enumerate(counts)):
        raise ValueError(f'the processes hold {counts} frames: each must hold a multiple of {compression}, '
                         f'and the first the special frame too; use split_frames(x, group, {compression})')
    return Shares(group, group.rank(), tuple(counts), special)


def agree_on_counts(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Every process's number of frames, by its rank: the one exchange that is needed per clip."""
    with torch.no_grad():
        shape = torch.tensor(x.shape, device=x.device)
        shapes = AllGather.apply(shape, group, 'the shape of its frames').tolist()
    if len({(b, c, h, w) for b, c, _, h, w in shapes}) > 1:
        raise ValueError(f'the processes of a group hold parts of different clips, of shapes {shapes}: '
                         'only the number of frames may differ; give all of them the same batch')
    return [f for _, _, f, _, _ in shapes]


def refuse_idle_processes(latents: int, group: dist.ProcessGroup):
    if 1 < latents < group.size():
        raise ValueError(f'a clip of {latents} latent frames cannot be shared by {group.size()} processes: '
                         f'use at most {latents} (a single image stays with the first, the others wait)')


class SplitFrames(torch.autograd.Function):
    """In the backward pass every process gets the whole clip's gradient, put together from all shares."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, counts: list[int]):
        ctx.group, ctx.counts = group, counts
        return x.split(counts, dim=2)[group.rank()].contiguous(memory_format=memory_format(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return gather_frames(grad, ctx.group), None, None


# ---- what travels

def start_borrowing(first: Tensor, last: Tensor, shares: Shares):
    """Sends `last` frames to those that need them; returns a function that waits for those before `first`."""
    sends, receives = {}, {}
    for (lender, borrower), frames in shares.loans().items():
        if lender == shares.rank:
            sends[borrower] = torch.cat([last[:, :, i, None] for i in frames], dim=2).contiguous()
        if borrower == shares.rank:
            receives[lender] = torch.empty_like(first.expand(-1, -1, len(frames), -1, -1), memory_format=torch.contiguous_format)
    wait = exchange(sends, receives, shares.group, 'the frames that a causal convolution borrows')

    def finish() -> Tensor:
        wait()
        past = torch.cat(list(receives.values()), dim=2) if receives else first.expand(-1, -1, BORROWED, -1, -1)
        return past.contiguous(memory_format=memory_format(last))
    return finish


def return_to_owners(grad_past: Tensor, grad_x: Tensor, shares: Shares):
    """The way back: gradients of the frames that were borrowed are added to those of their owners."""
    sends, receives, start = {}, {}, 0
    plan = shares.loans()
    for (lender, borrower), frames in plan.items():
        if borrower == shares.rank:
            sends[lender] = grad_past[:, :, start:start + len(frames)].contiguous()
            start += len(frames)
        if lender == shares.rank:
            receives[borrower] = torch.empty_like(grad_past[:, :, :len(frames)], memory_format=torch.contiguous_format)
    exchange(sends, receives, shares.group, 'the gradient of the frames that it lent')()
    for borrower, grad in receives.items():
        for index, frame_grad in zip(plan[shares.rank, borrower], grad.unbind(2)):
            grad_x[:, :, index] += frame_grad


class AllGather(torch.autograd.Function):
    """(...) -> (processes, ...). In the backward pass the processes' gradients are added up."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, what: str):
        ctx.group, ctx.what = group, what
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        with named_errors(what, group):
            dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        with named_errors(f'the gradient of {ctx.what}', ctx.group):
            dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None, None


def exchange(sends: dict[int, Tensor], receives: dict[int, Tensor], group: dist.ProcessGroup, what: str):
    """Starts to send and receive, {rank in the group: tensor}; returns a function that waits for it."""
    def operation(kind, tensor, peer):
        return dist.P2POp(kind, tensor, dist.get_global_rank(group, peer), group)
    operations = [operation(dist.isend, tensor, peer) for peer, tensor in sends.items()]
    operations += [operation(dist.irecv, tensor, peer) for peer, tensor in receives.items()]
    peers = sorted({*sends, *receives})
    with named_errors(what, group, peers):
        works = dist.batch_isend_irecv(operations) if operations else []

    def wait():
        with named_errors(what, group, peers):
            for work in works:
                work.wait()
    return wait


@contextmanager
def named_errors(what: str, group: dist.ProcessGroup, peers: list[int] | None = None):
    """Says which operation of which process waited for whom when one is gone or the group's time is up."""
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        others = [ranks[p] for p in peers] if peers else [r for p, r in enumerate(ranks) if p != group.rank()]
        raise RuntimeError(
            f'process {ranks[group.rank()]} waited in vain for process {" and ".join(map(str, others))} '
            f'to exchange {what}: it has died or hangs, see its own output ({error})') from error


def memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format

"""Several processes, one training run: who am I, and what do we agree on?

`torchrun --nproc_per_node=4 train.py clips/` starts the same script four times and tells each process its
rank through environment variables. `init` joins them into a group and returns this process's place in it; a
script that was started alone gets a group of one, for which every function here is a no-op.

Who dies, hangs or was started with other settings must not leave the rest waiting: all waiting has an end, `timeout`, and
where one process may have much to do alone (drawing, saving, encoding) the others wait ten times as long.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class Processes:
    """This process's place among those that train together."""
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device('cpu')
    cpu_group: dist.ProcessGroup | None = None  # for small messages that should not wait for a GPU
    frames_group: dist.ProcessGroup | None = None  # those that hold the frames of the same clips; None: each has its own
    patient_group: dist.ProcessGroup | None = None  # like cpu_group, where one process may have much to do alone

    @property
    def is_main(self) -> bool:
        """The one that writes files and prints."""
        return self.rank == 0

    @property
    def sharers(self) -> int:
        """How many processes hold the frames of one clip."""
        return 1 if self.frames_group is None else self.frames_group.size()

    @property
    def data_rank(self) -> int:
        """Which clips of a batch are ours, among `data_size` parts; neighbours in rank share clips."""
        return self.rank // self.sharers

    @property
    def data_size(self) -> int:
        return self.world_size // self.sharers

    def any(self, flag: bool) -> bool:
        """True where it is true in any process."""
        if self.world_size == 1:
            return flag
        answer = torch.tensor([float(flag)])
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(answer.item())

    def wait(self) -> None:
        """Patiently, until all are here."""
        if self.world_size > 1:
            dist.barrier(group=self.patient_group)

    def by_main(self, action: Callable[[], object]) -> None:
        """The main process acts, while the others wait patiently. What it raises is raised in all of them."""
        fault = [None]
        if self.is_main:
            try:
                action()
            except (ValueError, OSError) as error:
                fault = [str(error)]
                if self.world_size == 1:
                    raise
        if self.world_size > 1:
            dist.broadcast_object_list(fault, 0, group=self.patient_group)
        if fault[0] is not None:
            raise ValueError(fault[0])

    def agree(self, settings: dict) -> None:
        """Refuse what is not the same in all processes: it would train all the same, or wait for ever."""
        if self.world_size == 1:
            return
        everyone = [None] * self.world_size
        dist.all_gather_object(everyone, {name: repr(value) for name, value in settings.items()}, group=self.cpu_group)
        different = [f'{name}: {everyone[0].get(name)!s:.200} in process 0 and {one.get(name)!s:.200} in process {rank}'
                     for rank, one in enumerate(everyone) for name in {**everyone[0], **one}
                     if one.get(name) != everyone[0].get(name)]
        if different:
            raise ValueError(f'processes were started with different settings ({"; ".join(different[:10])}): give all the same')

    def mean(self, values: Tensor) -> Tensor:
        """The average over the processes, on the device of `values`, so that nobody has to wait for a GPU."""
        if self.world_size > 1:
            values = values.clone(memory_format=torch.contiguous_format)  # it is written over, stride by stride
            dist.all_reduce(values, group=self.cpu_group if values.device.type == 'cpu' else None)
            values /= self.world_size
        return values

    def begin_alike(self, module: nn.Module) -> None:
        """All begin with the main process's weights."""
        if self.world_size > 1:
            for weight in module.state_dict().values():
                dist.broadcast(weight, 0, group=self.cpu_group if weight.device.type == 'cpu' else None)

    def gather(self, items: dict) -> dict:
        """The entries of all processes' dicts together, in the main one; patiently."""
        if self.world_size == 1:
            return items
        parts = [None] * self.world_size if self.is_main else None
        dist.gather_object(items, parts, dst=0, group=self.patient_group)
        return {key: value for part in parts or [] for key, value in part.items()}


def best_device(local_rank: int = 0) -> torch.device:
    if torch.cuda.is_available():
        return torch.device('cuda', local_rank)
    return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')


def usable_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name, of several alike the one of this process."""
    there = ['cpu'] + ['cuda'] * torch.cuda.is_available() + ['mps'] * torch.backends.mps.is_available()
    kind, _, index = name.partition(':')
    if kind not in there or not (index == '' or index.isdecimal()):
        raise ValueError(f'device={name!r}: this machine has {", ".join(there)}')
    return torch.device(name) if kind != 'cuda' or index else torch.device('cuda', local_rank)


def init(timeout: timedelta = timedelta(minutes=2), device: str | None = None, context_parallel: int = 1) -> Processes:
    """Join the group that torchrun announces, or be a group of one.

    A process that waits longer than `timeout` for the others raises, rather than hang for ever.
    With `context_parallel` so many processes share the frames of each clip: neighbours in rank, for as torchrun counts
    they are the devices of one machine. Of 8 processes and context_parallel=2:

        ranks     0 1     2 3     4 5     6 7       0, 2, 4 and 6 hold the first frames of their clips, the others the rest
        clips      a       b       c       d
    """
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    place = usable_device(device, local_rank) if device else best_device(local_rank)
    if world_size == 1:
        if context_parallel > 1:
            raise ValueError(f'context_parallel={context_parallel}: this process is alone; start several with torchrun')
        return Processes(device=place)
    if place.type == 'cuda':
        torch.cuda.set_device(place)
    dist.init_process_group('nccl' if place.type == 'cuda' else 'gloo', timeout=timeout)
    cpu_group = dist.new_group(backend='gloo', timeout=timeout)
    patient_group = dist.new_group(backend='gloo', timeout=10 * timeout)
    frames_group = None
    if context_parallel > 1:
        if world_size % context_parallel:
            raise ValueError(f'frames={context_parallel}: does not divide the {world_size} processes')
        frames_group, _ = dist.new_subgroups(context_parallel, timeout=timeout)         # of neighbours in rank
    return Processes(dist.get_rank(), world_size, place, cpu_group, frames_group, patient_group)


@contextmanager
def lost_others():
    """Within, the error of waiting in vain for a process is one sentence, whichever operation it was."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not any(sign in str(error) for sign in ('gloo', 'NCCL')):
            raise
        raise ConnectionError(f'process {dist.get_rank()} waited in vain for the others: one of them has died, hangs, or needs '
                              f'longer than the time-out; see its own output ({str(error).splitlines()[0]:.300})') from error


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

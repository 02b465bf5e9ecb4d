"""One run in one results folder: two would write over each other's checkpoints and mix up their logs.

    with hold('results', processes):        # ValueError: results is in use by process 4711 on fish, since 12:03:11 ...

The file `lock` tells people who is in there. What counts is a lock of the operating system on that file, which is gone the
moment its owner is, killed or not: nobody has to guess whether process 4711 is still the one that wrote its number. Of
several processes that train together the main one holds it. Where a system or its disk has no such locks, nothing is checked.
"""

import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from ..checkpoint import milestones
from ..distributed import Processes

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None


class Lock:
    def __init__(self, folder: str | Path):
        self.path, self.file = Path(folder) / 'lock', None

    def take(self) -> None:
        """Hold the folder, which is made if it is not there, or say who does. Holding it already, nothing happens."""
        while not self.is_ours():           # its last owner may remove the file after we have opened it: then once more
            self.release()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, 'a+', encoding='utf-8', errors='replace')
            try:
                if fcntl:
                    fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self.file.seek(0)
                owner = self.file.read(200).strip()
                self.file = self.file.close()
                raise ValueError(f'{self.path.parent} is in use by {owner or "another run"}: wait for it, or choose another '
                                 'results folder') from None
            except OSError:
                pass                        # a disk that knows no locks
            self.file.truncate(0)
            self.file.write(f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
            self.file.flush()

    def is_ours(self) -> bool:
        """Whether the file that we hold is still the one in the folder."""
        try:
            return self.file is not None and os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        ours = self.is_ours()
        if self.file is not None and fcntl is None:                        # Windows lets nobody remove an open file
            self.file = self.file.close()
        if ours:
            self.path.unlink(missing_ok=True)
        if self.file is not None:
            self.file = self.file.close()


@contextmanager
def hold(folder: str | Path, processes: Processes) -> Iterator[Lock]:
    lock = Lock(folder)
    processes.by_main(lock.take)
    try:
        yield lock
    finally:
        lock.release()


def refuse_another_run(folder: str | Path) -> None:
    """A new run would write over some of its checkpoints, and the newest would still be one of the other run's."""
    if milestones(folder):
        raise ValueError(f'{folder} already holds a run: load(-1) goes on with it, or choose another results_folder')

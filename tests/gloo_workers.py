"""A few gloo processes that run functions for the tests; started once for all tests of a file."""

import os
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from together import CONTEXT


class Workers:
    """`run(function, *args)` calls function(rank, *args) in every process and returns the list of results."""

    def __init__(self, number: int, timeout: float = 60.):
        store = os.path.join(tempfile.mkdtemp(), 'store')
        pipes = [CONTEXT.Pipe() for _ in range(number)]
        self.pipes = [ours for ours, _ in pipes]
        jobs = [(rank, number, store, timeout, theirs) for rank, (_, theirs) in enumerate(pipes)]
        self.processes = [CONTEXT.Process(target=serve, args=job, daemon=True) for job in jobs]
        for process in self.processes:
            process.start()

    def run(self, function, *args, patience: float = 90.):
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(patience):
                self.close()
                raise TimeoutError(f'process {rank} gave no answer to {function.__name__} in {patience} s')
            results.append(pipe.recv())
        errors = [result for status, result in results if status == 'error']
        assert not errors, '\n'.join(errors)
        return [result for _, result in results]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, number: int, store: str, timeout: float, pipe):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=number,
                            timeout=timedelta(seconds=timeout))
    while True:
        function, args = pipe.recv()
        try:
            pipe.send(('ok', function(rank, *args)))
        except BaseException:
            pipe.send(('error', f'process {rank}:\n{traceback.format_exc()}'))

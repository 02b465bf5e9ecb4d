"""A few gloo processes that run functions for the tests; started once, because starting takes seconds."""

import os
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Workers:
    """`run(function, *args)` calls function(rank, *args) in every process and returns the list of results."""

    def __init__(self, number: int, timeout: float = 60.):
        context = mp.get_context('spawn')
        store = os.path.join(tempfile.mkdtemp(), 'store')
        pipes = [context.Pipe() for _ in range(number)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [context.Process(target=serve, args=(rank, number, store, timeout, theirs), daemon=True)
                          for rank, (_, theirs) in enumerate(pipes)]
        for process in self.processes:
            process.start()

    def run(self, function, *args, patience: float = 90., ranks=None):
        ranks = range(len(self.pipes)) if ranks is None else ranks
        for rank in ranks:
            self.pipes[rank].send((function, args))
        results = []
        for rank in ranks:
            if not self.pipes[rank].poll(patience):
                self.close()
                raise TimeoutError(f'process {rank} gave no answer within {patience} s to {function.__name__}')
            status, result = self.pipes[rank].recv()
            results.append((status, result))
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

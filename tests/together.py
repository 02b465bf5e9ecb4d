"""Processes that tests start, forked from one that has imported PyTorch: an import takes four seconds of a core.

    output = together.run(2, 'train.py', 'clips/', '--steps', '4')     # two processes, as torchrun starts them
    started = together.Started(1, 'script.py')                         # one, alone; started.wait(), .returncode, .output

Of several the main process must come to an end by itself, whatever happens to the others; if it fails they are killed, for one
may stand still.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context('forkserver')         # a process that only imports, and forks
CONTEXT.set_forkserver_preload(['pytest', 'torch._dynamo', 'torchvision', 'video_diffusion.training.trainer',
                                'video_diffusion.training.vae_trainer', 'video_diffusion.training.script'])


def run(number: int, script: str | Path, *args, timeout: float = 200.) -> str:
    """What `number` processes print that run a script with these arguments in this folder; none may fail."""
    started = Started(number, script, *args)
    started.wait(timeout)
    assert started.returncode == 0, started.output
    return started.output


class Started:
    def __init__(self, number: int, script: str | Path, *args, cwd: str | Path = '.'):
        self.printed = tempfile.NamedTemporaryFile()                # which is gone with this object
        argv = [str(arg) for arg in (script, *args)]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
        self.process = CONTEXT.Process(target=lead, args=(number, argv, str(Path(cwd).resolve()), self.printed.name, environment))
        self.process.start()

    def wait(self, timeout: float) -> None:
        self.process.join(timeout)
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            raise TimeoutError(f'still running after {timeout} s: {self.output}')

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    @property
    def output(self) -> str:
        return Path(self.printed.name).read_text(errors='replace')


def lead(number: int, argv: list[str], cwd: str, printed: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ |= environment
    sys.path[:0] = [str(Path(argv[0]).resolve().parent), str(ROOT)]
    sys.argv = argv
    import torch
    torch.set_num_threads(1)
    with open(printed, 'wb') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, 'w', buffering=1, closefd=False) for stream in (1, 2))
    if number == 1:
        os._exit(run_script(argv[0]))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    main_process, *others = [fork(rank, number, port, argv[0]) for rank in range(number)]
    failed = os.waitpid(main_process, 0)[1] != 0
    for pid in others * failed:
        os.kill(pid, signal.SIGKILL)
    os._exit(int(any([os.waitpid(pid, 0)[1] for pid in others]) or failed))


def fork(rank: int, number: int, port: int, script: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    os._exit(run_script(script))


def run_script(script: str) -> int:
    code = 0
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    return code

"""Processes that train together, as torchrun starts them, out of one interpreter: it imports PyTorch once and then forks.

    python tests/together.py 2 train.py clips/ --steps 4

Three interpreters, torchrun's own and one for each process, cost three times the seconds that an import takes. The main process
must come to an end by itself, whatever happens to the others; if it fails they are killed, for one may stand still.
"""

import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

COMMAND = [sys.executable, __file__]


def main(number: int, script: str) -> int:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch._dynamo  # noqa: F401     which an optimiser imports at its first step

    import video_diffusion  # noqa: F401
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    main_process = fork(0, number, port, script)
    others = [fork(rank, number, port, script) for rank in range(1, number)]
    failed = os.waitpid(main_process, 0)[1] != 0
    for pid in others * failed:
        os.kill(pid, signal.SIGKILL)
    return int(any([os.waitpid(pid, 0)[1] for pid in others]) or failed)


def fork(rank: int, number: int, port: int, script: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    code = 0
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == '__main__':
    del sys.argv[0]
    sys.exit(main(int(sys.argv.pop(0)), sys.argv[0]))

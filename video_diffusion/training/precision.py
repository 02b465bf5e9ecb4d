"""On a GPU: numbers a little rougher and much faster, or the very same ones every time.

Tensor cores multiply float32 matrices as TF32, with 10 bits behind the point and not 23, about eight times as fast. PyTorch does
so for convolutions unasked, and for matrix products only when told. A GPU adds up in whatever order its threads finish, so two
runs differ in the last digit, and after some steps in more; deterministic kernels, which are slower, do not.
"""

import os

import torch

from ..distributed import Processes


def use_tensor_cores(processes: Processes) -> None:
    if processes.device.type != 'cuda' or torch.cuda.get_device_capability(processes.device)[0] < 8:
        return
    if processes.is_main:
        print('matrix products of float32 in TF32: 10 bits behind the point, as convolutions have them anyway')
    torch.set_float32_matmul_precision('high')


def be_deterministic() -> None:
    """Call it before anything runs on a GPU."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')          # one of the two sizes with which cuBLAS keeps an order
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False

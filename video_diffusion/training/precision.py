"""How exact numbers are: half precision, where the hardware has it; on a GPU matrix products a little rougher and much faster; or
the very same numbers every time.

Tensor cores multiply float32 matrices as TF32, with 10 bits behind the point and not 23, about eight times as fast. PyTorch does
so for convolutions unasked, and for matrix products only when told. A GPU adds up in whatever order its threads finish, so two
runs differ in the last digit, and after some steps in more; deterministic kernels, which are slower, do not.
"""

import os

import torch
from torch import nn

from ..distributed import Processes


def amp_dtype(device: torch.device) -> torch.dtype:
    """The half precision that this device is fast in."""
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == 'mps':
        return torch.float16
    # Without such instructions bf16 matrix products are emulated: measured 300 times slower than float32.
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    raise ValueError('amp=True: this CPU has no bf16 instructions, so mixed precision would be far slower than '
                     'float32. Leave amp off, or train on a GPU')


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


def refuse_few_bits(model: nn.Module) -> None:
    """What a step adds to a weight is mostly less than the last bit of 8 or 11, and is lost. Frozen weights need no more."""
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f'weights that learn are {weight.dtype}: give model.float(), and amp=True to compute in fewer bits')

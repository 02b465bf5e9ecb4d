"""Sharding: train a model that does not fit one device, on several of which none ever holds it whole.

Processes that train together usually hold the same weights, averages and Adam moments, all of them N times. ZeRO
(Rajbhandari et al. 2020, arXiv 1910.02054) lets each keep an N-th, its rows of every tensor, and borrow the rest
for as long as a block computes. This is PyTorch's second implementation of that, FSDP (Zhao et al. 2023, arXiv 2304.11277):

                                    process 0     process 1
    at rest                         w0            w1           and so the average and both of Adam's moments
    a block's turn: all-gather      w0 w1         w0 w1        for its forward pass, then freed; again for its backward pass
    its gradients                   g0 g1         h0 h1        of the clips of each process
    reduce-scatter                  (g0+h0)/2     (g1+h1)/2    to each process the rows that it keeps; optimiser and EMA work on

    >>> shard_weights(diffusion, processes)                    # before there is an optimiser: these are other weights
    >>> torch.save(whole(diffusion.state_dict(), keep=processes.is_main), path)
    >>> load(diffusion, torch.load(path))

A sharded weight is a DTensor, which looks like the whole and holds some rows. Checkpoints hold whole tensors, in the
one format there is: what two processes saved one can sample from, and four can train on.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ..distributed import Processes
from ..networks import BLOCKS


def shard_weights(diffusion: nn.Module, processes: Processes) -> None:
    """Cut all that learns, the network and perhaps a text encoder, into a share for each process, on its device."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes a second, and few shard
    processes.begin_alike(diffusion)
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for part in (diffusion.denoise_fn, diffusion.text_encoder):
        if part is None or not any(p.requires_grad for p in part.parameters()):
            continue
        frozen = {p for p in part.parameters() if not p.requires_grad}
        units = [module for module in part.modules() if isinstance(module, BLOCKS)]  # borrowed and given back one by one
        for module in (*units, part):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module', UserWarning)  # of in-place changes to blocks' outputs: we make none
    if hasattr(diffusion.text_encoder, 'tokens'):
        register_fsdp_forward_method(diffusion.text_encoder, 'tokens')  # weights are borrowed for this method, too


def is_share(tensor) -> bool:
    """Whether it is a DTensor, without importing what makes one."""
    return hasattr(tensor, 'to_local')


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_share(tensor) else tensor


def whole(state, keep: bool):
    """A state dict with its shards put together on the CPU. Every process must ask; where not `keep` nothing is kept."""
    if isinstance(state, dict):
        return {name: whole(value, keep) for name, value in state.items()}
    if not is_share(state):
        return state
    tensor = state.full_tensor()                                 # one at a time
    return tensor.cpu() if keep else None


def share(state, like):
    """The other way round: of a whole state dict the rows that we keep of whatever is sharded in `like`."""
    if isinstance(state, dict):
        return {name: share(value, like.get(name) if isinstance(like, dict) else like) for name, value in state.items()}
    if not is_share(like) or state.shape != like.shape:
        return state
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(state, like.device_mesh, like.placements, src_data_rank=None)  # None: each from its own copy


def load(part, state: dict, **how) -> None:
    """`part.load_state_dict(state, **how)` of a whole state, for a model, an EMA or an optimiser, sharded or not."""
    like = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):                  # has no state before its first step; then it is as the weights
        like = {'state': dict(enumerate(weight for group in part.param_groups for weight in group['params']))}
    part.load_state_dict(share(state, like), **how)

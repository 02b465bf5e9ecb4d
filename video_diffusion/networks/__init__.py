"""The networks, and how a checkpoint says which one it holds: {'unet': its arguments} or {'dit': its arguments}."""

from torch import nn

from ..checkpoint import same_settings
from .dit import DiT, DiTBlock
from .unet3d import BLOCKS as UNET_BLOCKS
from .unet3d import Unet3D

NETWORKS = {'unet': Unet3D, 'dit': DiT}
BLOCKS = (*UNET_BLOCKS, DiTBlock)        # what networks are made of, large enough to be shared out one by one: see shard.py


def network_config(network: nn.Module) -> dict:
    """What a checkpoint says about a network; of one that is none of ours it says nothing."""
    return next(({name: network.config} for name, kind in NETWORKS.items() if isinstance(network, kind)), {'unet': None})


def network_from_config(config: dict) -> nn.Module:
    """The untrained network, from that."""
    for name, kind in NETWORKS.items():
        if config.get(name) is not None:
            return kind(**config[name])
    raise ValueError('the checkpoint holds a network of your own: build it yourself and load its weights')


def same_network(mine: dict, stored: dict) -> bool:
    return all(same_settings(mine.get(name), stored.get(name), kind) for name, kind in NETWORKS.items())

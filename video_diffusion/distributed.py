"""Processes in a grid: data parallel along one axis, context parallel (one clip's frames) along the other.

    8 processes, frames=2:      frames 0  1
                          data 0:      0  1      processes 0 and 1 share one clip,
                               1:      2  3      processes 0, 2, 4, 6 hold the same frames of four clips
                               2:      4  5
                               3:      6  7

    mesh = data_and_frames_mesh(frames=2)
    vae.context_parallel(mesh.get_group('frames'))
    # gradients: sum over 'frames' (context_parallel.sum_gradients), then mean over 'data'
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def data_and_frames_mesh(frames: int, device_type: str = 'cpu', timeout: timedelta = timedelta(minutes=10),
                         adjacent: bool = True) -> DeviceMesh:
    """A mesh with the axes 'data' and 'frames' over all processes, every group of it with a time-out.

    `adjacent` puts neighbouring ranks (the devices of one machine, as torchrun counts) on the same clip.
    """
    world = dist.get_world_size()
    if frames < 1 or world % frames:
        raise ValueError(f'frames={frames}: does not divide the {world} processes')
    ranks = torch.arange(world)
    grid = ranks.view(-1, frames) if adjacent else ranks.view(frames, -1).T          # (data, frames)
    data_group, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=timeout)
    frames_group, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=timeout)
    return DeviceMesh.from_group([data_group, frames_group], device_type, mesh=grid,
                                 mesh_dim_names=('data', 'frames'))

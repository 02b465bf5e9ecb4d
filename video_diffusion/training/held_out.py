"""The loss on clips that are never trained on, by how noisy they are.

The loss of a training step says little: it depends on t more than on what the network has learnt, and a pretrained one begins
where the curve is flat. Here everything is fixed, so that nothing but the weights can change the number:

    the same clips, the same noise in each   x   five noise levels, t = 0.1 .. 0.9 of all steps

Much noise (0.9) tells of what a clip shows and whether it follows its caption, little noise (0.1) of fine detail. A run that
overfits gets worse here while its training loss still falls. It is asked of the averaged weights, those that samples come from,
at each milestone, and is in `log.csv`.

    >>> Trainer(diffusion, 'my_gifs', held_out=16)           # or: python train.py my_gifs/ --held-out 16
"""

import math

import torch
from torch import Tensor

from ..data.dataset import seeded_generator
from ..distributed import Processes

LEVELS = 0.1, 0.3, 0.5, 0.7, 0.9
COLUMNS = tuple(f'held_out_{level}' for level in LEVELS)


def loss_per_level(diffusion, clips, told, seed: int, processes: Processes) -> dict[str, float]:
    """The mean over `clips`, a GifDataset or LatentCache, which the processes share out; told(captions) is the condition."""
    total = torch.zeros(len(LEVELS), device=processes.device)
    for turn in range(math.ceil(len(clips) / processes.world_size)):
        # Who has none left asks for one again: were it only to wait, the others would wait for its share of sharded weights.
        number = turn * processes.world_size + processes.rank
        total += losses(diffusion, clips, number % len(clips), told, seed, processes.device) * (number < len(clips))
    return dict(zip(COLUMNS, (processes.mean(total) * processes.world_size / len(clips)).tolist()))


@torch.no_grad()
def losses(diffusion, clips, index: int, told, seed: int, device: torch.device) -> Tensor:
    """Of one clip, at each level."""
    clip, caption = clips.clip_and_caption(index, None)
    video, cond = clips.floats(clip[None].to(device)), told([caption])
    draws = diffusion.draw(1, device, seeded_generator(seed, 'held out', index, device=device))
    if cond is not None:
        draws['null_cond_mask'] = torch.zeros(1, dtype=torch.bool, device=device)
    steps = [torch.full((1,), int(level * diffusion.num_timesteps), device=device) for level in LEVELS]
    return torch.stack([diffusion(video, cond, t=t, **draws) for t in steps])

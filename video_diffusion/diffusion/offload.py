"""Only what computes is on the device: for models whose parts fit it one by one, but not together.

    T5 reads the prompts -> the transformer draws, 50 steps -> the VAE decodes           the others wait in the host's memory

Each part moves once per video, which takes a second or two where drawing takes minutes. CogVideoX-5B in bf16 then needs 11 GB on
the device at a time, and not 21.

    >>> diffusion = cogvideox_from_folder('CogVideoX-5b')
    >>> one_at_a_time(diffusion, torch.device('cuda'))        # instead of diffusion.to('cuda')
    >>> video = diffusion.sample(['a panda plays the guitar'], **how)
"""

from typing import Callable

import torch
from torch import nn

WAYS_IN = 'forward', 'forward_with_cond_scale', 'tokens', 'encode', 'decode'      # methods by which a part is asked


def one_at_a_time(diffusion: nn.Module, device: torch.device) -> None:
    """From here on each part of the model comes to `device` when it is asked something, and the one before it goes."""
    here: list[nn.Module] = []

    def at_home(part: nn.Module, method: Callable) -> Callable:
        def ask(*args, **how):
            if part not in here:
                for other in here:
                    other.to('cpu')
                here[:] = [part.to(device)]
            return method(*args, **how)
        return ask

    for part in (diffusion.text_encoder, diffusion.denoise_fn, getattr(diffusion, 'vae', None)):       # None has no way in
        for name in WAYS_IN:
            if hasattr(part, name):
                setattr(part, name, at_home(part, getattr(part, name)))
    for whole in (diffusion, getattr(diffusion, 'diffusion', diffusion)):         # tables and numbers of their own stay there
        for name, table in whole.named_buffers(recurse=False):
            setattr(whole, name, table.to(device))

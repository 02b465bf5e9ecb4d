"""What a network is asked for, how its error is weighed, and what its answer says about the clean video.

Of a noisy video x = alpha x_0 + sigma noise a network may be asked for

    noise    Ho et al. 2020 (arXiv 2006.11239); says next to nothing about x_0 where x is all noise
    v        alpha noise - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512), well-scaled at both ends
    x0       the clean video; says next to nothing about the noise where x is nearly clean

Each of them implies the others: `to_x0` and `to_noise` turn any answer into what a sampler needs.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import number, one_of

OBJECTIVES = ('noise', 'v', 'x0')
LOSSES = {'l1': F.l1_loss, 'l2': F.mse_loss}
SAFE_ALPHA_BAR = 1e-3       # of the last step: above it the noise says enough about x_0, even where nothing is clipped


def check_objective(objective: str, loss_type: str, alpha_bar: Tensor, min_snr_gamma: float | None, min_snr_power: float,
                    latents: bool) -> None:
    """Refuse what cannot be learnt, or cannot be sampled from, with this schedule (T)."""
    one_of('loss_type', loss_type, LOSSES)
    one_of('objective', objective, OBJECTIVES)
    if objective == 'noise' and alpha_bar[-1] == 0:
        raise ValueError("zero_snr=True with objective='noise': at the last step alpha is 0, so the network would be asked "
                         "for the very noise it is shown, which says nothing about the clip. Give objective='v' or 'x0'")
    if objective == 'noise' and latents and alpha_bar[-1] < SAFE_ALPHA_BAR:
        raise ValueError(f"objective='noise' with latents=True: on the way to x0 every error is divided by alpha, "
                         f"{alpha_bar[-1].sqrt():.1e} at the last step, and latents have no bounds to clip at: give objective='v'")
    if min_snr_gamma is not None and (loss_type != 'l2' or not min_snr_gamma > 0):
        raise ValueError(f"min_snr_gamma={min_snr_gamma} with loss_type={loss_type!r}: give a positive number (5 is usual) "
                         "and loss_type='l2', for it weighs squared errors")
    number('min_snr_power', min_snr_power, 0, 1)
    if min_snr_gamma is None and min_snr_power != 1:
        raise ValueError(f'min_snr_power={min_snr_power} bends the weights of min_snr_gamma: give that, too, or leave it out')


def check_parts(network: nn.Module, text_encoder: nn.Module | None, use_bert_cls: bool, prob_cond_frames: float,
                frame_noise: str) -> None:
    """Refuse a network that cannot be told what this diffusion would tell it."""
    if text_encoder is not None and not getattr(network, 'has_cond', True):
        raise ValueError(f'a text_encoder was given, but the network takes no captions: build it with cond_dim={text_encoder.dim}')
    widths = getattr(text_encoder, 'dim', None), getattr(network, 'cond_dim', None)
    if None not in widths and widths[0] != widths[1]:
        raise ValueError(f'the text_encoder says {widths[0]} numbers of a caption, the network was built with cond_dim={widths[1]}')
    if use_bert_cls and (text_encoder is not None or not getattr(network, 'use_bert_text_cond', False)):
        raise ValueError('text_use_bert_cls=True needs Unet3D(use_bert_text_cond=True) and no text_encoder of your own')
    if prob_cond_frames and not getattr(network, 'cond_frames', False):
        raise ValueError(f'prob_cond_frames={prob_cond_frames} needs a network that sees known frames: '
                         'Unet3D(..., cond_frames=True)')
    if prob_cond_frames and frame_noise == 'independent':
        raise ValueError(f"prob_cond_frames={prob_cond_frames} with frame_noise='independent' tells the network what it knows "
                         'twice: leave out one')


def target(objective: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is asked to predict."""
    return {'noise': noise, 'x0': x0, 'v': alpha * noise - sigma * x0}[objective]


def min_snr_weight(objective: str, alpha_bar: Tensor, gamma: float, power: float = 1.) -> Tensor:
    """The weight of each step's squared error (Hang et al. 2023, arXiv 2303.09556), finite from pure noise to clean video.

    Nearly clean steps, whose targets are easy or hopeless, would else outvote the others. On the error in x_0 the weight
    is min(snr, gamma). The same error is 1 / snr times as large in the noise and 1 / sigma^2 = snr + 1 times in v, so
    there the weight is divided by that. Towards pure noise the weight of x_0 and v falls to 0: with `zero_snr` the last
    step, where sampling begins, learns only from its neighbours.

    A network that is asked for x_0 has the opposite trouble. Its error grows with the noise, about as snr^(-1/2), for what
    cannot be known grows; so the gradient is mostly the luck of the noisiest clips. With the `power` 1/2 the weighted error is
    about the same at each step (what EDM2, arXiv 2312.02696, learns), and the toy world is drawn twice as precisely.
    """
    snr = (alpha_bar / (1 - alpha_bar)).clamp(min=1e-12)
    weight = snr.clamp(max=gamma) ** power
    return weight / {'noise': snr, 'v': snr + 1, 'x0': 1}[objective]


def to_x0(objective: str, output: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The clean video that a prediction implies, for the noisy video x."""
    if objective == 'noise':
        return (x - sigma * output) / alpha
    if objective == 'v':
        return alpha * x - sigma * output
    return output


def to_noise(x0: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The noise that a clean video implies, for the noisy video x."""
    return (x - alpha * x0) / sigma


def check_loss(x_start: Tensor, noise: Tensor | None, reduction: str, null_cond_prob: float | None) -> None:
    """What one loss is asked with."""
    one_of('reduction', reduction, ('mean', 'none'))
    number('null_cond_prob', null_cond_prob, 0, 1)
    if noise is not None and noise.shape != x_start.shape:
        raise ValueError(f'noise has shape {tuple(noise.shape)}: expected that of the videos, {tuple(x_start.shape)}')

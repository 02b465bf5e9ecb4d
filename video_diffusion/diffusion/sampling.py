"""From noise to a video: the settings, checked in one place, and what is wrapped around what.

A sampler (samplers.py) asks a denoiser again and again what the clean video is. Everything that steers a video wraps
that denoiser, from the inside out:

    network -> led by cond (guidance.py) -> clipped -> made to fit the known frames (known_frames.py) -> sampler

    >>> diffusion.sample(['a red ball'], 2., sampler='dpm++2m', steps=10)        # keywords are the fields of Sampling
    >>> Trainer(diffusion, 'my_gifs', sampler='dpm++2m', sample_steps=10)        # the same, at milestones; kept in checkpoints

A setting that makes no sense is refused before anything is drawn, or trained.
"""

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from ..checks import number, one_of, whole
from . import frame_levels, guidance, known_frames, samplers


@dataclass(frozen=True)
class Sampling:
    """How to draw. Trainers keep it in their checkpoints, so that sample.py draws as they did unless it is told otherwise."""
    sampler: str = 'ddpm'                         # 'ddpm', 'ddim', 'dpm++2m' or 'dpm++2m_sde'; see samplers.py
    steps: int | None = None                      # None: every step the model was trained with
    cond_scale: float = 1.                        # guidance: 1 follows cond as trained, more exaggerates it
    spacing: str = 'trailing'                     # 'trailing', 'leading', 'linspace' or, of few, 'cosine'
    eta: float = 0.                               # of 'ddim' only: the share of noise that is fresh
    guidance_rescale: float = 0.                  # these two are for large scales: see guidance.py
    dynamic_guidance: float | None = None         # exponent of a scale that grows during sampling
    wave_guidance: bool = False                   # a scale that jumps about instead, as CogVideoX's does
    known_by: str | None = None                   # 'level', 'network', 'guide' or 'replace', see known_frames.py; None: the best
    frame_guidance: float | None = None           # weight of 'guide'; None: 5
    # Of 'level': under which share of the noise steps known frames are shown. None: 0, or 0.05 for those that the model has
    # drawn itself, in a long video.
    known_noise: float | None = None
    history_scale: float = 1.                     # of 'level': how closely the others keep to known frames; 1 is as trained
    frame_lag: int = 0                            # steps from one frame to the next, 0: all together; see frame_levels.py

    def check(self, timesteps: int, *, has_cond: bool, negative: bool = False, has_known: bool = False,
              frame_noise: str = 'shared') -> None:
        """Refuse what makes no sense for a model of so many steps that is given cond, a negative, known frames, or not."""
        samplers.spaced_steps(timesteps, self.steps, self.spacing)
        one_of('sampler', self.sampler, samplers.SAMPLERS)
        number('cond_scale', self.cond_scale)
        number('eta', self.eta, 0, 1)
        number('guidance_rescale', self.guidance_rescale, 0, 1)
        number('dynamic_guidance', self.dynamic_guidance, above=0)
        number('frame_guidance', self.frame_guidance, 0)
        if self.eta and self.sampler != 'ddim':
            raise ValueError(f"eta={self.eta} says how much of DDIM's noise is fresh: it means nothing to sampler={self.sampler!r}")
        led = negative or self.guidance_rescale or self.dynamic_guidance is not None or self.wave_guidance
        if led and (not has_cond or self.cond_scale in (0, 1)):
            raise ValueError('negative, guidance_rescale, dynamic_guidance and wave_guidance need guidance: give cond and a '
                             f'cond_scale above 1 (it is {self.cond_scale})')
        if self.wave_guidance and self.dynamic_guidance is not None:
            raise ValueError('dynamic_guidance and wave_guidance are two ways for a scale to change: give one of them')
        if self.known_by is not None:
            one_of('known_by', self.known_by, known_frames.WAYS)
        if self.frame_guidance is not None and self.known_by not in (None, 'guide'):
            raise ValueError(f"frame_guidance={self.frame_guidance} is the weight of known_by='guide', not of {self.known_by!r}")
        self.check_levels(has_known, frame_noise)
        if not has_known and (self.known_by is not None or self.frame_guidance is not None):
            raise ValueError('known_by and frame_guidance say how the other frames are made to fit known ones: give first_frames, '
                             'or known and known_mask')

    def check_levels(self, has_known: bool, frame_noise: str) -> None:
        number('known_noise', self.known_noise, 0, frame_levels.LOW)
        number('history_scale', self.history_scale, 0)
        whole('frame_lag', self.frame_lag, 0)
        if frame_noise == 'shared' and (self.frame_lag or self.known_by == 'level'):
            raise ValueError("frame_lag and known_by='level' need a model whose frames have noise of their own: "
                             "GaussianDiffusion(frame_noise='independent')")
        if self.frame_lag and self.known_by not in (None, 'level'):
            raise ValueError(f"frame_lag={self.frame_lag} with known_by={self.known_by!r}: frames of different noise are known "
                             "by their level; leave known_by out")
        if (self.frame_lag or self.history_scale != 1) and (self.dynamic_guidance is not None or self.wave_guidance):
            raise ValueError('dynamic_guidance and wave_guidance go by the noise of a whole video, and with frame_lag or '
                             'history_scale its frames differ: leave one of them out')
        by_level = has_known and frame_noise == 'independent' and self.known_by in (None, 'level')
        if not by_level and (self.known_noise or self.history_scale != 1):
            raise ValueError("known_noise and history_scale say how frames are known by their level: give known frames to a model "
                             "with frame_noise='independent', and leave known_by out")

    def scale_at(self, t: int, timesteps: int, steps: int) -> float:
        """The scale at step t of so many timesteps, of which the sampler takes so many steps."""
        if self.wave_guidance:
            return guidance.wave_scale(self.cond_scale, t, steps)
        if self.dynamic_guidance is not None:
            return guidance.dynamic_scale(self.cond_scale, 1 - (t + 1) / timesteps, self.dynamic_guidance)
        return self.cond_scale

    def changed(self) -> dict:
        """The settings that are not the default: keywords for `sample`, and what a checkpoint holds."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}


def draw(
    diffusion, noise: Tensor, settings: Sampling,
    *,
    cond: Tensor | None, negative: Tensor | None,     # (b cond_dim): follow the one, and away from the other
    known: Tensor | None, mask: Tensor | None,        # (b c f h w) in [-1, 1], of which the (b f) bool are known
    way: list[Tensor] | None,                         # collects what the sampler goes through, if somebody asks
    generator: torch.Generator | None, progress: samplers.Progress,
) -> Tensor:
    """Noise (b c f h w) -> a clean video in [-1, 1], by a GaussianDiffusion."""
    known_by = None if known is None else settings.known_by or known_frames.best_way(diffusion)
    if known_by == 'guide':              # its gradients need tensors that a caller's inference mode has not made
        noise, known, mask, cond, negative = (x if x is None else x.clone() for x in (noise, known, mask, cond, negative))
    steps = samplers.spaced_steps(diffusion.num_timesteps, settings.steps, settings.spacing)
    denoise = diffusion.denoiser(
        cond, partial(settings.scale_at, timesteps=diffusion.num_timesteps, steps=len(steps)), negative=negative,
        rescale=settings.guidance_rescale, known=(known, mask) if known_by == 'network' else None)
    limit = math.inf if diffusion.latents else 1.
    if known_by == 'guide':
        weight = 5. if settings.frame_guidance is None else settings.frame_guidance
        denoise = known_frames.guided(denoise, known, mask, diffusion.alpha, weight, limit)
    if settings.frame_lag or known_by == 'level':
        steps = frame_levels.levels(steps, noise.shape[2], settings.frame_lag)
    if known_by == 'level':
        if settings.history_scale != 1:
            denoise = known_frames.led_by_known(denoise, noise, mask, settings.history_scale, diffusion.num_timesteps - 1, limit)
        level = round((settings.known_noise or 0) * diffusion.num_timesteps) - 1
        steps, noise = known_frames.at_level(steps, noise, known, mask, level, diffusion.alpha_bar)
    elif known is not None and not (diffusion.latents and known_by == 'network'):   # of latents it is told only about right
        denoise = known_frames.replaced(denoise, known, mask)
    if way is not None:
        denoise = samplers.recorded(denoise, way)
    sampler = partial(samplers.ddim, eta=settings.eta) if settings.eta else samplers.SAMPLERS[settings.sampler]
    x = sampler(denoise, noise, diffusion.alpha_bar, steps, generator=generator, progress=progress)
    return torch.where(mask[:, None, :, None, None], known, x) if known_by == 'level' else x

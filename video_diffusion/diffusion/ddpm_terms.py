"""The same diffusion in the terms of the DDPM paper (Ho et al. 2020, arXiv 2006.11239), for a batch with steps of its own.

For those who hold the paper beside the code, and for scripts that were written for `video-diffusion-pytorch`, which names its
tables and steps so; of all this the library itself uses `alpha_sigma` and `q_sample`, for its loss and in `predict_x0`.
Every table has a number for each step, float32:

    here             paper                                  here                     paper
    betas            beta_t                                 posterior_variance       beta~_t, eq. 7
    alphas_cumprod   alpha bar_t                            posterior_mean_coef1, 2  of x_0 and of x_t in eq. 7
"""

from typing import Sequence

import torch
from torch import Tensor

from .guidance import Cond
from .noise_schedule import posterior


def table(formula):
    """A property: `formula` of alpha bar and of alpha bar one step before, from the float64 schedule, where the model is."""
    def read(self) -> Tensor:
        before = torch.cat((torch.ones_like(self.alpha_bar[:1]), self.alpha_bar[:-1]))
        return formula(self.alpha_bar, before).float().to(self.alpha.device, non_blocking=True)
    return property(read)


class DDPMTerms:
    """What a GaussianDiffusion has beside `forward` and `sample`. Videos are (b c f h w) in [-1, 1], t (b) or (b f)."""

    betas = table(lambda here, before: 1 - here / before)
    alphas_cumprod = table(lambda here, before: here)
    alphas_cumprod_prev = table(lambda here, before: before)
    sqrt_alphas_cumprod = table(lambda here, before: here.sqrt())
    sqrt_one_minus_alphas_cumprod = table(lambda here, before: (1 - here).sqrt())
    log_one_minus_alphas_cumprod = table(lambda here, before: (1 - here).log())
    sqrt_recip_alphas_cumprod = table(lambda here, before: here.rsqrt())
    sqrt_recipm1_alphas_cumprod = table(lambda here, before: (1 / here - 1).sqrt())
    posterior_mean_coef1 = table(lambda here, before: posterior(here, before)[0])
    posterior_mean_coef2 = table(lambda here, before: posterior(here, before)[1])
    posterior_variance = table(lambda here, before: posterior(here, before)[2])
    posterior_log_variance_clipped = table(lambda here, before: posterior(here, before)[2].clamp(min=1e-20).log())

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.per_sample(self.alpha[t]), self.per_sample(self.sigma[t])

    @staticmethod
    def per_sample(values: Tensor) -> Tensor:
        """(b) -> (b 1 1 1 1), or (b f) -> (b 1 f 1 1), to multiply videos with."""
        return values.view(len(values), 1, -1, 1, 1)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_start with the noise of step t."""
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_start + sigma * noise

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_t | x_0): mean, variance and its logarithm."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_start, sigma ** 2, self.per_sample(self.log_one_minus_alphas_cumprod[t])

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return (x_t - sigma * noise) / alpha

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x_0): mean, variance and log-variance, which is clipped where the variance is 0, at t = 0."""
        a, b, variance, log_variance = (self.per_sample(column[t]) for column in (
            self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_variance, self.posterior_log_variance_clipped))
        return a * x_start + b * x_t, variance, log_variance

    def p_mean_variance(self, x: Tensor, t: Tensor, clip_denoised: bool = True, cond: Tensor | None = None,
                        cond_scale: float = 1.) -> tuple[Tensor, Tensor, Tensor]:
        """p(x_{t-1} | x_t): the posterior at the network's idea of x_0."""
        return self.q_posterior(self.predict_x0(x, t, cond, cond_scale, clip_denoised), x, t)

    @torch.no_grad()
    def p_sample(self, x: Tensor, t: Tensor, cond: Tensor | None = None, cond_scale: float = 1.,
                 clip_denoised: bool = True) -> Tensor:
        """One step of ancestral sampling, x_t -> x_{t-1}."""
        mean, variance, _ = self.p_mean_variance(x, t, clip_denoised, cond, cond_scale)
        return mean + variance.sqrt() * torch.randn_like(x)

    def p_sample_loop(self, shape: Sequence[int], cond: Cond = None, cond_scale: float = 1.) -> Tensor:
        """`sample` with all its steps; videos in [0, 1]."""
        self.check(torch.empty(tuple(shape), device='meta'))
        return self.sample(cond, cond_scale, shape[0])

"""The diagonal Gaussian that a VAE's encoder describes: one mean and one variance for every latent number.

The encoder of a variational autoencoder (Kingma & Welling 2014, arXiv 1312.6114) does not answer with a
latent but with a distribution over latents. Training draws from it with the reparameterisation trick,

    z = mean + std * noise,        noise ~ N(0, 1)

so that gradients reach mean and std, and pays for every bit by which it differs from N(0, 1):

    KL(N(m, s^2) || N(0, 1)) = 1/2 (m^2 + s^2 - 1 - log s^2)        summed over all latent numbers

Latents may have any number of axes, (b, c, h, w) or (b, c, f, h, w): sums run over all but the batch axis.
"""

import torch
from torch import Tensor


class DiagonalGaussian:
    def __init__(self, mean: Tensor, logvar: Tensor):
        self.mean = mean
        self.logvar = logvar.clamp(-30., 20.)    # std between 3e-7 and 2e4

    @classmethod
    def from_moments(cls, moments: Tensor):
        """From what an encoder puts out: mean and log-variance stacked on the channel axis, (b, 2c, ...)."""
        return cls(*moments.chunk(2, dim=1))

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        like = dict(device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator, **like)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(self || N(0, 1)) for each item of the batch, (b,)."""
        return (0.5 * (self.mean ** 2 + self.var - 1. - self.logvar)).flatten(1).sum(1)

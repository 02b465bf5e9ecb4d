"""The diagonal Gaussian against torch.distributions, in four and five axes.

Run: pytest tests/test_gaussian.py
"""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from video_diffusion.vae.gaussian import DiagonalGaussian

SHAPES = [(2, 4, 3, 5), (2, 4, 3, 5, 6)]


def random_gaussian(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return DiagonalGaussian(*torch.randn((2, *shape), generator=generator, dtype=torch.float64))


@pytest.mark.parametrize('shape', SHAPES)
def test_kl_equals_that_of_torch_distributions(shape):
    ours = random_gaussian(shape, 0)
    normal = Normal(torch.zeros_like(ours.mean), torch.ones_like(ours.mean))
    expected = kl_divergence(Normal(ours.mean, ours.std), normal).flatten(1).sum(1)
    torch.testing.assert_close(ours.kl(), expected)
    assert ours.kl().shape == (2,)


def test_kl_is_zero_for_a_standard_gaussian_and_otherwise_positive():
    zeros = torch.zeros(SHAPES[1], dtype=torch.float64)
    torch.testing.assert_close(DiagonalGaussian(zeros, zeros).kl(), torch.zeros(2, dtype=torch.float64))
    assert (random_gaussian(SHAPES[1], 0).kl() > 0).all()


def test_samples_have_the_mean_and_std_and_repeat_with_the_generator():
    gaussian = DiagonalGaussian(torch.full((1, 1, 100, 200), 3.), torch.full((1, 1, 100, 200), 0.5).log() * 2)
    draw = gaussian.sample(torch.Generator().manual_seed(0))
    assert abs(draw.mean() - 3.) < 0.02 and abs(draw.std() - 0.5) < 0.02
    assert torch.equal(draw, gaussian.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(draw, gaussian.sample(torch.Generator().manual_seed(1)))
    assert gaussian.mode() is gaussian.mean


def test_moments_split_on_the_channel_axis_and_logvar_is_clamped():
    moments = torch.tensor([1., 2., -99., 99.]).reshape(1, 4, 1, 1, 1)
    gaussian = DiagonalGaussian.from_moments(moments)
    assert gaussian.mean.flatten().tolist() == [1., 2.]
    assert gaussian.logvar.flatten().tolist() == [-30., 20.]


def test_gradients_reach_mean_and_std_through_a_sample():
    moments = torch.zeros(1, 2, 1, 1, 1, requires_grad=True)
    DiagonalGaussian.from_moments(moments).sample(torch.Generator().manual_seed(0)).sum().backward()
    noise = torch.randn(1, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moments.grad.flatten(), torch.tensor([1., noise.item() / 2]))

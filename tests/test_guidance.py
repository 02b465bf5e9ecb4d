"""Guidance is the formulas of its papers, at every step of a sample. Run: pytest tests/test_guidance.py"""

import math

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from video_diffusion import GaussianDiffusion, Unet3D, WordEncoder
from video_diffusion.diffusion import guidance


def tiny(**kwargs):
    torch.manual_seed(0)
    unet = Unet3D(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, cond_dim=4)
    return GaussianDiffusion(unet, image_size=8, num_frames=3, timesteps=20, objective='v', **kwargs)


def test_guidance_moves_from_without_to_beyond_with():
    unet = tiny().denoise_fn
    x, t, cond = torch.randn(2, 3, 3, 8, 8), torch.tensor([3, 4]), torch.randn(2, 4)
    with torch.no_grad():
        with_cond, without = unet(x, t, cond), unet(x, t, cond, null_cond_prob=1.)
        assert not torch.allclose(with_cond, without)
        for scale, expected in ((1., with_cond), (0., without), (3., without + 3 * (with_cond - without))):
            torch.testing.assert_close(unet.forward_with_cond_scale(x, t, cond, cond_scale=scale), expected)


@pytest.mark.parametrize('rescale', [0., 0.7, 1.])
def test_rescaling_equals_diffusers(rescale):
    with_cond, without = torch.randn(2, 4, 3, 2, 8, 8) * torch.tensor([1., 2., 3., 4.]).view(4, 1, 1, 1, 1)
    guided = guidance.guide(with_cond, without, 6., rescale)
    torch.testing.assert_close(guided, rescale_noise_cfg(guidance.guide(with_cond, without, 6.), with_cond, rescale))
    if rescale == 1:  # the spread is that of the conditional prediction again
        torch.testing.assert_close(guided.std(dim=(1, 2, 3, 4)), with_cond.std(dim=(1, 2, 3, 4)))


class Constant(nn.Module):
    """A network that knows the public package's signature only: answers with its condition, and 0 without one."""
    has_cond = True

    def __init__(self):
        super().__init__()
        self.scales = []

    def forward_with_cond_scale(self, x, time, cond=None, cond_scale=2.):
        self.scales.append(cond_scale)
        return torch.linspace(0, 1, x[0].numel()).view(x[0].shape) * cond.view(-1, 1, 1, 1, 1) * cond_scale


def constant(**kwargs):
    return GaussianDiffusion(Constant(), image_size=8, num_frames=2, timesteps=1000, objective='x0', **kwargs)


@pytest.mark.parametrize('how, progress', [
    (dict(dynamic_guidance=5.), [i / 10 for i in range(10)]),                              # step i of n, as it was meant
    (dict(wave_guidance=True), [(10 - t) / 10 for t in range(999, 0, -100)]),              # t of a thousand, as it is computed
])
def test_a_dynamic_scale_is_that_of_cogvideox_at_every_step(monkeypatch, how, progress):
    """1 + s (1 - cos(pi progress^5)) / 2."""
    scales = []
    monkeypatch.setattr(guidance, 'guide', lambda x, _, scale, rescale: scales.append(scale) or x)
    monkeypatch.setattr(guidance, 'dynamic_scale', lambda *args, plain=guidance.dynamic_scale: plain(*args) + 1e-9)   # never just 1
    constant().sample(torch.ones(1, 1), cond_scale=6., steps=10, progress=False, **how)
    assert scales == pytest.approx([1 + 6 * (1 - math.cos(math.pi * p ** 5)) / 2 for p in progress])


def test_ends_and_waves_of_a_dynamic_scale():
    assert guidance.dynamic_scale(6., 0., 5) == 1 and guidance.dynamic_scale(6., 1., 5) == 7
    waves = [round(guidance.wave_scale(6., t, 50), 2) for t in range(999, 0, -20)]
    assert waves[:8] == [2.29, 2.54, 6.97, 6.42, 2.79, 4.27, 1.04, 4.17]                   # as told by those who met them
    with pytest.raises(ValueError, match='give one of them'):
        constant().sample(torch.ones(1, 1), cond_scale=6., wave_guidance=True, dynamic_guidance=5.)
    with pytest.raises(ValueError, match='need guidance'):
        constant().sample(torch.ones(1, 1), wave_guidance=True)


def test_a_negative_prompt_takes_the_place_of_no_condition():
    diffusion = tiny()
    cond, negative, noise = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 3, 3, 8, 8)
    draw = lambda cond, **kwargs: diffusion.sample(cond, noise=noise, sampler='ddim', steps=1, progress=False, **kwargs)
    # From its own negative there is nowhere to go: any scale is scale 1.
    torch.testing.assert_close(draw(cond, cond_scale=3., negative=cond), draw(cond), rtol=0, atol=1e-5)
    t = torch.full((2,), 19)
    with torch.no_grad():
        a, b = diffusion.denoise_fn(noise, t, cond), diffusion.denoise_fn(noise, t, negative)
    alpha, sigma = diffusion.alpha_sigma(t)
    expected = (alpha * noise - sigma * (b + 3 * (a - b))).clamp(-1, 1)
    found = draw(cond, cond_scale=3., negative=negative)
    torch.testing.assert_close(found * 2 - 1, expected, rtol=0, atol=1e-5)
    assert (found - draw(cond, cond_scale=3.)).abs().max() > 1e-3
    torch.testing.assert_close(draw(cond, cond_scale=3., negative=negative[:1])[:1], found[:1], rtol=0, atol=1e-5)


def test_a_negative_prompt_may_be_one_string_for_all():
    diffusion = tiny(text_encoder=WordEncoder(4))
    draw = lambda negative: diffusion.sample(['up', 'down'], cond_scale=3., negative=negative, steps=2, seed=0, progress=False)
    assert torch.equal(draw('left'), draw(['left', 'left']))
    assert not torch.equal(draw('left'), draw('right'))


def test_rescaling_reaches_the_samples_of_any_network():
    """Conditional answer r, unconditional 0: scale 3 says 3 r, which fully rescaled is r again."""
    draw = lambda **kwargs: constant().sample(torch.full((1, 1), 0.9), steps=2, progress=False, **kwargs)
    ramp = torch.linspace(0, 0.9, 3 * 2 * 8 * 8).view(1, 3, 2, 8, 8)
    torch.testing.assert_close(draw(cond_scale=3., guidance_rescale=1.) * 2 - 1, ramp, rtol=0, atol=1e-4)
    torch.testing.assert_close(draw(cond_scale=3.) * 2 - 1, (3 * ramp).clamp(max=1), rtol=0, atol=1e-4)


def test_clip_is_static_or_dynamic():
    x0 = torch.linspace(-4, 2, 601).view(1, 1, 1, 1, 601)
    assert torch.equal(guidance.clip(x0), x0.clamp(-1, 1))
    bound = x0.abs().quantile(0.8)  # 2.8
    torch.testing.assert_close(guidance.clip(x0, 0.8), x0.clamp(-bound, bound) / bound)
    assert torch.equal(guidance.clip(x0 / 8, 0.8), x0 / 8)  # what is in range stays


def test_options_that_would_do_nothing_are_refused():
    diffusion = tiny()
    cond = torch.randn(2, 4)
    for option in (dict(negative=cond), dict(guidance_rescale=0.7), dict(dynamic_guidance=5.)):
        with pytest.raises(ValueError, match='need guidance.*it is 1.0'):
            diffusion.sample(cond, **option)
        with pytest.raises(ValueError, match='give cond'):
            diffusion.sample(cond_scale=3., **option)
    with pytest.raises(ValueError, match='negative for 3 videos and cond for 2'):
        diffusion.sample(cond, cond_scale=3., negative=torch.randn(3, 4))

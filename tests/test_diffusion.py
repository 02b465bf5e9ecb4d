"""The diffusion process against closed forms and against video-diffusion-pytorch 0.6.3. Run: pytest tests/test_diffusion.py"""

import math

import pytest
import torch
from torch import nn
from video_diffusion_pytorch import GaussianDiffusion as PeerDiffusion

from test_unet3d import SMALL, twins
from video_diffusion import GaussianDiffusion, Unet3D, WordEncoder, samplers
from video_diffusion.noise_schedule import cosine_schedule, posterior, shifted, target, to_noise, to_x0

TINY = dict(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8)


def tiny(cond_dim=None, text_encoder=None, **kwargs):
    torch.manual_seed(0)
    kwargs = {**dict(image_size=8, num_frames=3, timesteps=20), **kwargs}
    return GaussianDiffusion(Unet3D(**TINY, cond_dim=cond_dim), text_encoder=text_encoder, **kwargs)


class Predicts(nn.Module):
    """A stand-in for the network: answers with what it was told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, time, cond=None, **kwargs):
        return self.answer(x, time)

    def forward_with_cond_scale(self, x, time, cond=None, cond_scale=2.):
        return self.answer(x, time)


# Schedule and conversions

def test_cosine_schedule_is_its_closed_form_and_float64():
    alpha_bar = cosine_schedule(1000)
    assert alpha_bar.dtype == torch.float64
    f = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 1, 500, 998):
        assert alpha_bar[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-12)
    # the last beta would be 1 and is held at 0.9999
    assert (alpha_bar[999] / alpha_bar[998]).item() == pytest.approx(1e-4, rel=1e-9)


def test_a_shift_divides_the_signal_to_noise_ratio():
    plain = cosine_schedule(100)
    snr = lambda alpha_bar: alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(snr(shifted(plain, 5.)), snr(plain) / 5)
    torch.testing.assert_close(tiny(schedule_shift=5.).alpha_bar, shifted(cosine_schedule(20), 5.))
    assert torch.equal(shifted(plain, 1.), plain)
    with pytest.raises(ValueError, match='schedule_shift=0'):
        tiny(schedule_shift=0)


def test_posterior_is_bayes_rule():
    """Var and mean of x_prev given x_t and x_0, from the product of two Gaussians."""
    alpha_bar = cosine_schedule(100)
    for t in (1, 50, 99):
        here, before = alpha_bar[t], alpha_bar[t - 1]
        beta = 1 - here / before
        precision = 1 / (1 - before) + (1 - beta) / beta
        a, b, variance = posterior(here, before)
        assert variance.item() == pytest.approx((1 / precision).item(), rel=1e-9)
        assert a.item() == pytest.approx((before.sqrt() / (1 - before) / precision).item(), rel=1e-9)
        assert b.item() == pytest.approx(((1 - beta).sqrt() / beta / precision).item(), rel=1e-9)


@pytest.mark.parametrize('objective', ['noise', 'v', 'x0'])
def test_conversions_recover_what_was_mixed(objective):
    x0, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    alpha, sigma = 0.6, 0.8
    x = alpha * x0 + sigma * noise
    output = target(objective, x0, noise, alpha, sigma)
    torch.testing.assert_close(to_x0(objective, output, x, alpha, sigma), x0)
    torch.testing.assert_close(to_noise(x0, x, alpha, sigma), noise)


# Parity

def peer_pair(loss_type='l1', **kwargs):
    theirs, ours = twins(**SMALL)
    size = dict(image_size=8, num_frames=3, timesteps=50, loss_type=loss_type, **kwargs)
    return PeerDiffusion(theirs, **size), GaussianDiffusion(ours, **size)


@pytest.mark.parametrize('loss_type', ['l1', 'l2'])
def test_loss_equals_the_peer(loss_type):
    theirs, ours = peer_pair(loss_type)
    video, noise, t = torch.rand(2, 3, 3, 8, 8), torch.randn(2, 3, 3, 8, 8), torch.tensor([3, 49])
    expected = theirs.p_losses(video * 2 - 1, t, noise=noise)
    torch.testing.assert_close(ours(video, noise=noise, t=t), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dynamic', [False, True])
def test_the_reverse_process_equals_the_peer(dynamic):
    theirs, ours = peer_pair(use_dynamic_thres=dynamic, dynamic_thres_percentile=0.8)
    x0, x, t = torch.randn(3, 3, 3, 8, 8), 2 * torch.randn(3, 3, 3, 8, 8), torch.tensor([0, 20, 49])
    torch.testing.assert_close(ours.q_sample(x0, t, x), theirs.q_sample(x0, t, x), rtol=1e-5, atol=1e-6)
    for a, b in zip(ours.q_posterior(x0, x, t), theirs.q_posterior(x0, x, t)):
        torch.testing.assert_close(a, b.view_as(a), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for a, b in zip(ours.p_mean_variance(x, t, True), theirs.p_mean_variance(x, t, True)):
            torch.testing.assert_close(a, b.view_as(a), rtol=1e-3, atol=1e-4)
        torch.manual_seed(5); a = ours.p_sample(x, t)
        torch.manual_seed(5); b = theirs.p_sample(x, t)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_ancestral_sampling_equals_the_peer():
    theirs, ours = peer_pair()
    torch.manual_seed(5); a = ours.sample(batch_size=2, progress=False)
    torch.manual_seed(5); b = theirs.sample(batch_size=2).clamp(0, 1)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# Training

@pytest.mark.parametrize('objective', ['noise', 'v', 'x0'])
def test_a_perfect_network_has_no_loss(objective):
    torch.manual_seed(0)
    video, noise, t = torch.rand(2, 3, 3, 8, 8), torch.randn(2, 3, 3, 8, 8), torch.tensor([3, 12])
    diffusion = tiny(objective=objective)
    answer = target(objective, video * 2 - 1, noise, *diffusion.alpha_sigma(t))
    diffusion.denoise_fn = Predicts(lambda x, time: answer)
    assert diffusion(video, noise=noise, t=t).item() < 1e-7
    diffusion.denoise_fn = Predicts(lambda x, time: answer + 0.5)
    assert diffusion(video, noise=noise, t=t).item() == pytest.approx(0.5)


def test_noise_and_steps_are_drawn_when_not_given():
    diffusion = tiny()
    video = torch.rand(2, 3, 3, 8, 8)
    assert diffusion(video).item() != diffusion(video).item()


def test_a_few_steps_of_training_lower_the_loss():
    diffusion = tiny(text_encoder=WordEncoder(8), cond_dim=8)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=3e-3)
    torch.manual_seed(0)
    video, noise, t = torch.rand(2, 3, 3, 8, 8), torch.randn(2, 3, 3, 8, 8), torch.tensor([3, 12])
    losses = []
    for _ in range(25):
        loss = diffusion(video, ['up', 'down'], noise=noise, t=t)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert diffusion.text_encoder.words.weight.grad.abs().sum() > 0


# Sampling

@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
@pytest.mark.parametrize('objective', ['noise', 'v', 'x0'])
def test_samplers_find_the_only_video_there_is(sampler, objective):
    """Where all data is one video, the best denoiser always answers with it."""
    torch.manual_seed(0)
    only = torch.rand(1, 3, 3, 8, 8)
    diffusion = tiny(objective=objective)
    def answer(x, time):
        alpha, sigma = diffusion.alpha_sigma(time)
        x0 = (only * 2 - 1).expand_as(x)
        return target(objective, x0, to_noise(x0, x, alpha, sigma), alpha, sigma)
    diffusion.denoise_fn = Predicts(answer)
    out = diffusion.sample(batch_size=2, sampler=sampler, steps=7, progress=False)
    torch.testing.assert_close(out, only.expand_as(out), rtol=0, atol=1e-4)


@pytest.mark.parametrize('sampler, kwargs', [('ddpm', {}), ('ddim', {}), ('ddim', dict(eta=1.))])
def test_samplers_draw_the_right_gaussian(sampler, kwargs):
    """Data N(1, 0.5^2): the best denoiser is known, and samples must have that mean and spread."""
    mean, var = 1., 0.25
    alpha_bar = cosine_schedule(200)
    def denoise(x, t):
        a, s2 = alpha_bar[t].sqrt().item(), 1 - alpha_bar[t].item()
        return mean + a * var / (a ** 2 * var + s2) * (x - a * mean)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=generator, dtype=torch.float64)
    out = samplers.SAMPLERS[sampler](denoise, x, alpha_bar, samplers.spaced_steps(200, None), generator=generator, **kwargs)
    assert out.mean().item() == pytest.approx(mean, abs=0.02)
    assert out.std().item() == pytest.approx(var ** 0.5, abs=0.02)


def test_ddim_with_all_steps_and_full_eta_takes_the_steps_of_ddpm():
    """Same noise, same denoiser: every state is the same, not only the distribution."""
    alpha_bar = cosine_schedule(30)
    denoise = lambda x, t: torch.tanh(x) * 0.7
    x = torch.randn(100, dtype=torch.float64)
    ends = [function(denoise, x, alpha_bar, samplers.spaced_steps(30, None), generator=torch.Generator().manual_seed(1), **kw)
            for function, kw in ((samplers.ddpm, {}), (samplers.ddim, dict(eta=1.)))]
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


def test_spaced_steps_begin_at_pure_noise():
    assert samplers.spaced_steps(1000, None) == list(range(999, -1, -1))
    assert samplers.spaced_steps(1000, 4) == [999, 749, 499, 249]
    assert samplers.spaced_steps(10, 1) == [9]
    with pytest.raises(ValueError, match='steps=11.*1 to 10'):
        samplers.spaced_steps(10, 11)


def test_same_seed_same_video():
    diffusion = tiny()
    draw = lambda seed: diffusion.sample(batch_size=2, seed=seed, steps=3, progress=False)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_sample_is_a_plain_tensor_in_0_1_of_any_shape():
    out = tiny(image_size=(8, 12), channels=3).sample(batch_size=2, steps=2, progress=False)
    assert out.shape == (2, 3, 3, 8, 12)
    assert 0 <= out.min() and out.max() <= 1
    (out.requires_grad_() * 2).sum().backward()  # not an inference tensor, which would refuse


def test_guidance_moves_from_without_to_beyond_with():
    unet = tiny(cond_dim=4).denoise_fn
    x, t, cond = torch.randn(2, 3, 3, 8, 8), torch.tensor([3, 4]), torch.randn(2, 4)
    with torch.no_grad():
        with_cond, without = unet(x, t, cond), unet(x, t, cond, null_cond_prob=1.)
        assert not torch.allclose(with_cond, without)
        for scale, expected in ((1., with_cond), (0., without), (3., without + 3 * (with_cond - without))):
            torch.testing.assert_close(unet.forward_with_cond_scale(x, t, cond, cond_scale=scale), expected)


def test_interpolation_ends_at_either_video_and_stays_in_range():
    diffusion = tiny(timesteps=50)
    a, b = torch.rand(2, 1, 3, 3, 8, 8)
    mixed = diffusion.interpolate(a, b, t=40, progress=False)
    assert mixed.shape == a.shape and 0 <= mixed.min() and mixed.max() <= 1
    # With one noise step and a network that finds no noise, the ends are the videos themselves.
    diffusion.denoise_fn = Predicts(lambda x, time: torch.zeros_like(x))
    for lam, end in ((0., a), (1., b)):
        out = diffusion.interpolate(a, b, t=0, lam=lam, seed=0, progress=False)
        assert (out - end).abs().mean() < 0.05


# Errors

def test_errors_say_what_was_given_and_what_was_expected():
    diffusion = tiny()
    with pytest.raises(ValueError, match=r'\(2, 3, 4, 8, 8\).*\(batch, 3, 3, 8, 8\)'):
        diffusion(torch.rand(2, 3, 4, 8, 8))
    with pytest.raises(ValueError, match='no text_encoder'):
        tiny(cond_dim=4)(torch.rand(1, 3, 3, 8, 8), ['a cat'])
    with pytest.raises(ValueError, match="loss_type='huber'.*'l1', 'l2'"):
        tiny(loss_type='huber')
    with pytest.raises(ValueError, match="objective='eps'.*'noise', 'v', 'x0'"):
        tiny(objective='eps')
    with pytest.raises(ValueError, match="sampler='euler'.*'ddpm', 'ddim'"):
        diffusion.sample(sampler='euler')
    with pytest.raises(ValueError, match='text_use_bert_cls'):
        tiny(text_use_bert_cls=True)
    with pytest.raises(ValueError, match='one shape'):
        diffusion.interpolate(torch.rand(1, 3, 3, 8, 8), torch.rand(2, 3, 3, 8, 8))
    with pytest.raises(ValueError, match='t=20.*0 to 19'):
        diffusion.interpolate(*torch.rand(2, 1, 3, 3, 8, 8), t=20)


def test_network_errors_say_which_sizes_fit():
    unet = Unet3D(**dict(TINY, dim_mults=(1, 2, 4)), cond_dim=None)
    t = torch.tensor([1])
    with pytest.raises(ValueError, match='10x8.*multiples of 4'):
        unet(torch.rand(1, 3, 2, 10, 8), t)
    with pytest.raises(ValueError, match='3 channels'):
        unet(torch.rand(1, 1, 2, 8, 8), t)
    with pytest.raises(ValueError, match='without cond_dim'):
        unet(torch.rand(1, 3, 2, 8, 8), t, cond=torch.rand(1, 4))
    conditional = tiny(cond_dim=4).denoise_fn
    with pytest.raises(ValueError, match=r'conditional.*\(1, 4\)'):
        conditional(torch.rand(1, 3, 2, 8, 8), t)
    with pytest.raises(ValueError, match=r'\(1, 5\).*\(1, 4\)'):
        conditional(torch.rand(1, 3, 2, 8, 8), t, cond=torch.rand(1, 5))
    with pytest.raises(ValueError, match='odd'):
        Unet3D(8, init_kernel_size=4)

"""Schedules are their closed forms, and diffusers'; weights and conversions follow from what they mean.
Run: pytest tests/test_noise_schedule.py"""

import math

import diffusers
import pytest
import torch

from video_diffusion import GaussianDiffusion, Unet3D
from video_diffusion.diffusion.noise_schedule import (
    SCHEDULES,
    build_schedule,
    cosine_schedule,
    linear_schedule,
    posterior,
    scaled_linear_schedule,
    shifted,
    zero_snr,
)
from video_diffusion.diffusion.objective import OBJECTIVES, min_snr_weight, target, to_noise, to_x0


def snr(alpha_bar):
    return alpha_bar / (1 - alpha_bar)


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_are_float64_and_fall_from_clean_to_noise(name):
    alpha_bar = build_schedule(name, 1000)
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (1000,)
    assert (alpha_bar.diff() < 0).all() and alpha_bar[0] > 0.999 and 0 < alpha_bar[-1] < 0.01


def test_cosine_schedule_is_its_closed_form():
    alpha_bar = cosine_schedule(1000)
    f = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 1, 500, 998):
        assert alpha_bar[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-12)
    # the last beta would be 1 and is held at 0.9999
    assert (alpha_bar[999] / alpha_bar[998]).item() == pytest.approx(1e-4, rel=1e-9)


def test_linear_schedules_are_their_closed_forms():
    """beta, found again from neighbours, is linear, or its root is; and both ends are those asked for."""
    for schedule, start, end, power in ((linear_schedule, 1e-3, 0.03, 1), (scaled_linear_schedule, 0.00085, 0.012, 0.5)):
        alpha_bar = schedule(1000, start, end)
        beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
        assert 1 - alpha_bar[0].item() == pytest.approx(start, rel=1e-9)
        assert beta[-1].item() == pytest.approx(end, rel=1e-9)
        slopes = (beta ** power).diff()
        torch.testing.assert_close(slopes, torch.full_like(slopes, (end ** power - start ** power) / 999), rtol=1e-7, atol=0)


def test_a_shift_divides_the_signal_to_noise_ratio():
    plain = cosine_schedule(100)
    torch.testing.assert_close(snr(shifted(plain, 5.)), snr(plain) / 5)
    torch.testing.assert_close(build_schedule('cosine', 20, 5.), shifted(cosine_schedule(20), 5.), rtol=0, atol=0)
    assert torch.equal(shifted(plain, 1.), plain)
    with pytest.raises(ValueError, match='schedule_shift=0'):
        build_schedule('cosine', 20, 0)


@pytest.mark.parametrize('name', SCHEDULES)
def test_zero_snr_ends_in_pure_noise_and_keeps_the_first_step(name):
    plain = SCHEDULES[name](1000)
    alpha_bar = zero_snr(plain)
    assert alpha_bar[-1] == 0 and (alpha_bar.diff() < 0).all()
    assert alpha_bar[0].item() == pytest.approx(plain[0].item(), rel=1e-14)
    gaps = alpha_bar.sqrt().diff() / plain.sqrt().diff()  # moved and stretched: every gap grows by the same
    torch.testing.assert_close(gaps, gaps[:1].expand(999), rtol=1e-9, atol=0)


@pytest.mark.parametrize('scheduler', [diffusers.CogVideoXDDIMScheduler, diffusers.CogVideoXDPMScheduler])
@pytest.mark.parametrize('shift', [1., 3.])
@pytest.mark.parametrize('rescale', [False, True])
def test_schedules_equal_those_of_cogvideox(scheduler, shift, rescale):
    theirs = scheduler(snr_shift_scale=shift, rescale_betas_zero_snr=rescale).alphas_cumprod
    torch.testing.assert_close(build_schedule('scaled_linear', 1000, shift, rescale), theirs, rtol=1e-12, atol=1e-15)
    theirs = scheduler(beta_schedule='linear', beta_start=1e-4, beta_end=0.02, snr_shift_scale=shift,
                       rescale_betas_zero_snr=rescale).alphas_cumprod  # float32
    torch.testing.assert_close(build_schedule('linear', 1000, shift, rescale), theirs.double(), rtol=1e-3, atol=1e-6)


def test_a_schedule_that_leaves_signal_is_refused():
    with pytest.raises(ValueError, match="schedule='linear' with timesteps=100 leaves 60% of the signal.*zero_snr=True"):
        build_schedule('linear', 100)
    assert build_schedule('linear', 100, rescale=True)[-1] == 0


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


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_conversions_recover_what_was_mixed(objective):
    x0, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    alpha, sigma = 0.6, 0.8
    x = alpha * x0 + sigma * noise
    output = target(objective, x0, noise, alpha, sigma)
    torch.testing.assert_close(to_x0(objective, output, x, alpha, sigma), x0)
    torch.testing.assert_close(to_noise(x0, x, alpha, sigma), noise)


# Weights

@pytest.mark.parametrize('power', [1., 0.5])
def test_min_snr_weighs_the_same_error_in_x0_alike_whatever_is_predicted(power):
    """An error of the network becomes one of x0; its weighted square must not depend on what the network says."""
    alpha_bar = cosine_schedule(200)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x, output, error = torch.randn(3, 200, dtype=torch.float64)
    expected = snr(alpha_bar).clamp(max=5.) ** power * error ** 2
    for objective in OBJECTIVES:
        slope = to_x0(objective, output + 1, x, alpha, sigma) - to_x0(objective, output, x, alpha, sigma)
        loss = min_snr_weight(objective, alpha_bar, 5., power) * (error / slope) ** 2
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_min_snr_weights_are_finite_from_pure_noise_to_clean_video():
    ends = torch.tensor([0., 1.], dtype=torch.float64)
    for objective, expected in {'noise': [1., 0.], 'v': [0., 0.], 'x0': [0., 5.]}.items():
        assert min_snr_weight(objective, ends, 5.).tolist() == pytest.approx(expected, abs=1e-12)
        assert min_snr_weight(objective, ends, 5., power=0.5).isfinite().all()


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_the_loss_is_weighted_and_given_for_each_video(objective):
    torch.manual_seed(0)
    unet = Unet3D(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8)
    plain, weighted = (GaussianDiffusion(unet, image_size=8, num_frames=2, timesteps=50, loss_type='l2', objective=objective,
                                         min_snr_gamma=gamma) for gamma in (None, 5.))
    given = dict(video=torch.rand(3, 3, 2, 8, 8), noise=torch.randn(3, 3, 2, 8, 8), t=torch.tensor([0, 20, 49]))
    each = plain(**given, reduction='none')
    assert each.shape == (3,)
    torch.testing.assert_close(plain(**given), each.mean())
    alone = plain(**{name: tensor[1:2] for name, tensor in given.items()})
    torch.testing.assert_close(each[1], alone, rtol=1e-4, atol=1e-5)
    weights = min_snr_weight(objective, plain.alpha_bar[given['t']], 5.).float()
    torch.testing.assert_close(weighted(**given, reduction='none'), each * weights)
    with pytest.raises(ValueError, match="reduction='sum'.*'mean', 'none'"):
        plain(**given, reduction='sum')


def test_offset_noise_adds_one_value_per_clip_and_channel():
    unet = Unet3D(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8)
    plain, offset = (GaussianDiffusion(unet, image_size=8, num_frames=2, timesteps=50, offset_noise=share) for share in (0., 0.5))
    draw = lambda diffusion: diffusion.draw_noise((400, 3, 2, 8, 8), torch.device('cpu'), torch.Generator().manual_seed(0))
    assert torch.equal(draw(plain), torch.randn(400, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
    added = draw(offset) - draw(plain)
    torch.testing.assert_close(added, added[:, :, :1, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    assert added[:, :, 0, 0, 0].std().item() == pytest.approx(0.5, abs=0.05)
    # and it is what training draws
    torch.manual_seed(0); a = offset(torch.zeros(1, 3, 2, 8, 8), t=torch.tensor([3]))
    torch.manual_seed(0); noise = offset.draw_noise((1, 3, 2, 8, 8), torch.device('cpu'))
    torch.testing.assert_close(a, offset(torch.zeros(1, 3, 2, 8, 8), t=torch.tensor([3]), noise=noise), rtol=0, atol=0)

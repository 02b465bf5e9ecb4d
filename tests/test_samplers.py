"""Every sampler takes the steps of its counterpart in diffusers, and reaches the truth at its proven order.
Run: pytest tests/test_samplers.py"""

import math

import diffusers
import pytest
import torch

from video_diffusion import samplers
from video_diffusion.diffusion.noise_schedule import build_schedule, cosine_schedule, linear_schedule
from video_diffusion.diffusion.samplers import SAMPLERS, spaced_steps

DOUBLE = dict(dtype=torch.float64)
ALL = [('ddpm', {}), ('ddim', {}), ('ddim', dict(eta=1.)), ('dpm++2m', {}), ('dpm++2m_sde', {})]


# The same steps as diffusers, given the same denoiser, start and noise

def toy_denoiser(x, t):
    """Far from linear, and different at every step."""
    return 0.8 * torch.tanh(1.3 * x + 0.2 + t / 1000)


def ours_and_theirs(monkeypatch, name, scheduler, alpha_bar, steps, noise_by_name=False, **kwargs):
    """The trajectories (steps, 3, 4, 5) of our sampler and of a diffusers scheduler that predicts x0."""
    generator = torch.Generator().manual_seed(0)
    x, *noises = torch.randn(len(steps) + 1, 3, 4, 5, generator=generator, **DOUBLE)

    drawn = iter(noises)
    monkeypatch.setattr(samplers, 'randn_like', lambda x, generator: next(drawn))
    way = []
    out = SAMPLERS[name](samplers.recorded(toy_denoiser, way), x, alpha_bar, steps, **kwargs)
    ours = torch.stack([*way[1:], out])

    theirs, previous = [], None
    for i, t in enumerate(scheduler.timesteps):
        monkeypatch.setattr(f'{type(scheduler).__module__}.randn_tensor', lambda *args, **kwargs: noises[i], raising=False)
        x0 = toy_denoiser(x, t.item())
        if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
            x, previous = scheduler.step(x0, previous, t, scheduler.timesteps[i - 1] if i else None, x)
        else:
            given = dict(variance_noise=noises[i]) if noise_by_name else {}
            x = scheduler.step(x0, t, x, return_dict=False, **given, **kwargs)[0]
        theirs.append(x)
    return ours, torch.stack(theirs)


@pytest.mark.parametrize('spacing', ['trailing', 'leading'])
def test_ddpm_equals_diffusers(monkeypatch, spacing):
    alpha_bar = linear_schedule(1000)
    scheduler = diffusers.DDPMScheduler(prediction_type='sample', clip_sample=False, timestep_spacing=spacing)
    scheduler.alphas_cumprod = alpha_bar  # its own is rounded to float32
    scheduler.set_timesteps(20)
    ours, theirs = ours_and_theirs(monkeypatch, 'ddpm', scheduler, alpha_bar, spaced_steps(1000, 20, spacing))
    # Where the last step is not t = 0, diffusers adds noise of variance 1e-20 to the clean video, its least variance.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize('spacing', ['trailing', 'leading'])
@pytest.mark.parametrize('eta', [0., 0.6, 1.])
def test_ddim_equals_diffusers(monkeypatch, spacing, eta):
    alpha_bar = linear_schedule(1000)
    scheduler = diffusers.DDIMScheduler(prediction_type='sample', clip_sample=False, timestep_spacing=spacing)
    scheduler.alphas_cumprod = alpha_bar
    scheduler.set_timesteps(20)  # a divisor of 1000: diffusers takes t - 1000 // 20 for the next step, whatever the spacing
    ours, theirs = ours_and_theirs(monkeypatch, 'ddim', scheduler, alpha_bar, spaced_steps(1000, 20, spacing),
                                   noise_by_name=eta > 0, eta=eta)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize('name, algorithm', [('dpm++2m', 'dpmsolver++'), ('dpm++2m_sde', 'sde-dpmsolver++')])
@pytest.mark.parametrize('spacing, count', [('trailing', 1), ('trailing', 2), ('trailing', 7), ('leading', 20), ('linspace', 11)])
def test_dpm_solver_equals_diffusers(monkeypatch, name, algorithm, spacing, count):
    """Its 'leading' and 'linspace' are others than those of every other scheduler: they space count + 1 steps and drop the
    last, because the clean video follows. So it is told our steps."""
    alpha_bar = linear_schedule(1000)
    steps = spaced_steps(1000, count, spacing)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type='sample', algorithm_type=algorithm, solver_type='midpoint', timestep_spacing='trailing')
    scheduler.set_timesteps(**(dict(num_inference_steps=count) if spacing == 'trailing' else dict(timesteps=steps)))
    ours, theirs = ours_and_theirs(monkeypatch, name, scheduler, alpha_bar, steps, noise_by_name=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)  # it computes in float32


@pytest.mark.parametrize('name, scheduler', [
    ('ddim', diffusers.CogVideoXDDIMScheduler), ('dpm++2m_sde', diffusers.CogVideoXDPMScheduler)])
@pytest.mark.parametrize('zero_snr', [False, True])
@pytest.mark.parametrize('spacing', ['trailing', 'leading'])
def test_cogvideox_equals_diffusers(monkeypatch, name, scheduler, zero_snr, spacing):
    """From alpha = 0, too: diffusers finds h = infinity there, and goes on."""
    scheduler = scheduler(prediction_type='sample', rescale_betas_zero_snr=zero_snr, timestep_spacing=spacing)
    scheduler.set_timesteps(25)
    alpha_bar = build_schedule('scaled_linear', 1000, 3., zero_snr)
    ours, theirs = ours_and_theirs(monkeypatch, name, scheduler, alpha_bar, spaced_steps(1000, 25, spacing))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize('spacing', ['trailing', 'leading', 'linspace'])
@pytest.mark.parametrize('count', [1, 2, 7, 20, 50, 333, 1000])
def test_spacing_equals_diffusers(spacing, count):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    expected = [999] if (spacing, count) == ('linspace', 1) else scheduler.timesteps.tolist()  # numpy's one point is t = 0
    assert spaced_steps(1000, count, spacing) == expected


def test_spaced_steps_begin_and_end_where_they_say():
    assert spaced_steps(1000, None) == list(range(999, -1, -1))
    assert spaced_steps(1000, 4) == [999, 749, 499, 249]
    assert spaced_steps(1000, 4, 'leading') == [750, 500, 250, 0]
    assert spaced_steps(1000, 4, 'linspace') == [999, 666, 333, 0]
    assert spaced_steps(1000, 3, 'cosine') == [999, 865, 499]
    assert spaced_steps(10, 1) == spaced_steps(10, 1, 'linspace') == spaced_steps(10, 1, 'cosine') == [9]
    for timesteps in (1, 2, 7, 50):
        assert spaced_steps(timesteps, None, 'cosine') == list(range(timesteps - 1, -1, -1))
        for count in range(1, timesteps + 1):
            steps = spaced_steps(timesteps, count, 'cosine')
            assert len(steps) == count and steps[0] == timesteps - 1 and steps == sorted(set(steps), reverse=True) and steps[-1] >= 0
    with pytest.raises(ValueError, match='steps=11.*1 to 10'):
        spaced_steps(10, 11)
    with pytest.raises(ValueError, match="spacing='even'.*'trailing', 'leading', 'linspace', 'cosine'"):
        spaced_steps(10, 2, 'even')


# The truth: where all data is N(MEAN, VAR), the best denoiser is known in closed form

MEAN, VAR = 0.4, 0.3


def exact_denoiser(alpha_bar, one=1.):
    def denoise(x, t):
        alpha, variance = alpha_bar[t].sqrt().item(), 1 - alpha_bar[t].item()
        gain = alpha * VAR / (alpha ** 2 * VAR + variance)
        return MEAN * one + gain * (x - alpha * MEAN * one)
    return denoise


def mean_and_variance(monkeypatch, name, alpha_bar, steps, start=None, **kwargs):
    """Of the samples, without drawing any: the denoiser is linear, so every state is a combination of 1, the first noise and
    the noises of the steps. Its coefficients are all we need; the next noise is the next axis. -> at the last step asked, at
    the end; each (mean, variance)."""
    one, *axes = torch.eye(len(steps) + 3, **DOUBLE)
    mean, deviation = start or (0., 1.)
    drawn = iter(axes)
    monkeypatch.setattr(samplers, 'randn_like', lambda x, generator: next(drawn))
    way = []
    out = SAMPLERS[name](samplers.recorded(exact_denoiser(alpha_bar, one), way), mean * one + deviation * next(drawn),
                         alpha_bar, steps, **kwargs)
    return [(x[0].item(), x[1:].square().sum().item()) for x in (way[-1], out)]


@pytest.mark.parametrize('name, kwargs', ALL)
def test_error_falls_with_the_order_of_the_sampler(monkeypatch, name, kwargs):
    """Over steps of equal size in log SNR, begun with the right distribution: twice the steps leave half the error of DDPM
    and DDIM, a quarter of that of dpm++2m and dpm++2m_sde."""
    errors = []
    for count in (100, 200, 400):
        alpha_bar = torch.sigmoid(2 * torch.linspace(2.5, -2.5, count + 1, **DOUBLE))
        level = lambda t: (alpha_bar[t].sqrt().item() * MEAN, (alpha_bar[t] * VAR + 1 - alpha_bar[t]).item())
        mean, variance = level(-1)
        found, _ = mean_and_variance(monkeypatch, name, alpha_bar, list(range(count, -1, -1)), (mean, variance ** 0.5), **kwargs)
        mean, variance = level(0)
        assert found[0] == pytest.approx(mean, abs=1e-9)  # a linear denoiser keeps the mean
        errors.append(abs(found[1] - variance))
    order = math.log2(errors[1] / errors[2])
    assert order == pytest.approx(2 if name.startswith('dpm++') else 1, abs=0.1), errors


@pytest.mark.parametrize('name, kwargs', ALL)
def test_mean_and_variance_converge_to_the_truth(monkeypatch, name, kwargs):
    """All the way from pure noise to the clean video, where steps in log SNR are infinite. With a squared cosine the order
    survives that but for a logarithm, so a second-order error falls somewhat less than fourfold."""
    alpha_bar = cosine_schedule(32000, offset=0.)
    errors = []
    for count in (80, 160, 320):
        _, (mean, variance) = mean_and_variance(monkeypatch, name, alpha_bar, spaced_steps(32000, count), **kwargs)
        assert mean == pytest.approx(MEAN, abs=1e-6)
        errors.append(abs(variance - VAR))
    second = name.startswith('dpm++')
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine > (2.8 if second else 1.75), errors
    assert errors[-1] < (1e-3 if second else 1e-2)


@pytest.mark.parametrize('name, kwargs', ALL)
def test_samples_have_the_right_mean_and_spread(name, kwargs):
    """Drawn ones, many pixels of them."""
    alpha_bar = cosine_schedule(200)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=generator, **DOUBLE)
    out = SAMPLERS[name](exact_denoiser(alpha_bar), x, alpha_bar, spaced_steps(200, None), generator=generator, **kwargs)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(VAR ** 0.5, abs=0.02)


def test_ddim_with_all_steps_and_full_eta_takes_the_steps_of_ddpm():
    """Same noise, same denoiser: every state is the same, not only the distribution."""
    alpha_bar = cosine_schedule(30)
    x = torch.randn(100, **DOUBLE)
    ends = [SAMPLERS[name](toy_denoiser, x, alpha_bar, spaced_steps(30, None), generator=torch.Generator().manual_seed(1),
                           **kwargs)
            for name, kwargs in (('ddpm', {}), ('ddim', dict(eta=1.)))]
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


# Inversion

def test_inversion_finds_the_noise_and_the_better_the_more_steps():
    """For one Gaussian, the flow that DDIM follows is known, too: it keeps how many deviations a value is from the mean."""
    alpha_bar = cosine_schedule(1000)
    clean = MEAN + VAR ** 0.5 * torch.linspace(-2, 2, 9, **DOUBLE)
    noise_errors, trip_errors = [], []
    for count in (25, 50, 100):
        steps = spaced_steps(1000, count)
        noise = samplers.ddim_invert(exact_denoiser(alpha_bar), clean, alpha_bar, steps)
        again = samplers.ddim(exact_denoiser(alpha_bar), noise, alpha_bar, steps)
        noise_errors.append((noise - torch.linspace(-2, 2, 9, **DOUBLE)).abs().max().item())
        trip_errors.append((again - clean).abs().max().item())
    for errors in (noise_errors, trip_errors):
        assert errors[0] > 1.6 * errors[1] > 2.56 * errors[2], errors
    assert trip_errors[-1] < 0.04

"""The diffusion process against closed forms and against video-diffusion-pytorch 0.6.3. Run: pytest tests/test_diffusion.py"""

import warnings

import pytest
import torch
from test_unet3d import SMALL, twins
from torch import nn
from video_diffusion_pytorch import GaussianDiffusion as PeerDiffusion

from video_diffusion import (
    CausalVAE,
    GaussianDiffusion,
    LatentDiffusion,
    Trainer,
    Unet3D,
    VAETrainer,
    WordEncoder,
    samplers,
    shapes,
    show,
    video_tensor_to_gif,
)
from video_diffusion.diffusion.noise_schedule import build_schedule
from video_diffusion.diffusion.objective import OBJECTIVES, target, to_noise

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


@pytest.mark.slow
def test_ancestral_sampling_equals_the_peer():
    theirs, ours = peer_pair()
    torch.manual_seed(5); a = ours.sample(batch_size=2, progress=False)
    torch.manual_seed(5); b = theirs.sample(batch_size=2).clamp(0, 1)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# Training

@pytest.mark.parametrize('objective', OBJECTIVES)
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


@pytest.mark.slow
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
@pytest.mark.parametrize('objective, zero_snr', [('noise', False), ('v', False), ('x0', False), ('v', True), ('x0', True)])
@pytest.mark.parametrize('spacing', samplers.SPACINGS)
def test_samplers_find_the_only_video_there_is(sampler, objective, zero_snr, spacing):
    """Where all data is one video, the best denoiser always answers with it."""
    torch.manual_seed(0)
    only = torch.rand(1, 3, 3, 8, 8)
    diffusion = tiny(objective=objective, zero_snr=zero_snr)
    def answer(x, time):
        alpha, sigma = diffusion.alpha_sigma(time)
        x0 = (only * 2 - 1).expand_as(x)
        return target(objective, x0, to_noise(x0, x, alpha, sigma), alpha, sigma)
    diffusion.denoise_fn = Predicts(answer)
    out = diffusion.sample(batch_size=2, sampler=sampler, steps=7, spacing=spacing, progress=False)
    torch.testing.assert_close(out, only.expand_as(out), rtol=0, atol=1e-4)


def test_same_seed_same_video():
    diffusion = tiny()
    draw = lambda seed: diffusion.sample(batch_size=2, seed=seed, steps=3, progress=False)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_the_whole_way_ends_with_the_sample():
    diffusion = tiny(timesteps=20)
    noise = torch.randn(2, 3, 3, 8, 8)
    draw = lambda **kwargs: diffusion.sample(noise=noise, sampler='dpm++2m', steps=5, progress=False, **kwargs)
    way = draw(return_all=True)
    assert way.shape == (6, 2, 3, 3, 8, 8)
    assert torch.equal(way[0], ((noise + 1) / 2).clamp(0, 1)) and torch.equal(way[-1], draw())
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(way, way[1:]))


def test_eta_makes_ddim_draw():
    diffusion = tiny()
    noise = torch.randn(1, 3, 3, 8, 8)
    draw = lambda **kwargs: diffusion.sample(noise=noise, sampler='ddim', steps=5, progress=False, **kwargs)
    assert torch.equal(draw(seed=0), draw(seed=1))
    assert not torch.equal(draw(eta=0.5, seed=0), draw(eta=0.5, seed=1))


@pytest.mark.parametrize('zero_snr', [False, True])
def test_a_video_comes_back_from_the_noise_it_is_inverted_to(zero_snr):
    """Data N(0.2, 0.05), in [-1, 1], whose best denoiser is known: the more steps, the closer."""
    diffusion = tiny(objective='v', timesteps=1000, zero_snr=zero_snr)

    def answer(x, time):
        alpha, sigma = diffusion.alpha_sigma(time)
        x0 = 0.2 + alpha * 0.05 / (alpha ** 2 * 0.05 + sigma ** 2) * (x - alpha * 0.2)
        return (alpha * x - x0) / sigma
    diffusion.denoise_fn = Predicts(answer)
    torch.manual_seed(0)
    video = ((0.2 + 0.05 ** 0.5 * torch.randn(2, 3, 3, 8, 8) + 1) / 2).clamp(0, 1)
    errors = []
    for steps in (20, 40, 80):
        noise = diffusion.ddim_invert(video, steps=steps, progress=False)
        again = diffusion.sample(noise=noise, sampler='ddim', steps=steps, progress=False)
        errors.append((again - video).abs().mean().item())
    assert noise.shape == video.shape and noise.std().item() == pytest.approx(1, abs=0.1)
    assert errors[0] > 1.6 * errors[1] > 2.56 * errors[2] and errors[2] < 0.01, errors


def test_a_sample_is_a_plain_tensor_in_0_1_of_any_shape():
    out = tiny(image_size=(8, 12), channels=3).sample(batch_size=2, steps=2, progress=False)
    assert out.shape == (2, 3, 3, 8, 12)
    assert 0 <= out.min() and out.max() <= 1
    (out.requires_grad_() * 2).sum().backward()  # not an inference tensor, which would refuse


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


# Settings

def test_a_checkpoint_rebuilds_every_setting_and_an_older_one_those_of_its_time():
    settings = dict(objective='v', loss_type='l2', schedule='scaled_linear', zero_snr=True, schedule_shift=3., min_snr_gamma=5.,
                    min_snr_power=0.5, offset_noise=0.1)
    diffusion = tiny(**settings)
    torch.testing.assert_close(diffusion.alpha_bar, build_schedule('scaled_linear', 20, 3., True), rtol=0, atol=0)
    again = GaussianDiffusion.from_config(diffusion.config())
    assert again.config() == diffusion.config() and {**again.config()['diffusion'], **settings} == again.config()['diffusion']
    assert torch.equal(again.alpha_bar, diffusion.alpha_bar) and torch.equal(again.loss_weight, diffusion.loss_weight)

    old = tiny().config()
    for name in ('schedule', 'zero_snr', 'min_snr_gamma', 'min_snr_power', 'offset_noise'):
        del old['diffusion'][name]
    assert GaussianDiffusion.from_config(old).config() == tiny().config()
    assert tiny().has_config(old) and not tiny(offset_noise=0.1).has_config(old) and not diffusion.has_config(tiny().config())
    old['unet'] = {**old['unet'], 'dim': 16}
    assert not tiny().has_config(old)


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
    with pytest.raises(ValueError, match="eta=0.5.*sampler='dpm"):
        diffusion.sample(sampler='dpm++2m', eta=0.5)
    with pytest.raises(ValueError, match=r'\(2, 3, 3, 8, 9\).*\(batch, 3, 3, 8, 8\)'):
        diffusion.sample(noise=torch.randn(2, 3, 3, 8, 9))
    with pytest.raises(ValueError, match='noise for 3 videos and cond for 2'):
        tiny(cond_dim=4).sample(torch.randn(2, 4), noise=torch.randn(3, 3, 3, 8, 8))
    with pytest.raises(ValueError, match="zero_snr=True with objective='noise'.*nothing about the clip.*'v' or 'x0'"):
        tiny(zero_snr=True)
    with pytest.raises(ValueError, match="min_snr_gamma=5.0 with loss_type='l1'.*loss_type='l2'"):
        tiny(min_snr_gamma=5.)
    with pytest.raises(ValueError, match='min_snr_power=0.5 .*min_snr_gamma: give that'):
        tiny(min_snr_power=0.5)
    with pytest.raises(ValueError, match='min_snr_power=2.0'):
        tiny(loss_type='l2', min_snr_gamma=5., min_snr_power=2.)
    with pytest.raises(ValueError, match="schedule='sigmoid'.*'cosine', 'linear', 'scaled_linear'"):
        tiny(schedule='sigmoid')
    with pytest.raises(ValueError, match='text_use_bert_cls'):
        tiny(text_use_bert_cls=True)
    with pytest.raises(ValueError, match='one shape'):
        diffusion.interpolate(torch.rand(1, 3, 3, 8, 8), torch.rand(2, 3, 3, 8, 8))
    with pytest.raises(ValueError, match='t=20.*0 to 19'):
        diffusion.interpolate(*torch.rand(2, 1, 3, 3, 8, 8), t=20)


def test_videos_in_minus_one_to_one_are_told_of():
    """The public package's own example is one: its network gets numbers from -3 to 1, and nothing is learnt well."""
    diffusion = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2)), image_size=16, num_frames=2, timesteps=10)
    with pytest.warns(UserWarning, match=r'down to -1: .* give \(video \+ 1\) / 2'):
        diffusion(torch.linspace(-1, 1, 1536).view(1, 3, 2, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        diffusion(torch.linspace(-0.2, 1.2, 1536).view(1, 3, 2, 16, 16))      # an upscaler's edges


@pytest.mark.parametrize('video', [torch.randint(256, (2, 3, 3, 8, 8), dtype=torch.uint8), 255 * torch.rand(2, 3, 3, 8, 8)])
def test_videos_that_nobody_divided_by_255_are_refused(video):
    diffusion, vae = tiny(), CausalVAE(latent_channels=2, dim=4, dim_mults=(1, 1), blocks_per_level=1, norm_groups=2, time_compression=2)
    how = dict(batch_size=2, steps=2, sampler='ddim', progress=False)
    for use in (diffusion, diffusion.ddim_invert, lambda video: diffusion.interpolate(video, video), vae.encode,
                lambda video: diffusion.sample(first_frames=video[:, :, :1], **how),
                lambda video: diffusion.sample_long(5, first_frames=video[:, :, :1], **how)):
        with pytest.raises(ValueError, match=r'expected floats in \[0, 1\]'):
            use(video)


def test_a_text_encoder_that_nobody_listens_to_is_refused():
    with pytest.raises(ValueError, match='the network takes no captions: build it with cond_dim=4'):
        tiny(text_encoder=WordEncoder(4))
    with pytest.raises(ValueError, match='says 6 numbers of a caption, the network was built with cond_dim=4'):
        tiny(cond_dim=4, text_encoder=WordEncoder(6))


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 0.1), (torch.float64, 1e-4)])
def test_a_whole_model_may_be_of_another_precision(dtype, bound):
    diffusion, noise = tiny(cond_dim=4, objective='x0'), torch.randn(2, 3, 3, 8, 8)
    cond, how = torch.randn(2, 4), dict(steps=3, sampler='ddim', progress=False)
    exact = diffusion.sample(cond, noise=noise, **how)
    diffusion.to(dtype)
    given = noise.to(dtype) if dtype == torch.float64 else noise
    drawn = diffusion.sample(cond.to(dtype), noise=given, **how)
    assert drawn.dtype == given.dtype and (drawn - exact).abs().max() < bound
    diffusion(torch.rand_like(given), cond.to(dtype)).backward()
    assert {p.grad.dtype for p in diffusion.parameters() if p.grad is not None} == {dtype}


def test_latents_are_not_sampled_through_a_division_by_almost_nothing():
    """With an ideal denoiser that errs by 2%, samples of unit variance had a standard deviation of 178: see objective.py."""
    with pytest.raises(ValueError, match="objective='noise' with latents=True.*objective='v'"):
        tiny(latents=True)
    assert tiny(latents=True, objective='v').latents
    assert tiny(latents=True, schedule='scaled_linear', timesteps=1000).objective == 'noise'       # as in Stable Diffusion

    class Ideal(torch.nn.Module):
        has_cond = cond_frames = False

        def forward_with_cond_scale(self, x, t, cond=None, cond_scale=1.):
            return 0.02 * torch.randn(x.shape, generator=errors)              # of latents N(0, 1): E[v | x] = 0
    errors = torch.Generator().manual_seed(1)
    diffusion = GaussianDiffusion(Ideal(), image_size=16, num_frames=4, objective='v', latents=True)
    for sampler, steps in (('ddim', 10), ('dpm++2m', 20)):
        drawn = diffusion.sample(batch_size=4, sampler=sampler, steps=steps, seed=0, progress=False)
        assert 0.85 < drawn.std() < 1.15


@pytest.mark.parametrize('setting', [
    dict(timesteps=0), dict(timesteps=-1), dict(timesteps=1, zero_snr=True, objective='v'), dict(channels=-1), dict(image_size=0),
    dict(num_frames=0), dict(offset_noise=-1), dict(dynamic_thres_percentile=2.), dict(schedule_shift=float('nan'))])
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=f'{next(iter(setting))}=.*: give'):
        tiny(**setting)


@pytest.mark.parametrize('setting', [
    dict(steps=0), dict(cond_scale=float('nan')), dict(eta=2., sampler='ddim'), dict(guidance_rescale=5.), dict(guidance_rescale=-1.),
    dict(dynamic_guidance=-1.), dict(frame_guidance=-1.), dict(batch_size=0)])
def test_settings_of_sampling_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=f'{next(iter(setting))}=.*: (give|the model)'):
        tiny().sample(**setting, progress=False)


def test_a_mask_for_a_network_that_is_never_told_is_refused():
    with pytest.raises(ValueError, match='known_mask was given'):
        tiny()(torch.rand(1, 3, 3, 8, 8), known_mask=torch.ones(1, 3, dtype=torch.bool))


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


def test_what_a_loss_is_asked_with_is_checked():
    diffusion, video, cond = tiny(cond_dim=4), torch.rand(2, 3, 3, 8, 8), torch.randn(2, 4)
    for share in (-0.1, 1.5, float('nan')):
        with pytest.raises(ValueError, match='null_cond_prob=.*: give a number from 0 to 1'):
            diffusion(video, cond, null_cond_prob=share)
    with pytest.raises(ValueError, match=r'noise has shape \(1, 3, 3, 8, 8\): expected that of the videos, \(2, 3, 3, 8, 8\)'):
        diffusion(video, cond, noise=torch.randn(1, 3, 3, 8, 8))
    with pytest.raises(ValueError, match='known was given, but the network is never told frames'):
        diffusion(video, cond, known=video)
    diffusion(video, cond, noise=torch.randn_like(video), null_cond_prob=1.)


def test_wrong_objects_are_named(tmp_path):
    diffusion, vae = tiny(), CausalVAE(latent_channels=2, dim=4, dim_mults=(1, 1), blocks_per_level=1, norm_groups=2, time_compression=2)
    array = torch.rand(1, 3, 3, 8, 8).numpy()
    for use in (diffusion, vae.encode, show, lambda video: video_tensor_to_gif(video, tmp_path / 'x.gif'), shapes.grade_all,
                lambda video: diffusion.sample(first_frames=video[:, :, :1], batch_size=1)):
        with pytest.raises(TypeError, match=r'is a numpy.ndarray: give a torch.Tensor \(torch.from_numpy\)'):
            use(array)
    with pytest.raises(TypeError, match=r'z is a DiagonalGaussian: give .sample\(\) or .mode\(\) of it'):
        vae.decode(vae.encode(torch.from_numpy(array)))
    for make, says in ((lambda: Trainer(diffusion.denoise_fn, tmp_path), 'diffusion is a Unet3D: give a GaussianDiffusion or a Latent'),
                       (lambda: Trainer(tmp_path, diffusion), 'diffusion is a PosixPath'),
                       (lambda: LatentDiffusion(vae, diffusion), 'diffusion is a CausalVAE: give a GaussianDiffusion'),
                       (lambda: VAETrainer(diffusion, tmp_path, image_size=16, num_frames=3), 'vae is a GaussianDiffusion, which has no'),
                       (lambda: GaussianDiffusion(Unet3D, image_size=8, num_frames=3), 'denoise_fn is the class Unet3D: give a Module')):
        with pytest.raises(TypeError, match=says):
            make()

"""Known frames: prediction, in-betweening, longer clips. Run: pytest tests/test_known_frames.py"""

import pytest
import torch

from video_diffusion import GaussianDiffusion, Unet3D, samplers
from video_diffusion.diffusion import frame_levels, known_frames
from video_diffusion.diffusion.noise_schedule import cosine_schedule

FRAMES = 6


def tiny(told=0.5, frame_noise='shared', **kwargs):
    torch.manual_seed(0)
    told = told if frame_noise == 'shared' else 0.
    unet = Unet3D(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, cond_frames=told > 0, **kwargs)
    return GaussianDiffusion(unet, image_size=8, num_frames=FRAMES, timesteps=50, objective='v', prob_cond_frames=told,
                             frame_noise=frame_noise)


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
@pytest.mark.parametrize('way', known_frames.WAYS)
def test_known_frames_come_out_as_they_went_in(sampler, way):
    video = torch.rand(2, 3, FRAMES, 8, 8)
    mask = torch.tensor([[True, False, False, True, False, False], [False, False, True, False, False, True]])
    diffusion = tiny(frame_noise='independent' if way == 'level' else 'shared')
    drawn = diffusion.sample(known=video, known_mask=mask, known_by=way, sampler=sampler, steps=4, batch_size=2, progress=False)
    for clip, given, which in zip(drawn, video, mask):
        assert torch.allclose(clip[:, which], given[:, which], atol=1e-5)
        assert (clip[:, ~which] - given[:, ~which]).abs().mean() > 0.05


def test_first_frames_are_a_mask_and_one_clip_serves_all():
    diffusion, video = tiny(), torch.rand(1, 3, FRAMES, 8, 8)
    how = dict(sampler='ddim', steps=3, batch_size=2, seed=0, progress=False)
    by_prefix = diffusion.sample(first_frames=video[:, :, :2], **how)
    assert torch.equal(by_prefix, diffusion.sample(known=video, known_mask=torch.arange(FRAMES) < 2, **how))
    both = video.expand(2, -1, -1, -1, -1)
    assert torch.equal(by_prefix, diffusion.sample(known=both, known_mask=torch.arange(FRAMES) < 2, **how))


def test_guidance_works_within_a_callers_inference_mode():
    diffusion = tiny(told=0.)
    how = dict(known_by='guide', sampler='ddim', steps=2, seed=0, progress=False)
    mask = torch.arange(FRAMES) < 2
    plain = None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            video, noise = (torch.rand(2, 3, FRAMES, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
            drawn = diffusion.sample(known=video, known_mask=mask, noise=noise, **how)
        plain = drawn if plain is None else plain
        assert torch.equal(drawn, plain)


def correlated(rho=0.9, std=0.25):
    """Gaussian videos: neighbouring frames correlate by rho, pixels not. Their covariance (f f) and exact denoiser."""
    distance = (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).abs()
    covariance = std ** 2 * rho ** distance.double()
    alpha_bar = cosine_schedule(1000)

    def denoise(x, t):
        a = alpha_bar[t]
        gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(FRAMES).double())
        return torch.einsum('ij,bcjhw->bcihw', gain, x)
    return covariance, alpha_bar, denoise


def test_guidance_tells_the_other_frames_and_replacement_hardly_does():
    """How much does the frame after the known one follow it? By rho in truth, which the denoiser knows."""
    covariance, alpha_bar, denoise = correlated()
    generator = torch.Generator().manual_seed(0)
    known = torch.randn((1, 3, FRAMES, 32, 32), generator=generator).double()
    known = torch.einsum('ij,bcjhw->bcihw', torch.linalg.cholesky(covariance), known)
    mask = (torch.arange(FRAMES) < 2)[None]
    last = known[:, :, 1]

    def follows(denoise):
        x = torch.randn(known.shape, generator=generator).double()
        drawn = samplers.ddim(known_frames.replaced(denoise, known, mask), x, alpha_bar, samplers.spaced_steps(1000, 25))
        return ((drawn[:, :, 2] * last).sum() / last.square().sum()).item()

    free = ((samplers.ddim(denoise, torch.randn(known.shape, generator=generator).double(), alpha_bar,
                           samplers.spaced_steps(1000, 25))[:, :, 2] * last).sum() / last.square().sum()).item()
    assert abs(free) < 0.1
    assert 0.3 < follows(denoise) < 0.6                                                              # measured: 0.43
    assert 0.8 < follows(known_frames.guided(denoise, known, mask, alpha_bar.sqrt(), 5.)) < 1.       # measured: 0.92


def test_the_gradient_of_guidance_is_that_of_the_papers_formula():
    """For a linear denoiser x0 = M x the gradient of |mask (known - M x)|^2 is -2 M^T mask (known - M x)."""
    _, alpha_bar, denoise = correlated()
    x, known = torch.randn(2, 1, 3, FRAMES, 4, 4).double() / 10
    mask = (torch.arange(FRAMES) < 3)[None]
    matrix = torch.stack([denoise(one[None, None, :, None, None], 500)[0, 0, :, 0, 0] for one in torch.eye(FRAMES).double()], dim=1)
    error = (known - denoise(x, 500)) * mask[:, None, :, None, None]
    expected = denoise(x, 500) + 3. * alpha_bar[500].sqrt() * torch.einsum('ji,bcjhw->bcihw', matrix, error)
    assert torch.allclose(known_frames.guided(denoise, known, mask, alpha_bar.sqrt(), 3.)(x, 500), expected)


def test_a_network_that_is_told_sees_only_what_is_known():
    diffusion = tiny()
    x, t = torch.randn(2, 3, FRAMES, 8, 8), torch.tensor([10, 40])
    video = torch.randn_like(x)
    mask = torch.arange(FRAMES).expand(2, -1) < 2
    told = diffusion.denoise_fn(x, t, known=video, known_mask=mask)
    other = video.clone()
    other[:, :, 2:] = 7.
    assert torch.equal(told, diffusion.denoise_fn(x, t, known=other, known_mask=mask))
    other[:, :, 1] = 7.
    assert not torch.allclose(told, diffusion.denoise_fn(x, t, known=other, known_mask=mask))
    # Black and known is not the same as unknown.
    black = torch.zeros_like(x)
    assert not torch.allclose(diffusion.denoise_fn(x, t, known=black, known_mask=mask), diffusion.denoise_fn(x, t))


def told_and_untold(diffusion, steps):
    """How far off clips are that are continued from their first frame, and that are drawn of nothing, after training on clips that
    stand still: to continue one is to copy it."""
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=5e-3)

    def still(count):
        return torch.rand(count, 3, 1, 1, 1).expand(-1, -1, diffusion.num_frames, diffusion.height, diffusion.width)

    for _ in range(steps):
        diffusion(still(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    clips = still(8)
    how = dict(sampler='ddim', steps=8, batch_size=8, seed=0, progress=False)
    return [(diffusion.sample(first_frames=first, **how) - clips).abs().mean() for first in (clips[:, :, :1], None)]


@pytest.mark.slow
def test_a_network_that_is_told_learns_to_use_it():
    torch.manual_seed(0)
    told, untold = told_and_untold(tiny(told=0.9), steps=120)
    # What it was not told cannot come out right. The ratio is 0.3 to 0.45, by how the machine rounds.
    assert told < 0.6 * untold


def test_masks_of_training():
    mask = frame_levels.draw_mask(4000, FRAMES, 0.5, torch.device('cpu'), torch.Generator().manual_seed(0))
    some = mask[mask.any(dim=1)]
    assert 0.46 < len(some) / len(mask) < 0.54
    assert some[:, 0].all() and not some.all(dim=1).any()                # a beginning, never all of it,
    assert some[:, :-1].all(dim=1).any()                                 # but now and then all but one, as sampling allows
    lengths = some[:, :-1].sum(dim=1)
    assert set(lengths.tolist()) == {1, 2, 3, 4, 5}
    assert 0.45 < some[lengths < 5, -1].float().mean() < 0.55            # half of them with the end, where something is between
    assert (some[:, :-1].int().diff(dim=1) <= 0).all()                   # no gaps
    assert not frame_levels.draw_mask(50, FRAMES, 0., torch.device('cpu'), None).any()


def test_longer_clips_are_windows_that_share_frames():
    diffusion = tiny()
    how = dict(sampler='ddim', steps=3, batch_size=2, progress=False)
    video = diffusion.sample_long(15, overlap=2, seed=3, **how)
    assert video.shape == (2, 3, 15, 8, 8)
    assert torch.equal(video[:, :, :FRAMES], diffusion.sample(seed=3, **how))
    asked = []
    sample = diffusion.sample
    diffusion.sample = lambda *args, **kwargs: asked.append(kwargs) or sample(*args, **kwargs)
    video = diffusion.sample_long(15, overlap=2, seed=3, **how)
    assert [a['first_frames'] is None for a in asked] == [True, False, False, False]     # 6 + 4 + 4 + 4 >= 15
    assert torch.equal(asked[1]['first_frames'], video[:, :, 4:6]) and torch.equal(asked[2]['first_frames'], video[:, :, 8:10])
    assert len({a['seed'] for a in asked}) == 4


def test_later_windows_may_follow_the_frames_alone():
    diffusion = tiny(cond_dim=4)
    how = dict(sampler='ddim', steps=2, seed=0, progress=False)
    one, other = torch.randn(2, 1, 4)
    first = torch.rand(1, 3, 3, 8, 8)
    a, b = (diffusion.sample_long(9, c, 2., overlap=3, first_frames=first, later_cond_scale=0., **how) for c in (one, other))
    assert not torch.allclose(a[:, :, 3:6], b[:, :, 3:6])
    asked = []
    sample = diffusion.sample
    diffusion.sample = lambda cond, **kwargs: asked.append(kwargs.get('cond_scale')) or sample(cond, **kwargs)
    diffusion.sample_long(9, one, 2., overlap=3, later_cond_scale=0., **how)
    assert asked == [2., 0.]


@pytest.mark.parametrize('refinement', [dict(), dict(negative=torch.randn(1, 4)), dict(dynamic_guidance=5.), dict(guidance_rescale=0.7)])
@pytest.mark.parametrize('later', [0., 1., 3.])
def test_later_windows_without_guidance_are_without_its_refinements(later, refinement):
    """Scale 0 would else draw the very thing that `negative` forbids, and dynamic guidance would begin at 1 all the same."""
    diffusion = tiny(cond_dim=4)
    cond, first = torch.randn(1, 4), torch.rand(1, 3, 3, 8, 8)
    how = dict(sampler='ddim', steps=2, progress=False)
    long = diffusion.sample_long(9, cond, 2., overlap=3, first_frames=first, later_cond_scale=later, seed=0, **how, **refinement)
    asked = dict(first_frames=long[:, :, 3:6], seed=1_000_003, cond_scale=later, **how, **(refinement if later == 3. else {}))
    torch.testing.assert_close(long[:, :, 6:], diffusion.sample(cond, **asked)[:, :, 3:6])


def test_a_later_scale_that_cannot_be_is_refused_before_the_first_window():
    diffusion = tiny(cond_dim=4)
    diffusion.sample = None                                                 # nobody gets as far
    with pytest.raises(ValueError, match='later_cond_scale=nan'):
        diffusion.sample_long(9, torch.randn(1, 4), 2., later_cond_scale=float('nan'))
    with pytest.raises(ValueError, match='give cond'):
        diffusion.sample_long(9, later_cond_scale=3., negative=torch.randn(1, 4))
    with pytest.raises(TypeError, match='return_all'):
        diffusion.sample_long(9, torch.randn(1, 4), return_all=True)


def test_inference_mode_does_not_stand_in_the_way_of_gradients():
    diffusion, first = tiny(), torch.rand(1, 3, 2, 8, 8)
    how = dict(first_frames=first, known_by='guide', sampler='ddim', steps=2, seed=0, batch_size=1, progress=False)
    expected = diffusion.sample(**how)
    with torch.inference_mode():
        made_inside = first.clone()
        assert torch.equal(diffusion.sample(**how), expected)
        assert torch.equal(diffusion.sample(**{**how, 'first_frames': made_inside}), expected)


@pytest.mark.parametrize('given, says', [
    (dict(first_frames=torch.rand(1, 3, FRAMES, 8, 8)), 'expected (batch, channels, 1 to 5 frames, height, width)'),
    (dict(first_frames=torch.rand(3, 2, 8, 8)), 'expected (batch, channels, 1 to 5 frames, height, width)'),
    (dict(first_frames=torch.rand(1, 3, 2, 8, 12)), 'expected (batch, 3, 6, 8, 8)'),
    (dict(first_frames=torch.rand(3, 3, 2, 8, 8)), 'known frames of 3 videos for a batch of 2'),
    (dict(known=torch.rand(1, 3, FRAMES, 8, 8)), 'known and known_mask belong together'),
    (dict(known_mask=torch.ones(FRAMES, dtype=torch.bool)), 'known and known_mask belong together'),
    (dict(first_frames=torch.rand(1, 3, 2, 8, 8), known_mask=torch.ones(FRAMES, dtype=torch.bool)), 'first_frames says all'),
    (dict(first_frames=torch.rand(1, 3, 2, 8, 8), known=torch.rand(1, 3, FRAMES, 8, 8)), 'first_frames says all'),
    (dict(known_by='guide'), 'give first_frames, or known and known_mask'),
    (dict(frame_guidance=2.), 'give first_frames, or known and known_mask'),
    (dict(first_frames=torch.rand(1, 3, 2, 8, 8), known_by='replace', frame_guidance=2.), "the weight of known_by='guide'"),
    (dict(known=torch.rand(1, 3, FRAMES, 8, 8), known_mask=torch.ones(FRAMES)), 'got torch.float32 of shape (6,)'),
    (dict(first_frames=torch.rand(1, 3, 2, 8, 8), known_by='magic'), "known_by='magic'"),
])
def test_bad_known_frames_get_a_sentence(given, says):
    with pytest.raises(ValueError) as error:
        tiny().sample(batch_size=2, sampler='ddim', steps=2, progress=False, **given)
    assert says in str(error.value)


def test_a_network_that_was_never_told_cannot_be():
    with pytest.raises(ValueError, match='cond_frames=True'):
        GaussianDiffusion(Unet3D(8, dim_mults=(1,)), image_size=8, num_frames=4, prob_cond_frames=0.5)
    with pytest.raises(ValueError, match='without cond_frames=True'):
        tiny(told=0.).sample(first_frames=torch.rand(1, 3, 2, 8, 8), known_by='network', batch_size=1, steps=2, progress=False)
    with pytest.raises(ValueError, match='num_frames=5, overlap=4'):
        tiny().sample_long(5)


def test_what_is_unknown_may_be_nan():
    video, mask = torch.rand(1, 3, 4, 8, 8), torch.tensor([True, False, False, True])
    video[:, :, 1:3] = float('nan')
    known, rows = known_frames.for_batch(video, mask, 2)
    assert known.shape == (2, 3, 4, 8, 8) and known.isfinite().all() and torch.equal(known[1][:, mask], video[0][:, mask])
    assert rows.tolist() == 2 * [mask.tolist()]

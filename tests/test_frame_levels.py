"""Every frame has a noise of its own: the loss, the samplers and what is known, each equal to the plain path or to the truth.
Run: pytest tests/test_frame_levels.py"""

import runpy
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_known_frames import told_and_untold

from video_diffusion import DiT, GaussianDiffusion, LatentDiffusion, TemporalVAE, Trainer, Unet3D, WordEncoder
from video_diffusion.data.shapes import make_shapes
from video_diffusion.diffusion import known_frames, long_videos
from video_diffusion.diffusion.frame_levels import (
    CLEAN,
    CUT,
    DRAWN,
    LOW,
    SILENT,
    TOLD,
    as_drawn,
    draw_levels,
    levels,
    levels_differ,
    own_steps,
    shortened,
    told_share,
)
from video_diffusion.diffusion.noise_schedule import cosine_schedule
from video_diffusion.diffusion.samplers import SAMPLERS, spaced_steps
from video_diffusion.distributed import Processes

FRAMES = 5
DOUBLE = dict(dtype=torch.float64)


def tiny(frame_noise='independent', cond_dim=None, **kwargs):
    torch.manual_seed(0)
    unet = Unet3D(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, cond_dim=cond_dim)
    return GaussianDiffusion(unet, image_size=(8, 12), num_frames=FRAMES, **{
        'timesteps': 50, 'objective': 'v', 'frame_noise': frame_noise, **kwargs})


# The matrix

def test_the_three_ways_to_draw_are_matrices():
    assert levels([9, 6, 3], 3).tolist() == [[9, 9, 9], [6, 6, 6], [3, 3, 3], [-1, -1, -1]]
    assert levels([9, 6, 3], 3, lag=1).tolist() == [[9, 9, 9], [6, 9, 9], [3, 6, 9], [-1, 3, 6], [-1, -1, 3], [-1, -1, -1]]
    assert levels([9, 6], 3, lag=2).tolist() == [[9, 9, 9], [6, 9, 9], [-1, 9, 9], [-1, 6, 9], [-1, -1, 9], [-1, -1, 6],
                                                 [-1, -1, -1]]


def alone(x, t):
    """A denoiser, far from linear, to which every frame is a video of its own."""
    t = torch.as_tensor(t).reshape(-1, 1, FRAMES if torch.is_tensor(t) else 1, 1, 1)
    return 0.8 * torch.tanh(1.3 * x + 0.2 + t / 1000)


@pytest.mark.parametrize('lag', [0, 1, 2, 9])
@pytest.mark.parametrize('name', ['ddim', 'dpm++2m'])
def test_frames_that_do_not_see_one_another_do_not_care_who_goes_first(name, lag):
    """Multistep samplers, too: a frame that has waited has no history yet, and one that is clean stays so."""
    alpha_bar, steps = cosine_schedule(1000), spaced_steps(1000, 4)
    x = torch.randn((2, 3, FRAMES, 4, 6), **DOUBLE)
    together = SAMPLERS[name](alone, x, alpha_bar, steps)
    staggered = SAMPLERS[name](alone, x, alpha_bar, levels(steps, FRAMES, lag))
    torch.testing.assert_close(staggered, together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', SAMPLERS)
def test_a_matrix_of_equal_columns_is_a_list_of_steps(name):
    """Noise included, and for one row for all videos as for a row for each."""
    alpha_bar, steps = cosine_schedule(1000), spaced_steps(1000, 6)
    x = torch.randn((2, 3, FRAMES, 4, 6), **DOUBLE)
    matrix = levels(steps, FRAMES)
    a, b, c = (SAMPLERS[name](alone, x, alpha_bar, way, generator=torch.Generator().manual_seed(0))
               for way in (steps, matrix, matrix[:, None].expand(-1, 2, -1)))
    torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    assert torch.equal(b, c)


# Training

@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [dict(), dict(objective='noise', loss_type='l2', min_snr_gamma=5.), dict(objective='x0'),
                                    dict(objective='v', loss_type='l2', min_snr_gamma=5., zero_snr=True)], ids=str)
def test_equal_steps_give_the_loss_and_the_gradients_of_one_step(kwargs):
    diffusion = tiny(**kwargs)
    video, noise, t = torch.rand(2, 3, FRAMES, 8, 12), torch.randn(2, 3, FRAMES, 8, 12), torch.tensor([3, 41])
    results = []
    for steps in (t, t[:, None].expand(-1, FRAMES)):
        diffusion.zero_grad()
        losses = diffusion(video, noise=noise, t=steps, reduction='none')
        losses.sum().backward()
        results.append([losses.detach(), *(p.grad.clone() for p in diffusion.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('objective', ['noise', 'v', 'x0'])
def test_each_frame_has_the_noise_the_weight_and_the_way_back_of_its_own_step(objective):
    diffusion = tiny(objective=objective, loss_type='l2', min_snr_gamma=2.)
    x0, noise = torch.randn(2, 2, 3, FRAMES, 8, 12)
    t = torch.randint(0, 50, (2, FRAMES))
    diffusion.denoise_fn = network = torch.nn.Module()
    network.forward = lambda x, t, cond=None: 0.3 * x
    losses = diffusion.p_losses(x0, t, noise=noise, reduction='none')
    by_frame = []
    for frame in range(FRAMES):
        one = slice(frame, frame + 1)
        torch.testing.assert_close(diffusion.q_sample(x0, t, noise)[:, :, one],
                                   diffusion.q_sample(x0[:, :, one], t[:, frame], noise[:, :, one]))
        by_frame.append(diffusion.p_losses(x0[:, :, one], t[:, frame], noise=noise[:, :, one], reduction='none'))
    torch.testing.assert_close(losses, torch.stack(by_frame).mean(dim=0))
    network.forward_with_cond_scale = lambda x, t, cond=None, cond_scale=1.: 0.3 * x
    x = diffusion.q_sample(x0, t, noise)
    expected = torch.cat([diffusion.predict_x0(x[:, :, f:f + 1], t[:, f]) for f in range(FRAMES)], dim=2)
    torch.testing.assert_close(diffusion.predict_x0(x, t), expected)


def test_steps_of_training_cover_what_is_asked_later():
    t = torch.randint(500, 1000, (8000,), generator=torch.Generator().manual_seed(1))
    drawn = draw_levels(t, FRAMES, 1000, torch.Generator().manual_seed(0))
    assert drawn.shape == (8000, FRAMES) and drawn.min() >= 0 and drawn.max() <= 999
    same = ~levels_differ(drawn)
    assert 0.33 < same.float().mean() < 0.38 and torch.equal(drawn[same, 0], t[same])
    told = (~same) & ((drawn == t[:, None]) | (drawn <= LOW * 1000)).all(dim=1) & (drawn == t[:, None]).any(dim=1)
    assert 0.57 < told.float().mean() < 0.63
    low, row = drawn[told][:, 0], told.nonzero()[:, 0]                           # a beginning is always known,
    odd = row % 2 == row[low == 0][0] % 2                                        # in every other clip without noise
    assert torch.equal(low == 0, odd) and low.max() <= LOW * 1000
    assert low[~odd].float().std() > 0.25 * LOW * 1000
    two = (drawn[told] <= LOW * 1000).sum(dim=1) <= 2                            # and hardly more than that in most
    assert 0.1 + two[~odd].float().mean() < two[odd].float().mean() and two[odd].float().mean() > 0.5
    assert (drawn[told] == t[told, None]).any(dim=1).all()                       # and something is left to invent
    assert 0.15 < (drawn[told][:, -1] <= LOW * 1000).float().mean() < 0.35       # now and then the end is known as well
    again = draw_levels(t, FRAMES, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    assert (told_share(0.), told_share(0.3), told_share(0.4), told_share(1.)) == (0., 0., TOLD, TOLD)
    nobody = draw_levels(t, FRAMES, 1000, torch.Generator().manual_seed(0), told=0.)
    assert levels_differ(nobody).float().mean() < 0.08                           # only those that have nothing to do with each other
    assert draw_levels(torch.zeros(40, dtype=torch.long), FRAMES, 1).max() == 0
    alone = torch.stack([draw_levels(t[:1], FRAMES, 1000)[0] for _ in range(400)])        # of a batch of one either may be the case
    low = alone[levels_differ(alone)].amin(dim=1)
    assert 0.35 < (low == 0).float().mean() < 0.65


def test_the_network_draws_the_noisy_ones_of_known_frames_from_any_step_of_the_lower_half():
    t = draw_levels(torch.randint(500, 1000, (4000,)), FRAMES, 1000, torch.Generator().manual_seed(0))
    steps = own_steps(t, 1000, torch.Generator().manual_seed(0))
    drawn = torch.tensor([step is not None for step in steps])
    shares = sorted((drawn[::2].float().mean().item(), drawn[1::2].float().mean().item()))
    assert shares[0] < 0.05 and 0.57 < shares[1] < 0.67                          # the other half are told the truth
    assert not drawn[~levels_differ(t) | (t.amin(dim=1) == 0) | (t.amin(dim=1) > LOW * 1000)].any()
    steps = [step for step in steps if step is not None]
    assert 0 <= min(steps) < 20 and 480 < max(steps) < 500 and steps == [
        step for step in own_steps(t, 1000, torch.Generator().manual_seed(0)) if step is not None]


def test_a_model_draws_steps_of_its_own_and_remembers_how_it_was_built():
    diffusion = tiny()
    asked = []
    network = diffusion.denoise_fn.forward
    diffusion.denoise_fn.forward = lambda x, t, *more, **given: asked.append(t) or network(x, t, *more, **given)
    diffusion(torch.rand(16, 3, FRAMES, 8, 12))
    assert asked[-1].shape == (16, FRAMES) and levels_differ(asked[-1]).any() and len(asked) == 2
    assert GaussianDiffusion.from_config(diffusion.config()).frame_noise == 'independent'
    assert tiny('shared').draw_steps(torch.tensor([3, 4]))['t'].tolist() == [3, 4]


class Frozen(WordEncoder):
    """Says of a caption always the same."""

    def __init__(self):
        super().__init__(4, buckets=8)
        self.requires_grad_(False)


@pytest.mark.parametrize('encoder, of_drawn', [(lambda: WordEncoder(4, buckets=8), CUT), (Frozen, SILENT)])
def test_a_trainer_leaves_captions_out_where_frames_tell_and_two_processes_draw_as_one(encoder, of_drawn, tmp_path):
    """Beside frames that the network draws fewer, where it can cut the others short: a frozen encoder is asked for each caption once."""
    diffusion = tiny(cond_dim=4, text_encoder=encoder())
    trainer = Trainer(diffusion, make_shapes(tmp_path / 'clips', 2, 16, 12), results_folder=tmp_path, random_window=True,
                      null_cond_prob=0.1, train_num_steps=30, gradient_accumulate_every=2, processes=Processes(device=torch.device('cpu')))
    assert levels_differ(trainer.draw(19, 800, 0.)['t']).float().mean() < 0.1    # in the first third of 60 batches
    draws = trainer.draw(20, 8000, 0.)
    differ, true = levels_differ(draws['t']), draws['t'].amin(dim=1) == 0
    assert draws['t'].shape == (8000, FRAMES) and 0.57 < differ.float().mean() < 0.68
    for which, share in ((differ & true, SILENT), (differ & ~true, of_drawn), (~differ, 0.1)):
        assert abs(draws['null_cond_mask'][which].float().mean() - share) < 0.03
    assert ('heard' in draws) == trainer.cuts_captions == (encoder is not Frozen)
    whole = trainer.draw(59, 6, 0.)
    trainer.processes = replace(trainer.processes, rank=1, world_size=2)
    half = trainer.draw(59, 3, 0.)
    assert half.keys() == whole.keys() >= {'t', 'noise', 'null_cond_mask', 'own_steps'}
    assert half.pop('own_steps') == whole.pop('own_steps')[3:]
    assert all(torch.equal(half[name], whole[name][3:]) for name in half if name != 'prob_focus_present')


def test_captions_are_cut_short_only_beside_frames_and_the_network_hears_what_is_left(tmp_path):
    t = torch.tensor([[5, 5, 5], [0, 5, 5], [0, 5, 5], [0, 5, 5], [0, 0, 5]])
    captions = ['a red circle moving left'] * 4 + ['']
    assert shortened(captions, t, torch.tensor([0., 0., 0.5, 0.99, 0.5])) == [
        'a red circle moving left', 'a', 'a red circle', 'a red circle moving left', '']
    diffusion = tiny(cond_dim=4, text_encoder=WordEncoder(4, buckets=8))
    trainer = Trainer(diffusion, make_shapes(tmp_path / 'clips', 40, 16, 12), results_folder=tmp_path, random_window=True,
                      train_batch_size=40, train_num_steps=1, gradient_accumulate_every=2, processes=Processes(device=torch.device('cpu')))
    heard, embed = [], diffusion.embed
    diffusion.embed = lambda cond: heard.extend(cond) or embed(cond)
    trainer.prob_focus_present, trainer.focus_present_mask = 0., None
    trainer.learn(next(trainer.batches()), 1, is_last=True)
    words = sorted({len(text.split()) for text in heard})
    told = levels_differ(trainer.draw(1, 40, 0.)['t'])
    assert words[:2] == [1, 2] and words[-1] == 5
    assert all(len(text.split()) >= 4 for text, cut in zip(heard, told.tolist()) if not cut)      # a red circle turning


def test_known_frames_are_as_the_network_draws_them():
    diffusion, cond = tiny(cond_dim=4), torch.randn(4, 4)
    x0, noise = torch.rand(4, 3, FRAMES, 8, 12) * 2 - 1, torch.randn(4, 3, FRAMES, 8, 12)
    t, own = torch.full((4, FRAMES), 40), [None, 9, None, 4]
    t[0, 0], t[1, :2], t[3] = 3, torch.tensor([1, int(LOW * 50)]), 7             # of the last, all frames are at a low one
    seen = as_drawn(diffusion, x0, t, noise, cond, own)
    assert not seen.requires_grad and torch.equal(seen[::2], x0[::2]) and torch.equal(seen[1, :, 2:], x0[1, :, 2:])
    for clip, known in ((1, 2), (3, FRAMES)):
        one, step = slice(clip, clip + 1), torch.tensor([own[clip]])
        noisy = diffusion.q_sample(x0[one], step, noise[one].roll(1, dims=2))
        torch.testing.assert_close(seen[clip, :, :known], diffusion.predict_x0(noisy, step, cond[one])[0, :, :known])
        assert (seen[clip, :, :known] - x0[clip, :, :known]).abs().mean() > 0.01
    asked, network = [], diffusion.denoise_fn.forward
    diffusion.denoise_fn.forward = lambda x, *given, **more: asked.append(len(x)) or network(x, *given, **more)
    assert torch.equal(as_drawn(diffusion, x0, t, noise, cond, [None] * 4), x0)
    assert torch.equal(as_drawn(diffusion, x0[:3], t[:3], noise, cond, [None, 9, None])[::2], x0[:3:2])
    assert asked == [2, 2]                          # always of half: other processes may wait for its share


def test_the_loss_asks_for_the_true_frames_beside_drawn_ones():
    diffusion, video = tiny(objective='x0'), torch.rand(2, 3, FRAMES, 8, 12)
    t = torch.tensor([[1, 1, 40, 40, 40]] * 2)
    draws = diffusion.draw(2, video.device, torch.Generator().manual_seed(0))
    answers, network = [], diffusion.denoise_fn.forward
    diffusion.denoise_fn.forward = lambda x, *more, **given: answers.append((x, network(x, *more, **given))) or answers[-1][1]
    loss = diffusion(video, t=t, own_steps=[20, None], **draws)
    x, answer = answers[-1]
    assert len(answers) == 2 and len(answers[0][0]) == 1
    as_it_is = diffusion.q_sample(video * 2 - 1, t, draws['noise'])
    assert torch.equal(x[1], as_it_is[1]) and not torch.equal(x[0, :, 0], as_it_is[0, :, 0])
    torch.testing.assert_close(loss, (answer - (video * 2 - 1)).abs().mean())


# What is known

def test_the_network_sees_known_frames_as_they_are_and_is_told_so():
    diffusion, video = tiny(), torch.rand(2, 3, FRAMES, 8, 12)
    mask = torch.tensor([[True, False, False, False, True], [True, True, False, False, False]])
    seen = []
    ask = diffusion.denoise_fn.forward_with_cond_scale
    diffusion.denoise_fn.forward_with_cond_scale = lambda x, t, **given: seen.append((x, t)) or ask(x, t, **given)
    how = dict(known=video, known_mask=mask, sampler='ddpm', steps=4, batch_size=2, seed=0, progress=False)
    drawn = diffusion.sample(**how)
    assert len(seen) == 4
    for (x, t), step in zip(seen, spaced_steps(50, 4)):
        shown = mask[:, None, :, None, None].expand_as(x)
        torch.testing.assert_close(x[shown], (2 * video - 1)[shown])
        assert (t[mask] == 0).all() and (t[~mask] == step).all()
    torch.testing.assert_close(drawn.transpose(1, 2)[mask], video.transpose(1, 2)[mask])
    seen.clear()
    again = diffusion.sample(**how, known_noise=0.1)                             # seen under a little noise, but kept clean
    torch.testing.assert_close(again.transpose(1, 2)[mask], video.transpose(1, 2)[mask])
    assert all((t[mask] == 4).all() for _, t in seen) and not torch.allclose(again, drawn)
    error = (seen[0][0] - diffusion.alpha[4] * (2 * video - 1)).transpose(1, 2)[mask]
    assert 0.8 < error.std() / diffusion.sigma[4] < 1.2


def correlated(rho=0.9):
    """Gaussian videos whose neighbouring frames correlate by rho: covariance (f f), and the exact denoiser for any levels."""
    distance = (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).abs()
    covariance = rho ** distance.double()
    alpha_bar = torch.cat((cosine_schedule(1000), torch.ones(1, **DOUBLE)))

    def denoise(x, t):
        a = alpha_bar[t].view(-1).sqrt().diag()                                  # f f
        noise = (1 - alpha_bar[t].view(-1)).diag()
        gain = covariance @ a @ torch.linalg.inv(a @ covariance @ a + noise)
        return torch.einsum('ij,bcjhw->bcihw', gain, x)
    return covariance, alpha_bar[:-1], denoise


@pytest.mark.parametrize('name, steps, lag', [('ddim', 150, 0), ('ddpm', 300, 0), ('dpm++2m', 40, 0), ('dpm++2m', 40, 40),
                                              ('dpm++2m', 40, 7)])
@pytest.mark.parametrize('known', [[0, 1], [0, 4], []])
def test_frames_are_drawn_from_the_truth_given_those_that_are_known(name, steps, lag, known):
    """Mean and covariance of the unknown frames given the known ones: exact conditioning, which guidance only approaches."""
    covariance, alpha_bar, denoise = correlated()
    generator = torch.Generator().manual_seed(0)
    free = [f for f in range(FRAMES) if f not in known]
    x = torch.randn((1, 1, FRAMES, 60, 60), generator=generator, **DOUBLE)
    given = torch.linalg.cholesky(covariance) @ torch.randn(FRAMES, generator=generator, **DOUBLE)
    mask = torch.tensor([[f in known for f in range(FRAMES)]])
    matrix, x = known_frames.at_level(levels(spaced_steps(1000, steps), FRAMES, lag), x, given[None, None, :, None, None].expand_as(x),
                                      mask, CLEAN, alpha_bar)
    drawn = SAMPLERS[name](denoise, x, alpha_bar, matrix, generator=generator).view(FRAMES, -1)      # f samples
    inverse = torch.linalg.inv(covariance[known][:, known])
    mean = covariance[free][:, known] @ inverse @ given[known]
    rest = covariance[free][:, free] - covariance[free][:, known] @ inverse @ covariance[known][:, free]
    torch.testing.assert_close(drawn[free].mean(dim=1), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(drawn[free].cov(), rest, rtol=0.08, atol=0.03)


def test_no_step_is_taken_in_which_no_frame_moves():
    """One by one, the first unknown frame need not wait for those that are known."""
    diffusion, asked = tiny(), []
    network = diffusion.denoise_fn.forward
    diffusion.denoise_fn.forward = lambda x, t, *more, **given: asked.append(t) or network(x, t, *more, **given)
    diffusion.sample(first_frames=torch.rand(1, 3, 3, 8, 12), frame_lag=4, steps=4, batch_size=1, progress=False)
    assert len(asked) == 4 * 2 and all((t[0, :3] == 0).all() for t in asked)


def test_leading_away_from_a_hidden_past_is_a_line_through_two_answers():
    denoise = lambda x, t: 0.1 * x + torch.as_tensor(t)[:, None, :, None, None] / 1000
    x, noise, mask = torch.rand(2, 3, FRAMES, 4, 6), torch.rand(2, 3, FRAMES, 4, 6), torch.arange(FRAMES).expand(2, -1) < 2
    t = torch.tensor([[-1, -1, 30, 30, 30]]).expand(2, -1)
    wide = mask[:, None, :, None, None]
    unseen = denoise(torch.where(wide, noise, x), torch.where(mask, 49, t))
    expected = unseen + 1.5 * (denoise(x, t) - unseen)
    torch.testing.assert_close(known_frames.led_by_known(denoise, noise, mask, 1.5, 49)(x, t), expected)
    torch.testing.assert_close(known_frames.led_by_known(denoise, noise, mask, 1., 49)(x, t), denoise(x, t))
    how = dict(first_frames=torch.rand(1, 3, 2, 8, 12), steps=3, sampler='ddim', batch_size=2, seed=0, progress=False)
    diffusion = tiny()
    plain, led, other = (diffusion.sample(history_scale=scale, **how) for scale in (1., 1.0001, 3.))
    torch.testing.assert_close(led, plain, rtol=0, atol=1e-3)
    assert not torch.allclose(other, plain, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize('sampler', ['ddpm', 'dpm++2m'])
def test_a_staircase_draws_a_video(sampler):
    diffusion = tiny(cond_dim=4)
    how = dict(cond=torch.randn(2, 4), cond_scale=2., sampler=sampler, steps=3, seed=0, progress=False)
    together, staircase = (diffusion.sample(frame_lag=lag, **how) for lag in (0, 2))
    assert staircase.isfinite().all() and not torch.allclose(staircase, together, atol=1e-2)
    way = diffusion.sample(frame_lag=2, return_all=True, **how)
    assert len(way) == 3 + 2 * (FRAMES - 1) + 1
    assert torch.equal(way[3][:, :, 0], way[-1][:, :, 0]) and torch.equal(way[0][:, :, -1], way[8][:, :, -1])    # done; not begun


# Longer videos

def test_later_windows_know_what_was_drawn_under_a_little_noise():
    diffusion = tiny()
    asked, sample = [], diffusion.sample
    diffusion.sample = lambda *args, **given: asked.append(given) or sample(*args, **given)
    how = dict(sampler='ddim', steps=3, batch_size=2, progress=False, seed=0, overlap=2, known_noise=0.1, history_scale=1.5)
    video = diffusion.sample_long(13, **how)
    assert video.shape == (2, 3, 13, 8, 12)
    assert [(a['first_frames'] is not None, a.get('known_noise'), a.get('history_scale', 1.)) for a in asked] == [
        (False, 0., 1.), (True, 0.1, 1.5), (True, 0.1, 1.5), (True, 0.1, 1.5)]
    for i, given in enumerate(asked[1:]):
        assert torch.equal(given['first_frames'], video[:, :, 3 * i + 3:][:, :, :2])
    for how, noise in ((dict(), DRAWN), (dict(known_noise=0.), 0.), (dict(known_by='replace'), None)):
        asked.clear()
        diffusion.sample_long(7, sampler='ddim', steps=1, batch_size=1, progress=False, overlap=3, **how)
        assert [a.get('known_noise') for a in asked] == [0., noise]


def test_captions_of_a_video_take_turns():
    cond = [['a', 'b'], 'c', ['d', 'e', 'f']]
    assert long_videos.by_window(cond, 6) == [['a', 'c', 'd'], ['a', 'c', 'd'], ['a', 'c', 'e'], ['b', 'c', 'e'], ['b', 'c', 'f'],
                                              ['b', 'c', 'f']]
    for plain in (None, 'a', ['a', 'b'], torch.zeros(2, 4)):
        assert all(one is plain for one in long_videos.by_window(plain, 3))
    # sample.py --later-prompt: the prompt is for the first window, whatever their number.
    told = runpy.run_path(str(Path(__file__).parents[1] / 'sample.py'))['in_turn'](['a'], Namespace(later_prompt='b', frames=9))
    for windows in (2, 3, 7, 9):
        assert long_videos.by_window(told, windows) == [['a']] + [['b']] * (windows - 1)
    with pytest.raises(ValueError, match='2 windows cannot show 3 captions'):
        long_videos.by_window([['a', 'b', 'a']], 2)
    with pytest.raises(ValueError, match='list of captions of a video is empty'):
        long_videos.by_window([['a'], []], 3)


def test_latents_too_are_known_by_their_level():
    torch.manual_seed(0)
    vae = TemporalVAE(latent_channels=2, dim=8, dim_mults=(1, 2), blocks_per_level=1, norm_groups=4)
    inner = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2), channels=2, attn_heads=1), channels=2, image_size=(8, 12), num_frames=FRAMES,
                              latents=True, objective='v', frame_noise='independent', timesteps=50)
    diffusion = LatentDiffusion(inner, vae, 1., num_frames=FRAMES)
    video = torch.rand(2, 3, FRAMES, 16, 24)
    diffusion(video).backward()
    seen, ask = [], inner.denoise_fn.forward_with_cond_scale
    inner.denoise_fn.forward_with_cond_scale = lambda x, t, **given: seen.append((x, t)) or ask(x, t, **given)
    diffusion.sample(first_frames=video[:, :, :2], batch_size=2, steps=2, progress=False)
    x, t = seen[-1]
    torch.testing.assert_close(x[:, :, :2], diffusion.latents(video)[:, :, :2], rtol=1e-3, atol=1e-4)
    assert (t[:, :2] == 0).all() and (t[:, 2:] > 0).all()


@pytest.mark.parametrize('given, says', [
    (dict(frame_lag=1), "frame_lag and known_by='level' need a model"),
    (dict(first_frames=torch.rand(1, 3, 2, 8, 12), known_by='level'), "GaussianDiffusion(frame_noise='independent')"),
    (dict(first_frames=torch.rand(1, 3, 2, 8, 12), known_noise=0.1), 'give known frames to a model'),
    (dict(first_frames=torch.rand(1, 3, 2, 8, 12), history_scale=2.), 'give known frames to a model'),
    (dict(frame_lag=-1), 'frame_lag=-1: give a whole number, 0 or more'),
    (dict(known_noise=0.5), 'known_noise=0.5: give a number from 0 to 0.15'),
    (dict(cond=torch.zeros(2, 4), cond_scale=4., dynamic_guidance=5., history_scale=2.), 'go by the noise of a whole video'),
])
def test_levels_without_sense_get_a_sentence(given, says):
    with pytest.raises(ValueError) as error:
        tiny('shared').sample(batch_size=2, sampler='ddim', steps=2, progress=False, **given)
    assert says in str(error.value)


def test_models_that_cannot_have_it_say_so():
    with pytest.raises(ValueError, match='known_noise and history_scale'):
        tiny().sample(batch_size=1, steps=2, history_scale=2., progress=False)                     # nothing is known
    for both in (dict(frame_lag=1, wave_guidance=True), dict(frame_lag=1, dynamic_guidance=5.)):
        with pytest.raises(ValueError, match='go by the noise of a whole video'):
            tiny(cond_dim=4).sample(torch.zeros(2, 4), 4., steps=2, progress=False, **both)
    with pytest.raises(ValueError, match='num_frames=3, overlap=1: the model draws 1 frames'):
        GaussianDiffusion(Unet3D(8, dim_mults=(1,)), image_size=8, num_frames=1).sample_long(3)
    with pytest.raises(ValueError, match="frame_lag=1 with known_by='guide'"):
        tiny().sample(first_frames=torch.rand(1, 3, 2, 8, 12), known_by='guide', frame_lag=1, batch_size=1, steps=2, progress=False)
    with pytest.raises(ValueError, match="frame_noise='all'"):
        tiny('all')
    with pytest.raises(ValueError, match='twice: leave out one'):
        GaussianDiffusion(Unet3D(8, dim_mults=(1,), cond_frames=True), image_size=8, num_frames=4, prob_cond_frames=0.5,
                          frame_noise='independent')
    dit = DiT(16, cond_dim=4, channels=3, depth=1, dim_head=16, patch=4, text_length=3)
    diffusion = GaussianDiffusion(dit, image_size=8, num_frames=4, frame_noise='independent', objective='v')
    with pytest.raises(ValueError, match='needs a Unet3D'):
        diffusion(torch.rand(2, 3, 4, 8, 8), torch.rand(2, 3, 4))


@pytest.mark.slow
def test_a_network_learns_to_use_what_it_is_told_by_level():
    torch.manual_seed(0)
    told, untold = told_and_untold(tiny(objective='x0'), steps=60)
    assert told < 0.6 * untold

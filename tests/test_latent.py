"""Diffusion in latents is diffusion, of what a frozen VAE makes of the clips. Run: pytest tests/test_latent.py"""

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_trainer import CPU, assert_same_state, soften

from video_diffusion import (
    GaussianDiffusion,
    GifDataset,
    Trainer,
    Unet3D,
    WordEncoder,
    checkpoint,
    gif_to_tensor,
    shapes,
    video_tensor_to_gif,
)
from video_diffusion.diffusion.latent import LatentDiffusion, diffusion_from_state, latent_shape
from video_diffusion.diffusion.latent_cache import Encoded, LatentCache
from video_diffusion.distributed import Processes
from video_diffusion.vae.causal_vae import CausalVAE
from video_diffusion.vae.vae_checkpoint import vae_from_checkpoint

ROOT = Path(__file__).parent.parent
FRAMES, SIZE = 5, 16          # latents: 2 channels, 3 frames of 8 x 8


def make_vae(seed=0):
    torch.manual_seed(seed)
    return CausalVAE(latent_channels=2, dim=4, dim_mults=(1, 1), blocks_per_level=1, time_compression=2, norm_groups=2,
                     norm_scope='frame')


def make(frames=FRAMES, told=0., captions=False, scale=1.5, objective='v', vae=None, **latent):
    vae = vae or make_vae()
    torch.manual_seed(1)
    channels, latent_frames, *size = latent_shape(vae, frames, (SIZE, SIZE))
    encoder = WordEncoder(8) if captions else None
    unet = Unet3D(8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=8, channels=channels, cond_frames=told > 0,
                  cond_dim=8 if captions else None)
    inner = GaussianDiffusion(unet, image_size=tuple(size), num_frames=latent_frames, channels=channels, timesteps=20,
                              objective=objective, text_encoder=encoder, prob_cond_frames=told, latents=True)
    return LatentDiffusion(inner, vae, scale, num_frames=frames, **latent)


def ddim(diffusion, **kwargs):
    return diffusion.sample(**{**dict(sampler='ddim', steps=3, seed=0, batch_size=2, progress=False), **kwargs})


@pytest.fixture(scope='session')
def clips(tmp_path_factory):
    return shapes.make_shapes(tmp_path_factory.mktemp('clips'), 6, image_size=SIZE, num_frames=FRAMES)


def make_trainer(clips, results, diffusion=None, **kwargs):
    settings = dict(train_batch_size=2, gradient_accumulate_every=1, train_num_steps=4, train_lr=1e-3, step_start_ema=0,
                    update_ema_every=1, ema_decay=0.5, save_and_sample_every=2, num_sample_rows=1, sampler='ddim', sample_steps=2,
                    processes=CPU)
    return Trainer(diffusion or make(captions=True, scale=None), clips, results_folder=results, **{**settings, **kwargs})


# What it computes

def test_the_loss_is_that_of_diffusion_on_scaled_latents():
    diffusion, video = make(scale=1.5), torch.rand(2, 3, FRAMES, SIZE, SIZE)
    noise, posterior_noise, t = torch.randn(2, 2, 3, 8, 8), torch.randn(2, 2, 3, 8, 8), torch.tensor([3, 17])
    posterior = diffusion.vae.encode(video)
    z = 1.5 * (posterior.mean + posterior.std * posterior_noise)
    alpha, sigma = diffusion.diffusion.alpha_sigma(t)
    output = diffusion.denoise_fn(alpha * z + sigma * noise, t)
    expected = (output - (alpha * noise - sigma * z)).abs().mean()
    loss = diffusion(video, noise=noise, t=t, posterior_noise=posterior_noise)
    torch.testing.assert_close(loss, expected)
    again = diffusion(Encoded(posterior, None), noise=noise, t=t, posterior_noise=posterior_noise)
    torch.testing.assert_close(again, loss)


def test_unbounded_data_is_neither_moved_nor_clipped():
    """A network that always answers 7 (x0): latents of 7 come out, where pixels would be clipped to 1."""
    for latents, expected in ((True, 7.), (False, 1.)):
        class Seven(torch.nn.Module):
            def forward_with_cond_scale(self, x, t, cond, cond_scale):
                return torch.full_like(x, 7.)
        diffusion = GaussianDiffusion(Seven(), image_size=4, num_frames=2, timesteps=20, objective='x0', latents=latents)
        assert torch.equal(diffusion.sample(batch_size=1, progress=False), torch.full((1, 3, 2, 4, 4), expected))
        z = torch.randn(1, 3, 2, 4, 4) * (5 if latents else 2)
        drawn = diffusion.sample(known=z, known_mask=torch.tensor([True, False]), known_by='replace', batch_size=1, progress=False)
        assert torch.allclose(drawn[:, :, 0], z[:, :, 0] if latents else z[:, :, 0].clamp(0, 1), atol=1e-4)


def test_slices_and_chunks_change_nothing():
    video = torch.rand(3, 3, 9, SIZE, SIZE)
    whole, sliced = make(frames=9), make(frames=9, max_batch=2, chunk=1)
    a, b = whole.encode(video).posterior, sliced.encode(video).posterior
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.logvar, b.logvar, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.decode(a.mean), sliced.decode(a.mean), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.decode(1.5 * a.mean), whole.vae.decode(a.mean).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_samples_are_videos():
    diffusion = make()
    videos = ddim(diffusion)
    assert videos.shape == (2, 3, FRAMES, SIZE, SIZE) and videos.min() >= 0 and videos.max() <= 1
    way = ddim(diffusion, return_all=True)
    assert way.shape == (4, 2, 3, FRAMES, SIZE, SIZE) and torch.equal(way[-1], videos)


def test_the_vae_is_frozen_but_in_the_checkpoint():
    diffusion = make().train()
    assert diffusion.diffusion.training and not any(m.training for m in diffusion.vae.modules())
    trained = {name for name, p in diffusion.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith('diffusion.') for name in trained)
    assert any(name.startswith('vae.') for name in diffusion.state_dict())


def test_the_scale_is_measured(clips, tmp_path):
    dataset = GifDataset(clips, SIZE, num_frames=FRAMES)
    diffusion = make(scale=None)
    with pytest.raises(ValueError, match='measure_scale'):
        diffusion(torch.rand(1, 3, FRAMES, SIZE, SIZE))
    diffusion.measure_scale(dataset)
    posterior = diffusion.encode(torch.stack([dataset[i][0] for i in range(6)])).posterior
    drawn = torch.cat([posterior.sample() for _ in range(50)]) * diffusion.scale
    assert drawn.std().item() == pytest.approx(1, abs=0.01)
    cached = make(scale=None)
    cached.measure_scale(LatentCache(dataset, cached, tmp_path, CPU))
    torch.testing.assert_close(cached.scale, diffusion.scale)
    given = make(scale=2.)
    given.measure_scale(dataset)
    assert given.scale == 2.


# Training

@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_never_stopped(clips, tmp_path):
    make_trainer(clips, tmp_path / 'whole').train()
    make_trainer(clips, tmp_path / 'parts', train_num_steps=2).train()
    trainer = make_trainer(clips, tmp_path / 'parts')
    trainer.load(-1)
    trainer.train()
    whole, parts = (checkpoint.load(checkpoint.newest(tmp_path / name)) for name in ('whole', 'parts'))
    assert_same_state(whole, parts)
    assert whole['model']['scale'].isfinite() and not any('vae' in name for name in whole['ema']['average'])

    # The file is all that is needed, and holds the VAE as it was.
    diffusion = diffusion_from_state(whole)
    with trainer.ema.average_parameters():
        assert torch.equal(ddim(diffusion, cond=['a', 'b']), ddim(trainer.diffusion, cond=['a', 'b']))
    assert all(torch.equal(p, q) for p, q in zip(make_vae().state_dict().values(), diffusion.vae.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match='LatentDiffusion'):
        GaussianDiffusion.from_state(whole)
    with pytest.raises(ValueError, match='other settings'):    # another VAE's latents would mean nothing to it
        make_trainer(clips, tmp_path / 'parts', make(captions=True, vae=make_vae(seed=5))).load(-1)


@pytest.mark.slow
def test_cached_latents_train_like_the_clips(clips, tmp_path, monkeypatch):
    soften(make_trainer(clips, tmp_path / 'clips')).train()
    soften(make_trainer(clips, tmp_path / 'cached', latent_cache=tmp_path / 'latents', train_num_steps=2)).train()
    monkeypatch.setattr(GifDataset, 'read', lambda *args: pytest.fail('pixels were touched'))
    monkeypatch.setattr(CausalVAE, 'encode', lambda *args: pytest.fail('a clip was encoded again'))
    trainer = soften(make_trainer(clips, tmp_path / 'cached', latent_cache=tmp_path / 'latents'))
    trainer.load(-1)
    trainer.train()
    a, b = (checkpoint.load(checkpoint.newest(tmp_path / name)) for name in ('clips', 'cached'))
    assert_same_state(a['model'], b['model'], tolerance=1e-4)


def test_the_cache_goes_on_where_it_stopped_and_knows_what_it_holds(clips, tmp_path):
    def encode(diffusion=None, size=SIZE):
        before = set(tmp_path.rglob('*.pt'))
        cache = LatentCache(GifDataset(clips, size, num_frames=FRAMES), diffusion or make(), tmp_path, CPU)
        return cache, set(tmp_path.rglob('*.pt')) - before

    cache, new = encode()
    assert len(new) == len(cache) == 6
    lost = sorted(new)[2]
    lost.unlink()
    dates = {file: file.stat().st_mtime_ns for file in new - {lost}}
    assert encode()[1] == {lost} and dates == {file: file.stat().st_mtime_ns for file in dates}
    assert len(encode(make(vae=make_vae(seed=5)))[1]) == 6                # another VAE
    assert len(encode(make(told=0.5))[1]) == 6                            # images beside the clips
    posterior = cache.floats(torch.stack([cache.clip(0), cache.clip(1)])).posterior
    expected = make().encode(torch.stack([GifDataset(clips, SIZE, num_frames=FRAMES)[i][0] for i in (0, 1)])).posterior
    torch.testing.assert_close(posterior.mean, expected.mean)
    torch.testing.assert_close(posterior.std, expected.std)
    os.utime(sorted(clips.glob('*.gif'))[0], (1, 1))                      # a clip that was replaced
    assert len(encode()[1]) == 1
    damaged = shutil.copytree(clips, tmp_path / 'damaged')
    sorted(damaged.glob('*.gif'))[1].write_bytes(b'GIF89a')
    with pytest.warns(UserWarning, match='skipped'):
        cache = LatentCache(GifDataset(damaged, SIZE, num_frames=FRAMES), make(), tmp_path, CPU)
    assert len(cache) == len(cache.captions) == 5                         # none stands in for the damaged one
    assert cache.captions[1] == GifDataset(clips, SIZE, num_frames=FRAMES).captions[2]
    with pytest.raises(ValueError, match='random_window'):
        LatentCache(GifDataset(clips, SIZE, num_frames=FRAMES, random_window=True), make(), tmp_path, CPU)
    with pytest.raises(ValueError, match='pixels'):
        LatentCache(GifDataset(clips, SIZE), GaussianDiffusion(Unet3D(8), image_size=16, num_frames=5), tmp_path, CPU)


@pytest.mark.parametrize('keeps', [0, 1, 60, 700])
def test_a_latent_that_lost_its_end_is_encoded_again(clips, tmp_path, monkeypatch, keeps):
    dataset = GifDataset(clips, SIZE, num_frames=FRAMES)
    cache = LatentCache(dataset, make(), tmp_path, CPU)
    whole, latents = cache.files[2].read_bytes(), cache.clip(2)
    assert len(whole) > 700
    cache.files[2].write_bytes(whole[:keeps])
    encoded, encode = [], LatentDiffusion.encode
    monkeypatch.setattr(LatentDiffusion, 'encode', lambda self, videos, *how: encoded.append(len(videos)) or encode(self, videos, *how))
    again = LatentCache(dataset, make(), tmp_path, CPU)
    assert encoded == [1] and again.paths == dataset.paths
    torch.testing.assert_close(again.clip(2), latents, rtol=1e-4, atol=1e-5)
    again.files[2].write_bytes(whole[:300] + bytes(100) + whole[400:])                      # of the right length, and only seen when read
    with pytest.raises(ValueError, match='is refused: .*Delete this file, and it is made again'):
        LatentCache(dataset, make(), tmp_path, CPU).clip(2)


def test_the_cache_reads_a_clip_once_and_keeps_no_pixels(clips, tmp_path, monkeypatch):
    reads, read = [], GifDataset.read
    monkeypatch.setattr(GifDataset, 'read', lambda self, index, *how: reads.append(index) or read(self, index, *how))
    for budget in (2**30, 100):
        reads.clear()
        dataset = GifDataset(clips, SIZE, num_frames=FRAMES, cache_bytes=budget)
        LatentCache(dataset, make(), tmp_path / str(budget), CPU)
        assert sorted(reads) == list(range(6)) and not dataset.cache
    parts = LatentCache(GifDataset(clips, SIZE, num_frames=FRAMES - 2, clips_per_video=2), make(frames=FRAMES - 2), tmp_path / 'parts', CPU)
    assert len(parts) == 12 and not torch.equal(parts.clip(0), parts.clip(1))


def test_two_processes_draw_what_one_draws_for_twice_the_batch(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, make(captions=True, told=0.5))
    whole = trainer.draw(7, 4, 0.)
    trainer.processes = Processes(rank=1, world_size=2, device=torch.device('cpu'))
    part = trainer.draw(7, 2, 0.)
    assert {'posterior_noise', 'image_noise', 'known_mask'} <= part.keys() == whole.keys()
    for name in part.keys() - {'prob_focus_present'}:
        assert torch.equal(part[name], whole[name][2:]), name


# Image-to-video

def test_the_network_is_told_the_first_frame_of_the_video_alone_and_noised():
    diffusion, video = make(told=1.), torch.rand(2, 3, FRAMES, SIZE, SIZE)
    shown = {}
    diffusion.denoise_fn.forward = lambda x, t, **kwargs: shown.update(kwargs) or torch.zeros_like(x)
    draws = diffusion.draw(2, torch.device('cpu'))
    diffusion(video, **draws)
    image = diffusion.vae.encode(video[:, :, :1] + draws['image_noise']).mean * 1.5
    torch.testing.assert_close(shown['known'][:, :, :1], image)
    assert not torch.allclose(image, diffusion.vae.encode(video).mean[:, :, :1] * 1.5)
    posterior = diffusion.vae.encode(video)
    torch.testing.assert_close(shown['known'][:, :, 1:], ((posterior.mean + posterior.std * draws['posterior_noise']) * 1.5)[:, :, 1:])
    assert shown['known_mask'][:, 0].all() and not shown['known_mask'][:, 2].any()      # a beginning, never with the end

    noise = diffusion.draw_image_noise(4000, torch.device('cpu'), torch.Generator().manual_seed(0)).flatten(1)
    log_sigma = (2 * noise.std(dim=1)).log()                     # in [-1, 1]
    assert log_sigma.mean().item() == pytest.approx(-3, abs=0.05) and log_sigma.std().item() == pytest.approx(0.5, abs=0.05)


def test_images_steer_samples():
    diffusion, (one, other) = make(told=1.), torch.rand(2, 1, 3, SIZE, SIZE)
    a, b = ddim(diffusion, image=one), ddim(diffusion, image=other)
    assert not torch.allclose(a, b)
    assert torch.equal(a, ddim(diffusion, first_frames=one[:, :, None]))
    # Nothing but what it was told: without the mask nothing is known, and nothing is overwritten.
    known, mask = diffusion.beginning(one[:, :, None], by_network=True)
    assert mask.tolist() == [True, False, False]
    assert not torch.allclose(diffusion.diffusion.sample(known=known, known_mask=mask, steps=3, sampler='ddim', seed=0, batch_size=2,
                                                         progress=False)[:, :, :1], known[:, :, :1].expand(2, -1, -1, -1, -1), atol=0.1)


@pytest.mark.parametrize('frames, lengths', [(5, [1, 3]), (4, [2])])
def test_first_frames_are_known_latents(frames, lengths):
    diffusion, video = make(frames=frames), torch.rand(2, 3, frames, SIZE, SIZE)
    for k in lengths:
        latents = diffusion.vae.encode(video).mean * 1.5
        known, mask = diffusion.beginning(video[:, :, :k], by_network=False)
        torch.testing.assert_close(known[:, :, mask], latents[:, :, mask], rtol=1e-4, atol=1e-5)  # no later frame matters
        drawn = ddim(diffusion, first_frames=video[:, :, :k], known_by='replace')
        seen = diffusion.decode(latents)
        torch.testing.assert_close(drawn[:, :, :k], seen[:, :, :k], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=f'k is {lengths[0]}'):
        ddim(diffusion, first_frames=video[:, :, :lengths[0] + 1])
    told = make(frames=frames, told=0.5)
    assert ddim(told, image=video[:1, :, 0]).shape[2] == frames                # as an image, one frame always will do


def test_longer_clips():
    video = make().sample_long(9, sampler='ddim', steps=2, seed=0, batch_size=1, progress=False)
    assert video.shape == (1, 3, 9, SIZE, SIZE)


# Super-resolution

def test_the_network_is_told_the_whole_clip_small():
    diffusion, video = make(told=1., low_res=4), torch.rand(2, 3, FRAMES, SIZE, SIZE)
    small = diffusion.shrink(video)
    torch.testing.assert_close(small, video.unflatten(3, (4, 4)).unflatten(5, (4, 4)).mean(dim=(4, 6)))  # of squares of 4 x 4
    large = torch.stack([F.interpolate(frame, scale_factor=4, mode='bilinear') for frame in small.unbind(2)], dim=2)
    shown = []
    forward = diffusion.denoise_fn.forward
    diffusion.denoise_fn.forward = lambda *args, **kwargs: shown.append(kwargs) or forward(*args, **kwargs)
    draws = diffusion.draw(2, torch.device('cpu'))
    diffusion(video, **draws)
    drawn = ddim(diffusion, low_res=small)
    assert drawn.shape == video.shape and 'image_noise' not in draws
    for kwargs in shown:
        torch.testing.assert_close(kwargs['known'], diffusion.vae.encode(large).mean * 1.5)
        assert kwargs['known_mask'].all()
    torch.testing.assert_close(ddim(diffusion, low_res=small[:1])[0], drawn[0])        # one is enough for all
    assert not torch.allclose(ddim(diffusion, low_res=small.flip(0)), drawn, atol=1e-3)


@pytest.mark.slow
def test_a_network_that_enlarges_learns_to_use_the_small_clip():
    """Of pure noise nothing can be said but what the small clip says: here, the colour of a clip that has but one."""
    diffusion = make(told=1., low_res=4, objective='x0')
    optimizer = torch.optim.Adam(diffusion.diffusion.parameters(), lr=5e-3)
    sure, last = torch.zeros(8, 2, 3, 8, 8), torch.full((8,), 19)

    def plain(count):
        return diffusion.encode(torch.rand(count, 3, 1, 1, 1).expand(-1, -1, FRAMES, SIZE, SIZE))
    diffusion.scale.fill_(1 / plain(64).posterior.mean.std())
    clips = plain(8)
    before = diffusion(clips, t=last, posterior_noise=sure).item()
    for _ in range(60):
        diffusion(plain(8), t=last, posterior_noise=sure).backward()
        optimizer.step()
        optimizer.zero_grad()
    right = diffusion(clips, t=last, posterior_noise=sure).item()
    wrong = diffusion(Encoded(clips.posterior, clips.hint.roll(1, 0)), t=last, posterior_noise=sure).item()
    assert right < 0.5 * before and right < 0.5 * wrong


def test_small_clips_are_cached_and_make_the_samples_of_a_milestone(clips, tmp_path):
    dataset, diffusion = GifDataset(clips, SIZE, num_frames=FRAMES), make(captions=True, told=1., low_res=2)
    cache = LatentCache(dataset, diffusion, tmp_path / 'latents', CPU)
    encoded, expected = cache.floats(cache.clip(0)[None]), diffusion.encode(dataset[0][0][None])
    torch.testing.assert_close(encoded.hint, expected.hint)
    torch.testing.assert_close(encoded.posterior.mean, expected.posterior.mean)
    other = LatentCache(dataset, make(captions=True, told=1., low_res=4), tmp_path / 'latents', CPU)
    assert other.folder != cache.folder

    trainer = make_trainer(clips, tmp_path / 'results', diffusion, num_sample_rows=2, train_num_steps=1)
    given = []

    def sample(prompts, batch_size, low_res, **how):
        given.extend(zip(prompts, low_res))
        return torch.zeros(batch_size, 3, FRAMES, SIZE, SIZE)
    diffusion.sample = sample
    trainer.train()
    for (prompt, small), i in zip(given, (0, 1, 3, 4), strict=True):
        video, caption = dataset[i]
        assert prompt == caption
        torch.testing.assert_close(small, diffusion.shrink(video[None])[0])


def test_what_cannot_be_enlarged_is_said_so():
    with pytest.raises(ValueError, match='low_res=3: give a number above 1 that divides frames of 16x16'):
        make(told=1., low_res=3)
    with pytest.raises(ValueError, match='prob_cond_frames=0.5.*prob_cond_frames=1'):
        make(told=0.5, low_res=4)
    diffusion, small = make(told=1., low_res=4), torch.rand(1, 3, FRAMES, 4, 4)
    image = dict(image=torch.rand(1, 3, SIZE, SIZE))
    for low_res, more in ((None, {}), (small[0], {}), (small[:, :, 1:], {}), (small[..., 1:], {}), (small, image)):
        with pytest.raises(ValueError, match=r'expected \(batch, 3, 5, 4, 4\) and no first_frames'):
            ddim(diffusion, low_res=low_res, **more)
    with pytest.raises(ValueError, match='cannot make them longer'):
        diffusion.sample_long(9, low_res=small)
    with pytest.raises(ValueError, match='not built to enlarge'):
        ddim(make(), low_res=small)


# Errors, scripts

def test_sizes_must_agree():
    inner = GaussianDiffusion(Unet3D(8, channels=2), channels=2, image_size=8, num_frames=3, latents=True, objective='v')
    assert LatentDiffusion(inner, make_vae()).num_frames == 5
    with pytest.raises(ValueError, match=r'latents of 7 frames are \(2, 4, 8, 8\)'):
        LatentDiffusion(inner, make_vae(), num_frames=7)
    inner.latents = False
    with pytest.raises(ValueError, match='latents=True'):
        LatentDiffusion(inner, make_vae())
    with pytest.raises(ValueError, match='expected .batch, 3, 5, 16, 16'):
        make()(torch.rand(1, 3, 4, SIZE, SIZE))
    with pytest.raises(ValueError, match='use_dynamic_thres'):
        GaussianDiffusion(Unet3D(8), image_size=8, num_frames=3, latents=True, use_dynamic_thres=True)


def save_vae(folder):
    """As a VAE's training does."""
    vae = make_vae()
    folder.mkdir()
    weights = {name: p.detach() for name, p in vae.named_parameters()}
    checkpoint.save({'config': {'vae': 'CausalVAE', **vae.config}, 'model': vae.state_dict(),
                     'ema': {'average': weights, 'updates': 1}}, folder / 'model-1.pt')


@pytest.mark.slow
def test_the_command_line_from_a_vae_to_samples(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_vae(tmp_path / 'results_vae')
    assert torch.equal(vae_from_checkpoint('results_vae').decoder.conv_out.weight, make_vae().decoder.conv_out.weight)

    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        try:
            runpy.run_path(str(ROOT / script), run_name='__main__')
            return 0, capsys.readouterr().out
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err

    small = ['--dim', 8, '--dim-mults', 1, 2, '--batch-size', 2, '--steps', 2, '--sample-every', 2, '--sample-rows', 1,
             '--sample-steps', 2, '--timesteps', 20, '--device', 'cpu', '--vae', 'results_vae', '--known-frames', 0.5]
    code, out = run('train.py', clips, *small, '--cache-latents')
    assert code == 0 and '5 frames of 16x16' in out, out
    assert len(list(Path('results_vae/latents').rglob('*.pt'))) == 6
    trained = diffusion_from_state(checkpoint.load_run('results'))
    assert trained.denoise_fn.config['frame_numbers']                                # see RESULTS.md on what latents need
    assert (trained.diffusion.schedule_shift, trained.diffusion.min_snr_gamma, trained.diffusion.min_snr_power) == (1., 0.25, 0.5)
    clip = sorted(clips.glob('*.gif'))[0]
    code, out = run('sample.py', 'results', '--prompt', 'a red circle', '--image', clip, '--known', 1, '--device', 'cpu')
    assert code == 0 and gif_to_tensor('samples/000-a-red-circle.gif').shape == (3, FRAMES, SIZE, SIZE), out
    assert run('train.py', clips, *small, '--resume', '--steps', 3)[0] == 0
    plain = [*small, '--results', 'plain', '--image-size', 32, '--no-frame-numbers', '--min-snr', 0]
    assert run('train.py', clips, *plain)[0] == 0
    trained = diffusion_from_state(checkpoint.load_run('plain'))
    assert (trained.diffusion.schedule_shift, trained.diffusion.min_snr_gamma) == (4., None)      # of 32x32, not of its latents
    assert not trained.denoise_fn.config['frame_numbers']
    large = [*small[:-2], '--results', 'large', '--low-res', 4]
    code, out = run('train.py', clips, *large, '--cache-latents')
    assert code == 0 and 'sample.py large --prompt' in out and '--low-res small.gif' in out
    assert diffusion_from_state(checkpoint.load_run('large')).low_res == 4
    video_tensor_to_gif(torch.rand(3, FRAMES, 4, 4), 'small.gif')
    enlarge = ['large', '--prompt', 'a red circle', '--device', 'cpu']
    code, out = run('sample.py', *enlarge, '--low-res', 'small.gif', '--out', 'enlarged')
    assert code == 0 and gif_to_tensor('enlarged/000-a-red-circle.gif').shape == (3, FRAMES, SIZE, SIZE), out
    for script, args, sentence in [
        ('train.py', [clips, *large, '--resume', '--low-res', 2], 'made with other settings'),
        ('train.py', [clips, *small, '--results', 'other', '--low-res', 4], 'leave --known-frames out'),
        ('train.py', [clips, *small[:-4], '--results', 'other', '--low-res', 4], 'give --vae too'),
        ('sample.py', enlarge, 'large enlarges clips 4 times: give it one with --low-res'),
        ('sample.py', ['results', *enlarge[1:], '--low-res', 'small.gif'], 'was not trained with --low-res'),
        ('sample.py', [*enlarge, '--low-res', 'small.gif', '--frames', 9], 'cannot make them longer'),
    ]:
        code, err = run(script, *args)
        assert code == 2 and sentence in err, (args, err)
    code, err = run('train.py', clips, *small[:-4], '--cache-latents', '--results', 'other')
    assert code == 2 and 'give --vae too' in err
    code, err = run('train.py', clips, *small[:-4], '--vae', 'results', '--results', 'other')
    assert code == 2 and 'holds no VAE' in err


def test_editing_and_checkpoints_as_for_pixels(tmp_path):
    """What GaussianDiffusion does to a video, by way of its latents: there, changed, and back."""
    diffusion = make()
    shape = (1, diffusion.channels, diffusion.num_frames, diffusion.height, diffusion.width)
    video, other = torch.rand(shape), torch.rand(shape)
    z, y = diffusion.latents(video), diffusion.latents(other)
    noise = diffusion.ddim_invert(video, steps=4, progress=False)
    assert torch.equal(noise, diffusion.diffusion.ddim_invert(z, steps=4, progress=False))
    assert ddim(diffusion, noise=noise, batch_size=1).shape == shape
    between = diffusion.interpolate(video, other, t=3, lam=0.3, seed=1, progress=False)
    assert torch.equal(between, diffusion.decode(diffusion.diffusion.interpolate(z, y, 3, 0.3, seed=1, progress=False)))
    state = {'config': diffusion.config(), 'model': diffusion.state_dict(), 'ema': {'average': {}, 'updates': 0}}
    checkpoint.save(state, tmp_path / 'model-1.pt')
    again = LatentDiffusion.from_checkpoint(tmp_path)
    assert torch.equal(again.interpolate(video, other, t=3, lam=0.3, seed=1, progress=False), between)
    with pytest.raises(ValueError, match='expected .batch'):
        diffusion.ddim_invert(video[:, :, :1], steps=4)


def test_a_scale_that_is_none_is_refused():
    inner, vae = make().diffusion, make().vae
    for scale in (0, -1., float('nan')):
        with pytest.raises(ValueError, match='scale=.*: give a number above 0'):
            LatentDiffusion(inner, vae, scale, num_frames=FRAMES)
    with pytest.raises(ValueError, match='scale=None and nothing measured yet'):
        LatentDiffusion(inner, vae, num_frames=FRAMES).decode(torch.zeros(1, inner.channels, inner.num_frames, inner.height, inner.width))

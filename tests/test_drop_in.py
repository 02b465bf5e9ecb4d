"""A script written for video-diffusion-pytorch 0.6 runs after changing its import line. Run: pytest tests/test_drop_in.py

The scripts are written in that package's way, with the sizes of a test. Run with the package itself they pass, too, but for
what it needs a GPU for (its Trainer) or a download (BERT)."""

import textwrap
from pathlib import Path

import pytest
import torch
import video_diffusion_pytorch as peer

import video_diffusion
from video_diffusion import shapes
from video_diffusion.diffusion import gaussian_diffusion
from video_diffusion.networks.text import BertEncoder

UNCONDITIONAL = '''
    model = Unet3D(dim = 8, dim_mults = (1, 2), block_type = 'resnet')
    diffusion = GaussianDiffusion(model, image_size = 8, num_frames = 3, timesteps = 4, loss_type = 'l1')
    videos = torch.randn(1, 3, 3, 8, 8)
    loss = diffusion(videos)
    loss.backward()
    sampled_videos = diffusion.sample(batch_size = 4)
    assert sampled_videos.shape == (4, 3, 3, 8, 8)
'''
CONDITIONAL = '''
    model = Unet3D(dim = 8, cond_dim = 6, dim_mults = (1, 2))
    diffusion = GaussianDiffusion(model, image_size = 8, num_frames = 3, timesteps = 4, loss_type = 'l2')
    text = torch.randn(2, 6)
    loss = diffusion(torch.randn(2, 3, 3, 8, 8), cond = text, prob_focus_present = 0.5)
    loss.backward()
    assert diffusion.sample(cond = text, cond_scale = 2).shape == (2, 3, 3, 8, 8)
'''
PARTS = '''
    diffusion = GaussianDiffusion(Unet3D(dim = 8, dim_mults = (1, 2)), image_size = 8, num_frames = 3, timesteps = 4)
    x, t = torch.randn(2, 3, 3, 8, 8), torch.tensor([0, 3])
    diffusion.p_losses(x, t).backward()
    noisy = diffusion.q_sample(x_start = x, t = t, noise = torch.ones_like(x))
    mean, variance, log_variance = diffusion.q_mean_variance(x, t)
    start = diffusion.predict_start_from_noise(noisy, t = t, noise = torch.ones_like(x))
    assert torch.allclose(start, x, atol = 1e-2)
    diffusion.q_posterior(x_start = x, x_t = noisy, t = t)
    diffusion.p_mean_variance(x = noisy, t = t, clip_denoised = True)
    diffusion.p_sample(noisy, t)
    assert diffusion.p_sample_loop((2, 3, 3, 8, 8)).shape == x.shape
    diffusion.interpolate(x, x, t = 2, lam = 0.3)
'''
TABLES = ('betas', 'alphas_cumprod', 'alphas_cumprod_prev', 'sqrt_alphas_cumprod', 'sqrt_one_minus_alphas_cumprod',
          'log_one_minus_alphas_cumprod', 'sqrt_recip_alphas_cumprod', 'sqrt_recipm1_alphas_cumprod', 'posterior_variance',
          'posterior_log_variance_clipped', 'posterior_mean_coef1', 'posterior_mean_coef2')


def run(script: str, package, **names) -> dict:
    names = dict(torch=torch, **{name: getattr(package, name) for name in ('Unet3D', 'GaussianDiffusion', 'Trainer')}, **names)
    exec(textwrap.dedent(script), names)
    return names


@pytest.mark.parametrize('script', [UNCONDITIONAL, CONDITIONAL, PARTS], ids=['unconditional', 'conditional', 'parts'])
@pytest.mark.parametrize('package', [peer, video_diffusion], ids=['theirs', 'ours'])
def test_scripts_for_either_package(script, package):
    torch.manual_seed(0)
    run(script, package)


@pytest.mark.parametrize('name', TABLES)
def test_tables_by_their_names(name):
    ours, theirs = (package.GaussianDiffusion(package.Unet3D(dim=8), image_size=8, num_frames=3, timesteps=50)
                    for package in (video_diffusion, peer))
    torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-7)


def test_strings_with_bert(monkeypatch, tmp_path):
    from test_text import save_bert
    folder = save_bert(tmp_path)
    monkeypatch.setattr(gaussian_diffusion, 'named_bert', lambda name, pool: BertEncoder(folder, pool=pool))
    model = video_diffusion.Unet3D(dim=8, use_bert_text_cond=True, dim_mults=(1, 2))
    model.null_cond = torch.nn.Parameter(torch.zeros(1, 32))             # the tests' BERT is narrower than the real one
    for block in model.modules():
        if isinstance(getattr(block, 'to_scale_shift', None), torch.nn.Linear):
            block.to_scale_shift = torch.nn.Linear(32 + 32, block.to_scale_shift.out_features)
    model.cond_dim = 32
    run('''
        diffusion = GaussianDiffusion(model, image_size = 8, num_frames = 3, timesteps = 4)
        text = ['a red ball', 'the blue square']
        loss = diffusion(torch.randn(2, 3, 3, 8, 8), cond = text)
        loss.backward()
        assert diffusion.sample(cond = text, cond_scale = 2).shape == (2, 3, 3, 8, 8)
    ''', video_diffusion, model=model)


@pytest.mark.slow
def test_a_training_script_and_all_that_it_looks_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for caption in shapes.make_shapes('data', 6, image_size=16, num_frames=2).glob('*.txt'):
        caption.unlink()                                      # that package has none
    logs = []
    names = run('''
        diffusion = GaussianDiffusion(Unet3D(dim = 8, dim_mults = (1, 2)), image_size = 16, num_frames = 2, timesteps = 4)
        trainer = Trainer(
            diffusion, './data', train_batch_size = 2, train_lr = 1e-4, save_and_sample_every = 2, train_num_steps = 4,
            gradient_accumulate_every = 2, ema_decay = 0.995, num_sample_rows = 1, num_frames = 16, results_folder = './results')
        trainer.train(prob_focus_present = 0.2, log_fn = logs.append)
        trainer.load(1, strict = False)
        assert trainer.step == 2 and trainer.model is diffusion and trainer.opt.param_groups[0]['lr'] >= 0 and len(trainer.ds) == 6
        assert next(trainer.dl).shape == (2, 3, 2, 16, 16)
        assert trainer.ema_model.sample(batch_size = 1).shape == (1, 3, 2, 16, 16)
        trainer.load(-1)
        trainer.save(9)
    ''', video_diffusion, logs=logs)
    assert [('loss' in log, 'sample' in log) for log in logs] == [(True, False), (True, True)] * 2
    assert Path(logs[1]['sample']).exists() and Path('results/model-9.pt').exists()
    average = names['trainer'].ema.average
    assert all(torch.equal(weight, average.get(name, weight)) for name, weight in names['trainer'].ema_model.named_parameters())


def test_a_wrong_number_of_frames_is_said_and_does_no_harm(tmp_path):
    shapes.make_shapes(tmp_path, 6, image_size=16, num_frames=2)
    diffusion = video_diffusion.GaussianDiffusion(video_diffusion.Unet3D(dim=8), image_size=16, num_frames=2)
    with pytest.warns(UserWarning, match='num_frames=16 has no effect'):
        assert video_diffusion.Trainer(diffusion, tmp_path, num_frames=16).clips.num_frames == 2

"""Without a GPU: every public path stays on one device, and no step of training or sampling makes the host wait for it.

The GPU is a made-up one (fake_gpu.py), which knows shapes, types and layouts. Run: pytest tests/test_fake_device.py
"""

import math

import pytest
import torch
from fake_gpu import GPU, fake_gpu, moved
from test_text import save_bert
from test_vae_loss import vgg  # noqa: F401  a fixture

from video_diffusion import (
    EMA,
    BertEncoder,
    CausalVAE,
    DiT,
    GaussianDiffusion,
    LatentDiffusion,
    PerceptualLoss,
    SpatialTransformer,
    TemporalVAE,
    Trainer,
    Unet3D,
    VAETrainer,
    WordEncoder,
    add_lora,
    latent_shape,
    merge_lora,
    shapes,
    unmerge_lora,
)
from video_diffusion.distributed import Processes
from video_diffusion.networks import fused, unet_blocks
from video_diffusion.networks.text import CaptionCache
from video_diffusion.training.loop import adam
from video_diffusion.training.muon import Muon, split
from video_diffusion.vae.gaussian import DiagonalGaussian
from video_diffusion.vae.metrics import psnr, ssim
from video_diffusion.vae.vae_loss import Discriminator, VAELoss, adaptive_weight, discriminator_loss, generator_loss

FRAMES, SIZE = 5, 16
SHAPE = 2, 3, FRAMES, SIZE, SIZE
WORDS = ['a red ball', 'blue']
SMALL = dict(dim_mults=(1,), attn_heads=2, attn_dim_head=8, resnet_groups=2)


def unet(**more):
    return Unet3D(4, **{**SMALL, **more})


def dit(**more):
    return DiT(32, **{**dict(depth=1, dim_head=16, text_length=4), **more})


def pixels(network, **more):
    encoder = WordEncoder(network.cond_dim) if network.has_cond else None
    return GaussianDiffusion(network, **{**dict(image_size=SIZE, num_frames=FRAMES, timesteps=20, text_encoder=encoder), **more})


def causal(**more):
    return CausalVAE(**{**dict(latent_channels=2, dim=4, dim_mults=(1, 1), blocks_per_level=1, time_compression=2, norm_groups=2,
                               norm_scope='frame'), **more})


def temporal():
    return TemporalVAE(latent_channels=2, dim=8, dim_mults=(1, 1), blocks_per_level=1, norm_groups=2)


def latent(vae=None, told=0., network=None, **more):
    vae = vae or causal()
    channels, frames, *size = latent_shape(vae, FRAMES, (SIZE, SIZE))
    network = network or unet(channels=channels, cond_frames=told > 0)
    inner = GaussianDiffusion(network, image_size=tuple(size), num_frames=frames + more.pop('doubled', 0), channels=channels,
                              timesteps=20, objective='v', prob_cond_frames=told, latents=True,
                              text_encoder=WordEncoder(network.cond_dim) if network.has_cond else None)
    return LatentDiffusion(inner, vae, 1.5, num_frames=FRAMES, **more)


def with_adapters():
    diffusion = pixels(unet(cond_dim=6))
    add_lora(diffusion, rank=2)
    return diffusion


MODELS = {
    'plain': lambda: pixels(unet()),
    'captions': lambda: pixels(unet(cond_dim=6), objective='v', loss_type='l2', min_snr_gamma=5., offset_noise=0.1),
    'words of captions': lambda: pixels(unet(cond_dim=6, text_tokens=True), objective='x0', use_dynamic_thres=True),
    'a noise for each frame': lambda: pixels(unet(cond_dim=6), objective='x0', frame_noise='independent'),
    'known frames': lambda: pixels(unet(cond_frames=True, use_sparse_linear_attn=False), prob_cond_frames=0.5),
    'activations computed twice': lambda: pixels(unet(checkpoint_activations=True)),
    'adapters': with_adapters,
    'DiT, sincos': lambda: pixels(dit(positions='sincos')),
    'DiT, rope, captions, known frames': lambda: pixels(dit(cond_dim=6, cond_frames=True), prob_cond_frames=0.5),
    'DiT, learned, ofs': lambda: pixels(dit(cond_dim=6, positions='rope+learned', size=(FRAMES, SIZE, SIZE), ofs=True)),
    'latents': latent,
    'latents, image-to-video': lambda: latent(told=0.5),
    'latents, image alone, two frames to a patch': lambda: latent(
        told=0.5, image_scale=2., doubled=1, network=dit(channels=2, cond_frames=True, frame_patch=2)),
    'latents, enlarging': lambda: latent(told=1., low_res=2),
    'latents of images': lambda: latent(temporal()),
    'latents, in pieces': lambda: latent(max_batch=1, chunk=1),
}


def captions(diffusion):
    return WORDS if diffusion.text_encoder is not None else None


# Learning

@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_a_loss_and_its_gradients(name):
    diffusion = MODELS[name]()
    with fake_gpu() as gpu:
        video = torch.rand(SHAPE, device=GPU)
        moved(diffusion)
        draws = diffusion.draw(2, GPU, torch.Generator(GPU).manual_seed(0))
        if diffusion.frame_noise == 'independent':
            draws |= dict(t=torch.tensor([[1, 8, 8, 8, 8], [0, 8, 8, 8, 8]]).to(GPU, non_blocking=True), own_steps=[5, None])
        loss = diffusion(video, captions(diffusion), **{'t': torch.randint(20, (2,), device=GPU), **draws})
        loss.backward()
        diffusion(video, captions(diffusion))
    assert loss.shape == () and loss.device == GPU and any(p.grad is not None for p in diffusion.parameters())
    assert gpu.waits == []


@pytest.mark.slow
def test_frames_alone():
    diffusion = pixels(unet())
    with fake_gpu():
        video = torch.rand(SHAPE, device=GPU)
        moved(diffusion)
        for focus in (dict(prob_focus_present=0.5), dict(prob_focus_present=1.),
                      dict(focus_present_mask=torch.rand(2, device=GPU) < 0.5)):
            assert diffusion(video, **focus).device == GPU


@pytest.mark.slow
@pytest.mark.parametrize('muon', [False, True])
def test_optimisers_and_the_average(muon):
    diffusion = pixels(unet(cond_dim=6))
    with fake_gpu() as gpu:
        video = torch.rand(SHAPE, device=GPU)
        moved(diffusion)
        optimizer = Muon(*split(diffusion), lr=1e-3, muon_lr=1e-2) if muon else adam(diffusion.parameters(), 1e-3)
        average = EMA(diffusion, 0.9, warmup=True)
        for _ in range(2):
            diffusion(video, WORDS).backward()
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.)
            optimizer.step()
            average.update()
        with average.average_parameters():
            pass
        average.copy()
    assert gpu.waits == []


@pytest.mark.slow
def test_the_losses_of_a_vae(vgg):
    vae, loss, critic = causal(), VAELoss('l1', True, PerceptualLoss(vgg)), Discriminator()
    with fake_gpu() as gpu:
        video = torch.rand(SHAPE, device=GPU)
        for part in (vae, loss, critic, loss.perceptual.features):
            moved(part)
        loss.perceptual.mean_std = loss.perceptual.mean_std.to(GPU, non_blocking=True)
        again, posterior = vae(video)
        nll, error, kl = loss(video, again, posterior, frames=FRAMES)
        adversarial = generator_loss(critic(again), FRAMES)
        weight = adaptive_weight(nll, adversarial, vae.last_layer, scale=torch.ones((), device=GPU))
        scores = critic(torch.cat([video, again.detach()]))
        (nll + kl + weight * adversarial + discriminator_loss(*scores.chunk(2), FRAMES)).backward()
        assert {each.device for each in (error, psnr(video, again), ssim(video, again))} == {GPU}
    assert gpu.waits == []


# Drawing

HOW = {
    'ddpm': dict(sampler='ddpm', seed=1),
    'ddim': dict(sampler='ddim', eta=0.5),
    'dpm++2m': dict(sampler='dpm++2m', return_all=True),
    'dpm++2m_sde': dict(sampler='dpm++2m_sde', seed=1),
}


def draw(diffusion, **how):
    cond = captions(diffusion)
    return diffusion.sample(cond, **{**dict(batch_size=len(WORDS), steps=2, progress=False), **how})


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_samples(name):
    diffusion = MODELS[name]()
    with fake_gpu() as gpu:
        video = torch.rand(SHAPE, device=GPU)
        moved(diffusion)
        how = dict(low_res=diffusion.shrink(video)) if getattr(diffusion, 'low_res', None) else {}
        assert draw(diffusion, sampler='dpm++2m_sde', seed=1, steps=1, **how).device == GPU
    assert len(gpu.waits) <= 1, gpu.waits                           # for a mask of known frames


@pytest.mark.slow
@pytest.mark.parametrize('sampler', HOW)
def test_samplers(sampler):
    diffusion = pixels(unet())
    with fake_gpu() as gpu:
        moved(diffusion)
        assert draw(diffusion, **HOW[sampler]).device == GPU
    assert gpu.waits == []


@pytest.mark.slow
@pytest.mark.parametrize('known_by', ['network', 'guide', 'replace'])
def test_known_frames(known_by):
    diffusion = MODELS['known frames']()
    mask = torch.tensor([True, False, False, False, True])
    with fake_gpu():
        video = torch.rand(SHAPE, device=GPU)
        moved(diffusion)
        assert draw(diffusion, first_frames=video[:1, :, :2], known_by=known_by).device == GPU
        assert draw(diffusion, known=video, known_mask=mask, known_by=known_by).device == GPU
        assert diffusion.sample_long(9, batch_size=2, steps=1, sampler='ddim', progress=False).shape[2] == 9


@pytest.mark.slow
@pytest.mark.parametrize('known_by', ['network', 'guide'])
def test_known_frames_of_latents(known_by):
    diffusion = latent(told=0.5)
    with fake_gpu():
        video = torch.rand(SHAPE, device=GPU)
        moved(diffusion)
        assert draw(diffusion, image=video[:1, :, 0], known_by=known_by).device == GPU
        assert draw(diffusion, first_frames=video[:, :, :3], known_by=known_by).device == GPU
        assert diffusion.sample_long(9, batch_size=2, steps=1, sampler='ddim', progress=False).shape[2] == 9


@pytest.mark.slow
def test_guidance():
    diffusion = pixels(unet(cond_dim=6))
    with fake_gpu():
        moved(diffusion)
        for how in (dict(negative='green', guidance_rescale=0.5), dict(dynamic_guidance=5.), dict(wave_guidance=True)):
            assert draw(diffusion, cond_scale=3., **how).device == GPU


@pytest.mark.slow
@pytest.mark.parametrize('name', ['plain', 'latents', 'DiT, rope, captions, known frames'])
def test_there_and_back(name):
    diffusion = MODELS[name]()
    with fake_gpu():
        video = torch.rand(SHAPE, device=GPU)
        moved(diffusion)
        cond = captions(diffusion)
        assert diffusion.ddim_invert(video, cond, steps=1, progress=False).device == GPU
        assert diffusion.interpolate(video, video, t=0, cond=cond, seed=1, progress=False).device == GPU


@pytest.mark.slow
def test_the_terms_of_the_paper():
    diffusion = pixels(unet(), timesteps=4)
    with fake_gpu():
        video = torch.rand(SHAPE, device=GPU)
        moved(diffusion)
        t = torch.randint(4, (2,), device=GPU)
        results = [*diffusion.q_mean_variance(video, t), *diffusion.q_posterior(video, video, t), diffusion.q_sample(video, t),
                   *diffusion.p_mean_variance(video, t), diffusion.p_sample(video, t), diffusion.betas,
                   diffusion.p_sample_loop(SHAPE), diffusion.predict_start_from_noise(video, t, video)]
    assert {result.device for result in results} == {GPU}


# Parts on their own

@pytest.mark.slow
@pytest.mark.parametrize('make', [causal, lambda: causal(norm_scope='clip'), temporal])
def test_vaes_whole_in_chunks_in_tiles_and_as_a_stream(make):
    vae = make()
    with fake_gpu() as gpu, torch.no_grad():
        video = torch.rand(SHAPE, device=GPU)
        moved(vae)
        z = vae.encode(video).sample(torch.Generator(GPU).manual_seed(0))
        frames = FRAMES if vae.time_compression == 1 else None
        pieces = [dict(), dict(chunk=2, tile=12)]                               # four tiles
        videos = [vae.decode(z, frames, **piece) for piece in pieces] + [vae(video)[0]]
        latents = [vae.encode(video, **piece).mean for piece in pieces]
        if isinstance(vae, CausalVAE):
            videos += vae.decode_stream(z.split(1, dim=2))
            latents += [posterior.std for posterior in vae.encode_stream(video.split(2, dim=2))]
        else:
            videos.append(vae.decode(z, image_only=torch.rand(z.shape[0], FRAMES, device=GPU) < 0.5))
    assert {result.device for result in videos + latents} == {GPU}
    assert gpu.waits == []


def test_text(tmp_path, monkeypatch):
    monkeypatch.setattr('transformers.masking_utils.is_tracing', lambda tensor: True)      # or it looks whether a mask hides anything
    encoders = [BertEncoder(save_bert(tmp_path)), BertEncoder(tmp_path, pool='cls'), WordEncoder(6)]
    with fake_gpu():
        for encoder in encoders:
            moved(encoder)
            assert {encoder(WORDS).device, encoder.tokens(WORDS).device} == {GPU}
            if isinstance(encoder, WordEncoder):
                assert CaptionCache(encoder)(WORDS).device.type == 'cpu'


def test_a_spatial_transformer_and_merged_adapters():
    block, diffusion = SpatialTransformer(8, 2, 4, context_dim=6, groups=2), with_adapters()
    with fake_gpu():
        moved(block), moved(diffusion)
        mask = torch.rand(2, 3, device=GPU) < 2
        assert block(torch.rand(2, 8, 3, 4, 4, device=GPU), torch.rand(2, 3, 6, device=GPU), mask).device == GPU
        merge_lora(diffusion), unmerge_lora(diffusion)


def test_gaussians():
    with fake_gpu():
        one = DiagonalGaussian.from_moments(torch.rand(2, 4, 3, device=GPU))
        assert {x.device for x in (one.sample(), one.kl())} == {GPU}


# Steps during which the host goes ahead, and a layout in which nothing is copied

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    return shapes.make_shapes(tmp_path_factory.mktemp('clips'), 12, image_size=SIZE, num_frames=FRAMES)


@pytest.mark.slow
@pytest.mark.parametrize('muon_lr', [None, 0.01])
def test_no_step_of_training_waits(muon_lr, clips, tmp_path):
    trainer = Trainer(pixels(unet(cond_dim=6)), clips, train_batch_size=2, train_num_steps=9, max_grad_norm=1., muon_lr=muon_lr,
                      results_folder=tmp_path, processes=Processes())
    trainer.prob_focus_present, trainer.focus_present_mask = 0.5, None
    with fake_gpu() as gpu:
        moved(trainer.diffusion)
        trainer.device, trainer.ema = GPU, EMA(trainer.diffusion, 0.9)
        trainer.optimizer = (Muon(*split(trainer.diffusion), lr=1e-3, muon_lr=muon_lr) if muon_lr else
                             adam(trainer.diffusion.parameters(), 1e-3))
        data = trainer.batches()
        for _ in range(2):
            trainer.train_step(data)
    assert gpu.waits == [] and trainer.step == 2 and trainer.pending[0][1].device == GPU


@pytest.mark.slow
def test_no_step_of_a_vae_waits(clips, tmp_path, vgg):
    trainer = VAETrainer(causal(), clips, image_size=SIZE, num_frames=FRAMES, disc_start=1, image_share=0.5, learn_logvar=True,
                         perceptual=PerceptualLoss(vgg), train_batch_size=2, train_num_steps=9, max_grad_norm=1.,
                         results_folder=tmp_path, processes=Processes())
    with fake_gpu() as gpu:
        for part in (trainer.vae, trainer.loss, trainer.discriminator, trainer.loss.perceptual.features):
            moved(part)
        trainer.loss.perceptual.mean_std = trainer.loss.perceptual.mean_std.to(GPU, non_blocking=True)
        trainer.device, trainer.ema = GPU, EMA(trainer.vae, 0.9)
        trainer.optimizer = adam((*trainer.vae.parameters(), *trainer.loss.parameters()), 1e-3)
        trainer.disc_optimizer = adam(trainer.discriminator.parameters(), 1e-3)
        data = trainer.batches()
        for _ in range(3):
            trainer.train_step(data)
    assert gpu.waits == [] and trainer.pending[-1][1].device == GPU


@pytest.mark.slow
@pytest.mark.parametrize('name', ['captions', 'DiT, rope, captions, known frames', 'latents'])
def test_no_step_of_a_sampler_waits(name):
    """Twice the steps, as many waits: captions on their way, and what else is sent once for all steps."""
    diffusion, waits = MODELS[name](), {}
    with fake_gpu() as gpu:
        moved(diffusion)
        for steps in (1, 2):
            gpu.waits.clear()
            draw(diffusion, sampler='dpm++2m_sde', steps=steps, seed=0)
            waits[steps] = list(gpu.waits)
    assert waits[1] == waits[2] and len(waits[1]) <= 1, waits


@pytest.mark.parametrize('norm', ['a kernel', 'lines of torch', 'that of a CPU'])
def test_the_blocks_of_the_u_net_copy_nothing(norm, monkeypatch):
    """Their layout is channels-last from the first convolution on: frames join the batch and leave it without a copy. With the
    group norm that is right for a CPU they do not."""
    network = unet(dim_mults=(1, 2))
    if norm != 'a kernel':
        monkeypatch.setattr(fused, 'TRITON', False)
    if norm == 'that of a CPU':
        monkeypatch.setattr(unet_blocks, 'on_cpu', lambda x: True)
    with fake_gpu() as gpu, torch.no_grad():
        moved(network)
        network(torch.rand(SHAPE, device=GPU), torch.rand(2, device=GPU))
    lines = [line for line, shape in gpu.copies if math.prod(shape) > SIZE * SIZE]
    assert len([line for line in lines if line.startswith('unet3d')]) == 1, lines            # into channels-last, once
    assert any(line.startswith('unet_blocks') for line in lines) == (norm == 'that of a CPU'), lines


def test_the_fake_gpu_refuses_what_a_real_one_refuses():
    with fake_gpu() as gpu:
        x = torch.rand(3, device=GPU)
        for wrong in (lambda: x + torch.rand(3), lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(),
                      lambda: torch.rand(3)[x.long()],
                      lambda: torch.rand(3, device=GPU, generator=torch.Generator())):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wrong()
        assert gpu.waits == []
        x.cpu(), torch.rand(3).to(GPU), x[torch.tensor([0, 1])], torch.rand(3).to(GPU, non_blocking=True)
        assert len(gpu.waits) == 3

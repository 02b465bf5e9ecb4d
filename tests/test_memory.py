"""What a training step needs is known before it runs, to 15%. Run: pytest tests/test_memory.py"""

import pytest
import torch
from bench_dit import peak as measured

from video_diffusion import CausalVAE, GaussianDiffusion, LatentDiffusion, Unet3D, WordEncoder, latent_shape
from video_diffusion.networks import fused, recompute
from video_diffusion.networks.attention import SpatialLinearAttention
from video_diffusion.training.loop import adam
from video_diffusion.training.memory import Need, estimate, peak
from video_diffusion.training.muon import Muon, split

CPU = torch.device('cpu')


def toy():
    unet = Unet3D(16, dim_mults=(1, 2), attn_heads=1, attn_dim_head=16, use_sparse_linear_attn=False, cond_dim=8)
    return GaussianDiffusion(unet, image_size=16, num_frames=4, text_encoder=WordEncoder(8))


def lean():
    unet = Unet3D(16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=16, cond_frames=True, checkpoint_activations=True)
    return GaussianDiffusion(unet, image_size=16, num_frames=4, prob_cond_frames=0.5)


def latents():
    vae = CausalVAE(latent_channels=4, dim=8, dim_mults=(1, 2), blocks_per_level=1, time_compression=2, norm_groups=2)
    channels, frames, *size = latent_shape(vae, 5, (32, 32))
    unet = Unet3D(16, dim_mults=(1, 2), channels=channels, attn_heads=2)
    inner = GaussianDiffusion(unet, image_size=tuple(size), num_frames=frames, channels=channels, latents=True, objective='v')
    return LatentDiffusion(inner, vae, num_frames=5)


@pytest.mark.slow
@pytest.mark.parametrize('make', [toy, lean, latents])
def test_the_estimate_is_what_a_step_really_takes(make):
    """PyTorch's own allocator counts the other side: every block that a kernel asks for, on a real CPU."""
    clips, diffusion = 5, make()
    need = estimate(diffusion)
    video = torch.rand(clips, 3, diffusion.num_frames, diffusion.height, diffusion.width)
    cond = torch.rand(clips, 8) if make is toy else None
    diffusion.scale = torch.ones(()) if make is latents else None
    diffusion.has_scale = True
    real = measured(lambda: diffusion(video, cond), 'step', CPU) + video.nbytes
    assert need.gradients + clips * need.per_clip == pytest.approx(real, rel=0.15)


@pytest.mark.slow
def test_the_estimate_for_a_gpu(monkeypatch):
    """Which takes layers whole that a CPU takes in slices. 5071 MB were measured on an H100, by `python tests/gpu.py --parts 2`."""
    with torch.device('meta'):
        diffusion = GaussianDiffusion(Unet3D(64), image_size=64, num_frames=10)
    pytest.importorskip('triton')
    need = estimate(diffusion, device=torch.device('cuda'))
    assert (need.gradients + 8 * need.per_clip) / 2 ** 20 == pytest.approx(5071, rel=0.05)
    monkeypatch.setattr(fused, 'TRITON', False)
    whole = estimate(diffusion, device=torch.device('cuda'))                                 # where there are no kernels
    assert whole.per_clip > 1.3 * estimate(diffusion).per_clip


@pytest.mark.parametrize('muon', [False, True])
def test_what_stands_is_weights_average_and_moments(muon):
    diffusion = toy()
    weights = list(diffusion.parameters())
    optimizer = Muon(*split(diffusion), lr=1e-3, muon_lr=1e-2) if muon else adam(weights, 1e-3)
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.step()
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    learnt = sum(weight.nbytes for weight in weights if weight.requires_grad)
    assert estimate(diffusion, muon).standing == sum(weight.nbytes for weight in weights) + learnt + moments


def test_the_estimate_leaves_the_model_as_it_was():
    diffusion = toy()
    before = {name: value.clone() for name, value in diffusion.state_dict().items()}
    estimate(diffusion)
    assert all(torch.equal(value, before[name]) for name, value in diffusion.state_dict().items())
    assert all(weight.grad is None for weight in diffusion.parameters())
    assert isinstance(diffusion.text_encoder, WordEncoder)


def test_a_batch_that_fits():
    need = Need(standing=100, gradients=50, per_clip=10)
    assert need.of(64) == 790
    halves = 64, 32, 16, 8, 4, 2, 1
    assert [next(batch for batch in halves if need.fits(batch, room)) for room in (10_000, 790, 600, 0)] == [64, 32, 32, 1]
    assert '64 clips' in need.words(64)


def test_two_slices_without_numbers_take_as_much_as_all(monkeypatch):
    layer = SpatialLinearAttention(16, heads=4).to('meta')
    x = torch.empty(40, 16, 2, 32, 32, device='meta').contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    peaks = []
    for slices in (recompute.slices, lambda x, size, dim: x.split(size, dim), lambda x, size, dim: x.split(size, dim)[:0]):
        monkeypatch.setattr(recompute, 'slices', slices)
        x.grad = None
        peaks.append(peak(lambda: layer(x).sum().backward(), layer))
    assert peaks[0] == peaks[1] > 1.2 * peaks[2]

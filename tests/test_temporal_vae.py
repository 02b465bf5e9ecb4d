"""TemporalVAE equals diffusers' AutoencoderKLTemporalDecoder, its frame-by-frame path equals the plain one, frames marked
as images depend on no other, and chunks and tiles stay close to the whole.

Run: pytest tests/test_temporal_vae.py
"""

import json

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from video_diffusion.vae.causal_blocks import doubled_conv
from video_diffusion.vae.context_parallel import steps
from video_diffusion.vae.temporal_vae import ClipNorm, TemporalVAE
from video_diffusion.vae.tiling import in_chunks
from video_diffusion.weights.svd_vae import temporal_vae_from_diffusers, temporal_vae_to_diffusers

SMALL = dict(dim=8, dim_mults=(1, 2), blocks_per_level=1, norm_groups=4)


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def small_vae(seed=0, **config):
    torch.manual_seed(seed)
    return shaken(TemporalVAE(**SMALL | config)).eval()


def shaken(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if 'norm' in name or 'mix' in name or name.endswith('bias'):      # at 0 and 1, where they start, mistakes hide
                parameter += 0.3 * torch.randn_like(parameter)
    return module


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    diffusers = pytest.importorskip('diffusers')
    made = {}

    def pair(channels, layers):
        if (channels, layers) not in made:
            torch.manual_seed(0)
            peer = shaken(diffusers.AutoencoderKLTemporalDecoder(
                block_out_channels=channels, layers_per_block=layers, scaling_factor=0.5,
                down_block_types=('DownEncoderBlock2D',) * len(channels))).eval()
            folder = tmp_path_factory.mktemp('peer')
            peer.save_pretrained(folder, max_shard_size='400KB')
            made[channels, layers] = temporal_vae_from_diffusers(folder).eval(), peer, folder
        return made[channels, layers]
    return pair


def frames_as_batch(video):
    return rearrange(video, 'b c f h w -> (b f) c h w')


def batch_as_frames(x, b):
    return rearrange(x, '(b f) c h w -> b c f h w', b=b)


# ---- equal to diffusers

@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('channels, layers', [((32, 64), 1), ((32, 32, 64), 2), ((32, 32, 64, 64), 1), ((32, 32, 32, 64), 2)])
def test_moments_and_decoded_frames_equal_diffusers(pairs, channels, layers, grad):
    vae, peer, _ = pairs(channels, layers)
    torch.manual_seed(1)
    video = torch.rand(2, 3, 5, 16, 24)
    with torch.set_grad_enabled(grad):
        ours, theirs = vae.encode(video), peer.encode(frames_as_batch(video) * 2 - 1).latent_dist
        assert relative(ours.mean, batch_as_frames(theirs.mean, 2)) < 1e-4
        assert relative(ours.logvar, batch_as_frames(theirs.logvar, 2)) < 1e-4
        decoded = batch_as_frames(peer.decode(theirs.mean, num_frames=5).sample, 2)
        assert relative(vae.decode(batch_as_frames(theirs.mean, 2)) * 2 - 1, decoded) < 1e-4


@pytest.mark.parametrize('channels, layers', [((32, 64), 1), ((32, 32, 64), 2)])
def test_image_only_frames_equal_the_spatial_path_of_diffusers(pairs, channels, layers, monkeypatch):
    """Its decoder ignores the indicator, so it is made to obey: no temporal share in marked frames, and nothing beside
    them in the last convolution."""
    from diffusers.models.resnet import AlphaBlender
    vae, peer, _ = pairs(channels, layers)
    torch.manual_seed(2)
    z, image_only = torch.randn(2, 4, 4, 8, 8), torch.tensor([[False, True, False, False], [True, True, False, True]])

    def spatial_share(self, indicator, ndims):       # the blender then takes one minus that for the spatial side
        return torch.where(image_only, 0., self.mix_factor.sigmoid())[:, None, :, None, None]
    monkeypatch.setattr(AlphaBlender, 'get_alpha', spatial_share)

    def last_convolution(module, args, out):
        centre = F.conv3d(args[0], module.weight[:, :, 1:2], module.bias)
        return torch.where(image_only[:, None, :, None, None], centre, out)
    handle = peer.decoder.time_conv_out.register_forward_hook(last_convolution)
    with torch.no_grad():
        theirs = batch_as_frames(peer.decode(frames_as_batch(z), num_frames=4).sample, 2)
        ours = vae.decode(z, image_only=image_only) * 2 - 1
        assert relative(ours, theirs) < 1e-4
        assert relative(vae.decode(z) * 2 - 1, theirs) > 1e-2
    handle.remove()


def test_gradients_equal_diffusers(pairs):
    vae, peer, _ = pairs((32, 64), 1)
    torch.manual_seed(3)
    video = torch.rand(1, 3, 3, 8, 8)
    ours, theirs = video.clone().requires_grad_(), video.clone().requires_grad_()
    weight = torch.randn(1, 3, 3, 8, 8)
    vae.zero_grad(), peer.zero_grad()
    (vae(ours, sample=False)[0] * 2 * weight).sum().backward()
    decoded = peer(frames_as_batch(theirs) * 2 - 1, num_frames=3).sample
    (batch_as_frames(decoded, 1) * weight).sum().backward()
    assert relative(ours.grad, theirs.grad) < 1e-3
    block, peers = vae.decoder.levels[1][0], peer.decoder.up_blocks[1].resnets[0]
    upsampler = peer.decoder.up_blocks[0].upsamplers[0]
    for a, b in [(block['temporal'].mix, peers.time_mixer.mix_factor), (block['spatial'].upsample.weight, upsampler.conv.weight),
                 (block['temporal'].conv2.weight, peers.temporal_res_block.conv2.weight)]:
        assert relative(a.grad, b.grad.view_as(a)) < 1e-3


def test_there_and_back_again(pairs, tmp_path):
    from diffusers import AutoencoderKLTemporalDecoder
    vae, peer, folder = pairs((32, 32, 64), 2)
    assert len(list(folder.glob('*.safetensors'))) > 1 and vae.scaling_factor == 0.5          # sharded
    temporal_vae_to_diffusers(vae, tmp_path)
    back = AutoencoderKLTemporalDecoder.from_pretrained(tmp_path)
    assert back.config.scaling_factor == 0.5
    for (name, ours), (_, theirs) in zip(back.state_dict().items(), peer.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    again = temporal_vae_from_diffusers(tmp_path / 'diffusion_pytorch_model.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), vae.state_dict().values(), strict=True))


def test_wrong_files_are_named(pairs, tmp_path):
    from safetensors.torch import load_file, save_file
    vae, _, _ = pairs((32, 64), 1)
    temporal_vae_to_diffusers(vae, tmp_path)
    file = tmp_path / 'diffusion_pytorch_model.safetensors'
    state = load_file(file)
    del state['quant_conv.bias']
    save_file({**state, 'surprise': torch.zeros(1)}, file)
    with pytest.raises(ValueError, match='(?s)TemporalVAE.*missing: quant_conv.bias.*not expected: surprise'):
        temporal_vae_from_diffusers(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'_class_name': 'AutoencoderKL'}))
    with pytest.raises(ValueError, match='only AutoencoderKLTemporalDecoder'):
        temporal_vae_from_diffusers(tmp_path)
    with pytest.raises(ValueError, match='norm_groups=4'):
        temporal_vae_to_diffusers(small_vae(), tmp_path)


# ---- fast paths equal plain ones

@pytest.mark.parametrize('b, f, most', [(1, 1, 1), (1, 5, 1), (2, 5, 1), (2, 6, 10 ** 4), (1, 7, 3 * 10 ** 3)])
def test_frame_by_frame_equals_the_whole_clip_at_once(b, f, most, monkeypatch):
    """float64; `most` numbers at a time make pieces of one frame, of several, and of several with a remainder."""
    import video_diffusion.vae.temporal_vae as module
    vae = small_vae(blocks_per_level=2).double()
    monkeypatch.setattr(module, 'steps', lambda x, unit, growth=1.: few_frames(x, most))
    video, image_only = torch.rand(b, 3, f, 8, 16).double(), torch.rand(b, f) < 0.4
    z = torch.randn(b, 4, f, 4, 8).double()
    kept = z.clone(), video.clone()
    whole = vae.encode(video).mean, vae.decode(z), vae.decode(z, image_only=image_only)
    with torch.no_grad():
        by_frame = vae.encode(video).mean, vae.decode(z), vae.decode(z, image_only=image_only)
    for a, c in zip(by_frame, whole):
        assert relative(a, c) < 1e-10
    assert torch.equal(kept[0], z) and torch.equal(kept[1], video)                   # what was handed in is left alone


@pytest.mark.parametrize('dtype, mean, std, bound', [(torch.float16, 0., 300., 5e-3), (torch.bfloat16, 8., 1., 5e-2)])
def test_the_norm_of_half_precision_has_statistics_of_float32(dtype, mean, std, bound):
    torch.manual_seed(0)
    norm, x = shaken(ClipNorm(2, 4)), mean + std * torch.randn(1, 4, 3, 16, 16)
    x = x.to(dtype)
    exact = norm(x.float())
    with torch.no_grad():
        frames = norm.to(dtype).prepare(x)(0, 3)
    assert frames.dtype == dtype and (frames.float() - exact).abs().max() < bound


def few_frames(x, most):
    length = max(1, most // x[:, :, :1].numel())
    cuts = [*range(0, x.shape[2], length), x.shape[2]]
    return list(zip(cuts, cuts[1:]))


def test_steps_take_fewer_frames_of_what_grows():
    x = torch.empty(1, 2, 10, 2 ** 9, 2 ** 9)
    assert steps(x, unit=1)[0] == (0, 4) and steps(x, unit=1, growth=4)[0] == (0, 1)
    assert steps(x, unit=1, growth=64)[-1] == (9, 10)


@pytest.mark.parametrize('h, w', [(1, 1), (3, 5)])
def test_a_doubled_convolution_is_upsampling_and_a_convolution(h, w):
    conv = torch.nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(2, 3, h, w).double().requires_grad_()
    plain = conv(F.interpolate(x, scale_factor=2.))
    weight = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weight).sum(), [x, conv.weight, conv.bias])
    fast = doubled_conv(x, conv)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(torch.autograd.grad((fast * weight).sum(), [x, conv.weight, conv.bias]), expected)


def test_checkpointing_changes_no_gradient():
    video = torch.rand(1, 3, 3, 8, 8)
    results = []
    for checkpointing in (False, True):
        vae = small_vae(blocks_per_level=2, gradient_checkpointing=checkpointing)
        reconstruction, posterior = vae(video, generator=torch.Generator().manual_seed(0))
        (reconstruction.square().sum() + posterior.kl().sum()).backward()
        assert all(p.grad is not None for p in vae.parameters())
        results.append([reconstruction.detach(), *[p.grad for p in vae.parameters()]])
    torch.testing.assert_close(*results)


# ---- frames, chunks, tiles

def test_image_only_frames_depend_on_no_other_frame():
    vae = small_vae()
    z, image_only = torch.randn(1, 4, 5, 4, 4), torch.tensor([[False, True, True, False, True]])
    with torch.no_grad():
        decoded = vae.decode(z, image_only=image_only)
        for frame in range(5):
            alone = vae.decode(z[:, :, frame:frame + 1], image_only=image_only[:, frame:frame + 1])
            same = relative(decoded[:, :, frame:frame + 1], alone) < 1e-5
            assert same == image_only[0, frame]


@pytest.mark.slow
def test_chunks_and_tiles_are_close_to_the_whole():
    """Waves, whose statistics are nearly the same in every piece. A seam is a step that the whole does not have."""
    vae = small_vae()
    along, time = torch.arange(64) * (2 * torch.pi / 16), torch.arange(12) * (2 * torch.pi / 4)
    waves = (along[:, None] + time[:, None, None]).sin() + (along + time[:, None, None]).cos()              # f h w
    z = waves.expand(1, 4, 12, 64, 64) * torch.tensor([1., -0.5, 0.2, -1.])[:, None, None, None]
    with torch.no_grad():
        whole, spread = vae.decode(z), vae.decode(z).std()
        for settings in (dict(chunk=4), dict(tile=64), dict(chunk=8, tile=64)):
            pieces = vae.decode(z, **settings)
            assert pieces.shape == whole.shape
            assert (pieces - whole).square().mean().sqrt() < 0.5 * spread, settings
            for axis in (2, 3, 4):
                assert pieces.diff(dim=axis).abs().max() < 1.2 * whole.diff(dim=axis).abs().max() + 0.1 * spread
        video = torch.rand(1, 3, 5, 64, 64)
        assert relative(vae.encode(video, chunk=2).mean, vae.encode(video).mean) < 1e-5
        assert vae.encode(video, tile=32).mean.shape == vae.encode(video).mean.shape


@pytest.mark.parametrize('frames, chunk', [(1, 1), (5, 1), (5, 8), (14, 8), (9, 4)])
def test_chunks_of_what_does_not_depend_on_them_are_the_whole(frames, chunk):
    video = torch.rand(2, 3, frames, 4, 4)
    seen = []

    def part(start, stop):
        seen.extend([stop - start])
        return video[:, :, start:stop]
    torch.testing.assert_close(in_chunks(part, frames, chunk), video)
    assert max(seen) <= chunk


# ---- its interface, and bad input

def test_it_is_rebuilt_from_its_config_and_takes_videos_in_0_1():
    vae = small_vae()
    again = TemporalVAE(**vae.config)
    again.load_state_dict(vae.state_dict())
    video = torch.rand(2, 3, 3, 8, 8)
    reconstruction, posterior = again.eval()(video, sample=False)
    assert reconstruction.shape == video.shape and posterior.mean.shape == (2, 4, 3, 4, 4)
    torch.testing.assert_close(reconstruction, vae.decode(posterior.mode(), frames=3))
    assert (vae.latent_channels, vae.time_compression, vae.space_compression, vae.scaling_factor) == (4, 1, 2, 0.18215)


def test_bad_input_is_named():
    vae = small_vae()
    z = torch.randn(1, 4, 3, 4, 4)
    for call, sentence in [
            (lambda: vae.encode(torch.rand(3, 3, 8, 8)), 'give .batch, channels, frames'),
            (lambda: vae.encode(torch.rand(1, 3, 1, 9, 8)), 'multiples of 2'),
            (lambda: vae.decode(z[:, :2]), 'latents of shape'),
            (lambda: vae.decode(z, frames=9), 'frames=9: 3 latent frames'),
            (lambda: vae.decode(z, chunk=0), 'chunk=0'),
            (lambda: vae.decode(z, tile=5), 'tile=5'),
            (lambda: vae.decode(z, image_only=torch.ones(1, 3)), 'give one bool for each frame'),
            (lambda: vae.decode(z, image_only=torch.ones(3, dtype=torch.bool)), 'give one bool for each frame'),
            (lambda: TemporalVAE(dim=8), 'norm_groups=32 does not divide the 8')]:
        with pytest.raises(ValueError, match=sentence):
            call()

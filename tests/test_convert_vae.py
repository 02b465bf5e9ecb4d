"""Weights of CogVideoX and of diffusers give the outputs that those projects compute with them.

Run: pytest tests/test_convert_vae.py
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from video_diffusion.vae.causal_vae import CausalVAE
from video_diffusion.weights.cogvideox_vae import (
    causal_vae_from_diffusers,
    causal_vae_from_sat,
    causal_vae_to_diffusers,
)
from video_diffusion.weights.files import read_safetensors

DATA = Path(__file__).parent / 'data'
SMALL = dict(block_out_channels=(16, 32, 32, 48), layers_per_block=1, latent_channels=4, norm_num_groups=8)


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def make_peer(**config):
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    levels = len(config.get('block_out_channels', 4 * [0]))
    peer = diffusers.AutoencoderKLCogVideoX(down_block_types=('CogVideoXDownBlock3D',) * levels,
                                            up_block_types=('CogVideoXUpBlock3D',) * levels, **config).eval()
    for name, parameter in peer.named_parameters():
        if 'norm' in name or name.endswith('bias'):          # at 0 and 1, where they start, mistakes hide
            parameter.data += 0.1 * torch.randn_like(parameter)
    return peer


@pytest.fixture(scope='module')
def small_pair(tmp_path_factory):
    peer = make_peer(**SMALL)
    folder = tmp_path_factory.mktemp('small')
    peer.save_pretrained(folder)
    return causal_vae_from_diffusers(folder).eval(), peer, folder


# ---- CogVideoX's own format

@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('frames', [1, 5, 9])
def test_sat_checkpoint_gives_the_outputs_of_the_public_code(frames, grad):
    vae = causal_vae_from_sat(DATA / 'sat_vae_small.pt', time_compression=2)
    case = torch.load(DATA / 'sat_vae_small_outputs.pt', weights_only=True)['cases'][frames]
    video = (case['video'].float() / 127 + 1) / 2
    with torch.set_grad_enabled(grad):
        posterior = vae.encode(video)
        assert relative(torch.cat([posterior.mean, posterior.logvar], 1), case['moments']) < 1e-4
        assert relative(vae.decode(case['latent']) * 2 - 1, case['decoded']) < 1e-4


def test_sat_configuration_is_read_off_the_shapes():
    config = causal_vae_from_sat(DATA / 'sat_vae_small.pt', time_compression=2).config
    read = [config[key] for key in ('dim', 'dim_mults', 'latent_channels', 'blocks_per_level')]
    assert read == [32, (2, 1), 4, 1]


def test_what_is_missing_extra_or_misshapen_in_a_file_is_listed(tmp_path):
    saved = torch.load(DATA / 'sat_vae_small.pt', weights_only=True)
    state = saved['state_dict']
    del state['encoder.mid.block_1.conv2.conv.bias']
    state['encoder.surprise'] = torch.zeros(1)
    state['decoder.norm_out.conv_b.conv.bias'] = torch.zeros(7)
    torch.save(saved, tmp_path / 'bad.pt')
    with pytest.raises(ValueError) as error:
        causal_vae_from_sat(tmp_path / 'bad.pt', time_compression=2)
    message = str(error.value)
    assert 'bad.pt' in message
    assert 'missing: encoder.mid.block_1.conv2.conv.bias' in message
    assert 'not expected: encoder.surprise' in message
    assert 'decoder.norm_out.conv_b.conv.bias has shape (7,), expected (64,)' in message
    assert 'loss.' not in message


@pytest.mark.parametrize('content, sentence', [
    ({'weights': {}}, "holds no .*'state_dict'"),
    ({'state_dict': {'w': torch.zeros(1)}}, "has no 'encoder.conv_in.conv.weight'")])
def test_another_kind_of_checkpoint_is_named_as_such(tmp_path, content, sentence):
    torch.save(content, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match=sentence):
        causal_vae_from_sat(tmp_path / 'other.pt')


# ---- diffusers

@pytest.mark.parametrize('frames', [1, 5, 9, 13, 16, 17, 49])
def test_chunks_equal_what_diffusers_computes_by_default(small_pair, frames):
    vae, peer, _ = small_pair
    torch.manual_seed(frames)
    video = torch.rand(1, 3, frames, 16, 24)
    with torch.no_grad():
        ours, theirs = vae.encode(video, chunk=8), peer.encode(video * 2 - 1).latent_dist
        assert relative(ours.mean, theirs.mean) < 1e-4 and relative(ours.logvar, theirs.logvar) < 1e-4
        if frames not in (5, 13):          # of these the peer makes 8 and 16: it guesses
            decoded = vae.decode(theirs.mean, frames, chunk=2)
            assert relative(decoded * 2 - 1, peer.decode(theirs.mean).sample) < 1e-4


@pytest.mark.parametrize('frames', [9, 17])
def test_the_whole_clip_equals_diffusers_when_that_does_not_chunk(small_pair, frames):
    vae, peer, _ = small_pair
    video = torch.rand(1, 3, frames, 16, 24)
    peer.num_sample_frames_batch_size, peer.num_latent_frames_batch_size = 1000, 1000
    try:
        with torch.no_grad():
            ours, theirs = vae.encode(video), peer.encode(video * 2 - 1).latent_dist
            assert relative(ours.mean, theirs.mean) < 1e-4
            assert relative(vae.decode(theirs.mean) * 2 - 1, peer.decode(theirs.mean).sample) < 1e-4
    finally:
        peer.num_sample_frames_batch_size, peer.num_latent_frames_batch_size = 8, 2


def test_gradients_equal_those_of_diffusers(small_pair):
    vae, peer, _ = small_pair
    video = torch.rand(1, 3, 9, 16, 16)
    ours, theirs = video.clone().requires_grad_(), video.clone().requires_grad_()
    vae.decode(vae.encode(ours, chunk=8).mean).sum().backward()
    ((peer.decode(peer.encode(theirs * 2 - 1).latent_dist.mean).sample + 1) / 2).sum().backward()
    assert relative(ours.grad, theirs.grad) < 1e-3
    assert relative(vae.encoder.conv_in.weight.grad, peer.encoder.conv_in.conv.weight.grad) < 1e-3


@pytest.mark.slow
def test_the_full_size_network_equals_that_of_diffusers(tmp_path):
    """215 million parameters; the clip is small, as a CPU takes seconds for it."""
    peer = make_peer()
    peer.save_pretrained(tmp_path, max_shard_size='400MB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1            # sharded
    vae = causal_vae_from_diffusers(tmp_path).eval()
    assert vae.config == CausalVAE(**vae.config).config and (vae.config['dim'], vae.config['dim_mults']) == (
        128, (1, 2, 2, 4))
    with torch.no_grad():
        for frames in (1, 9):
            video = torch.rand(1, 3, frames, 16, 16)
            ours, theirs = vae.encode(video, chunk=8), peer.encode(video * 2 - 1).latent_dist
            assert relative(ours.mean, theirs.mean) < 1e-4 and relative(ours.logvar, theirs.logvar) < 1e-4
            decoded = vae.decode(theirs.mean, chunk=2)
            assert relative(decoded * 2 - 1, peer.decode(theirs.mean).sample) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason='bf16 is hundreds of times slower on this CPU')
def test_bf16_equals_diffusers_in_bf16(small_pair):
    vae, peer, _ = small_pair
    vae, peer = (module.to('cuda', torch.bfloat16) for module in (vae, peer))
    video = torch.rand(1, 3, 17, 64, 64, device='cuda', dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            theirs = peer.encode(video * 2 - 1).latent_dist.mean
            assert relative(vae.encode(video, chunk=8).mean, theirs) < 0.05
            assert relative(vae.decode(theirs, chunk=2) * 2 - 1, peer.decode(theirs).sample) < 0.05
    finally:
        vae.float().cpu(), peer.float().cpu()


def test_there_and_back_again(small_pair, tmp_path):
    from diffusers import AutoencoderKLCogVideoX
    vae, peer, _ = small_pair
    causal_vae_to_diffusers(vae, tmp_path, scaling_factor=0.7)
    back = AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    assert back.config.scaling_factor == 0.7
    for (name, ours), (_, theirs) in zip(back.state_dict().items(), peer.state_dict().items()):
        assert torch.equal(ours, theirs), name
    again = causal_vae_from_diffusers(tmp_path / 'diffusion_pytorch_model.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), vae.state_dict().values()))


def test_networks_of_another_form_are_refused(small_pair, tmp_path):
    _, _, folder = small_pair
    config = json.loads((folder / 'config.json').read_text())
    for change, sentence in [({'act_fn': 'gelu'}, 'act_fn'), ({'_class_name': 'VQModel'}, 'VQModel')]:
        (tmp_path / 'config.json').write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=sentence):
            causal_vae_from_diffusers(tmp_path)
    with pytest.raises(ValueError, match='norm_scope'):
        vae = CausalVAE(dim=8, dim_mults=(1, 1, 1), norm_groups=4, norm_scope='frame')
        causal_vae_to_diffusers(vae, tmp_path)


def test_a_folder_without_weights_or_config_is_named(small_pair, tmp_path):
    _, _, folder = small_pair
    with pytest.raises(FileNotFoundError, match='no config.json'):
        causal_vae_from_diffusers(tmp_path)
    os.link(folder / 'config.json', tmp_path / 'config.json')
    with pytest.raises(FileNotFoundError, match='0 .safetensors files'):
        read_safetensors(tmp_path)


def test_a_missing_extra_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match=r'pip install "video_diffusion\[weights\]"'):
        read_safetensors(tmp_path)

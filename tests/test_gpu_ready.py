"""What is done differently on a GPU gives the same numbers and keeps half precision within its range; the script for the day runs.

Run: pytest tests/test_gpu_ready.py
"""

import json
from pathlib import Path

import pytest
import together
import torch
from test_fake_device import SHAPE, causal, dit, latent, unet
from torch import nn

from video_diffusion import CausalVAE, DiT, TemporalVAE, Unet3D
from video_diffusion.networks import dit as dit_room
from video_diffusion.networks import recompute, unet_blocks

ROOT = Path(__file__).parent.parent


def output_and_gradients(network, *inputs):
    network.zero_grad()
    y = network(*inputs)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize('make', [lambda: unet(dim_mults=(1, 2)), dit], ids=['U-Net', 'DiT'])
def test_the_network_of_a_gpu_is_that_of_a_cpu(make, monkeypatch):
    torch.manual_seed(0)
    network = make().double()
    for weight in network.parameters():
        weight.data += 0.2 * torch.randn_like(weight)                       # gains of 1 and gates of 0 would hide much
    inputs = torch.randn(SHAPE, dtype=torch.float64), torch.tensor([3., 700.], dtype=torch.float64)
    expected = output_and_gradients(network, *inputs)
    for module in (recompute, unet_blocks, dit_room):
        monkeypatch.setattr(module, 'on_cpu', lambda x: False)
    for a, b in zip(expected, output_and_gradients(network, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_vae_of_a_latent_model_does_not_take_part_in_mixed_precision():
    torch.manual_seed(0)
    diffusion, video = latent(causal()), torch.rand(SHAPE)
    plain = diffusion.encode(video).posterior.mean
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(diffusion.encode(video).posterior.mean, plain)


@pytest.mark.slow
def test_the_script_for_the_day_with_a_gpu_runs(tmp_path):
    """All parts, tiny, on the CPU; a second call finds nothing left to do."""
    for _ in range(2):
        output = together.run(1, ROOT / 'tests' / 'gpu.py', '--device', 'cpu', '--tiny', '--out', tmp_path / 'gpu.jsonl', timeout=600)
        rows = [json.loads(line) for line in (tmp_path / 'gpu.jsonl').read_text().splitlines()]
        assert len(rows) == len({row['check'] for row in rows}) == 14
    assert not [row for row in rows if 'error' in row or row.get('wrong')]
    assert {row['part'] for row in rows} == {1, 2, 3, 4}
    assert output.count('\n| ') >= 14                                       # the table


@pytest.mark.slow
@pytest.mark.parametrize('make', [
    lambda: Unet3D(8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8),
    lambda: DiT(32, dim_head=16, depth=1),
    lambda: DiT(32, dim_head=16, depth=1, positions='sincos'),
], ids=['unet', 'dit', 'dit-sincos'])
def test_networks_are_exported_for_any_number_of_clips_and_frames(make):
    network = make()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.1)                                    # a DiT's gates begin shut
    clips, frames = (torch.export.Dim(name, min=2, max=64) for name in ('clips', 'frames'))
    x, t = torch.randn(3, 3, 5, 16, 16), torch.tensor([1, 2, 3])
    program = torch.export.export(network, (x, t), dynamic_shapes=({0: clips, 2: frames}, {0: clips}), strict=False).module()
    other = torch.randn(4, 3, 7, 16, 16), torch.arange(4)
    torch.testing.assert_close(program(*other), network(*other))
    assert network(*other).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize('vae, gradients', [
    (lambda: CausalVAE(dim=8, dim_mults=(1, 2), blocks_per_level=1, time_compression=2, norm_groups=2, norm_scope='clip'), True),
    (lambda: CausalVAE(dim=8, dim_mults=(1, 2), blocks_per_level=1, time_compression=2, norm_groups=2, norm_scope='frame'), False),
    (lambda: TemporalVAE(dim=8, dim_mults=(1, 2), blocks_per_level=1, norm_groups=2), False),
], ids=['clip', 'frame', 'temporal'])
def test_decoders_are_exported_for_any_number_of_clips_and_frames(vae, gradients):
    """Of three latent frames or more: 16 pixels of two are as many as the sides of the example, and there no tracer can tell."""
    vae = vae().eval()
    z = torch.randn(2, vae.latent_channels, 5, 4, 4), torch.randn(3, vae.latent_channels, 7, 4, 4)
    clips, frames = (torch.export.Dim(name, min=least, max=64) for name, least in (('clips', 2), ('frames', 3)))
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(Decoding(vae), z[:1], dynamic_shapes=({0: clips, 2: frames},), strict=False).module()
        torch.testing.assert_close(program(z[1]), vae.decode(z[1]))


class Decoding(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z)

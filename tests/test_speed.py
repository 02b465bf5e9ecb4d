"""What makes training lean and fast changes no number: recomputed activations, torch.compile. Run: pytest tests/test_speed.py"""

import copy

import pytest
import torch
from bench_unet import saved_bytes
from torch._dynamo.testing import CompileCounter

from video_diffusion import Unet3D
from video_diffusion.networks import recompute
from video_diffusion.networks.unet3d import BLOCKS, ResnetBlock

SMALL = dict(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8)
FLAVOURS = {
    'plain': {},
    'captions': dict(cond_dim=6),
    'words of captions': dict(cond_dim=6, text_tokens=True),
    'known frames': dict(cond_frames=True, use_sparse_linear_attn=False),
}


def inputs(config, dtype=torch.float32, seed=0):
    """A batch as the trainer would hand it in."""
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 3, 8, 8, dtype=dtype)
    given = dict(focus_present_mask=torch.tensor([True, False]))
    if 'cond_dim' in config:
        given['cond'] = torch.randn(2, 4, 6, dtype=dtype) if 'text_tokens' in config else torch.randn(2, 6, dtype=dtype)
        given['null_cond_mask'] = torch.tensor([False, True])
    if 'cond_frames' in config:
        given.update(known=torch.randn_like(x), known_mask=torch.rand(2, 3) < 0.5)
    return x, torch.tensor([3, 700], dtype=dtype), given


def output_and_gradients(unet, config, dtype):
    x, time, given = inputs(config, dtype)
    x.requires_grad_()
    y = unet(x, time, **given)
    unet.zero_grad()
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad] + [p.grad for p in unet.parameters() if p.grad is not None]


def as_if_large(unet, monkeypatch):
    """A network that takes slices of a few numbers and keeps as little as with large clips."""
    monkeypatch.setattr(recompute, 'SLICE', 200)
    for block in unet.modules():
        if isinstance(block, BLOCKS):
            block.little = 0
    return unet


def test_wide_layers_keep_little_even_where_it_is_little():
    """Of two blocks that would keep the same, the wide one keeps what its convolutions read."""
    def saved(channels, side):
        block = ResnetBlock(channels, channels, groups=8)
        x = torch.zeros(1, channels, 1, side, side).contiguous(memory_format=torch.channels_last_3d)
        return saved_bytes(block, lambda: block(x.clone().requires_grad_()))
    assert saved(128, 32) < 0.6 * saved(32, 64)


@pytest.mark.slow
@pytest.mark.parametrize('way', ['large clips', 'checkpoint_activations'])
@pytest.mark.parametrize('flavour', FLAVOURS)
def test_recomputed_activations_change_no_output_and_no_gradient(flavour, way, monkeypatch):
    config = {**SMALL, **FLAVOURS[flavour]}
    torch.manual_seed(0)
    plain = Unet3D(**config)
    lean = Unet3D(**config, checkpoint_activations=way == 'checkpoint_activations')
    lean.load_state_dict(plain.state_dict())
    if way == 'large clips':
        as_if_large(lean, monkeypatch)
    x, time, given = inputs(config)
    saved = [saved_bytes(unet, lambda: unet(x, time, **given)) for unet in (plain, lean)]
    assert saved[1] < 0.5 * saved[0]
    plain, lean = plain.double(), copy.deepcopy(lean).double()      # a copy looks after its own weights
    results = [output_and_gradients(unet, config, torch.float64) for unet in (plain, lean)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        x, time, given = inputs(config, torch.float64)
        torch.testing.assert_close(lean(x, time, **given), plain(x, time, **given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('who_learns', ['the clip', 'one layer'])
def test_slices_give_gradients_to_whoever_wants_them(who_learns, monkeypatch):
    """Guidance asks for that of the clip only, adapters for those of a few weights."""
    torch.manual_seed(0)
    plain = Unet3D(**SMALL).double().requires_grad_(False)
    if who_learns == 'one layer':
        plain.downs[0].temporal_attention.to_out.requires_grad_()
    results = []
    for unet in (plain, as_if_large(copy.deepcopy(plain), monkeypatch)):
        x, time, given = inputs(SMALL, torch.float64)
        x.requires_grad_(who_learns == 'the clip')
        unet(x, time, **given).square().sum().backward()
        grads = {name: p.grad for name, p in [('x', x), *unet.named_parameters()] if p.grad is not None}
        assert list(grads) == (['x'] if who_learns == 'the clip' else ['downs.0.temporal_attention.to_out.weight'])
        results.append(grads)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_slices_are_computed_again_at_the_precision_of_the_first_time(monkeypatch):
    torch.manual_seed(0)
    plain = Unet3D(**SMALL)
    lean = as_if_large(copy.deepcopy(plain), monkeypatch)
    results = []
    for unet in (plain, lean):
        with torch.autocast('cpu', torch.bfloat16):
            x, time, given = inputs(SMALL)
            loss = unet(x, time, **given).float().square().mean()
        loss.backward()                                             # where there is no autocast any more
        results.append(unet.init_temporal_attention.to_out.weight.grad)
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02 * results[0].abs().max().item())


@pytest.mark.slow
def test_the_network_compiles_to_one_graph_and_only_once():
    """A graph break, or a second compilation at a later step of training, would show in the count. All flavours at once, blocks
    computed twice, and one level, for tracing takes its time."""
    config = {**SMALL, 'dim_mults': (1,), **FLAVOURS['words of captions'], **FLAVOURS['known frames']}
    torch._dynamo.reset()
    torch.manual_seed(0)
    unet = Unet3D(**config, checkpoint_activations=True).double()
    plain = [output.clone() for output in output_and_gradients(unet, config, torch.float64)]
    counter = CompileCounter()                                      # compiles nothing, but counts what it is given
    unet.compile(backend=counter)
    for step in range(3):
        for a, b in zip(plain, output_and_gradients(unet, config, torch.float64), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1, f'compiled {counter.frame_count} graphs'

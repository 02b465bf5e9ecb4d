"""Unet3D equals video-diffusion-pytorch 0.6.3, in outputs and in every gradient. Run: pytest tests/test_unet3d.py"""

import pytest
import torch
from einops import rearrange
from video_diffusion_pytorch import Unet3D as PeerUnet3D

from video_diffusion.networks import unet_blocks
from video_diffusion.networks.unet3d import Unet3D
from video_diffusion.weights.lucidrains import unet_from_lucidrains, unet_to_lucidrains

SMALL = dict(dim=16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=16)


def twins(seed=0, **config):
    """The same network twice: theirs and ours, with weights that are not at their initial values."""
    torch.manual_seed(seed)
    theirs = PeerUnet3D(**config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    ours = Unet3D(**config)
    ours.load_state_dict(unet_from_lucidrains(theirs.state_dict()))
    return theirs, ours


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def grads(model, loss):
    loss.backward()
    return {k: p.grad if p.grad is not None else torch.zeros_like(p) for k, p in model.named_parameters() if p.requires_grad}


CASES = {
    'plain': (SMALL, {}, (2, 3, 5, 8, 12)),
    'one frame': (SMALL, {}, (2, 3, 1, 8, 8)),
    'seven frames, three levels': (dict(SMALL, dim_mults=(1, 2, 4)), {}, (1, 3, 7, 8, 8)),
    'no sparse attention': (dict(SMALL, use_sparse_linear_attn=False), {}, (2, 3, 3, 8, 8)),
    'other widths': (dict(dim=24, dim_mults=(2, 1), attn_heads=3, attn_dim_head=40, resnet_groups=4, channels=1,
                          out_dim=2, init_kernel_size=3), {}, (2, 1, 4, 8, 8)),
    'grey': (dict(SMALL, channels=1), {}, (2, 1, 3, 8, 8)),
    'long clip': (SMALL, {}, (1, 3, 40, 4, 4)),
    'cond': (dict(SMALL, cond_dim=6), dict(cond=6), (2, 3, 5, 8, 8)),
    'cond dropped': (dict(SMALL, cond_dim=6), dict(cond=6, null_cond_prob=1.), (2, 3, 5, 8, 8)),
    'focus none': (SMALL, dict(focus_present_mask=[False, False]), (2, 3, 5, 8, 8)),
    'focus some': (SMALL, dict(focus_present_mask=[True, False]), (2, 3, 5, 8, 8)),
    'focus all': (SMALL, dict(focus_present_mask=[True, True]), (2, 3, 5, 8, 8)),
    'focus certain': (SMALL, dict(prob_focus_present=1.), (2, 3, 5, 8, 8)),
}


@pytest.mark.parametrize('case', CASES)
def test_output_and_all_gradients_equal_the_peer(case):
    config, kwargs, shape = CASES[case]
    theirs, ours = twins(**config)
    x = torch.randn(shape)
    time = torch.randint(0, 1000, shape[:1])
    kwargs = dict(kwargs)
    if 'cond' in kwargs:
        kwargs['cond'] = torch.randn(shape[0], kwargs['cond'])
    if 'focus_present_mask' in kwargs:
        kwargs['focus_present_mask'] = torch.tensor(kwargs['focus_present_mask'])
    results = []
    for model in (theirs, ours):
        xi = x.clone().requires_grad_()
        out = model(xi, time, **kwargs)
        target = torch.linspace(-1, 1, out.numel()).view_as(out)
        g = grads(model, ((out - target) ** 2).mean())
        results.append((out, xi.grad, g))
    (out_a, x_a, grads_a), (out_b, x_b, grads_b) = results
    assert relative(out_b, out_a) < 1e-4
    assert relative(x_b, x_a) < 1e-4
    grads_a = unet_from_lucidrains({**theirs.state_dict(), **grads_a})
    largest = max(g.norm() for g in grads_b.values())
    for name, g in grads_b.items():
        # relative to its own size; a gradient that is zero up to rounding is held to the size of the others
        difference = (g - grads_a[name]).norm()
        assert difference < 1e-4 * grads_a[name].norm() + 1e-7 * largest, name


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_weights_go_back_unchanged(channels):
    theirs, ours = twins(**dict(SMALL, cond_dim=6, channels=channels))
    back = unet_to_lucidrains(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back[name], weight), name


@pytest.mark.parametrize('config', [dict(), dict(cond_dim=6), dict(cond_dim=6, text_tokens=True)], ids=str)
def test_a_step_for_each_frame_is_a_step_for_the_clip_where_they_agree(config):
    """Output and all gradients."""
    torch.manual_seed(0)
    unet = Unet3D(**SMALL, **config).double()
    x, time = torch.randn(2, 3, 5, 8, 12).double(), torch.tensor([3., 700.]).double()
    given = dict(cond=torch.randn(2, 4, 6) if 'text_tokens' in config else torch.randn(2, 6)) if config else {}
    given = {name: value.double() for name, value in given.items()}
    results = []
    for steps in (time, time[:, None].expand(-1, 5)):
        xi = x.clone().requires_grad_()
        out = unet(xi, steps, **given)
        unet.zero_grad()
        gradients = grads(unet, (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum())
        results.append([out.detach(), xi.grad, *(g.clone() for g in gradients.values())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_each_frame_is_told_its_own_step_and_no_other():
    torch.manual_seed(0)
    unet = Unet3D(**SMALL).double()
    x, steps = torch.randn(2, 3, 5, 8, 12).double(), torch.randint(0, 1000, (2, 5)).double()
    emb = torch.randn(2, 5, 64).double()
    block = unet.downs[0].block1.block1
    narrow = unet.init_conv(x)
    together = block.activate(block.conv(narrow), unet.downs[0].block1.to_scale_shift(emb))
    for frame in range(5):
        alone = block.activate(block.conv(narrow), unet.downs[0].block1.to_scale_shift(emb[:, frame:frame + 1]))
        torch.testing.assert_close(together[:, :, frame], alone[:, :, frame])
    other = steps.clone()
    other[1, 3] += 100
    changed = (unet(x, steps) != unet(x, other)).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True]
    with pytest.raises(ValueError, match=r'time has shape \(2, 4\): expected \(2,\), a step for each video, or \(2, 5\)'):
        unet(x, steps[:, :4])


@pytest.mark.parametrize('cond_frames', (False, True))
def test_patches_are_channels(cond_frames):
    """A network with patch=2 is the plain one, of clips whose squares of 2x2 pixels have become four times the channels."""
    def squares(x):
        return rearrange(x, 'b c f (h p) (w q) -> b (c p q) f h w', p=2, q=2)
    torch.manual_seed(0)
    small = dict(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8)
    patched = Unet3D(**small, channels=3, patch=2, cond_frames=cond_frames).double()
    plain = Unet3D(**small, channels=28 if cond_frames else 12, out_dim=12).double()
    plain.load_state_dict(patched.state_dict())
    x, known, t = torch.randn(2, 3, 3, 8, 12).double(), torch.randn(2, 3, 3, 8, 12).double(), torch.tensor([5., 700.]).double()
    mask = torch.tensor([[True, False, False], [True, True, False]])
    if cond_frames:
        shown = mask[:, None, :, None, None].expand(2, 1, 3, 8, 12).double()
        output, given = patched(x, t, known=known, known_mask=mask), torch.cat((x, known * shown, shown), dim=1)
    else:
        output, given = patched(x, t), x
    assert torch.allclose(squares(output), plain(squares(given), t), rtol=1e-10, atol=1e-10)
    assert patched.config['patch'] == 2
    with pytest.raises(ValueError, match='2 levels of patches of 2, height and width must be multiples of 4'):
        patched(x[..., :10], t)
    with pytest.raises(ValueError, match='patch=0'):
        Unet3D(8, patch=0)


def test_frames_that_look_alike_are_told_apart_by_their_numbers_alone():
    """Attention that sees how far apart frames are, and of like frames takes an average, says the same of each: which is the first?"""
    torch.manual_seed(0)
    small = dict(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, cond_dim=4)
    still, t, cond = torch.randn(2, 3, 1, 8, 8).expand(-1, -1, 4, -1, -1), torch.tensor([5, 700]), torch.randn(2, 4)
    alike, told = (Unet3D(**small, frame_numbers=numbers)(still, t, cond) for numbers in (False, True))
    torch.testing.assert_close(alike, alike[:, :, :1].expand_as(alike))
    assert (told[:, :, 1:] - told[:, :, :-1]).abs().amax(dim=(1, 3, 4)).min() > 1e-3
    each = Unet3D(**small, frame_numbers=True)
    torch.testing.assert_close(each(still, t, cond), each(still, t[:, None].expand(2, 4), cond))
    assert Unet3D(**each.config).load_state_dict(each.state_dict())


@pytest.mark.parametrize('how', [dict(kernel_size=3, padding=1), dict(kernel_size=4, stride=2, padding=1), dict(kernel_size=1)])
@pytest.mark.parametrize('with_bias', [False, True])
def test_a_large_weight_convolves_a_clip_at_once(how, with_bias, monkeypatch):
    """As one image of three axes, which must be the frames' images one by one, channels-last as all is between layers."""
    torch.manual_seed(0)
    conv = unet_blocks.FrameConv(3, 5, **how).double()
    x = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64).to(memory_format=torch.channels_last_3d).requires_grad_()
    results = []
    for large in (10 ** 9, 1):
        monkeypatch.setattr(unet_blocks, 'LARGE', large)
        y = conv(x, with_bias)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        results.append([y, *torch.autograd.grad(loss, [x, conv.weight] + [conv.bias] * with_bias)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

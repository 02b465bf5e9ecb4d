"""Attention and transformer blocks equal those of the same meaning in diffusers, with their weights.

Run: pytest tests/test_transformer.py
"""

import pytest
import torch
from einops import rearrange, repeat
from rotary_embedding_torch import RotaryEmbedding
from torch import nn

from video_diffusion.networks.attention import (
    CrossAttention,
    SpatialAttention,
    SpatialLinearAttention,
    SpatialSelfAttention,
    TemporalAttention,
    attend_linearly,
    rotate,
    rotations,
    self_attention,
)
from video_diffusion.networks.transformer import FeedForward, SpatialTransformer, TransformerBlock


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def carry_attention(ours, theirs):
    ours.to_q.load_state_dict(theirs.to_q.state_dict())
    ours.to_kv.weight.data = torch.cat([theirs.to_k.weight, theirs.to_v.weight])
    ours.to_out.load_state_dict(theirs.to_out[0].state_dict())


def carry_block(ours, theirs):
    carry_attention(ours.self_attention, theirs.attn1)
    names = ['norm1', 'norm3']
    if ours.cross_attention is not None:
        carry_attention(ours.cross_attention, theirs.attn2)
        names.append('norm2')
    for name in names:
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    ours.feed_forward.widen.load_state_dict(theirs.ff.net[0].proj.state_dict())
    ours.feed_forward.narrow.load_state_dict(theirs.ff.net[2].state_dict())


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('context_dim', [None, 12])
def test_block_equals_basic_transformer_block(gated, context_dim):
    from diffusers.models.attention import BasicTransformerBlock
    torch.manual_seed(0)
    theirs = shaken(BasicTransformerBlock(16, 2, 8, cross_attention_dim=context_dim, activation_fn='geglu' if gated else 'gelu'))
    ours = TransformerBlock(16, 2, 8, context_dim, gated=gated)
    carry_block(ours, theirs)
    x, mask = torch.randn(2, 3, 10, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    context = torch.randn(2, 5, 12) if context_dim else None
    if context_dim:
        bias = repeat((1 - mask.float()) * -1e9, 'b m -> (b f) 1 m', f=3)
        expected = theirs(x.flatten(0, 1), encoder_hidden_states=context.repeat_interleave(3, 0), encoder_attention_mask=bias)
    else:
        expected = theirs(x.flatten(0, 1))
    torch.testing.assert_close(ours(x, context, mask if context_dim else None).flatten(0, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_spatial_transformer_equals_transformer_2d_model(checkpointing):
    from diffusers import Transformer2DModel
    torch.manual_seed(0)
    theirs = shaken(Transformer2DModel(2, 8, in_channels=12, num_layers=2, norm_num_groups=4, cross_attention_dim=6))
    ours = SpatialTransformer(12, 2, 8, depth=2, context_dim=6, groups=4, gradient_checkpointing=checkpointing)
    ours.norm.load_state_dict(theirs.norm.state_dict())
    for layer, name in [(ours.project_in, 'proj_in'), (ours.project_out, 'proj_out')]:
        layer.weight.data, layer.bias.data = getattr(theirs, name).weight.data[:, :, 0, 0], getattr(theirs, name).bias.data
    for a, b in zip(ours.blocks, theirs.transformer_blocks):
        carry_block(a, b)
    x, context = torch.randn(2, 12, 3, 4, 5, requires_grad=True), torch.randn(2, 7, 6)
    out = ours(x, context)
    frames = rearrange(x, 'b c f h w -> (b f) c h w')
    expected = rearrange(theirs(frames, context.repeat_interleave(3, 0)).sample, '(b f) c h w -> b c f h w', b=2)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    weight = torch.randn_like(out)
    inputs = [x, ours.blocks[0].cross_attention.to_q.weight]
    theirs_inputs = [x, theirs.transformer_blocks[0].attn2.to_q.weight]
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), inputs),
                               torch.autograd.grad((expected * weight).sum(), theirs_inputs), atol=1e-3, rtol=1e-3)


def test_a_new_spatial_transformer_changes_nothing_and_learns():
    transformer = SpatialTransformer(8, 2, 4, groups=4)
    x = torch.randn(1, 8, 2, 4, 4)
    assert torch.equal(transformer(x), x)
    transformer(x).sum().backward()
    assert transformer.project_out.weight.grad.abs().sum() > 0


def test_attention_across_frames_sees_the_other_frames_and_only_then():
    for across in (False, True):
        torch.manual_seed(0)
        block = TransformerBlock(8, 2, 4, across_frames=across)
        x = torch.randn(2, 3, 5, 8)
        changed = x.clone()
        changed[0, 2] = 0
        differs = (block(x) - block(changed)).abs().amax(dim=(2, 3)) > 1e-6         # b f
        assert differs.tolist() == [[across, across, True], [False, False, False]]


def test_masked_rows_of_a_context_are_as_if_absent():
    torch.manual_seed(0)
    attention = CrossAttention(8, 2, 4, context_dim=6)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    mask = torch.tensor([[True] * 3 + [False] * 4] * 2)
    torch.testing.assert_close(attention(x, context, mask), attention(x, context[:, :3]))


def test_attention_along_time_keeps_within_the_range_of_fp16():
    """A product of these queries and keys, 16 * 80 * 80, is beyond 65,504; the logits, which are scaled before it, are not."""
    layer = TemporalAttention(32, 1, 16, None)
    nn.init.constant_(layer.to_qkv.weight, 80 / 32)
    x = torch.ones(1, 32, 3, 1, 1)
    x[:, 16:] = -1
    layer.to_qkv.weight.data[:, 16:] *= -1                                          # so that a row of norm 1 sums up to 80
    q, k, _ = layer.half().to_qkv(x.half()[:, :, 0, 0, 0]).chunk(3, dim=-1)
    assert not (q @ k.mT).isfinite().all()
    turn = rotations(3, RotaryEmbedding(16), 16)
    assert layer(x.half(), torch.zeros(1, 3, 3).half(), turn).isfinite().all()


@pytest.mark.parametrize('dim_head', [8, 40])
def test_rotary_turns_pairs_like_complex_numbers(dim_head):
    """Also where the rotary has fewer pairs than a head: 16."""
    torch.manual_seed(0)
    rotary = RotaryEmbedding(min(32, dim_head))
    x = torch.randn(7, 2 * dim_head)                                                # rows, heads*d
    turned = rotate(x, rotations(5, rotary, dim_head))                              # f rows heads*d
    angle = torch.arange(5)[:, None] * rotary.freqs
    angle = torch.nn.functional.pad(angle, (0, dim_head // 2 - angle.shape[1]))
    pairs = torch.view_as_complex(x.view(1, 7, 2, -1, 2)) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    torch.testing.assert_close(turned, torch.view_as_real(pairs).flatten(-3), rtol=1e-6, atol=1e-6)
    in_peer = rotary.rotate_queries_or_keys(x.view(7, 2, 1, dim_head).expand(-1, -1, 5, -1))     # rows heads f d
    torch.testing.assert_close(turned, rearrange(in_peer, 'n heads f d -> f n (heads d)'), rtol=1e-5, atol=1e-5)


def test_self_attention_of_an_image_equals_diffusers():
    from diffusers.models.attention_processor import Attention
    torch.manual_seed(0)
    theirs = shaken(Attention(16, heads=1, dim_head=16, norm_num_groups=4, eps=1e-6, bias=True, residual_connection=True))
    ours = SpatialSelfAttention(16, groups=4)
    ours.norm.load_state_dict(theirs.group_norm.state_dict())
    for kind in ('weight', 'bias'):
        getattr(ours.to_qkv, kind).data = torch.cat([getattr(layer, kind) for layer in (theirs.to_q, theirs.to_k, theirs.to_v)])
    ours.to_out.load_state_dict(theirs.to_out[0].state_dict())
    x = torch.randn(2, 16, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def output_and_gradients(layer, function, *inputs):
    y, learn = function(*inputs), [*inputs, *layer.parameters()]
    return y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), learn)


@pytest.mark.parametrize('size', [(1, 1), (2, 4), (3, 3), (4, 5)])              # fewer pixels than channels, as many, more
def test_spatial_linear_attention_is_linear_attention_in_whatever_order(size):
    torch.manual_seed(0)
    layer = shaken(SpatialLinearAttention(8, 2, 4)).double()
    x = torch.randn(2, 8, 3, *size, dtype=torch.float64, requires_grad=True)

    def plain(x):
        rows = rearrange(x, 'b c f h w -> (b f) (h w) c')
        seen = self_attention(layer.norm(rows), layer.to_qkv, layer.to_out, 2, attend_linearly)
        return rearrange(rows + seen, '(b f) (h w) c -> b c f h w', b=2, h=size[0])
    for a, b in zip(output_and_gradients(layer, layer, x), output_and_gradients(layer, plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('channels', [4, 8, 12])                               # fewer than a head has features, as many, more
@pytest.mark.parametrize('frames', [1, 5, 17])
@pytest.mark.parametrize('of_each_clip', [False, True])
def test_temporal_attention_is_attention_over_frames_in_whatever_order(channels, frames, of_each_clip):
    torch.manual_seed(0)
    layer, turn = shaken(TemporalAttention(channels, 2, 8, None)).double(), rotations(frames, RotaryEmbedding(8), 8)
    x = torch.randn(2, channels, frames, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(*((2, 1) if of_each_clip else ()), 2, frames, frames, dtype=torch.float64, requires_grad=True)

    def plain(x, bias):
        rows = layer.to_qkv(layer.norm(rearrange(x, 'b c f h w -> b h w f c')))
        q, k, v = rows.chunk(3, dim=-1)
        q, k = (rotate(each, turn).diagonal(dim1=-3, dim2=-2).mT for each in (q, k))            # each row turned as its own frame
        q, k, v = (rearrange(each, 'b h w f (heads d) -> b h w heads f d', heads=2) for each in (q, k, v))
        bias = bias[:, None] if of_each_clip else bias                                          # b 1 1 heads f f
        seen = rearrange((q @ k.mT * 8 ** -0.5 + bias).softmax(-1) @ v, 'b h w heads f d -> b h w f (heads d)')
        return x + rearrange(layer.to_out(seen), 'b h w f c -> b c f h w')
    ours, expected = (output_and_gradients(layer, function, x, bias) for function in (lambda *given: layer(*given, turn), plain))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('kind', [SpatialAttention, SpatialLinearAttention])
def test_linear_and_softmax_attention_agree_where_all_pixels_are_alike(kind):
    """All values are then the same, and any weights that add up to one give it back: v, times d^-1/2 in the linear one."""
    torch.manual_seed(0)
    block = kind(8, 2, 4)
    x = torch.randn(1, 8, 1, 1, 1).expand(1, 8, 2, 3, 3)
    row = x[:, :, 0, 0, 0]
    v = block.to_qkv(block.norm(row)).chunk(3, dim=-1)[2]
    expected = row + block.to_out(v if kind is SpatialAttention else v * 4 ** -0.5)
    torch.testing.assert_close(block(x), expected[:, :, None, None, None].expand_as(x))


def test_feed_forward_gates():
    x = torch.randn(3, 8)
    for gated in (True, False):
        block = FeedForward(8, mult=2, gated=gated)
        wide = block.widen(x)
        wide = wide[:, :16] * torch.nn.functional.gelu(wide[:, 16:]) if gated else torch.nn.functional.gelu(wide)
        assert wide.shape == (3, 16)
        torch.testing.assert_close(block(x), block.narrow(wide))


def test_a_context_must_fit_the_network():
    x = torch.randn(1, 8, 1, 2, 2)
    with pytest.raises(ValueError, match='give a context'):
        SpatialTransformer(8, 2, 4, context_dim=6, groups=4)(x)
    with pytest.raises(ValueError, match='has no context_dim'):
        SpatialTransformer(8, 2, 4, groups=4)(x, torch.randn(1, 2, 6))


def test_a_mask_of_numbers_is_one_of_bools():
    torch.manual_seed(0)
    attention, x, context = CrossAttention(8, 2, 4, context_dim=6), torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])                             # as tokenizers say it
    assert torch.equal(attention(x, context, mask), attention(x, context, mask.bool()))
    assert torch.equal(attention(x, context, mask.float()), attention(x, context, mask.bool()))

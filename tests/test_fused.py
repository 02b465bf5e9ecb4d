"""The kernels of a GPU give what the lines of torch give that they stand for: results and gradients, float64 the judge.

Without a GPU they run in Triton's interpreter (conftest.py asks for it), number by number as on one. That shapes and strides are
those that torch.compile is told of is torch's own check.
"""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from video_diffusion import Unet3D
from video_diffusion.networks import fused
from video_diffusion.networks.attention import ChannelNorm, SpatialLinearAttention, attend_linearly
from video_diffusion.networks.unet_blocks import Block
from video_diffusion.vae import planes
from video_diffusion.vae.causal_blocks import Norm
from video_diffusion.vae.context_parallel import Piece

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The kernels take tensors of this device as they would those of a GPU. Their names, as they are launched."""
    launched, launch = [], fused.launch
    monkeypatch.setattr(fused, 'on_gpu', lambda x: True)
    monkeypatch.setattr(fused, 'launch', lambda name, *args, **kwargs: (launched.append(name), launch(name, *args, **kwargs)))
    assert fused.fits(random(1)) and fused.fits(random(1), 16) and fused.fits(random(1), 16, 2)
    launched.clear()                                                                # these trials
    return launched


def off(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def random(*shape):
    return torch.randn(shape, device=DEVICE)


def assert_alike(fast, plain, *inputs, bound=2e-6):
    given = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = fast(*given), plain(*exact)
    grad = torch.randn_like(out)
    got, wanted = torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, exact, grad.double())
    assert out.shape == expected.shape
    assert off(out, expected) < bound
    for number, (a, b) in enumerate(zip(got, wanted)):
        assert a.shape == b.shape and off(a, b) < bound, number


# ---- attention along time

def along_time_plainly(qk, v, bias, heads):
    q, k = rearrange(qk, 'b f n (two heads d) -> two b n heads f d', two=2, heads=heads)
    v = rearrange(v, 'b f n (heads d) -> b n heads f d', heads=heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v, bias), 'b n heads f d -> b f n (heads d)')


@pytest.mark.parametrize('b, f, n, heads, d', [(2, 5, 9, 2, 16), (1, 10, 17, 1, 32), (1, 33, 5, 1, 16), (2, 2, 3, 1, 64)])
@pytest.mark.parametrize('of_each_clip', [False, True])
def test_attention_along_time(b, f, n, heads, d, of_each_clip):
    """Pixels that do not fill a tile, frames that do not, and a bias for all clips or one for each."""
    bias = random(b, 1, heads, f, f) if of_each_clip else random(heads, f, f)
    assert_alike(lambda *x: fused.along_time(*x, heads), lambda *x: along_time_plainly(*x, heads),
                 random(b, f, n, 2 * heads * d), random(b, f, n, heads * d), bias)


@pytest.mark.parametrize('of_each_clip', [False, True])
def test_programs_that_take_several_tiles(of_each_clip, monkeypatch):
    """What the bias learns is summed over them."""
    monkeypatch.setattr(fused, 'PROGRAMS', 2)
    bias = random(2, 1, 1, 3, 3) if of_each_clip else random(1, 3, 3)
    assert_alike(lambda *x: fused.along_time(*x, 1), lambda *x: along_time_plainly(*x, 1),
                 random(2, 3, 20, 32), random(2, 3, 20, 16), bias)


def test_frames_that_see_only_themselves():
    """The bias of clips that focus on the present is minus infinity elsewhere."""
    bias = random(1, 1, 1, 4, 4).masked_fill(~torch.eye(4, dtype=torch.bool, device=DEVICE), -float('inf'))
    v = random(1, 4, 3, 16)
    assert torch.equal(fused.along_time(random(1, 4, 3, 32), v, bias, 1), v)


def test_rows_in_any_order():
    """The products before it leave the frames outermost; and so come their gradients."""
    qk, v, bias = random(3, 2, 5, 32).transpose(0, 1).requires_grad_(), random(2, 3, 5, 16), random(1, 3, 3)
    out = fused.along_time(qk, v, bias, 1)
    assert torch.equal(out, fused.along_time(qk.contiguous(), v, bias, 1))
    grad, = torch.autograd.grad(out.sum(), qk)
    assert grad.stride() == qk.stride()


# ---- linear attention

def linearly_plainly(qkv, heads):
    q, k, v = rearrange(qkv, 'b n (qkv heads d) -> qkv b heads n d', qkv=3, heads=heads)
    return rearrange(attend_linearly(q, k, v), 'b heads n d -> b n (heads d)')


@pytest.mark.parametrize('b, n, heads, d', [(2, 150, 2, 16), (3, 16, 1, 32), (1, 300, 1, 16)])
def test_linear_attention(b, n, heads, d):
    assert_alike(lambda x: fused.linearly(x, heads), lambda x: linearly_plainly(x, heads), 3 * random(b, n, 3 * heads * d))


def test_linear_attention_with_large_keys():
    """Their exponentials are beyond float32, in the last tile more than in the first."""
    qkv = random(1, 300, 48) + torch.arange(300., device=DEVICE)[:, None]
    assert_alike(lambda x: fused.linearly(x, 1), lambda x: linearly_plainly(x, 1), qkv, bound=1e-4)


# ---- norms

@pytest.mark.parametrize('shape', [(2, 3, 5, 24), (170, 64), (3, 1000)])
def test_layer_norm(shape):
    assert_alike(fused.channel_norm, lambda x, gain: F.layer_norm(x, gain.shape, gain, eps=1e-5), 3 + random(*shape), random(shape[-1]))


def activation(x, beta, weight, bias, film, groups):
    y = F.group_norm(x + beta.view(-1, 1, 1, 1), groups, weight, bias, eps=1e-5)
    if film is not None:
        scale, shift = (rearrange(part, 'b f c -> b c f 1 1') for part in film.chunk(2, dim=-1))
        y = y * (scale + 1) + shift
    return F.silu(y)


@pytest.mark.parametrize('c, f, side, groups', [(16, 3, 4, 4), (24, 2, 14, 8), (64, 2, 9, 8)])
@pytest.mark.parametrize('film', [None, 'clip', 'frame'])
def test_group_norm_film_and_silu(c, f, side, groups, film):
    """The mean far from 0, as a bias makes it; more than one tile, and one that is not full."""
    x = (3 + random(2, c, f, side, side)).contiguous(memory_format=torch.channels_last_3d)
    films = [] if film is None else [random(2, f if film == 'frame' else 1, 2 * c)]
    assert_alike(lambda x, beta, weight, bias, film=None: fused.NormFilmSilu.apply(x, beta, weight, bias, film, groups, 1e-5),
                 lambda x, beta, weight, bias, film=None: activation(x, beta, weight, bias, film, groups),
                 x, random(c), random(c), random(c), *films)


def test_a_mean_that_is_large_beside_the_deviation():
    x = (1000 + random(1, 8, 2, 8, 8)).contiguous(memory_format=torch.channels_last_3d)
    norm = nn.GroupNorm(2, 8).to(DEVICE)
    y = fused.norm_film_silu(x, torch.zeros(8, device=DEVICE), norm, None)
    assert off(y, F.silu(F.group_norm(x.double(), 2))) < 2e-4


# ---- in the networks

def answers(network, *inputs):
    """The output, and the gradients of input and weights."""
    network.zero_grad()
    x = inputs[0].clone().requires_grad_()
    output = network(x, *inputs[1:])
    output.square().mean().backward()
    return {'output': output.detach(), 'input': x.grad} | {
        name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


def small_unet():
    return Unet3D(8, dim_mults=(1,), attn_heads=1, attn_dim_head=16, resnet_groups=2).to(DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize('time, again', [((2,), False), ((2, 2), True)])
def test_the_u_net(time, again, as_on_a_gpu, monkeypatch):
    """One time for a clip or one for each frame; everything kept, or computed again."""
    torch.manual_seed(0)
    network = small_unet()
    for module in network.modules():
        if hasattr(module, 'little'):
            module.little = 0 if again else 1e9
    inputs = random(2, 3, 2, 2, 2), torch.randint(0, 1000, time, device=DEVICE)
    fast = answers(network, *inputs)
    assert {'time_backward', 'linear_backward', 'layer_norm_backward', 'deactivate'} <= set(as_on_a_gpu)
    as_on_a_gpu.clear()
    monkeypatch.setattr(fused, 'on_gpu', lambda x: False)
    plain = answers(network, *inputs)
    assert not as_on_a_gpu and fast.keys() == plain.keys()
    for name in plain:
        assert off(fast[name], plain[name]) < 1e-5 or (fast[name] - plain[name]).norm() < 1e-9, name


@pytest.mark.parametrize('scope', ['clip', 'frame'])
@pytest.mark.parametrize('latent_channels', [None, 2])
def test_the_norms_of_the_vae(scope, latent_channels, as_on_a_gpu, monkeypatch):
    """Some frames at a time, several tiles of a frame, a latent that is smaller, and a clip that begins with a frame of its own."""
    monkeypatch.setattr(planes, 'NUMBERS', 16)
    norm = Norm(2, 4, scope, latent_channels).to(DEVICE)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, z = 3 + random(2, 4, 3, 4, 6), random(2, 2, 2, 2, 3)

    def parts():
        frames = norm.prepare(x, z, Piece(first=True))
        return torch.cat([frames(0, 2), frames(1, 3)], dim=2)
    with torch.no_grad():
        fast = parts()
        assert as_on_a_gpu == ['frame_moments', 'conditioned_silu', 'conditioned_silu']
        monkeypatch.setattr(fused, 'on_gpu', lambda x: False)
        assert off(fast, parts()) < 1e-6
        monkeypatch.setattr(fused, 'on_gpu', lambda x: True)
        x = x.contiguous(memory_format=torch.channels_last_3d)                      # no planes: left to torch
        assert off(fast, parts()) < 1e-6 and len(as_on_a_gpu) == 3
    x = x.contiguous()
    parts()                                                                         # with gradients, too
    assert len(as_on_a_gpu) == 3


def test_what_does_not_fit_is_left_to_torch(as_on_a_gpu):
    x = torch.zeros(1)
    assert fused.fits(x) and fused.fits(x, 16) and fused.fits(x, 16, 2)
    assert not fused.fits(x.double()) and not fused.fits(x, 24) and not fused.fits(x, 32, 65)


def test_where_triton_builds_no_kernels_torch_does_it(as_on_a_gpu, monkeypatch):
    """Without a C compiler it raises at the first launch."""
    def launch(*args, **kwargs):
        raise RuntimeError('Failed to find C compiler')
    monkeypatch.setattr(fused, 'launch', launch)
    fused.stages.cache_clear()
    with pytest.warns(UserWarning, match='slower lines of torch are used: Failed to find C compiler'):
        assert not fused.fits(torch.zeros(1))
    x = random(2, 3, 16)
    assert off(ChannelNorm(16).to(DEVICE)(x), F.layer_norm(x, (16,))) < 1e-6
    fused.stages.cache_clear()


def test_nothing_is_fused_without_a_gpu():
    assert not fused.fits(torch.zeros(1)) and not fused.fits(torch.zeros(1, device='meta'))


# ---- torch.compile

@pytest.mark.parametrize('name', ['along_time', 'along_time_backward', 'linearly', 'linearly_backward', 'channel_norm',
                                  'channel_norm_backward', 'norm_film_silu', 'norm_film_silu_backward', 'frame_moments',
                                  'conditioned_silu'])
def test_compilers_are_told_the_shapes_and_strides_that_come(name):
    qk, v, qkv = random(3, 2, 5, 32).transpose(0, 1), random(2, 3, 5, 16), random(2, 5, 48)
    bias = random(3, 3, 1).permute(2, 0, 1)                                         # heads last, as an embedding gives them
    x, film, c = random(2, 8, 3, 4, 4).contiguous(memory_format=torch.channels_last_3d), random(2, 3, 16), random(8)
    planes, scale, latent = random(1, 4, 3, 4, 4), random(1, 4, 1, 1, 1), torch.tensor([0, 1, 1], device=DEVICE)
    args = {
        'along_time': (qk, v, bias, 1),
        'along_time_backward': (v, qk, v, bias, 1),
        'linearly': (qkv, 1),
        'linearly_backward': (random(2, 5, 16), qkv, random(2, 1, 16, 16), random(2, 1, 16), 1),
        'channel_norm': (v, random(16)),
        'channel_norm_backward': (v, v, random(16)),
        'norm_film_silu': (x, c, c, c, film, 2, 1e-5),
        'norm_film_silu_backward': (x, x, c, c, c, film, random(2, 3, 8), random(2, 3, 8), random(2, 8), random(2, 2, 2), 2),
        'frame_moments': (planes, 2),
        'conditioned_silu': (planes, scale, scale, random(1, 4, 2, 2, 2), random(1, 4, 2, 2, 2), latent),
    }[name]
    operation = getattr(torch.ops.video_diffusion, name)
    torch.library.opcheck(operation.default, args, test_utils=('test_schema', 'test_faketensor'))
    told = operation(*(x.to('meta') if isinstance(x, torch.Tensor) else x for x in args))
    came = operation(*args)
    for a, b in zip(*([each] if isinstance(each, torch.Tensor) else each for each in (told, came))):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_compiled(as_on_a_gpu):
    """One graph, with the launches in it."""
    torch.manual_seed(0)
    attention, block = SpatialLinearAttention(8, heads=1, dim_head=16).to(DEVICE), Block(8, 8, groups=2).to(DEVICE)
    network, x = nn.ModuleList([attention, block]), random(1, 8, 2, 2, 2)

    def call(x):
        return block.activate(block.convolve(attention(x)))
    network.forward = call
    plain = answers(network, x)
    network.forward = torch.compile(call, backend='aot_eager', fullgraph=True)
    fast = answers(network, x)
    assert as_on_a_gpu.count('linear_backward') == as_on_a_gpu.count('deactivate') == 2
    for name, each in plain.items():
        assert off(fast[name], each) < 1e-5, name

"""Context parallelism is exact: several processes compute what one computes, gradients included.

Run: pytest tests/test_context_parallel.py
"""

import os
import time
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers
from torch import nn

from video_diffusion.distributed import init
from video_diffusion.vae.causal_vae import CausalVAE
from video_diffusion.vae.context_parallel import CausalConv3d, GroupNorm, Piece, PrependBorrowed
from video_diffusion.vae.frame_shares import agree_on_shares, gather_frames, split_frames, sum_gradients

GROUPS = [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


@pytest.fixture(scope='module')
def workers():
    workers = Workers(4, timeout=120.)
    workers.run(make_groups, patience=240.)       # starting takes long on a busy machine
    yield workers
    workers.close()


# ---- what runs in the processes

def make_groups(rank):
    """Called once; the groups live as long as the worker."""
    timeout = timedelta(seconds=30)
    make_groups.by_size = {len(ranks): dist.new_group(ranks, timeout=timeout) for ranks in GROUPS}


def small_vae(scope, dtype, **kwargs):
    torch.manual_seed(0)
    vae = CausalVAE(latent_channels=2, dim=4, dim_mults=(1, 2, 2), blocks_per_level=1, norm_groups=2,
                    norm_scope=scope, **kwargs)
    for parameter in vae.parameters():         # norms that do something, biases that are not zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vae.to(dtype)


def video_and_weights(frames, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    video, weights = torch.rand((2, 2, 3, frames, 8, 8), generator=generator, dtype=torch.float64).to(dtype)
    return video.requires_grad_(), weights


def objective(reconstruction, posterior, weights):
    return (reconstruction * weights).sum() + 0.1 * posterior.kl().sum()


def relative(ours, reference, floor=0.):
    if ours is None and reference is None:
        return 0.
    return ((ours - reference).abs().max() / reference.abs().max().clamp(min=max(floor, 1e-300))).item()


def cut(x, group, shares, unit):
    """split_frames, or at hand-picked shares."""
    if shares is None:
        return split_frames(x, group, unit)
    return x.split(shares, dim=2)[group.rank()].contiguous()


def compare_with_one_process(rank, size, frames, scope, dtype, shares=None, checkpointing=False):
    """Largest relative errors of outputs, loss, parameter and input gradients; the same in every process."""
    if rank >= size:
        return None
    group = make_groups.by_size[size]
    vae = small_vae(scope, dtype)
    video, weights = video_and_weights(frames, dtype)
    whole, posterior = vae(video, sample=False)
    loss = objective(whole, posterior, weights)
    loss.backward()

    parallel = small_vae(scope, dtype, gradient_checkpointing=checkpointing).context_parallel(group)
    clip = video.detach().clone().requires_grad_()
    part, part_posterior = parallel(cut(clip, group, shares, 4), sample=False)
    part_loss = objective(part, part_posterior, cut(weights, group, shares, 4))
    part_loss.backward()
    sum_gradients(parallel.parameters(), group)
    total = part_loss.detach().clone()
    dist.all_reduce(total, group=group)
    with torch.no_grad():
        frugal = parallel.decode(parallel.encode(cut(clip, group, shares, 4)).mode(), frames=frames)

    grads = [(p.grad, q.grad) for p, q in zip(parallel.parameters(), vae.parameters())]
    floor = 1e-3 * max(reference.abs().max().item() for _, reference in grads)
    if shares is not None:        # cut by hand in every process: the pieces' gradients add up to the whole
        dist.all_reduce(clip.grad, group=group)
    return {
        'moments': relative(gather_frames(part_posterior.mean, group), posterior.mean),
        'video': relative(gather_frames(part, group), whole),
        'video without gradients': relative(gather_frames(frugal, group), whole),
        'loss': relative(total, loss),
        'parameters': max(relative(ours, reference, floor) for ours, reference in grads),
        'input': relative(clip.grad, video.grad),
    }


def assert_close(results, tolerance):
    for result in results:
        assert result is None or max(result.values()) < tolerance, result


# ---- exactness

CASES = [
    # processes, frames, shares by hand
    (2, 17, None),            # 3 + 2 latent frames
    (3, 17, None),            # 2 + 2 + 1
    (4, 13, None),            # 1 each: what a convolution borrows comes from two processes
    (4, 17, None),            # 2 + 1 + 1 + 1
    (2, 16, None),            # no special first frame
    (3, 13, [1, 8, 4]),       # uneven, the first process has the first frame only
    (2, 1, None),             # an image: the others are idle
]


@pytest.mark.slow
@pytest.mark.parametrize('scope', ['clip', 'frame'])
@pytest.mark.parametrize('size, frames, shares', CASES)
def test_outputs_and_all_gradients_equal_those_of_one_process(workers, size, frames, shares, scope):
    assert_close(workers.run(compare_with_one_process, size, frames, scope, torch.float64, shares), 1e-10)


@pytest.mark.parametrize('scope', ['clip', 'frame'])
def test_the_same_in_float32(workers, scope):
    assert_close(workers.run(compare_with_one_process, 3, 17, scope, torch.float32), 1e-5)


@pytest.mark.slow
def test_the_same_with_gradient_checkpointing(workers):
    assert_close(workers.run(compare_with_one_process, 2, 9, 'clip', torch.float64, None, True), 1e-10)


def compare_mesh(rank, adjacent):
    """Two clips on 2 x 2 processes; gradients are summed over frames and averaged over data."""
    pairs, across = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    frames_group, data_group = (dist.new_subgroups_by_enumeration(ranks, timeout=timedelta(seconds=30))[0]
                                for ranks in ((pairs, across) if adjacent else (across, pairs)))
    if adjacent:
        with mock.patch.dict(os.environ, WORLD_SIZE='4'), mock.patch('torch.distributed.init_process_group'):
            frames_group = init(timedelta(seconds=30), 'cpu', context_parallel=2).frames_group
    partner = {True: [0, 1], False: [0, 2]}[adjacent]
    assert (rank in partner) == (sorted(dist.get_process_group_ranks(frames_group)) == partner)
    reference = small_vae('clip', torch.float64)
    for seed in (0, 1):
        video, weights = video_and_weights(9, torch.float64, seed)
        (objective(*reference(video, sample=False), weights) / 2).backward()

    vae = small_vae('clip', torch.float64).context_parallel(frames_group)
    video, weights = video_and_weights(9, torch.float64, seed=dist.get_rank(data_group))
    part = split_frames(video, frames_group, 4)
    objective(*vae(part, sample=False), split_frames(weights, frames_group, 4)).backward()
    sum_gradients(vae.parameters(), frames_group)
    for parameter in vae.parameters():
        dist.all_reduce(parameter.grad, group=data_group)
        parameter.grad /= 2
    grads = [(p.grad, q.grad) for p, q in zip(vae.parameters(), reference.parameters())]
    floor = 1e-3 * max(grad.abs().max().item() for _, grad in grads)
    return {'parameters': max(relative(ours, theirs, floor) for ours, theirs in grads)}


def sum_in_one_message(rank):
    torch.manual_seed(rank)
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in (
        ((2, 3), torch.float64), ((4,), torch.float32), ((), torch.float64), ((2, 3, 1, 2, 2), torch.float32))]
    frozen = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    for weight in weights[:4 if rank else 2]:              # the first process has none for the last two
        weight.grad = torch.randint(-8, 8, weight.shape).to(weight.dtype)       # whole numbers: their sums are exact
    if rank:
        weights[3].grad = weights[3].grad.contiguous(memory_format=torch.channels_last_3d)
    alone = [torch.zeros_like(weight) if weight.grad is None else weight.grad.clone(memory_format=torch.contiguous_format) for weight in weights]
    for grad in alone:
        dist.all_reduce(grad)
    sent, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, **how: sent.append(tensor) or all_reduce(tensor, **how)
    try:
        sum_gradients([*weights, frozen], dist.group.WORLD)
    finally:
        dist.all_reduce = all_reduce
    equal = all(torch.equal(weight.grad, grad) for weight, grad in zip(weights, alone))
    return equal, frozen.grad is None, sorted((t.numel(), str(t.dtype)) for t in sent)


def test_gradients_travel_in_one_message_per_dtype(workers):
    expected = True, True, [(7, 'torch.float64'), (28, 'torch.float32')]
    assert workers.run(sum_in_one_message) == 4 * [expected]


@pytest.mark.slow
@pytest.mark.parametrize('adjacent', [True, False])
def test_two_groups_at_once_in_both_layouts(workers, adjacent):
    assert_close(workers.run(compare_mesh, adjacent), 1e-10)


def compare_samples(rank):
    if rank >= 2:
        return None
    group = make_groups.by_size[2]
    vae = small_vae('clip', torch.float64)
    video, _ = video_and_weights(9, torch.float64)
    whole, _ = vae(video, generator=torch.Generator().manual_seed(7))
    vae.context_parallel(group)
    part, _ = vae(split_frames(video, group, 4), generator=torch.Generator().manual_seed(7))
    return {'sampled video': relative(gather_frames(part, group), whole)}


def test_processes_seeded_alike_draw_the_noise_that_one_process_draws(workers):
    assert_close(workers.run(compare_samples), 1e-10)


# ---- the layers on their own

def gradient_of_the_first_frame(rank):
    """Four causal convolutions: the frame that is lent, and repeated, in every layer."""
    if rank >= 3:
        return None
    group = make_groups.by_size[3]
    torch.manual_seed(0)
    layers = nn.ModuleList([CausalConv3d(2, 2).double() for _ in range(4)])
    weights = torch.randn(1, 2, 7, 4, 4, dtype=torch.float64)
    whole = torch.randn(1, 2, 7, 4, 4, dtype=torch.float64, requires_grad=True)
    x = whole
    for layer in layers:
        x = layer(x)
    (x * weights).sum().backward()
    reference = [p.grad.clone() for p in layers.parameters()]

    layers.zero_grad()
    clip = whole.detach().clone().requires_grad_()
    x = split_frames(clip, group)
    piece = Piece(first=rank == 0, shares=agree_on_shares(x, group))
    for layer in layers:
        x = layer(x, piece)
    (x * split_frames(weights, group)).sum().backward()
    sum_gradients(layers.parameters(), group)
    return {
        'first frame': relative(clip.grad[:, :, 0], whole.grad[:, :, 0]),
        'every frame': relative(clip.grad, whole.grad),
        'weights': max(relative(p.grad, r) for p, r in zip(layers.parameters(), reference)),
    }


def test_gradients_of_a_stack_of_convolutions_reach_the_first_frame_and_all_weights(workers):
    assert_close(workers.run(gradient_of_the_first_frame), 1e-12)


def test_one_process_passes_gradcheck():
    torch.manual_seed(0)
    conv, norm = CausalConv3d(2, 2).double(), GroupNorm(1, 2).double()
    x = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm(conv(x)), x)


@pytest.mark.parametrize('scope', ['clip', 'frame'])
def test_group_norm_equals_that_of_torch_even_far_from_zero(scope):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 6, 7) + 1000.
    ours, peer = GroupNorm(4, 8, scope), nn.GroupNorm(4, 8, eps=1e-6)
    frames = x.transpose(1, 2).flatten(0, 1)
    exact = peer.double()(x.double() if scope == 'clip' else frames.double())
    exact = exact if scope == 'clip' else exact.unflatten(0, (2, 5)).transpose(1, 2)
    assert (ours(x) - exact).abs().max() < 1e-3        # float32 resolves 6e-5 at 1000


def layout_of_borrowed(rank):
    if rank >= 2:
        return None
    group = make_groups.by_size[2]
    x = torch.rand(1, 4, 3, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    joined = PrependBorrowed.apply(x, agree_on_shares(x, group))
    return joined.is_contiguous(memory_format=torch.channels_last_3d), joined.shape[2]


def test_channels_last_frames_keep_their_layout_through_the_exchange(workers):
    assert workers.run(layout_of_borrowed)[:2] == [(True, 5), (True, 5)]


# ---- what travels

@contextmanager
def counted_bytes():
    """Bytes that this process sends, by operation, for whatever it does with torch.distributed."""
    sent = {}
    real = {name: getattr(dist, name) for name in ('batch_isend_irecv', 'all_gather', 'all_reduce')}

    def count(name, number):
        sent[name] = sent.get(name, 0) + number

    def batch_isend_irecv(operations):
        count('point to point', sum(op.tensor.nbytes for op in operations if op.op is dist.isend))
        return real['batch_isend_irecv'](operations)

    def all_gather(parts, x, group):
        count('shapes' if x.dtype == torch.int64 else 'statistics', x.nbytes * (group.size() - 1))
        return real['all_gather'](parts, x, group=group)

    def all_reduce(x, group):
        count('all_reduce', x.nbytes)
        return real['all_reduce'](x, group=group)

    with mock.patch.multiple(dist, batch_isend_irecv=batch_isend_irecv, all_gather=all_gather,
                             all_reduce=all_reduce):
        yield sent


def bytes_sent(rank, size, scope):
    if rank >= size:
        return None
    group = make_groups.by_size[size]
    vae = small_vae(scope, torch.float32)
    video, _ = video_and_weights(17, torch.float32)
    halo = []
    handles = [module.register_forward_pre_hook(
        lambda m, args: halo.append(args[0][:, :, :1].nbytes * 2)) for module in vae.modules()
        if isinstance(module, CausalConv3d)]
    vae(video, sample=False)
    for handle in handles:
        handle.remove()
    norms = sum(isinstance(module, GroupNorm) for module in vae.modules())
    part = split_frames(video, group, 4)
    with counted_bytes() as sent:
        vae.context_parallel(group)(part, sample=False)
    return sent, sum(halo), norms


@pytest.mark.parametrize('scope', ['clip', 'frame'])
@pytest.mark.parametrize('size', [2, 3])
def test_only_borrowed_frames_and_norm_statistics_travel(workers, size, scope):
    batch, groups, number = 2, 2, 4
    for rank, (sent, halo, norms) in enumerate(workers.run(bytes_sent, size, scope)[:size]):
        statistics = norms * 2 * batch * groups * number * (size - 1) if scope == 'clip' else 0
        assert sent.get('point to point', 0) == (halo if rank < size - 1 else 0)
        assert sent.get('statistics', 0) == statistics
        assert sent['shapes'] == 3 * 5 * 8 * (size - 1)        # five integers: forward, encode, decode
        assert set(sent) <= {'point to point', 'statistics', 'shapes'}


# ---- errors

def error_of(rank, size, function):
    if rank >= size:
        return None
    try:
        function(make_groups.by_size[size])
    except ValueError as error:
        return str(error)


def different_shapes(group):
    video = torch.rand(1, 3, [5, 4][group.rank()], 8, [8, 16][group.rank()])
    small_vae('clip', torch.float32).context_parallel(group).encode(video)


def too_many_processes(group):
    split_frames(torch.rand(1, 3, 5, 8, 8), group, 4)


def shares_off_the_grid(group):
    frames = [7, 10][group.rank()]
    small_vae('clip', torch.float32).context_parallel(group).encode(torch.rand(1, 3, frames, 8, 8))


@pytest.mark.parametrize('function, size, sentence', [
    (different_shapes, 2, 'parts of different clips'),
    (too_many_processes, 3, '2 latent frames cannot be shared by 3 processes'),
    (shares_off_the_grid, 2, r'hold [7, 10] frames'),
])
def test_what_a_caller_can_do_wrong_is_an_error_in_every_process(workers, function, size, sentence):
    for message in workers.run(error_of, size, function)[:size]:
        assert message is not None and sentence in message


def encode_while_another(rank, fate):
    vae = small_vae('clip', torch.float32).context_parallel(dist.group.WORLD)
    part = split_frames(video_and_weights(9, torch.float32)[0], dist.group.WORLD, 4)
    vae.encode(part)                            # the connection is up
    if rank == 1:
        if fate == 'dies':
            os._exit(1)
        time.sleep(8)
        return None
    start = time.time()
    try:
        with torch.no_grad():
            vae.encode(part)
    except RuntimeError as error:
        return str(error), time.time() - start


@pytest.mark.slow
@pytest.mark.parametrize('fate', ['dies', 'hangs'])
def test_a_process_that_is_gone_stops_the_others_with_its_name(fate):
    workers = Workers(2, timeout=3.)
    try:
        for rank in (0, 1):
            workers.pipes[rank].send((encode_while_another, (fate,)))
        assert workers.pipes[0].poll(40), 'the process that is left hangs'
        status, result = workers.pipes[0].recv()
        assert status == 'ok', result
        message, waited = result
        assert 'process 0 waited in vain for process 1 to exchange the shape of its frames' in message
        assert waited < 6.
    finally:
        workers.close()

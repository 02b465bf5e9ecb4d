"""Muon moves every direction of a matrix alike, in batches as alone, and stops and goes on exactly. Run: pytest tests/test_muon.py"""

import copy

import pytest
import torch
from test_trainer import assert_same_state, clips, make_trainer  # noqa: F401, clips is a fixture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from video_diffusion import GaussianDiffusion, Unet3D, WordEncoder, checkpoint
from video_diffusion.training.muon import MATRICES, Muon, orthogonal, split
from video_diffusion.vae.causal_vae import CausalVAE
from video_diffusion.vae.temporal_vae import TemporalVAE


@pytest.mark.parametrize('rows, columns', [(6, 20), (20, 6), (7, 7), (1, 5)])
def test_all_singular_values_come_near_one_and_directions_stay(rows, columns):
    matrix = torch.randn(1, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = u.mT @ torch.stack(orthogonal(matrix)) @ vh.mT                       # in the basis of the matrix's own directions
    assert torch.allclose(values, values.diagonal(dim1=-2, dim2=-1).diag_embed(), atol=1e-9)
    values = values.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min() and values.max() < 1.25


def test_gathered_factors_are_the_plain_iteration():
    """The five steps as the papers write them, each a product with the long matrix; float32, too."""
    matrix = torch.randn(3, 5, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = matrix / matrix.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(torch.stack(orthogonal(matrix)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.stack(orthogonal(matrix.float())), x.float(), rtol=0, atol=1e-4)


def test_a_batch_is_each_of_its_matrices_alone_and_nothing_stays_nothing():
    matrices = torch.randn(4, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-6, 1., 1e6, 0.], dtype=torch.float64)[:, None, None]
    others = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))       # of the same side
    matrices = [*matrices, *others, others[0, :1]]
    together, alone = orthogonal(matrices), [orthogonal([matrix])[0] for matrix in matrices]
    for one, other, matrix in zip(together, alone, matrices):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert one.shape == matrix.shape
    assert (alone[3] == 0).all()


def unfused(weight, grads, lr, momentum=0.95):
    """What Muon is to make of one weight, step by step."""
    weight, average = weight.clone(), torch.zeros_like(weight)
    for grad in grads:
        average = momentum * average + (1 - momentum) * grad
        update = orthogonal((momentum * average + (1 - momentum) * grad).flatten(1)[None])[0]
        weight = weight - lr * max(1, update.shape[0] / update.shape[1]) ** 0.5 * update.reshape(weight.shape)
    return weight


def test_steps_of_kernels_and_matrices_are_the_formula_and_of_the_rest_adams():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)
    shapes = [(6, 2, 3, 3), (6, 18), (6, 18), (3, 6, 1, 2, 2), (8, 3)]       # two kernels count as (6, 18) and (3, 24)
    matrices, others = [nn.Parameter(draw(*s)) for s in shapes], [nn.Parameter(draw(4)), nn.Parameter(draw(2, 3))]
    unused = nn.Parameter(draw(6, 18))                                       # gets no gradient
    before, reference = [w.detach().clone() for w in matrices], [nn.Parameter(w.detach().clone()) for w in others]
    adam = torch.optim.Adam(reference, lr=0.2)
    muon = Muon([*matrices, unused], others, lr=0.2, muon_lr=0.05)
    gradients = [[draw(*w.shape) for w in (*matrices, *others)] for _ in range(3)]
    for step, grads in enumerate(gradients):
        for weight, grad in zip((*matrices, *others, *reference), grads + grads[len(matrices):]):
            weight.grad = grad.clone()
        muon.step(), adam.step()
        assert all(torch.equal(w.grad, grad) for w, grad in zip(matrices, grads)), 'gradients are left as they were'
    for index, (weight, start) in enumerate(zip(matrices, before)):
        expected = unfused(start, [grads[index] for grads in gradients], 0.05)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)
    for weight, expected in zip(others, reference):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
    assert unused not in muon.state


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


def test_a_step_is_few_calls_however_many_matrices_there_are():
    """A GPU does each in microseconds, and Python needs tens of them to ask for it."""
    def calls(copies):
        matrices = [nn.Parameter(torch.randn(*shape)) for shape in [(4, 4), (4, 6), (9, 4), (4, 2, 3, 3)] * copies]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        muon = Muon(matrices, [], lr=1., muon_lr=0.01)
        muon.step()
        with Calls() as counted:
            muon.step()
        return counted.number
    assert calls(1) == calls(10) < 80


def test_without_matrices_it_is_adam():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    muon, adam = Muon([], weights[:1], lr=0.1, muon_lr=0.01), torch.optim.Adam(weights[1:], lr=0.1)
    for weight in weights:
        weight.grad = torch.arange(3.)
    muon.step(), adam.step()
    torch.testing.assert_close(*weights)


def test_a_schedule_that_halves_the_rate_halves_both():
    def moved(lr):
        matrix, other = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(3))
        muon = Muon([matrix], [other], lr=2e-3, muon_lr=0.01)
        for group in muon.param_groups:
            group['lr'] = lr                                                 # as the training loop does
        matrix.grad, other.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.ones(3)
        muon.step()
        return matrix.detach(), other.detach()
    for full, half in zip(moved(2e-3), moved(1e-3)):
        torch.testing.assert_close(half, full / 2)


def test_it_finds_the_bottom_of_a_narrow_valley():
    """A sum of squares that is 1000 times as steep in one direction as in another."""
    steep = torch.logspace(0, -1.5, 6)
    goal = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(6, 9))
    muon = Muon([weight], [], lr=1., muon_lr=1.)
    for step in range(200):
        (steep[:, None] * (weight - goal)).square().sum().backward()
        for group in muon.param_groups:
            group['lr'] = 0.2 * (1 - step / 200)
        muon.step(), muon.zero_grad()
    assert (weight - goal).abs().max() < 0.05


def test_which_weights_are_matrices():
    unet = Unet3D(8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=8, cond_dim=8)
    diffusion = GaussianDiffusion(unet, image_size=16, num_frames=2, timesteps=10, text_encoder=WordEncoder(8))
    unet.downs[0].block1.block1.conv.weight.requires_grad_(False)
    matrices, others = ({id(w) for w in part} for part in split(diffusion))
    names = {name for name, w in diffusion.named_parameters() if id(w) in matrices}
    rest = {name for name, w in diffusion.named_parameters() if id(w) in others}
    assert rest - {n for n in rest if n.endswith(('bias', 'gain', 'norm.weight'))} == {
        'denoise_fn.null_cond', 'denoise_fn.init_conv.weight', 'denoise_fn.time_bias.bias.weight',
        'denoise_fn.final_conv.weight', 'text_encoder.words.weight'}
    level = {'block1.to_scale_shift', 'block1.block2.conv', 'block1.block1.conv', 'block2.to_scale_shift', 'block2.block1.conv',
             'block2.block2.conv', 'spatial_attention.to_qkv', 'spatial_attention.to_out', 'temporal_attention.to_qkv',
             'temporal_attention.to_out'}
    assert {n for n in names if n.startswith('denoise_fn.downs.0.')} == {
        f'denoise_fn.downs.0.{n}.weight' for n in level - {'block1.block1.conv'}}      # frozen: in neither
    assert {'denoise_fn.time_mlp.1.weight', 'denoise_fn.downsamples.0.weight', 'denoise_fn.upsamples.0.weight',
            'denoise_fn.init_temporal_attention.to_qkv.weight', 'denoise_fn.mid_block1.block1.conv.weight',
            'denoise_fn.final_block.shortcut.weight'} <= names
    assert len(matrices) + len(others) == sum(w.requires_grad for w in diffusion.parameters())


def test_the_first_and_last_layers_of_both_vaes_are_adams():
    sizes = dict(dim=8, dim_mults=(1, 2), blocks_per_level=1, norm_groups=4)
    ends = {f'{part}.{end}' for part in ('encoder', 'decoder') for end in ('conv_in', 'conv_out')}
    for vae, more in ((CausalVAE(**sizes, time_compression=2), set()),
                      (TemporalVAE(**sizes), {'encoder.quant_conv', 'decoder.time_conv_out'})):
        others = {id(w) for w in split(vae)[1]}
        layers = {name for name, module in vae.named_modules() if isinstance(module, MATRICES) and id(module.weight) in others}
        assert {name.removesuffix('.conv') for name in layers} == ends | more
        assert id(vae.last_layer) in others


@pytest.mark.slow
@pytest.mark.parametrize('stop', [1, 2])
def test_resumed_equals_uninterrupted_to_the_last_bit(clips, tmp_path, stop):  # noqa: F811
    settings = dict(muon_lr=0.02, save_and_sample_every=1, train_num_steps=3)
    make_trainer(clips, tmp_path / 'whole', **settings).train()
    make_trainer(clips, tmp_path / 'parts', **{**settings, 'train_num_steps': stop}).train()
    rest = make_trainer(clips, tmp_path / 'parts', **settings)
    rest.load(-1)
    rest.train()
    whole, parts = (checkpoint.load(tmp_path / name / 'model-3.pt') for name in ('whole', 'parts'))
    assert any('momentum' in state for state in whole['optimizer']['state'].values())
    assert_same_state(whole, parts)


def test_a_run_that_goes_on_has_its_own_rates(clips, tmp_path):  # noqa: F811
    """Asked for another one, it does not take that of the checkpoint; what the optimizer remembers it takes."""
    make_trainer(clips, tmp_path, muon_lr=0.02, train_num_steps=1).train()
    rest, fresh = (make_trainer(clips, tmp_path, muon_lr=0.004) for _ in range(2))
    rest.load(-1)
    rates = [[{name: value for name, value in group.items() if isinstance(value, float)} for group in one.optimizer.param_groups]
             for one in (rest, fresh)]
    assert rates[0] == rates[1] and rest.optimizer.state and not fresh.optimizer.state


def test_a_scaler_skips_the_step_of_a_gradient_that_is_not_finite():
    weight, bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
    muon = Muon([weight], [bias], lr=0.1, muon_lr=0.1)
    scaler = torch.amp.GradScaler('cpu', enabled=True)
    for factor, moves in ((float('inf'), False), (1., True)):
        before = copy.deepcopy([weight.data, bias.data])
        scaler.scale((factor * weight.sum() + bias.sum())).backward()
        scaler.step(muon), scaler.update(), muon.zero_grad()
        assert [not torch.equal(a, b) for a, b in zip(before, [weight, bias])] == [moves, moves]


def test_settings_that_cannot_work_are_refused(clips, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match='muon_lr=0.*above 0'):
        make_trainer(clips, tmp_path, muon_lr=0.)
    make_trainer(clips, tmp_path, train_num_steps=1).train()
    with pytest.raises(ValueError, match='another optimizer'):
        make_trainer(clips, tmp_path, muon_lr=0.01).load(-1)

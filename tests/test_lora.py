"""LoRA: starts as nothing, trains nothing else, merges, is saved without its base. Run: pytest tests/test_lora.py"""

import copy
import os
import signal

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers
from test_latent import make as make_latent
from test_trainer import CPU, assert_same_state, clips, read_log, soften  # noqa: F401, clips is a fixture
from torch import nn

from video_diffusion import (
    GaussianDiffusion,
    SpatialTransformer,
    Trainer,
    Unet3D,
    WordEncoder,
    add_lora,
    checkpoint,
    load_lora,
    merge_lora,
    remove_lora,
    scale_lora,
    unmerge_lora,
)
from video_diffusion.distributed import Processes
from video_diffusion.networks.dit import DiT
from video_diffusion.networks.lora import lora_layers
from video_diffusion.training.lora_run import lora_config
from video_diffusion.training.shard import own

UNET = dict(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, cond_dim=6, text_tokens=True)


DIT = dict(dim=32, cond_dim=6, depth=2, dim_head=16, text_length=4)


class Words(nn.Module):
    """A network on a fixed step and caption, so that it can stand in a row with modules that have no use for them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, **more):
        return self.net(x, torch.tensor([1., 7.], dtype=x.dtype), cond=torch.ones(2, 3, 6, dtype=x.dtype), **more)


def build(kind, **settings):
    torch.manual_seed(0)
    if kind == 'transformer':
        model = SpatialTransformer(6, heads=2, dim_head=4, groups=3)
        return shake(model), torch.randn(2, 6, 3, 4, 5)
    net = DiT(**DIT, **settings) if kind == 'dit' else Unet3D(**UNET, **settings)
    return shake(Words(net)), torch.randn(2, 3, 5, 8, 12)


@torch.no_grad()
def shake(model, names=''):
    """Move all weights, or those whose names end so: what starts at zero would hide what comes before it."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(names):
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return model


def dense(layer):
    return layer.strength * layer.alpha / layer.rank * layer.lora_B @ layer.lora_A


# Layers

@pytest.mark.parametrize('kind', ['unet', 'dit', 'transformer'])
def test_a_new_adapter_changes_no_digit_and_a_trained_one_adds_its_product(kind):
    model, x = build(kind)
    model, x = model.double().requires_grad_(False), x.double()              # what need not learn, torch may compute otherwise
    before, plain = model(x), copy.deepcopy(model)
    add_lora(model, rank=3, alpha=2)
    assert torch.equal(model(x), before)
    shake(model, 'lora_B')
    for name, layer in lora_layers(model).items():
        plain.get_submodule(name).weight.data += dense(layer)
    assert (model(x) - before).abs().max() > 1e-3
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_frames_that_are_alone_get_the_adapter_too():
    """For these the U-Net asks a layer for a third of its rows."""
    model, x = build('unet')
    plain = copy.deepcopy(model)
    add_lora(model, rank=3)
    assert torch.allclose(model(x, prob_focus_present=1.), plain(x, prob_focus_present=1.), atol=1e-6)
    shake(model, 'lora_B')
    merged = copy.deepcopy(model)
    merge_lora(merged); remove_lora(merged)
    torch.testing.assert_close(model(x, prob_focus_present=1.), merged(x, prob_focus_present=1.), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('lean', [False, True])
@pytest.mark.parametrize('kind', ['unet', 'dit'])
def test_gradients_are_those_of_the_product_and_reach_nothing_else(kind, lean):
    model, x = build(kind, checkpoint_activations=lean)
    model, x = model.double(), x.double()
    add_lora(model, rank=3, alpha=5)
    shake(model, 'lora_B')
    full = copy.deepcopy(model)
    merge_lora(full); remove_lora(full)
    full.requires_grad_(True)
    model(x).square().sum().backward()
    full(x).square().sum().backward()
    for name, layer in lora_layers(model).items():
        gradient = full.get_submodule(name).weight.grad * layer.scale                # of the product B A
        torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.T @ gradient)
        torch.testing.assert_close(layer.lora_B.grad, gradient @ layer.lora_A.T)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {f'{name}.lora_{letter}' for name in lora_layers(model) for letter in 'AB'}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_merged_is_unmerged_and_taken_apart_it_is_the_base_to_the_last_bit(dtype):
    model, x = build('transformer')
    model, x = model.to(dtype), x.to(dtype)
    base = copy.deepcopy(model)
    add_lora(model, rank=3)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shake(model, 'lora_B')
    out = model(x)
    assert out.dtype == dtype
    merge_lora(model); merge_lora(model)                                              # once, however often
    torch.testing.assert_close(model(x), out, **(dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=.05, atol=.05)))
    unmerge_lora(model); unmerge_lora(model)
    assert torch.equal(model(x), out)
    remove_lora(model)
    assert str(model) == str(base)
    assert_same_state(model.state_dict(), base.state_dict())


def test_the_scale_goes_from_the_base_to_beyond_the_change_merged_or_not():
    model, x = build('transformer')
    before = model.requires_grad_(False)(x)
    add_lora(model, rank=3, alpha=6)
    assert {layer.scale for layer in lora_layers(model).values()} == {2.}
    shake(model, 'lora_B')
    whole = model(x)
    for strength in (0., 0.5, 1.5):
        scale_lora(model, strength)
        out = model(x)
        merge_lora(model)
        torch.testing.assert_close(model(x), out, rtol=1e-6, atol=1e-6)
        scale_lora(model, 1.)
        torch.testing.assert_close(model(x), whole, rtol=1e-6, atol=1e-6)
        unmerge_lora(model)
    scale_lora(model, 0.)
    assert torch.equal(model(x), before)


def test_merged_weights_move_with_their_base():
    model, _ = build('transformer')
    add_lora(model, rank=3)
    before = set(model.state_dict())
    merge_lora(model)
    assert set(model.state_dict()) == before
    scale_lora(model.double(), 0.5)
    assert {layer.unmerged.dtype for layer in lora_layers(model).values()} == {torch.float64}
    unmerge_lora(model)


def test_targets_choose_layers_and_a_wrong_one_is_told_what_there_is():
    model, _ = build('unet')
    add_lora(model, 2, targets=['mid_spatial_attention.to_out', 'time_mlp.1', 'to_q'])
    names = set(lora_layers(model))
    assert {'net.mid_spatial_attention.to_out', 'net.time_mlp.1'} < names
    assert {name.rpartition('.')[2] for name in names} == {'to_out', '1', 'to_q'}
    with pytest.raises(ValueError, match='has adapters already'):
        add_lora(model, 2)
    model, _ = build('unet')
    with pytest.raises(ValueError, match=r"targets=\['to_x'\]: no Linear of the Words is called so. It has time_mlp.1, time_mlp.3, "
                                         'to_kv, to_out, to_q, to_qkv, to_scale_shift, to_tokens.1'):
        add_lora(model, 2, targets=['to_q', 'to_x'])
    assert not lora_layers(model) and model.net.init_conv.weight.requires_grad
    with pytest.raises(ValueError, match='no Linear of the Conv3d is called so. It has none'):
        add_lora(nn.Conv3d(1, 1, 1), 2)
    with pytest.raises(ValueError, match='rank=0'):
        add_lora(model, 0)
    remove_lora(model)
    for given, says in ((dict(rank=1.5), 'rank=1.5: give 1 or more'), (dict(rank=2, targets='to_nowhere'), "targets=\\['to_nowhere'\\]")):
        with pytest.raises(ValueError, match=says):
            add_lora(model, **given)
    add_lora(model, 2, targets='to_q')
    with pytest.raises(ValueError, match='has adapters already: take them off with remove_lora'):
        add_lora(model, 2)


@pytest.mark.slow
def test_it_can_be_copied_and_compiled():
    model, x = build('transformer')
    add_lora(model, rank=3)
    shake(model, 'lora_B')
    twin = copy.deepcopy(model)
    assert_same_state(twin.state_dict(), model.state_dict())
    fused = torch.compile(twin, backend='eager', fullgraph=True)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-6, atol=1e-6)
    fused(x).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    scale_lora(twin, 0.5); scale_lora(model, 0.5)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-6, atol=1e-6)


# Training

def make_trainer(clips, results, *, kind='plain', rank=2, base=0, processes=CPU, learns_words=False, **settings):
    torch.manual_seed(base)
    if kind == 'latent':
        diffusion = make_latent(captions=True, told=0.5)
    else:
        net = (shake(DiT(32, 8, depth=2, dim_head=16, patch=4)) if kind == 'dit' else
               Unet3D(8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=8, cond_dim=8))
        diffusion = GaussianDiffusion(net, image_size=16, num_frames=2, timesteps=10, text_encoder=WordEncoder(8, buckets=50))
    if rank:
        torch.manual_seed(processes.rank)                    # where there are several, all are to begin with the main one's
        add_lora(diffusion, rank, alpha=3)
    if learns_words:
        diffusion.text_encoder.requires_grad_(True)
    defaults = dict(train_batch_size=4 // processes.world_size, gradient_accumulate_every=1, train_num_steps=6, train_lr=1e-2,
                    step_start_ema=2, update_ema_every=1, ema_decay=0.5, save_and_sample_every=3, num_sample_rows=1, sample_steps=2,
                    log_every=1, max_grad_norm=1.)
    return Trainer(diffusion, clips, results_folder=results, processes=processes, **{**defaults, **settings})


def samples(diffusion):
    return diffusion.sample(['a red circle'], seed=3, steps=3, progress=False)


@pytest.fixture(scope='module')
def run(clips, tmp_path_factory):
    """A run that nothing interrupted, and its trainer."""
    results = tmp_path_factory.mktemp('run')
    trainer = make_trainer(clips, results)
    trainer.train()
    return trainer, results


def test_a_checkpoint_holds_adapters_average_and_moments_and_no_base(run):
    trainer, results = run
    state = checkpoint.load(checkpoint.newest(results))
    names = [f'denoise_fn.{name}.lora_{letter}' for name in lora_layers(trainer.diffusion) for letter in 'AB']
    assert list(state['model']) == list(state['ema']['average']) == names
    assert len(state['optimizer']['state']) == len(names)
    numbers = sum(weight.numel() for weight in state['model'].values())
    assert numbers < 0.1 * sum(p.numel() for p in trainer.diffusion.parameters())
    size = checkpoint.newest(results).stat().st_size
    assert size < 4 * 4 * numbers + 1000 * 4 * len(names)                 # four tensors of float32 each, and their names
    assert all(not torch.equal(weight, torch.zeros(())) for name, weight in state['model'].items())


@pytest.mark.slow
@pytest.mark.parametrize('kind, stop', [('plain', 1), ('dit', 2), ('latent', 3)])
def test_resumed_equals_uninterrupted_to_the_last_bit(clips, tmp_path, kind, stop):
    whole = make_trainer(clips, tmp_path / 'whole', kind=kind)
    before = copy.deepcopy(whole.diffusion.state_dict())
    whole.train()
    first = make_trainer(clips, tmp_path / 'parts', kind=kind)
    first.train(log_fn=lambda log: log['step'] == stop and 'loss' in log and os.kill(os.getpid(), signal.SIGTERM))
    assert first.step < 6
    torch.manual_seed(123)
    second = make_trainer(clips, tmp_path / 'parts', kind=kind)
    second.load(-1)
    second.train()
    assert_same_state(second.state_dict(), whole.state_dict())
    assert_same_state(second.diffusion.state_dict(), whole.diffusion.state_dict())
    assert read_log(tmp_path / 'parts') == read_log(tmp_path / 'whole')
    changed = {name for name, weight in whole.diffusion.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed - {'scale'} == {name for name, p in whole.diffusion.named_parameters() if p.requires_grad}


def test_a_run_may_be_told_to_be_less_strict(run, clips):
    trainer, results = run
    again = make_trainer(clips, results)
    again.load(-1, strict=False)
    assert_same_state(again.state_dict(), trainer.state_dict())


def test_muon_takes_adapters_for_matrices_and_goes_on_as_if_it_had_not_stopped(clips, tmp_path):
    whole = make_trainer(clips, tmp_path / 'whole', muon_lr=0.01, train_num_steps=3)
    assert [len(group['params']) for group in whole.optimizer.param_groups] == [0, 2 * len(lora_layers(whole.diffusion))]
    whole.train()
    make_trainer(clips, tmp_path / 'parts', muon_lr=0.01, train_num_steps=2).train()
    second = make_trainer(clips, tmp_path / 'parts', muon_lr=0.01, train_num_steps=3)
    second.load(-1)
    second.train()
    assert_same_state(second.state_dict(), whole.state_dict())


def test_adapters_are_put_into_their_base_as_their_average(run, clips, tmp_path):
    trainer, results = run
    base = make_trainer(clips, tmp_path, rank=0).diffusion
    plain = samples(base)
    with trainer.ema.average_parameters():
        expected = samples(trainer.diffusion)
    other = copy.deepcopy(base)
    load_lora(base, results)
    assert torch.equal(samples(base), expected) and not torch.equal(expected, plain)
    load_lora(other, results / 'model-2.pt', scale=0.)
    assert torch.equal(samples(other), plain)


def test_words_may_learn_beside_them(clips, tmp_path):
    """Whatever learns is saved and put back, and does not count as base."""
    trainer = make_trainer(clips, tmp_path, learns_words=True, train_num_steps=2)
    trainer.train()
    again = make_trainer(clips, tmp_path, learns_words=True)
    again.load(-1)
    assert torch.equal(again.diffusion.text_encoder.words.weight, trainer.diffusion.text_encoder.words.weight)
    base = make_trainer(clips, tmp_path, rank=0).diffusion
    assert lora_config(trainer.diffusion) == trainer.lora
    load_lora(base, tmp_path)
    assert torch.equal(base.text_encoder.words.weight, trainer.ema.average['text_encoder.words.weight'])


def test_the_base_may_be_held_in_another_precision_but_is_no_other(run, clips, tmp_path):
    _, results = run
    shorter = make_trainer(clips, tmp_path, rank=0).diffusion
    shorter.denoise_fn.bfloat16()
    load_lora(shorter, results)
    other = make_trainer(clips, tmp_path, rank=0, base=1).diffusion
    with pytest.raises(ValueError, match='were trained beside a base with the fingerprint .* give the very weights'):
        load_lora(other, results)
    assert not lora_layers(other)
    with pytest.raises(ValueError, match='were trained beside a base with the fingerprint'):
        make_trainer(clips, results, base=1).load(-1)
    other = make_trainer(clips, tmp_path, rank=0).diffusion
    with torch.no_grad():
        other.text_encoder.words.weight[7, 3] += 1                                    # one number is enough
    with pytest.raises(ValueError, match='were trained beside a base with the fingerprint'):
        load_lora(other, results)


def test_what_is_not_of_this_run_is_refused_in_a_sentence(run, clips, tmp_path):
    _, results = run
    with pytest.raises(ValueError, match=r'other adapters than these: 22 of \(rank, alpha\) = \(2, 3\), and not 22 of .* = \(4, 3\)'):
        make_trainer(clips, results, rank=4).load(-1)
    with pytest.raises(ValueError, match='holds adapters, and this model has none: call add_lora'):
        make_trainer(clips, results, rank=0).load(-1)
    with pytest.raises(ValueError, match='holds adapters and not the model that they were trained beside'):
        GaussianDiffusion.from_checkpoint(results)
    make_trainer(clips, tmp_path, rank=0, train_num_steps=1).train()
    with pytest.raises(ValueError, match='holds a whole model, and this run trains adapters beside one'):
        make_trainer(clips, tmp_path).load(-1)
    with pytest.raises(ValueError, match='holds a whole model and no adapters: draw from it as it is'):
        load_lora(make_trainer(clips, tmp_path, rank=0).diffusion, tmp_path)
    merged = make_trainer(clips, tmp_path).diffusion
    merge_lora(merged)
    with pytest.raises(ValueError, match='merged do not learn: call unmerge_lora'):
        Trainer(merged, clips, results_folder=tmp_path, processes=CPU)


# Several processes

def train_in_group(rank, number, clips, results, shard):
    """In each of the processes; how many numbers of the adapters this one holds at the end."""
    processes = Processes(rank, number, torch.device('cpu'), dist.new_group(backend='gloo'))
    trainer = soften(make_trainer(clips, results, processes=processes, shard=shard, train_num_steps=3))
    trainer.train()
    return sum(own(weight).numel() for weight in trainer.parts['model'].parameters())


@pytest.mark.slow
def test_two_processes_train_like_one_whole_or_sharded(clips, tmp_path):
    one = soften(make_trainer(clips, tmp_path / 'one', train_num_steps=3))
    one.train()
    everything = sum(weight.numel() for weight in one.parts['model'].parameters())
    workers = Workers(2)
    for shard, share in ((False, 1), (True, 0.5)):
        results = tmp_path / f'two-{shard}'
        for held in workers.run(train_in_group, 2, clips, results, shard):
            assert held == pytest.approx(share * everything, rel=0.02)
        state = checkpoint.load(checkpoint.newest(results))
        for part in ('model', 'ema', 'optimizer'):
            assert_same_state(state[part], one.state_dict()[part], tolerance=1e-5)
        load_lora(make_trainer(clips, tmp_path, rank=0).diffusion, results)
    workers.close()

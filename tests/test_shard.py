"""Sharded over processes a model trains, stops, goes on and draws as it does whole. Run: pytest tests/test_shard.py"""

import os
import tempfile
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers
from test_latent import make as make_latent
from test_trainer import CPU, assert_same_state, clips, read_log, soften  # noqa: F401, clips is a fixture

from video_diffusion import DiT, GaussianDiffusion, Trainer, Unet3D, WordEncoder, checkpoint, gif_to_tensor
from video_diffusion.distributed import Processes
from video_diffusion.training.shard import own


def build(kind, seed=0):
    torch.manual_seed(seed)
    if kind == 'latent':
        return make_latent(captions=True, told=0.5)
    if kind == 'dit':
        dit = DiT(32, 8, dim_head=16, depth=2, patch=4, text_length=12, checkpoint_activations=True)
        return GaussianDiffusion(dit, image_size=16, num_frames=2, timesteps=10, text_encoder=WordEncoder(8))
    words, levels = kind == 'words', kind == 'levels'
    mults = (1,) if words or levels else (1, 2)              # a weight in shards takes its time, be it ever so small
    unet = Unet3D(8, dim_mults=mults, attn_heads=1, attn_dim_head=8, cond_dim=8, text_tokens=words, checkpoint_activations=words)
    return GaussianDiffusion(unet, image_size=16, num_frames=2, timesteps=10, text_encoder=WordEncoder(8),
                             frame_noise='independent' if levels else 'shared')


def make_trainer(clips, results, processes=CPU, *, kind='plain', shard=False, steps=4, muon_lr=None):
    diffusion = build(kind, seed=processes.rank)             # all are to begin with the weights of the main process
    return soften(Trainer(
        diffusion, clips, train_batch_size=4 // processes.world_size, gradient_accumulate_every=2, train_num_steps=steps,
        train_lr=1e-3, step_start_ema=1, update_ema_every=1, ema_decay=0.5, max_grad_norm=0.1, save_and_sample_every=2,
        num_sample_rows=1, sample_steps=2, cond_scale=2., log_every=2, results_folder=results, processes=processes, shard=shard,
        muon_lr=muon_lr))


def train(processes, clips, results, settings):
    """Train; the shares of all weights, averages and moments that this process holds at the end."""
    resume = settings.pop('resume', False)
    trainer = make_trainer(clips, results, processes, **settings)
    if resume:
        trainer.load(-1)
    trainer.train()
    states = [state for state in trainer.optimizer.state.values() if 'exp_avg' in state]
    momenta = [state['momentum'] for state in trainer.optimizer.state.values() if 'momentum' in state]
    shares = []
    for tensors in (trainer.optimizer.param_groups[0]['params'], trainer.ema.average.values(),
                    [state['exp_avg'] for state in states] + momenta, [state['exp_avg_sq'] for state in states]):
        held = [own(tensor).untyped_storage() for tensor in tensors]                      # all that a view keeps alive, too
        shares.append(sum(storage.nbytes() for storage in held) / sum(4 * tensor.numel() for tensor in tensors))
    return shares


def in_group(rank, world_size, store, function, *args):
    """In a worker: the first `world_size` of them form a group and call function(processes, *args)."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank >= world_size:
        return None
    patience = timedelta(seconds=60)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world_size, timeout=patience)
    return function(Processes(rank, world_size, torch.device('cpu'), dist.new_group(backend='gloo', timeout=patience)), *args)


@pytest.fixture(scope='module')
def run_on():
    """run_on(4, function, *args): what it returns in each of 4 processes, or in this one alone."""
    workers = Workers(4)

    def run_on(world_size, function, *args):
        if world_size == 1:
            return [function(CPU, *args)]
        store = os.path.join(tempfile.mkdtemp(), 'store')
        return workers.run(in_group, world_size, store, function, *args)[:world_size]
    yield run_on
    workers.close()


@pytest.fixture(scope='module')
def train_on(run_on, clips):
    return lambda world_size, results, **settings: run_on(world_size, train, clips, results, settings)


@pytest.fixture(scope='module')
def whole(train_on, tmp_path_factory):
    """The run of one process that nothing interrupted."""
    results = tmp_path_factory.mktemp('whole')
    train_on(1, results)
    return results


def assert_same_run(one, other, tolerance=1e-5):
    """Weights, average, optimiser and log."""
    a, b = (checkpoint.load(checkpoint.newest(results)) for results in (one, other))
    assert a['step'] == b['step'] == 4
    for part in ('model', 'ema', 'optimizer'):
        assert_same_state(a[part], b[part], tolerance)
    for a, b in zip(read_log(one), read_log(other), strict=True):
        assert a[0] == b[0] and float(a[1]) == pytest.approx(float(b[1]), abs=1e-5)


@pytest.mark.slow
def test_sharded_training_is_training_and_each_process_holds_its_share(train_on, whole, tmp_path):
    for share in train_on(2, tmp_path, shard=True):
        assert share == pytest.approx([0.5] * 4, abs=0.02)   # a tensor may have an odd number of rows
    assert_same_run(whole, tmp_path)
    a, b = (gif_to_tensor(results / '2.gif') for results in (whole, tmp_path))
    assert ((a - b).abs() > 0.02).float().mean() < 0.01      # a palette can make much of rounding


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(train_on, whole, tmp_path):
    train_on(2, tmp_path, shard=True, steps=2)
    saved = (tmp_path / 'model-1.pt').read_bytes()
    for number, shard, share in ((1, False, 1), (1, True, 1), (4, True, 0.25)):
        results = tmp_path / f'{number}-{shard}'
        results.mkdir()
        (results / 'model-1.pt').write_bytes(saved)
        (results / 'log.csv').write_bytes((tmp_path / 'log.csv').read_bytes())
        for held in train_on(number, results, shard=shard, resume=True):
            assert held == pytest.approx([share] * 4, abs=0.03)
        assert_same_run(whole, results)


@pytest.mark.slow
def test_a_run_that_was_whole_goes_on_sharded_and_is_sampled_from(train_on, whole, tmp_path):
    train_on(1, tmp_path, steps=2)
    train_on(2, tmp_path, shard=True, resume=True)
    assert_same_run(whole, tmp_path)
    a, b = (GaussianDiffusion.from_checkpoint(results).sample(['a red circle'], seed=3, steps=3, progress=False)
            for results in (whole, tmp_path))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['words', 'levels', 'latent', 'dit'])
def test_every_kind_of_model_can_be_sharded(train_on, tmp_path, kind):
    """One whose text encoder is asked for tokens and whose blocks are computed twice; one with a VAE that is frozen; a transformer."""
    train_on(1, tmp_path / 'whole', kind=kind)
    train_on(2, tmp_path / 'shards', kind=kind, shard=True)
    assert_same_run(tmp_path / 'whole', tmp_path / 'shards')


def save_what_is_broken_in_the_last_process(processes, clips, results):
    trainer = make_trainer(clips, results, processes, shard=True)
    if processes.rank == 1:
        with torch.no_grad():
            trainer.diffusion.denoise_fn.final_block.block1.conv.weight.to_local().fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='weights are not finite'):
        trainer.save(1)


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_stops_all(run_on, clips, tmp_path):
    run_on(2, save_what_is_broken_in_the_last_process, clips, tmp_path)
    assert not list(tmp_path.glob('*.pt'))


def test_fusing_and_sharding_are_not_for_one_run(clips, tmp_path):
    with pytest.raises(ValueError, match='shard=True borrows weights .* leave out one'):
        Trainer(build('plain'), clips, results_folder=tmp_path, shard=True, compile=True, processes=CPU)


@pytest.mark.slow
def test_muon_makes_of_shares_the_step_that_it_makes_of_the_whole(train_on, tmp_path):
    train_on(1, tmp_path / 'whole', muon_lr=0.01)
    train_on(2, tmp_path / 'shards', muon_lr=0.01, shard=True, steps=2)
    for share in train_on(2, tmp_path / 'shards', muon_lr=0.01, shard=True, resume=True):
        assert share == pytest.approx([0.5] * 4, abs=0.05)
    assert_same_run(tmp_path / 'whole', tmp_path / 'shards', tolerance=1e-4)     # it makes weak directions, and their rounding, strong

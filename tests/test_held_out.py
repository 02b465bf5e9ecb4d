"""Clips that are held out are measured per noise level, and nothing else changes. Run: pytest tests/test_held_out.py"""

import csv
import os
import shutil
import signal

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers
from test_latent import make as make_latent
from test_trainer import CPU, assert_same_state, clips, make_trainer  # noqa: F401, clips is a fixture

from video_diffusion import Trainer, checkpoint, gif_to_tensor, shapes
from video_diffusion.distributed import Processes
from video_diffusion.training.held_out import COLUMNS, LEVELS


def measured(results):
    with open(results / 'log.csv') as file:
        return {row['step']: [float(row[name]) for name in COLUMNS] for row in csv.DictReader(file) if row[COLUMNS[0]]}


@pytest.fixture(scope='module')
def run(clips, tmp_path_factory):
    results = tmp_path_factory.mktemp('run')
    trainer = make_trainer(clips, results, held_out=3)
    trainer.train()
    return trainer, results


@pytest.mark.slow
def test_training_is_that_on_the_other_clips_to_the_last_bit(run, clips, tmp_path):
    trainer, _ = run
    others = shutil.copytree(clips, tmp_path / 'others')
    for path in trainer.held_out.paths:
        (others / path.name).unlink()
        (others / path.name).with_suffix('.txt').unlink()
    plain = make_trainer(others, tmp_path / 'plain')
    plain.train()
    ours, theirs = trainer.state_dict(), plain.state_dict()
    assert ours['config'].pop('held_out') == 3 and 'held_out' not in theirs['config']
    assert_same_state(ours, theirs)


def test_the_numbers_are_the_losses_of_the_averaged_model(run, clips, monkeypatch):
    trainer, results = run
    found, diffusion = measured(results), trainer.diffusion
    assert list(found) == ['3', '6'] and found['3'] != found['6']
    monkeypatch.setattr('video_diffusion.training.held_out.seeded_generator',
                        lambda *key, device: torch.Generator().manual_seed(key[-1]))
    noises = [torch.randn(1, 3, 2, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    total = torch.zeros(5)
    with trainer.ema.average_parameters(), torch.no_grad():
        for path, noise in zip(trainer.held_out.paths, noises):
            x = 2 * gif_to_tensor(path)[None] - 1
            caption = path.with_suffix('.txt').read_text().strip()
            for i, level in enumerate(LEVELS):
                t = torch.tensor([int(level * 10)])
                answer = diffusion.denoise_fn(diffusion.q_sample(x, t, noise), t, cond=diffusion.embed([caption]))
                total[i] += (answer - noise).abs().mean() / 3
    numbers = trainer.measure()
    assert list(numbers) == list(COLUMNS) == [f'held_out_{level}' for level in LEVELS]
    torch.testing.assert_close(torch.tensor(list(numbers.values())), total)
    assert len({round(number, 4) for number in numbers.values()}) == 5


@pytest.mark.slow
def test_it_is_measured_again_to_the_last_bit_after_a_stop(run, clips, tmp_path):
    whole, results = run
    first = make_trainer(clips, tmp_path, held_out=3)
    first.train(log_fn=lambda log: log['step'] == 4 and os.kill(os.getpid(), signal.SIGTERM))
    assert first.step < 6
    torch.manual_seed(123)
    second = make_trainer(clips, tmp_path, held_out=3)
    second.load(-1)
    second.train()
    assert_same_state(second.state_dict(), whole.state_dict())
    assert measured(tmp_path) == measured(results)


def test_another_number_of_them_is_refused(run, clips):
    _, results = run
    for number, says in ((0, 'held 3 clips out, this run 0'), (2, 'held 3 clips out, this run 2')):
        with pytest.raises(ValueError, match=says):
            make_trainer(clips, results, held_out=number).load(-1)
    with pytest.raises(ValueError, match='cannot hold out 12 of 12 clips'):
        make_trainer(clips, results, held_out=12)
    assert checkpoint.load_run(results)['config']['held_out'] == 3


@pytest.mark.slow
@pytest.mark.parametrize('told', [0., 0.5])
def test_in_latents_from_the_disk_or_not(tmp_path, told):
    folder = shapes.make_shapes(tmp_path / 'clips', 6, image_size=16, num_frames=5)
    numbers = []
    for cache in (None, tmp_path / 'latents'):
        diffusion = make_latent(told=told, scale=1.5)
        trainer = Trainer(diffusion, folder, held_out=2, latent_cache=cache, results_folder=tmp_path, processes=CPU)
        assert len(trainer.dataset) == 4 and len(trainer.held_out) == 2
        numbers.append(torch.tensor(list(trainer.measure().values())))
        assert numbers[-1].tolist() == list(trainer.measure().values())
    if told:                                             # the noise in a first frame from the disk is another
        assert not torch.equal(*numbers)
    torch.testing.assert_close(*numbers, rtol=0.05 if told else 1e-5, atol=0)


def measure_in_group(rank, number, clips, results, shard):
    processes = Processes(rank, number, torch.device('cpu'), dist.new_group(backend='gloo'))
    return list(make_trainer(clips, results, held_out=3, processes=processes, shard=shard).measure().values())


@pytest.mark.slow
def test_processes_share_them_out(clips, tmp_path):
    expected = list(make_trainer(clips, tmp_path, held_out=3).measure().values())
    workers = Workers(2)
    for shard in (False, True):                          # three clips for two: one of them asks for one twice
        for numbers in workers.run(measure_in_group, 2, clips, tmp_path, shard):
            assert numbers == pytest.approx(expected, rel=1e-5)
    workers.close()

"""The training loop: exact resume, kills, signals, full disks, several processes. Run: pytest tests/test_trainer.py"""

import csv
import os
import pickle
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
import together
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from video_diffusion import GaussianDiffusion, Trainer, Unet3D, WordEncoder, checkpoint, gif_to_tensor, lr_schedule, shapes
from video_diffusion.distributed import Processes
from video_diffusion.training.ema import EMA
from video_diffusion.training.interrupt import StopRequest
from video_diffusion.training.precision import amp_dtype

HERE = Path(__file__).parent
CPU = Processes(device=torch.device('cpu'))


@pytest.fixture(scope='session')
def clips(tmp_path_factory):
    return shapes.make_shapes(tmp_path_factory.mktemp('clips'), 12, image_size=16, num_frames=2)


def make_trainer(clips, results, *, captions=True, diffusion=(), **kwargs):
    torch.manual_seed(0)
    encoder = WordEncoder(8) if captions else None
    unet = Unet3D(8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=8, cond_dim=8 if captions else None)
    diffusion = GaussianDiffusion(unet, image_size=16, num_frames=2, timesteps=10, text_encoder=encoder, **dict(diffusion))
    settings = dict(train_batch_size=2, train_num_steps=6, train_lr=1e-3, step_start_ema=2, update_ema_every=1,
                    save_and_sample_every=3, num_sample_rows=2, sample_steps=2, log_every=2, processes=CPU)
    return Trainer(diffusion, clips, results_folder=results, **{**settings, **kwargs})


def soften(trainer):
    """Adam divides a gradient by its own size, and so makes a full step of what is only rounding (the gradient of a bias
    before a norm is zero). To compare two ways of summing a gradient, let small ones stay small."""
    trainer.optimizer.param_groups[0]['eps'] = 1e-3
    return trainer


def read_log(results):
    with open(results / 'log.csv') as file:
        return [(row['step'], row['loss'], row['lr']) for row in csv.DictReader(file)]


def assert_same_state(a, b, tolerance=None):
    """Two checkpoints hold the same numbers; `seconds`, the time it took, aside."""
    def compare(x, y, name):
        if isinstance(x, dict):
            assert x.keys() == y.keys(), name
            for key in x:
                compare(x[key], y[key], f'{name}.{key}')
        elif isinstance(x, torch.Tensor):
            if tolerance is None:
                assert torch.equal(x, y), name
            else:
                torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m: f'{name}: {m}')
        elif name != '.seconds':
            assert x == y, name
    compare(a, b, '')


# What a run leaves behind

def test_a_run_leaves_checkpoints_samples_and_a_log(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, lr_schedule=lr_schedule.warmup_cosine(6, 2))
    before = [p.clone() for p in trainer.diffusion.parameters()]
    logs = []
    trainer.train(log_fn=logs.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1.gif', '2.gif', 'log.csv', 'model-1.pt', 'model-2.pt', 'prompts.txt']
    assert gif_to_tensor(tmp_path / '2.gif').shape == (3, 2, 200, 200)  # 2 x 2 clips of 16 pixels, 6 times as large, 2 around each
    assert len((tmp_path / 'prompts.txt').read_text().splitlines()) == 4
    log = read_log(tmp_path)
    assert [int(step) for step, _, _ in log] == [1, 2, 3, 4, 5, 6]
    assert [float(lr) for _, _, lr in log] == pytest.approx([1e-3 * lr_schedule.warmup_cosine(6, 2)(s) for s in range(6)])
    assert [entry['step'] for entry in logs if 'loss' in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry['sample'] for entry in logs if 'sample' in entry] == [tmp_path / '1.gif', tmp_path / '2.gif']
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.diffusion.parameters()))


def test_the_last_step_is_saved_where_no_milestone_falls(clips, tmp_path):
    make_trainer(clips, tmp_path, train_num_steps=4).train()
    assert checkpoint.load(checkpoint.newest(tmp_path))['step'] == 4


def test_the_model_is_rebuilt_from_the_checkpoint_alone_with_averaged_weights(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, train_num_steps=3, ema_decay=0.5)
    trainer.train()
    model = GaussianDiffusion.from_checkpoint(tmp_path)
    with trainer.ema.average_parameters():
        expected = trainer.diffusion.sample(['a red circle'], seed=3, steps=3, progress=False)
    assert torch.equal(model.sample(['a red circle'], seed=3, steps=3, progress=False), expected)
    other = trainer.diffusion.sample(['a red circle'], seed=3, steps=3, progress=False)
    assert not torch.equal(other, expected)


def test_an_unconditional_model_ignores_captions(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, captions=False, train_num_steps=1)
    trainer.train()
    assert not (tmp_path / 'prompts.txt').exists()


def test_every_setting_of_the_public_package_is_understood(clips, tmp_path):
    """The call that its README shows, with other numbers."""
    unet = Unet3D(8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=8)
    diffusion = GaussianDiffusion(unet, image_size=16, num_frames=2, timesteps=3, loss_type='l1')
    trainer = Trainer(diffusion, str(clips), train_batch_size=2, train_lr=1e-4, save_and_sample_every=2, train_num_steps=2,
                      gradient_accumulate_every=2, ema_decay=0.995, amp=False, num_frames=2, num_sample_rows=1,
                      max_grad_norm=1., results_folder=str(tmp_path), step_start_ema=2000, update_ema_every=10)
    trainer.train(prob_focus_present=0.5, focus_present_mask=None, log_fn=lambda log: None)
    assert (tmp_path / 'model-1.pt').exists()


def test_gradient_accumulation_is_one_larger_batch(clips, tmp_path):
    one = soften(make_trainer(clips, tmp_path / 'a', train_batch_size=4, gradient_accumulate_every=1))
    two = soften(make_trainer(clips, tmp_path / 'b', train_batch_size=2, gradient_accumulate_every=2))
    noise = torch.randn(4, 3, 2, 16, 16)
    for trainer in (one, two):  # the same noise however the batch is cut
        size = trainer.batch_size
        trainer.draw = lambda n, count, prob, size=size: dict(
            t=torch.tensor([1, 5, 8, 9]).split(size)[n % (4 // size)], noise=noise.split(size)[n % (4 // size)])
        trainer.train_num_steps = 1
        trainer.train()
    assert_same_state(one.diffusion.state_dict(), two.diffusion.state_dict(), tolerance=1e-5)


def test_steps_are_spread_evenly_and_uniform_on_average(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path)
    draws = torch.stack([trainer.draw(n, 5, 0.)['t'] for n in range(400)])
    assert (draws.sort(dim=1).values.diff() == 2).all()  # 5 of 10 steps: every second one
    counts = draws.flatten().bincount(minlength=10) / draws.numel()
    assert (counts - 0.1).abs().max() < 0.02


# Going on

@pytest.mark.slow
@pytest.mark.parametrize('stop', [1, 3, 4])
def test_resumed_equals_uninterrupted_to_the_last_bit(clips, tmp_path, stop):
    kwargs = dict(max_grad_norm=1., ema_warmup=True, horizontal_flip=True, diffusion=dict(
        objective='v', loss_type='l2', schedule='linear', zero_snr=True, min_snr_gamma=5., offset_noise=0.1))
    whole = make_trainer(clips, tmp_path / 'whole', **kwargs)
    whole.train(prob_focus_present=0.3)

    first = make_trainer(clips, tmp_path / 'parts', **kwargs)
    def interrupt(log):
        if log['step'] == stop and 'loss' in log:
            os.kill(os.getpid(), signal.SIGTERM)
    first.log_every = 1
    first.train(prob_focus_present=0.3, log_fn=interrupt)
    assert first.step < 6
    torch.manual_seed(123)  # a global random state that differs must not matter
    second = make_trainer(clips, tmp_path / 'parts', **kwargs)
    second.load(-1)
    assert second.step == first.step
    second.train(prob_focus_present=0.3)
    assert_same_state(second.state_dict(), whole.state_dict())
    assert read_log(tmp_path / 'parts') == read_log(tmp_path / 'whole')


def test_a_checkpoint_from_before_a_setting_existed_goes_on(clips, tmp_path):
    make_trainer(clips, tmp_path, train_num_steps=3).train()
    path = checkpoint.newest(tmp_path)
    state = checkpoint.load(path)
    for name in ('schedule', 'zero_snr', 'min_snr_gamma', 'offset_noise'):
        del state['config']['diffusion'][name]
    checkpoint.save(state, path)
    trainer = make_trainer(clips, tmp_path)
    trainer.load(-1)
    assert trainer.step == 3
    with pytest.raises(ValueError, match='other settings than this model'):
        make_trainer(clips, tmp_path, diffusion=dict(offset_noise=0.1)).load(-1)


def test_loading_refuses_a_checkpoint_of_another_model(clips, tmp_path):
    make_trainer(clips, tmp_path, train_num_steps=1).train()
    other = make_trainer(clips, tmp_path, captions=False)
    with pytest.raises(ValueError, match='made with other settings'):
        other.load(-1)
    with pytest.raises(FileNotFoundError, match='model-7.pt'):
        other.load(7)


# Stopping

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends_cleanly(clips, tmp_path, number):
    before = signal.getsignal(number)
    trainer = make_trainer(clips, tmp_path, train_num_steps=1000, save_and_sample_every=1000, log_every=1)
    trainer.train(log_fn=lambda log: log['step'] == 2 and os.kill(os.getpid(), number))
    assert 0 < trainer.step < 10
    assert checkpoint.load(tmp_path / 'model-1.pt')['step'] == trainer.step
    assert signal.getsignal(number) == before


def test_a_second_signal_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                assert stop.requested
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('poisoned, complaint, last_good', [(4, 'loss of step 5 is nan', 3), (3, 'weights .* step 3', None)])
def test_what_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(clips, tmp_path, poisoned, complaint, last_good):
    trainer = make_trainer(clips, tmp_path, train_num_steps=9, log_every=1)
    look = trainer.log

    def look_and_poison(*args, **kwargs):                                   # after the loss was seen, before anything is saved
        rows = look(*args, **kwargs)
        if trainer.step == poisoned:
            with torch.no_grad():
                next(trainer.diffusion.parameters()).fill_(float('nan'))
        return rows
    trainer.log = look_and_poison
    with pytest.raises(FloatingPointError, match=complaint):
        trainer.train()
    saved = [checkpoint.load(path)['step'] for path in checkpoint.milestones(tmp_path).values()]
    assert saved == ([last_good] if last_good else [])


# Checkpoints

def test_a_full_disk_is_a_clear_error_and_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / 'model-1.pt'
    checkpoint.save({'weights': torch.zeros(10)}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a "disk" of 100 kB
    try:
        with pytest.raises(OSError, match='cannot save the checkpoint .*model-1.pt, the previous one is intact'):
            checkpoint.save({'weights': torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(checkpoint.load(path)['weights'], torch.zeros(10))
    assert [p.name for p in tmp_path.iterdir()] == ['model-1.pt']


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/was_here',)
    torch.save({'model': Malicious()}, tmp_path / 'zip.pt')
    (tmp_path / 'pickle.pt').write_bytes(pickle.dumps(Malicious()))
    for name in ('zip.pt', 'pickle.pt'):
        with pytest.raises(ValueError, match=f'{name} is refused.*could run code'):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / 'was_here').exists()


def test_what_is_no_checkpoint_is_said_so(tmp_path):
    (tmp_path / 'empty.pt').touch()
    checkpoint.save({'weights': torch.zeros(1000)}, tmp_path / 'whole.pt')
    (tmp_path / 'half.pt').write_bytes((tmp_path / 'whole.pt').read_bytes()[:2000])
    torch.save({'model': {}}, tmp_path / 'model-1.pt')
    for name in ('empty.pt', 'half.pt'):
        with pytest.raises(ValueError, match=name):
            checkpoint.load(tmp_path / name)
    with pytest.raises(ValueError, match='not written by this library'):
        GaussianDiffusion.from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match='no checkpoint in'):
        checkpoint.newest(tmp_path / 'nowhere')


def test_milestones_are_numbers_not_strings(tmp_path):
    for name in ('model-2.pt', 'model-10.pt', 'model-x.pt', 'model-11.pt.tmp'):
        (tmp_path / name).touch()
    assert list(checkpoint.milestones(tmp_path)) == [2, 10]
    assert checkpoint.newest(tmp_path).name == 'model-10.pt'


@pytest.mark.slow
@pytest.mark.parametrize('first, then, names', [(2, 8, {1: 2, 2: 4, 3: 6, 4: 8, 5: 16}), (8, 2, {1: 8, 2: 10, 3: 12}), (4, 4, {1: 4, 2: 8, 3: 12}),
                                                (5, 3, {1: 5, 2: 8, 3: 9, 4: 12, 5: 13})])
def test_milestones_go_on_rising_when_a_run_goes_on_in_other_steps(clips, tmp_path, first, then, names):
    """"Newest" is the highest number: with numbers counted anew, it would be an old checkpoint."""
    make_trainer(clips, tmp_path, train_num_steps=8, save_and_sample_every=first).train()
    trainer = make_trainer(clips, tmp_path, train_num_steps=max(names.values()), save_and_sample_every=then)
    trainer.load(-1)
    assert trainer.step == 8 and trainer.milestone() == len([step for step in names.values() if step <= 8])
    trainer.train()
    assert {number: checkpoint.load(path)['step'] for number, path in checkpoint.milestones(tmp_path).items()} == names
    assert len(read_log(tmp_path)) == max(names.values())
    again = make_trainer(clips, tmp_path, save_and_sample_every=then)
    again.load(-1)
    assert again.milestone() == max(names)


@pytest.mark.parametrize('sampling, says', [
    (dict(sampler='dimm'), "sampler='dimm'"), (dict(sample_steps=11), 'steps=11'), (dict(sample_steps=0), 'steps=0'),
    (dict(cond_scale=float('inf')), 'cond_scale=inf')])
def test_settings_of_sampling_are_refused_before_training_not_at_the_first_milestone(clips, tmp_path, sampling, says):
    with pytest.raises(ValueError, match=says):
        make_trainer(clips, tmp_path, **sampling)


@pytest.mark.parametrize('setting', [
    dict(max_grad_norm=0), dict(max_grad_norm=-1.), dict(null_cond_prob=-1), dict(null_cond_prob=5), dict(null_cond_prob=float('nan')),
    dict(noise_bias=float('inf')), dict(noise_bias=float('nan')), dict(train_lr=float('nan')), dict(train_lr=-1.),
    dict(train_num_steps=0), dict(train_batch_size=-1), dict(seed=2 ** 64), dict(num_sample_rows=0), dict(ema_decay=1.)])
def test_nonsense_is_refused_and_named(clips, tmp_path, setting):
    with pytest.raises(ValueError, match=f'{next(iter(setting))}=.*: give'):
        make_trainer(clips, tmp_path, **setting)


@pytest.mark.parametrize('share', [-1, 2, float('nan')])
def test_a_share_of_clips_that_is_none_is_refused(clips, tmp_path, share):
    with pytest.raises(ValueError, match='prob_focus_present'):
        make_trainer(clips, tmp_path).train(prob_focus_present=share)


@pytest.mark.slow
def test_torch_compile_through_a_milestone(clips, tmp_path, monkeypatch):
    """Drawing and writing a GIF in between makes nothing compile again: one graph to train, and one each to sample with the
    caption and without it."""
    counter = CompileCounter()                                      # compiles nothing, but counts what it is given
    torch._dynamo.reset()
    monkeypatch.setattr(Unet3D, 'compile', lambda unet: torch.nn.Module.compile(unet, backend=counter))
    how = dict(train_num_steps=4, save_and_sample_every=2, num_sample_rows=1, cond_scale=2., gradient_accumulate_every=1)
    trainer = soften(make_trainer(clips, tmp_path, compile=True, **how))
    trainer.train()
    assert counter.frame_count == 3, f'{counter.frame_count} graphs'
    plain = soften(make_trainer(clips, tmp_path / 'plain', **how))
    plain.train()
    for a, b in zip(trainer.diffusion.parameters(), plain.diffusion.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


# Several processes

TWO = """
import sys; sys.path[:0] = [{here!r}, {root!r}]
from datetime import timedelta
from pathlib import Path
import torch; torch.set_num_threads(1)
from test_trainer import make_trainer, soften
from video_diffusion import distributed
processes = distributed.init(timeout=timedelta(seconds=60), device='cpu')
trainer = soften(make_trainer({clips!r}, Path({results!r}), train_batch_size={batch}, processes=processes, max_grad_norm=1.))
trainer.train(prob_focus_present=0.5)
distributed.close()
"""


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(clips, tmp_path):
    def code(name, batch):
        path = tmp_path / f'{name}.py'
        path.write_text(TWO.format(here=str(HERE), root=str(HERE.parent), clips=str(clips), results=str(tmp_path / name), batch=batch))
        return str(path)
    together.run(2, code('two', 2))
    together.run(1, code('one', 4))
    two, one = (checkpoint.load(checkpoint.newest(tmp_path / name)) for name in ('two', 'one'))
    two['optimizer'] = two['optimizer']['state']; one['optimizer'] = one['optimizer']['state']
    assert_same_state(two['model'], one['model'], tolerance=1e-5)
    assert_same_state(two['ema'], one['ema'], tolerance=1e-5)
    for a, b in zip(read_log(tmp_path / 'two'), read_log(tmp_path / 'one'), strict=True):
        assert a[0] == b[0] and float(a[1]) == pytest.approx(float(b[1]), abs=1e-5)
    assert gif_to_tensor(tmp_path / 'two' / '2.gif').shape == gif_to_tensor(tmp_path / 'one' / '2.gif').shape


# Errors, precision, small parts

DIFFERENT = """
import sys; sys.path[:0] = [{here!r}, {root!r}]
import os
from datetime import timedelta
from pathlib import Path
import torch; torch.set_num_threads(1)
import test_trainer
from video_diffusion import distributed
processes = distributed.init(timeout=timedelta(seconds=60), device='cpu')
real = torch.manual_seed
torch.manual_seed = lambda seed: real(seed + 10 * processes.rank)          # a script that seeds nothing: other weights in each
trainer = test_trainer.make_trainer({clips!r}, Path({results!r}), processes=processes, train_num_steps=2, save_and_sample_every=2)
begun = {{name: average.clone() for name, average in trainer.ema.average.items()}}
trainer.train()
torch.save(dict(begun=begun, ema=trainer.ema.average), Path({results!r}) / f'rank{{processes.rank}}.pt')
distributed.close()
"""


@pytest.mark.slow
def test_processes_that_begin_with_other_weights_average_the_same_ones(clips, tmp_path):
    """The average is taken of weights that are alike already; else rank 1 would draw its samples from foreign ones."""
    results = tmp_path / 'two'
    results.mkdir()
    path = tmp_path / 'two.py'
    path.write_text(DIFFERENT.format(here=str(HERE), root=str(HERE.parent), clips=str(clips), results=str(results)))
    together.run(2, path)
    first, second = (torch.load(results / f'rank{rank}.pt') for rank in (0, 1))
    for part in ('begun', 'ema'):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part]), part


def test_two_processes_draw_what_one_draws_for_twice_the_batch(clips, tmp_path):
    """Offset noise, too."""
    trainer = make_trainer(clips, tmp_path, diffusion=dict(offset_noise=0.5))
    whole = trainer.draw(7, 4, 0.5)
    for rank in (0, 1):
        trainer.processes = Processes(rank=rank, world_size=2, device=torch.device('cpu'))
        part = trainer.draw(7, 2, 0.5)
        assert part.keys() == whole.keys()
        for name, tensor in part.items():
            assert torch.equal(tensor, whole[name][2 * rank:2 * rank + 2]), name
    assert whole['noise'].mean(dim=(2, 3, 4)).std() > 0.2  # of plain noise: 1 / sqrt(512) = 0.04


def test_settings_that_cannot_work_are_refused(clips, tmp_path):
    with pytest.raises(ValueError, match='train_batch_size=0'):
        make_trainer(clips, tmp_path, train_batch_size=0)
    with pytest.raises(ValueError, match='ema_decay=1'):
        make_trainer(clips, tmp_path, ema_decay=1.)
    bare = tmp_path / 'bare'
    bare.mkdir()
    (bare / 'a.gif').write_bytes((clips / '00000.gif').read_bytes())
    with pytest.raises(ValueError, match='have no captions'):
        make_trainer(bare, tmp_path)


def test_amp_is_refused_where_it_would_be_slow_and_used_where_not(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    with pytest.raises(ValueError, match='no bf16 instructions'):
        make_trainer(clips, tmp_path, amp=True)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True)
    assert amp_dtype(torch.device('cpu')) == torch.bfloat16
    seen = []
    trainer = make_trainer(clips, tmp_path, amp=True, train_num_steps=1)
    trainer.diffusion.denoise_fn.mid_block1.block1.conv.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    trainer.train()
    assert seen[0] == torch.bfloat16 and seen[-1] == torch.float32  # training, and sampling


def test_weights_of_few_bits_do_not_learn(clips, tmp_path):
    with pytest.raises(ValueError, match=r'weights that learn are torch.bfloat16: give model.float\(\), and amp=True'):
        train_on_bits(clips, tmp_path, torch.nn.Module.bfloat16)
    train_on_bits(clips, tmp_path, lambda network: network.bfloat16().requires_grad_(False))      # frozen, beside what learns


def train_on_bits(clips, tmp_path, change):
    unet = Unet3D(8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=8, cond_dim=8)
    diffusion = GaussianDiffusion(unet, image_size=16, num_frames=2, text_encoder=WordEncoder(8))
    change(unet)
    return Trainer(diffusion, clips, results_folder=tmp_path, processes=CPU)


def test_a_diffusion_of_latents_needs_its_vae(clips, tmp_path):
    with pytest.raises(ValueError, match='one of latents.*a folder holds pixels: give the LatentDiffusion around it'):
        make_trainer(clips, tmp_path, diffusion=dict(latents=True, objective='v'))


def test_ema_is_its_formula_and_swaps_back_after_an_error():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema, warm = EMA(model, decay=0.9), EMA(model, decay=0.9, warmup=True)
    expected, expected_warm = 0., 0.
    for n in range(1, 40):
        with torch.no_grad():
            model.weight.fill_(n)
        ema.update(); warm.update()
        expected = 0.9 * expected + 0.1 * n
        decay = min(0.9, (1 + n) / (10 + n))
        expected_warm = decay * expected_warm + (1 - decay) * n
    assert ema.average['weight'].item() == pytest.approx(expected, rel=1e-5)
    assert warm.average['weight'].item() == pytest.approx(expected_warm, rel=1e-5)
    with pytest.raises(RuntimeError):
        with ema.average_parameters():
            assert model.weight.item() == pytest.approx(expected, rel=1e-5)
            raise RuntimeError
    assert model.weight.item() == 39
    ema.copy()
    assert ema.average['weight'].item() == 39


def test_learning_rate_schedules_at_their_corners():
    assert lr_schedule.constant()(0) == lr_schedule.constant()(10 ** 6) == 1
    factor = lr_schedule.warmup_cosine(total=110, warmup=10, final=0.2)
    assert factor(0) == pytest.approx(1 / 11)
    assert factor(10) == pytest.approx(1)
    assert factor(60) == pytest.approx(0.6)
    assert factor(110) == factor(500) == pytest.approx(0.2)
    assert all(factor(s) < factor(s + 1) for s in range(9)) and all(factor(s) > factor(s + 1) for s in range(10, 109))


def test_schedules_of_nothing_are_named():
    with pytest.raises(ValueError, match='warmup=-1: give a whole number, 0 or more'):
        lr_schedule.warmup_cosine(10, -1)
    with pytest.raises(ValueError, match='warmup=-1: give'):
        lr_schedule.constant(-1)


def test_cycles_have_their_own_lengths_and_maxima_and_the_last_one_repeats():
    factor = lr_schedule.cycles([10, 40], [1., 0.5], warmup=4, final=0.1)
    first, second = lr_schedule.warmup_cosine(10, 4, 0.1), lr_schedule.warmup_cosine(40, 4, 0.1)
    assert [factor(s) for s in range(10)] == [first(s) for s in range(10)]
    assert [factor(s + 10) for s in range(40)] == pytest.approx([0.5 * second(s) for s in range(40)])
    assert [factor(s + 50) for s in range(90)] == [factor(s % 40 + 10) for s in range(90)]
    for bad in (([10], [1., 2.]), ([], []), ([0], [1.])):
        with pytest.raises(ValueError, match='length of 1 or more'):
            lr_schedule.cycles(*bad)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.)
    assert torch.optim.lr_scheduler.LambdaLR(optimizer, factor).get_last_lr() == [2 * factor(0)]


def test_images_train_as_frames_without_motion(clips, tmp_path):
    """A folder of clips and images: the images' frames are looked at one by one, the clips' together."""
    folder = tmp_path / 'mixed'
    folder.mkdir()
    for path in sorted(clips.glob('00000.*')) + sorted(clips.glob('00001.*')):
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ('a.png', 'b.jpg'):
        Image.new('RGB', (16, 16), (200, 30, 30)).save(folder / name)
        (folder / name).with_suffix('.txt').write_text('a red nothing')
    assert len(make_trainer(folder, tmp_path / 'r').dataset) == 2
    trainer = make_trainer(folder, tmp_path / 'r', images=True, train_batch_size=4, train_num_steps=1, gradient_accumulate_every=1)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs['focus_present_mask'])), with_kwargs=True)
    trainer.train()
    ((videos, captions), mask), = seen
    assert [caption == 'a red nothing' for caption in captions] == mask.tolist() and mask.sum() == 2


@pytest.mark.parametrize('bias', (1., 3.))
def test_a_noise_bias_draws_steps_with_its_density(clips, tmp_path, bias):
    """Of density p t^(p-1), a share x^p lies below x."""
    trainer = make_trainer(clips, tmp_path, diffusion=dict(objective='v'), noise_bias=bias)
    t = torch.cat([trainer.draw(number, 50, 0.)['t'] for number in range(20)])
    assert t.min() >= 0 and t.max() < 10
    for below in (3, 5, 8):
        assert abs((t < below).float().mean() - (below / 10) ** bias) < 0.02


def test_a_noise_bias_of_nothing_is_refused(clips, tmp_path):
    with pytest.raises(ValueError, match='noise_bias=0: give a number above 0'):
        make_trainer(clips, tmp_path, noise_bias=0)


def test_clips_shorter_than_asked_for_are_named(clips, tmp_path):
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2)), image_size=16, num_frames=3, timesteps=10)
    with pytest.warns(UserWarning, match='have 2 frames or fewer: up to 3 their last one stands still'):
        Trainer(diffusion, clips, results_folder=tmp_path / 'long', processes=CPU)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        make_trainer(clips, tmp_path / 'as long')


def test_settings_that_are_numbers_of_numpy_come_back(clips, tmp_path):
    """np.float64 is a float to all checks, and to the reader of a checkpoint a foreign object."""
    numpy = pytest.importorskip('numpy')
    settings = dict(train_lr=numpy.float64(1e-3), diffusion=dict(schedule_shift=numpy.float64(2)), adam_betas=(numpy.float64(.9), .99))
    make_trainer(clips, tmp_path, **settings, train_num_steps=3).train()
    again = make_trainer(clips, tmp_path, **settings)
    again.load(-1)
    assert again.step == 3 and again.optimizer.param_groups[0]['betas'] == (.9, .99)

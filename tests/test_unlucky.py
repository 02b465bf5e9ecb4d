"""Unlucky runs lose nothing and say what happened: two in one folder, a closed terminal, a deleted folder, a stop while samples
are drawn, processes that differ, die or hang.  Run: pytest tests/test_unlucky.py; with --slow 20 signals of each kind and 100 kills"""

import copy
import os
import pty
import random
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import together
import torch
import torch.distributed as dist
from test_trainer import CPU, assert_same_state, clips, make_trainer, read_log  # noqa: F401

from video_diffusion import checkpoint, shapes
from video_diffusion.distributed import Processes, lost_others
from video_diffusion.training import lock as lock_module
from video_diffusion.training.alike import clip_list
from video_diffusion.training.interrupt import StopRequest
from video_diffusion.training.lock import Lock
from video_diffusion.training.script import draw_toy_world

HERE = Path(__file__).parent
SMALL = dict(train_num_steps=2, save_and_sample_every=1, num_sample_rows=1, gradient_accumulate_every=1, log_every=1)


def forked(work) -> int:
    """A process that does this and then sleeps; comes back when it has done it."""
    ready, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(say, b'.')
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(say)
    assert os.read(ready, 1) == b'.'
    os.close(ready)
    return pid


def end(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)
    os.waitpid(pid, 0)


# One run in one folder

def test_a_folder_is_held_by_one_process_and_a_dead_one_holds_nothing(tmp_path):
    pid = forked(Lock(tmp_path / 'results').take)
    try:
        with pytest.raises(ValueError, match=rf'results is in use by process {pid} on .*, since 20\d\d-.*: wait for it, or choose'):
            Lock(tmp_path / 'results').take()
    finally:
        end(pid)
    assert (tmp_path / 'results' / 'lock').exists()               # killed, it could not clear up
    lock = Lock(tmp_path / 'results')
    lock.take(), lock.take()
    assert f'process {os.getpid()} on' in lock.path.read_text()
    lock.release()
    assert not list((tmp_path / 'results').iterdir())


def test_a_lock_whose_file_vanishes_while_it_is_opened_is_taken_again(tmp_path, monkeypatch):
    """Its last owner is done just then: what was opened is no longer what the next one will find."""
    lockf, calls = lock_module.fcntl.lockf, []

    def vanish_once(*args):
        if not calls:
            (tmp_path / 'lock').unlink()
        calls.append(lockf(*args))
    monkeypatch.setattr(lock_module.fcntl, 'lockf', vanish_once)
    lock = Lock(tmp_path)
    lock.take()
    assert len(calls) == 2 and lock.is_ours()


def test_a_second_run_ends_before_it_touches_anything(clips, tmp_path):
    make_trainer(clips, tmp_path, **SMALL).train()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    pid = forked(Lock(tmp_path).take)
    try:
        with pytest.raises(ValueError, match=f'in use by process {pid}'):
            make_trainer(clips, tmp_path, **SMALL).train()
    finally:
        end(pid)
    (tmp_path / 'lock').unlink()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert {path.name for path in before} == {'1.gif', '2.gif', 'log.csv', 'model-1.pt', 'model-2.pt', 'prompts.txt'}


@pytest.mark.parametrize('others', ['finish first', 'fail'])
def test_the_toy_world_may_be_drawn_by_two_runs_at_once(tmp_path, monkeypatch, others):
    make, world = shapes.make_shapes, tmp_path / 'data' / 'shapes'

    def make_slowly(folder, *how):
        make(folder, *how)
        if others == 'finish first':
            make(world, *how)
        return folder
    monkeypatch.setattr(shapes, 'make_shapes', make_slowly)
    assert draw_toy_world(world, 3, 16, (2,), CPU) == world
    assert [path.name for path in world.parent.iterdir()] == ['shapes'] and len(list(world.iterdir())) == 6
    monkeypatch.setattr(shapes, 'make_shapes', lambda *how: pytest.fail('it is there already'))
    draw_toy_world(world, 3, 16, (2,), CPU)


# Signals

def test_nohup_is_respected(clips, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make_trainer(clips, tmp_path, **SMALL)
        trainer.train(log_fn=lambda log: os.kill(os.getpid(), signal.SIGHUP))
        assert trainer.step == 2 and not trainer.stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_leaves_time_to_save(tmp_path):
    """Not only is there a signal: all that is printed from then on fails, until it goes nowhere."""
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)             # under nohup it would wait for ever
            with StopRequest() as stop:
                os.write(1, b'ready')
                while not stop.requested:
                    time.sleep(0.01)
                for output in (1, 2):
                    os.write(output, b'saving ...\n')
                (tmp_path / 'saved').touch()
        finally:
            os._exit(0)
    assert os.read(terminal, 100) == b'ready'
    os.close(terminal)
    os.waitpid(pid, 0)
    assert (tmp_path / 'saved').exists()


def stop_while_drawing(trainer, monkeypatch) -> list:
    """A signal comes during the first step of the sampler; the steps that it takes are counted."""
    steps, predict = [], type(trainer.diffusion).predict_x0

    def predict_and_stop(self, *args, **kwargs):
        steps.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, *args, **kwargs)
    monkeypatch.setattr(type(trainer.diffusion), 'predict_x0', predict_and_stop)
    return steps


@pytest.mark.slow
def test_a_stop_while_samples_are_drawn_is_heard_between_two_steps(clips, tmp_path, monkeypatch, capsys):
    make_trainer(clips, tmp_path / 'whole', train_num_steps=4, save_and_sample_every=2).train()
    trainer = make_trainer(clips, tmp_path / 'parts', train_num_steps=4, save_and_sample_every=2)
    with monkeypatch.context() as patch:
        steps = stop_while_drawing(trainer, patch)
        trainer.train()
    assert len(steps) == 1 and trainer.step == 2 and 'stopped at step 2: saved' in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / 'parts').iterdir()) == ['log.csv', 'model-1.pt']
    again = make_trainer(clips, tmp_path / 'parts', train_num_steps=4, save_and_sample_every=2)
    again.load(-1)
    again.train()
    for name in ('1.gif', '2.gif', 'prompts.txt'):
        assert (tmp_path / 'parts' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
    parts, whole = (checkpoint.load(checkpoint.newest(tmp_path / name)) for name in ('parts', 'whole'))
    assert_same_state(parts, whole)
    assert read_log(tmp_path / 'parts') == read_log(tmp_path / 'whole')


def test_a_picture_that_a_kill_prevented_is_drawn_when_the_run_goes_on(clips, tmp_path, monkeypatch):
    make_trainer(clips, tmp_path, **SMALL).train()
    picture = (tmp_path / '2.gif').read_bytes()
    (tmp_path / '2.gif').unlink()
    trainer = make_trainer(clips, tmp_path, **SMALL)
    trainer.load(-1)

    def half(*_):
        yield b'GIF89a'
        raise ZeroDivisionError
    with monkeypatch.context() as patch:
        patch.setattr('video_diffusion.data.gif.encode', half)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    assert [path.name for path in tmp_path.glob('*.gif')] == ['1.gif']       # half a picture is none
    trainer.train()
    assert (tmp_path / '2.gif').read_bytes() == picture
    assert trainer.step == 2 and checkpoint.load(tmp_path / 'model-2.pt')['step'] == 2


def test_a_second_run_does_not_write_over_the_first(clips, tmp_path):
    make_trainer(clips, tmp_path, **SMALL).train()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r'already holds a run: load\(-1\) goes on with it, or choose another results_folder'):
        make_trainer(clips, tmp_path, **SMALL).train()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# What else may happen to a run

def test_a_deleted_results_folder_is_made_again(clips, tmp_path):
    results, seen = tmp_path / 'results', []

    def delete(log):
        if log['step'] == 1:
            shutil.rmtree(results)
        seen.append((results / 'lock').exists())
    trainer = make_trainer(clips, results, **{**SMALL, 'train_num_steps': 3})
    with pytest.warns(UserWarning, match='log.csv is gone, deleted alone or with its folder: both are made again'):
        trainer.train(log_fn=delete)
    assert [step for step, _, _ in read_log(results)] == ['2', '3'] and seen == [False, True, True]
    assert {path.name for path in results.iterdir()} >= {'2.gif', '3.gif', 'model-2.pt', 'model-3.pt', 'log.csv'}


def test_fewer_steps_than_are_done_says_so_and_changes_nothing(clips, tmp_path, capsys):
    make_trainer(clips, tmp_path, **SMALL).train()
    trainer = make_trainer(clips, tmp_path, **{**SMALL, 'train_num_steps': 1})
    trainer.load(-1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    trainer.train()
    assert 'nothing to do: 2 steps are done already, and train_num_steps=1' in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize('content, says', [
    ('a,b\n1,2\n', 'its columns are a, b, and not step, loss, lr'), ('', 'its columns are none'),
    ('step,loss,lr,clips_per_second,seconds\nx,1,1,1,1\n', 'invalid literal'), ('\0\0', 'its columns are'), ('step,loss\n1,2', 'its columns are step, loss, and')])
def test_a_foreign_log_is_named_and_left_alone(clips, tmp_path, content, says):
    (tmp_path / 'log.csv').write_text(content)
    trainer = make_trainer(clips, tmp_path, **SMALL)
    trainer.step = 1                                                         # as if it went on
    with pytest.raises(ValueError, match=f'log.csv is refused: {says}'):
        trainer.train()
    assert (tmp_path / 'log.csv').read_text() == content


@pytest.fixture(scope='module')
def trained(clips, tmp_path_factory):
    """The checkpoint of a run by Adam, and that of one by Muon."""
    states = {}
    for muon_lr in (None, 0.01):
        folder = tmp_path_factory.mktemp('run')
        make_trainer(clips, folder, muon_lr=muon_lr, **{**SMALL, 'train_num_steps': 1}).train()
        states[muon_lr] = checkpoint.load(folder / 'model-1.pt')
    return states


@pytest.mark.parametrize('muon_lr', [None, 0.01])
@pytest.mark.parametrize('change', [
    lambda kept: kept.update({name: value[..., None] for name, value in kept.items() if name != 'step'}),
    lambda kept: kept.update({name: value.long() for name, value in kept.items()}),
    lambda kept: kept.update({name: 1 for name in kept}),
    lambda kept: kept.pop(max(kept)), lambda kept: kept.update(more=torch.zeros(()))])
def test_moments_that_do_not_fit_are_one_sentence(clips, tmp_path, trained, muon_lr, change):
    state = copy.deepcopy(trained[muon_lr])
    trainer = make_trainer(clips, tmp_path, muon_lr=muon_lr, **SMALL)
    trainer.load_state_dict(copy.deepcopy(state))                            # as it is, it fits
    numbers = [n for n, kept in state['optimizer']['state'].items() if kept[max(kept)].ndim > 1 or muon_lr is None]
    change(state['optimizer']['state'][numbers[-1]])
    with pytest.raises(ValueError, match='the checkpoint is refused') as error:
        trainer.load_state_dict(state)
    assert '\n' not in str(error.value)


def test_moments_of_another_optimizer_or_of_no_weight(clips, tmp_path, trained):
    trainer = make_trainer(clips, tmp_path, **SMALL)
    with pytest.raises(ValueError, match='another optimizer'):
        trainer.load_state_dict(trained[0.01])
    state = copy.deepcopy(trained[None])
    state['optimizer']['state'][10 ** 6] = state['optimizer']['state'][0]
    with pytest.raises(ValueError, match='is refused'):
        trainer.load_state_dict(state)
    state = copy.deepcopy(trained[None])
    state['optimizer']['param_groups'][0] |= dict(eps=1e-3, betas='x', fused=5, surprise=1.)
    trainer.load_state_dict(state)
    group = trainer.optimizer.param_groups[0]
    assert group['eps'] == 1e-8 and group['betas'] == (0.9, 0.999) and group['fused'] is True and 'surprise' not in group


def test_no_mutation_of_a_checkpoint_that_a_run_goes_on_from_ends_in_a_traceback(clips, tmp_path, trained, slow):
    from test_checkpoint import mutate
    outcomes = {'went on': 0, 'refused': 0}
    for number in range(400 if slow else 8):
        chance = random.Random(number)
        state = copy.deepcopy(trained[None])
        for _ in range(chance.choice([1, 1, 2])):
            mutate(state if chance.random() < 0.5 else {'config': state['optimizer']}, chance)
        trainer = make_trainer(clips, tmp_path / str(number), **SMALL)
        try:
            trainer.load_state_dict(state)
            trainer.train()
            outcomes['went on'] += 1
        except (ValueError, FloatingPointError) as error:
            assert '\n' not in str(error), (number, error)
            outcomes['refused'] += 1
        except BaseException as error:
            raise AssertionError(f'number {number}: {type(error).__name__}: {error}') from error
    print(outcomes)


# Several processes

def fake_others(monkeypatch, *others: dict) -> Processes:
    def gather(everyone, mine, group):
        everyone[:] = [mine, *({**mine, **{name: repr(value) for name, value in other.items()}} for other in others)]
    monkeypatch.setattr(dist, 'all_gather_object', gather)
    return Processes(world_size=1 + len(others))


def test_processes_agree_or_name_what_differs(monkeypatch):
    fake_others(monkeypatch, {}, {}).agree({'train_lr': 0.1, 'seed': float('nan')})
    with pytest.raises(ValueError, match=r'different settings \(train_lr: 0.1 in process 0 and 0.2 in process 2\)'):
        fake_others(monkeypatch, {}, {'train_lr': 0.2}).agree({'train_lr': 0.1, 'seed': 3})
    with pytest.raises(ValueError, match='surprise: None in process 0 and 1 in process 1'):
        fake_others(monkeypatch, {'surprise': 1}).agree({'seed': 3})


@pytest.mark.parametrize('different', [
    dict(train_lr=2e-3), dict(train_batch_size=3), dict(gradient_accumulate_every=1), dict(seed=5), dict(train_num_steps=3),
    dict(muon_lr=0.1), dict(null_cond_prob=0.3), dict(horizontal_flip=True), dict(max_grad_norm=1.), dict(lr_schedule=lambda step: 0.5),
    dict(diffusion=dict(offset_noise=0.2)), dict(captions=False)])
def test_settings_that_differ_are_seen(clips, tmp_path, monkeypatch, different):
    given = []
    monkeypatch.setattr(Processes, 'agree', lambda _, settings: given.append({name: repr(v) for name, v in settings.items()}))
    make_trainer(clips, tmp_path), make_trainer(clips, tmp_path / 'elsewhere'), make_trainer(clips, tmp_path, **different)
    name = next(iter(different))
    assert given[0] == given[1]
    changed = {key for key in given[0] if given[0][key] != given[2][key]}
    assert changed == {'model' if name in ('diffusion', 'captions') else name}


def test_clips_that_differ_are_seen(clips, tmp_path):
    there = make_trainer(clips, tmp_path).dataset
    shutil.copytree(clips, tmp_path / 'copy')
    assert clip_list(make_trainer(tmp_path / 'copy', tmp_path).dataset) == clip_list(there)
    for path in (tmp_path / 'copy').glob('00011.*'):
        path.rename(path.with_stem('00012'))
    renamed = clip_list(make_trainer(tmp_path / 'copy', tmp_path).dataset)
    (tmp_path / 'copy' / '00003.txt').write_text('another word')
    other = clip_list(make_trainer(tmp_path / 'copy', tmp_path).dataset)
    (tmp_path / 'copy' / '00003.txt').write_text('0: another word\n3: and another')
    later = clip_list(make_trainer(tmp_path / 'copy', tmp_path).dataset)
    (tmp_path / 'copy' / '00003.gif').unlink()
    fewer = clip_list(make_trainer(tmp_path / 'copy', tmp_path).dataset)
    assert len({clip_list(there), renamed, other, later, fewer}) == 5 and fewer.startswith('11, ') and other.startswith('12, ')


def test_what_the_main_process_cannot_do_fails_everywhere(monkeypatch):
    sent = []
    monkeypatch.setattr(dist, 'broadcast_object_list', lambda items, *_, **__: sent.append(list(items)) or items.__setitem__(0, 'no room'))
    done = []
    with pytest.raises(ValueError, match='no room'):
        Processes(rank=1, world_size=2).by_main(lambda: done.append(1))
    assert not done

    def fail():
        raise OSError('no room')
    with pytest.raises(ValueError, match='no room'):
        Processes(rank=0, world_size=2).by_main(fail)
    assert sent == [[None], ['no room']]
    with pytest.raises(OSError, match='no room'):
        CPU.by_main(fail)


def test_a_lost_process_is_a_sentence_and_other_faults_are_not(monkeypatch):
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_rank', lambda: 3)
    with pytest.raises(ConnectionError, match='process 3 waited in vain for the others: .*see its own output'):
        with lost_others():
            raise RuntimeError('[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms\nmore')
    with pytest.raises(RuntimeError, match='shapes'):
        with lost_others():
            raise RuntimeError('shapes cannot be multiplied')


def run_to_the_end(folder, *flags, before: str, timeout: float = 200.) -> together.Started:
    """Two processes of train.py in this folder; `before` is run in each first."""
    code = f'import os, runpy, sys\nrank = int(os.environ["RANK"])\n{before}\nsys.argv[0] = "train.py"\nrunpy.run_path({str(HERE.parent / "train.py")!r}, run_name="__main__")'
    (folder / 'start.py').write_text(code)
    started = together.Started(2, 'start.py', *flags, cwd=folder)
    started.wait(timeout)
    return started


HURT = """
import threading, time
def hurt():
    while not os.path.exists('results/log.csv'):
        time.sleep(0.1)
    time.sleep(1)
    os.kill(os.getpid(), {number})
if rank:
    threading.Thread(target=hurt).start()
"""
TINY = ['--dim', 8, '--dim-mults', 1, 2, '--batch-size', 2, '--sample-every', 10 ** 6, '--sample-rows', 1, '--sample-steps', 1, '--device', 'cpu']


@pytest.mark.slow
@pytest.mark.parametrize('flag, says', [(['--steps', '3'], "steps: 9 in process 0 and 3 in process 1"), (['--lr', '0.5'], 'lr: None in process 0 and 0.5')])
def test_processes_with_different_flags_end_at_once(clips, tmp_path, flag, says):
    process = run_to_the_end(tmp_path, clips, *TINY, '--steps', 9, before=f'sys.argv += {flag} * rank')
    assert process.returncode and says in process.output and 'start.py", line' not in process.output
    assert not list((tmp_path / 'results').glob('*')) if (tmp_path / 'results').exists() else True


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_stands_still_or_dies_ends_the_others(clips, tmp_path, number):
    """In the middle of training; the main process ends by itself, with --timeout 8."""
    process = run_to_the_end(tmp_path, clips, *TINY, '--steps', 10 ** 6, '--timeout', 8, before=HURT.format(number=int(number)))
    assert process.returncode and 'waited in vain for the others' in process.output, process.output[-3000:]
    assert (tmp_path / 'results' / 'log.csv').exists()


# Many signals and kills

def run_of_eight(clips, results) -> int:
    """A process that trains, or goes on, as a script does: signals are not Python's yet."""
    pid = os.fork()
    if pid == 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        code = 1
        try:
            trainer = make_trainer(clips, results, **SMALL | dict(train_num_steps=8), sample_steps=2)
            if checkpoint.milestones(results):
                trainer.load(-1)
            trainer.train()
            code = 0
        finally:
            os._exit(code)
    return pid


def in_peace(clips, results) -> float:
    """Seconds that it takes."""
    torch.set_num_threads(1)
    start = time.monotonic()
    assert os.waitpid(run_of_eight(clips, results), 0)[1] == 0
    return time.monotonic() - start


def with_signals(clips, base, number, wanted, duration) -> tuple[int, int]:
    """`wanted` signals at random moments, in as many runs as it takes: how many of either."""
    torch.set_num_threads(1)
    chance, sent, rounds = random.Random(int(number)), 0, 0
    while sent < wanted:
        results = base / f'round{rounds}'
        for _ in range(200):
            deadline = time.monotonic() + chance.uniform(0.1, 0.7) * duration
            pid, ended = run_of_eight(clips, results), 0
            while not ended and (sent >= wanted or time.monotonic() < deadline):
                ended = os.waitpid(pid, os.WNOHANG)[0]
                time.sleep(0.002)
            if not ended:
                os.kill(pid, number)
                os.waitpid(pid, 0)
                sent += 1
            elif len(checkpoint.milestones(results)) == 8 and (results / '8.gif').exists():
                break
        rounds += 1
    return sent, rounds


@pytest.fixture(scope='module')
def process():
    with ProcessPoolExecutor(1, mp_context=together.CONTEXT) as pool:
        yield pool


@pytest.fixture(scope='module')
def whole(process, clips, tmp_path_factory):
    """The run that nothing interrupts, and its seconds."""
    results = tmp_path_factory.mktemp('whole')
    return results, process.submit(in_peace, clips, results).result(timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize('number, wanted', [(signal.SIGTERM, 20), (signal.SIGINT, 20), (signal.SIGHUP, 20), (signal.SIGKILL, 100)])
def test_stopped_or_killed_at_any_moment_everything_is_there(process, whole, clips, tmp_path, slow, number, wanted):
    """Real processes, at random moments, which save and draw all the time: weights, log and pictures are those of a run in peace."""
    whole, duration = whole
    wanted = wanted if slow else 2
    sent, rounds = process.submit(with_signals, clips, tmp_path, number, wanted, duration).result(timeout=1800)
    assert sent == wanted
    print(f'{sent} x {signal.Signals(number).name} in {rounds} runs')
    for number in range(rounds):
        parts = tmp_path / f'round{number}'
        assert_same_state(checkpoint.load(checkpoint.newest(parts)), checkpoint.load(checkpoint.newest(whole)))
        assert read_log(parts) == read_log(whole)
        for n in range(1, 9):
            assert (parts / f'{n}.gif').read_bytes() == (whole / f'{n}.gif').read_bytes(), n

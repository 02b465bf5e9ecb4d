"""Training a VAE: it learns, resumes to the last bit, and several processes (sharing clips or not) equal one.

Run: pytest tests/test_vae_trainer.py
"""

import csv
import os
import signal

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers
from test_trainer import assert_same_state

from video_diffusion import checkpoint, gif_to_tensor, shapes
from video_diffusion.distributed import Processes
from video_diffusion.training.vae_trainer import VAETrainer, start_from
from video_diffusion.vae.causal_vae import CausalVAE
from video_diffusion.vae.vae_checkpoint import vae_from_checkpoint, vae_from_state


@pytest.fixture(scope='session')
def clips(tmp_path_factory):
    return shapes.make_shapes(tmp_path_factory.mktemp('clips'), 12, image_size=16, num_frames=5)


def small_vae(**kwargs):
    torch.manual_seed(0)
    settings = dict(latent_channels=2, dim=8, dim_mults=(1, 2), blocks_per_level=1, norm_groups=4, time_compression=2,
                    norm_scope='frame')
    return CausalVAE(**{**settings, **kwargs})


def make_trainer(clips, results, vae=None, **kwargs):
    settings = dict(image_size=16, num_frames=5, train_batch_size=2, train_num_steps=4, train_lr=1e-3, held_out=2,
                    save_and_sample_every=2, log_every=1, processes=Processes())
    return VAETrainer(vae or small_vae(), clips, results_folder=results, **{**settings, **kwargs})


EVERYTHING = dict(disc_start=1, image_share=0.5, image_steps=2, learn_logvar=True, max_grad_norm=1., horizontal_flip=True)


def read_log(results):
    with open(results / 'log.csv') as file:
        return [{name: value for name, value in row.items() if name not in ('seconds', 'clips_per_second')}
                for row in csv.DictReader(file)]


# What a run leaves behind

def test_a_run_leaves_checkpoints_pictures_and_a_log_with_measures(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, **EVERYTHING)
    logs = []
    trainer.train(log_fn=logs.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1.gif', '2.gif', 'log.csv', 'model-1.pt', 'model-2.pt']
    assert gif_to_tensor(tmp_path / '2.gif').shape[:2] == (3, 5)
    assert gif_to_tensor(tmp_path / '1.gif').shape[:2] == (3, 1)                # image_steps=2
    log = read_log(tmp_path)
    assert [row['step'] for row in log] == ['1', '2', '3', '4']
    assert [bool(row['psnr']) for row in log] == [bool(row['ssim']) for row in log] == [False, True, False, True]
    assert [float(row['discriminator']) > 0 for row in log] == [False, True, True, True]       # disc_start=1
    assert [float(row['adversarial_weight']) > 0 for row in log] == [False, True, True, True]
    assert [entry['sample'].name for entry in logs if 'sample' in entry] == ['1.gif', '2.gif']

    vae = vae_from_checkpoint(tmp_path)
    video = torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad(), trainer.ema.average_parameters():
        assert torch.equal(vae(video, sample=False)[0], trainer.vae(video, sample=False)[0])
    with torch.no_grad():
        assert not torch.equal(vae(video, sample=False)[0], trainer.vae(video, sample=False)[0])


def test_held_out_clips_are_not_trained_on(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path)
    assert len(trainer.dataset) == 11 and len(trainer.held_out) == 1       # a tenth, and one at least
    assert not set(trainer.dataset.paths) & set(trainer.held_out.paths)


@pytest.mark.slow
def test_it_learns_to_reconstruct(clips, tmp_path):
    make_trainer(clips, tmp_path, train_num_steps=120, save_and_sample_every=60, train_lr=5e-3, loss='l2', log_every=60,
                 ema_decay=0.9, max_grad_norm=1.).train()
    measured = [(float(row['psnr']), float(row['ssim'])) for row in read_log(tmp_path) if row['psnr']]
    assert measured[1] > measured[0] and measured[1][0] > 15 and measured[1][1] > 0.3


def test_the_critic_and_the_vae_each_learn_from_their_own_loss(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, disc_start=0, train_num_steps=1)
    before = {name: part.state_dict() for name, part in trainer.parts.items() if name in ('model', 'discriminator')}
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in before.items()}
    batch = torch.stack([trainer.dataset.clip(i) for i in range(2)]), None
    trainer.learn(batch, 0, True)
    # The critic's gradients are those of its own loss alone, though the VAE's loss went through it.
    video = batch[0].float() / 255
    posterior = trainer.vae.encode(video)
    again = trainer.vae.decode(posterior.mean + posterior.std * trainer.noise(posterior.mean, 5, 0), 5).detach()
    gradients = [p.grad.clone() for p in trainer.discriminator.parameters()]
    hinge = (1 - trainer.discriminator(video)).relu().mean() + (1 + trainer.discriminator(again)).relu().mean()
    expected = torch.autograd.grad(hinge / 2, list(trainer.discriminator.parameters()))
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    trainer.train()
    for name, state in before.items():
        assert any(not torch.equal(value, state[key]) for key, value in trainer.parts[name].state_dict().items())


@pytest.mark.parametrize('image_steps', [0, 1])        # clips from the first step on, or images before
def test_only_the_decoder_learns_if_asked(clips, tmp_path, image_steps):
    vae = small_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    make_trainer(clips, tmp_path, vae, only_train_decoder=True, image_steps=image_steps, train_num_steps=2).train()
    changed = {name.split('.')[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {'decoder'}


def test_a_vae_that_was_frozen_learns_whole(clips, tmp_path):
    vae = small_vae().requires_grad_(False)                                 # as LatentDiffusion leaves it
    make_trainer(clips, tmp_path, vae)
    assert all(weight.requires_grad for weight in vae.parameters())


def test_images_and_clips_are_mixed_by_weight(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, image_share=0.3)
    video = torch.arange(5.).view(1, 1, 5, 1, 1).expand(2, 3, 5, 4, 4)
    drawn = [trainer.clips_or_images(video, number) for number in range(400)]
    images = [d for d in drawn if d.shape[2] == 1]
    assert 90 < len(images) < 150 and all(d.shape == (2, 3, 5, 4, 4) for d in drawn if d.shape[2] > 1)
    assert {d[i, 0, 0, 0, 0].item() for d in images for i in range(2)} == {0., 1., 2., 3., 4.}


def test_images_first_and_then_each_frame_of_a_clip_is_the_image_that_was_learnt(clips, tmp_path):
    vae = small_vae(time_compression=1)
    trainer = make_trainer(clips, tmp_path, vae, image_share=1., train_num_steps=2)
    seen = []
    vae.encoder.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2]))
    trainer.train()
    assert seen[:2] == [1, 1]
    video = trainer.held_out.clip(0)[None].float() / 255
    with torch.no_grad():
        alone = torch.cat([vae(frame, sample=False)[0] for frame in video.split(1, dim=2)], dim=2)
        assert (vae(video, sample=False)[0] - alone).abs().max() > 1e-3
        trainer.begin_with_clips()
        torch.testing.assert_close(vae(video, sample=False)[0], alone)
        with trainer.ema.average_parameters():
            torch.testing.assert_close(vae(video, sample=False)[0], alone)

    trainer = make_trainer(clips, tmp_path / 'more', small_vae(), image_steps=1, train_num_steps=2)
    conv, seen = trainer.vae.encoder.conv_in, []
    conv.register_forward_pre_hook(lambda conv, args: seen.append((args[0].shape[2], past_taps(conv) > 0)))
    trainer.train()
    assert seen == [(1, True), (5, False)] and past_taps(conv) > 0       # forgotten when the first clips came, learnt again since


def past_taps(conv):
    return conv.weight[:, :, :-1].abs().sum().item()


def test_gradient_accumulation_is_one_larger_batch(clips, tmp_path):
    whole = soften(make_trainer(clips, tmp_path / 'a', train_batch_size=4, train_num_steps=2, loss='l2'))
    parts = soften(make_trainer(clips, tmp_path / 'b', train_batch_size=2, gradient_accumulate_every=2, train_num_steps=2,
                                loss='l2'))
    for trainer in (whole, parts):
        trainer.noise = lambda like, frames, number: torch.zeros_like(like)
        trainer.train()
    assert_same_state(whole.vae.state_dict(), parts.vae.state_dict(), tolerance=1e-5)


# Going on

@pytest.mark.slow
@pytest.mark.parametrize('stop', [1, 2])
def test_resumed_equals_uninterrupted_to_the_last_bit(clips, tmp_path, stop):
    settings = dict(**EVERYTHING, gradient_accumulate_every=2)
    whole = make_trainer(clips, tmp_path / 'whole', **settings)
    whole.train()
    first = make_trainer(clips, tmp_path / 'parts', **settings)
    first.train(log_fn=lambda log: 'loss' in log and log['step'] == stop and os.kill(os.getpid(), signal.SIGTERM))
    assert first.step == stop + 1                 # the step that the signal came in was finished
    second = make_trainer(clips, tmp_path / 'parts', **settings)
    with torch.no_grad():
        next(second.discriminator.parameters()).fill_(5.)           # whatever it began with
    second.load(-1)
    second.train()
    assert_same_state(second.state_dict(), whole.state_dict())
    assert read_log(tmp_path / 'parts') == read_log(tmp_path / 'whole')


@pytest.mark.slow
def test_dropout_too_goes_on_as_if_it_had_not_stopped(clips, tmp_path):
    make = lambda folder, **settings: make_trainer(clips, tmp_path / folder, small_vae(dropout=0.5), **settings)
    make('whole').train()
    make('parts', train_num_steps=2).train()
    torch.manual_seed(7)                          # a new process: whatever its global generator is at
    second = make('parts')
    second.load(-1)
    before = torch.get_rng_state()
    second.train()
    assert torch.equal(torch.get_rng_state(), before)             # and nobody else's numbers change
    whole, parts = (vae_from_checkpoint(tmp_path / name).state_dict() for name in ('whole', 'parts'))
    assert_same_state(whole, parts)
    trainer = make('apart')                       # masks differ from batch to batch, and from process to process
    drawn = []
    for number, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        trainer.processes.rank = rank
        with trainer.own_randomness(number):
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[3] and drawn[0] != drawn[1] and drawn[0] != drawn[2]


def test_what_is_not_finite_names_its_column(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, disc_start=0)
    with torch.no_grad():
        trainer.discriminator.scores.bias.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='of step 1 is nan'):
        trainer.train()
    assert not list(tmp_path.glob('*.pt'))


def test_fine_tuning_starts_from_given_weights_but_those_ignored():
    source, vae = small_vae(latent_channels=3), small_vae()
    fresh = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(ValueError, match=r'encoder\.conv_out\.weight.*'):
        start_from(vae, source.state_dict())
    prefixes = ['encoder.conv_out', 'decoder.conv_in', 'decoder.middle', 'decoder.levels', 'decoder.norm_out']
    for parameter in source.parameters():
        parameter.data += 1
    start_from(vae, source.state_dict(), prefixes)
    for name, value in vae.state_dict().items():
        expected = fresh[name] if name.startswith(tuple(prefixes)) else source.state_dict()[name]
        assert torch.equal(value, expected), name
    with pytest.raises(ValueError, match="'conv_on'"):
        start_from(vae, vae.state_dict(), ['conv_on'])


def test_what_cannot_work_is_refused(clips, tmp_path):
    with pytest.raises(ValueError, match='image_steps=-1: give a whole number, 0 or more'):
        make_trainer(clips, tmp_path, image_steps=-1)
    with pytest.raises(ValueError, match='6 frames: time is compressed by 4'):
        make_trainer(clips, tmp_path, small_vae(dim_mults=(1, 1, 1), time_compression=4), num_frames=6, image_steps=2)
    with pytest.warns(UserWarning, match='num_frames=4: the first 2 frames of a reconstruction will be alike.* of 3 or 5'):
        make_trainer(clips, tmp_path, num_frames=4)
    with pytest.raises(ValueError, match='image_share=2'):
        make_trainer(clips, tmp_path, image_share=2)
    for name, value in (('kl_weight', -1.), ('kl_weight', float('nan')), ('disc_weight', -1), ('disc_start', -1), ('held_out', 0),
                        ('held_out', -3), ('image_share', float('nan')), ('disc_weight', float('inf'))):
        with pytest.raises(ValueError, match=rf'^{name}={value}: give'):
            make_trainer(clips, tmp_path, **{name: value})
    with pytest.raises(ValueError, match='image_size=8'):
        make_trainer(clips, tmp_path, image_size=8)
    with pytest.raises(ValueError, match='train_batch_size=0'):
        make_trainer(clips, tmp_path, train_batch_size=0)
    trainer = make_trainer(clips, tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match='other settings'):
        make_trainer(clips, tmp_path, small_vae(latent_channels=3)).load(-1)
    with pytest.raises(ValueError, match='holds no discriminator'):
        make_trainer(clips, tmp_path, disc_start=1).load(-1)
    with pytest.raises(ValueError, match='holds no VAE'):
        vae_from_state({**trainer.state_dict(), 'config': {'unet': {}}})


def test_another_number_of_held_out_clips_is_refused(tmp_path):
    clips = shapes.make_shapes(tmp_path / 'clips', 20, image_size=16, num_frames=5)
    make_trainer(clips, tmp_path, train_num_steps=1).train()
    with pytest.raises(ValueError, match='held 2 clips out, this run 1: .* measured on clips that it was trained on'):
        make_trainer(clips, tmp_path, held_out=1).load(-1)
    make_trainer(clips, tmp_path, held_out=9).load(-1)                     # a tenth is two, however many were asked for
    state = checkpoint.load_run(tmp_path)
    assert state.pop('held_out') == 2
    make_trainer(clips, tmp_path, held_out=1).load_state_dict(state)       # from before this was written down


# Several processes

@pytest.fixture(scope='module')
def workers():
    workers = Workers(4, timeout=120.)
    yield workers
    workers.close()


def soften(trainer):
    """See test_trainer.py: rounding must not become a full step."""
    for optimizer in [trainer.optimizer, *([trainer.disc_optimizer] if trainer.discriminator else [])]:
        optimizer.param_groups[0]['eps'] = 1e-3
    return trainer


def three_steps(rank, clips, results, sharers, scope, settings):
    group = None if sharers == 1 else dist.new_subgroups(sharers)[0]
    processes = Processes(rank, 4, torch.device('cpu'), dist.group.WORLD, group)
    vae = small_vae(norm_scope=scope)
    if rank:                                      # processes that begin differently agree on the first one's weights
        torch.nn.init.zeros_(vae.decoder.conv_in.weight)
    trainer = soften(make_trainer(clips, results, vae, processes=processes, **settings))
    trainer.train()
    return {name: trainer.parts[name].state_dict() for name in ('model', 'ema', 'discriminator', 'loss')}


@pytest.mark.slow
@pytest.mark.parametrize('sharers, batch, scope', [(2, 2, 'frame'), (2, 2, 'clip'), (4, 4, 'frame'), (1, 1, 'frame')])
def test_four_processes_that_share_clips_or_not_train_like_one(workers, clips, tmp_path, sharers, batch, scope):
    settings = dict(**EVERYTHING | dict(image_steps=1), train_num_steps=3, save_and_sample_every=3, num_frames=8 if sharers == 4 else 5, seed=1)
    one = soften(make_trainer(clips, tmp_path / 'one', small_vae(norm_scope=scope), train_batch_size=4, **settings))
    seen = []
    one.vae.encoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    one.train()
    assert seen[0] == 1 and {1, settings['num_frames']} == set(seen[1:])           # an image first, then both
    four = workers.run(three_steps, clips, tmp_path / 'four', sharers, scope, settings | dict(train_batch_size=batch),
                       patience=240.)            # starting takes long on a busy machine
    for states in four:
        for name, state in states.items():
            assert_same_state(state, one.parts[name].state_dict(), tolerance=2e-6)
    for ours, theirs in zip(read_log(tmp_path / 'four'), read_log(tmp_path / 'one'), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert float(ours[name] or 0) == pytest.approx(float(theirs[name] or 0), rel=2e-3, abs=1e-4), name

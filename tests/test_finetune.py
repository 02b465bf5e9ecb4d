"""Fine-tuning begins with a trained model, and is the training that diffusers' own scripts do: steps of AdamW move all weights
alike. Through train.py, on tiny random folders of CogVideoX and on models of this library. Run: pytest tests/test_finetune.py"""

import csv
import gc
import os
import re
import signal
from pathlib import Path

import pytest
import together
import torch
from test_cogvideox import HEIGHT, LENGTH, WIDTH, folder  # noqa: F401, folder is a fixture: a model folder of a kind
from test_scripts import run  # noqa: F401, a fixture: a script in this process
from test_trainer import CPU, assert_same_state

from video_diffusion import GaussianDiffusion, Trainer, Unet3D, checkpoint, diffusion_from_checkpoint, load_lora, shapes
from video_diffusion.networks.text import T5Encoder
from video_diffusion.training import finetune
from video_diffusion.training.finetune import ADAM, begin_with
from video_diffusion.training.held_out import COLUMNS
from video_diffusion.weights import cogvideox_from_folder
from video_diffusion.weights.cogvideox_dit import diffusers_name, diffusers_pieces

diffusers = pytest.importorskip('diffusers')
transformers = pytest.importorskip('transformers')

ROOT = Path(__file__).parent.parent
SMALL = ['--steps', 2, '--sample-every', 2, '--sample-rows', 1, '--sample-steps', 2, '--batch-size', 2, '--accumulate', 1, '--lr', 1e-2,
         '--device', 'cpu']


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    return shapes.make_shapes(tmp_path_factory.mktemp('clips'), 5, image_size=24, num_frames=9)


# the step

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['sincos', 'rope', '1.5-i2v'])
def test_steps_of_all_weights_are_those_of_diffusers(folder, clips, tmp_path, kind):
    """Its training script noises by the scheduler, turns the answer into a clean clip by get_velocity, and weighs the squared error
    by 1 / (1 - alpha_bar); the step is AdamW's, with gradients clipped at 1."""
    path = folder(kind)
    diffusion = cogvideox_from_folder(path)
    begin_with(diffusion, torch.device('cpu'))
    diffusion.double()
    trainer = Trainer(diffusion, clips, train_batch_size=3, gradient_accumulate_every=1, train_num_steps=2, train_lr=1e-3,
                      max_grad_norm=1., null_cond_prob=0., results_folder=tmp_path, processes=CPU, **ADAM)
    trainer.prob_focus_present, trainer.focus_present_mask = 0., None
    trainer.dataset.floats = lambda clips: clips.double() / 255
    data = trainer.batches()

    peer = diffusers.CogVideoXTransformer3DModel.from_pretrained(path, subfolder='transformer').double()
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(path, transformer=peer)
    scheduler = diffusers.CogVideoXDPMScheduler.from_pretrained(path, subfolder='scheduler')
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    before = diffusers_pieces({name: weight.clone() for name, weight in peer.state_dict().items()})
    for number in range(2):                                  # in the second the moments count, too
        bytes_, captions = next(data)
        draws = trainer.draw(number, 3, 0.)
        posterior, hint = diffusion.encode(bytes_.double() / 255, draws.get('image_noise'))
        z = diffusion.filled_up((posterior.mean + posterior.std * draws['posterior_noise']) * diffusion.scale).transpose(1, 2)
        noise, t = draws['noise'].double().transpose(1, 2), draws['t']
        noisy = scheduler.add_noise(z, noise, t)
        given, told = noisy, {}
        if kind != 'sincos':
            told['image_rotary_emb'] = pipeline._prepare_rotary_positional_embeddings(HEIGHT, WIDTH, z.shape[1], torch.device('cpu'))
        if hint is not None:
            image = torch.zeros_like(z)
            image[:, :1] = (hint * diffusion.image_scale).transpose(1, 2) * draws['known_mask'][:, :1, None, None, None]
            given, told['ofs'] = torch.cat((noisy, image), dim=2), torch.full((1,), 2.)
            assert draws['known_mask'][:, 0].any()
        answer = peer(given, diffusion.embed(captions), t, return_dict=False, **told)[0]
        clean = scheduler.get_velocity(answer, noisy, t)
        weights = 1 / (1 - scheduler.alphas_cumprod[t].double())[:, None, None, None, None]
        loss = (weights * (clean - z) ** 2).flatten(1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        trainer.train_step(iter([(bytes_, captions)]))
        assert trainer.pending[number][1].item() == pytest.approx(loss.item(), rel=1e-6)

    theirs, moved = diffusers_pieces(peer.state_dict()), 0
    for name, weight in diffusion.denoise_fn.state_dict().items():
        name = diffusers_name(name)
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=2e-5, msg=lambda m: f'{name}: {m}')     # a step is 1e-3
        assert (weight - theirs[name]).abs().mean() < 3e-7, name
        moved += (weight - before[name]).abs().max() > 5e-4
    assert moved >= len(theirs) - 4              # all but the last gates of text, and biases that a softmax does not see


# runs

@pytest.mark.slow
def test_a_lora_run_from_films_to_samples(run, folder, clips):
    path = folder('sincos')
    code, out, err = run('train.py', clips, '--model', path, '--lora', 2, '--held-out', 2, *SMALL)
    assert code == 0 and '3 clips in' in out and 'and 2 held out' in out and f'sample.py {path} --lora results --prompt' in out, err
    state = checkpoint.load_run('results')
    assert all('lora_' in name for name in state['model']) and state['fps'] == 8.
    assert state['sampling'] == dict(sampler='ddim', steps=2, cond_scale=6.)
    with open('results/log.csv') as file:
        rows = list(csv.DictReader(file))
    assert all(float(rows[-1][name]) > 0 for name in COLUMNS) and not rows[0][COLUMNS[0]]
    assert len(list((path / 'latents').glob('*/*.pt'))) == 5 and len(list((path / 'captions').glob('*/*.pt'))) == 5

    videos = []
    for flags in ((), ('--lora', 'results'), ('--lora', 'results', '--lora-scale', 0)):
        code, _, err = run('sample.py', path, '--prompt', 'a red ball', '--steps', 2, '--device', 'cpu', '--format', 'gif', '--overwrite', *flags)
        assert code == 0, err
        videos.append(Path('samples/000-a-red-ball.gif').read_bytes())
    assert videos[0] == videos[2] != videos[1]


@pytest.mark.slow
def test_all_weights_and_then_the_checkpoint_draws_alone(run, folder, clips):
    path = folder('learned')
    code, out, err = run('train.py', clips, '--model', path, *SMALL)
    assert code == 0 and 'sample.py results --prompt' in out and out.strip().endswith('--image first.png'), err
    state = checkpoint.load_run('results')
    before, after = cogvideox_from_folder(path).denoise_fn, diffusion_from_checkpoint('results').denoise_fn
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert not torch.equal(a, b), name                                                    # the learned table, too
    assert state['sampling']['sampler'] == 'ddim' and state['config']['latent']['image_scale'] == pytest.approx(0.7)
    code, _, err = run('sample.py', 'results', '--prompt', 'a red ball', '--steps', 2, '--device', 'cpu')
    assert code == 0, err


def test_samples_of_a_milestone_begin_with_a_picture(run, folder, clips, monkeypatch):
    seen = []
    original = Trainer.given_clips
    monkeypatch.setattr(Trainer, 'given_clips', lambda self: seen.append((self, original(self))) or seen[-1][1])
    code, _, err = run('train.py', clips, '--model', folder('1.5-i2v'), '--lora', 2, *SMALL)
    trainer, given = seen[0]
    assert code == 0 and given.keys() == {'first_frames'} and given['first_frames'].shape == (1, 3, 1, HEIGHT, WIDTH), err
    first = trainer.clips.floats(trainer.clips.clip(0))
    assert torch.equal(given['first_frames'][0, :, 0], first[:, 0]) and trainer.sample_prompts() == [trainer.clips.captions[0]]


def test_a_run_that_was_stopped_ends_with_the_same_weights(run, folder, clips, tmp_path, monkeypatch):
    common = 'train.py', clips, '--model', folder('sincos'), '--lora', 2, '--held-out', 2, *SMALL[2:]
    assert run(*common, '--steps', 4, '--results', 'whole')[0] == 0
    original = Trainer.learn
    monkeypatch.setattr(Trainer, 'learn', lambda self, *args, **more:
                        self.step == 2 and os.kill(os.getpid(), signal.SIGTERM) or original(self, *args, **more))
    assert 'stopped at step 3' in run(*common, '--steps', 4, '--results', 'parts')[1]
    monkeypatch.setattr(Trainer, 'learn', original)
    code, _, err = run(*common, '--steps', 4, '--results', 'parts', '--resume')
    assert code == 0, err
    assert_same_state(checkpoint.load_run('parts'), checkpoint.load_run('whole'))


@pytest.mark.slow
def test_two_processes_that_share_the_weights_train_like_one(run, folder, clips):
    path = folder('sincos')
    common = [str(flag) for flag in (clips, '--model', path, *SMALL, '--held-out', 2, '--lr', 1e-3)]
    assert run('train.py', *common, '--results', 'one')[0] == 0
    together.run(2, ROOT / 'train.py', *common, '--results', 'two', '--batch-size', '1', '--shard')
    one, two = checkpoint.load_run('one'), checkpoint.load_run('two')
    assert_same_state(two['model'], one['model'], tolerance=1e-5)
    with open('one/log.csv') as a, open('two/log.csv') as b:
        for ours, theirs in zip(csv.DictReader(a), csv.DictReader(b), strict=True):
            for name in ('loss', *COLUMNS):
                assert float(ours[name] or 0) == pytest.approx(float(theirs[name] or 0), rel=1e-4)


@pytest.mark.slow
def test_t5_is_asked_once_for_each_caption_and_then_leaves_the_memory(run, folder, clips, monkeypatch):
    alive, asked = [], []
    tokens, learn = T5Encoder.tokens, Trainer.learn
    monkeypatch.setattr(T5Encoder, 'tokens', lambda self, texts: asked.extend(texts) or tokens(self, texts))

    def look(self, *args, **more):
        gc.collect()
        alive.append(sum(type(one) is transformers.T5EncoderModel for one in gc.get_objects()))
        return learn(self, *args, **more)
    monkeypatch.setattr(Trainer, 'learn', look)
    path = folder('rope')
    gc.collect()
    others = sum(type(one) is transformers.T5EncoderModel for one in gc.get_objects())
    assert run('train.py', clips, '--model', path, '--lora', 2, *SMALL, '--results', 'one')[0] == 0
    assert len(asked) == len(set(asked)) == 5 and set(alive) == {others}
    assert run('train.py', clips, '--model', path, *SMALL, '--results', 'two')[0] == 0
    assert len(asked) == 5                                                                    # the second run finds them on the disk


@pytest.mark.slow
@pytest.mark.parametrize('network', ['unet', 'dit'])
def test_a_model_of_this_library_too(run, network):
    small = shapes.make_shapes('clips', 6, image_size=16, num_frames=4)
    flags = ('--dim', 16, '--attn-dim-head', 16, '--timesteps', 20, '--network', network)
    flags += ('--dim-mults', 1, 2) if network == 'unet' else ('--depth', 2)
    assert run('train.py', small, *SMALL, *flags, '--results', 'base')[0] == 0
    code, out, err = run('train.py', small, '--model', 'base', '--lora', 3, '--lora-alpha', 6, *SMALL)
    assert code == 0 and 'sample.py base --lora results' in out, err
    state = checkpoint.load_run('results')
    assert {tuple(pair) for pair in state['config']['lora']['layers'].values()} == {(3, 6.)}
    assert state['sampling'] == checkpoint.load_run('base')['sampling'] | {'steps': 2}
    load_lora(diffusion_from_checkpoint('base'), 'results')
    assert run('sample.py', 'base', '--lora', 'results', '--prompt', 'a red circle', '--device', 'cpu')[0] == 0
    assert run('train.py', small, '--model', 'base', *SMALL, '--results', 'all')[0] == 0
    assert run('sample.py', 'all', '--prompt', 'a red circle', '--device', 'cpu')[0] == 0
    assert checkpoint.load_run('all')['config']['diffusion'] == checkpoint.load_run('base')['config']['diffusion']


@pytest.mark.slow
def test_one_clip_is_learnt_by_heart(folder, tmp_path):
    """At fixed noise the loss on it falls by half."""
    clip = shapes.make_shapes(tmp_path / 'clip', 1, image_size=24, num_frames=9)
    torch.manual_seed(0)
    diffusion = cogvideox_from_folder(folder('rope'))
    begin_with(diffusion, torch.device('cpu'), rank=8)
    trainer = Trainer(diffusion, clip, train_batch_size=2, gradient_accumulate_every=1, train_num_steps=60, train_lr=3e-2,
                      null_cond_prob=0., results_folder=tmp_path / 'results', save_and_sample_every=60, num_sample_rows=1, sample_steps=2,
                      ema_warmup=True, step_start_ema=0, update_ema_every=1, latent_cache=tmp_path, caption_cache=tmp_path, processes=CPU)
    trainer.held_out, trainer.measures = trainer.dataset, COLUMNS
    before = trainer.measure()
    trainer.train()
    after = trainer.measure()
    assert sum(after.values()) < sum(before.values()) / 2


def test_what_later_frames_show_is_encoded_before_the_encoder_leaves(folder, tmp_path):
    shapes.make_shapes(tmp_path / 'clips', 2, image_size=24, num_frames=20)
    for place in (tmp_path / 'clips').rglob('*.txt'):
        place.write_text('0: a red ball\n4: a blue ball\n8: the red square')
    diffusion = cogvideox_from_folder(folder('rope'))
    begin_with(diffusion, torch.device('cpu'), rank=2)
    trainer = Trainer(diffusion, tmp_path / 'clips', train_batch_size=2, train_num_steps=1, results_folder=tmp_path / 'results',
                      random_window=True, caption_cache=tmp_path, processes=CPU)
    assert not hasattr(diffusion.text_encoder, 'transformer')
    assert trainer.told(['a blue ball', 'the red square', 'a red ball']).shape[0] == 3
    assert len(list(tmp_path.glob('*/*.pt'))) == 3


def test_blocks_of_a_trained_unet_too_may_be_computed_twice():
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2), attn_heads=1), image_size=8, num_frames=2, timesteps=20)
    draws = dict(t=torch.tensor([3, 15]), noise=torch.randn(2, 3, 2, 8, 8))
    video, gradients, kept = torch.rand(2, 3, 2, 8, 8), [], []
    for recompute in (False, True):
        begin_with(diffusion, torch.device('cpu'), recompute=recompute)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = diffusion(video, **draws)
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, [p for p in diffusion.parameters() if p.requires_grad]))
    assert kept[1] < 0.6 * kept[0]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_example_at_the_top_says_all_that_is_asked():
    unet = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2), attn_heads=1), image_size=8, num_frames=2, timesteps=20)
    example = re.search(r'caches\(.*?\)', finetune.__doc__)[0]
    assert eval(example, dict(caches=finetune.caches, diffusion=unet)) == dict(latent_cache=None, caption_cache=None)


# what cannot be

@pytest.mark.slow
@pytest.mark.parametrize('flags, says', [
    (('--num-frames', 48), 'num_frames=48: CogVideoX draws 1 + a multiple of 8 frames, so give 49'),
    (('--image-size', 17), 'image_size=(17, 17): give multiples of 8 as height and width'),
    (('--lora', 0), 'rank=0: give 1 or more'),
    (('--lora-alpha', 2), '--lora-alpha: it is the strength of adapters, so give --lora too'),
    (('--lora', 2, '--lora-alpha', 0), 'lora_alpha=0.0: give a number above 0'),
    (('--dim', 8), '--dim has no meaning with --model, which knows that itself'),
    (('--known-frames', 0.5), '--known-frames has no meaning with --model'),
    (('--held-out', 5), 'cannot hold out 5 of 5 clips'),
    (('--results', 'CLIPS/..', '--resume', '--lora', 2), 'there is no checkpoint in'),
])
def test_mistakes_are_told_in_one_sentence(run, folder, clips, flags, says):
    flags = [str(flag).replace('CLIPS', str(clips)) for flag in flags]
    code, _, err = run('train.py', clips, '--model', folder('sincos'), *SMALL, *flags)
    complaint = [line for line in err.splitlines() if line.startswith('train.py: ')]
    assert code == 2 and len(complaint) == 1 and says in complaint[0] and 'Traceback' not in err, err


@pytest.mark.slow
def test_mistakes_about_models(run, folder, clips, tmp_path):
    half = tmp_path / 'half'
    half.mkdir()
    (half / 'model_index.json').write_text((folder('sincos') / 'model_index.json').read_text())
    small = shapes.make_shapes('small', 3, image_size=16, num_frames=4)
    for args, says in (
        ((clips, '--model', half), 'half is no whole model: it has no tokenizer, no text_encoder, no transformer'),
        ((clips, '--model', 'nowhere'), 'there is no checkpoint nowhere'),
        (('--model', folder('sincos')), '--model: give a folder of clips to fine-tune on'),
        ((clips, '--lora', 2), '--lora and --lora-alpha: adapters lie beside trained weights, so give --model too'),
        ((clips, '--model', folder('learned'), '--image-size', 8, 16), 'up to 9 frames of 16x24 only'),
        ((clips, '--model', folder('sincos'), '--muon-lr', 0.01), 'weight_decay=0.0001 is for Adam'),
    ):
        code, _, err = run('train.py', *args, '--device', 'cpu')
        complaint = [line for line in err.splitlines() if line.startswith('train.py: ')]
        assert code == 2 and len(complaint) == 1 and says in complaint[0] and 'Traceback' not in err, err
    base = '--dim', 8, '--dim-mults', 1, '--unconditional'
    assert run('train.py', small, *SMALL, *base, '--results', 'base')[0] == 0
    code, _, err = run('train.py', small, '--model', 'base', *SMALL, '--num-frames', 2)
    assert code == 2 and 'clips are to be of the size that base was trained for' in err, err


def test_short_clips_are_told_of(run, folder):
    short = shapes.make_shapes('short', 3, image_size=24, num_frames=5)
    with pytest.warns(UserWarning, match='have 5 frames or fewer: up to 9 their last one stands still'):
        assert run('train.py', short, '--model', folder('sincos'), '--lora', 2, *SMALL)[0] == 0
    assert LENGTH == cogvideox_from_folder(folder('sincos')).text_encoder.length

"""train.py and sample.py as a user runs them. Run: pytest tests/test_scripts.py"""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import together
import torch
from PIL import Image

from video_diffusion import checkpoint, gif_to_tensor, shapes, video_tensor_to_gif, video_tensor_to_mp4
from video_diffusion.data.folder import clip_shape
from video_diffusion.vae.causal_vae import CausalVAE
from video_diffusion.weights.cogvideox_vae import causal_vae_to_diffusers

ROOT = Path(__file__).parent.parent
SMALL = ['--dim', '8', '--dim-mults', '1', '2', '--batch-size', '2', '--steps', '2', '--sample-every', '2', '--sample-rows', '1',
         '--sample-steps', '2', '--timesteps', '20', '--device', 'cpu']


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a script in this process, in an empty folder: (exit code, what it printed, what it complained about)."""
    monkeypatch.chdir(tmp_path)

    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        try:
            runpy.run_path(str(ROOT / script), run_name='__main__')
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    return shapes.make_shapes(tmp_path_factory.mktemp('clips'), 6, image_size=20, num_frames=3)


@pytest.mark.slow
def test_the_toy_world_from_nothing_to_samples(run, tmp_path):
    code, out, _ = run('train.py', *SMALL, '--quick', '--toy-clips', 8)
    assert code == 0
    assert len(list(Path('data/shapes-16').glob('*.gif'))) == 8
    assert 'grade of 64 clips: ' in out and '% lawful, ' in out and '% caption-true' in out
    assert 'python sample.py results --prompt "' in out
    assert gif_to_tensor('results/graded.gif').shape[1] == 8
    assert checkpoint.load_run('results')['config']['unet']['frame_numbers']               # learns its captions sooner

    code, out, _ = run('sample.py', 'results', '--prompt', 'a red circle moving left', '--prompt', 'a cat', '--count', 2, '--device', 'cpu')
    assert code == 0 and '4 videos are in samples' in out
    names = sorted(p.name for p in Path('samples').iterdir())
    assert names == ['000-a-red-circle-moving-left.gif', '001-a-red-circle-moving-left.gif', '002-a-cat.gif', '003-a-cat.gif', 'all.gif']
    assert gif_to_tensor(f'samples/{names[0]}').shape == (3, 8, 16, 16)

    # A second run must not destroy the first, and --resume must go on from it.
    code, _, err = run('train.py', *SMALL, '--quick', '--toy-clips', 8)
    assert code == 2 and 'already holds a run' in err
    code, out, _ = run('train.py', *SMALL, '--quick', '--toy-clips', 8, '--resume', '--steps', 3)
    assert code == 0 and checkpoint.load(checkpoint.newest('results'))['step'] == 3
    code, _, err = run('train.py', *SMALL, '--quick', '--toy-clips', 9, '--results', 'other')
    assert code == 2 and 'holds 8 clips of 8 frames of 16x16' in err


def test_own_clips_with_and_without_captions(run, clips, tmp_path):
    code, out, _ = run('train.py', clips, *SMALL)
    assert code == 0 and '3 frames of 20x20' in out and 'with captions' in out and 'grade' not in out
    code, out, _ = run('train.py', clips, *SMALL, '--unconditional', '--results', 'free', '--image-size', 32, 12, '--num-frames', 2)
    assert code == 0 and '2 frames of 32x12' in out
    code, _, _ = run('train.py', clips, *SMALL, '--results', 'wide', '--image-size', 16, 32)
    noise = [[checkpoint.load(checkpoint.newest(folder))['config']['diffusion'][name] for name in ('schedule_shift', 'min_snr_gamma',
              'min_snr_power')] for folder in ('results', 'free', 'wide')]
    assert not checkpoint.load_run('results')['config']['unet']['frame_numbers']
    # More noise where there are captions and more pixels, and steps weighed where that was measured.
    assert code == 0 and noise == [[20 * 20 / 16 ** 2, 16 ** 2 / 20 ** 2, 0.25], [1., None, 1.], [2., 0.5, 0.25]]
    code, out, _ = run('sample.py', 'free', '--count', 3, '--device', 'cpu', '--sampler', 'ddpm', '--steps', 3)
    assert code == 0 and gif_to_tensor('samples/002.gif').shape == (3, 2, 32, 12)


@pytest.mark.slow
def test_a_folder_of_films_in_and_films_out(run):
    pytest.importorskip('av')
    for name in ('a', 'b'):
        video_tensor_to_mp4(torch.rand(3, 1, 16, 16).repeat(1, 30, 1, 1), f'films/{name}.mp4', fps=30, lossless=True)
    flags = ['--fps', 5, '--clips-per-video', 3, '--random-window', '--num-frames', 3, '--known-frames', 0.5]
    code, out, err = run('train.py', 'films', *SMALL, *flags)
    assert code == 0 and '6 clips in films' in out and '3 frames of 16x16' in out, err
    assert checkpoint.load('results/model-1.pt')['fps'] == 5 and clip_shape('results/1.gif')[1] == pytest.approx(5)

    code, out, _ = run('sample.py', 'results', '--format', 'mp4', '--first-frames', 'films/a.mp4', '--known', 1, '--count', 2, '--device', 'cpu')
    assert code == 0 and sorted(path.name for path in Path('samples').iterdir()) == ['000.mp4', '001.mp4', 'all.mp4']
    assert clip_shape('samples/001.mp4')[:3] == (3, 5, 16)
    code, _, _ = run('sample.py', 'results', '--fps', 20, '--count', 1, '--device', 'cpu')
    assert code == 0 and clip_shape('samples/000.gif')[1] == pytest.approx(20)
    code, _, err = run('sample.py', 'results', '--fps', 0)
    assert code == 2 and 'fps=0' in err and len(err.splitlines()) == 1

    code, _, err = run('train.py', 'films', '--stage', 'vae', *SMALL[:11], '--image-steps', 0, '--fps', 5, '--time-compression', 1, '--device', 'cpu')
    assert code == 0, err
    code, out, err = run('sample.py', 'results_vae', '--reconstruct', 'films/a.mp4', '--format', 'mp4', '--fps', 10, '--device', 'cpu')
    assert code == 0 and clip_shape('samples/a-reconstructed.mp4') == (10, 10, 16, 16), err


def test_clips_and_images_together(run, clips):
    shutil.copytree(clips, 'mixed')
    Image.new('RGB', (20, 20), (200, 30, 30)).save('mixed/still.png')
    code, _, err = run('train.py', 'mixed', *SMALL, '--images')
    assert code == 2 and '1 of 7 clips have no caption, mixed/still.png' in err
    Path('mixed/still.txt').write_text('a red square')
    code, out, _ = run('train.py', 'mixed', *SMALL, '--images')
    assert code == 0 and '7 clips in mixed, with captions' in out


@pytest.mark.slow
def test_sizes_fit_the_network(run, clips):
    code, out, _ = run('train.py', clips, *SMALL, '--dim-mults', 1, 1, 1, 1)  # frames must be multiples of 8
    assert code == 0 and '3 frames of 16x16' in out


@pytest.mark.slow
def test_videos_that_go_on_from_a_clip(run, clips):
    code, out, _ = run('train.py', clips, *SMALL, '--known-frames', 0.5)
    assert code == 0
    first = sorted(clips.glob('*.gif'))[0]
    begins = ('sample.py', 'results', '--prompt', 'a red circle moving left', '--device', 'cpu')
    code, out, _ = run(*begins, '--first-frames', first, '--known', 2, '--frames', 7, '--later-cond-scale', 0)
    assert code == 0
    drawn, given = gif_to_tensor('samples/000-a-red-circle-moving-left.gif'), gif_to_tensor(first)
    assert drawn.shape == (3, 7, 20, 20)
    assert (drawn[:, :2] - given[:, -2:]).abs().mean() < 0.02                    # up to the colours of a palette
    Image.new('RGB', (30, 24), (0, 200, 90)).save('start.png')
    code, out, _ = run(*begins, '--image', 'start.png', '--known-by', 'guide', '--out', 'green')
    drawn = gif_to_tensor('green/000-a-red-circle-moving-left.gif')
    assert code == 0 and (drawn[:, 0] - torch.tensor([0, 200, 90]).view(3, 1, 1) / 255).abs().max() < 0.05

    for wrong, says in ((('--first-frames', first, '--known', 3), 'so give 1 to 2'), (('--known', 3), 'give that too'),
                        (('--first-frames', 'nothing.gif'), 'nothing.gif'), (('--frames', 2), 'num_frames=2'),
                        (('--later-cond-scale', 0), '--frames'), (('--later-prompt', 'a'), '--frames'),
                        (('--prompt', 'b => c'), '--frames'), (('--prompt', 'b => c => d', '--frames', 4), 'cannot show 3 captions'),
                        (('--frames', 9, '--later-prompt', 'a', '--prompt', 'b => c'), 'without =>')):
        code, _, err = run(*begins, *wrong)
        assert code == 2 and says in err and len(err.splitlines()) == 1, err


@pytest.mark.slow
def test_a_model_whose_frames_have_noise_of_their_own(run):
    """Its toy world is long, windows of it have captions of their own; it goes on from frames, and on, as captions take turns."""
    code, out, _ = run('train.py', *SMALL, '--quick', '--toy-clips', 8, '--frame-noise', 'independent', '--num-frames', 4)
    assert code == 0 and 'grade of 64 clips: ' in out
    assert [gif_to_tensor(f'data/shapes-16-long/0000{i}.gif').shape[1] for i in range(4)] == [4, 12, 4, 12]
    state = checkpoint.load(checkpoint.newest('results'))
    assert state['config']['diffusion']['frame_noise'] == 'independent' and state['sampling']['cond_scale'] == 2
    draw = 'sample.py', 'results', '--device', 'cpu', '--steps', 2, '--prompt', 'a red circle moving left => a red circle moving up'
    code, out, _ = run(*draw, '--first-frames', 'data/shapes-16-long/00000.gif', '--known', 2, '--frames', 11, '--history-scale', 1.5)
    assert code == 0
    video = gif_to_tensor('samples/000-a-red-circle-moving-left-a-red-circle-moving-up.gif')
    assert video.shape == (3, 11, 16, 16)
    assert (video[:, :2] - gif_to_tensor('data/shapes-16-long/00000.gif')[:, -2:]).abs().mean() < 0.02  # up to the colours of a palette
    code, out, err = run(*draw[:-1], 'a red circle moving left', '--later-prompt', 'a red circle', '--frames', 7, '--out', 'later')
    assert code == 0 and gif_to_tensor('later/000-a-red-circle-moving-left.gif').shape == (3, 7, 16, 16), err
    code, _, err = run('train.py', *SMALL, '--quick', '--results', 'other', '--frame-noise', 'independent', '--known-frames', 0.5)
    assert code == 2 and 'train.py: --known-frames: with --frame-noise independent' in err


@pytest.mark.slow
def test_prompts_from_a_file_and_the_same_seed(run, clips):
    run('train.py', clips, *SMALL)
    Path('prompts.txt').write_text('a red circle moving left\n\n  a blue square moving up \n')
    for out in ('a', 'b'):
        code, _, _ = run('sample.py', 'results/model-1.pt', '--prompts-file', 'prompts.txt', '--seed', 3, '--out', out, '--device', 'cpu')
        assert code == 0
    assert [p.name for p in sorted(Path('a').glob('0*'))] == ['000-a-red-circle-moving-left.gif', '001-a-blue-square-moving-up.gif']
    assert Path('a/all.gif').read_bytes() == Path('b/all.gif').read_bytes()


@pytest.mark.slow
def test_many_videos_are_numbered_on_and_captions_that_nobody_reads_may_be_bad(run, clips):
    shutil.copytree(clips, 'mine')
    for place in list(Path('mine').rglob('*.txt'))[:1]:
        place.write_bytes('grün'.encode('latin-1'))
    code, _, err = run('train.py', 'mine', *SMALL)
    assert code == 2 and 'is not UTF-8' in err
    code, _, err = run('train.py', 'mine', *SMALL, '--unconditional')
    assert code == 0, err
    Path('samples').mkdir()
    for number in (7, 1000):
        shutil.copy(next(clips.rglob('*.gif')), f'samples/{number:03d}-a.gif')
    code, out, _ = run('sample.py', 'results', '--count', 1, '--steps', 1, '--device', 'cpu')
    assert code == 0 and Path('samples/1001.gif').exists() and Path('samples/all-from-1001.gif').exists()


@pytest.mark.slow
def test_captions_of_later_frames_count_for_a_transformers_longest(run):
    Path('long').mkdir()
    for name in 'ab':
        video_tensor_to_gif(torch.rand(3, 9, 8, 8), f'long/{name}.gif')
        Path(f'long/{name}.txt').write_text('0: a ball\n1: ' + 'word ' * 15)
    code, _, err = run('train.py', 'long', '--network', 'dit', '--dim', 32, '--depth', 1, '--attn-dim-head', 16, '--num-frames', 2,
                       '--image-size', 8, '--batch-size', 2, '--steps', 2, '--timesteps', 20, '--sample-rows', 1, '--sample-steps', 1,
                       '--random-window', '--device', 'cpu')
    assert code == 0, err


@pytest.mark.slow
def test_schedules_samplers_and_guidance_by_flags(run, clips):
    code, _, _ = run('train.py', clips, *SMALL, '--schedule', 'scaled_linear', '--schedule-shift', 3, '--zero-snr', '--min-snr', 5,
                     '--offset-noise', 0.1, '--sampler', 'dpm++2m_sde')
    state = checkpoint.load(checkpoint.newest('results'))
    assert code == 0 and state['sampling']['sampler'] == 'dpm++2m_sde'
    assert state['config']['diffusion'].items() >= dict(
        schedule='scaled_linear', schedule_shift=3., zero_snr=True, min_snr_gamma=5., min_snr_power=1., offset_noise=0.1).items()
    common = ['results', '--prompt', 'a red circle', '--device', 'cpu', '--sampler', 'dpm++2m', '--steps', 3]
    pictures = []
    for more in ([], ['--negative', 'a blue square'], ['--guidance-rescale', 0.7], ['--dynamic-guidance', 5],
                 ['--spacing', 'cosine']):
        code, _, err = run('sample.py', *common, *more, '--cond-scale', 20, '--overwrite')
        assert code == 0, err
        pictures.append(Path('samples/all.gif').read_bytes())
    assert len(set(pictures)) == 5


@pytest.mark.slow
def test_a_transformer_instead_of_the_unet_in_pixels_and_in_latents(run, clips):
    small = ['--network', 'dit', '--dim', 16, '--attn-dim-head', 16, '--depth', 1, *SMALL[5:]]
    long = Path(shutil.copytree(clips, 'long'))
    sorted(long.glob('*.txt'))[0].write_text('one two three four five six seven eight nine ten')
    code, out, err = run('train.py', 'long', *small)
    assert code == 0 and '2 frames of 20x20' in out, err                          # 3 are no multiple of --frame-patch 2
    config = checkpoint.load_run('results')['config']['dit']
    assert (config['text_length'], config['patch'], config['frame_patch']) == (10, 4, 2)
    assert run('sample.py', 'results', '--prompt', 'a red circle moving left', '--device', 'cpu')[0] == 0
    assert run('train.py', clips, '--stage', 'vae', *SMALL[:9], '--image-steps', 0, '--device', 'cpu')[0] == 0
    code, out, err = run('train.py', clips, *small, '--vae', 'results_vae', '--patch', 2, '--held-out', 2, '--known-frames', 0.5, '--results', 'latent')
    state = checkpoint.load_run('latent')['config']
    assert code == 0 and state['diffusion']['num_frames'] == 4 and state['latent']['num_frames'] == 3, err     # the first is there twice
    assert run('sample.py', 'latent', '--prompt', 'a red circle moving left', '--tile', 16, '--offload', '--device', 'cpu')[0] == 0
    for flags, says in ((('--network', 'dit', '--dim-mults', 1), '--dim-mults has no meaning with --network dit'),
                        (('--network', 'dit', '--focus-present', 0.5), '--focus-present has no meaning with --network dit'),
                        (('--depth', 3), '--depth has no meaning with --network unet')):
        code, _, err = run('train.py', clips, '--device', 'cpu', *flags)
        assert code == 2 and says in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.slow
@pytest.mark.parametrize('args, sentence', [
    (['nowhere'], 'there is no folder nowhere'),
    (['empty'], 'no clip in empty: looked for files ending in .gif'),
    (['CLIPS', '--image-size', '7'], 'multiples of 4'),
    (['CLIPS', '--image-size', '8', '8', '8'], 'image-size'),
    (['CLIPS', '--batch-size', '0'], 'train_batch_size=0'),
    (['CLIPS', '--zero-snr', '--objective', 'noise'], "Give objective='v' or 'x0'"),
    (['CLIPS', '--resume'], 'there is no checkpoint in results'),
])
def test_train_errors_are_one_line_and_exit_2(run, clips, args, sentence):
    Path('empty').mkdir()
    args = [str(clips) if a == 'CLIPS' else a for a in args]
    code, _, err = run('train.py', args[0], *SMALL, *args[1:])
    complaint = [line for line in err.splitlines() if line.startswith('train.py:')]
    assert code == 2 and len(complaint) == 1 and sentence in complaint[0] and 'Traceback' not in err


@pytest.mark.slow
def test_sample_errors_are_one_line_and_exit_2(run, clips):
    run('train.py', clips, *SMALL)
    run('train.py', clips, *SMALL, '--unconditional', '--results', 'free')
    torch.save({'weights': torch.zeros(2)}, 'foreign.pt')
    Path('text.pt').write_text('hello')
    Path('latin.txt').write_bytes('grün'.encode('latin-1'))
    for args, sentence in [
        (['nowhere'], 'there is no checkpoint nowhere'),
        (['.'], 'there is no checkpoint in .'),
        (['foreign.pt'], 'was not written by this library'),
        (['text.pt'], 'text.pt'),
        (['results'], 'say what to draw with --prompt'),
        (['free', '--prompt', 'x'], 'trained without captions'),
        (['free', '--count', '0'], '--count 0'),
        (['free', '--steps', '21'], 'steps=21'),
        (['free', '--negative', 'x'], 'need guidance'),
        (['results', '--prompts-file', 'none.txt'], 'none.txt'), (['results', '--prompts-file', 'latin.txt'], 'latin.txt is not UTF-8'),
        (['results', '--prompt', 'x', '--lora-scale', '0.5'], 'give --lora too'),
        (['results', '--prompt', 'x', '--text-encoder', 'someone/bert'], 'has learnt its words itself'),
        (['free', '--text-encoder', 'someone/bert'], '--text-encoder: this model was trained without captions'),
        (['free', '--out', 'text.pt'], 'text.pt'), (['free', '--out', '/proc'], '/proc'),      # said before anything is drawn
    ]:
        code, _, err = run('sample.py', *args, '--device', 'cpu')
        complaint = [line for line in err.splitlines() if line.startswith('sample.py:')]
        assert code == 2 and len(complaint) == 1 and sentence in complaint[0] and 'Traceback' not in err, args


@pytest.mark.slow
def test_help_says_every_default_in_few_lines():
    for script, most in (('train.py', 122), ('sample.py', 70)):
        text = subprocess.run([sys.executable, str(ROOT / script), '--help'], capture_output=True, text=True, check=True,
                              timeout=100).stdout
        assert len(text.splitlines()[0]) < 80 and text.count('\n') < most
        names = runpy.run_path(str(ROOT / script))
        table = names.get('DEFAULTS', {})
        for flag in (flag for group in names['FLAGS'].values() for flag in group):
            option = ' '.join(text.split(f'\n  {flag.name}', 1)[1].split('\n  -', 1)[0].split())
            if flag.dest in table:
                for value in (value for column in table[flag.dest] if column for value in column):
                    shown = ' '.join(map(str, value)) if isinstance(value, tuple) else str(value)
                    assert {'True': 'on', 'False': 'off'}.get(shown, shown) in option, (flag.name, value)
            elif flag.default not in (None, False, ()):
                assert f'[{flag.default}]' in option, flag.name


def test_our_own_faults_keep_their_traceback(run, clips, monkeypatch):
    """A sentence is for what the user can mend. A ValueError from inside torch is ours to mend, and --debug shows any."""
    code, _, err = run('train.py', clips, *SMALL, '--objective', 'noise', '--zero-snr')
    assert code == 2 and len(err.splitlines()) == 1
    with pytest.raises(ValueError, match='zero_snr'):
        run('train.py', clips, *SMALL, '--objective', 'noise', '--zero-snr', '--debug')
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: int('a fault in torch'))
    with pytest.raises(ValueError, match='a fault in torch'):
        run('train.py', clips, *SMALL)


@pytest.mark.parametrize('flags, says', [
    (('--channels', 1), '--channels 1: the toy world is told apart by its colours'),
    (('--device', 'banana'), "device='banana': this machine has cpu"),
    (('--device', 'cuda:x'), "device='cuda:x': this machine has cpu"),
    (('--steps', 0), 'train_num_steps=0: give a whole number, 1 or more'),
    (('--max-grad-norm', 0), 'max_grad_norm=0.0: give a number above 0'),
    (('--num-frames', 0), 'num_frames=0'),
    (('--noise-bias', 'nan'), 'noise_bias=nan'),
    (('--dim', 0), 'dim=0'), (('--dim', -8), 'dim=-8'), (('--dim-mults', 0), 'dim_mults=0'), (('--attn-dim-head', 1), 'attn_dim_head=1'),
    (('--timesteps', 0), 'timesteps=0'), (('--known-frames', 2), 'prob_cond_frames=2'), (('--focus-present', 'nan'), 'prob_focus_present=nan'),
    (('--offset-noise', -1), 'offset_noise=-1'), (('--null-cond-prob', 5), 'null_cond_prob=5'), (('--cond-scale', 'inf'), 'cond_scale=inf'),
    (('--timeout', 0), 'timeout=0.0: give a number above 0, at most 86400'), (('--timeout', 'nan'), 'timeout=nan'),
    (('--seed', 2 ** 64), 'seed=18446744073709551616'), (('--batch-size', -1), 'train_batch_size=-1'),
    (('--toy-clips', 3, 'clips/'), '--toy-clips: the toy world is drawn only where no folder is given'),
    (('--lora', 0), '--lora and --lora-alpha: adapters lie beside trained weights'),
    (('--lora-alpha', 0), '--lora and --lora-alpha: adapters lie beside trained weights'),
    (('--quick',), '--quick: it is a U-Net in a smaller toy world'),
    (('--vae', 'nowhere', '--channels', 3), '--channels: with --vae they are those of the VAE'),
])
def test_nonsense_on_the_command_line_is_one_sentence(run, clips, flags, says):
    shutil.copytree(clips, 'data/shapes-16')
    where = () if flags[0] in ('--toy-clips', '--channels', '--vae') else (clips,)
    code, _, err = run('train.py', *where, *SMALL, *flags)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.slow
def test_a_size_that_does_not_fit_is_said_and_few_diffusion_steps_are_sampled_in_as_many(run, clips):
    code, _, err = run('train.py', clips, *SMALL, '--image-size', 17)
    assert code == 2 and '--image-size 17 17: this model takes sides that are multiples of 4' in err
    assert run('train.py', clips, '--dim', 8, '--dim-mults', 1, 2, '--batch-size', 2, '--steps', 1, '--sample-rows', 1,
               '--timesteps', 5, '--device', 'cpu')[0] == 0
    assert checkpoint.load_run('results')['sampling']['steps'] == 5


@pytest.mark.slow
def test_sampling_is_shared_among_processes(run, clips, tmp_path):
    run('train.py', clips, *SMALL)
    Path('prompts.txt').write_text('a\nb\nc\n')
    common = [str(ROOT / 'sample.py'), 'results', '--prompts-file', 'prompts.txt', '--batch-size', '1', '--device', 'cpu']
    together.run(2, *common, '--out', 'two')
    run('sample.py', *common[1:], '--out', 'one')
    assert torch.allclose(gif_to_tensor('one/all.gif'), gif_to_tensor('two/all.gif'), atol=2 / 255)
    assert len(list(Path('two').glob('0*.gif'))) == 3


SMALL_VAE = ['--stage', 'vae', '--dim', '4', '--dim-mults', '1', '2', '--batch-size', '2', '--steps', '2', '--image-steps', '1',
             '--sample-every', '2', '--device', 'cpu']


def test_a_vae_from_nothing_to_a_reconstruction(run, clips):
    small = [*SMALL_VAE, '--toy-clips', 12, '--num-frames', 5, '--time-compression', 2]
    code, out, _ = run('train.py', *small)
    assert code == 0 and 'dB PSNR' in out and 'python sample.py results_vae --reconstruct data/shapes-32/' in out
    code, out, _ = run('sample.py', 'results_vae', '--reconstruct', 'data/shapes-32/00003.gif', '--device', 'cpu')
    assert code == 0 and '(3, 5, 32, 32) -> latents (4, 3, 16, 16) -> samples/00003-reconstructed.gif' in out
    assert gif_to_tensor('samples/00003-reconstructed.gif').shape == (3, 5, 32, 32)
    assert gif_to_tensor('samples/00003-compared.gif').shape == (3, 5, 32, 96)
    shutil.copy('data/shapes-32/00003.gif', 'samples/mine.gif')                  # where it lies among what was drawn
    for flags, name in (((), 'mine-reconstructed'), (('--frames', 3), 'mine-reconstructed-2'), (('--overwrite',), 'mine-reconstructed')):
        code, out, _ = run('sample.py', 'results_vae', '--reconstruct', 'samples/mine.gif', '--device', 'cpu', *flags)
        assert code == 0 and f'-> samples/{name}.gif, ' in out and Path(f'samples/{name}.gif'.replace('reconstructed', 'compared')).exists()
    assert Path('samples/mine.gif').read_bytes() == Path('data/shapes-32/00003.gif').read_bytes()
    assert gif_to_tensor('samples/mine-reconstructed-2.gif').shape[1] == 3
    code, _, _ = run('train.py', *small, '--resume', '--steps', 3)
    assert code == 0 and checkpoint.load(checkpoint.newest('results_vae'))['step'] == 3


@pytest.mark.slow
def test_of_the_toy_worlds_eight_frames_a_vae_that_compresses_time_takes_seven(run, clips):
    """And so does a diffusion in its latents: without a first one kept apart, the first two would come out alike."""
    code, out, _ = run('train.py', *SMALL_VAE, '--toy-clips', 12, '--time-compression', 2)
    assert code == 0 and out.startswith('drawing 12 clips into data/shapes-32\n7 frames of 32x32'), out
    code, out, _ = run('train.py', *SMALL, '--toy-clips', 12, '--vae', 'results_vae')
    assert code == 0 and '\n7 frames of 32x32' in '\n' + out, out
    assert gif_to_tensor(next(Path('data/shapes-32').glob('*.gif'))).shape[1] == 8


@pytest.mark.slow
def test_the_other_vae_trains_reconstructs_and_carries_a_diffusion(run, clips):
    code, out, _ = run('train.py', '--vae-kind', 'temporal', *SMALL_VAE, '--toy-clips', 12, '--num-frames', 4)
    assert code == 0
    code, out, _ = run('sample.py', 'results_vae', '--reconstruct', 'data/shapes-32/00003.gif', '--device', 'cpu')
    assert code == 0 and '(3, 4, 32, 32) -> latents (4, 4, 16, 16)' in out
    code, out, _ = run('train.py', *SMALL, '--toy-clips', 12, '--num-frames', 4, '--image-size', 32, '--vae', 'results_vae')
    assert code == 0
    code, out, _ = run('sample.py', 'results', '--prompt', 'a red circle moving left', '--device', 'cpu')
    assert code == 0 and gif_to_tensor('samples/000-a-red-circle-moving-left.gif').shape == (3, 4, 32, 32)
    code, _, err = run('train.py', clips, '--stage', 'vae', '--vae-kind', 'temporal', '--time-compression', 2, '--results', 'new')
    assert code == 2 and 'does not compress time' in err


def test_clips_are_cut_to_what_fits_the_vae(run, clips):
    code, out, _ = run('train.py', shapes.make_shapes('long', 10, image_size=21, num_frames=8), *SMALL_VAE,
                       '--time-compression', 2, '--disc-start', 1, '--image-share', 0.5)
    assert code == 0 and '7 frames of 20x20' in out
    video_tensor_to_gif(torch.rand(3, 6, 17, 23), 'odd.gif')
    code, out, _ = run('sample.py', 'results_vae', '--reconstruct', 'odd.gif', '--device', 'cpu')
    assert code == 0 and gif_to_tensor('samples/odd-reconstructed.gif').shape == (3, 5, 16, 22)


@pytest.mark.slow
def test_of_several_processes_one_reconstructs(run, clips):
    shapes.make_shapes('toy', 10, image_size=16, num_frames=3)
    run('train.py', 'toy', *SMALL_VAE)
    output = together.run(2, ROOT / 'sample.py', 'results_vae', '--reconstruct', 'toy/00003.gif', '--device', 'cpu')
    assert output.count('dB PSNR') == 1
    assert {path.name for path in Path('samples').iterdir()} == {'00003-reconstructed.gif', '00003-compared.gif'}


@pytest.mark.slow
def test_fine_tuning_takes_over_weights_and_their_sizes(run):
    source = CausalVAE(dim=4, dim_mults=(1, 2), latent_channels=2, blocks_per_level=1, time_compression=2, norm_groups=2)
    causal_vae_to_diffusers(source, 'given')
    shapes.make_shapes('toy', 10, image_size=16, num_frames=3)
    code, out, _ = run('train.py', 'toy', '--stage', 'vae', '--init', 'given', '--steps', 1, '--batch-size', 1, '--device', 'cpu',
                       '--lr', 0, '--ignore', 'decoder.conv_out')
    assert code == 0
    state = checkpoint.load_run('results_vae')['model']
    same = {name for name, value in source.state_dict().items() if torch.equal(value, state[name])}
    assert set(state) - same == {'decoder.conv_out.weight', 'decoder.conv_out.bias'}


@pytest.mark.slow
def test_errors_about_vaes_are_one_line_and_exit_2(run, clips):
    run('train.py', clips, *SMALL, '--unconditional')
    run('train.py', shapes.make_shapes('toy', 10, image_size=16, num_frames=3), *SMALL_VAE)
    run('train.py', 'toy', *SMALL_VAE, '--channels', 1, '--results', 'results_grey')
    for script, args, sentence in [
        ('train.py', ['toy', *SMALL_VAE, '--objective', 'v0'], 'invalid choice'),
        ('train.py', ['toy', *SMALL_VAE, '--objective', 'noise'], '--objective has no meaning with --stage vae'),
        ('train.py', ['toy', '--disc-start', '3'], '--disc-start has no meaning with --stage diffusion'),
        ('train.py', ['toy', *SMALL_VAE, '--shard'], '--shard has no meaning with --stage vae'),
        ('train.py', ['toy', '--shard', '--context-parallel', '2'], '--context-parallel has no meaning with --stage diffusion'),
        ('train.py', ['toy', *SMALL_VAE, '--results', 'new', '--init', 'x.pt'], '--init: the sizes'),
        ('train.py', ['toy', '--stage', 'vae', '--results', 'new', '--init', 'x.pt', '--channels', '1'], '--init: the sizes'),
        ('train.py', [*SMALL, '--vae', 'results_grey', '--results', 'new', '--toy-clips', 8], 'results_grey is not a VAE of colours'),
        ('train.py', ['toy', *SMALL_VAE, '--results', 'new', '--ignore', 'encoder'], '--ignore'),
        ('train.py', ['toy', *SMALL_VAE, '--results', 'new', '--perceptual', 'none.pth'], 'vgg16-397923af.pth'),
        ('train.py', ['toy', *SMALL_VAE, '--results', 'new', '--context-parallel', '2'], 'start several with torchrun'),
        ('train.py', ['toy', *SMALL_VAE, '--results', 'new', '--image-steps', '2'], 'image_steps=2 of 2 steps: clips would never'),
        ('train.py', ['toy', *SMALL_VAE, '--results', 'new', '--num-frames', '6', '--time-compression', '4',
                      '--dim-mults', '1', '1', '1'], '6 frames: time is compressed by 4'),
        ('sample.py', ['results_vae', '--device', 'cpu'], 'results_vae holds a VAE: give it a clip with --reconstruct'),
        ('sample.py', ['results', '--reconstruct', 'toy/00000.gif', '--device', 'cpu'], 'results holds a diffusion model'),
        ('sample.py', ['results_vae', '--reconstruct', 'none.gif', '--device', 'cpu'], 'none.gif'),
    ]:
        code, _, err = run(script, *args)
        assert code == 2 and sentence in err and 'Traceback' not in err, (args, err)

"""CogVideoX as a whole: from a model folder that diffusers has saved, tiny and random, come the videos of its pipelines.

    pytest tests/test_cogvideox.py

Same prompts, through a T5 with a tokenizer, same noise, same steps. What is compared is in [0, 1].
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from video_diffusion import add_lora, checkpoint
from video_diffusion.diffusion import samplers
from video_diffusion.networks.text import T5Encoder, text_encoder_from_config
from video_diffusion.weights import (
    cogvideox_defaults,
    cogvideox_from_folder,
    cogvideox_from_sat,
    cogvideox_to_folder,
    dit_to_sat,
    lora_to_diffusers,
)
from video_diffusion.weights.cogvideox_vae import sat_name

diffusers = pytest.importorskip('diffusers')
transformers = pytest.importorskip('transformers')

ROOT = Path(__file__).parent.parent
WORDS = 'a the red blue ball square rolls left right and'.split()
PROMPTS = ['a red ball rolls left', 'the blue square']
HEIGHT, WIDTH, LENGTH = 16, 24, 7                        # pixels; tokens
KINDS = {
    'sincos': {},
    'rope': dict(use_rotary_positional_embeddings=True),
    'learned': dict(use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True, in_channels=8),
    '1.5': dict(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
    '1.5-i2v': dict(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False, in_channels=8, ofs_embed_dim=16),
}
SCHEDULERS = {'ddim': 'CogVideoXDDIMScheduler', 'dpm++2m_sde': 'CogVideoXDPMScheduler'}


def save_text(folder):
    """A two-layer T5, and a tokenizer that ends a prompt as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    ids = {word: index for index, word in enumerate(['<pad>', '</s>', '<unk>', *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>', unk_token='<unk>', eos_token='</s>')
    model = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(ids), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    return tokenizer, model


def save(folder, kind, sampler, frames, **vae):
    torch.manual_seed(0)
    tokenizer, text_encoder = save_text(folder)
    transformer = diffusers.CogVideoXTransformer3DModel(**{**dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=32,
        num_layers=2, sample_height=HEIGHT // 4, sample_width=WIDTH // 4, sample_frames=frames, max_text_seq_length=LENGTH), **KINDS[kind]})
    for weight in transformer.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    if kind == 'learned':
        assert transformer.patch_embed.pos_embedding.normal_().dtype == torch.float64    # by birth, and so in the file
    shift, scale = (3., 1.15258426) if kind == 'sincos' else (1., 0.7)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, scaling_factor=scale,
        down_block_types=('CogVideoXDownBlock3D',) * 3, up_block_types=('CogVideoXUpBlock3D',) * 3,
        invert_scale_latents=kind == '1.5-i2v', **vae)
    scheduler = getattr(diffusers, SCHEDULERS[sampler])(
        prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing', snr_shift_scale=shift)
    pipeline = peer_class(kind)(tokenizer, text_encoder, vae.eval(), transformer.eval(), scheduler)
    pipeline.save_pretrained(folder)
    return folder


def peer_class(kind):
    return diffusers.CogVideoXImageToVideoPipeline if KINDS[kind].get('in_channels') else diffusers.CogVideoXPipeline


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model folder of a kind; written once."""
    made = {}

    def get(kind, sampler='ddim', frames=9):
        if (kind, sampler, frames) not in made:
            made[kind, sampler, frames] = save(tmp_path_factory.mktemp('model'), kind, sampler, frames)
        return made[kind, sampler, frames]
    return get


def peer_video(folder, kind, noise, monkeypatch, prompts=PROMPTS, fresh=None, image=None, **how):
    """What diffusers draws (b c f h w). `fresh`: the noise of each step of the SDE, of which its scheduler draws some for nothing."""
    pipeline = peer_class(kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if fresh is not None:
        step, turn = pipeline.scheduler.step, []
        monkeypatch.setattr(pipeline.scheduler, 'step', lambda *args, **kwargs: turn.append(0) or step(*args, **kwargs))
        monkeypatch.setattr('diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor',
                            lambda *_, **__: fresh[len(turn) - 1].transpose(1, 2))
    if image is not None:
        module = 'diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video'
        monkeypatch.setattr(f'{module}.retrieve_latents', lambda output, _: output.latent_dist.mode())
        how['image'] = image.expand(len(prompts), -1, -1, -1)
    how = {**dict(num_inference_steps=4, guidance_scale=6.), **how}
    video = pipeline(prompt=prompts, height=HEIGHT, width=WIDTH, latents=noise.transpose(1, 2), max_sequence_length=LENGTH, output_type='pt',
                     **how).frames
    return video.transpose(1, 2)


@pytest.mark.parametrize('kind, sampler, frames', [
    ('sincos', 'ddim', 9), ('sincos', 'dpm++2m_sde', 17), ('rope', 'ddim', 17), ('rope', 'dpm++2m_sde', 9), ('rope', 'ddim', 49),
    ('learned', 'ddim', 17), ('learned', 'dpm++2m_sde', 9), ('1.5', 'ddim', 9), ('1.5', 'dpm++2m_sde', 17), ('1.5-i2v', 'ddim', 17),
])
def test_videos_are_those_of_diffusers(folder, monkeypatch, kind, sampler, frames):
    path = folder(kind, sampler, frames)
    diffusion = cogvideox_from_folder(path)
    assert (diffusion.num_frames, diffusion.height, diffusion.width) == (frames, HEIGHT, WIDTH)
    how = cogvideox_defaults(path)
    assert how.pop('fps') == (16. if kind.startswith('1.5') else 8.) and how['sampler'] == sampler and how['steps'] == 50
    latents = diffusion.diffusion
    noise = torch.randn(2, 4, latents.num_frames, latents.height, latents.width)
    assert latents.num_frames == (frames - 1) // 4 + 1 + kind.startswith('1.5')
    fresh = [torch.randn_like(noise) for _ in range(4)] if sampler == 'dpm++2m_sde' else None
    image = torch.rand(1, 3, HEIGHT, WIDTH) if latents.prob_cond_frames else None
    theirs = peer_video(path, kind, noise, monkeypatch, fresh=fresh, image=image, num_frames=frames)
    if fresh:
        drawn = iter(fresh)
        monkeypatch.setattr(samplers, 'randn_like', lambda *_: next(drawn))
    ours = diffusion.sample(PROMPTS, noise=noise, image=image, progress=False, **how | dict(steps=4))
    assert theirs.std() > 0.05                                                       # there is something to compare
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_wave_of_guidance_is_that_of_diffusers(folder, monkeypatch):
    diffusion = cogvideox_from_folder(folder('sincos'))
    noise = torch.randn(2, 4, 3, 4, 6)
    draw = lambda **how: diffusion.sample(PROMPTS, 6., noise=noise, negative='', sampler='ddim', steps=4, progress=False, **how)
    theirs = peer_video(folder('sincos'), 'sincos', noise, monkeypatch, use_dynamic_cfg=True)
    torch.testing.assert_close(draw(wave_guidance=True), theirs, rtol=0, atol=1e-4)
    assert (draw(dynamic_guidance=5.) - theirs).abs().max() > 0.01


# text

def test_text_is_what_the_pipeline_sees(folder):
    path = folder('sincos')
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(path)
    encoder = T5Encoder(str(path), length=LENGTH)
    texts = ['a red ball', '', 'the blue square rolls left and right and left']      # shorter, nothing, longer than there is room for
    expected = pipeline._get_t5_prompt_embeds(texts, max_sequence_length=LENGTH)
    assert expected[1].abs().min(dim=-1).values.max() > 0                            # padding is not zeros
    torch.testing.assert_close(encoder.tokens(texts), expected)
    again = text_encoder_from_config(encoder.config())
    assert torch.equal(again.tokens(texts), encoder.tokens(texts))
    with pytest.raises(ValueError, match='length=0'):
        T5Encoder(str(path), length=0)


# there and back

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['sincos', '1.5-i2v'])
def test_a_folder_of_ours_is_read_by_diffusers(folder, tmp_path, monkeypatch, kind):
    diffusion = cogvideox_from_folder(folder(kind))
    cogvideox_to_folder(diffusion, tmp_path, sampler='ddim')
    noise = torch.randn(2, *(getattr(diffusion.diffusion, name) for name in ('channels', 'num_frames', 'height', 'width')))
    image = None if kind == 'sincos' else torch.rand(1, 3, HEIGHT, WIDTH)
    videos = [peer_video(path, kind, noise, monkeypatch, image=image, num_frames=9) for path in (folder(kind), tmp_path)]
    assert torch.equal(*videos)
    again = cogvideox_from_folder(tmp_path)
    assert again.config()['latent'] == diffusion.config()['latent']
    assert again.diffusion.config()['diffusion'] == diffusion.diffusion.config()['diffusion']
    assert all(torch.equal(a, b) for a, b in zip(diffusion.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_folder_of_sat_is_the_same_model(folder, tmp_path, monkeypatch):
    diffusion = cogvideox_from_folder(folder('sincos'))
    dit_to_sat(diffusion.denoise_fn, tmp_path / 'transformer')
    (tmp_path / 'vae').mkdir()
    state = {sat_name(name, len(diffusion.vae.decoder.levels)): value for name, value in diffusion.vae.state_dict().items()}
    torch.save({'state_dict': state}, tmp_path / 'vae' / '3d-vae.pt')
    monkeypatch.setattr('video_diffusion.weights.cogvideox_vae.sat_config', lambda _: diffusion.vae.config)     # 32 groups are too many
    sat = cogvideox_from_sat(tmp_path, folder('sincos'), positions='sincos', size=(3, 4, 6), text_length=LENGTH)
    how = dict(cond_scale=6., sampler='ddim', steps=4, seed=0, progress=False)
    torch.testing.assert_close(sat.sample(PROMPTS, **how), diffusion.sample(PROMPTS, **how), rtol=0, atol=1e-3)   # another epsilon
    with pytest.raises(FileNotFoundError, match='there is no checkpoint .*transformer'):
        cogvideox_from_sat(tmp_path / 'vae', folder('sincos'))


def test_a_checkpoint_holds_it_too(folder, tmp_path):
    """What a Trainer writes of such a model builds it again: its image_scale, chunks and T5."""
    diffusion = cogvideox_from_folder(folder('1.5-i2v'))
    config = diffusion.config()
    assert config['latent']['image_scale'] == pytest.approx(1 / 0.7) and config['text_encoder']['length'] == LENGTH
    torch.save(config, tmp_path / 'config.pt')
    again = checkpoint.build(type(diffusion).from_config, torch.load(tmp_path / 'config.pt', weights_only=True), diffusion.state_dict())
    assert again.has_config(config)
    noise, image = torch.randn(1, 4, 4, 4, 6), torch.rand(1, 3, HEIGHT, WIDTH)
    how = dict(noise=noise, image=image, sampler='ddim', steps=2, progress=False)
    assert torch.equal(again.sample(PROMPTS[:1], **how), diffusion.sample(PROMPTS[:1], **how))


# training

@pytest.mark.parametrize('kind', ['learned', '1.5-i2v'])
def test_in_training_an_image_is_told_alone_and_times_its_factor(folder, monkeypatch, kind):
    diffusion = cogvideox_from_folder(folder(kind))
    seen = {}
    monkeypatch.setattr(diffusion.diffusion, 'p_losses', lambda x0, t, cond, noise, **told: seen.update(x0=x0, **told))
    video, generator = torch.rand(3, 3, 9, HEIGHT, WIDTH), torch.Generator().manual_seed(0)
    draws = diffusion.draw(3, video.device, generator)
    draws['image_noise'].zero_()
    draws['posterior_noise'].zero_()
    draws['known_mask'] = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)[:, [0, 1, 2, 2][:draws['noise'].shape[2]]]
    diffusion(video, PROMPTS + [''], t=torch.tensor([3, 4, 5]), **draws)
    z = diffusion.posterior(video).mean * diffusion.scale
    front = z[:, :, :1] if kind == '1.5-i2v' else z[:, :, :0]
    torch.testing.assert_close(seen['x0'], torch.cat((front, z), dim=2))
    image = diffusion.posterior(video[:, :, :1]).mean * (1 / 0.7 if kind == '1.5-i2v' else 0.7)
    torch.testing.assert_close(seen['known'][:, :, :1], image)
    assert seen['known_mask'].tolist() == [[told, *[False] * (z.shape[2] + front.shape[2] - 1)] for told in (True, True, False)]
    torch.testing.assert_close(diffusion.decode(seen['x0']), diffusion.decode(torch.cat((front * 0 + 9, z), dim=2)))
    del draws['known_mask']
    diffusion(video, PROMPTS + [''], t=torch.tensor([3, 4, 5]), **draws)             # drawn here: no later frame either
    assert not seen['known_mask'][:, 1:].any()


# sample.py

@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    """Run sample.py here; what it writes goes into a dict, lossless: (exit code, complaint, {name: video})."""
    monkeypatch.chdir(tmp_path)
    written = {}
    monkeypatch.setattr('video_diffusion.data.folder.write_clip',
                        lambda video, path, fps, scale=1: written.update({f'{Path(path).name} {fps:g}': video}))

    def run(*args):
        written.clear()
        monkeypatch.setattr(sys, 'argv', ['sample.py', *map(str, args), '--device', 'cpu'])
        try:
            runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err, written
    return run


def seeded(diffusion_frames, seed):
    return torch.randn(1, 4, diffusion_frames, HEIGHT // 4, WIDTH // 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_the_script_draws_what_the_pipeline_draws(folder, script, monkeypatch):
    code, err, written = script(folder('sincos'), '--prompt', PROMPTS[0], '--prompt', PROMPTS[1], '--steps', 4)
    assert code == 0, err
    assert list(written) == ['000-a-red-ball-rolls-left.mp4 8', '001-the-blue-square.mp4 8', 'all.mp4 8']
    for number, video in zip(range(2), written.values()):
        theirs = peer_video(folder('sincos'), 'sincos', seeded(3, number), monkeypatch, prompts=PROMPTS[number:number + 1])
        torch.testing.assert_close(video, theirs[0], rtol=0, atol=1e-4)
    code, err, longer = script(folder('sincos'), '--prompt', PROMPTS[0], '--steps', 4, '--frames', 17, '--image-size', 8, 24,
                               '--cond-scale', 1, '--format', 'gif')
    assert code == 0 and longer['000-a-red-ball-rolls-left.gif 8'].shape == (3, 17, 8, 24), err


def test_the_script_begins_with_images(folder, script, monkeypatch):
    torch.manual_seed(1)
    images = (torch.rand(2, HEIGHT, WIDTH, 3) * 255).byte()
    for name, image in zip('ab', images):
        Image.fromarray(image.numpy()).save(f'{name}.png')
    Path('prompts.txt').write_text(f'{PROMPTS[0]}@@a.png\n{PROMPTS[1]} @@ b.png\n')
    code, err, written = script(folder('1.5-i2v'), '--prompts-file', 'prompts.txt', '--steps', 4)
    assert code == 0, err
    for number, video in zip(range(2), written.values()):
        image = images[number:number + 1].permute(0, 3, 1, 2) / 255
        theirs = peer_video(folder('1.5-i2v'), '1.5-i2v', seeded(4, number), monkeypatch, prompts=PROMPTS[number:number + 1],
                            image=image, num_frames=9)
        torch.testing.assert_close(video, theirs[0], rtol=0, atol=1e-4)
    same = written['001-the-blue-square.mp4 16']
    code, err, written = script(folder('1.5-i2v'), '--prompt', PROMPTS[1], '--image', 'b.png', '--steps', 4, '--seed', 1)
    assert code == 0 and torch.equal(written['000-the-blue-square.mp4 16'], same), err
    for wrong, says in ((('--prompts-file', 'prompts.txt', '--image', 'a.png'), 'or all --image'),
                        (('--prompts-file', 'prompts.txt', '--prompt', 'a ball'), '2 of 3 prompts'),
                        (('--prompt', 'a ball', '--image', 'c.png'), 'c.png')):
        code, err, _ = script(folder('1.5-i2v'), *wrong)
        complaint = [line for line in err.splitlines() if line.startswith('sample.py: ')]
        assert code == 2 and len(complaint) == 1 and says in complaint[0] and 'Traceback' not in err


@pytest.mark.slow
def test_the_script_puts_adapters_in(folder, script, tmp_path):
    diffusion = cogvideox_from_folder(folder('sincos'))
    add_lora(diffusion, 2)
    for name, weight in diffusion.named_parameters():
        if 'lora_B' in name:
            weight.data.normal_()
    lora_to_diffusers(diffusion, tmp_path / 'lora')
    noise = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = diffusion.sample(PROMPTS[:1], 6., noise=noise, negative='', sampler='ddim', steps=4, progress=False)
    common = folder('sincos'), '--prompt', PROMPTS[0], '--steps', 4
    videos = [script(*common, *more)[2]['000-a-red-ball-rolls-left.mp4 8'].clone() for more in
              ([], ['--lora', 'lora'], ['--lora', 'lora/pytorch_lora_weights.safetensors', '--lora-scale', 0])]
    torch.testing.assert_close(videos[1], expected[0], rtol=0, atol=1e-5)
    assert torch.equal(videos[0], videos[2]) and (videos[0] - videos[1]).abs().max() > 0.01
    wide = script(folder('learned'), '--prompt', 'a', '--lora', 'lora')                # as wide: it fits there too
    assert wide[0] == 0, wide[1]


# errors

def half(folder, tmp_path, lost):
    path = shutil.copytree(folder('sincos'), tmp_path / 'half')
    shutil.rmtree(path / lost) if (path / lost).is_dir() else (path / lost).unlink()
    return path


@pytest.mark.parametrize('lost, says', [
    ('text_encoder', 'no whole model: it has no text_encoder; download all of it'),
    ('scheduler', 'it has no scheduler'),
    ('transformer/diffusion_pytorch_model.safetensors', 'holds 0 .safetensors files'),
    ('vae/config.json', 'holds no config.json'),
    ('scheduler/scheduler_config.json', 'holds no scheduler_config.json'),
    ('text_encoder/model.safetensors', 'the text encoder .* cannot be loaded'),
])
def test_a_folder_that_is_half_there(folder, script, tmp_path, lost, says):
    path = half(folder, tmp_path, lost)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        cogvideox_from_folder(path)
    code, err, _ = script(path, '--prompt', 'a')
    assert code == 2 and sum(line.startswith('sample.py: ') for line in err.splitlines()) == 1 and 'Traceback' not in err


def test_a_file_that_is_cut_off(folder, tmp_path):
    path = shutil.copytree(folder('sincos'), tmp_path / 'cut')
    weights = path / 'transformer' / 'diffusion_pytorch_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match='diffusion_pytorch_model.safetensors is refused'):
        cogvideox_from_folder(path)


def test_what_cannot_be_drawn(folder, tmp_path):
    for kind, how, says in (
        ('sincos', dict(num_frames=48), 'so give 49'),
        ('sincos', dict(num_frames=13), 'so give'),
        ('sincos', dict(image_size=(16,)), 'multiples of 8 as height and width'),
        ('sincos', dict(image_size=(20, 24)), 'multiples of 8 as height and width'),
        ('learned', dict(image_size=(24, 24)), 'up to 9 frames of 16x24 only'),
        ('learned', dict(num_frames=17), 'up to 9 frames of 16x24 only'),
    ):
        with pytest.raises(ValueError, match=says):
            cogvideox_from_folder(folder(kind), **how)
    diffusion = cogvideox_from_folder(folder('learned'))
    with pytest.raises(ValueError, match='where k is 1,'):
        diffusion.sample(['a'], first_frames=torch.rand(1, 3, 5, HEIGHT, WIDTH))
    diffusion.image_scale = 0.5
    with pytest.raises(ValueError, match='image_scale=0.5'):
        cogvideox_to_folder(diffusion, tmp_path)


def test_other_pipelines_and_schedules_are_refused(folder, tmp_path):
    path = shutil.copytree(folder('sincos'), tmp_path / 'other')
    index = json.loads((path / 'model_index.json').read_text())
    (path / 'model_index.json').write_text(json.dumps(index | {'_class_name': 'FluxPipeline'}))
    with pytest.raises(ValueError, match='it describes a FluxPipeline'):
        cogvideox_from_folder(path)
    (path / 'model_index.json').write_text(json.dumps(index))
    schedule = json.loads((path / 'scheduler' / 'scheduler_config.json').read_text())
    (path / 'scheduler' / 'scheduler_config.json').write_text(json.dumps(schedule | {'beta_end': 0.02}))
    with pytest.raises(ValueError, match="'beta_end': 0.02"):
        cogvideox_from_folder(path)

"""VAEs of every kind train, are saved and give back the clips that they gave before; fp16 with its scaler, on the CPU too.

Run: pytest tests/test_vae_kinds.py (a few configurations), pytest --slow tests/test_vae_kinds.py (hundreds)
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import assert_same_state
from test_vae_trainer import EVERYTHING, make_trainer, small_vae

from video_diffusion import CausalVAE, TemporalVAE, shapes, vae_from_checkpoint
from video_diffusion.training import loop, vae_trainer
from video_diffusion.vae.vae_checkpoint import vae_from_config


@pytest.fixture(scope='session')
def clips(tmp_path_factory):
    """Three clips: fewer than most batches."""
    return shapes.make_shapes(tmp_path_factory.mktemp('few'), 3, image_size=16, num_frames=5)


# Any configuration

@st.composite
def configurations(draw):
    """(settings of a VAE with its kind, settings of its training) that fit together."""
    choose = lambda *values: draw(st.sampled_from(values))
    levels, channels, groups = choose(1, 2, 3), choose(1, 3, 4), choose(1, 2, 4)
    vae = dict(in_channels=channels, out_channels=channels, latent_channels=choose(1, 3), dim=groups * choose(1, 2), norm_groups=groups,
               dim_mults=tuple(choose(1, 2) for _ in range(levels)), blocks_per_level=choose(1, 2), gradient_checkpointing=choose(True, False))
    compression = 1
    if choose('causal', 'temporal') == 'causal':
        compression = choose(*[n for n in (1, 2, 4) if n <= 2 ** (levels - 1)])
        vae |= dict(vae='CausalVAE', time_compression=compression, norm_scope=choose('clip', 'frame'), dropout=choose(0., 0.3))
    else:
        vae |= dict(vae='TemporalVAE')
    frames = choose(*[n for n in (1, 2, 3, 4, 5) if n % compression < 2])
    training = dict(num_frames=frames, image_size=(choose(12, 16), 16), train_batch_size=choose(1, 2, 5), train_num_steps=2, loss=choose('l1', 'l2'),
                    disc_start=choose(None, 0, 1), image_share=choose(0., 0.5, 1.), learn_logvar=choose(True, False), held_out=1,
                    gradient_accumulate_every=choose(1, 2), only_train_decoder=choose(True, False))
    return vae, training


@pytest.mark.slow
@given(configurations())
def test_any_vae_trains_is_saved_and_gives_back_the_same(clips, tmp_path_factory, configuration):
    config, training = configuration
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('any')
    trainer = make_trainer(clips, folder, vae_from_config(config), **training)
    trainer.train()
    vae = vae_from_checkpoint(folder)
    video = torch.rand(1, config['in_channels'], training['num_frames'], 16, 16)
    with torch.no_grad(), trainer.averaged():
        again = vae(video, sample=False)[0]
        assert again.shape == video.shape and torch.equal(again, trainer.vae(video, sample=False)[0])
    assert (folder / '1.gif').exists()


BAD = [('in_channels', 0), ('out_channels', -1), ('latent_channels', 0), ('dim', 0), ('dim', -8), ('dim', 8.5), ('blocks_per_level', 0),
       ('blocks_per_level', 10 ** 12), ('norm_groups', 0), ('norm_groups', -4), ('norm_groups', 3), ('dim_mults', ()), ('dim_mults', (0, 1)),
       ('dim_mults', (1,) * 20), ('dim_mults', (1, -2))]


@pytest.mark.parametrize('name, value', [*BAD, ('time_compression', 0), ('time_compression', -2), ('dropout', -0.1), ('dropout', 1.),
                                         ('dropout', float('nan')), ('norm_scope', 'batch')])
def test_settings_of_a_vae_that_make_no_sense_are_refused(name, value):
    for kind in (CausalVAE, TemporalVAE):
        if kind is TemporalVAE and (name, value) not in BAD:
            continue
        with pytest.raises(ValueError, match='norm_groups=|dim_mults has' if name == 'dim_mults' else f'{name}='):
            kind(**{**dict(dim=8, dim_mults=(1, 2), norm_groups=4, blocks_per_level=1), **({'time_compression': 2} if kind is CausalVAE else {}), name: value})


@pytest.mark.parametrize('kind', [CausalVAE, TemporalVAE])
def test_videos_of_any_precision_are_read_in_that_of_the_weights(kind):
    torch.manual_seed(0)
    vae, video = kind(dim=8, dim_mults=(1, 1, 1), norm_groups=4, blocks_per_level=1), torch.rand(1, 3, 5, 16, 16).half()
    same = vae(video.float(), sample=False)[0]
    for dtype in (torch.float16, torch.float64):                              # the latter is what numpy gives
        torch.testing.assert_close(vae(video.to(dtype), sample=False)[0], same, rtol=0, atol=0)
    assert vae.double().encode(video.float()).mode().dtype == torch.float64
    assert vae.decode(vae.encode(video).mode().float()).dtype == torch.float64


# fp16, which needs a scaler; no CPU is fast in it, so the trainer has to be talked into it

@pytest.fixture
def fp16(monkeypatch):
    monkeypatch.setattr(loop, 'amp_dtype', lambda device: torch.float16)
    return dict(amp=True, **EVERYTHING | dict(image_steps=0, image_share=0.2))


@pytest.fixture
def fitting_scale(monkeypatch):
    """One that so small a batch does not overflow, so that no step is left out."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: scaler(device, init_scale=256., enabled=enabled))


@pytest.mark.slow
def test_fp16_trains_both_networks_and_resumes_to_the_last_bit(clips, tmp_path, fp16, fitting_scale):
    whole = make_trainer(clips, tmp_path / 'whole', **fp16)
    before = {name: [p.detach().clone() for p in whole.parts[name].parameters()] for name in ('model', 'discriminator')}
    whole.train()
    assert whole.scaler.is_enabled() and whole.state_dict()['scaler']['_growth_tracker'] == 4
    for name, weights in before.items():
        assert any(not torch.equal(p, q) for p, q in zip(weights, whole.parts[name].parameters())), name
        assert all(p.dtype == torch.float32 for p in whole.parts[name].parameters())
    make_trainer(clips, tmp_path / 'parts', **fp16 | dict(train_num_steps=2)).train()
    second = make_trainer(clips, tmp_path / 'parts', **fp16)
    second.load(-1)
    second.train()
    assert_same_state(second.state_dict(), whole.state_dict())


@pytest.mark.slow
def test_fp16_follows_float32(clips, tmp_path, fp16, fitting_scale):
    half = make_trainer(clips, tmp_path / 'half', train_num_steps=3, **fp16)
    half.train()
    full = make_trainer(clips, tmp_path / 'full', train_num_steps=3, **fp16 | dict(amp=False))
    full.train()
    ours, theirs = ([line.split(',')[1:7] for line in (tmp_path / name / 'log.csv').read_text().splitlines()[1:]] for name in ('half', 'full'))
    for row, other in zip(ours, theirs, strict=True):
        assert [float(x) for x in row] == pytest.approx([float(x) for x in other], rel=0.05, abs=1e-3)


@pytest.mark.slow
def test_the_critic_keeps_its_weight_in_fp16_however_many_values_a_batch_has(clips, tmp_path, fp16, monkeypatch):
    """A batch of a thousand times as many values has gradients a thousand times smaller."""
    weights = {}
    for amp in (True, False):
        trainer = make_trainer(clips, tmp_path, **fp16 | dict(amp=amp, disc_start=0, image_share=0., learn_logvar=False))
        forward = trainer.loss.forward
        trainer.loss.forward = lambda *args: [value / 3e4 for value in forward(*args)]
        monkeypatch.setattr(vae_trainer, 'generator_loss', lambda *args: vae_trainer.discriminator_loss(*args[:1], -args[0], args[1]) / 3e4)
        weights[amp] = trainer.learn(torch.stack([trainer.dataset.clip(i) for i in range(2)]) if not trainer.dataset.captions else (
            torch.stack([trainer.dataset.clip(i) for i in range(2)]), None), 0, True)[4].item()
    assert weights[False] > 1e-3 and weights[True] == pytest.approx(weights[False], rel=0.05)


@pytest.mark.slow
def test_a_step_that_overflows_is_left_out_and_the_run_goes_on(clips, tmp_path, fp16):
    trainer = make_trainer(clips, tmp_path, **fp16 | dict(train_num_steps=2, disc_start=0))
    trainer.scaler = trainer.parts['scaler'] = torch.amp.GradScaler('cpu', init_scale=2. ** 60)
    before = [p.detach().clone() for p in trainer.vae.parameters()]
    trainer.train()
    assert trainer.scaler.get_scale() == 2. ** 58
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.vae.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize('first', [True, False])
def test_a_run_may_go_on_with_fp16_or_without(clips, tmp_path, fp16, first):
    make_trainer(clips, tmp_path, small_vae(), **fp16 | dict(amp=first, train_num_steps=2)).train()
    second = make_trainer(clips, tmp_path, small_vae(), **fp16 | dict(amp=not first))
    second.load(-1)
    second.train()
    assert second.step == 4 and bool(second.state_dict()['scaler']) != first

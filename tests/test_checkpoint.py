"""A file may lie about sizes, types and what it holds: every lie is one ValueError of one sentence, and takes no memory.

Run: pytest tests/test_checkpoint.py (a few dozen mutated files), pytest --slow tests/test_checkpoint.py (thousands)
"""

import copy
import json
import pickle
import random
import resource
import socket
import zipfile

import pytest
import torch

from video_diffusion import (
    CausalVAE,
    GaussianDiffusion,
    LatentDiffusion,
    TemporalVAE,
    Unet3D,
    WordEncoder,
    checkpoint,
    vae_from_checkpoint,
)
from video_diffusion.diffusion.latent import diffusion_from_checkpoint, diffusion_from_state, latent_shape
from video_diffusion.vae.vae_checkpoint import vae_config, vae_from_state
from video_diffusion.weights import (
    causal_vae_from_diffusers,
    causal_vae_from_sat,
    causal_vae_to_diffusers,
    temporal_vae_from_diffusers,
    temporal_vae_to_diffusers,
)
from video_diffusion.weights.cogvideox_vae import sat_name

VAE = dict(dim=4, dim_mults=(1, 2), latent_channels=2, blocks_per_level=1, norm_groups=2, time_compression=2)


def run_of(model, config, **more):
    """What a Trainer saves."""
    average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {'config': config, 'model': state, 'ema': {'average': average, 'updates': 3}, 'step': 1, 'seed': 0, 'seconds': 1., **more}


def make_runs():
    torch.manual_seed(0)
    sampling = dict(cond_scale=1., sampler='ddim', steps=2)
    pixels = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, resnet_groups=4, cond_dim=6), image_size=8,
                               num_frames=3, timesteps=40, text_encoder=WordEncoder(6, 32))
    vae = CausalVAE(**VAE)
    channels, frames, *size = latent_shape(vae, 3, (8, 8))
    latent = LatentDiffusion(GaussianDiffusion(Unet3D(8, dim_mults=(1,), channels=channels, resnet_groups=4), image_size=tuple(size), channels=channels,
                                               num_frames=frames, timesteps=40, latents=True, objective='v'), vae, scale=1., num_frames=3)
    return {'pixels': run_of(pixels, pixels.config(), sampling=sampling), 'latent': run_of(latent, latent.config(), sampling=sampling),
            'causal': run_of(vae, vae_config(vae)), 'temporal': run_of(*(lambda v: (v, vae_config(v)))(TemporalVAE(dim=4, dim_mults=(1, 2), norm_groups=2)))}


@pytest.fixture(scope='module')
def runs():
    return make_runs()


def load_any(path, kind):
    return vae_from_checkpoint(path) if kind in ('causal', 'temporal') else diffusion_from_checkpoint(path)


# What is sound comes back

@pytest.mark.parametrize('kind', ['pixels', 'latent', 'causal', 'temporal'])
def test_a_sound_checkpoint_comes_back_with_its_averaged_weights(runs, tmp_path, kind):
    state = copy.deepcopy(runs[kind])
    for value in state['ema']['average'].values():
        value += 1
    checkpoint.save(state, tmp_path / 'model-1.pt')
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = load_any(tmp_path, kind)
    assert torch.equal(torch.get_rng_state(), before)                # weights that are not needed are not drawn
    for name, value in model.state_dict().items():
        assert torch.equal(value, {**state['model'], **state['ema']['average']}[name]), name
    frozen = {name for name in dict(model.named_parameters()) if name.startswith('vae.')} if kind == 'latent' else set()
    assert all(p.requires_grad == (name not in frozen and 'rotary' not in name) for name, p in model.named_parameters())
    if kind in ('pixels', 'latent'):
        cond = ['a', 'b'] if kind == 'pixels' else None
        assert model.sample(cond, batch_size=2, steps=2, sampler='ddim', progress=False).isfinite().all()
    else:
        assert model(torch.rand(1, 3, 3, 8, 8))[0].isfinite().all()


def test_a_sound_checkpoint_of_another_kind_says_who_reads_it(runs):
    held = {}
    for state in runs.values():
        kind = 'VAE' if 'vae' in state['config'] else 'LatentDiffusion' if 'latent' in state['config'] else 'GaussianDiffusion'
        held[kind] = state
    assert len(held) == 3
    for kind, state in held.items():
        reader = 'vae_from_checkpoint' if kind == 'VAE' else 'diffusion_from_checkpoint'
        for model in (GaussianDiffusion, LatentDiffusion):
            if model.__name__ != kind:
                with pytest.raises(ValueError, match=f'^the checkpoint holds a {kind}: read it with {reader}$'):
                    model.from_state(copy.deepcopy(state))
    with pytest.raises(ValueError, match='^the checkpoint holds a VAE: read it with vae_from_checkpoint$'):
        diffusion_from_state(held['VAE'])


def test_a_model_made_from_a_state_in_memory_does_not_share_it(runs):
    state = copy.deepcopy(runs['causal'])
    vae = vae_from_state(state)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.fill_(7.)
    assert all(torch.equal(a, b) for a, b in zip(state['model'].values(), runs['causal']['model'].values()))


def test_half_precision_weights_become_what_the_model_computes_in(runs):
    state = copy.deepcopy(runs['causal'])
    state['model'] = {name: value.half() for name, value in state['model'].items()}
    state['ema']['average'] = {name: value.half() for name, value in state['ema']['average'].items()}
    assert {p.dtype for p in vae_from_state(state).parameters()} == {torch.float32}


# Files that are none

def test_files_that_are_no_checkpoint_say_so(tmp_path):
    for name, content in {'text.pt': b'hello, I am a text file\n', 'empty.pt': b'', 'zip.pt': b'PK\x03\x04' + 50 * b'x', 'number.pt': pickle.dumps(7),
                          'nul.pt': bytes(1000), 'py.pt': b'import os\n', 'dots.pt': b'.....'}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            checkpoint.load_run(tmp_path / name)
    with zipfile.ZipFile(tmp_path / 'bomb.pt', 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('archive/data.pkl', pickle.dumps({}))
        file.writestr('archive/data/0', bytes(10 ** 7))
    with pytest.raises(ValueError, match='unpacks to more'):
        checkpoint.load(tmp_path / 'bomb.pt')


@pytest.mark.parametrize('state', [[1], {'config': {}}, {'config': {}, 'model': [], 'ema': {}}, {'config': {}, 'model': {}, 'ema': {'average': 3}},
                                   {'config': 'x', 'model': {}, 'ema': {'average': {}}}, {'config': {}, 'model': {}, 'ema': {}}])
def test_a_checkpoint_of_another_form_is_not_ours(tmp_path, state):
    torch.save(state, tmp_path / 'model-1.pt')
    for load in (vae_from_checkpoint, diffusion_from_checkpoint):
        with pytest.raises(ValueError, match='not written by this library'):
            load(tmp_path)


# Files that lie, each in one way

@pytest.mark.parametrize('changed, says', [
    ({'dim': 10 ** 12}, 'settings is 1000000000000'),
    ({'latent_channels': 10 ** 6}, 'has shape .*, expected .*1000000'),
    ({'dim': 2 ** 20}, 'has shape .*, expected .*1048576'),
    ({'blocks_per_level': 9}, 'missing: encoder.*and .* more'),
    ({'dim_mults': (1,) * 200_000}, 'dim_mults has 200000 entries'),
    ({'dim_mults': 'x'}, 'TypeError'),
    ({'dim': None}, 'TypeError'),
    ({'dim': torch.zeros(3)}, 'settings is tensor'),
    ({'norm_groups': 0}, 'norm_groups=0'),
    ({'surprise': 1}, "unexpected keyword argument 'surprise'"),
    ({'vae': ['CausalVAE']}, 'unhashable'),
    ({'vae': 'os.system'}, 'holds no VAE'),
])
def test_a_config_that_lies_is_refused_in_one_sentence(runs, changed, says):
    state = copy.deepcopy(runs['causal'])
    state['config'] |= changed
    with pytest.raises(ValueError, match=says) as error:
        vae_from_state(state)
    assert '\n' not in str(error.value) and len(str(error.value)) < 1500


def cut(value):
    return value.flatten()[:1].clone().expand(value.shape)           # as many numbers as before, says its shape; in memory there is one


@pytest.mark.parametrize('change, says', [
    (lambda w: w.update({'decoder.conv_in.weight': torch.zeros(3)}), r'decoder.conv_in.weight has shape \(3,\), expected \(8, 2, 3, 3, 3\)'),
    (lambda w: w.pop('decoder.conv_in.weight'), 'missing: decoder.conv_in.weight'),
    (lambda w: w.update({'more': torch.zeros(1), 5: 6}), 'not expected: more, not expected: 5'),
    (lambda w: w.update({'decoder.conv_in.bias': 'numbers'}), 'decoder.conv_in.bias is not a tensor of numbers'),
    (lambda w: w.update({'decoder.conv_in.bias': torch.zeros(8, device='meta')}), 'decoder.conv_in.bias is not a tensor of numbers'),
    (lambda w: w.update({'decoder.conv_in.bias': torch.zeros(8).to_sparse()}), 'decoder.conv_in.bias is not a tensor of numbers'),
    (lambda w: w.update({'decoder.conv_in.bias': torch.zeros(8, dtype=torch.long)}), 'decoder.conv_in.bias holds torch.int64'),
    (lambda w: w.update({'decoder.conv_in.bias': torch.zeros(8, dtype=torch.complex64)}), 'decoder.conv_in.bias holds torch.complex64'),
    (lambda w: w.update({name: cut(value) for name, value in w.items()}), 'the same few numbers'),
    (lambda w: w['decoder.conv_in.bias'].fill_(float('nan')), 'decoder.conv_in.bias holds NaN'),
    (lambda w: w['decoder.conv_in.weight'][0, 0].fill_(float('inf')), 'decoder.conv_in.weight holds NaN or infinity'),
])
def test_weights_that_do_not_fit_are_named(runs, change, says):
    state = copy.deepcopy(runs['causal'])
    state['ema']['average'] = {}
    change(state['model'])
    with pytest.raises(ValueError, match=says) as error:
        vae_from_state(state)
    assert '\n' not in str(error.value)


def test_a_vae_of_nan_is_named_where_its_latents_are_measured():
    vae = CausalVAE(**VAE)
    with torch.no_grad():
        vae.encoder.conv_out.bias.fill_(float('nan'))
    channels, frames, *size = latent_shape(vae, 3, (8, 8))
    diffusion = LatentDiffusion(GaussianDiffusion(Unet3D(8, dim_mults=(1,), channels=channels, resnet_groups=4), image_size=tuple(size), channels=channels,
                                                  num_frames=frames, latents=True, objective='v'), vae, num_frames=3)

    class Clips(list):
        def clip(self, index): return self[index]
        def floats(self, clips): return clips
    with pytest.raises(ValueError, match='NaN'):
        diffusion.measure_scale(Clips(torch.rand(2, 3, 3, 8, 8)))


def test_a_checkpoint_does_not_choose_what_is_fetched(runs, monkeypatch):
    def refuse(*_):
        raise AssertionError('it knocks at the network')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    state = copy.deepcopy(runs['pixels'])
    state['config']['text_encoder'] = {'kind': 'bert', 'name_or_path': 'someone/something', 'pool': 'mean'}
    with pytest.raises(ValueError, match="text encoder 'someone/something', which is no directory here: name it yourself"):
        diffusion_from_state(state)
    seen = []
    monkeypatch.setattr('video_diffusion.networks.text.load_transformer', lambda name, *_: seen.append(name) or 1 / 0)
    with pytest.raises(ValueError, match='ZeroDivisionError'):
        diffusion_from_state(state, text_encoder='bert-of-mine')
    assert seen == ['bert-of-mine']


def test_nor_does_a_network_that_asks_for_bert(monkeypatch):
    asked = []
    monkeypatch.setattr('video_diffusion.networks.text.BertEncoder', lambda name, pool: asked.append((name, pool)) or WordEncoder(768))
    model = GaussianDiffusion(Unet3D(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8, use_bert_text_cond=True), image_size=8, num_frames=3, timesteps=4)
    state = run_of(model, model.config())
    with pytest.raises(ValueError, match='name it yourself, text_encoder=... or --text-encoder, bert-base-cased if'):
        diffusion_from_state(state).embed(['a red ball'])
    assert not asked
    diffusion_from_state(state, 'bert-of-mine').embed(['a red ball'])
    model.embed(['a red ball'])                                              # of a script that builds it: the usual one
    assert asked == [('bert-of-mine', 'mean'), ('bert-base-cased', 'mean')]
    with pytest.raises(ValueError, match="text_encoder='bert-of-mine': this model has learnt its words itself"):
        diffusion_from_state(make_runs()['pixels'], 'bert-of-mine')


# Folders of other projects

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    pytest.importorskip('safetensors')
    root = tmp_path_factory.mktemp('folders')
    torch.manual_seed(0)
    causal = CausalVAE(**VAE | dict(dim=32, dim_mults=(1, 1), norm_groups=32))
    causal_vae_to_diffusers(causal, root / 'causal')
    temporal_vae_to_diffusers(TemporalVAE(dim=32, dim_mults=(1, 1), blocks_per_level=1), root / 'temporal')
    names = {sat_name(name, levels=2): value for name, value in causal.state_dict().items()}
    torch.save({'state_dict': names}, root / 'sat.pt')
    return root


READERS = {'causal': causal_vae_from_diffusers, 'temporal': temporal_vae_from_diffusers}


@pytest.mark.parametrize('kind', READERS)
@pytest.mark.parametrize('file, content, says', [
    ('config.json', b'', 'config.json is refused'), ('config.json', b'[1, 2]', 'config.json is refused'), ('config.json', b'{"a"', 'config.json is refused'),
    ('config.json', b'\xff\xfe', 'config.json is refused'), ('config.json', b'[' * 100_000, 'config.json is refused'),
    ('diffusion_pytorch_model.safetensors', b'', 'safetensors is refused'), ('diffusion_pytorch_model.safetensors', b'x' * 100, 'safetensors is refused'),
    ('x.safetensors.index.json', b'{"weight_map": {"a": "../../elsewhere.safetensors"}}', 'must lie beside it'),
    ('x.safetensors.index.json', b'{"weight_map": {"a": "/etc/passwd"}}', 'must lie beside it'),
    ('x.safetensors.index.json', b'{"weight_map": {"a": ".."}}', 'must lie beside it'),
    ('x.safetensors.index.json', b'{"weight_map": {"a": "config.json"}}', 'must lie beside it'),
    ('x.safetensors.index.json', b'{"weight_map": {"a": 3}}', 'is refused'), ('x.safetensors.index.json', b'{}', 'KeyError'),
])
def test_a_damaged_folder_is_refused_in_one_sentence(folders, tmp_path, kind, file, content, says):
    for source in (folders / kind).iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        READERS[kind](tmp_path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 1500


@pytest.mark.parametrize('kind', READERS)
def test_a_config_without_a_key_or_with_another_size_is_refused(folders, tmp_path, kind):
    (tmp_path / 'diffusion_pytorch_model.safetensors').write_bytes((folders / kind / 'diffusion_pytorch_model.safetensors').read_bytes())
    config = json.loads((folders / kind / 'config.json').read_text())
    for key in ('in_channels', 'latent_channels', 'block_out_channels', 'layers_per_block', 'scaling_factor' if kind == 'temporal' else 'norm_num_groups'):
        (tmp_path / 'config.json').write_text(json.dumps({name: value for name, value in config.items() if name != key}))
        with pytest.raises(ValueError, match=f"KeyError, '{key}'"):
            READERS[kind](tmp_path)
        for value in (10 ** 12, -1, None, 'x', [10 ** 5] * 3, {}) if key != 'scaling_factor' else (None, 'x', {}):
            (tmp_path / 'config.json').write_text(json.dumps({**config, key: value}))
            with pytest.raises(ValueError):
                READERS[kind](tmp_path)


def test_the_other_format_is_opened_by_the_same_function(folders, tmp_path):
    assert causal_vae_from_sat(folders / 'sat.pt', time_compression=2).config['dim'] == 32

    class Malicious:
        def __reduce__(self):
            return print, ('run',)
    torch.save({'state_dict': Malicious()}, tmp_path / 'x.pt')
    (tmp_path / 'text.pt').write_text('hello')
    for content in ({'state_dict': []}, [1], {'state_dict': {'encoder.conv_in.conv.weight': 3}}, {'state_dict': {5: 6}}):
        torch.save(content, tmp_path / 'y.pt')
        with pytest.raises(ValueError, match='y.pt'):
            causal_vae_from_sat(tmp_path / 'y.pt')
    for name in ('x.pt', 'text.pt'):
        with pytest.raises(ValueError, match=f'{name} is refused'):
            causal_vae_from_sat(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        causal_vae_from_sat(tmp_path / 'none.pt')
    with pytest.raises(FileNotFoundError):
        causal_vae_from_diffusers(tmp_path / 'none')


# Files that lie in any way

ODD = [None, True, 0, -1, 1, 3, 7, 10 ** 6, 10 ** 12, 10 ** 30, 0.5, -2.5, float('nan'), float('inf'), '', 'x', 'v', 'words', [], {}, (1, 2), [8] * 50,
       torch.zeros(0), torch.zeros(3), torch.zeros(()), torch.zeros(2, 2, dtype=torch.long), {'kind': 'bert', 'name_or_path': '/'}]


def places(tree, path=()):
    """Every place in a nested dict or list, as the way to it."""
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*path, key)
            yield from places(value, (*path, key))


def mutate(tree, chance):
    """Something somewhere becomes something else, is missing, or is there twice."""
    way = chance.choice([p for p in places(tree) if p[0] in ('config', 'model', 'ema') or chance.random() < 0.2] or [('config',)])
    parent = tree
    for key in way[:-1]:
        parent = parent[key]
    if isinstance(parent, tuple):
        return
    old, kind = parent[way[-1]], chance.randrange(6)
    if kind == 0 and isinstance(parent, dict):
        del parent[way[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[chance.choice(['surprise', 5, 'vae', 'latent', 'unet', ''])] = chance.choice(ODD)
    elif kind == 2 and isinstance(old, torch.Tensor):
        parent[way[-1]] = chance.choice([
            old.flatten()[:1], old[None], old.half(), old.long(), old.flatten(), old.flatten()[:1].expand(10 ** 9, 100) if old.numel() else old, old * float('nan'),
            old.to('meta'), torch.zeros(1, device='meta').expand(10 ** 12), old.T.clone() if old.ndim == 2 else old, torch.nn.Parameter(old * 1.) if old.is_floating_point() else old])
    elif kind == 3 and isinstance(old, (int, float)):
        parent[way[-1]] = chance.choice([-old, old + 1, old * 2, old * 10 ** 9, float(old), str(old)])
    else:
        parent[way[-1]] = copy.deepcopy(chance.choice(ODD))


@pytest.mark.slow
def test_no_mutation_of_a_checkpoint_ends_in_anything_but_a_sentence(runs, tmp_path, slow):
    """Trees are mutated, and bytes; the only errors are ValueError and OSError, and memory does not grow."""
    outcomes = {'loaded': 0, 'refused': 0}
    sound = {}
    for kind, state in runs.items():
        torch.save(state, tmp_path / f'{kind}.pt')
        sound[kind] = (tmp_path / f'{kind}.pt').read_bytes()
        load_any(tmp_path / f'{kind}.pt', kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(3000 if slow else 60):
        chance = random.Random(number)
        kind = chance.choice(sorted(runs))
        path = tmp_path / 'model-1.pt'
        if chance.random() < 0.75:
            state = copy.deepcopy(runs[kind])
            for _ in range(chance.choice([1, 1, 1, 2, 5])):
                if isinstance(state, dict):
                    mutate(state, chance)
            torch.save(state, path)
        else:
            content = bytearray(sound[kind])
            for _ in range(chance.choice([0, 1, 3, 30])):
                content[chance.randrange(len(content))] = chance.randrange(256)
            start = chance.choice([0, 0, 0, chance.randrange(len(content))])
            path.write_bytes(content[start:chance.choice([len(content), chance.randrange(len(content))])])
        try:
            load_any(path, kind)
            outcomes['loaded'] += 1
        except (ValueError, OSError) as error:
            outcomes['refused'] += 1
            assert '\n' not in str(error) and len(str(error)) < 3000, (number, error)
        except BaseException as error:
            raise AssertionError(f'number {number}: {type(error).__name__}: {error}') from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f'{grown:.0f} MB more'
    assert outcomes['refused'] > outcomes['loaded'] > 0, outcomes

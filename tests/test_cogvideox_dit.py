"""Weights of CogVideoX's transformer: SAT's own files give the outputs that SAT computed with them, and go to diffusers and back
bit by bit; what training leaves in a file does no harm; a large file is not held twice. Run: pytest tests/test_cogvideox_dit.py
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from video_diffusion import DiT, add_lora
from video_diffusion.networks.positions import rope, sincos
from video_diffusion.weights import dit_from_diffusers, dit_from_sat, dit_to_diffusers, dit_to_sat
from video_diffusion.weights.cogvideox_dit import SAT_PREFIX, TABLE, diffusers_pieces

ROOT = Path(__file__).parents[1]
CASES = {name: case for file in ('sat_dit_small.pt', 'sat_dit_small_more.pt')
         for name, case in torch.load(ROOT / 'tests/data' / file, weights_only=True).items()}
KINDS = ['2b', '5b', '5b_i2v', '1.5_5b_i2v']
POSITIONS = {'2b': 'sincos', '5b': 'rope', '5b_i2v': 'rope+learned', '1.5_5b_i2v': 'rope'}
SIZES = {'1.5_5b_i2v': (4, 10, 14)}


def settings(kind):
    return dict(size=SIZES.get(kind, (3, 8, 12)), text_length=6)


@pytest.fixture(params=KINDS)
def read(request, tmp_path):
    """The name of a model, its reference data, and what we read from its SAT file."""
    case = CASES[request.param]
    torch.save({'module': case['module']}, tmp_path / 'sat.pt')
    return request.param, case, dit_from_sat(tmp_path / 'sat.pt', **settings(request.param))


def ask(dit, case):
    x, channels = case['x'].float().transpose(1, 2), dit.channels
    told = {}
    if dit.cond_frames:
        told = dict(known=x[:, channels:], known_mask=torch.ones(len(x), x.shape[2], dtype=torch.bool))
    return dit(x[:, :channels], case['timestep'], case['text'].float(), **told).transpose(1, 2)


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def assert_same_weights(a, b):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


# ---- the same network

def test_sat_files_give_the_outputs_of_sat(read):
    kind, case, dit = read
    assert dit.config['positions'] == POSITIONS[kind] and dit.config['final_eps'] == 1e-6
    assert dit.to_patches.weight.dtype == torch.float16                                   # as the file
    assert relative(ask(dit.float(), case), case['output_sat']) < 2e-6


def test_from_sat_to_diffusers_and_back_every_bit_is_the_same(read, tmp_path):
    kind, case, dit = read
    dit_to_diffusers(dit, tmp_path / 'diffusers')
    again = dit_from_diffusers(tmp_path / 'diffusers')
    assert_same_weights(dit, again)
    assert again.config == dit.config | {'final_eps': 1e-5}                               # the one thing that theirs cannot say
    assert relative(ask(again.float(), case), case['output_diffusers']) < 2e-6

    from diffusers import CogVideoXTransformer3DModel
    peer = CogVideoXTransformer3DModel.from_pretrained(tmp_path / 'diffusers', torch_dtype=torch.float16)
    stored = peer.state_dict()
    assert stored.keys() == case['diffusers'].keys() and all(torch.equal(stored[name], case['diffusers'][name]) for name in stored)
    expected = CogVideoXTransformer3DModel(**case['config']).config
    assert {key: peer.config[key] for key in expected if key[0] != '_'} == {key: expected[key] for key in expected if key[0] != '_'}


def test_a_file_written_for_sat_is_the_one_that_was_read(read, tmp_path):
    kind, case, dit = read
    dit_to_sat(dit, tmp_path / 'sat')
    assert_same_weights(dit, dit_from_sat(tmp_path / 'sat', **settings(kind)))
    written = torch.load(tmp_path / 'sat/1/mp_rank_00_model_states.pt', weights_only=True)['module']
    unused = {f'{SAT_PREFIX}transformer.position_embeddings.weight'}
    assert written.keys() == case['module'].keys() - unused
    for name in written:
        computed = 'freqs' in name or kind == '2b' and name.endswith(TABLE)
        torch.testing.assert_close(written[name], case['module'][name], rtol=0, atol=1e-3 if computed else 0)


def test_the_tables_in_sat_files_are_ours():
    """What is computed, not learned: read off their files, it would show whether row and column are mixed up."""
    cos, sin = rope((3, 4, 6), 16)
    module = CASES['5b']['module']
    for name, table in (('cos', cos), ('sin', sin)):
        torch.testing.assert_close(module[f'{SAT_PREFIX}mixins.pos_embed.freqs_{name}'].float(), table, rtol=0, atol=1e-3)
    table = CASES['2b']['module'][SAT_PREFIX + TABLE].float()[0]
    torch.testing.assert_close(table[6:], sincos((3, 4, 6), 64), rtol=0, atol=1e-3)
    assert not table[:6].any()


def test_folders_of_diffusers_in_several_files_are_read(tmp_path):
    from diffusers import CogVideoXTransformer3DModel
    peer = CogVideoXTransformer3DModel(**CASES['5b']['config'])
    peer.save_pretrained(tmp_path, max_shard_size='200KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    dit = dit_from_diffusers(tmp_path)
    theirs = diffusers_pieces(peer.state_dict())
    assert torch.equal(dit.blocks[1].feed_forward_norm.for_text.weight, theirs['transformer_blocks.1.norm2.linear.text.weight'])


def test_a_folder_in_several_files_is_written_over_as_a_whole(tmp_path):
    """Readers take an index first, and would find the old weights."""
    from diffusers import CogVideoXTransformer3DModel
    CogVideoXTransformer3DModel(**CASES['5b']['config']).save_pretrained(tmp_path, max_shard_size='200KB')
    dit = dit_from_diffusers(tmp_path)
    dit.to_patches.bias = torch.nn.Parameter(torch.full_like(dit.to_patches.bias, 7.))
    dit_to_diffusers(dit, tmp_path)
    for read in (dit_from_diffusers, CogVideoXTransformer3DModel.from_pretrained):
        assert any(bool((weight == 7).all()) for name, weight in read(tmp_path).named_parameters() if name.endswith('bias'))
    (tmp_path / 'diffusion_pytorch_model.fp16.safetensors').write_bytes(b'the same, shorter')
    dit_from_diffusers(tmp_path)


def test_the_first_models_say_less_in_their_config(tmp_path):
    """2B and 5B are older than images, and than version 1.5."""
    dit = DiT(32, 6, dim_head=16, depth=1, size=(2, 4, 6), positions='rope')
    dit_to_diffusers(dit, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    for word in ('ofs_embed_dim', 'patch_size_t', 'patch_bias', 'use_learned_positional_embeddings'):
        del config[word]
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert dit_from_diffusers(tmp_path).config == dit.config


def test_a_model_outlives_the_file_that_it_is_mapped_from(tmp_path):
    def write(number):
        dit = DiT(32, 6, dim_head=16, depth=1, size=(2, 4, 6))
        for weight in dit.parameters():
            weight.data.fill_(number)
        dit_to_diffusers(dit, tmp_path)
    write(1.)
    dit = dit_from_diffusers(tmp_path)
    write(2.)
    assert all((weight == 1).all() for weight in dit.parameters())
    assert all((weight == 2).all() for weight in dit_from_diffusers(tmp_path).parameters())


# ---- files as they are found

def test_a_file_that_training_left_is_read_safely_and_the_rest_of_it_left_alone(tmp_path):
    case = CASES['2b']
    folder = tmp_path / 'transformer' / '1000'
    folder.mkdir(parents=True)
    (tmp_path / 'transformer/latest').write_text('1000\n')
    others = {'conditioner.embedders.0.transformer.shared.weight': torch.zeros(8, 4), 'first_stage_model.decoder.bias': torch.ones(3)}
    path = folder / 'mp_rank_00_model_states.pt'
    states = dict(np_rng_state=numpy.random.get_state(), random_rng_state=(3, (1, 2), None), iteration=1000)
    torch.save({'module': others | case['module'], **states}, path)
    with pytest.raises(Exception, match='weights_only|Unsupported'):                       # as PyTorch alone would have it
        torch.load(path, weights_only=True)
    dit = dit_from_sat(tmp_path / 'transformer', **settings('2b'))
    assert relative(ask(dit.float(), case), case['output_sat']) < 2e-6
    torch.save({'module': case['module']}, path, _use_new_zipfile_serialization=False)     # older than torch 1.6: not mapped
    assert_same_weights(dit_from_sat(path, **settings('2b')).float(), dit)


class Trap:
    def __reduce__(self):
        return print, ('this ran',)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    torch.save({'module': CASES['2b']['module'], 'trap': Trap()}, tmp_path / 'trap.pt')
    with pytest.raises(ValueError, match='could run code'):
        dit_from_sat(tmp_path / 'trap.pt', **settings('2b'))
    assert 'this ran' not in capsys.readouterr().out


def test_2b_is_known_by_its_table_its_width_or_by_name(tmp_path):
    state = {name: value for name, value in CASES['2b']['module'].items() if not name.endswith(TABLE)}
    torch.save({'model': state}, tmp_path / 'bare.pt')
    assert dit_from_sat(tmp_path / 'bare.pt', **settings('2b')).positions == 'rope'
    dit = dit_from_sat(tmp_path / 'bare.pt', positions='sincos', **settings('2b')).float()
    assert relative(ask(dit, CASES['2b']), CASES['2b']['output_sat']) < 2e-6


def test_what_does_not_fit_is_named(tmp_path):
    state = dict(CASES['5b_i2v']['module'])
    del state[f'{SAT_PREFIX}transformer.layers.1.mlp.dense_4h_to_h.bias']
    state[f'{SAT_PREFIX}surprise'] = torch.zeros(1)
    torch.save({'module': state}, tmp_path / 'odd.pt')
    with pytest.raises(ValueError) as error:
        dit_from_sat(tmp_path / 'odd.pt')                                                  # its table is not that of 13x60x90
    for part in ('odd.pt', 'missing: transformer.layers.1.mlp.dense_4h_to_h.bias', 'not expected: surprise',
                 'mixins.pos_embed.pos_embedding has shape (1, 78, 64), expected (1, 17776, 64)'):
        assert part in str(error.value)
    torch.save({'module': {f'{SAT_PREFIX}x': torch.zeros(1)}}, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match='not a transformer of CogVideoX: it has no model.diffusion_model.mixins.patch_embed'):
        dit_from_sat(tmp_path / 'other.pt')
    with pytest.raises(FileNotFoundError, match="no file 'latest'"):
        dit_from_sat(tmp_path)


def test_networks_of_another_form_are_refused(tmp_path):
    dit_to_diffusers(DiT(32, 6, dim_head=16, depth=1, size=(2, 4, 6)), tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    for change in (dict(activation_fn='gelu'), dict(_class_name='SD3Transformer2DModel'), dict(in_channels=5), dict(ofs_embed_dim=7)):
        (tmp_path / 'config.json').write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match='|'.join(map(str, change.values()))):
            dit_from_diffusers(tmp_path)
    with pytest.raises(ValueError, match=r'DiT\(..., size=\(frames, height, width\)\)'):
        dit_to_diffusers(DiT(32, 6, dim_head=16, depth=1), tmp_path)
    adapted = DiT(32, 6, dim_head=16, depth=1, size=(2, 4, 6))
    add_lora(adapted, rank=2)
    for write in (dit_to_diffusers, dit_to_sat):
        with pytest.raises(ValueError, match='adapters, for which these files have no place'):
            write(adapted, tmp_path / 'adapted')
    for change in (dict(cond_dim=None), dict(patch=4)):
        for write in (dit_to_diffusers, dit_to_sat):
            with pytest.raises(ValueError, match='reads text, and patches of 2'):
                write(DiT(**dict(dim=32, cond_dim=6, dim_head=16, depth=1, size=(2, 4, 6)) | change), tmp_path)


MEASURE = '''
import sys
from pathlib import Path
import torch
from video_diffusion.weights import dit_from_diffusers, dit_from_sat

def resident(field):
    line = next(line for line in Path('/proc/self/status').read_text().split('\\n') if line.startswith(field))
    return int(line.split()[1]) * 1024

import numpy, safetensors.torch                                 # what reading imports is no weight
for read, path in zip((dit_from_diffusers, dit_from_sat), sys.argv[1:]):
    Path('/proc/self/clear_refs').write_text('5')
    before = resident('VmRSS')
    dit = read(path)
    loaded = resident('VmHWM') - before
    assert all(p.flatten()[::1024].all() for p in dit.parameters())              # look at every page of them
    print(loaded, resident('VmHWM') - before, sum(p.nbytes for p in dit.parameters()))
    del dit
'''


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs the memory accounting of Linux')
def test_a_large_model_is_held_once_while_it_is_loaded(tmp_path):
    """240 MB, in bf16; the SAT file holds another 240 MB that are not ours."""
    with torch.device('meta'):
        dit = DiT(1280, 64, 4, dim_head=64, depth=4, positions='rope', text_length=226, size=(13, 60, 90), time_dim=512)
    dit = dit.bfloat16().to_empty(device='cpu')
    for weight in dit.parameters():
        weight.data.fill_(0.5)
    dit_to_diffusers(dit, tmp_path / 'diffusers')
    dit_to_sat(dit, tmp_path / 'sat')
    path = tmp_path / 'sat/1/mp_rank_00_model_states.pt'
    saved = torch.load(path, weights_only=True)
    saved['module']['conditioner.embedders.0.transformer.shared.weight'] = torch.ones(60, 10 ** 6)
    torch.save(saved, path)
    out = subprocess.run([sys.executable, '-c', MEASURE, tmp_path / 'diffusers', tmp_path / 'sat'], cwd=ROOT, text=True,
                         capture_output=True, check=True)
    for kind, line in zip(('diffusers', 'sat'), out.stdout.splitlines(), strict=True):
        loaded, used, weights = map(int, line.split())
        print(f'{kind}: {loaded / weights:.2f} of the weights while loading, {used / weights:.2f} after looking at all of them')
        assert weights > 200e6 and used < 1.15 * weights and loaded <= used

"""LoRA files of CogVideoX mean the same to diffusers, peft, SAT and us. Run: pytest tests/test_cogvideox_lora.py

SAT's own code has made the reference: weights, adapters and outputs (2b_lora in tests/data/sat_dit_small_more.pt).
"""

import copy
from pathlib import Path

import pytest
import torch

from video_diffusion import add_lora, merge_lora, remove_lora, scale_lora
from video_diffusion.networks.dit import DiT
from video_diffusion.networks.lora import lora_layers
from video_diffusion.weights import (
    dit_from_sat,
    dit_to_diffusers,
    lora_from_diffusers,
    lora_from_sat,
    lora_to_diffusers,
    lora_to_sat,
)

diffusers = pytest.importorskip('diffusers')
peft = pytest.importorskip('peft')

SIZES = dict(num_attention_heads=2, attention_head_dim=16, in_channels=2, out_channels=2, time_embed_dim=12, text_embed_dim=10,
             num_layers=2, max_text_seq_length=5, sample_height=8, sample_width=12, sample_frames=9)
TARGETS = ['to_q', 'to_k', 'to_v', 'to_out.0']
THEIRS = {'to_q': 'attn1.to_q', 'to_k': 'attn1.to_k', 'to_v': 'attn1.to_v', 'to_out': 'attn1.to_out.0'}
LAYERS = {f'blocks.{n}.{ours}': f'transformer_blocks.{n}.{theirs}' for n in (0, 1) for ours, theirs in THEIRS.items()}


def make_ours():
    torch.manual_seed(0)
    return DiT(32, 10, 2, depth=2, dim_head=16, positions='sincos', text_length=5, time_dim=12)


def make_theirs():
    torch.manual_seed(1)
    return diffusers.CogVideoXTransformer3DModel(**SIZES)


@torch.no_grad()
def shake(model):
    """Let every adapter do something."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if 'lora_' in name:
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def changes(before, after, names):
    """What adapters add to the weights of these layers."""
    return {name: after.get_submodule(name).weight.detach() - before.get_submodule(name).weight.detach() for name in names}


def changes_of_ours(model):
    before = copy.deepcopy(model)
    merge_lora(model)
    assert lora_layers(model).keys() == LAYERS.keys()
    return changes(before, model, LAYERS)


def assert_same_changes(ours, theirs):
    for name, other in LAYERS.items():
        assert ours[name].abs().max() > 0.1
        torch.testing.assert_close(ours[name], theirs[other], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rank, alpha, strength', [(3, 3, 1.), (3, 1, 1.), (2, 4, 0.5)])
def test_diffusers_reads_what_we_write_with_its_scale(tmp_path, rank, alpha, strength):
    ours = make_ours()
    add_lora(ours, rank, alpha)
    shake(ours)
    scale_lora(ours, strength)
    lora_to_diffusers(ours, tmp_path)
    theirs = make_theirs()
    before = copy.deepcopy(theirs)
    theirs.load_lora_adapter(tmp_path, prefix='transformer', weight_name='pytorch_lora_weights.safetensors')
    theirs.fuse_lora()
    theirs.unload_lora()
    assert_same_changes(changes_of_ours(ours), changes(before, theirs, LAYERS.values()))


@pytest.mark.parametrize('told', ['in the file', 'by the reader', 'nowhere'])
def test_we_read_what_peft_trained_with_its_scale(tmp_path, told):
    theirs = make_theirs()
    before = copy.deepcopy(theirs)
    alpha = 3 if told == 'nowhere' else 5
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=TARGETS))
    shake(theirs)
    save = dict(transformer_lora_layers=peft.get_peft_model_state_dict(theirs))
    if told == 'in the file':
        save['transformer_lora_adapter_metadata'] = theirs.peft_config['default'].to_dict()
    diffusers.CogVideoXPipeline.save_lora_weights(tmp_path, **save)
    ours = make_ours()
    lora_from_diffusers(ours, tmp_path, alpha=alpha if told == 'by the reader' else None)
    theirs.fuse_lora()
    theirs.unload_lora()
    assert_same_changes(changes_of_ours(ours), changes(before, theirs, LAYERS.values()))


# Whole models

@pytest.fixture(scope='module')
def case():
    return torch.load(Path(__file__).parent / 'data' / 'sat_dit_small_more.pt', weights_only=True)['2b_lora']


@pytest.fixture
def sat_file(case, tmp_path):
    torch.save({'module': {name: weight.float() for name, weight in case['module'].items()}}, tmp_path / 'sat.pt')
    return tmp_path / 'sat.pt'


def base_of(sat_file):
    return dit_from_sat(sat_file, positions='sincos', size=(3, 8, 12), text_length=6)


def run(dit, case):
    """x (b f c h w), as the others have it, -> the same."""
    return dit(case['x'].float().transpose(1, 2), case['timestep'], case['text'].float()).transpose(1, 2)


def error(out, reference):
    return ((out - reference.float()).abs().max() / reference.float().abs().max()).item()


def test_sats_adapters_do_what_they_did_there(case, sat_file):
    dit = base_of(sat_file)
    assert error(run(dit, case), case['output_sat']) > 0.01
    lora_from_sat(dit, sat_file)
    assert {(layer.rank, layer.alpha) for layer in lora_layers(dit).values()} == {(case['rank'], case['alpha'])}
    assert error(run(dit, case), case['output_sat']) < 1e-5
    merge_lora(dit)
    assert error(run(dit, case), case['output_sat']) < 1e-5


def test_adapters_of_sat_go_to_diffusers_and_back_and_their_gradients_are_the_same(case, sat_file, tmp_path):
    ours = base_of(sat_file)
    ours.final_norm.eps = 1e-5                                                # diffusers'
    dit_to_diffusers(ours, tmp_path / 'dit')
    lora_from_sat(ours, sat_file)
    lora_to_diffusers(ours, tmp_path / 'lora')
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / 'dit')
    theirs.load_lora_adapter(tmp_path / 'lora', prefix='transformer', weight_name='pytorch_lora_weights.safetensors')
    out = theirs(case['x'].float(), case['text'].float(), case['timestep'], return_dict=False)[0]
    assert error(run(ours, case), out) < 1e-5 and error(out, case['output_diffusers']) < 1e-5

    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    for p in (learns := {name: p for name, p in theirs.named_parameters() if 'lora_' in name}).values():
        p.requires_grad_(True)
    (weights * theirs(case['x'].float(), case['text'].float(), case['timestep'], return_dict=False)[0]).sum().backward()
    (weights * run(ours, case)).sum().backward()
    for name, layer in lora_layers(ours).items():
        a, b = (learns[f'{LAYERS[name]}.lora_{letter}.default_0.weight'].grad for letter in 'AB')
        torch.testing.assert_close(layer.lora_A.grad, a, rtol=1e-4, atol=1e-4 * a.abs().max().item())
        torch.testing.assert_close(layer.lora_B.grad, b * layer.scale, rtol=1e-4, atol=1e-4 * b.abs().max().item())

    again = base_of(sat_file)
    again.final_norm.eps = 1e-5
    lora_from_diffusers(again, tmp_path / 'lora')
    assert error(run(again, case), run(ours, case)) < 1e-6
    remove_lora(again)
    lora_to_sat(ours, tmp_path / 'lora.pt')
    lora_from_sat(again, tmp_path / 'lora.pt')
    assert error(run(again, case), run(ours, case)) < 1e-6


def test_a_file_as_sat_exports_it_needs_its_alpha_from_the_reader(case, sat_file, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file({name: weight.float() for name, weight in case['lora'].items()}, tmp_path / 'plain.safetensors')
    dit = base_of(sat_file)
    lora_from_diffusers(dit, tmp_path / 'plain.safetensors', alpha=1)
    assert error(run(dit, case), case['output_sat']) < 1e-5
    remove_lora(dit)
    lora_from_diffusers(dit, tmp_path / 'plain.safetensors')
    assert error(run(dit, case), case['output_sat']) > 0.1


# What cannot be read or written

def test_what_has_no_place_in_the_model_is_named(tmp_path):
    save_file = pytest.importorskip('safetensors.torch').save_file
    def file(**weights):
        weights = {f'transformer.transformer_blocks.0.{name}.weight'.replace('__', '.'): torch.zeros(shape) for name, shape in weights.items()}
        save_file(weights, tmp_path / 'file.safetensors')
        return tmp_path / 'file.safetensors'
    dit = make_ours()
    with pytest.raises(ValueError, match=r"adapter of blocks.0.to_q has shapes \[\(3, 48\), \(48, 3\)\], expected .*of another model"):
        lora_from_diffusers(dit, file(attn1__to_q__lora_A=(3, 48), attn1__to_q__lora_B=(48, 3)))
    with pytest.raises(ValueError, match=r'adapter of blocks.0.to_k has shapes \[\(32, 3\)\], expected'):
        lora_from_diffusers(dit, file(attn1__to_k__lora_B=(32, 3)))
    with pytest.raises(ValueError, match='norm1.linear.lora_A.weight: expected adapters for layers of this DiT'):
        lora_from_diffusers(dit, file(norm1__linear__lora_A=(3, 12)))
    with pytest.raises(ValueError, match='holds no adapters: expected'):
        lora_from_diffusers(dit, file())
    save_file({'x': torch.zeros(1)}, tmp_path / 'odd.safetensors', metadata={'lora_adapter_metadata': '{"transformer.use_rslora": true}'})
    with pytest.raises(ValueError, match='was made with use_rslora: only adapters whose scale'):
        lora_from_diffusers(dit, tmp_path / 'odd.safetensors')
    assert not lora_layers(dit)
    add_lora(dit, 2, targets=['for_text'])
    with pytest.raises(ValueError, match='for_text has an adapter: in the files of CogVideoX it is no layer of its own'):
        lora_to_diffusers(dit, tmp_path)

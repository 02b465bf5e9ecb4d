"""LoRA files of CogVideoX mean the same to diffusers, peft, SAT and us. Run: pytest tests/test_cogvideox_lora.py

SAT's own code has made the reference: its weights, its adapters, its output (tests/data/sat_dit_lora.pt).
"""

import copy
from pathlib import Path

import pytest
import torch

from video_diffusion import add_lora, merge_lora, scale_lora
from video_diffusion.networks.dit import DiT
from video_diffusion.networks.lora import lora_layers
from video_diffusion.weights import lora_from_diffusers, lora_from_sat, lora_to_diffusers, lora_to_sat

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

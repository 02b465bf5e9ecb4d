"""Diffusion models of any kind train, are saved, come back and draw. Run: pytest tests/test_any_model.py (a few configurations),
pytest --slow tests/test_any_model.py (dozens)"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from video_diffusion import GaussianDiffusion, Trainer, Unet3D, WordEncoder, video_tensor_to_gif
from video_diffusion.distributed import Processes

CPU = Processes(device=torch.device('cpu'))

networks = st.fixed_dictionaries(dict(
    dim=st.sampled_from([4, 6, 8]), init_dim=st.sampled_from([None, 2, 5]), dim_mults=st.sampled_from([(1,), (1, 2), (2, 1, 3)]),
    channels=st.sampled_from([1, 3, 4]), attn_heads=st.integers(1, 3), attn_dim_head=st.sampled_from([4, 6, 8]),
    init_kernel_size=st.sampled_from([1, 3, 7]), use_sparse_linear_attn=st.booleans(), resnet_groups=st.sampled_from([1, 2]),
    cond_frames=st.booleans()))
clips = st.fixed_dictionaries(dict(
    height=st.sampled_from([4, 8, 12]), width=st.sampled_from([4, 12]), frames=st.integers(1, 4), count=st.integers(1, 3),
    batch=st.integers(1, 4), captions=st.booleans()))
ways = st.fixed_dictionaries(dict(
    objective=st.sampled_from(['noise', 'v', 'x0']), loss_type=st.sampled_from(['l1', 'l2']), timesteps=st.integers(2, 6)))


@pytest.mark.slow
@given(networks, clips, ways, st.booleans())
def test_any_model_trains_is_saved_and_draws(network, clip, way, muon):
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        size = clip['height'], clip['width']
        for i in range(clip['count']):                                    # perhaps fewer than a batch
            video_tensor_to_gif(torch.rand(network['channels'], clip['frames'], *size), f'{folder}/clips/{i}.gif')
            Path(f'{folder}/clips/{i}.txt').write_text(f'clip {i}')
        encoder = WordEncoder(4, buckets=8) if clip['captions'] else None
        unet = Unet3D(**network, cond_dim=4 if encoder else None)
        told = 0.5 if network['cond_frames'] and clip['frames'] > 1 else 0.
        diffusion = GaussianDiffusion(unet, image_size=size, num_frames=clip['frames'], channels=network['channels'],
                                      text_encoder=encoder, prob_cond_frames=told, **way)
        trainer = Trainer(diffusion, f'{folder}/clips', train_batch_size=clip['batch'], train_num_steps=2, num_sample_rows=1,
                          gradient_accumulate_every=1, save_and_sample_every=2, sample_steps=2, train_lr=1e-3,
                          muon_lr=0.01 if muon else None, results_folder=f'{folder}/results', processes=CPU)
        before = [weight.clone() for weight in diffusion.parameters()]
        trainer.train()
        assert any(not torch.equal(a, b) for a, b in zip(before, diffusion.parameters()))

        again = GaussianDiffusion.from_checkpoint(f'{folder}/results')
        how = dict(cond=['clip 0'] if encoder else None, batch_size=1, steps=2, seed=1, progress=False)
        with trainer.ema.average_parameters():
            expected = diffusion.sample(**how)
        drawn = again.sample(**how)
        assert drawn.shape == (1, network['channels'], clip['frames'], *size)
        assert torch.equal(drawn, expected) and 0 <= drawn.min() and drawn.max() <= 1

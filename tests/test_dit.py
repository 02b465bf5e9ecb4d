"""The diffusion transformer equals diffusers' of the same weights, in what it says and in every gradient; it starts as if it were
not there, and goes through diffusion, training and checkpoints like the U-Net. Run: pytest tests/test_dit.py
"""

import pytest
import torch

from video_diffusion import DiT, GaussianDiffusion, Trainer, Unet3D, WordEncoder, checkpoint, shapes
from video_diffusion.diffusion.latent import diffusion_from_state
from video_diffusion.distributed import Processes
from video_diffusion.networks import BLOCKS, network_from_config
from video_diffusion.networks.positions import rope, sincos, step_waves, turn
from video_diffusion.weights.cogvideox_dit import diffusers_name, diffusers_pieces, dit_config

SMALL = dict(num_attention_heads=3, attention_head_dim=16, in_channels=2, out_channels=2, time_embed_dim=20, text_embed_dim=10,
             num_layers=2, max_text_seq_length=5, sample_height=8, sample_width=12, sample_frames=5)       # latents 2 x 8 x 12
ROPE = dict(use_rotary_positional_embeddings=True)
KINDS = {
    '2b': {},
    '5b': ROPE,
    '5b-i2v': dict(ROPE, use_learned_positional_embeddings=True, in_channels=4),
    '1.5-5b': dict(ROPE, patch_size_t=2, patch_bias=False),
    '1.5-5b-i2v': dict(ROPE, patch_size_t=2, patch_bias=False, in_channels=4, ofs_embed_dim=20),
}
CLIP = (2, 2, 2, 8, 12)                                                                # b c f h w: 2 or 1, 4 and 6 tokens


def make_peer(kind, dtype=torch.float32):
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    peer = diffusers.CogVideoXTransformer3DModel(**SMALL | KINDS[kind])
    for weight in [*peer.parameters(), *peer.buffers()]:                                # where they start, mistakes hide
        weight.data += 0.2 * torch.randn_like(weight)
    if kind == '2b':                                                                    # computed, not stored
        peer.patch_embed.pos_embedding = peer.patch_embed._get_positional_embeddings(8, 12, 5)
    return peer.to(dtype)


def like_theirs(peer, **config):
    dit = DiT(**dit_config(peer.config) | config).to(peer.dtype)
    theirs = diffusers_pieces(peer.state_dict())
    dit.load_state_dict({name: theirs[diffusers_name(name)] for name in dit.state_dict()})
    return dit


@pytest.mark.parametrize('grid', [(3, 30, 45), (3, 16, 16), (2, 24, 42), (2, 60, 90), (1, 45, 30), (1, 20, 60)])
def test_frames_of_another_size_are_laid_into_the_one_that_a_model_knows(grid):
    """As the pipeline of diffusers has it for CogVideoX-5B."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
    theirs = get_3d_rotary_pos_embed(64, get_resize_crop_region_for_grid(grid[1:], 45, 30), grid[1:], grid[0])
    for ours, table in zip(rope(grid, 64, native=(13, 30, 45)), theirs, strict=True):
        torch.testing.assert_close(ours, table, rtol=0, atol=2e-5)
    tokens = torch.zeros(1, grid[0] * grid[1] * grid[2], 32)
    for frame_patch, native in ((1, (13, 30, 45)), (2, None)):                          # version 1.5 just counts
        dit = DiT(32, 6, dim_head=16, depth=1, positions='rope', size=(13 * frame_patch, 60, 90), frame_patch=frame_patch, text_length=2)
        for ours, table in zip(dit.place(None, tokens, grid)[2], rope(grid, 16, 2, native=native), strict=True):
            assert torch.equal(ours, table)


def draw(dit, dtype=torch.float32, frames=2):
    """What a network is given, as keyword arguments of ours."""
    torch.manual_seed(1)
    x, known = torch.randn(2, *CLIP, dtype=dtype)
    text, time = torch.randn(2, 5, 10, dtype=dtype), torch.tensor([999, 250])
    told = dict(known=known, known_mask=torch.tensor([[True, False], [True, True]])) if dit.cond_frames else {}
    return dict(x=x[:, :, :frames], time=time, cond=text, **told)


def ask_peer(peer, x, time, cond, known=None, known_mask=None):
    f, h, w = (length // step for length, step in zip(x.shape[2:], (peer.config.patch_size_t or 1, 2, 2)))
    angles = rope((f, h, w), 16, dtype=x.dtype) if peer.config.use_rotary_positional_embeddings else None
    if known is not None:
        x = torch.cat((x, known * known_mask[:, None, :, None, None]), dim=1)
    ofs = torch.full((1,), 2.) if peer.config.ofs_embed_dim else None
    return peer(x.transpose(1, 2), cond, time, ofs=ofs, image_rotary_emb=angles).sample.transpose(1, 2)


def rope_of_diffusers(grid):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    return get_3d_rotary_pos_embed(16, None, grid[1:], grid[0], grid_type='slice', max_size=grid[1:])


def turn_in_double(x, angles, **_):
    """Theirs rounds to float32 whatever it is given."""
    cos, sin = angles
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def kept(network, given):
    """How many bytes autograd keeps for the backward pass, weights included."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = network(**given)
    del graph
    return sum(storages.values())


def gradients(network, output, *inputs):
    """Of a loss that no symmetry makes zero, for inputs and weights."""
    torch.manual_seed(2)
    weights = dict(network.named_parameters()) | {name: buffer for name, buffer in network.named_buffers() if buffer.requires_grad}
    found = torch.autograd.grad((output * torch.randn(output.shape, dtype=output.dtype)).sum(), [*inputs, *weights.values()])
    return found[:len(inputs)], dict(zip(weights, found[len(inputs):]))


# ---- the same function as diffusers'

@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize('kind', KINDS)
def test_output_and_all_gradients_equal_those_of_diffusers(kind, dtype, tolerance, monkeypatch):
    peer = make_peer(kind, dtype)
    if dtype == torch.float64:
        monkeypatch.setattr('diffusers.models.embeddings.apply_rotary_emb', turn_in_double)
    if kind == '5b-i2v':
        peer.patch_embed.pos_embedding.requires_grad_()                                # a buffer there, a weight here
    dit = like_theirs(peer)
    given = draw(dit, dtype)
    inputs = [given[name].requires_grad_() for name in ('x', 'cond', 'known') if name in given]
    ours, theirs = dit(**given), ask_peer(peer, **given)
    assert ours.shape == CLIP and relative(ours, theirs) < tolerance

    (ours_in, ours), (theirs_in, theirs) = (gradients(network, output, *inputs) for network, output in ((dit, ours), (peer, theirs)))
    theirs = diffusers_pieces(theirs)
    assert {diffusers_name(name) for name in ours} == theirs.keys()
    for a, b in zip(ours_in, theirs_in):
        assert relative(a, b) < tolerance
    for name, gradient in ours.items():
        reference = theirs[diffusers_name(name)]
        if name == 'blocks.1.feed_forward_norm.for_text.weight':                       # what text says last, nobody hears
            assert not gradient.any() and not reference.any()
        if 'k_norm.bias' in name:                # the same number added to all keys changes no attention: theirs is rounding, too
            continue
        assert relative(gradient, reference) < 10 * tolerance, name


@pytest.mark.parametrize('kind', ['5b', '1.5-5b'])
def test_a_float32_rope_is_that_of_diffusers(kind):
    for ours, theirs in zip(rope((3, 5, 7), 16), rope_of_diffusers((3, 5, 7))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_a_step_of_adamw_is_that_of_diffusers():
    """The training step of its own scripts: v, min-SNR aside, from the same weights, noise and steps."""
    from diffusers import CogVideoXDPMScheduler
    peer = make_peer('2b')
    dit = like_theirs(peer)
    diffusion = GaussianDiffusion(dit, image_size=(8, 12), num_frames=2, channels=2, objective='v', schedule='scaled_linear',
                                  schedule_shift=3., zero_snr=True, latents=True, loss_type='l2')
    scheduler = CogVideoXDPMScheduler(snr_shift_scale=3., rescale_betas_zero_snr=True, prediction_type='v_prediction')
    torch.manual_seed(3)
    clip, noise, text, t = torch.randn(CLIP), torch.randn(CLIP), torch.randn(2, 5, 10), torch.tensor([700, 41])

    noisy = scheduler.add_noise(clip, noise, t)
    clean = scheduler.get_velocity(ask_peer(peer, noisy, t, text), noisy, t)           # of v and x_t: the clean clip
    weights = 1 / (1 - scheduler.alphas_cumprod[t])
    theirs_loss = (weights[:, None, None, None, None] * (clean - clip) ** 2).mean()
    ours_loss = diffusion(clip, text, noise, t)
    assert ours_loss.item() == pytest.approx(theirs_loss.item(), rel=1e-5)
    for network, loss in ((dit, ours_loss), (peer, theirs_loss)):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-2, eps=1e-3)
        loss.backward()
        optimizer.step()
    theirs = diffusers_pieces(peer.state_dict())
    for name, weight in dit.state_dict().items():
        torch.testing.assert_close(weight, theirs[diffusers_name(name)], rtol=1e-5, atol=1e-6, msg=lambda m: f'{name}: {m}')


# ---- its parts

@pytest.mark.parametrize('kind', ['2b', '5b-i2v'])
def test_blocks_that_are_computed_again_give_the_same(kind):
    peer = make_peer(kind)
    plain, again = like_theirs(peer), like_theirs(peer, checkpoint_activations=True)
    given = draw(plain)
    outputs = plain(**given), again(**given)
    assert torch.equal(*outputs) and plain.config == again.config and kept(again, given) < 0.35 * kept(plain, given)
    a, b = (gradients(network, output)[1] for network, output in zip((plain, again), outputs))
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], rtol=1e-6, atol=1e-7, msg=lambda m: f'{name}: {m}')


def test_without_gradients_it_says_the_same():
    """The widest rows are overwritten then."""
    dit = like_theirs(make_peer('5b'))
    with torch.no_grad():
        alone = dit(**draw(dit))
    torch.testing.assert_close(alone, dit(**draw(dit)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_it_is_one_graph_without_complex_numbers():
    dit = like_theirs(make_peer('5b-i2v'))
    fused = torch.compile(dit, backend='eager', fullgraph=True)
    torch.testing.assert_close(fused(**draw(dit)), dit(**draw(dit)), rtol=1e-5, atol=1e-6)


def test_a_new_one_answers_zero_and_its_blocks_are_not_there():
    dit = DiT(32, 6, dim_head=16, depth=2)
    assert not dit(torch.randn(2, 3, 3, 4, 6), torch.tensor([3, 4]), torch.randn(2, 4, 6)).any()
    text, video, emb = torch.randn(2, 4, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    for block in dit.blocks:
        assert all(map(torch.equal, block(text, video, emb, None), (text, video)))
    assert dit.blocks[0].to_q.weight.any() and dit.from_patches.weight.any()


def test_bf16_weights_take_and_give_the_callers_numbers():
    dit = like_theirs(make_peer('5b'))
    given = draw(dit)
    exact = dit(**given)
    rough = dit.bfloat16()(**given)
    assert rough.dtype == torch.float32 and 0 < relative(rough, exact) < 0.1


def test_places():
    """sincos names the column before the row, rope the row before the column; rope knows distances only."""
    f, h, w = grid = 2, 3, 5
    table = sincos(grid, 32).view(*grid, 32)
    same = [(table.amax(axis) == table.amin(axis)).all(dim=(0, 1)) for axis in range(3)]     # along time, rows, columns
    expected = torch.arange(32)
    assert torch.equal(same[0], expected >= 8) and torch.equal(same[2], (expected < 8) | (expected >= 20))
    assert torch.equal(same[1], expected < 20)
    cos, sin = (each.view(*grid, 16) for each in rope(grid, 16))
    assert torch.equal((sin.amax(1) == sin.amin(1)).all(dim=(0, 1)), (torch.arange(16) < 4) | (torch.arange(16) >= 10))
    q, k = torch.randn(2, 1, 1, 1, 16)

    def product(at_q, at_k):
        return (turn(q, cos[at_q][None], sin[at_q][None]) * turn(k, cos[at_k][None], sin[at_k][None])).sum()
    torch.testing.assert_close(product((0, 0, 0), (1, 1, 2)), product((0, 1, 2), (1, 2, 4)))
    assert abs(product((0, 0, 0), (1, 1, 2)) - product((0, 0, 0), (1, 2, 1))) > 1e-3
    text = rope(grid, 16, text=4)
    assert (text[0][:4] == 1).all() and (text[1][:4] == 0).all() and torch.equal(text[1][4:].view_as(sin), sin)
    assert step_waves(torch.tensor([0]), 6).tolist() == [[1, 1, 1, 0, 0, 0]]


def test_a_learned_table_fits_the_beginning_of_its_clips_and_no_other_size():
    dit = like_theirs(make_peer('5b-i2v'))
    shorter = like_theirs(make_peer('5b-i2v'))
    shorter.table = torch.nn.Parameter(dit.table[:, :5 + 24])
    given = draw(dit, frames=1) | dict(known=None, known_mask=None)
    assert torch.equal(dit(**given), shorter(**given))
    with pytest.raises(ValueError, match='up to 2 frames of 8x12'):
        dit(torch.randn(1, 2, 2, 12, 8), torch.tensor([1]), torch.randn(1, 5, 10))
    with pytest.raises(ValueError, match='up to 2 frames of 8x12'):
        dit(torch.randn(1, 2, 4, 8, 12), torch.tensor([1]), torch.randn(1, 5, 10))
    with pytest.raises(ValueError, match='give size'):
        DiT(32, dim_head=16, positions='rope+learned')


# ---- captions and known frames

def shaken(**config):
    torch.manual_seed(0)
    dit = DiT(**dict(dim=32, cond_dim=6, channels=3, depth=2, dim_head=16, text_length=8) | config)
    for weight in dit.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return dit.eval()


def test_a_caption_is_the_same_beside_longer_ones_and_none_is_rows_of_zeros():
    dit, encoder = shaken(), WordEncoder(6)
    x, t = torch.randn(3, 3, 3, 4, 6), torch.tensor([5, 500, 999])
    captions = ['a red circle moving left', 'blue', '']
    together = dit(x, t, encoder.tokens(captions))
    for i, caption in enumerate(captions):
        alone = dit(x[i:i + 1], t[i:i + 1], encoder.tokens([caption]))
        torch.testing.assert_close(together[i:i + 1], alone, rtol=1e-4, atol=1e-5)
    cond = encoder.tokens(captions)
    none = dit(x, t, torch.zeros_like(cond))
    assert torch.equal(dit(x, t, cond, null_cond_prob=1.), none)
    assert torch.equal(dit.forward_with_cond_scale(x, t, cond, cond_scale=0.), none)
    assert torch.equal(dit.forward_with_cond_scale(x, t, cond, cond_scale=1.), together)
    torch.testing.assert_close(dit.forward_with_cond_scale(x, t, cond, cond_scale=3.), none + 3 * (together - none))
    some = dit(x, t, cond, null_cond_mask=torch.tensor([True, False, False]))
    assert torch.equal(some[0], none[0]) and torch.equal(some[1:], together[1:]) and (none[0] - together[0]).abs().max() > 1e-3


def test_known_frames_are_more_channels_and_unknown_ones_are_zeros():
    dit = shaken(cond_frames=True)
    x, t, cond = torch.randn(2, 3, 3, 4, 6), torch.tensor([5, 500]), torch.randn(2, 4, 6)
    known, mask = torch.randn_like(x), torch.tensor([[True, False, False], [True, True, False]])
    told = dit(x, t, cond, known=known, known_mask=mask)
    assert torch.equal(told, dit(x, t, cond, known=known + 9 * ~mask[:, None, :, None, None], known_mask=mask))
    assert (told - dit(x, t, cond)).abs().max() > 1e-3
    assert torch.equal(dit(x, t, cond, known=known), dit(x, t, cond))


@pytest.mark.parametrize('change, sentence', [
    (dict(x=torch.zeros(1, 4, 3, 4, 6)), r'shape \(1, 4, 3, 4, 6\): expected \(batch, 3 channels'),
    (dict(x=torch.zeros(1, 3, 3, 5, 6)), r'are \(3, 5, 6\): give multiples of \(1, 2, 2\)'),
    (dict(cond=None), r'conditional: give cond, .* \(1, up to 8 tokens, 6\)'),
    (dict(cond=torch.zeros(1, 9, 6)), r'shape \(1, 9, 6\): expected \(1, up to 8 tokens, 6\)'),
    (dict(cond=torch.zeros(1, 6)), r'shape \(1, 6\): expected'),
    (dict(known=torch.zeros(1, 3, 3, 4, 6)), 'without cond_frames=True'),
    (dict(prob_focus_present=0.5), 'leave it out or take a Unet3D'),
    (dict(focus_present_mask=torch.tensor([True])), 'leave it out or take a Unet3D')])
def test_what_does_not_fit_is_refused_in_a_sentence(change, sentence):
    given = dict(x=torch.zeros(1, 3, 3, 4, 6), time=torch.tensor([1]), cond=torch.zeros(1, 4, 6)) | change
    with pytest.raises(ValueError, match=sentence):
        shaken()(**given)


@pytest.mark.parametrize('config, sentence', [
    (dict(dim_head=12), 'multiple of 16 as dim_head'), (dict(dim=40), 'multiple of that as dim'),
    (dict(positions='alibi'), "give one of 'sincos', 'rope', 'rope\\+learned'")])
def test_sizes_that_cannot_be_are_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiT(**dict(dim=32, dim_head=16) | config)
    with pytest.raises(ValueError, match='without cond_dim'):
        DiT(32, dim_head=16)(torch.zeros(1, 3, 3, 4, 6), torch.tensor([1]), torch.zeros(1, 4, 6))


# ---- with the rest of the library

@pytest.mark.parametrize('captions', [True, False])
def test_diffusion_trains_and_draws_with_it(captions):
    dit = shaken(cond_dim=6 if captions else None, cond_frames=True, patch=4)
    diffusion = GaussianDiffusion(dit, image_size=(8, 12), num_frames=3, timesteps=10, objective='v', zero_snr=True,
                                  text_encoder=WordEncoder(6) if captions else None, prob_cond_frames=0.5)
    words = ['a red circle', 'blue'] if captions else None
    diffusion(torch.rand(2, 3, 3, 8, 12), words, null_cond_prob=0.1).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dit.parameters())
    settings = dict(cond_scale=2., batch_size=2, steps=3, sampler='ddim', seed=0, progress=False)
    video = diffusion.sample(words, **settings)
    assert video.shape == (2, 3, 3, 8, 12) and 0 <= video.min() < video.max() <= 1
    given = diffusion.sample(words, **settings, first_frames=torch.rand(1, 3, 1, 8, 12))
    assert (given - video).abs().max() > 1e-3


def test_a_run_is_trained_saved_and_built_again(tmp_path):
    clips = shapes.make_shapes(tmp_path / 'clips', 4, image_size=16, num_frames=2)
    torch.manual_seed(0)
    dit = DiT(32, 8, dim_head=16, depth=2, patch=4, text_length=12, checkpoint_activations=True)
    diffusion = GaussianDiffusion(dit, image_size=16, num_frames=2, timesteps=10, objective='v', text_encoder=WordEncoder(8))
    trainer = Trainer(diffusion, clips, train_batch_size=2, train_num_steps=2, save_and_sample_every=2, num_sample_rows=1,
                      sample_steps=2, step_start_ema=0, results_folder=tmp_path, processes=Processes(device=torch.device('cpu')))
    trainer.train()
    state = checkpoint.load_run(tmp_path)
    assert 'unet' not in state['config'] and state['config']['dit'] == dit.config
    again = diffusion_from_state(state)
    assert isinstance(again.denoise_fn, DiT) and again.has_config(diffusion.config())
    with trainer.ema.average_parameters():
        a, b = (each.sample(['a red circle'], steps=2, seed=1, progress=False) for each in (diffusion, again))
    assert torch.equal(a, b)
    other = GaussianDiffusion(Unet3D(8, cond_dim=8), image_size=16, num_frames=2, timesteps=10, objective='v', text_encoder=WordEncoder(8))
    assert not again.has_config(other.config()) and not other.has_config(again.config())
    assert not again.has_config({**again.config(), 'dit': {**dit.config, 'patch': 2}})


def test_a_checkpoint_says_which_network_it_holds():
    unet, dit = (network_from_config(config) for config in ({'unet': dict(dim=8)}, {'dit': dict(dim=32, dim_head=16)}))
    assert isinstance(unet, Unet3D) and isinstance(dit, DiT) and isinstance(dit.blocks[0], BLOCKS)
    with pytest.raises(ValueError, match='a network of your own'):
        network_from_config(GaussianDiffusion(torch.nn.Identity(), image_size=8, num_frames=2).config())


def test_what_needs_single_frames_is_refused_before_training(tmp_path):
    clips = shapes.make_shapes(tmp_path / 'clips', 2, image_size=16, num_frames=2)
    diffusion = GaussianDiffusion(DiT(32, dim_head=16, depth=1, patch=4), image_size=16, num_frames=2, timesteps=10)
    build = lambda **how: Trainer(diffusion, clips, results_folder=tmp_path, processes=Processes(device=torch.device('cpu')), **how)
    for way in (lambda: build(images=True), lambda: build().train(prob_focus_present=0.5),
                lambda: build().train(focus_present_mask=torch.ones(32, dtype=torch.bool))):
        with pytest.raises(ValueError, match='train on frames one by one, and a DiT has no attention within single frames'):
            way()
    assert not list(tmp_path.glob('*.csv'))


@pytest.mark.parametrize('setting', [dict(depth=-1), dict(depth=0), dict(patch=0), dict(frame_patch=0), dict(dim_head=0)])
def test_sizes_of_nothing_are_named(setting):
    with pytest.raises(ValueError, match=f'{next(iter(setting))}=.*: give a whole number, 1 or more'):
        DiT(32, **{'dim_head': 16, **setting})

"""The causal VAE: which lengths fit, what depends on what, and that every saving leaves the result alone.

Run: pytest tests/test_causal_vae.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from video_diffusion.vae.causal_blocks import Downsample, Norm, Upsample, stretched_index
from video_diffusion.vae.causal_vae import CausalVAE
from video_diffusion.vae.context_parallel import CausalConv3d, Piece, steps
from video_diffusion.vae.frame_shares import fitting_frames


def small_vae(scope='frame', **kwargs):
    torch.manual_seed(0)
    config = dict(latent_channels=2, dim=8, dim_mults=(1, 1, 2), blocks_per_level=1, norm_groups=4) | kwargs
    vae = CausalVAE(norm_scope=scope, **config)
    for parameter in vae.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return vae


def clip(frames, size=16, batch=1):
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(frames))


def close(ours, reference, tolerance=1e-5):
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


# ---- shapes

@pytest.mark.parametrize('compression, frames, latents', [
    (4, 1, 1), (4, 5, 2), (4, 9, 3), (4, 8, 2), (4, 4, 1), (2, 7, 4), (2, 6, 3), (1, 3, 3)])
def test_frames_become_latents_and_come_back(compression, frames, latents):
    vae = small_vae(time_compression=compression)
    with torch.no_grad():
        z = vae.encode(clip(frames)).mode()
        assert z.shape == (1, 2, latents, 4, 4)
        assert vae.decode(z, frames=frames).shape == (1, 3, frames, 16, 16)
        assert vae.decode(z).shape[2] == 1 + compression * (latents - 1)


@pytest.mark.parametrize('compression, dim_mults', [(2, (1, 1)), (4, (1, 1, 1))])
def test_without_a_first_frame_kept_apart_the_first_ones_come_out_alike(compression, dim_mults):
    """What is before them is a copy of them in every layer. So train.py takes 1 + a multiple, if not told how many."""
    vae = small_vae(time_compression=compression, dim_mults=dim_mults)
    with torch.no_grad():
        z = torch.randn(1, 2, 3, 4, 4)
        alike, apart = vae.decode(z, frames=3 * compression), vae.decode(z)
    for frame in range(1, compression):
        assert torch.equal(alike[:, :, frame], alike[:, :, 0])
        assert not torch.equal(apart[:, :, frame], apart[:, :, 0])
    assert not torch.equal(alike[:, :, compression], alike[:, :, 0])
    assert [fitting_frames(n, compression) % compression for n in range(compression + 1, 20)] == [1] * (19 - compression)
    assert all(0 <= n - fitting_frames(n, compression) < compression for n in range(1, 20))
    assert fitting_frames(compression, compression) == compression and fitting_frames(1, compression) == 1
    assert fitting_frames(8, 1) == 8


def test_time_is_compressed_eight_times_on_four_levels():
    vae = small_vae(time_compression=8, dim_mults=(1, 1, 1, 1))
    video, posterior = vae(clip(17))
    assert posterior.mean.shape == (1, 2, 3, 2, 2) and video.shape == (1, 3, 17, 16, 16)


def test_forward_gives_back_as_many_frames_as_it_got_and_repeats_with_a_generator():
    vae = small_vae()
    for frames in (4, 5, 8):
        video, posterior = vae(clip(frames), generator=torch.Generator().manual_seed(0))
        again, _ = vae(clip(frames), generator=torch.Generator().manual_seed(0))
        assert video.shape[2] == frames and torch.equal(video, again)
    mode, posterior = vae(clip(5), sample=False)
    torch.testing.assert_close(mode, vae.decode(posterior.mean))


@pytest.mark.parametrize('call, sentence', [
    (lambda vae: vae.encode(clip(7)), r'7 frames: .*nearest: 5 or 9.*nearest: 4 or 8'),
    (lambda vae: vae.encode(clip(2)), r'2 frames: .*nearest: 1 or 5'),
    (lambda vae: vae.encode(clip(5, size=18)), r'18 x 18 pixels.*multiples of 4'),
    (lambda vae: vae.encode(clip(5)[0]), r'give \(batch, channels'),
    (lambda vae: vae.encode(clip(5)[:, :1]), r'1 channels.*in_channels=3'),
    (lambda vae: vae.encode(clip(5), chunk=6), r'chunk=6: give a multiple of 4'),
    (lambda vae: vae.encode(clip(5), tile=10), r'tile=10: give a multiple of 4 pixels, 16 or more'),
    (lambda vae: vae.decode(torch.zeros(1, 2, 3, 4, 4), frames=10), r'3 latent frames stand for 9 .*12'),
    (lambda vae: vae.decode(torch.zeros(1, 3, 3, 4, 4)), r'give \(batch, 2, frames'),
    (lambda vae: list(vae.encode_stream([clip(3)])), r'2 frames are left|3 frames are left'),
    (lambda vae: CausalVAE(time_compression=3), r'time_compression=3'),
    (lambda vae: CausalVAE(time_compression=4, dim_mults=(1, 2)), r'2 levels allow 2'),
    (lambda vae: CausalVAE(dim=48), r'norm_groups=32 does not divide the 48'),
    (lambda vae: CausalVAE(norm_scope='video'), r"norm_scope='video'"),
])
def test_what_does_not_fit_is_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(small_vae())


def test_the_config_rebuilds_the_model():
    vae = small_vae('clip', dropout=0.1)
    CausalVAE(**vae.config).load_state_dict(vae.state_dict())


def test_videos_in_zero_one_are_minus_one_one_inside():
    vae, seen = small_vae(), []
    vae.encoder.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vae.encode(torch.cat([torch.zeros(1, 3, 1, 16, 16), torch.ones(1, 3, 4, 16, 16)], dim=2))
    assert seen[0].min() == -1 and seen[0].max() == 1
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(-1.)
    assert torch.equal(vae.decode(torch.randn(1, 2, 2, 4, 4)), torch.zeros(1, 3, 5, 16, 16))


# ---- causality

@pytest.mark.parametrize('grad', [True, False])
def test_no_output_depends_on_later_frames_when_norms_see_one_frame(grad):
    vae = small_vae('frame')
    with torch.set_grad_enabled(grad):
        video, changed = clip(13), clip(13)
        changed[:, :, 5:] = torch.rand(1, 3, 8, 16, 16)
        z, z_changed = vae.encode(video).mean, vae.encode(changed).mean
        assert torch.equal(z[:, :, :2], z_changed[:, :, :2])
        assert not torch.allclose(z[:, :, 2:], z_changed[:, :, 2:])
        out, out_changed = vae.decode(z), vae.decode(z_changed)
        assert torch.equal(out[:, :, :5], out_changed[:, :, :5])
        assert not torch.allclose(out[:, :, 5:], out_changed[:, :, 5:])


def test_norms_over_the_clip_do_look_at_later_frames():
    vae = small_vae('clip')
    changed = clip(9)
    changed[:, :, 5:] = 0.
    assert not torch.allclose(vae.encode(clip(9)).mean[:, :, :1], vae.encode(changed).mean[:, :, :1])


# ---- savings change nothing

@pytest.mark.parametrize('scope', ['clip', 'frame'])
@pytest.mark.parametrize('frames', [1, 4, 9])
def test_without_gradients_the_result_is_the_same(scope, frames, monkeypatch):
    monkeypatch.setattr('video_diffusion.vae.context_parallel.steps', two_frames_at_a_time)
    monkeypatch.setattr('video_diffusion.vae.causal_blocks.steps', two_frames_at_a_time)
    vae = small_vae(scope).double()
    video = clip(frames, batch=2).double()
    posterior = vae.encode(video)
    decoded = vae.decode(posterior.mean, frames=frames)
    with torch.no_grad():
        again = vae.encode(video)
        close(again.mean, posterior.mean, 1e-10)
        close(again.logvar, posterior.logvar, 1e-10)
        close(vae.decode(posterior.mean, frames=frames), decoded, 1e-10)


def two_frames_at_a_time(x, first=False):
    cuts = [0, *range(2 + first, x.shape[2], 2), x.shape[2]]
    return list(zip(cuts, cuts[1:]))


def test_steps_cover_all_frames_and_keep_pairs_together():
    x = torch.empty(1, 2 ** 10, 31, 32, 64)
    for first in (False, True):
        pieces = steps(x, first)
        assert [a for a, _ in pieces] == [0, *(b for _, b in pieces[:-1])] and pieces[-1][1] == 31
        lengths = [stop - start - (first and start == 0) for start, stop in pieces[:-1]]
        assert len(lengths) > 2 and all(length % 2 == 0 for length in lengths)


def test_an_image_is_convolved_once_with_weights_summed_over_time():
    torch.manual_seed(0)
    conv, image = CausalConv3d(3, 5).double(), torch.randn(2, 3, 1, 6, 7, dtype=torch.float64)
    three = F.conv3d(image.expand(-1, -1, 3, -1, -1), conv.weight, conv.bias, padding=(0, 1, 1))
    torch.testing.assert_close(conv(image), three)


def test_conditioning_at_latent_resolution_equals_conditioning_at_full_size():
    torch.manual_seed(0)
    norm = Norm(2, 4, 'clip', latent_channels=3).double()
    for frames, latents, first in [(9, 3, True), (8, 2, False), (1, 1, True), (3, 3, True)]:
        x, z = torch.randn(2, 4, frames, 8, 12).double(), torch.randn(2, 3, latents, 4, 3).double()
        size = (frames - first, 8, 12)
        stretched = [F.interpolate(z[:, :, :1], (1, 8, 12))] if first else []
        if size[0]:
            stretched.append(F.interpolate(z[:, :, int(first):], size))
        large = torch.cat(stretched, dim=2)
        normed = F.group_norm(x, 2, norm.weight, norm.bias, eps=1e-6)
        expected = F.silu(normed * norm.gain(large) + norm.offset(large))
        torch.testing.assert_close(norm.prepare(x, z, Piece(first))(0, frames), expected)


def test_up_sampling_in_time_repeats_after_the_convolution_but_for_the_first_frame():
    torch.manual_seed(0)
    up, x = Upsample(3, time=True).double(), torch.randn(1, 3, 5, 4, 6).double()
    for first in (True, False):
        repeated = x.repeat_interleave(2, dim=2)[:, :, int(first):]
        large = F.interpolate(repeated.transpose(1, 2).flatten(0, 1), scale_factor=2.)
        out, _ = up(x, Piece(first))
        torch.testing.assert_close(out, up.conv(large).unflatten(0, (1, -1)).transpose(1, 2))


def test_down_sampling_averages_pairs_and_keeps_the_first_frame_apart():
    down = Downsample(1, time=True)
    with torch.no_grad():
        down.conv.weight.zero_()[0, 0, 0, 0] = 1.
        down.conv.bias.zero_()
    x = torch.tensor([5., 1., 3., 7., 9.]).reshape(1, 1, 5, 1, 1).expand(-1, -1, -1, 4, 4)
    assert down(x, Piece(True))[0][0, 0, :, 0, 0].tolist() == [5., 2., 8.]
    assert down(x[:, :, 1:], Piece(False))[0][0, 0, :, 1, 1].tolist() == [2., 8.]


def test_stretching_an_index_in_time():
    assert stretched_index(3, 9, True, 'cpu').tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert stretched_index(2, 8, False, 'cpu').tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert stretched_index(1, 1, True, 'cpu').tolist() == [0]
    assert stretched_index(3, 3, True, 'cpu').tolist() == [0, 1, 2]


@pytest.mark.parametrize('frames', [1, 9])
def test_gradient_checkpointing_leaves_loss_and_gradients_alone(frames):
    plain, saving = small_vae('clip'), small_vae('clip', gradient_checkpointing=True)
    losses = []
    for vae in (plain, saving):
        video, posterior = vae(clip(frames), sample=False)
        losses.append(video.square().sum() + posterior.kl().sum())
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for ours, reference in zip(saving.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_with_and_without_gradients_and_not_in_evaluation():
    vae = small_vae(dropout=0.5)
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = vae.encode(clip(5)).mean, vae.encode(clip(5)).mean
        assert not torch.allclose(first, second)
        vae.eval()
        assert torch.equal(vae.encode(clip(5)).mean, vae.encode(clip(5)).mean)


@pytest.mark.slow
def test_every_parameter_gets_a_gradient_and_the_vae_learns():
    vae = small_vae('clip')
    optimiser = torch.optim.Adam(vae.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        video, posterior = vae(clip(5))
        loss = F.mse_loss(video, clip(5)) + 1e-6 * posterior.kl().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in vae.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- streaming

def cut(x, lengths):
    """x in pieces of the given lengths, again and again until it ends."""
    pieces, start = [], 0
    while start < x.shape[2]:
        length = lengths[len(pieces) % len(lengths)]
        pieces.append(x[:, :, start:start + length])
        start += length
    return pieces


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), latents=st.integers(1, 6),
       first=st.booleans(), grad=st.booleans())
def test_streams_equal_the_whole_for_every_chunking(lengths, latents, first, grad):
    vae = small_vae('frame')
    frames = 1 + 4 * (latents - 1) if first else 4 * latents
    with torch.set_grad_enabled(grad):
        video = clip(frames, size=8)
        z = vae.encode(video).mean
        parts = [posterior.mean for posterior in vae.encode_stream(cut(video, lengths), first)]
        close(torch.cat(parts, dim=2), z)
        parts = list(vae.decode_stream(cut(z, lengths), first))
        close(torch.cat(parts, dim=2), vae.decode(z, frames=frames))


@pytest.mark.parametrize('frames', [1, 5, 13, 16])
@pytest.mark.parametrize('chunk', [1, 2, 3])
def test_chunks_equal_the_whole(frames, chunk):
    vae = small_vae('frame')
    with torch.no_grad():
        posterior = vae.encode(clip(frames))
        close(vae.encode(clip(frames), chunk=4 * chunk).mean, posterior.mean)
        close(vae.decode(posterior.mean, frames, chunk=chunk), vae.decode(posterior.mean, frames))


def test_gradients_flow_through_chunks_and_checkpoints_to_all_earlier_frames():
    whole, chunked = small_vae('frame').double(), small_vae('frame', gradient_checkpointing=True).double()
    grads = []
    for vae, chunk in ((whole, None), (chunked, 4)):
        video = clip(9).double().requires_grad_()
        vae.encode(video, chunk=chunk).mean[:, :, -1].sum().backward()
        grads.append((video.grad, vae.encoder.conv_in.weight.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_two_streams_at_once_do_not_meet_and_modules_keep_nothing():
    vae = small_vae('frame')
    a, b = torch.randn(2, 1, 2, 4, 4, 4)
    with torch.no_grad():
        before = {name: set(vars(module)) for name, module in vae.named_modules()}
        mixed = list(zip(vae.decode_stream(cut(a, [1])), vae.decode_stream(cut(b, [1]))))
        close(torch.cat([x for x, _ in mixed], 2), vae.decode(a))
        close(torch.cat([x for _, x in mixed], 2), vae.decode(b))
    assert before == {name: set(vars(module)) for name, module in vae.named_modules()}


def test_an_endless_stream_holds_two_frames_per_convolution():
    vae, states = small_vae('frame'), []
    decoder = vae.decoder.forward
    vae.decoder.forward = lambda z, piece, run: states.append(piece.future) or decoder(z, piece, run)
    convolutions = sum(isinstance(module, CausalConv3d) for module in vae.decoder.modules())
    with torch.no_grad():
        for _ in vae.decode_stream(torch.randn(1, 2, 1, 4, 4) for _ in range(4)):
            *used, state = states
            assert len(state) == convolutions and all(kept.shape[2] == 2 for kept in state.values())
            assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in state.values())
            assert not any(used)                  # freed where they were read


# ---- tiles

def moving_squares(frames=5, size=64):
    """Two squares that cross a dark background."""
    video = torch.full((1, 3, frames, size, size), 0.1)
    for t in range(frames):
        video[:, 0, t, 8 + 2 * t:24 + 2 * t, 20:36] = 0.9
        video[:, 2, t, 30:46, 40 - 3 * t:56 - 3 * t] = 0.8
    return video


def smooth_gradient(frames=5, size=64):
    ramp = torch.linspace(0, 1, size)
    rows, columns = torch.meshgrid(ramp, ramp, indexing='ij')
    video = torch.stack([rows, columns, (rows + columns) / 2])
    return video[None, :, None].expand(1, 3, frames, size, size).contiguous()


@pytest.fixture(scope='module')
def trained():
    """A VAE that reconstructs a little: seams show where there is something to see."""
    vae = small_vae('clip', latent_channels=4)
    optimiser = torch.optim.Adam(vae.parameters(), 5e-3)
    for step in range(40):
        video = (smooth_gradient if step % 2 else moving_squares)(size=32)
        loss = F.mse_loss(vae(video, sample=False)[0], video)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return vae.eval()


def seams(video, tile, overlap):
    """Mean step between neighbouring columns where tiles begin and end, over the mean step elsewhere."""
    step = (video[..., 1:] - video[..., :-1]).abs().mean(dim=(0, 1, 2, 3))
    starts = range(tile - overlap, video.shape[-1] - overlap, tile - overlap)
    edges = torch.zeros(len(step), dtype=torch.bool)
    for start in starts:
        edges[[start - 1, start + overlap - 1]] = True
    return (step[edges].mean() / step[~edges].mean()).item()


@pytest.mark.slow
@pytest.mark.parametrize('make', [smooth_gradient, moving_squares])
def test_tiles_come_close_to_the_whole_and_show_no_seams(trained, make):
    video = make()
    with torch.no_grad():
        posterior = trained.encode(video)
        tiled = trained.encode(video, tile=32)
        spread = posterior.mean.std()
        assert tiled.mean.shape == posterior.mean.shape and tiled.logvar.shape == posterior.logvar.shape
        encode_error = ((tiled.mean - posterior.mean).square().mean().sqrt() / spread).item()
        whole = trained.decode(posterior.mean)
        pieces = trained.decode(posterior.mean, tile=32)
        decode_error = (pieces - whole).square().mean().sqrt().item()
        # What differs is what the norms see: with tiles of 32 pixels a quarter of this picture.
        assert encode_error < 0.6 and decode_error < 0.12
        assert seams(pieces, 32, 8) < 1.5 * max(1., seams(whole, 32, 8))


def test_tiles_of_a_function_that_sees_one_pixel_are_exact():
    from video_diffusion.vae.tiling import in_tiles
    x = torch.rand(1, 2, 3, 40, 56, dtype=torch.float64)
    double = in_tiles(lambda part: part.repeat_interleave(2, 3).repeat_interleave(2, 4), x, 16, 2)
    torch.testing.assert_close(double, x.repeat_interleave(2, 3).repeat_interleave(2, 4))
    half = in_tiles(lambda part: part[..., ::4, ::4], x, 16, 1 / 4)
    torch.testing.assert_close(half, x[..., ::4, ::4])


def test_a_clip_smaller_than_a_tile_is_not_changed():
    vae = small_vae()
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(clip(5), tile=64).mean, vae.encode(clip(5)).mean)


def test_tiles_and_chunks_together():
    vae = small_vae('frame')
    with torch.no_grad():
        z = vae.encode(clip(5, size=24), chunk=4, tile=16).mean
        close(z, vae.encode(clip(5, size=24), tile=16).mean)
        close(vae.decode(z, chunk=1, tile=16), vae.decode(z, tile=16))

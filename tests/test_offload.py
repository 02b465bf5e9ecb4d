"""With --offload no two parts of a model are on the device, and the videos are the same. Run: pytest tests/test_offload.py

The device is the CPU under another name, and `meta`, from which nothing comes back: moves are counted.
"""

import pytest
import torch
from test_cogvideox import HEIGHT, PROMPTS, WIDTH, folder, script  # noqa: F401, the last two are fixtures

from video_diffusion import GaussianDiffusion, Unet3D
from video_diffusion.diffusion.offload import one_at_a_time
from video_diffusion.vae.causal_vae import CausalVAE
from video_diffusion.weights import cogvideox_from_folder

DEVICE = torch.device('cpu', 0)


@pytest.fixture
def moves(monkeypatch):
    """Who went where, in order."""
    log = []
    original = torch.nn.Module.to

    def to(self, *args, **how):
        log.append((type(self).__name__, str(args[0])))
        return original(self, *args, **how)
    monkeypatch.setattr(torch.nn.Module, 'to', to)
    return log


@pytest.mark.parametrize('kind', ['rope', '1.5-i2v'])
def test_each_part_comes_when_it_is_asked_and_goes_before_the_next(folder, moves, kind):
    diffusion = cogvideox_from_folder(folder(kind))
    image = torch.rand(1, 3, HEIGHT, WIDTH) if kind == '1.5-i2v' else None
    draw = lambda: diffusion.sample(PROMPTS, 6., negative='', image=image, sampler='ddim', steps=2, seed=0, progress=False)
    plain = draw()
    del moves[:]
    one_at_a_time(diffusion, DEVICE)
    assert moves == []                                   # nothing is there before it is needed
    assert torch.equal(draw(), plain)
    parts, on_device, most = ['T5Encoder', 'DiT', 'CausalVAE'], set(), 0
    for name, place in moves:
        on_device = on_device | {name} if place == 'cpu:0' else on_device - {name}
        most = max(most, len(on_device & set(parts)))
    first = ['CausalVAE'] if image is not None else []
    arrivals = [name for name, place in moves if place == 'cpu:0']
    assert arrivals == [*first, *parts] and most == 1


def test_what_a_part_holds_is_moved_with_it_and_what_is_nobodys_stays(folder):
    diffusion = cogvideox_from_folder(folder('rope'))
    one_at_a_time(diffusion, torch.device('meta'))
    assert diffusion.scale.is_meta and diffusion.alpha.is_meta and diffusion.diffusion.sigma.is_meta
    assert not any(p.is_meta for p in diffusion.parameters())
    diffusion.denoise_fn(torch.zeros(1, 4, 3, 4, 6, device='meta'), torch.zeros(1, device='meta'), torch.zeros(1, 7, 32, device='meta'))
    assert all(p.is_meta for p in diffusion.denoise_fn.parameters()) and not any(p.is_meta for p in diffusion.vae.parameters())


def test_a_model_of_pixels_too():
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2)), image_size=8, num_frames=2)
    plain = diffusion.sample(batch_size=1, steps=2, sampler='ddim', seed=0, progress=False)
    one_at_a_time(diffusion, DEVICE)
    assert torch.equal(diffusion.sample(batch_size=1, steps=2, sampler='ddim', seed=0, progress=False), plain)


def test_the_script_offloads_and_decodes_in_tiles(folder, script, monkeypatch):
    seen, decode = [], CausalVAE.decode
    monkeypatch.setattr(CausalVAE, 'decode', lambda self, z, *args, **how: seen.append(how) or decode(self, z, *args, **how))
    common = folder('rope'), '--prompt', PROMPTS[0], '--steps', 2, '--image-size', 32, 32
    videos = []
    for flags in ((), ('--offload',), ('--tile', 16)):
        code, err, written = script(*common, *flags)
        assert code == 0, err
        videos.append(written['000-a-red-ball-rolls-left.mp4 8'].clone())
    assert torch.equal(videos[0], videos[1])
    assert [how['tile'] for how in seen] == [None, None, 16] and {how['chunk'] for how in seen} == {2}
    assert 0 < (videos[0] - videos[2]).abs().mean() < 0.1
    code, err, _ = script(*common, '--tile', 6)
    assert code == 2 and 'tile=6: give a multiple of 4 pixels, 16 or more' in err

"""LatentDiffusion: diffuse in the latents of a VAE, which are many times fewer than the pixels.

Rombach et al. 2022 (arXiv 2112.10752): first train a VAE, then a diffusion model on what it makes of the clips.

    video  b 3 9 32 32 --- VAE, frozen ---> latent  b 4 5 8 8 --- * scale ---> GaussianDiffusion(latents=True)
           [0, 1]      <-- VAE, frozen ----           any size             about unit variance

`scale` is one over the standard deviation of the latents, so that a noise schedule made for pixels fits them. With
None the first clips of the training are measured; 1.15258426 is that of CogVideoX's VAE, 0.18215 that of SVD's.

    >>> vae = CausalVAE(latent_channels=4, dim=32, dim_mults=(1, 2, 2), time_compression=2)
    >>> channels, frames, *size = latent_shape(vae, num_frames=9, image_size=(32, 32))
    >>> inner = GaussianDiffusion(Unet3D(dim=64, channels=channels), channels=channels, num_frames=frames,
    ...                           image_size=tuple(size), latents=True, objective='v')
    >>> diffusion = LatentDiffusion(inner, vae, num_frames=9)
    >>> loss = diffusion(torch.rand(2, 3, 9, 32, 32))               # from here on like a GaussianDiffusion of pixels
    >>> videos = diffusion.sample(batch_size=2, steps=50, sampler='ddim')

**Image-to-video** as in CogVideoX (arXiv 2408.06072): with `Unet3D(cond_frames=True)` and `prob_cond_frames` the
network is told the first latent frames of some clips, as known_frames.py has it. The first of them is the
first frame *of the video*, encoded alone, so that one image is enough, and with a little noise in it
(sigma = exp(N(-3, 0.5)) in [-1, 1]), so that a picture need not be perfect. What the network is told is therefore
only about right, and it answers for these frames too: `sample(image=...)`, `sample(first_frames=...)`. The pretrained
models know an image and nothing else, each times a number of its own: `image_scale`.

**A DiT with `frame_patch=2`** (CogVideoX 1.5) needs an even number of latent frames: in front of an odd number the first is
there twice, drawn like the others, but not decoded. An image is told there.

**Super-resolution** goes the same way (cascades of arXiv 2106.15282, in latents): with `low_res=4` and `prob_cond_frames=1`
the network is told all frames, made four times smaller, large again, and encoded. `sample(low_res=...)` takes a small
clip, and what the network invents is what the small one leaves open.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..checks import instance, number, video_shape, whole
from ..vae.frame_shares import has_special_first_frame, latent_shape
from ..vae.gaussian import DiagonalGaussian
from ..vae.vae_checkpoint import vae_config, vae_from_config
from . import known_frames, long_videos
from .gaussian_diffusion import GaussianDiffusion
from .guidance import Cond
from .latent_cache import Encoded, fingerprint

CLIPS_TO_MEASURE = 64
SETTINGS = 'num_frames', 'max_batch', 'chunk', 'low_res', 'image_scale'


class LatentDiffusion(nn.Module):
    def __init__(
        self,
        diffusion: GaussianDiffusion,             # with latents=True, its sizes and channels those of the latents
        vae: nn.Module,
        scale: float | None = None,               # what latents are multiplied with; None: see measure_scale
        *,
        num_frames: int | None = None,            # of the videos; None: with a special first frame, see causal_vae.py
        max_batch: int = 8,                       # clips in the VAE at once
        chunk: int | None = None,                 # latent frames in it at once, None: all; see CausalVAE.encode
        low_res: int | None = None,               # how many times larger than a given clip videos are; None: nothing is given
        image_scale: float | None = None,         # the network is told an image alone, its latents times this; None: first frames
    ):
        super().__init__()
        instance('diffusion', diffusion, GaussianDiffusion)
        self.num_frames = 1 + vae.time_compression * (diffusion.num_frames - 1) if num_frames is None else num_frames
        self.height, self.width = (side * vae.space_compression for side in (diffusion.height, diffusion.width))
        self.channels = vae.config['in_channels']
        expected = latent_shape(vae, self.num_frames, (self.height, self.width))
        self.doubled = -expected[1] % getattr(diffusion.denoise_fn, 'patch', (1,))[0]    # latent frames in front of the first
        given = diffusion.channels, diffusion.num_frames - self.doubled, diffusion.height, diffusion.width
        if given != expected or not diffusion.latents:
            raise ValueError(f'the GaussianDiffusion has (channels, num_frames, height, width) = {given} and '
                             f'latents={diffusion.latents}: the latents of {self.num_frames} frames are {expected}, and it must '
                             'have latents=True')
        whole('max_batch', max_batch, 1)
        number('scale', scale, above=0)
        number('image_scale', image_scale, above=0)
        if low_res is not None and (low_res < 2 or self.height % low_res or self.width % low_res):
            raise ValueError(f'low_res={low_res}: give a number above 1 that divides frames of {self.height}x{self.width}')
        if low_res is not None and diffusion.prob_cond_frames != 1:
            raise ValueError(f'low_res={low_res} with prob_cond_frames={diffusion.prob_cond_frames}: the network is always told '
                             'the small clip, as known frames, so give Unet3D(cond_frames=True) and prob_cond_frames=1')
        if image_scale is not None and not diffusion.prob_cond_frames:
            raise ValueError(f'image_scale={image_scale}, but the network is never told an image: prob_cond_frames is 0')
        self.diffusion, self.vae = diffusion, vae.eval().requires_grad_(False)
        self.max_batch, self.chunk, self.low_res, self.image_scale = max_batch, chunk, low_res, image_scale
        self.register_buffer('scale', torch.tensor(float('nan') if scale is None else float(scale)))
        self.has_scale = scale is not None        # looked up in the buffer but once: on a GPU that waits
        self.tile: int | None = None              # decode in tiles of so many pixels: see tiling.py

    # What is asked of a diffusion model is mostly the business of the one inside

    denoise_fn = property(lambda self: self.diffusion.denoise_fn)
    text_encoder = property(lambda self: self.diffusion.text_encoder)
    num_timesteps = property(lambda self: self.diffusion.num_timesteps)
    prob_cond_frames = property(lambda self: self.diffusion.prob_cond_frames)
    frame_noise = property(lambda self: self.diffusion.frame_noise)
    alpha = property(lambda self: self.diffusion.alpha)
    draw_steps = property(lambda self: self.diffusion.draw_steps)
    embed = property(lambda self: self.diffusion.embed)

    def train(self, mode: bool = True) -> 'LatentDiffusion':
        super().train(mode)
        self.vae.eval()
        return self

    # Training

    def forward(
        self,
        video: Tensor | Encoded,                      # (b c f h w) in [0, 1], or what `encode` made of it
        cond: Cond = None, noise: Tensor | None = None, t: Tensor | None = None,     # as in GaussianDiffusion.forward, for latents
        *,
        posterior_noise: Tensor | None = None,        # which latents of those that the VAE finds possible
        image_noise: Tensor | None = None,            # in the first frames that the network is told; None draws both here
        **training,                                   # the rest as there
    ) -> Tensor:
        posterior, hint = video if isinstance(video, Encoded) else self.encode(video, image_noise)
        self.check_scale()
        posterior_noise = torch.randn_like(posterior.mean) if posterior_noise is None else posterior_noise
        z = self.filled_up((posterior.mean + posterior.std * posterior_noise) * self.scale)    # b c f h w, of latents
        if hint is not None:
            hint = self.filled_up(hint) if self.low_res else hint
            training['known'] = torch.cat((hint * (self.image_scale or self.scale), z[:, :, hint.shape[2]:]), dim=2)
        if self.low_res:
            training['known_mask'] = torch.ones(len(z), z.shape[2], dtype=torch.bool, device=z.device)
        elif self.image_scale is not None:
            mask = training.get('known_mask')
            mask = self.diffusion.draw_known(len(z), z.device) if mask is None else mask
            training['known_mask'] = mask & (torch.arange(z.shape[2], device=z.device) == 0)
        return self.diffusion(z, cond, noise, t, **training)

    def filled_up(self, z: Tensor) -> Tensor:
        """(b c f h w) with the first frame twice, where the network's patches ask for it."""
        return torch.cat((z[:, :, :self.doubled], z), dim=2)

    def draw(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        draws = self.diffusion.draw(count, device, generator)
        draws['posterior_noise'] = torch.randn(draws['noise'][:, :, self.doubled:].shape, device=device, generator=generator)
        if self.prob_cond_frames and not self.low_res:
            draws['image_noise'] = self.draw_image_noise(count, device, generator)
        return draws

    def draw_image_noise(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """(b c 1 h w) to add to first frames in [0, 1], where it is half of what it is in [-1, 1]."""
        where = dict(device=device, generator=generator)
        sigma = (torch.randn((count, 1, 1, 1, 1), **where) * 0.5 - 3).exp()
        return sigma / 2 * torch.randn((count, self.channels, 1, self.height, self.width), **where)

    @torch.no_grad()
    def measure_scale(self, dataset) -> None:
        """scale=None: that of some clips from all over a GifDataset or LatentCache. Otherwise, or once known, nothing."""
        if not self.scale.isnan():
            return
        count = min(CLIPS_TO_MEASURE, len(dataset))
        first = second = 0.
        for i in range(count):
            clip = dataset.floats(dataset.clip(i * len(dataset) // count)[None].to(self.scale.device))
            posterior = clip.posterior if isinstance(clip, Encoded) else self.posterior(clip)
            mean, var = posterior.mean.cpu().double(), posterior.var.cpu()               # not every GPU knows float64
            first, second = first + mean.mean() / count, second + (mean ** 2 + var).mean() / count       # E z and E z^2
        scale = (second - first ** 2) ** -0.5
        if not scale.isfinite():
            raise ValueError(f'the VAE makes latents of {count} clips whose standard deviation is {1 / scale.item()}: its weights '
                             'are NaN, or it was never trained; give another')
        self.scale.copy_(scale)

    def check_scale(self) -> None:
        self.has_scale = self.has_scale or not self.scale.isnan().item()
        if not self.has_scale:
            raise ValueError('scale=None and nothing measured yet: call measure_scale(dataset), as the Trainer does, or give the '
                             'scale, 1.15258426 for the VAE of CogVideoX')

    # Videos to latents and back

    @torch.no_grad()
    def encode(self, video: Tensor, image_noise: Tensor | None = None) -> Encoded:
        """Videos (b c f h w) in [0, 1] -> their latents, unscaled, and, if the network is to be told, those of its hint."""
        self.check(video)
        if self.low_res:
            return Encoded(self.posterior(video), self.posterior(self.enlarge(self.shrink(video))).mean)
        if not self.prob_cond_frames:
            return Encoded(self.posterior(video), None)
        image_noise = self.draw_image_noise(len(video), video.device) if image_noise is None else image_noise
        return Encoded(self.posterior(video), self.posterior(video[:, :, :1] + image_noise).mean)

    def shrink(self, video: Tensor) -> Tensor:
        """(b c f h w) -> what is left of it in `low_res` times smaller frames."""
        return F.interpolate(video, (self.num_frames, self.height // self.low_res, self.width // self.low_res), mode='area')

    def enlarge(self, video: Tensor) -> Tensor:
        return F.interpolate(video, (self.num_frames, self.height, self.width), mode='trilinear')    # frames stay as many

    def posterior(self, video: Tensor) -> DiagonalGaussian:
        chunk = self.chunk and self.chunk * self.vae.time_compression
        with torch.autocast('cpu' if video.is_meta else video.device.type, enabled=False):       # cached latents are float32, too
            parts = [self.vae.encode(part, chunk=chunk) for part in video.split(self.max_batch)]
        return DiagonalGaussian(torch.cat([part.mean for part in parts]), torch.cat([part.logvar for part in parts]))

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (b c f h w) -> videos in [0, 1]."""
        self.check_scale()
        z = z[:, :, self.doubled:] / self.scale
        how = dict(chunk=self.chunk, tile=self.tile)
        return torch.cat([self.vae.decode(part, self.num_frames, **how) for part in z.split(self.max_batch)]).clamp(0, 1)

    # Sampling

    @torch.inference_mode(False)                      # as in GaussianDiffusion
    @torch.no_grad()
    def sample(
        self, cond: Cond = None, cond_scale: float = 1., batch_size: int = 16,
        *,
        image: Tensor | None = None,                  # (b c h w): how the videos begin; one is enough for all. Or:
        first_frames: Tensor | None = None,           # (b c k h w): several of them
        low_res: Tensor | None = None,                # (b c f h/low_res w/low_res): the videos, small; one is enough for all
        known_by: str | None = None,                  # as in Sampling
        **settings,                                   # the rest as in GaussianDiffusion.sample; `noise` is that of latents
    ) -> Tensor:
        """Videos (b c f h w) in [0, 1]; with `return_all` the whole way to them, decoded (steps + 1, b c f h w)."""
        self.check_scale()
        if image is not None:
            if image.ndim != 4 or first_frames is not None:
                raise ValueError(f'image has shape {tuple(image.shape)}: expected (batch, channels, height, width), and no '
                                 'first_frames beside it')
            first_frames = image.unsqueeze(2)
        if first_frames is not None:
            known_by = known_by or known_frames.best_way(self.diffusion)
            settings['known'], settings['known_mask'] = self.beginning(first_frames, by_network=known_by == 'network')
        if self.low_res or low_res is not None:
            self.check_low_res(low_res, alone=first_frames is None)
            settings['known'] = self.filled_up(self.posterior(self.enlarge(low_res.to(self.scale.device))).mean) * self.scale
            settings['known_mask'] = torch.ones(self.diffusion.num_frames, dtype=torch.bool)
        x = self.diffusion.sample(cond, cond_scale, batch_size, known_by=known_by, **settings)
        return torch.stack([self.decode(z) for z in x]) if x.ndim == 6 else self.decode(x)

    sample_long = long_videos.sample_long             # windows overlap by frames that are whole latent frames

    def ddim_invert(self, video: Tensor, cond: Cond = None, **how) -> Tensor:
        """As GaussianDiffusion.ddim_invert: the noise (b c f h w) of the latents of a video."""
        return self.diffusion.ddim_invert(self.latents(video), cond, **how)

    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5, **how) -> Tensor:
        """As GaussianDiffusion.interpolate: a video between two, by way of their latents."""
        return self.decode(self.diffusion.interpolate(self.latents(x1), self.latents(x2), t, lam, **how))

    @torch.no_grad()
    def latents(self, video: Tensor) -> Tensor:
        """The most likely latents of a video (b c f h w), scaled."""
        self.check(video)
        self.check_scale()
        return self.filled_up(self.posterior(video).mean) * self.scale

    def whole_lengths(self) -> list[int]:
        """How many first frames of a video are whole latent frames, of which all may be known."""
        if self.image_scale:
            return [1]
        step = self.vae.time_compression
        return list(range(1 if has_special_first_frame(self.num_frames, step) else step, self.num_frames, step))

    def beginning(self, first_frames: Tensor, by_network: bool) -> tuple[Tensor, Tensor]:
        """First frames (b c k h w) as known latents (b c f h w), scaled, 0 where unknown, and their mask (f)."""
        # The network is told the first frame as an image, in any case.
        lengths = sorted({*self.whole_lengths(), *[1] * by_network})
        shape, given = (self.channels, self.height, self.width), tuple(first_frames.shape)
        if len(given) != 5 or (given[1], *given[3:]) != shape or given[2] not in lengths:
            raise ValueError(f'first_frames has shape {given}: expected (batch, {shape[0]}, k, {shape[1]}, '
                             f'{shape[2]}), where k is {" or ".join(map(str, lengths)) or "nothing that fits"}, '
                             f'for the VAE compresses time by {self.vae.time_compression}')
        first_frames = first_frames.to(self.scale.device)
        z = self.filled_up(self.posterior(first_frames).mean) * self.scale
        if by_network:
            image = self.posterior(first_frames[:, :, :1]).mean * (self.image_scale or self.scale)
            z = image if self.image_scale else torch.cat((image, z[:, :, 1:]), dim=2)
        frames = self.diffusion.num_frames
        return F.pad(z, (0, 0, 0, 0, 0, frames - z.shape[2])), torch.arange(frames) < z.shape[2]

    def check(self, video: Tensor) -> None:
        video_shape(video, self.channels, self.num_frames, self.height, self.width)

    def check_low_res(self, low_res: Tensor | None, alone: bool) -> None:
        if not self.low_res:
            raise ValueError('low_res was given, but this model was not built to enlarge clips: LatentDiffusion(..., low_res=4)')
        expected = (self.channels, self.num_frames, self.height // self.low_res, self.width // self.low_res)
        given = None if low_res is None else tuple(low_res.shape)
        if given is None or len(given) != 5 or given[1:] != expected or not alone:
            raise ValueError(f'low_res has shape {given}: this model enlarges clips {self.low_res} times, expected (batch, '
                             f'{", ".join(map(str, expected))}) and no first_frames beside it')

    # Building it again from a checkpoint, which holds the VAE too

    def config(self) -> dict:
        return {**self.diffusion.config(), 'latent': dict(
            vae=vae_config(self.vae), vae_weights=fingerprint(self.vae), **{name: getattr(self, name) for name in SETTINGS})}

    def has_config(self, config: dict) -> bool:
        """Whether a checkpoint was made with our settings, and with our very VAE: latents of another mean nothing to it."""
        mine, stored = self.config()['latent'], config.get('latent', {})
        return self.diffusion.has_config(config) and all(
            mine[name] == stored.get(name) for name in ('vae', 'vae_weights', 'num_frames', 'low_res', 'image_scale'))

    @classmethod
    def from_config(cls, config: dict, text_encoder: str | None = None) -> 'LatentDiffusion':
        latent = config['latent']
        return cls(GaussianDiffusion.from_config(config, text_encoder), vae_from_config(latent['vae']),
                   **{name: latent.get(name) for name in SETTINGS})

    @classmethod
    def from_checkpoint(cls, path: str | Path, text_encoder: str | None = None) -> 'LatentDiffusion':
        """The trained model from a checkpoint file, or from the newest one of a results folder."""
        return cls.from_state(checkpoint.load_run(path), text_encoder)

    @classmethod
    def from_state(cls, state: dict, text_encoder: str | None = None) -> 'LatentDiffusion':
        """The trained model, with its averaged weights, from what a Trainer saved; `text_encoder` names a frozen one."""
        checkpoint.expect('LatentDiffusion', state)
        return checkpoint.rebuild(lambda config: cls.from_config(config, text_encoder), state)


def diffusion_from_state(state: dict, text_encoder: str | None = None) -> GaussianDiffusion | LatentDiffusion:
    """Whatever diffusion model a Trainer saved, with its averaged weights."""
    return (LatentDiffusion if 'latent' in state['config'] else GaussianDiffusion).from_state(state, text_encoder)


def diffusion_from_checkpoint(path: str | Path, text_encoder: str | None = None) -> GaussianDiffusion | LatentDiffusion:
    """The same from a checkpoint file, or from the newest one of a results folder."""
    return diffusion_from_state(checkpoint.load_run(path), text_encoder)

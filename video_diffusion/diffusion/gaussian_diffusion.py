"""GaussianDiffusion: learn to take noise away from videos, then start from noise alone.

Training (Ho et al. 2020, arXiv 2006.11239, algorithm 1): draw a step t, mix the video with noise as the
schedule says, ask the network what was mixed in, and penalise the difference. Sampling goes the other way,
from pure noise down the steps; see samplers.py.

    >>> diffusion = GaussianDiffusion(Unet3D(dim=64), image_size=32, num_frames=5)
    >>> loss = diffusion(torch.rand(4, 3, 5, 32, 32))               # videos in [0, 1], b c f h w
    >>> loss.backward()
    >>> videos = diffusion.sample(batch_size=4, sampler='ddim', steps=50)     # in [0, 1] again

Users hand in and get back [0, 1]; the network sees [-1, 1]. `to_network` and `to_user` are the only places
where one becomes the other. With `latents=True` the "videos" are a VAE's latents (see latent.py), which have
no bounds: they pass as they are, and nothing is clipped.
"""

from pathlib import Path
from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..checks import floats_in_0_1, instance, number, one_of, video_shape, whole
from ..networks import network_config, network_from_config, same_network
from ..networks.text import named_bert, text_encoder_from_config
from . import frame_levels, guidance, known_frames, long_videos, samplers
from .ddpm_terms import DDPMTerms
from .guidance import Cond
from .noise_schedule import build_schedule
from .objective import LOSSES, check_loss, check_objective, check_parts, min_snr_weight, target, to_x0
from .sampling import Sampling, draw


class GaussianDiffusion(DDPMTerms, nn.Module):
    def __init__(
        self,
        denoise_fn: nn.Module,                    # the network: Unet3D, or anything that is called like it
        *,
        image_size: int | tuple[int, int],        # (height, width), or one number for both
        num_frames: int,
        text_use_bert_cls: bool = False,          # embed strings by BERT's CLS token, not the mean of the tokens
        channels: int = 3, timesteps: int = 1000,
        loss_type: str = 'l1',                    # 'l1' or 'l2'
        use_dynamic_thres: bool = False,          # clip x0 at a percentile (Imagen, arXiv 2205.11487, section 2.3)
        dynamic_thres_percentile: float = 0.9,
        schedule_shift: float = 1.,               # above 1: more of the steps are noisy ones; see noise_schedule.py
        objective: str = 'noise',                 # what the network predicts: 'noise', 'v' or 'x0'
        text_encoder: nn.Module | None = None,    # turns a list of strings into cond; see text.py
        schedule: str = 'cosine',                 # 'cosine', 'linear' or 'scaled_linear': see noise_schedule.py
        zero_snr: bool = False,                   # stretch the schedule so that its last step is pure noise
        min_snr_gamma: float | None = None,       # weigh the steps by min(snr, gamma); 5 is usual, None weighs all alike
        min_snr_power: float = 1.,                # that to this power: see objective.py
        offset_noise: float = 0.,                 # how much of the training noise is one value per clip and channel
        prob_cond_frames: float = 0.,             # share of clips trained with known frames; see known_frames.py
        latents: bool = False,                    # videos are latents: centred on 0 and unbounded, not in [0, 1]
        frame_noise: str = 'shared',              # 'independent': each frame has a noise of its own; see frame_levels.py
    ):
        instance('denoise_fn', denoise_fn, nn.Module)
        whole('num_frames', num_frames, 1)
        whole('channels', channels, 1)
        number('dynamic_thres_percentile', dynamic_thres_percentile, 0, 1)
        number('prob_cond_frames', prob_cond_frames, 0, 1)
        number('offset_noise', offset_noise, 0)
        one_of('frame_noise', frame_noise, ('shared', 'independent'))
        check_parts(denoise_fn, text_encoder, text_use_bert_cls, prob_cond_frames, frame_noise)
        if latents and use_dynamic_thres:
            raise ValueError('use_dynamic_thres=True clips pixels, but with latents=True there are none: leave it out')
        super().__init__()
        self.denoise_fn, self.text_encoder = denoise_fn, text_encoder
        self.bert, self.bert_name = None, 'bert-base-cased'
        self.image_size = image_size if isinstance(image_size, int) else tuple(image_size)
        self.height, self.width = (image_size, image_size) if isinstance(image_size, int) else image_size
        whole('image_size', min(self.height, self.width), 1)
        self.num_frames, self.channels, self.num_timesteps = num_frames, channels, timesteps
        self.loss_type, self.objective, self.latents, self.frame_noise = loss_type, objective, latents, frame_noise
        self.schedule, self.schedule_shift, self.zero_snr = schedule, schedule_shift, zero_snr
        self.use_dynamic_thres, self.dynamic_thres_percentile = use_dynamic_thres, dynamic_thres_percentile
        self.text_use_bert_cls, self.offset_noise, self.prob_cond_frames = text_use_bert_cls, offset_noise, prob_cond_frames
        self.min_snr_gamma, self.min_snr_power = min_snr_gamma, min_snr_power
        # Samplers take their numbers from the float64 table; training, where every sample has its own t, from these two, each
        # rounded to float32 only once, so that sigma is right even where alpha is nearly 1.
        self.alpha_bar = build_schedule(schedule, timesteps, schedule_shift, zero_snr)  # stays on the CPU
        check_objective(objective, loss_type, self.alpha_bar, min_snr_gamma, min_snr_power, latents)
        self.register_buffer('alpha', self.alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer('sigma', (1 - self.alpha_bar).sqrt().float(), persistent=False)
        if min_snr_gamma is not None:
            weight = min_snr_weight(objective, self.alpha_bar, min_snr_gamma, min_snr_power)
            self.register_buffer('loss_weight', weight.float(), persistent=False)

    # Training

    def forward(
        self,
        video: Tensor,                                # (b c f h w) in [0, 1]
        cond: Cond = None,                            # (b cond_dim), or a caption for each video
        noise: Tensor | None = None,                  # from draw_noise; None draws it here
        t: Tensor | None = None,                      # from draw_steps, (b) or (b f), likewise
        *,
        known_mask: Tensor | None = None,             # (b f) bool, which frames the network is told; None draws it
        known: Tensor | None = None,                  # (b c f h w), what it is told of them; None: what they are
        own_steps: list[int | None] | None = None,    # of each video, whence it draws what it is told; None: it is told the truth
        reduction: str = 'mean',
        **network,                                    # null_cond_prob, null_cond_mask, ...: see Unet3D.forward
    ) -> Tensor:
        """The loss: a scalar, or with reduction='none' one for each video (b)."""
        self.check(video)
        if not self.prob_cond_frames and (known is not None or known_mask is not None):
            raise ValueError(f'{"known_mask" if known is None else "known"} was given, but the network is never told frames: '
                             'prob_cond_frames is 0')
        x0 = self.to_network(video)
        if t is None:
            drawn = self.draw_steps(torch.randint(0, self.num_timesteps, (len(x0),)))
            t, own_steps = drawn['t'].to(x0.device, non_blocking=True), drawn.get('own_steps')
        told = {}
        if self.prob_cond_frames:
            known_mask = self.draw_known(len(x0), x0.device) if known_mask is None else known_mask
            told = dict(known=x0 if known is None else self.to_network(known), known_mask=known_mask)
        return self.p_losses(x0, t, cond, noise, reduction=reduction, own_steps=own_steps, **network, **told)

    def p_losses(self, x_start: Tensor, t: Tensor, cond: Cond = None, noise: Tensor | None = None, *, reduction: str = 'mean',
                 own_steps: list[int | None] | None = None, **network) -> Tensor:
        """The loss of x_start (b c f h w) in [-1, 1] at steps t, (b) or (b f); `network` are further arguments of the network."""
        check_loss(x_start, noise, reduction, network.get('null_cond_prob'))
        noise = self.draw_noise(x_start.shape, x_start.device) if noise is None else noise
        cond = self.embed(cond)
        seen = x_start if own_steps is None else frame_levels.as_drawn(self, x_start, t, noise, cond, own_steps)
        output = self.denoise_fn(self.q_sample(seen, t, noise), t, cond=cond, **network)
        wanted = target(self.objective, x_start, noise, *self.alpha_sigma(t))
        loss = LOSSES[self.loss_type](output, wanted, reduction='none').mean(dim=(1, 3, 4))     # (b f)
        if self.min_snr_gamma is not None:
            loss = loss * self.loss_weight[t].view(len(t), -1)
        loss = loss.mean(dim=1)                                                                 # (b)
        return loss.mean() if reduction == 'mean' else loss

    def draw(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """All that is random in training on `count` videos but their steps, as arguments of forward: a row for each video."""
        draws = dict(noise=self.draw_noise((count, self.channels, self.num_frames, self.height, self.width), device, generator))
        if self.prob_cond_frames:
            draws['known_mask'] = self.draw_known(count, device, generator)
        return draws

    def draw_steps(self, t: Tensor, generator: torch.Generator | None = None, done: float = 1.) -> dict[str, Tensor | list]:
        """The steps of clips (b), on the CPU, as forward takes them when so much of the training is `done`: (b), or (b f)."""
        if self.frame_noise == 'shared':
            return dict(t=t)
        t = frame_levels.draw_levels(t, self.num_frames, self.num_timesteps, generator, frame_levels.told_share(done))
        return dict(t=t, own_steps=frame_levels.own_steps(t, self.num_timesteps, generator))

    def draw_noise(self, shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Noise (b c f h w) to train with. Plain noise hardly changes the mean of a clip, so the network learns to believe it,
        and samples come out neither dark nor bright; offset noise hides the mean of every channel, too."""
        noise = torch.randn(tuple(shape), device=device, generator=generator)
        if self.offset_noise:
            noise = noise + self.offset_noise * torch.randn((*shape[:2], 1, 1, 1), device=device, generator=generator)
        return noise

    def draw_known(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Which frames the network is told in training (b f). Latents of an end cannot be had without those before it."""
        end_too = 0. if self.latents else 0.5
        return frame_levels.draw_mask(count, self.num_frames, self.prob_cond_frames, device, generator, end_too)

    # Sampling

    @torch.inference_mode(False)                      # 'guide' needs gradients, which a caller's inference mode would forbid
    @torch.no_grad()
    def sample(
        self,
        cond: Cond = None,
        cond_scale: float = 1.,                       # guidance: 1 follows cond as trained, more exaggerates it
        batch_size: int = 16,                         # only where cond does not say
        *,
        seed: int | None = None, progress: samplers.Progress = True,
        noise: Tensor | None = None,                  # (b c f h w) to start from, as from ddim_invert; None draws it
        negative: Cond = None,                        # guide away from this (one, or one per video), not from no cond
        return_all: bool = False,
        first_frames: Tensor | None = None,           # (b c k h w): how the videos begin; one is enough for all. Or:
        known: Tensor | None = None,                  # (b c f h w): videos of which some frames are known,
        known_mask: Tensor | None = None,             # (f) or (b f) bool: and which
        **settings,                                   # sampler='ddim', steps=20, ...: the fields of Sampling, see sampling.py
    ) -> Tensor:
        """Videos (b c f h w) in [0, 1], drawn from noise; with `return_all` the whole way to them (steps + 1, b c f h w)."""
        settings = Sampling(cond_scale=cond_scale, **settings)
        known, known_mask = known_frames.given(first_frames, known, known_mask, self.num_frames)
        settings.check(self.num_timesteps, has_cond=cond is not None, negative=negative is not None, has_known=known is not None,
                       frame_noise=self.frame_noise)
        cond = self.embed(cond)
        generator = None if seed is None else torch.Generator(self.alpha.device).manual_seed(seed)
        batch_size = batch_size if cond is None else len(cond)
        whole('batch_size', batch_size, 1)
        if noise is None:
            shape = batch_size, self.channels, self.num_frames, self.height, self.width
            noise = torch.randn(shape, generator=generator, device=self.alpha.device)
        self.check(noise)
        if cond is not None and len(noise) != len(cond):
            raise ValueError(f'noise for {len(noise)} videos and cond for {len(cond)}: give as many of either')
        negative = guidance.for_batch(self.embed(negative), cond)
        if known is not None:
            self.check(known)
            known, known_mask = known_frames.for_batch(self.to_network(known).to(noise), known_mask, len(noise))
        way = [] if return_all else None
        x = draw(self, noise, settings, cond=cond, negative=negative, known=known, mask=known_mask, way=way, generator=generator,
                 progress=progress)
        return self.to_user(torch.stack([*way, x]) if return_all else x)

    sample_long = long_videos.sample_long             # window after window

    def whole_lengths(self) -> Sequence[int]:
        """How many first frames of a video may be known."""
        return range(1, self.num_frames)

    @torch.no_grad()
    def ddim_invert(self, video: Tensor, cond: Cond = None, *, steps: int | None = None, spacing: str = 'trailing',
                    progress: bool = True) -> Tensor:
        """The noise (b c f h w) that `sample(cond, noise=noise, sampler='ddim', steps=steps)` turns back into about this
        video: the more steps, the closer. Sample it with another cond to edit the video."""
        self.check(video)
        steps = samplers.spaced_steps(self.num_timesteps, steps, spacing)
        denoise = self.denoiser(self.embed(cond))
        return samplers.ddim_invert(denoise, self.to_network(video), self.alpha_bar, steps, progress=progress)

    @torch.no_grad()
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5,
                    *, cond: Cond = None, seed: int | None = None, progress: bool = True) -> Tensor:
        """A video between two: both noised up to step t, mixed as (1 - lam) x1 + lam x2, and denoised together."""
        t = self.num_timesteps - 1 if t is None else t
        if x1.shape != x2.shape:
            raise ValueError(f'videos to interpolate must have one shape: given {tuple(x1.shape)} and {tuple(x2.shape)}')
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f't={t}: give a step from 0 to {self.num_timesteps - 1}')
        self.check(x1)
        generator = None if seed is None else torch.Generator(x1.device).manual_seed(seed)
        times = torch.full((len(x1),), t, device=x1.device)
        x1, x2 = (self.q_sample(self.to_network(x), times, samplers.randn_like(x, generator)) for x in (x1, x2))
        x = samplers.ddpm(self.denoiser(self.embed(cond)), (1 - lam) * x1 + lam * x2, self.alpha_bar, list(range(t, -1, -1)),
                          generator=generator, progress=progress)
        return self.to_user(x)

    def denoiser(
        self, cond: Tensor | None = None, scale_at: Callable[[int], float] = lambda t: 1.,
        *, negative: Tensor | None = None, rescale: float = 0., known: tuple[Tensor, Tensor] | None = None,
    ) -> samplers.Denoiser:
        """The function samplers ask: noisy video at step t -> clean video. `scale_at`: the scale of the guidance there."""
        def denoise(x, t):
            row = isinstance(t, Tensor)                              # (f) or (b f) of a matrix of levels, where -1 is clean
            times = t.clamp(min=0).expand(len(x), -1).to(x.device) if row else torch.full((len(x),), t, device=x.device)
            scale = scale_at(t.max().item() if row else t)
            return self.predict_x0(x, times, cond, scale, negative=negative, rescale=rescale, known=known)
        return denoise

    def predict_x0(self, x: Tensor, t: Tensor, cond: Tensor | None = None, cond_scale: float = 1., clip_denoised: bool = True,
                   *, negative: Tensor | None = None, rescale: float = 0., known: tuple[Tensor, Tensor] | None = None) -> Tensor:
        output = guidance.predict(self.denoise_fn, x, t, cond, cond_scale, negative, rescale, known)
        x0 = to_x0(self.objective, output, x, *self.alpha_sigma(t))
        if not clip_denoised or self.latents:
            return x0
        return guidance.clip(x0, self.dynamic_thres_percentile if self.use_dynamic_thres else None)

    # Building it again from a checkpoint

    def config(self) -> dict:
        """Everything needed to build this object again, in types that a checkpoint may hold."""
        own = ('image_size', 'num_frames', 'text_use_bert_cls', 'channels', 'num_timesteps', 'loss_type',
               'use_dynamic_thres', 'dynamic_thres_percentile', 'schedule_shift', 'objective', 'frame_noise',
               'schedule', 'zero_snr', 'min_snr_gamma', 'min_snr_power', 'offset_noise', 'prob_cond_frames', 'latents')
        return {
            'diffusion': {name: getattr(self, name) for name in own},
            **network_config(self.denoise_fn),
            'text_encoder': self.text_encoder.config() if self.text_encoder is not None else None,
        }

    @classmethod
    def from_config(cls, config: dict, text_encoder: str | None = None) -> 'GaussianDiffusion':
        if 'lora' in config:
            raise ValueError('the checkpoint holds adapters and not the model that they were trained beside: build that, and give '
                             'them to it with load_lora')
        own = dict(config['diffusion'])
        encoder = config['text_encoder']
        model = cls(network_from_config(config), timesteps=own.pop('num_timesteps'), **own,
                    text_encoder=text_encoder_from_config(encoder, text_encoder) if encoder else None)
        model.bert_name = text_encoder                # a file does not choose what is fetched
        return model

    @classmethod
    def from_state(cls, state: dict, text_encoder: str | None = None) -> 'GaussianDiffusion':
        """The trained model, with its averaged weights, from what a Trainer saved; `text_encoder` names a frozen one."""
        checkpoint.expect('GaussianDiffusion', state)
        return checkpoint.rebuild(lambda config: cls.from_config(config, text_encoder), state)

    @classmethod
    def from_checkpoint(cls, path: str | Path, text_encoder: str | None = None) -> 'GaussianDiffusion':
        """The same from a checkpoint file, or from the newest one of a results folder."""
        return cls.from_state(checkpoint.load_run(path), text_encoder)

    def has_config(self, config: dict) -> bool:
        """Whether a checkpoint was made with our settings. Those that it is too old to know had their defaults."""
        mine = self.config()
        return (mine['text_encoder'] == config['text_encoder'] and same_network(mine, config)
                and checkpoint.same_settings(mine['diffusion'], config['diffusion'], GaussianDiffusion))

    # Helpers

    def embed(self, cond: Cond) -> Tensor | None:
        """Captions to vectors (b cond_dim), or (b n cond_dim) for a network that looks at the words. A tensor or None passes."""
        if cond is None or isinstance(cond, Tensor):
            return cond
        captions = [cond] if isinstance(cond, str) else list(cond)
        encoder = self.bert if self.text_encoder is None else self.text_encoder
        if encoder is None and not getattr(self.denoise_fn, 'use_bert_text_cond', False):
            raise ValueError('cond is text, but this GaussianDiffusion has no text_encoder: give it one, as in '
                             'GaussianDiffusion(..., text_encoder=WordEncoder()), or pass a tensor')
        if encoder is None:  # made when the first caption comes: who conditions on tensors never needs it
            encoder = self.bert = named_bert(self.bert_name, 'cls' if self.text_use_bert_cls else 'mean').to(self.alpha.device)
        return encoder.tokens(captions) if getattr(self.denoise_fn, 'text_tokens', False) else encoder(captions)

    def to_network(self, video: Tensor) -> Tensor:
        """[0, 1] -> [-1, 1]"""
        return video if self.latents else floats_in_0_1(video) * 2 - 1

    def to_user(self, x: Tensor) -> Tensor:
        """[-1, 1] -> [0, 1]"""
        return x if self.latents else ((x + 1) / 2).clamp(0, 1)

    def check(self, video: Tensor) -> None:
        video_shape(video, self.channels, self.num_frames, self.height, self.width)

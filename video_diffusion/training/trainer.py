"""Trainer: trains a diffusion model on a folder of clips; the loop around its step is `loop.py`.

    >>> trainer = Trainer(diffusion, 'my_gifs', train_batch_size=8, train_num_steps=10_000)
    >>> trainer.load(-1)      # to go on where an earlier run stopped
    >>> trainer.train()

In `results_folder`: `model-<milestone>.pt`, a tiled `<milestone>.gif` of samples with its `prompts.txt`, and
`log.csv`.
"""

import copy
import math
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checks import instance, number, whole
from ..data.dataset import GifDataset, seeded_generator
from ..data.folder import CLIPS, IMAGES, ClipFolder, write_clip
from ..diffusion import frame_levels
from ..diffusion.gaussian_diffusion import GaussianDiffusion
from ..diffusion.latent import LatentDiffusion
from ..diffusion.latent_cache import LatentCache
from ..diffusion.samplers import Progress
from ..diffusion.sampling import Sampling
from ..distributed import Processes, best_device
from ..networks.dit import DiT
from ..networks.text import CaptionCache, caption_folder
from . import lr_schedule
from .alike import settings_of
from .ema import EMA
from .held_out import COLUMNS as held_out_columns
from .held_out import loss_per_level
from .loop import TrainingLoop
from .lora_run import Learnt, check_lora, lora_config
from .memory import keep_freed_memory
from .muon import muon_or_adam
from .shard import shard_weights


class Trainer(TrainingLoop):
    def __init__(
        self,
        diffusion: GaussianDiffusion,
        folder: str | Path | ClipFolder,
        *,
        ema_decay: float = 0.995, step_start_ema: int = 2000, update_ema_every: int = 10,  # before step_start_ema it only follows
        ema_warmup: bool = False,                # see ema.py
        train_batch_size: int = 32,              # clips in one forward pass of one process
        gradient_accumulate_every: int = 2,      # forward passes in one step
        train_lr: float = 1e-4, train_num_steps: int = 100000,
        lr_schedule: lr_schedule.Schedule = lr_schedule.constant(), max_grad_norm: float | None = None,
        amp: bool = False,                       # bf16 or fp16 where the hardware has it
        save_and_sample_every: int = 1000, results_folder: str | Path = './results', log_every: int = 10,
        num_sample_rows: int = 4,                # samples per milestone: the square of this; how they are drawn: see Sampling
        cond_scale: float = 1., sampler: str = 'ddpm', sample_steps: int | None = None,
        num_frames: int | None = None,           # of no effect, and not needed: clips have as many as the diffusion draws
        null_cond_prob: float = 0.1,             # drop captions this often, so that guidance has its null
        noise_bias: float = 1.,                  # above 1: more of the noisy steps, see `draw`
        horizontal_flip: bool = False, random_window: bool = False,  # the window is one of clips longer than num_frames
        fps: float | None = None, clips_per_video: int = 1,  # see GifDataset
        strict: bool = False,                    # a damaged clip is an error, not a warning
        held_out: int = 0,                       # clips to measure on and never train on: see held_out.py
        images: bool = False,                    # train on the png and jpg files of the folder too, as frames without motion
        latent_cache: str | Path | None = None,  # encode each clip once, into this folder: see latent_cache.py
        caption_cache: str | Path | None = None,  # and each caption, after which a frozen text encoder leaves the memory
        adam_betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.,
        muon_lr: float | None = None,            # train matrices by Muon, at this rate, and only the rest by Adam: see muon.py
        compile: bool = False,                   # let torch.compile fuse the network: slow first steps, fast later ones
        shard: bool = False,                     # each process keeps a share of the weights, not all of them: see shard.py
        seed: int = 0, processes: Processes | None = None,  # from distributed.init(); None: this one alone
    ):
        check_options(diffusion, num_frames, num_sample_rows, noise_bias, null_cond_prob, images, latent_cache, compile, shard)
        self.diffusion, self.use_captions = diffusion, getattr(diffusion.denoise_fn, 'has_cond', False)
        self.sampling = Sampling(sampler, sample_steps, cond_scale)
        self.sampling.check(diffusion.num_timesteps, has_cond=self.use_captions)
        given, processes = locals(), processes or Processes(device=best_device())
        shard = shard and processes.world_size > 1           # the share of one that is alone is all
        begin(diffusion, processes, shard, given)
        self.clips = GifDataset(folder, (diffusion.height, diffusion.width), diffusion.channels, diffusion.num_frames,
                                horizontal_flip=horizontal_flip, random_window=random_window, seed=seed, strict=strict,
                                fps=fps, clips_per_video=clips_per_video, exts=CLIPS + IMAGES if images else CLIPS)
        if processes.is_main:
            self.clips.warn_of_short_clips()
        cached = lambda clips: LatentCache(clips, diffusion, latent_cache, processes) if latent_cache else clips
        self.held_out = cached(self.clips.hold_out(held_out)) if held_out else ()
        self.measures = held_out_columns if held_out else ()
        super().__init__(
            diffusion, cached(self.clips), optimizer=muon_or_adam(diffusion, train_lr, muon_lr, adam_betas, weight_decay),
            ema=EMA(diffusion, ema_decay, warmup=ema_warmup), batch_size=train_batch_size,
            accumulate=gradient_accumulate_every, num_steps=train_num_steps, lr=train_lr, lr_schedule=lr_schedule,
            max_grad_norm=max_grad_norm, amp=amp, step_start_ema=step_start_ema, update_ema_every=update_ema_every,
            save_and_sample_every=save_and_sample_every, log_every=log_every, results_folder=results_folder, seed=seed,
            processes=processes)
        self.null_cond_prob, self.noise_bias, self.images = null_cond_prob, noise_bias, images
        self.num_samples = num_sample_rows ** 2
        self.prepare_captions(folder, caption_cache)
        self.prepare_model(compile, several=processes.world_size > 1 and not shard)

    def prepare_model(self, compile: bool, several: bool) -> None:
        given = (name for name in ('low_res', 'image_scale') if getattr(self.diffusion, name, None) is not None)
        self.asks_for = next(given, None)            # what samples need beside a caption
        if compile:
            fuse(self.diffusion.denoise_fn)
        self.model = DistributedDataParallel(self.diffusion, broadcast_buffers=False) if several else self.diffusion
        self.lora = lora_config(self.diffusion)
        if self.lora:
            self.parts['model'] = Learnt(self.diffusion)     # checkpoints leave out what is frozen

    def prepare_captions(self, folder: str | Path, cache: str | Path | None) -> None:
        captions, encoder = self.dataset.captions, self.diffusion.text_encoder
        if self.use_captions and captions is None:
            raise ValueError(f'the model is conditional, but the clips in {folder} have no captions: put a clip.txt '
                             'beside each clip.gif, or build the model without cond_dim')
        if self.processes.is_main:
            held_out = f', and {len(self.held_out)} held out' if self.held_out else ''
            print(f'{len(self.dataset)} clips in {folder}{", with captions" if captions else ""}{held_out}')
        if cache is not None and not (self.use_captions and hasattr(encoder, 'unload')):
            raise ValueError('caption_cache is for what a BertEncoder or T5Encoder says, and this model has none: leave it out')
        learns = encoder is not None and any(p.requires_grad for p in encoder.parameters())
        # Frames and the beginning of a caption go together; a frozen encoder is asked for each caption once, and as a whole.
        self.cuts_captions = self.use_captions and learns and self.diffusion.frame_noise == 'independent'
        self.cache = None if learns else CaptionCache(self.diffusion.embed, folder=cache and caption_folder(encoder, cache))
        if cache is not None:
            self.cache.fill(set().union(*(own.texts() for own in (self.dataset, self.clips, self.held_out) if own)), self.processes)
            encoder.unload()

    def told(self, captions: list[str] | None) -> Tensor | list[str] | None:
        """Captions as the diffusion takes them: what a frozen encoder says of each, asked for once."""
        if not self.use_captions or self.cache is None:
            return captions if self.use_captions else None
        return self.cache(captions).to(self.device, non_blocking=True)

    # The names that scripts written for video-diffusion-pytorch type

    opt = property(lambda self: self.optimizer)
    ds = property(lambda self: self.clips)
    dl = property(lambda self: self.batches())

    @property
    def ema_model(self) -> GaussianDiffusion:
        """A copy of the model that holds the averaged weights."""
        with self.ema.average_parameters():
            return copy.deepcopy(self.diffusion)

    def train(
        self,
        prob_focus_present: float = 0.,             # train this share of the samples as unrelated images
        focus_present_mask: Tensor | None = None,   # (batch) bool: always these
        log_fn: Callable[[dict], object] = lambda log: None,
    ) -> None:
        """Train until step `train_num_steps`, or until SIGINT, SIGTERM or SIGHUP; save in either case."""
        number('prob_focus_present', prob_focus_present, 0, 1)
        if prob_focus_present or focus_present_mask is not None:
            refuse_single_frames(self.diffusion.denoise_fn)
        self.prob_focus_present = prob_focus_present
        self.focus_present_mask = None if focus_present_mask is None else focus_present_mask.to(self.device)
        if hasattr(self.diffusion, 'measure_scale'):  # of latents; the same clips, and so the same scale, in every process
            self.diffusion.measure_scale(self.dataset)
        super().train(log_fn)

    def learn(self, batch, number: int, is_last: bool) -> Tensor:
        videos, captions = batch if self.dataset.captions else (batch, None)
        draws = self.draw(number, len(videos), self.prob_focus_present)
        videos = self.dataset.floats(videos.to(self.device, non_blocking=True))
        if self.images and self.prob_focus_present < 1:
            # The dataset repeats an image until it is a clip. Unless every frame of it is looked at alone, the network learns
            # from it that nothing moves (joint training on images and videos, arXiv 2204.03458, section 3).
            still = (videos == videos[:, :, :1]).flatten(1).all(dim=1)
            draws['focus_present_mask'] = still | draws.get('focus_present_mask', still)
        if self.focus_present_mask is not None:
            draws['focus_present_mask'] = self.focus_present_mask
        if self.cuts_captions:
            captions = frame_levels.shortened(captions, draws['t'], draws.pop('heard'))
        draws['t'] = draws['t'].to(self.device, non_blocking=True)
        cond = self.told(captions)
        # Processes average their gradients once per step, in the last backward pass; sharded ones, which have no room for
        # whole gradients to add up, in every one.
        with nullcontext() if is_last or self.model is self.diffusion else self.model.no_sync():
            with self.autocast():
                loss = self.model(videos, cond, **draws)
            self.backward(loss)
        return loss.detach()

    def draw(self, number: int, size: int, prob_focus_present: float) -> dict[str, Tensor | float | list]:
        """All that is random about batch `number` of `size` clips: drawn for the batches of all processes, cut to our rows."""
        clips = size * self.processes.world_size
        rows = slice(self.processes.rank * size, (self.processes.rank + 1) * size)
        # Steps are drawn on the CPU: which captions are cut short depends on them, and no GPU is to be waited for.
        generator = seeded_generator(self.seed, 'noise', number)
        # Steps spread evenly over the clips, from a random start: the loss depends on t more than on anything
        # else, and so varies less from batch to batch (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
        t = (torch.rand(1, generator=generator) + torch.arange(clips) / clips) % 1
        # How a clip moves, and all else that its caption says, is decided while there is hardly more than noise: from a
        # tenth of the signal on, the frames themselves show it. Uniform steps are too seldom so noisy for a network to
        # learn to listen, so t is drawn with density p t^(p-1) where the bias is p.
        t = (t ** (1 / self.noise_bias) * self.diffusion.num_timesteps).long().clamp(max=self.diffusion.num_timesteps - 1)
        done = number / (self.train_num_steps * self.accumulate) if self.use_captions else 1.
        draws = {name: drawn[rows] for name, drawn in self.diffusion.draw_steps(t, generator, done).items()}
        if self.device.type != 'cpu':
            generator = seeded_generator(self.seed, 'noise', number, device=self.device)
        where = dict(device=self.device, generator=generator)
        draws |= {name: drawn[rows] for name, drawn in self.diffusion.draw(clips, **where).items()}
        if self.use_captions:
            null_share = frame_levels.null_share(draws['t'], self.null_cond_prob, self.cuts_captions)
            draws['null_cond_mask'] = torch.rand(clips, **where)[rows] < null_share.to(self.device, non_blocking=True)
        if self.cuts_captions:
            draws['heard'] = torch.rand(clips, generator=seeded_generator(self.seed, 'words', number))[rows]
        if 0 < prob_focus_present < 1:
            draws['focus_present_mask'] = (torch.rand(clips, **where) < prob_focus_present)[rows]
        else:
            draws['prob_focus_present'] = prob_focus_present
        return draws

    # Samples

    def sample(self) -> None:
        """Samples of the averaged model as one tiled GIF."""
        prompts = self.sample_prompts()
        with self.ema.average_parameters():
            videos = sample_many(self.diffusion, self.told(prompts), self.num_samples, batch_size=self.batch_size, seed=self.seed,
                                 processes=self.processes, progress=self.until_stopped, **self.given_clips(),
                                 **self.sampling.changed())
        if self.processes.is_main:
            write_clip(videos, self.picture(), self.clips.fps, scale=None)
            if prompts:
                (self.results_folder / 'prompts.txt').write_text('\n'.join(prompts) + '\n', encoding='utf-8')

    def sample_prompts(self) -> list[str] | None:
        """Captions from all over the folder; the same ones at every milestone."""
        if not self.use_captions:
            return None
        captions = self.clips.captions if self.asks_for else sorted(set(self.dataset.captions))
        return [captions[i * len(captions) // self.num_samples] for i in range(self.num_samples)]

    def given_clips(self) -> dict[str, Tensor]:
        """Clips from all over the folder (count c f h w): small, for a model that enlarges, or what begins a video."""
        if not self.asks_for:
            return {}
        clips = [self.clips.clip(i * len(self.clips) // self.num_samples) for i in range(self.num_samples)]
        clips = self.clips.floats(torch.stack(clips))
        return {'low_res': self.diffusion.shrink(clips)} if self.asks_for == 'low_res' else {'first_frames': clips[:, :, :1]}

    def measure(self) -> dict[str, float]:
        """The loss of the averaged model on the clips that were held out, per noise level."""
        if not self.held_out:
            return {}
        with self.ema.average_parameters(), self.autocast():
            return loss_per_level(self.diffusion, self.held_out, self.told, self.seed, self.processes)

    def config(self) -> dict:
        more = {'lora': self.lora, 'held_out': len(self.held_out)}
        return {**self.diffusion.config(), **{name: value for name, value in more.items() if value}}

    def has_config(self, config: dict) -> bool:
        check_lora(self.lora, config.get('lora'))
        if config.get('held_out', 0) != len(self.held_out):
            raise ValueError(f'the checkpoint held {config.get("held_out", 0)} clips out, this run {len(self.held_out)}: give the '
                             'same number, or it would be measured on clips that it was trained on')
        return self.diffusion.has_config(config)

    def state_dict(self) -> dict:
        return {**super().state_dict(), 'sampling': self.sampling.changed()}  # how sample.py draws unless it is told otherwise


def fuse(network: nn.Module) -> None:
    """torch.compile in place: the weights keep their names. einops' patterns are taken as they are; to look into each, which
    changes nothing, would take as long as all the rest."""
    for function in (rearrange, reduce, repeat):
        torch.compiler.allow_in_graph(function)
    network.compile()


def check_options(
    diffusion: GaussianDiffusion, num_frames: int | None, num_sample_rows: int, noise_bias: float, null_cond_prob: float,
    images: bool, latent_cache: str | Path | None, compile: bool, shard: bool,
) -> None:
    instance('diffusion', diffusion, GaussianDiffusion, LatentDiffusion)
    if isinstance(diffusion, GaussianDiffusion) and diffusion.latents:
        raise ValueError('this GaussianDiffusion is one of latents (latents=True), and a folder holds pixels: give the '
                         'LatentDiffusion around it')
    if num_frames not in (None, diffusion.num_frames):
        warnings.warn(f'num_frames={num_frames} has no effect: the diffusion was built for {diffusion.num_frames} frames',
                      stacklevel=3)
    whole('num_sample_rows', num_sample_rows, 1)
    number('noise_bias', noise_bias, above=0)
    number('null_cond_prob', null_cond_prob, 0, 1)
    if images:
        refuse_single_frames(diffusion.denoise_fn)
    if images and latent_cache is not None:
        raise ValueError('images=True tells images from clips by their pixels, which latent_cache keeps away: leave out one')
    if shard and compile:
        raise ValueError('shard=True borrows weights in the middle of what compile=True would fuse: leave out one')


def refuse_single_frames(network: torch.nn.Module) -> None:
    if isinstance(network, DiT):
        raise ValueError('images=True and prob_focus_present train on frames one by one, and a DiT has no attention within single '
                         'frames: leave them out, or take a Unet3D')


def begin(diffusion: GaussianDiffusion, processes: Processes, shard: bool, given: dict) -> None:
    """The model on its device, the same in all processes before anything is copied from it, and trained by the same settings."""
    processes.agree(settings_of(given, diffusion.config()))
    if shard:
        shard_weights(diffusion, processes)
    diffusion.to(processes.device)
    if not shard:
        processes.begin_alike(diffusion)
    if processes.device.type == 'cpu':
        keep_freed_memory()


def sample_many(
    diffusion: GaussianDiffusion, prompts: Tensor | list[str] | None, count: int, *, batch_size: int, seed: int,
    processes: Processes, num_frames: int | None = None, low_res: Tensor | None = None, first_frames: Tensor | None = None,
    progress: Progress | None = None, **sampling,
) -> Tensor | None:
    """`count` videos (count c f h w) on the CPU, in batches that the processes share out; None but in the main one."""
    whole('batch_size', batch_size, 1)
    whole('count', count, 1)
    draw = diffusion.sample if num_frames is None else partial(diffusion.sample_long, num_frames)
    batches = math.ceil(count / batch_size)
    parts = {}  # number of a batch -> videos. Its number goes into its seed, so that who draws it does not matter.
    for turn in range(math.ceil(batches / processes.world_size)):
        # Who has none left draws one again: were it only to wait, the others would wait for its share of sharded weights.
        number = (turn * processes.world_size + processes.rank) % batches
        rows = slice(number * batch_size, min(count, (number + 1) * batch_size))
        for name, clips in (('low_res', low_res), ('first_frames', first_frames)):      # one for all, or one for each
            if clips is not None:
                sampling[name] = clips.expand(count, -1, -1, -1, -1)[rows]
        parts[number] = draw(
            None if prompts is None else prompts[rows], batch_size=rows.stop - rows.start, seed=seed + number,
            progress=processes.is_main if progress is None else progress, **sampling).cpu()
    parts = processes.gather(parts)
    return torch.cat([parts[number] for number in sorted(parts)]) if processes.is_main else None

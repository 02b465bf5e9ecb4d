"""Trainer: trains a diffusion model on a folder of clips; the loop around its step is `loop.py`.

    >>> trainer = Trainer(diffusion, 'my_gifs', train_batch_size=8, train_num_steps=10_000)
    >>> trainer.load(-1)      # to go on where an earlier run stopped
    >>> trainer.train()

In `results_folder`: `model-<milestone>.pt`, a tiled `<milestone>.gif` of samples with its `prompts.txt`, and
`log.csv`.
"""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..data.dataset import GifDataset, seeded_generator
from ..data.folder import CLIPS, IMAGES
from ..data.gif import video_tensor_to_gif
from ..diffusion.gaussian_diffusion import GaussianDiffusion
from ..diffusion.latent_cache import LatentCache
from ..distributed import Processes, best_device
from ..networks.text import CaptionCache
from . import lr_schedule
from .ema import EMA
from .loop import TrainingLoop
from .shard import shard_weights


class Trainer(TrainingLoop):
    def __init__(
        self,
        diffusion: GaussianDiffusion,
        folder: str | Path,
        *,
        ema_decay: float = 0.995,
        train_batch_size: int = 32,              # clips in one forward pass of one process
        train_lr: float = 1e-4,
        train_num_steps: int = 100000,
        gradient_accumulate_every: int = 2,      # forward passes in one step
        amp: bool = False,                       # bf16 or fp16 where the hardware has it
        step_start_ema: int = 2000,              # before this step the average just follows the weights
        update_ema_every: int = 10,
        save_and_sample_every: int = 1000,
        results_folder: str | Path = './results',
        num_sample_rows: int = 4,                # samples per milestone: the square of this
        max_grad_norm: float | None = None,
        num_frames: int | None = None,           # if given, must be the diffusion's own
        lr_schedule: lr_schedule.Schedule = lr_schedule.constant(),
        ema_warmup: bool = False,                # see ema.py
        null_cond_prob: float = 0.1,             # drop captions this often, so that guidance has its null
        noise_bias: float = 1.,                  # above 1: more of the noisy steps, see `draw`
        horizontal_flip: bool = False,
        random_window: bool = False,             # of clips longer than num_frames
        cond_scale: float = 1.,                  # the next three say how to sample at milestones
        sampler: str = 'ddpm',
        sample_steps: int | None = None,
        log_every: int = 10,                     # look at the loss: on a GPU, the only time a step waits for it
        seed: int = 0,
        strict: bool = False,                    # a damaged clip is an error, not a warning
        images: bool = False,                    # train on the png and jpg files of the folder too, as frames without motion
        latent_cache: str | Path | None = None,  # encode each clip once, into this folder: see latent_cache.py
        compile: bool = False,                   # let torch.compile fuse the network: slow first steps, fast later ones
        shard: bool = False,                     # each process keeps a share of the weights, not all of them: see shard.py
        processes: Processes | None = None,      # from distributed.init(); None: this one alone
    ):
        if num_frames not in (None, diffusion.num_frames):
            raise ValueError(f'num_frames={num_frames}: the diffusion was built for {diffusion.num_frames} frames')
        if images and latent_cache is not None:
            raise ValueError('images=True tells images from clips by their pixels, which latent_cache keeps away: leave out one')
        if shard and compile:
            raise ValueError('shard=True borrows weights in the middle of what compile=True would fuse: leave out one')
        processes = processes or Processes(device=best_device())
        shard = shard and processes.world_size > 1           # the share of one that is alone is all
        if shard:
            shard_weights(diffusion, processes)
        diffusion.to(processes.device)
        dataset = GifDataset(folder, (diffusion.height, diffusion.width), diffusion.channels, diffusion.num_frames,
                             horizontal_flip=horizontal_flip, random_window=random_window, seed=seed, strict=strict,
                             exts=CLIPS + IMAGES if images else CLIPS)
        self.clips = dataset
        if latent_cache is not None:
            dataset = LatentCache(dataset, diffusion, latent_cache, processes)
        weights = [p for p in diffusion.parameters() if p.requires_grad]
        super().__init__(
            diffusion, dataset,
            optimizer=torch.optim.Adam(weights, lr=train_lr, fused=processes.device.type in ('cpu', 'cuda')),
            ema=EMA(diffusion, ema_decay, warmup=ema_warmup), batch_size=train_batch_size,
            accumulate=gradient_accumulate_every, num_steps=train_num_steps, lr=train_lr, lr_schedule=lr_schedule,
            max_grad_norm=max_grad_norm, amp=amp, step_start_ema=step_start_ema, update_ema_every=update_ema_every,
            save_and_sample_every=save_and_sample_every, log_every=log_every, results_folder=results_folder, seed=seed,
            processes=processes)
        if num_sample_rows < 1:
            raise ValueError(f'num_sample_rows={num_sample_rows}: give 1 or more')
        if noise_bias <= 0:
            raise ValueError(f'noise_bias={noise_bias}: give a number above 0')
        self.diffusion = diffusion
        self.null_cond_prob, self.noise_bias = null_cond_prob, noise_bias
        self.images = images
        self.num_samples = num_sample_rows ** 2
        self.sampling = dict(cond_scale=cond_scale, sampler=sampler, steps=sample_steps)
        self.use_captions = getattr(diffusion.denoise_fn, 'has_cond', False)
        self.enlarges = getattr(diffusion, 'low_res', None) is not None
        if self.use_captions and dataset.captions is None:
            raise ValueError(f'the model is conditional, but the clips in {folder} have no captions: put a clip.txt '
                             'beside each clip.gif, or build the model without cond_dim')
        if processes.is_main:
            print(f'{len(dataset)} clips in {folder}' + (', with captions' if dataset.captions else ''))
        encoder = diffusion.text_encoder
        learns = encoder is not None and any(p.requires_grad for p in encoder.parameters())
        self.cache = None if learns else CaptionCache(diffusion.embed)      # each caption goes through a frozen encoder once
        if compile:
            diffusion.denoise_fn.compile()       # in place: the weights keep their names
        self.model = diffusion
        if processes.world_size > 1 and not shard:
            self.model = DistributedDataParallel(diffusion, broadcast_buffers=False)

    def train(
        self,
        prob_focus_present: float = 0.,             # train this share of the samples as unrelated images
        focus_present_mask: Tensor | None = None,   # (batch) bool: always these
        log_fn: Callable[[dict], object] = lambda log: None,
    ) -> None:
        """Train until step `train_num_steps`, or until SIGINT or SIGTERM; save in either case."""
        self.prob_focus_present = prob_focus_present
        self.focus_present_mask = None if focus_present_mask is None else focus_present_mask.to(self.device)
        if hasattr(self.diffusion, 'measure_scale'):  # of latents; the same clips, and so the same scale, in every process
            self.diffusion.measure_scale(self.dataset)
        self.run(log_fn)

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
        cond = captions if self.use_captions else None
        if cond is not None and self.cache is not None:
            cond = self.cache(cond).to(self.device, non_blocking=True)
        # Processes average their gradients once per step, in the last backward pass; sharded ones, which have no room for
        # whole gradients to add up, in every one.
        with nullcontext() if is_last or self.model is self.diffusion else self.model.no_sync():
            with self.autocast():
                loss = self.model(videos, cond, **draws)
            self.backward(loss)
        return loss.detach()

    def draw(self, number: int, size: int, prob_focus_present: float) -> dict[str, Tensor | float]:
        """All that is random about batch `number` of `size` clips: drawn for the batches of all processes, cut to our rows."""
        clips = size * self.processes.world_size
        rows = slice(self.processes.rank * size, (self.processes.rank + 1) * size)
        where = dict(device=self.device, generator=seeded_generator(self.seed, 'noise', number, device=self.device))
        # Steps spread evenly over the clips, from a random start: the loss depends on t more than on anything
        # else, and so varies less from batch to batch (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
        t = (torch.rand(1, **where) + torch.arange(clips, device=self.device) / clips) % 1
        # How a clip moves, and all else that its caption says, is decided while there is hardly more than noise: from a
        # tenth of the signal on, the frames themselves show it. Uniform steps are too seldom so noisy for a network to
        # learn to listen, so t is drawn with density p t^(p-1) where the bias is p.
        t = t ** (1 / self.noise_bias)
        draws = dict(t=(t * self.diffusion.num_timesteps).long().clamp(max=self.diffusion.num_timesteps - 1)[rows])
        draws |= {name: drawn[rows] for name, drawn in self.diffusion.draw(clips, **where).items()}
        if self.use_captions:
            draws['null_cond_mask'] = (torch.rand(clips, **where) < self.null_cond_prob)[rows]
        if 0 < prob_focus_present < 1:
            draws['focus_present_mask'] = (torch.rand(clips, **where) < prob_focus_present)[rows]
        else:
            draws['prob_focus_present'] = prob_focus_present
        return draws

    # Samples

    def sample(self, milestone: int) -> Path:
        """Samples of the averaged model as one tiled GIF."""
        path = self.results_folder / f'{milestone}.gif'
        prompts = self.sample_prompts()
        with self.ema.average_parameters():
            videos = sample_many(self.diffusion, prompts, self.num_samples, batch_size=self.batch_size, seed=self.seed,
                                 processes=self.processes, low_res=self.small_clips(), **self.sampling)
        if self.processes.is_main:
            video_tensor_to_gif(videos, path)
            if prompts:
                (self.results_folder / 'prompts.txt').write_text('\n'.join(prompts) + '\n', encoding='utf-8')
        return path

    def sample_prompts(self) -> list[str] | None:
        """Captions from all over the folder; the same ones at every milestone."""
        if not self.use_captions:
            return None
        captions = self.clips.captions if self.enlarges else sorted(set(self.dataset.captions))
        return [captions[i * len(captions) // self.num_samples] for i in range(self.num_samples)]

    def small_clips(self) -> Tensor | None:
        """For a model that enlarges: clips from all over the folder (count c f h w), made small."""
        if not self.enlarges:
            return None
        clips = [self.clips.clip(i * len(self.clips) // self.num_samples) for i in range(self.num_samples)]
        return self.diffusion.shrink(self.clips.floats(torch.stack(clips)))

    def config(self) -> dict:
        return self.diffusion.config()

    def has_config(self, config: dict) -> bool:
        return self.diffusion.has_config(config)

    def state_dict(self) -> dict:
        return {**super().state_dict(), 'sampling': self.sampling}  # how sample.py draws unless it is told otherwise


def sample_many(
    diffusion: GaussianDiffusion, prompts: list[str] | None, count: int, *, batch_size: int, seed: int,
    processes: Processes, num_frames: int | None = None, low_res: Tensor | None = None, **sampling,
) -> Tensor | None:
    """`count` videos (count c f h w) on the CPU, in batches that the processes share out; None but in the main one."""
    draw = diffusion.sample if num_frames is None else partial(diffusion.sample_long, num_frames)
    batches = math.ceil(count / batch_size)
    parts = {}  # number of a batch -> videos. Its number goes into its seed, so that who draws it does not matter.
    for turn in range(math.ceil(batches / processes.world_size)):
        # Who has none left draws one again: were it only to wait, the others would wait for its share of sharded weights.
        number = (turn * processes.world_size + processes.rank) % batches
        rows = slice(number * batch_size, min(count, (number + 1) * batch_size))
        if low_res is not None:
            sampling['low_res'] = low_res.expand(count, -1, -1, -1, -1)[rows]
        parts[number] = draw(
            prompts[rows] if prompts else None, batch_size=rows.stop - rows.start, seed=seed + number,
            progress=processes.is_main, **sampling).cpu()
    parts = processes.gather(parts)
    return torch.cat([parts[number] for number in sorted(parts)]) if processes.is_main else None

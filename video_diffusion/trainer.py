"""Trainer: the training loop on a folder of clips, with an EMA, samples, checkpoints and several processes.

    >>> trainer = Trainer(diffusion, 'my_gifs', train_batch_size=8, train_num_steps=10_000)
    >>> trainer.load(-1)      # to go on where an earlier run stopped
    >>> trainer.train()

In `results_folder`: `model-<milestone>.pt`, a tiled `<milestone>.gif` of samples with its `prompts.txt`, and
`log.csv`. A run that was stopped, or killed, and resumed ends with the very weights of one that was not. That
is simple to promise because nothing random has a state to lose: which clips make batch number n, and what
noise they get, are functions of (seed, n) alone. They do not depend on the number of processes either:
each draws for all and takes its own rows, so two processes train like one with twice the batch.
"""

import csv
import math
import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from . import checkpoint, lr_schedule
from .dataset import GifDataset, batches, seeded_generator
from .diffusion import GaussianDiffusion
from .distributed import Processes, best_device
from .ema import EMA
from .gif import video_tensor_to_gif
from .interrupt import StopRequest

LOG_COLUMNS = ('step', 'loss', 'lr', 'clips_per_second', 'seconds')


class Trainer:
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
        horizontal_flip: bool = False,
        random_window: bool = False,             # of clips longer than num_frames
        cond_scale: float = 1.,                  # the next three say how to sample at milestones
        sampler: str = 'ddpm',
        sample_steps: int | None = None,
        log_every: int = 10,                     # look at the loss: on a GPU, the only time a step waits for it
        seed: int = 0,
        strict: bool = False,                    # a damaged clip is an error, not a warning
        processes: Processes | None = None,      # from distributed.init(); None: this one alone
    ):
        if num_frames not in (None, diffusion.num_frames):
            raise ValueError(f'num_frames={num_frames}: the diffusion was built for {diffusion.num_frames} frames')
        for name, value in dict(train_batch_size=train_batch_size, gradient_accumulate_every=gradient_accumulate_every,
                                update_ema_every=update_ema_every, save_and_sample_every=save_and_sample_every,
                                num_sample_rows=num_sample_rows, log_every=log_every).items():
            if value < 1:
                raise ValueError(f'{name}={value}: give 1 or more')
        self.processes = processes or Processes(device=best_device())
        self.device = self.processes.device
        self.amp_dtype = amp_dtype(self.device) if amp else None
        self.diffusion = diffusion.to(self.device)
        self.batch_size = train_batch_size
        self.accumulate = gradient_accumulate_every
        self.train_num_steps = train_num_steps
        self.train_lr = train_lr
        self.lr_schedule = lr_schedule
        self.max_grad_norm = max_grad_norm
        self.null_cond_prob = null_cond_prob
        self.step_start_ema = step_start_ema
        self.update_ema_every = update_ema_every
        self.save_and_sample_every = save_and_sample_every
        self.num_samples = num_sample_rows ** 2
        self.sampling = dict(cond_scale=cond_scale, sampler=sampler, steps=sample_steps)
        self.log_every = log_every
        self.seed = seed
        self.results_folder = Path(results_folder)

        self.dataset = GifDataset(folder, (diffusion.height, diffusion.width), diffusion.channels, diffusion.num_frames,
                                  horizontal_flip=horizontal_flip, random_window=random_window, seed=seed, strict=strict)
        self.use_captions = getattr(diffusion.denoise_fn, 'has_cond', False)
        if self.use_captions and self.dataset.captions is None:
            raise ValueError(f'the model is conditional, but the clips in {folder} have no captions: put a clip.txt '
                             'beside each clip.gif, or build the model without cond_dim')
        if self.processes.is_main:
            print(f'{len(self.dataset)} clips in {folder}' + (', with captions' if self.dataset.captions else ''))

        self.model = diffusion
        if self.processes.world_size > 1:
            self.model = DistributedDataParallel(diffusion, broadcast_buffers=False)
        self.optimizer = torch.optim.Adam(diffusion.parameters(), lr=train_lr, fused=self.device.type in ('cpu', 'cuda'))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.ema = EMA(diffusion, ema_decay, warmup=ema_warmup)
        self.step = 0                     # optimiser steps done
        self.seconds = 0.                 # spent training, over all resumed runs
        self.pending: list[tuple] = []    # (step, loss on the device, learning rate), not looked at yet

    # The loop

    def train(
        self,
        prob_focus_present: float = 0.,             # train this share of the samples as unrelated images
        focus_present_mask: Tensor | None = None,   # (batch) bool: always these
        log_fn: Callable[[dict], object] = lambda log: None,
    ) -> None:
        """Train until step `train_num_steps`, or until SIGINT or SIGTERM; save in either case."""
        self.results_folder.mkdir(parents=True, exist_ok=True)
        self.trim_log()
        data = batches(self.dataset, self.batch_size, seed=self.seed, start=self.step * self.accumulate,
                       rank=self.processes.rank, world_size=self.processes.world_size,
                       pin_memory=self.device.type == 'cuda')
        progress = tqdm(initial=self.step, total=self.train_num_steps, desc='training', unit='step',
                        disable=not self.processes.is_main)
        with StopRequest() as stop, progress:
            self.watch = time.perf_counter()
            while self.step < self.train_num_steps:
                self.train_step(data, prob_focus_present, focus_present_mask)
                progress.update()
                stopping = self.processes.any(stop.requested)
                milestone = self.step % self.save_and_sample_every == 0 or self.step == self.train_num_steps
                if self.step % self.log_every == 0 or milestone or stopping:
                    self.log(log_fn, progress)
                if milestone or stopping:
                    self.save(math.ceil(self.step / self.save_and_sample_every))
                if stopping:
                    break
                if milestone:
                    path = self.sample(math.ceil(self.step / self.save_and_sample_every))
                    log_fn({'step': self.step, 'sample': path})
                    self.watch = time.perf_counter()
        if self.processes.is_main:
            done = self.step == self.train_num_steps
            print('training completed' if done else f'stopped at step {self.step}: saved, load(-1) goes on from here')

    def train_step(self, data, prob_focus_present: float, focus_present_mask: Tensor | None) -> None:
        learning_rate = self.train_lr * self.lr_schedule(self.step)
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate
        total = torch.zeros((), device=self.device)
        for i in range(self.accumulate):
            batch = next(data)
            videos, captions = batch if self.dataset.captions else (batch, None)
            videos = videos.to(self.device, non_blocking=True).float() / 255
            draws = self.draw(self.step * self.accumulate + i, videos.shape, prob_focus_present)
            if focus_present_mask is not None:
                draws['focus_present_mask'] = focus_present_mask.to(self.device)
            # Processes average their gradients once per step, in the last backward pass.
            is_last = i == self.accumulate - 1
            with nullcontext() if is_last or self.model is self.diffusion else self.model.no_sync():
                with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                    loss = self.model(videos, captions if self.use_captions else None, **draws) / self.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()

        if self.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)  # clip what the gradients are, not what they were scaled to
            torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.step % self.update_ema_every == 0:
            self.ema.update() if self.step >= self.step_start_ema else self.ema.copy()
        self.step += 1
        self.pending.append((self.step, total, learning_rate))

    def draw(self, number: int, shape: torch.Size, prob_focus_present: float) -> dict[str, Tensor | float]:
        """All that is random about batch `number`: drawn for the batches of all processes, cut to our rows."""
        size, clips = shape[0], shape[0] * self.processes.world_size
        rows = slice(self.processes.rank * size, (self.processes.rank + 1) * size)
        where = dict(device=self.device, generator=seeded_generator(self.seed, 'noise', number, device=self.device))
        # Steps spread evenly over the clips, from a random start: the loss depends on t more than on anything
        # else, and so varies less from batch to batch (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
        t = (torch.rand(1, **where) + torch.arange(clips, device=self.device) / clips) % 1
        draws = dict(t=(t * self.diffusion.num_timesteps).long()[rows],
                     noise=self.diffusion.draw_noise((clips, *shape[1:]), **where)[rows])
        if self.use_captions:
            draws['null_cond_mask'] = (torch.rand(clips, **where) < self.null_cond_prob)[rows]
        if self.diffusion.prob_cond_frames:
            draws['known_mask'] = self.diffusion.draw_known(clips, **where)[rows]
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
                                 processes=self.processes, **self.sampling)
        if self.processes.is_main:
            video_tensor_to_gif(videos, path)
            if prompts:
                (self.results_folder / 'prompts.txt').write_text('\n'.join(prompts) + '\n', encoding='utf-8')
        return path

    def sample_prompts(self) -> list[str] | None:
        """Captions from all over the folder; the same ones at every milestone."""
        if not self.use_captions:
            return None
        captions = sorted(set(self.dataset.captions))
        return [captions[i * len(captions) // self.num_samples] for i in range(self.num_samples)]

    # The log

    def log(self, log_fn: Callable[[dict], object], progress: tqdm) -> None:
        """Look at the losses since the last look, and write them down."""
        if not self.pending:
            return
        steps, losses, learning_rates = zip(*self.pending)
        losses = self.processes.mean(torch.stack(losses)).tolist()  # on a GPU: waits for the steps to finish
        now = time.perf_counter()
        self.seconds += now - self.watch
        clips = len(steps) * self.batch_size * self.accumulate * self.processes.world_size
        speed = clips / (now - self.watch)
        self.watch = now
        self.pending.clear()
        rows = [dict(zip(LOG_COLUMNS, row)) for row in zip(
            steps, losses, learning_rates, [round(speed, 2)] * len(steps), [round(self.seconds, 2)] * len(steps))]
        for row in rows:
            if not math.isfinite(row['loss']):
                raise FloatingPointError(
                    f'the loss of step {row["step"]} is {row["loss"]}: the run stops here and the last checkpoint is '
                    'untouched. Try a lower train_lr, max_grad_norm=1., or a look at the clips')
            log_fn(row)
        progress.set_postfix(loss=f'{losses[-1]:.4f}', clips_per_s=f'{speed:.1f}')
        if self.processes.is_main:
            with open(self.results_folder / 'log.csv', 'a', newline='') as file:
                csv.DictWriter(file, LOG_COLUMNS).writerows(rows)

    def trim_log(self) -> None:
        """Begin the log, or drop the rows after our step, which a run that was killed wrote after its last save."""
        if not self.processes.is_main:
            return
        path = self.results_folder / 'log.csv'
        rows = []
        if self.step and path.exists():
            with open(path, newline='') as file:
                rows = [row for row in csv.DictReader(file) if row['seconds'] and int(row['step']) <= self.step]
        temporary = path.with_suffix('.tmp')
        with open(temporary, 'w', newline='') as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)

    # Checkpoints

    def save(self, milestone: int) -> None:
        # The loss of this step may be fine and the weights that its gradient led to may not be.
        if not all(weight.isfinite().all() for weight in self.diffusion.parameters()):
            raise FloatingPointError(f'some weights are not finite after step {self.step}: the run stops here and earlier '
                                     'checkpoints are untouched. Try a lower train_lr, or max_grad_norm=1.')
        if self.processes.is_main:
            self.results_folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save(self.state_dict(), self.results_folder / f'model-{milestone}.pt')

    def load(self, milestone: int = -1) -> None:
        """Go on from a milestone of the results folder; -1 is the newest."""
        folder = self.results_folder
        path = checkpoint.newest(folder) if milestone == -1 else folder / f'model-{milestone}.pt'
        self.load_state_dict(checkpoint.load_run(path))

    def state_dict(self) -> dict:
        return {
            'config': self.diffusion.config(),
            'step': self.step,  # with the seed, also the position in the data and in the noise
            'seed': self.seed,
            'seconds': self.seconds,
            'sampling': self.sampling,  # how sample.py draws unless it is told otherwise
            'model': self.diffusion.state_dict(),
            'ema': self.ema.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        if not self.diffusion.has_config(state['config']):
            raise ValueError('the checkpoint was made with other settings than this model: '
                             f'{state["config"]}, and not {self.diffusion.config()}')
        self.diffusion.load_state_dict(state['model'])
        self.ema.load_state_dict(state['ema'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.scaler.load_state_dict(state['scaler'])
        self.step, self.seed, self.seconds = state['step'], state['seed'], state['seconds']


def sample_many(
    diffusion: GaussianDiffusion, prompts: list[str] | None, count: int, *, batch_size: int, seed: int,
    processes: Processes, num_frames: int | None = None, **sampling,
) -> Tensor | None:
    """`count` videos (count c f h w) on the CPU, in batches that the processes share out; None but in the main one."""
    draw = diffusion.sample if num_frames is None else partial(diffusion.sample_long, num_frames)
    parts = {}  # number of a batch -> videos. Its number goes into its seed, so that who draws it does not matter.
    for number in range(processes.rank, math.ceil(count / batch_size), processes.world_size):
        rows = slice(number * batch_size, min(count, (number + 1) * batch_size))
        parts[number] = draw(
            prompts[rows] if prompts else None, batch_size=rows.stop - rows.start, seed=seed + number,
            progress=processes.is_main, **sampling).cpu()
    parts = processes.gather(parts)
    return torch.cat([parts[number] for number in sorted(parts)]) if processes.is_main else None


def amp_dtype(device: torch.device) -> torch.dtype:
    """The half precision that this device is fast in."""
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == 'mps':
        return torch.float16
    # Without such instructions bf16 matrix products are emulated: measured 300 times slower than float32.
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    raise ValueError('amp=True: this CPU has no bf16 instructions, so mixed precision would be far slower than '
                     'float32. Leave amp off, or train on a GPU')

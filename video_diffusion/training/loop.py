"""The training loop: what is the same whatever is trained, so that a trainer is little more than its step.

    data  ->  step (forward, backward, optimisers, EMA)  ->  log  ->  checkpoint  ->  samples        again and again

A trainer says what it logs (`columns`), how it learns from one batch (`learn`), what it draws or measures at a
milestone (`sample`, `measure`), and puts whatever else has a state into `parts`. See `trainer.py` for the
shortest example.

A run that was stopped, or killed, and resumed ends with the very weights of one that was not. That is simple
to promise because nothing random has a state to lose: which clips make batch number n, and what noise they
get, are functions of (seed, n) alone. They do not depend on the number of processes either: each draws for
all and takes its own rows, so two processes train like one with twice the batch.
"""

import math
import time
import warnings
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import checkpoint
from ..checks import number, whole
from ..data.dataset import GifDataset, batches, seeded_generator
from ..diffusion.samplers import bar
from ..distributed import Processes, lost_others
from . import lr_schedule, shard
from .alike import clip_list
from .ema import EMA
from .interrupt import Stopped, StopRequest
from .lock import hold, refuse_another_run
from .log import add_rows, begin_log
from .precision import amp_dtype, refuse_few_bits, use_tensor_cores


class TrainingLoop(ABC):
    columns: tuple[str, ...] = ('loss',)     # what `learn` returns, for the log
    measures: tuple[str, ...] = ()           # what `measure` returns, for the log

    def __init__(                            # what these mean: see Trainer
        self, model: nn.Module, dataset: GifDataset, *, optimizer: torch.optim.Optimizer, ema: EMA, batch_size: int,
        accumulate: int, num_steps: int, lr: float, lr_schedule: lr_schedule.Schedule, max_grad_norm: float | None, amp: bool,
        step_start_ema: int, update_ema_every: int, save_and_sample_every: int, log_every: int, results_folder: str | Path,
        seed: int, processes: Processes,
    ):
        for name, value in dict(train_batch_size=batch_size, gradient_accumulate_every=accumulate, log_every=log_every,
                                update_ema_every=update_ema_every, save_and_sample_every=save_and_sample_every,
                                train_num_steps=num_steps).items():
            whole(name, value, 1)
        number('max_grad_norm', max_grad_norm, above=0)
        whole('seed', seed, 0, 2 ** 63 - 1)
        refuse_few_bits(model)
        self.processes, self.device = processes, processes.device
        self.amp_dtype = amp_dtype(self.device) if amp else None
        use_tensor_cores(processes)
        self.dataset, self.batch_size, self.accumulate = dataset, batch_size, accumulate
        self.train_num_steps, self.train_lr, self.lr_schedule = num_steps, lr, lr_schedule
        self.max_grad_norm = max_grad_norm
        self.step_start_ema, self.update_ema_every = step_start_ema, update_ema_every
        self.save_and_sample_every, self.log_every = save_and_sample_every, log_every
        self.results_folder, self.seed = Path(results_folder), seed
        self.log_file = self.results_folder / 'log.csv'

        self.optimizer, self.ema = optimizer, ema
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.parts = {'model': model, 'ema': ema, 'optimizer': optimizer, 'scaler': self.scaler}  # all that has a state
        self.step = 0                     # optimiser steps done
        self.counted_from = 0, 0          # step and number of the milestone from which they are counted
        self.seconds = 0.                 # spent training, over all resumed runs
        self.pending: list[tuple] = []    # (step, values on the device, learning rate), not looked at yet
        self.measured: dict[str, float] = {}  # at the last milestone
        self.stop = StopRequest()

    # What a trainer fills in

    @abstractmethod
    def learn(self, batch, number: int, is_last: bool) -> Tensor:
        """Forward and backward pass of batch `number`, the last of its step or not; returns the values of `columns`."""

    @abstractmethod
    def config(self) -> dict:
        """What rebuilds the model."""

    def has_config(self, config: dict) -> bool:
        """Whether a checkpoint was made by such a run as this one."""
        return config == self.config()

    @abstractmethod
    def sample(self) -> None:
        """Draws what the model can do now, as `picture()`."""

    def measure(self) -> dict[str, float]:
        """The values of `measures`, at a milestone."""
        return {}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that have a step to make."""
        return [self.optimizer]

    # The loop

    def train(self, log_fn: Callable[[dict], object] = lambda log: None) -> None:
        """Train until step `train_num_steps`, or until SIGINT, SIGTERM or SIGHUP; save in either case."""
        with lost_others(), hold(self.results_folder, self.processes) as self.lock, self.stop:
            self.processes.agree({'clips': clip_list(self.dataset), 'step': self.step})
            if self.step == 0:
                self.processes.by_main(lambda: refuse_another_run(self.results_folder))
            self.processes.by_main(lambda: begin_log(self.log_file, self.log_columns(), self.step))
            began, stopped = self.step, self.draw_what_is_missing()
            if self.step < self.train_num_steps and not stopped:
                stopped = self.train_on(log_fn)
        if self.processes.is_main:
            print(f'stopped at step {self.step}: saved, load(-1) goes on from here' if stopped else
                  'training completed' if self.step == self.train_num_steps else
                  f'nothing to do: {began} steps are done already, and train_num_steps={self.train_num_steps}')

    def train_on(self, log_fn: Callable[[dict], object]) -> bool:
        """All steps that are left; True if a stop was requested before."""
        data = self.batches()
        with tqdm(initial=self.step, total=self.train_num_steps, desc='training', unit='step',
                  disable=not self.processes.is_main) as progress:
            self.watch = time.perf_counter()
            while self.step < self.train_num_steps:
                self.train_step(data)
                progress.update()
                stopping = self.processes.any(self.stop.requested)
                milestone, rows = self.is_milestone(), []
                if self.step % self.log_every == 0 or milestone or stopping:
                    rows = self.log(progress, measure=milestone)
                if milestone or stopping:
                    self.save(self.milestone())
                if milestone and not stopping:
                    stopping = not self.draw_milestone()
                    rows[-1] |= {} if stopping else {'sample': self.picture()}
                    self.watch = time.perf_counter()
                for row in rows:
                    log_fn(row)
                if stopping:
                    return True
        return False

    # Samples of a milestone

    def is_milestone(self) -> bool:
        return self.step % self.save_and_sample_every == 0 or self.step == self.train_num_steps

    def picture(self) -> Path:
        return self.results_folder / f'{self.milestone()}.gif'

    def draw_milestone(self) -> bool:
        """Its samples, or False: a stop was requested, and they are drawn when the run goes on."""
        try:
            self.sample()
        except Stopped:
            return False
        self.processes.wait()                # the main one may be writing still
        return True

    def draw_what_is_missing(self) -> bool:
        """Of a run that ended after a milestone was saved and before it was drawn; True if it is stopped again."""
        missing = self.processes.any(self.processes.is_main and not self.picture().exists())
        return missing and self.step > 0 and self.is_milestone() and not self.draw_milestone()

    def until_stopped(self, steps: list[int]) -> Iterator[int]:
        """The steps of a sampler, with a progress bar, until a stop is requested in any process."""
        for step in bar(steps, self.processes.is_main):
            if self.processes.any(self.stop.requested):
                raise Stopped
            yield step

    def batches(self) -> Iterator:
        """The batches of this process, from where the run stands."""
        return batches(self.dataset, self.batch_size, seed=self.seed, start=self.step * self.accumulate,
                       rank=self.processes.data_rank, world_size=self.processes.data_size,
                       pin_memory=self.device.type == 'cuda')

    def milestone(self) -> int:
        """The number of the milestone that the run is on its way to, or has just reached: they go on rising by one, even if a
        run goes on with another save_and_sample_every."""
        step, number = self.counted_from
        every = self.save_and_sample_every
        return number if self.step == step else number + math.ceil(self.step / every) - step // every

    def train_step(self, data) -> None:
        learning_rate = self.train_lr * self.lr_schedule(self.step)
        total = torch.zeros(len(self.columns), device=self.device)
        for i in range(self.accumulate):
            number, batch = self.step * self.accumulate + i, next(data)
            with self.own_randomness(number):
                total += self.learn(batch, number, is_last=i == self.accumulate - 1)
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                group['lr'] = learning_rate
            if self.max_grad_norm is not None:
                self.scaler.unscale_(optimizer)  # clip what the gradients are, not what they were scaled to
                torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group['params']],
                                               self.max_grad_norm)
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        if self.step % self.update_ema_every == 0:
            self.ema.update() if self.step >= self.step_start_ema else self.ema.copy()
        self.step += 1
        self.pending.append((self.step, total / self.accumulate, learning_rate))

    @contextmanager
    def own_randomness(self, number: int):
        """Within, what a module draws unasked (dropout) is a function of the seed and the batch, too."""
        with torch.random.fork_rng([self.device] if self.device.type == 'cuda' else []):
            torch.manual_seed(seeded_generator(self.seed, 'modules', number, self.processes.rank).initial_seed())
            yield

    def backward(self, loss: Tensor) -> None:
        """Its share of the step's gradients."""
        self.scaler.scale(loss / self.accumulate).backward()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    # The log

    def log(self, progress: tqdm, measure: bool) -> list[dict]:
        """Look at the losses since the last look, and write them down: a row for each step."""
        steps, values, learning_rates = zip(*self.pending)
        values = self.processes.mean(torch.stack(values)).tolist()  # on a GPU: waits for the steps to finish
        now = time.perf_counter()
        self.seconds += now - self.watch
        speed = len(steps) * self.batch_size * self.accumulate * self.processes.data_size / (now - self.watch)
        self.pending.clear()
        rows = [{'step': step, **dict(zip(self.columns, row)), 'lr': learning_rate, 'clips_per_second': round(speed, 2),
                 'seconds': round(self.seconds, 2)} for step, row, learning_rate in zip(steps, values, learning_rates)]
        for row in rows:
            for name in self.columns:
                if not math.isfinite(row[name]):
                    raise FloatingPointError(
                        f'the {name} of step {row["step"]} is {row[name]}: the run stops here and the last checkpoint is '
                        'untouched. Try a lower train_lr, max_grad_norm=1., or a look at the clips')
        if measure:
            self.measured = self.measure()
            rows[-1].update(self.measured)
        progress.set_postfix(loss=f'{rows[-1][self.columns[0]]:.4f}', clips_per_s=f'{speed:.1f}')
        if self.processes.is_main:
            self.look_after_folder()
            add_rows(self.log_file, self.log_columns(), rows)
        self.watch = time.perf_counter()
        return rows

    def log_columns(self) -> list[str]:
        return ['step', *self.columns, 'lr', 'clips_per_second', 'seconds', *self.measures]

    def look_after_folder(self) -> None:
        """It may have been deleted while we train."""
        if not self.log_file.exists():
            warnings.warn(f'{self.log_file} is gone, deleted alone or with its folder: both are made again, and what was in there '
                          'before is lost')
            self.lock.take()                 # another run may have begun there
            begin_log(self.log_file, self.log_columns(), 0)

    # Checkpoints

    def save(self, milestone: int) -> None:
        # The loss of this step may be fine and the weights that its gradient led to may not be.
        finite = all(shard.own(weight).isfinite().all() for weight in self.parts['model'].parameters())
        if self.processes.any(not finite):
            raise FloatingPointError(f'some weights are not finite after step {self.step}: the run stops here and earlier '
                                     'checkpoints are untouched. Try a lower train_lr, or max_grad_norm=1.')
        state = self.state_dict()
        if self.processes.is_main:
            self.results_folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save(state, self.results_folder / f'model-{milestone}.pt')
        self.processes.wait()                # a large one on a slow disk takes its time

    def load(self, milestone: int = -1, strict: bool = True) -> None:
        """Go on from a milestone of the results folder; -1 is the newest. `strict` is that of the model's load_state_dict."""
        folder = self.results_folder
        path = checkpoint.newest(folder) if milestone == -1 else folder / f'model-{milestone}.pt'
        self.load_state_dict(checkpoint.load_run(path), strict)
        number = int(path.stem.removeprefix('model-'))
        if self.milestone() != number:    # it was counted in other steps
            self.counted_from = self.step, number

    def state_dict(self) -> dict:
        """For the main process to save; every process must ask, for it may hold shards of it."""
        return {
            'config': self.config(),
            'step': self.step,  # with the seed, also the position in the data and in the noise
            'seed': self.seed,
            'seconds': self.seconds,
            'counted_from': self.counted_from,
            'fps': self.dataset.fps,  # of the clips: what is drawn plays at the same rate
            **{name: shard.whole(part.state_dict(), keep=self.processes.is_main) for name, part in self.parts.items()},
        }

    def load_state_dict(self, state: dict, strict: bool = True) -> None:
        with checkpoint.blaming('the checkpoint'):
            fits = self.has_config(state['config'])
        if not fits:
            raise ValueError('the checkpoint was made with other settings than this model: '
                             f'{state["config"]}, and not {self.config()}')
        missing = [name for name in self.parts if name not in state]
        if missing:
            raise ValueError(f'the checkpoint holds no {", ".join(missing)}: it was made with other settings of the trainer')
        with checkpoint.blaming('the checkpoint'):
            for name, part in self.parts.items():
                if isinstance(part, torch.optim.Optimizer):
                    shard.load(part, checkpoint.moments(state[name], part))
                elif part is not self.scaler or state[name]:   # a run without fp16 had no scale: begin with the usual one
                    lax = not strict and name == 'model' and isinstance(part, nn.Module)       # adapters are always whole
                    shard.load(part, state[name], **({'strict': False} if lax else {}))
            self.step, self.seed, self.seconds = int(state['step']), int(state['seed']), float(state['seconds'])
            step, milestone = state.get('counted_from', (0, 0))
            self.counted_from = int(step), int(milestone)
            whole('step', self.step, 0)
            whole('seed', self.seed, 0, 2 ** 63 - 1)


def adam(weights: Iterable[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.,
         ) -> torch.optim.Adam:
    """Adam for those weights that learn, all of them in one kernel where the device has one; AdamW where weights decay."""
    number('train_lr', lr, 0)
    number('weight_decay', weight_decay, 0)
    kind, more = (torch.optim.AdamW, dict(weight_decay=weight_decay)) if weight_decay else (torch.optim.Adam, {})
    weights = [weight for weight in weights if weight.requires_grad]
    return kind(weights, lr=lr, betas=betas, fused=all(w.device.type in ('cpu', 'cuda') for w in weights), **more)

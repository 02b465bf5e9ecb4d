"""VAETrainer: trains a video VAE on a folder of clips; the loop around its step is `loop.py`.

    >>> vae = CausalVAE(dim=32, dim_mults=(1, 2, 2), latent_channels=4, norm_scope='frame')
    >>> trainer = VAETrainer(vae, 'my_gifs', image_size=32, num_frames=9, train_num_steps=10_000)
    >>> trainer.train()
    >>> vae = vae_from_checkpoint('results_vae')           # the averaged weights; see vae_checkpoint.py

One step: the VAE learns to reconstruct, and, from step `disc_start` on, to fool a critic; then the critic learns
from the same clips to tell the reconstructions from them (`vae_loss.py`). Two optimisers, each with its own weights.

It works with any VAE that has `encode(video) -> DiagonalGaussian`, `decode(z, frames) -> video`, `config`,
`time_compression`, `encoder` and `decoder`, and the decoder's last weight as `last_layer`.

**Data and context parallel**: in a group of `processes.frames_group` each process holds some frames of every clip,
from the pixels to the losses. Groups see different clips. Gradients are summed once per step, and are those that
one process would compute from all clips (`vae_loss.py` says how the losses are divided).

In `results_folder`: `model-<milestone>.pt`, `<milestone>.gif` with held-out clips, each beside its reconstruction
and their difference (times 4, on grey), and `log.csv` with PSNR and SSIM on the held-out clips.
"""

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..data.dataset import GifDataset, seeded_generator
from ..data.folder import ClipFolder, write_clip
from ..distributed import Processes, best_device
from ..vae.context_parallel import CausalConv3d, Piece
from ..vae.frame_shares import agree_on_shares, has_special_first_frame, split_frames, sum_gradients
from ..vae.gaussian import DiagonalGaussian
from ..vae.metrics import psnr, ssim
from ..vae.vae_checkpoint import vae_config
from ..vae.vae_loss import Discriminator, PerceptualLoss, VAELoss, adaptive_weight, discriminator_loss, generator_loss
from . import lr_schedule
from .alike import settings_of
from .ema import EMA
from .loop import TrainingLoop, adam
from .muon import muon_or_adam


class VAETrainer(TrainingLoop):
    columns = ('loss', 'error', 'kl', 'adversarial', 'adversarial_weight', 'discriminator')
    measures = ('psnr', 'ssim')

    def __init__(
        self,
        vae: nn.Module,
        folder: str | Path | ClipFolder,
        *,
        image_size: int | tuple[int, int], num_frames: int,
        loss: str = 'l1',                        # or 'l2'
        learn_logvar: bool = False, kl_weight: float = 1e-6,
        perceptual: PerceptualLoss | None = None, perceptual_weight: float = 1.,
        disc_start: int | None = None,           # the step from which a discriminator has a say; None: never
        disc_weight: float = 0.5,                # of its adapted weight
        image_share: float = 0.,                 # of the batches: one frame of each clip, as an image
        image_steps: int = 0,                    # and before that this many steps of nothing else, see `begin_with_clips`
        only_train_decoder: bool = False,
        held_out: int = 16,                      # clips never trained on, to measure on; at most a tenth of them all
        ema_decay: float = 0.995, ema_warmup: bool = True,  # see ema.py
        train_batch_size: int = 4,               # clips in one forward pass of one process, or of those that share them
        gradient_accumulate_every: int = 1, train_lr: float = 1e-4, train_num_steps: int = 100000,
        muon_lr: float | None = None,            # train matrices by Muon, at this rate, and only the rest by Adam: see muon.py
        lr_schedule: lr_schedule.Schedule = lr_schedule.constant(), max_grad_norm: float | None = None,
        amp: bool = False,                       # bf16 or fp16 where the hardware has it
        save_and_sample_every: int = 1000, results_folder: str | Path = './results_vae', log_every: int = 10, seed: int = 0,
        horizontal_flip: bool = False, random_window: bool = False,  # the window is one of clips longer than num_frames
        fps: float | None = None, clips_per_video: int = 1,  # see GifDataset
        strict: bool = False,                    # a damaged clip is an error, not a warning
        processes: Processes | None = None,      # from distributed.init(); None: this one alone
    ):
        given, processes = locals(), processes or Processes(device=best_device())
        processes.agree(settings_of(given, vae_config(vae)))
        refuse_bad_settings(kl_weight, disc_start, disc_weight, image_share, image_steps, held_out, train_num_steps)
        clips = GifDataset(folder, image_size, vae.config['in_channels'], num_frames, horizontal_flip=horizontal_flip,
                           random_window=random_window, fps=fps, clips_per_video=clips_per_video, seed=seed, strict=strict)
        clips.warn_of_short_clips()
        if min(clips.size) < 11:
            raise ValueError(f'image_size={image_size}: SSIM is measured in windows of 11 pixels, so give 11 or more')
        self.held_out = clips.hold_out(min(held_out, max(1, len(clips) // 10)))
        check_frames(num_frames, vae.time_compression)                  # now, and not in a clip
        if processes.is_main:
            print(f'{len(clips)} clips in {folder} to train on, {len(self.held_out)} held out')
        self.vae = vae.to(processes.device).train().requires_grad_(True)        # a LatentDiffusion may have frozen it
        vae.encoder.requires_grad_(not only_train_decoder)
        self.loss = VAELoss(loss, learn_logvar, perceptual, perceptual_weight).to(processes.device)
        self.kl_weight, self.image_share, self.image_steps = kl_weight, image_share, image_steps
        processes.begin_alike(vae)
        super().__init__(
            vae, clips, optimizer=muon_or_adam(nn.ModuleList([vae, self.loss]), train_lr, muon_lr, betas=(0.9, 0.99)),
            ema=EMA(vae, ema_decay, warmup=ema_warmup), batch_size=train_batch_size, accumulate=gradient_accumulate_every,
            num_steps=train_num_steps, lr=train_lr, lr_schedule=lr_schedule, max_grad_norm=max_grad_norm, amp=amp,
            step_start_ema=0, update_ema_every=1, save_and_sample_every=save_and_sample_every, log_every=log_every,
            results_folder=results_folder, seed=seed, processes=processes)
        self.parts['loss'], self.disc_start, self.disc_weight = self.loss, disc_start, disc_weight
        self.discriminator = None
        if disc_start is not None:
            self.discriminator = Discriminator(vae.config['out_channels']).to(self.device)
            processes.begin_alike(self.discriminator)
            self.disc_optimizer = adam(self.discriminator.parameters(), train_lr, betas=(0.5, 0.9))  # a critic that remembers less
            self.parts |= {'discriminator': self.discriminator, 'disc_optimizer': self.disc_optimizer}
        self.share_clips(True)

    # The step

    def learn(self, batch, number: int, is_last: bool) -> Tensor:
        if self.step == self.image_steps > 0:
            self.begin_with_clips()
        clips = batch[0] if self.dataset.captions else batch
        video = self.clips_or_images(clips.to(self.device, non_blocking=True).float() / 255, number)   # b c f h w
        whole = video.shape[2]
        frames = whole / self.processes.sharers              # what the losses are divided by, see vae_loss.py
        video, piece = self.our_share(video)                 # from here on f is the number of our own frames
        with self.autocast():
            posterior = self.vae.encode(video)
            z = posterior.mean + posterior.std * self.noise(posterior.mean, whole, number)             # b cz fz hz wz
            reconstruction = self.vae.decode(z, whole).float()
        posterior = DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())
        nll, error, kl = self.loss(video, reconstruction, posterior, frames)

        adversarial = weight = critic = torch.zeros((), device=self.device)
        if self.adversarial:
            self.discriminator.requires_grad_(False)         # the VAE is to fool it, not to spoil it
            with self.autocast():
                adversarial = generator_loss(self.discriminator(reconstruction, piece).float(), frames)
            weight = self.disc_weight * adaptive_weight(
                nll, adversarial, self.vae.last_layer, average=self.processes.mean, scale=self.scaler.scale(torch.ones_like(nll)))
            self.discriminator.requires_grad_(True)
        loss = nll + self.kl_weight * kl + weight * adversarial
        self.backward(loss / self.processes.world_size)      # gradients are summed over all processes
        if self.adversarial:
            with self.autocast():
                scores = self.discriminator(torch.cat([video, reconstruction.detach()]), piece).float()
            critic = discriminator_loss(*scores.chunk(2), frames)
            self.backward(critic / self.processes.world_size)

        if is_last and self.processes.world_size > 1:
            for optimizer in self.optimizers():
                sum_gradients([w for group in optimizer.param_groups for w in group['params']], dist.group.WORLD)
        if self.scaler.is_enabled():                         # its scale may be too large for a step, which is then left out
            weight = weight.nan_to_num()
        loss = nll + self.kl_weight * kl + weight * adversarial
        return torch.stack([loss, error, kl, adversarial, weight, critic]).detach()

    @property
    def adversarial(self) -> bool:
        return self.discriminator is not None and self.step >= self.disc_start

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer, self.disc_optimizer] if self.adversarial else [self.optimizer]

    # What is random about batch `number` is drawn for the clips of all processes, and cut to ours

    def ours(self, drawn: Tensor) -> Tensor:
        return drawn.chunk(self.processes.data_size)[self.processes.data_rank]

    def clips_or_images(self, video: Tensor, number: int) -> Tensor:
        """The clips, or in the first steps and by a share of the later batches one frame of each."""
        generator = seeded_generator(self.seed, 'images', number)
        if self.step >= self.image_steps and torch.rand(1, generator=generator).item() >= self.image_share:
            return video
        b, f = video.shape[0], video.shape[2]
        frames = self.ours(torch.randint(f, (b * self.processes.data_size,), generator=generator))
        return torch.stack([clip[:, at:at + 1] for clip, at in zip(video, frames.tolist())])             # b c 1 h w

    def begin_with_clips(self) -> None:
        """From images to clips, as MAGVIT-v2 does it (Yu et al. 2023, arXiv 2310.05737).

        Images are learnt many times faster: they cost as much less as a clip has frames, and no two of a batch look alike. But an
        image is to a causal convolution a clip that stands still, so they leave all taps of the kernels the same, and what moves
        would blur. Their sum, put on the present frame, treats each frame of a clip as the image that it has learnt.
        """
        for module in self.vae.modules():
            if isinstance(module, CausalConv3d) and module.weight.requires_grad:      # a frozen encoder stays as it is
                module.forget_the_past()
        self.ema.copy()

    def noise(self, like: Tensor, frames: int, number: int) -> Tensor:
        b, c, _, h, w = like.shape
        latents = -(-frames // self.vae.time_compression)
        generator = seeded_generator(self.seed, 'noise', number, device=self.device)
        noise = self.ours(torch.randn(b * self.processes.data_size, c, latents, h, w, device=self.device, generator=generator))
        return noise if self.processes.sharers == 1 else split_frames(noise, self.processes.frames_group)

    def our_share(self, video: Tensor) -> tuple[Tensor, Piece]:
        """The frames of this process, and what the discriminator must know about them."""
        if self.processes.sharers == 1:
            return video, Piece()
        whole, compression = video.shape[2], self.vae.time_compression
        video = split_frames(video, self.processes.frames_group, compression)
        if video.shape[2] in (0, whole):                     # an image is the first process's alone
            return video, Piece()
        return video, Piece(shares=agree_on_shares(video, self.processes.frames_group, compression))

    # Milestones

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """PSNR and SSIM of the averaged VAE, the mean over the held-out clips; the processes take turns."""
        total = torch.zeros(2)
        with self.averaged():
            for i in range(self.processes.rank, len(self.held_out), self.processes.world_size):
                video, reconstruction = self.reconstruct(i)
                total += torch.stack([psnr(reconstruction, video), ssim(reconstruction, video)]).flatten().cpu()
        total = self.processes.mean(total) * self.processes.world_size / len(self.held_out)
        return dict(zip(self.measures, total.tolist()))

    @torch.no_grad()
    def sample(self) -> None:
        """Held-out clips, their reconstructions, and four times the difference, side by side in one tiled GIF."""
        if self.processes.is_main:
            with self.averaged():
                pairs = [self.reconstruct(i) for i in range(min(6, len(self.held_out)))]
            rows = [torch.cat([video, again, 0.5 + 4 * (again - video)], dim=-1) for video, again in pairs]
            write_clip(torch.cat(rows).cpu(), self.picture(), self.dataset.fps, scale=None)      # b c f h 3*w

    def reconstruct(self, index: int) -> tuple[Tensor, Tensor]:
        """A held-out clip, and what is left of it after the latents: (1 c f h w) twice; while it learns images, one frame."""
        video = self.held_out.clip(index)[None].to(self.device).float() / 255
        if self.step <= self.image_steps > 0:
            video = video[:, :, :1]
        return video, self.vae.decode(self.vae.encode(video).mode(), video.shape[2]).clamp(0, 1)

    @contextmanager
    def averaged(self):
        """Within, the VAE holds the averaged weights, and every process has whole clips."""
        self.vae.eval()
        self.share_clips(False)
        try:
            with self.ema.average_parameters():
                yield
        finally:
            self.vae.train()
            self.share_clips(True)

    def share_clips(self, yes: bool) -> None:
        if self.processes.sharers > 1:
            if not hasattr(self.vae, 'context_parallel'):
                raise ValueError(f'context parallelism: {type(self.vae).__name__} cannot share the frames of a clip among '
                                 'processes; leave it out, and every process gets its own clips')
            self.vae.context_parallel(self.processes.frames_group if yes else None)

    def config(self) -> dict:
        return vae_config(self.vae)

    def state_dict(self) -> dict:
        return {**super().state_dict(), 'held_out': len(self.held_out)}

    def load_state_dict(self, state: dict, strict: bool = True) -> None:
        mine = len(self.held_out)
        theirs = state.get('held_out', mine)                 # older checkpoints do not say
        if theirs != mine:
            raise ValueError(f'the checkpoint held {theirs} clips out, this run {mine}: give the same number and the same folder, '
                             'or it would be measured on clips that it was trained on')
        super().load_state_dict(state, strict)


def check_frames(frames: int, compression: int) -> None:
    if not has_special_first_frame(frames, compression) and compression > 1:
        warnings.warn(f'num_frames={frames}: the first {compression} frames of a reconstruction will be alike, for nothing is '
                      f'before them; of {frames - compression + 1} or {frames + 1} frames the first is kept apart', stacklevel=3)


def refuse_bad_settings(kl_weight: float, disc_start: int | None, disc_weight: float, image_share: float, image_steps: int,
                        held_out: int, train_num_steps: int) -> None:
    checks.number('kl_weight', kl_weight, 0)
    checks.number('disc_weight', disc_weight, 0)
    checks.whole('disc_start', disc_start, 0)
    checks.number('image_share', image_share, 0, 1)
    checks.whole('image_steps', image_steps, 0)
    checks.whole('held_out', held_out, 1)
    if image_steps >= train_num_steps > 0:
        raise ValueError(f'image_steps={image_steps} of {train_num_steps} steps: clips would never be seen; give fewer, or '
                         'image_share=1 to train on images alone')


def start_from(vae: nn.Module, weights: dict[str, Tensor], ignore: Sequence[str] = ()) -> None:
    """Fine-tuning: `weights` for every parameter but those whose names begin with one of `ignore`."""
    own = vae.state_dict()
    kept = {name for name in own if name.startswith(tuple(ignore))}
    unused = [prefix for prefix in ignore if not any(name.startswith(prefix) for name in own)]
    wrong = [name for name, value in own.items()
             if name not in kept and (name not in weights or weights[name].shape != value.shape)]
    if unused or wrong:
        raise ValueError(f'cannot start from these weights: missing or of another shape are {wrong or "none"}, to be ignored '
                         f'but not in this VAE are {unused or "none"}')
    vae.load_state_dict({name: own[name] if name in kept else weights[name] for name in own})

"""Latents on disk: what a VAE makes of a clip is the same in every epoch, so encode each clip once.

    folder/<fingerprint>/<clip>.pt       mean, logvar and, if there is one, the hint, on the channel axis: (3c f h w)

Mean and log-variance are kept, not a sample, so that every epoch draws its own latents. The fingerprint is that
of the VAE's weights and of all that shapes the latents; a clip's name comes from its path, size and date. Whatever
changes, the old files are just not found any more. Files appear whole or not at all: a run that was
stopped while encoding goes on with the clips that are missing, and several processes share them out. What a disk has lost the
end of is missing, too.

    >>> trainer = Trainer(latent_diffusion, 'my_gifs', latent_cache='results_vae/latents')
"""

import hashlib
from copy import copy
from pathlib import Path
from typing import NamedTuple
from zipfile import is_zipfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .. import checkpoint
from ..data.dataset import GifDataset, seeded_generator
from ..distributed import Processes
from ..vae.gaussian import DiagonalGaussian


class Encoded(NamedTuple):
    """A batch of clips as a LatentDiffusion sees them."""
    posterior: DiagonalGaussian
    hint: Tensor | None                  # what the network is told: noised first frames (b c 1 h w), or small clips (b c f h w)


class LatentCache(Dataset):
    """Stands in for the GifDataset that it encodes: clips are (3c f h w), or (2c f h w) without a hint."""

    def __init__(self, dataset: GifDataset, diffusion: nn.Module, folder: str | Path, processes: Processes):
        if not hasattr(diffusion, 'vae'):
            raise ValueError('latent_cache: this diffusion works on pixels, which no VAE has to encode')
        if dataset.horizontal_flip or dataset.random_window:
            raise ValueError('latent_cache: each clip is encoded once, as it is, so horizontal_flip and random_window cannot '
                             'change it anew each time: leave them out, or leave the cache out')
        hint = diffusion.low_res or diffusion.prob_cond_frames > 0
        shape = dataset.size, dataset.num_frames, dataset.rate, dataset.clips_per_video, dataset.channels, diffusion.chunk, hint
        self.folder = Path(folder) / fingerprint(diffusion.vae, shape)
        self.fps, self.num_frames, self.latent_channels = dataset.fps, dataset.num_frames, diffusion.vae.latent_channels
        self.hint_frames = diffusion.diffusion.num_frames if diffusion.low_res else 1
        self.files = [self.folder / file_name(path, part) for path, part in zip(dataset.paths, dataset.parts)]
        self.encode_missing(dataset, diffusion, processes)

        whole = [i for i, file in enumerate(self.files) if is_zipfile(file)]        # those that could be read
        self.files, self.paths, self.source = [self.files[i] for i in whole], [dataset.paths[i] for i in whole], dataset.source
        self.captions = dataset.captions and [dataset.caption(i, dataset.stretch(i)[0]) for i in whole]
        if not self.files:
            raise ValueError(f'none of the {len(dataset)} clips could be read and encoded')
        self.memory, self.fits_in_cache = {}, False
        self.fits_in_cache = len(self) * self.clip(0).nbytes <= dataset.cache_bytes

    def __len__(self) -> int:
        return len(self.files)

    def clip(self, index: int) -> Tensor:
        if index in self.memory:
            return self.memory[index]
        try:
            clip = checkpoint.load(self.files[index])
        except ValueError as error:
            raise ValueError(f'{error}. Delete this file, and it is made again') from None
        if self.fits_in_cache:
            self.memory[index] = clip
        return clip

    def clip_and_caption(self, index: int, _generator: torch.Generator) -> tuple[Tensor, str | None]:
        return self.clip(index), self.captions and self.captions[index]

    def texts(self) -> set[str]:
        return set(self.captions)

    def floats(self, clips: Tensor) -> Encoded:
        mean, logvar, *hint = clips.split(self.latent_channels, dim=1)          # b c f h w, each
        return Encoded(DiagonalGaussian(mean, logvar), hint[0][:, :, :self.hint_frames] if hint else None)

    def encode_missing(self, dataset: GifDataset, diffusion: nn.Module, processes: Processes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        dataset = copy(dataset)
        dataset.cache_bytes = 0                              # no clip is needed again, so none is to stay in memory
        missing = [i for i in range(processes.rank, len(dataset), processes.world_size) if not is_zipfile(self.files[i])]
        bar = tqdm(total=len(missing), desc='encoding clips', unit='clip', disable=not processes.is_main or not missing)
        for at in range(0, len(missing), diffusion.max_batch):
            batch = missing[at:at + diffusion.max_batch]
            bar.update(len(batch))
            read = {i: dataset.readable(i) for i in batch}
            clips = {i: clip for i, (stand_in, clip, _) in read.items() if stand_in == i}     # where i is damaged, another comes
            if not clips:
                continue
            videos = dataset.floats(torch.stack(list(clips.values()))).to(processes.device)
            noise = None
            if diffusion.prob_cond_frames and not diffusion.low_res:     # of each clip alone, whatever is encoded beside it
                generators = [seeded_generator(self.files[i].name, device=processes.device) for i in clips]
                noise = torch.cat([diffusion.draw_image_noise(1, processes.device, generator) for generator in generators])
            posterior, hint = diffusion.encode(videos, noise)
            parts = [posterior.mean, posterior.logvar]       # b c f h w, each
            if hint is not None:
                parts.append(F.pad(hint, (0, 0, 0, 0, 0, parts[0].shape[2] - hint.shape[2])))
            for i, latents in zip(clips, torch.cat(parts, dim=1).cpu()):
                checkpoint.save(latents.clone(), self.files[i])          # a copy, for a part would be saved with the whole
        bar.close()
        processes.wait()                                     # the others may have clips that we need


def fingerprint(vae: nn.Module, *more) -> str:
    """Changes when any weight or setting of the VAE does, or anything in `more`."""
    return checkpoint.fingerprint(vae.state_dict().items(), (type(vae).__name__, sorted(vae.config.items()), more))


def file_name(clip: Path, part: int) -> str:
    stat = clip.stat()
    key = repr((str(clip.resolve()), stat.st_size, stat.st_mtime_ns, part))
    return hashlib.sha256(key.encode()).hexdigest()[:16] + '.pt'

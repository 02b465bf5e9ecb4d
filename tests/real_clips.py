"""Real footage: eight fish, filmed from above. Train on one film, continue clips of another one that was never seen.

    python tests/real_clips.py make data/fish                                # fetches the films, cuts 600 clips of 32x32
    python train.py data/fish --channels 1 --known-frames 0.5 --results results_fish     # a quarter of an hour of one thread
    python tests/real_clips.py grade results_fish                            # two frames of the second film, and the next six
    python train.py data/fish --channels 1 --stage vae --flip --results vae_fish    # and a VAE
    python tests/real_clips.py reconstruct vae_fish                          # of the second film

The films come from the wheel of idtrackerai, which is fetched by pip and unzipped, but neither installed nor kept here. What is
reported is PSNR of the continuation, and that of the trivial one, which repeats the last frame that is known.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from video_diffusion import diffusion_from_checkpoint, vae_from_checkpoint, video_tensor_to_gif
from video_diffusion.data.folder import read_clip
from video_diffusion.vae.metrics import psnr, ssim

FRAMES, SIDE, KNOWN = 8, 32, 2


def film(name: str) -> torch.Tensor:
    """One of the two, grey, 14 frames per second, at a third of its size: (1 f h w)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', folder, 'idtrackerai==6.0.14'], check=True)
        wheel = zipfile.ZipFile(next(Path(folder).glob('*.whl')))
        return read_clip(wheel.extract(f'idtrackerai/data/{name}.avi', folder), channels=1, fps=14, size=(312, 386))


def moving(film: torch.Tensor, stride: int, spots: int = 5) -> torch.Tensor:
    """Clips (b 1 f h w) in [0, 1], around what moves at their beginning (what swims in later, nobody can foretell), from every so many-th frame on."""
    clips, half = [], SIDE // 2
    for start in range(0, film.shape[1] - FRAMES + 1, stride):
        clip = film[:, start:start + FRAMES].float() / 255
        change = (clip[:, KNOWN] - clip[:, 0]).abs()                             # 1 h w
        motion = F.avg_pool2d(change[..., half // 2:-half // 2 + 1, half // 2:-half // 2 + 1], half, stride=1)[0]
        for _ in range(spots):
            y, x = divmod(motion.argmax().item(), motion.shape[1])               # the corner of a crop that has it in the middle
            clips.append(clip[..., y:y + SIDE, x:x + SIDE])
            motion[max(0, y - half):y + half, max(0, x - half):x + half] = 0     # elsewhere, the next time
    return torch.stack(clips)


def make(folder: str) -> None:
    for number, clip in enumerate(moving(film('test_A'), stride=2)[:600]):
        video_tensor_to_gif(clip, Path(folder) / f'{number:03}.gif', duration=70)


def grade(results: str) -> None:
    clips = moving(film('test_B'), stride=30)                                    # b 1 f h w
    diffusion = diffusion_from_checkpoint(results)
    known = clips[:, :, :KNOWN]                                                  # b 1 k h w
    drawn = diffusion.sample(first_frames=known, batch_size=len(clips), steps=16, seed=0)
    # One step from pure noise is the mean of all that may follow: a blur to look at, and the best guess that PSNR knows.
    mean = diffusion.sample(first_frames=known, batch_size=len(clips), steps=1, seed=0)
    still = known[:, :, -1:].expand_as(clips)
    values = [psnr(video[:, :, KNOWN:], clips[:, :, KNOWN:]).mean() for video in (drawn, mean, still)]
    print('{} clips, {} frames each: drawn {:.1f} dB, their mean in one step {:.1f} dB, repeating the last known frame {:.1f} dB'
          .format(len(clips), FRAMES - KNOWN, *values))
    video_tensor_to_gif(torch.cat([clips, drawn], dim=-1)[:16], Path(results) / 'fish.gif', duration=70)


def reconstruct(results: str) -> None:
    clips, vae = moving(film('test_B'), stride=30), vae_from_checkpoint(results)
    with torch.no_grad():
        again = torch.cat([vae(some, sample=False)[0] for some in clips.split(16)]).clamp(0, 1)
    print(f'{len(clips)} clips: {psnr(again, clips).mean():.1f} dB PSNR, {ssim(again, clips).mean():.3f} SSIM')


if __name__ == '__main__':
    what, where = sys.argv[1:] if len(sys.argv) == 3 else ('', '')
    if what not in ('make', 'grade', 'reconstruct'):
        sys.exit(__doc__)
    {'make': make, 'grade': grade, 'reconstruct': reconstruct}[what](where)

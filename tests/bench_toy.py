"""The toy world in numbers: what train.py makes of it on several seeds, or what the public package's own recipe does.

    python tests/bench_toy.py --seeds 5                         # a table of train.py's default, in runs_toy/
    python tests/bench_toy.py --seeds 3 -- --image-size 32      # what follows the two dashes goes to train.py
    python tests/bench_toy.py --peer --minutes 10 --samples 4   # the public package; needs data/shapes-16 from train.py --quick

One thread for each run, two runs side by side; what counts are the CPU seconds of the whole command, which do not depend on
who else is at work. Each model draws 64 clips for each sampler. Ground noise is the mean over clips of the 60th percentile
of abs(pixel - median of its frame and channel): the plain ground has none.

The peer's network (dim 64), loss (noise, L1), optimiser (Adam, 1e-4), batch (32, twice per step) and sampler (1000
steps) are the defaults of its README and its Trainer, which itself cannot run without CUDA; the averaging of
weights begins only at step 2000 there, so the weights are sampled as they are. It takes no captions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from video_diffusion import GaussianDiffusion, checkpoint, shapes, video_tensor_to_gif
from video_diffusion.training.memory import keep_freed_memory

TRAIN = Path(__file__).parents[1] / 'train.py'
SAMPLERS = {}, {'sampler': 'dpm++2m', 'steps': 8}, {'sampler': 'dpm++2m', 'steps': 5}     # the first is that of the run
COUNT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5, help='how many (default: 5)')
    parser.add_argument('--results', default='runs_toy', help='folder of the runs; one that is done is not repeated')
    parser.add_argument('--peer', action='store_true', help='run the public package instead')
    parser.add_argument('--folder', default='data/shapes-16', help='of the peer (default: data/shapes-16)')
    parser.add_argument('--minutes', type=float, default=10, help='of the peer (default: 10)')
    parser.add_argument('--samples', type=int, default=4, help='of the peer (default: 4; each takes a minute or more)')
    parser.add_argument('--dim', type=int, default=64, help='of the peer (default: 64)')
    parser.add_argument('--out', default='results_peer.gif', help='of the peer (default: results_peer.gif)')
    parser.add_argument('train_flags', nargs='*', help='after two dashes: flags of train.py')
    args = parser.parse_args()
    if args.peer:
        return peer(args)
    with ThreadPoolExecutor(2) as two:                         # each waits for a process of its own
        seconds = list(two.map(lambda seed: train(seed, args), range(1, args.seeds + 1)))
    torch.set_num_threads(1)
    table([[seed, seconds[seed - 1] / 60, *grade(Path(args.results) / str(seed), seed)] for seed in range(1, args.seeds + 1)])


def train(seed: int, args: argparse.Namespace) -> float:
    """The CPU seconds that train.py took for this seed."""
    results = Path(args.results) / str(seed)
    done = results / 'cpu_seconds.txt'
    if not done.exists():
        results.mkdir(parents=True, exist_ok=True)
        with open(results / 'output.txt', 'w') as output:
            process = subprocess.Popen(
                [sys.executable, TRAIN, '--device', 'cpu', '--seed', str(seed), '--results', '.', *args.train_flags],
                cwd=results,                                   # each draws a toy world of its own
                env={**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f'seed {seed} failed: see {results / "output.txt"}')
        done.write_text(str(usage.ru_utime + usage.ru_stime))
    return float(done.read_text())


def grade(results: Path, seed: int) -> list[float]:
    """Lawful, caption-true, both and ground noise by the first sampler, then both by the others."""
    diffusion, captions = GaussianDiffusion.from_checkpoint(results), shapes.captions()
    own = checkpoint.load_run(results)['sampling']
    prompts = [captions[i * len(captions) // COUNT] for i in range(COUNT)]
    row = []
    for other in SAMPLERS:
        videos = torch.cat([diffusion.sample(prompts[i:i + 16], seed=seed + 1 + i, progress=False, **{**own, **other})
                            for i in range(0, COUNT, 16)])
        grades = shapes.grade_all(videos, prompts)
        row += [grades['both']] if row else [grades['lawful'], grades['caption_true'], grades['both'], ground_noise(videos)]
    return row


def ground_noise(videos: Tensor) -> float:
    ground = videos.flatten(3).median(dim=3).values[..., None, None]             # b c f 1 1
    return (videos - ground).abs().flatten(1).quantile(0.6, dim=1).mean().item()


def table(rows: list[list[float]]) -> None:
    names = [f'{other.get("sampler")}, {other.get("steps")} steps' for other in SAMPLERS]
    print(f'| seed | CPU minutes | lawful | caption-true | both | ground noise | {" | ".join(f"both, {n}" for n in names[1:])} |')
    print('| --- ' * len(rows[0]) + '|')
    columns = list(zip(*rows))[1:]
    mean = [sum(column) / len(column) for column in columns]
    worst = [max(c) if i in (0, 4) else min(c) for i, c in enumerate(columns)]
    for name, *values in [*rows, ['mean', *mean], ['worst', *worst]]:
        cells = [f'{v:.1f}' if i == 0 else f'{v:.4f}' if i == 4 else f'{v:.0f}' for i, v in enumerate(values)]
        print(f'| {name} | {" | ".join(cells)} |')


def peer(args: argparse.Namespace) -> None:
    from video_diffusion_pytorch import GaussianDiffusion, Unet3D
    from video_diffusion_pytorch.video_diffusion_pytorch import Dataset
    keep_freed_memory()  # as train.py has it

    dataset = Dataset(args.folder, 16, num_frames=8)
    diffusion = GaussianDiffusion(Unet3D(dim=args.dim, dim_mults=(1, 2, 4, 8)), image_size=16, num_frames=8)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4)
    steps, start, losses = 0, time.monotonic(), []
    while time.monotonic() - start < 60 * args.minutes:
        loader = iter(DataLoader(dataset, batch_size=32, shuffle=True))
        while time.monotonic() - start < 60 * args.minutes:
            pair = [next(loader, None) for _ in range(2)]
            if pair[1] is None:
                break
            for videos in pair:
                loss = diffusion(videos) / 2
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            losses.append(2 * loss.item())
            print(f'{(time.monotonic() - start) / 60:.1f} minutes, step {steps}, loss {losses[-1]:.3f}', flush=True)

    videos = diffusion.sample(batch_size=args.samples).clamp(0, 1)
    video_tensor_to_gif(videos, Path(args.out))
    print(json.dumps({'steps': steps, 'loss': losses[-1], 'seconds': round(time.monotonic() - start),
                      'grade': shapes.grade_all(videos)}))


if __name__ == '__main__':
    main()

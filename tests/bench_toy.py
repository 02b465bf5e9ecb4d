"""What the public package's own recipe makes of the toy world in the same minutes. Needs data/shapes from train.py.

    python tests/bench_toy.py --minutes 10 --samples 4

Its network (dim 64), loss (noise, L1), optimiser (Adam, 1e-4), batch (32, twice per step) and sampler (1000
steps) are the defaults of its README and its Trainer, which itself cannot run without CUDA; the averaging of
weights begins only at step 2000 there, so the weights are sampled as they are. It takes no captions.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from video_diffusion_pytorch import GaussianDiffusion, Unet3D
from video_diffusion_pytorch.video_diffusion_pytorch import Dataset

from video_diffusion import shapes, video_tensor_to_gif
from video_diffusion.training.memory import keep_freed_memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', default='data/shapes')
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--samples', type=int, default=4, help='(default: 4; each takes a minute or more)')
    parser.add_argument('--dim', type=int, default=64)
    parser.add_argument('--out', default='results_peer.gif')
    args = parser.parse_args()
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

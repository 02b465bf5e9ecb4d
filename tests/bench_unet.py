"""The U-Net, its training step and its data against video-diffusion-pytorch 0.6.3: time and memory.

    python tests/bench_unet.py                                          everything: about ten minutes on two quiet cores
    python tests/bench_unet.py --cases d16 --settings tuned --repeat 5  one network, one allocator
    python tests/bench_unet.py --cases loader

Every number comes from a fresh process; theirs and ours take turns, `--repeat` times. A ratio is ours / theirs, the
median over the turns, with the smallest and the largest behind it. Time on the CPU is that of the process on one thread,
so that other work on the machine counts little, and two processes run side by side; on CUDA, and with `--threads 2`, for
a quiet machine, it is wall time.

    setting   on a CPU the allocator: `stock`, or `tuned` as train.py tunes it (memory.py), for both packages;
              on CUDA the precision: fp32, or bf16 by autocast
    ours      `plain`, `lean` (Unet3D(checkpoint_activations=True)) or `compiled` (torch.compile), each against plain theirs
    step      loss, forward and backward        forward   the network without gradient      sample   one step of DDPM
    update    one step of Adam and of the EMA, each package in its own way
    floor     the part of our plain step that is inside convolutions and matrix products, as a share of their whole step
    peak MB   of the first step beyond the loaded model: resident set on the CPU, `max_memory_allocated` on CUDA
    saved MB  what autograd keeps between forward and backward, weights aside
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
from bench_vae import clock, peak, reset_peak
from torch.utils._python_dispatch import TorchDispatchMode

CASES = {                       # network, (b c f h w) of its batch, turns: None as --repeat says
    'd16':    (dict(dim=16), (4, 3, 8, 32, 32), None),
    'd64':    (dict(dim=64), (4, 3, 5, 32, 32), None),
    'd64x64': (dict(dim=64), (2, 3, 10, 64, 64), 1),              # minutes on a CPU
    'd64b32': (dict(dim=64), (32, 3, 10, 64, 64), None),          # for a GPU
}
TIMES = ('step', 'forward', 'sample', 'update')
MATRIX_WORK = ('aten::convolution', 'aten::convolution_backward', 'aten::mm', 'aten::addmm', 'aten::bmm', 'aten::baddbmm')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--cases', nargs='+', choices=(*CASES, 'loader'))
    parser.add_argument('--settings', nargs='+', choices=('stock', 'tuned', 'fp32', 'bf16'))
    parser.add_argument('--ours', nargs='+', choices=('plain', 'lean', 'compiled'))
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--side-by-side', type=int, help='processes at a time (default: 2 on a CPU, 1 on a GPU)')
    parser.add_argument('--threads', type=int, default=1, help='of a process on a CPU')
    parser.add_argument('--job', help='used by this script itself')
    args = parser.parse_args()
    if args.job:
        return print(json.dumps(run_job(json.loads(args.job))))
    on_cpu = args.device == 'cpu'
    cases = args.cases or ['d16', 'd64', 'd64x64', *([] if on_cpu else ['d64b32']), 'loader']
    settings = args.settings or (['stock', 'tuned'] if on_cpu else ['fp32', 'bf16'])
    side_by_side = args.side_by_side or (max(1, min(2, os.cpu_count()) // args.threads) if on_cpu else 1)
    print(f'{args.device}, torch {torch.__version__}, {args.repeat} turns\n')
    results = {}
    if networks := [case for case in cases if case != 'loader']:
        print('| case | setting | ours | step s, ours | theirs |', ' | '.join(TIMES), '| floor | peak MB | theirs | ratio '
              '| saved MB | theirs | ratio |\n' + '| --- ' * 16 + '|', flush=True)
        for case in networks:
            for setting in settings:
                # What recomputing saves does not depend on the allocator, so stock is spared the time.
                variants = args.ours or ['plain', *(['lean'] if setting != 'stock' else []), *([] if on_cpu else ['compiled'])]
                turns = take_turns(['theirs', *variants], CASES[case][2] or args.repeat, side_by_side,
                                   case=case, setting=setting, device=args.device, threads=args.threads)
                for variant in variants:
                    print(row(case, setting, variant, turns), flush=True)
                results[f'{case} {setting}'] = turns
    if 'loader' in cases:
        with tempfile.TemporaryDirectory() as folder:
            from video_diffusion import shapes
            shapes.make_shapes(folder, 64, image_size=64, num_frames=20)
            turns = results['loader'] = take_turns(['theirs', 'plain'], args.repeat, side_by_side, case='loader', folder=folder)
        print('\n| clips/s, one thread | ours | theirs | ratio |\n| --- | --- | --- | --- |')
        for epoch in ('first', 'later'):
            ours, theirs = ([turn[epoch] for turn in turns[who]] for who in ('plain', 'theirs'))
            print(f'| {epoch} epoch | {median(ours):.0f} | {median(theirs):.0f} | {ratio(ours, theirs)} |')
    print('\n' + json.dumps(results))


def take_turns(who, count, side_by_side, **job):
    """For each of `who` its results, one for each turn."""
    def measure(name):
        threads = str(job.get('threads', 1))
        environment = dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TQDM_DISABLE='1')
        out = subprocess.run([sys.executable, __file__, '--job', json.dumps(dict(job, who=name))], env=environment,
                             text=True, stdout=subprocess.PIPE, check=True, timeout=3600).stdout
        return json.loads(out.strip().split('\n')[-1])
    with ThreadPoolExecutor(side_by_side) as pool:
        results = list(pool.map(measure, who * count))
    return {name: results[i::len(who)] for i, name in enumerate(who)}


def row(case, setting, variant, turns):
    def values(who, key):
        return [turn[key] for turn in turns[who]]
    cells = [case, setting, variant, *(f'{median(values(who, "step")):.2f}' for who in (variant, 'theirs'))]
    cells += [ratio(values(variant, key), values('theirs', key)) for key in TIMES]
    cells += [ratio(values('plain', 'floor'), values('theirs', 'step')) if 'floor' in turns.get('plain', [{}])[0] else '']
    for key in ('peak', 'saved'):
        ours, theirs = values(variant, key), values('theirs', key)
        cells += [f'{median(ours) / 2 ** 20:.0f}', f'{median(theirs) / 2 ** 20:.0f}', ratio(ours, theirs)]
    return '| ' + ' | '.join(cells) + ' |'


def ratio(ours, theirs):
    each = [a / b for a, b in zip(ours, theirs)]
    return f'{median(each):.2f}' + (f' ({min(each):.2f}-{max(each):.2f})' if len(each) > 1 else '')


# ---- in the process that is measured

def run_job(job):
    if job['case'] == 'loader':
        return measure_loader(job)
    torch.manual_seed(0)
    config, shape, _ = CASES[job['case']]
    device = torch.device(job['device'])
    if job['setting'] == 'tuned':
        from video_diffusion.training.memory import keep_freed_memory
        keep_freed_memory()
    diffusion, update = (build_theirs if job['who'] == 'theirs' else build_ours)(config, shape, job['who'], device)
    unet, video = diffusion.denoise_fn, torch.rand(shape, device=device)
    t = torch.randint(0, 2, shape[:1], device=device)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=job['setting'] == 'bf16')

    def step():
        with autocast():
            loss = diffusion(video)
        loss.backward()

    @torch.no_grad()
    def forward():
        with autocast():
            unet(video, t)

    def sample():
        with autocast():                                           # two steps, for that is all the schedule has
            diffusion.sample(batch_size=len(video), **({} if job['who'] == 'theirs' else {'progress': False}))

    before = reset_peak(device)
    step()
    result = dict(peak=peak(device) - before)
    update()                                                       # the first one makes Adam's state
    unet.zero_grad()
    result['saved'] = saved_bytes(unet, lambda: diffusion(video), autocast)
    for name, work, rounds in (('forward', forward, 1), ('sample', sample, 1), ('step', step, 1), ('update', update, 5)):
        if device.type == 'cuda':
            work()                                                 # cuDNN chooses, torch.compile compiles
            rounds = 10
        now = time.perf_counter if job['threads'] > 1 else partial(clock, device)
        start = now()
        for _ in range(rounds):
            work()
        result[name] = (now() - start) / rounds
    result['sample'] /= diffusion.num_timesteps
    if job['who'] == 'plain' and job['setting'] != 'stock' and job['threads'] == 1:
        unet.zero_grad()
        with MatrixWork(device) as floor:
            step()
        result['floor'] = floor.seconds
    return result


def build_ours(config, shape, variant, device):
    from video_diffusion import GaussianDiffusion, Unet3D
    from video_diffusion.training.ema import EMA
    unet = Unet3D(**config, checkpoint_activations=variant == 'lean')
    diffusion = GaussianDiffusion(unet, image_size=shape[-1], num_frames=shape[2], timesteps=2).to(device)
    if variant == 'compiled':
        unet.compile()
    optimizer, ema = torch.optim.Adam(diffusion.parameters(), lr=1e-4, fused=True), EMA(diffusion, 0.995)

    def update():
        optimizer.step()
        ema.update()
    return diffusion, update


def build_theirs(config, shape, variant, device):
    from video_diffusion_pytorch import GaussianDiffusion, Unet3D
    from video_diffusion_pytorch.video_diffusion_pytorch import EMA
    diffusion = GaussianDiffusion(Unet3D(**config), image_size=shape[-1], num_frames=shape[2], timesteps=2).to(device)
    optimizer, ema, average = torch.optim.Adam(diffusion.parameters(), lr=1e-4), EMA(0.995), copy.deepcopy(diffusion)

    def update():
        optimizer.step()
        ema.update_model_average(average, diffusion)
    return diffusion, update


def saved_bytes(unet, loss, context=nullcontext):
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept = {}

    def pack(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor.untyped_storage().nbytes()      # the graph keeps it, so no other gets its address
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context():
        graph = loss()
    del graph
    return sum(kept.values())


class MatrixWork(TorchDispatchMode):
    """Adds up the time inside convolutions and matrix products, of forward and backward."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seconds = device, 0.

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name not in MATRIX_WORK:
            return function(*args, **(kwargs or {}))
        start = clock(self.device)
        result = function(*args, **(kwargs or {}))
        self.seconds += clock(self.device) - start
        return result


def measure_loader(job):
    """Clips per CPU second of 10 of their 20 frames, as floats in batches of 8: the first time, and later."""
    if job['who'] == 'theirs':
        from torch.utils.data import DataLoader
        from video_diffusion_pytorch.video_diffusion_pytorch import Dataset
        loader = DataLoader(Dataset(job['folder'], 64, num_frames=10), batch_size=8, shuffle=True)

        def epoch():
            return [len(batch) for batch in loader]
    else:
        from video_diffusion.data.dataset import GifDataset, batches
        data = batches(GifDataset(job['folder'], 64, num_frames=10), 8, num_workers=0)

        def epoch():
            return [len((videos.float() / 255)) for videos, _ in (next(data) for _ in range(8))]
    speeds = []
    for _ in range(2):
        start = time.process_time()
        clips = sum(epoch())
        speeds.append(clips / (time.process_time() - start))
    return dict(first=speeds[0], later=speeds[1])


if __name__ == '__main__':
    main()

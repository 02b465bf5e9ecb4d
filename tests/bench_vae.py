"""The VAEs against diffusers': time and peak memory, same weights, a fresh process for every number.

    python tests/bench_vae.py                                  on the CPU, a network of half the width
    python tests/bench_vae.py --dim 128 --cases image 17x64x64 the full width
    python tests/bench_vae.py --device cuda --dim 128 --dtype bfloat16 --cases image 49x480x720
    python tests/bench_vae.py --dim 128 --cases temporal       the temporal-decoder VAE, 14x256x256

`temporal` is TemporalVAE, every other case CausalVAE.

Memory is what the operation needs beyond the loaded model: on the CPU the peak of the resident set less what
was resident before, on CUDA `max_memory_allocated` less what was allocated. Time on the CPU is that of the
process on one thread, so that other work on the machine does not count; on CUDA it is wall time.
`whole` hands the clip through the network at once, `chunks` 8 frames or 2 latent frames at a time, which is
what diffusers does by default; the numbers that come out are the same in each pair.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--dim', type=int, default=64)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--cases', nargs='+',
                        default=['image', '17x64x64', '49x128x128', 'stream', 'temporal', 'processes'])
    parser.add_argument('--repeat', type=int, default=1)
    parser.add_argument('--job', help='used by this script itself')
    args = parser.parse_args()
    if args.job:
        return print(json.dumps(run_job(json.loads(args.job))))
    with tempfile.TemporaryDirectory() as folder:
        save_weights(folder, args.dim, args.cases)
        common = dict(folder=f'{folder}/causal', device=args.device, dtype=args.dtype, repeat=args.repeat)
        print(f'dim {args.dim}, {args.dtype} on {args.device}, torch {torch.__version__}\n')
        if pairs := [case for case in args.cases if case != 'processes']:
            compare(pairs, common)
        if 'processes' in args.cases:
            compare_processes(common)


def compare(cases, common):
    print('| case | ours s | theirs s | ours / theirs | ours MB | theirs MB | ours / theirs |')
    print('| --- | --- | --- | --- | --- | --- | --- |', flush=True)
    for case in cases:
        size = {'image': '1x256x256', 'stream': '121x64x64', 'temporal': '14x256x256'}.get(case, case)
        for direction in ['decode'] if case == 'stream' else ['encode', 'decode']:
            for mode in {'image': ['whole'], 'temporal': ['whole'], 'stream': ['chunks']}.get(case, ['whole', 'chunks']):
                job = dict(common, size=size, direction=direction, mode=mode, stream=case == 'stream')
                if case == 'temporal':
                    job['folder'] = job['folder'].replace('causal', 'temporal')
                ours, theirs = (answer(start_process(dict(job, who=who))) for who in ('ours', 'theirs'))
                cells = [f'{ours[k]:{form}} | {theirs[k]:{form}} | {ours[k] / theirs[k]:.2f}'
                         for k, form in [('s', '.2f'), ('mb', '.0f')]]
                print(f'| {case} {direction}, {mode} | {cells[0]} | {cells[1]} |', flush=True)


def compare_processes(common):
    print('\n| processes | operation | MB per process, largest | of one process | MB sent, all together |')
    print('| --- | --- | --- | --- | --- |', flush=True)
    for direction, size in [('decode', '49x64x64'), ('train', '17x64x64')]:
        alone = None
        for number in (1, 2, 4):
            with tempfile.TemporaryDirectory() as store:
                job = dict(common, size=size, direction=direction, who='ours', mode='whole', stream=False,
                           processes=number, store=f'{store}/store')
                children = [start_process(dict(job, rank=rank)) for rank in range(number)]
                results = [answer(child) for child in children]
            largest = max(result['mb'] for result in results)
            alone = alone or largest
            print(f'| {number} | {direction} {size} | {largest:.0f} | {largest / alone:.2f} '
                  f'| {sum(result["sent"] for result in results):.1f} |', flush=True)


def start_process(job):
    environment = dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    quiet = subprocess.DEVNULL if job['who'] == 'theirs' else None            # it prints advice on every load
    return subprocess.Popen([sys.executable, __file__, '--job', json.dumps(job)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=quiet)


def answer(child):
    out, _ = child.communicate(timeout=1800)
    assert child.returncode == 0, 'a measured process failed, see above'
    return json.loads(out.strip().split('\n')[-1])


# ---- in the process that is measured

def save_weights(folder, dim, cases):
    from diffusers import AutoencoderKLCogVideoX, AutoencoderKLTemporalDecoder
    torch.manual_seed(0)
    if cases != ['temporal']:
        AutoencoderKLCogVideoX(
            block_out_channels=(dim, 2 * dim, 2 * dim, 4 * dim), down_block_types=('CogVideoXDownBlock3D',) * 4,
            up_block_types=('CogVideoXUpBlock3D',) * 4).save_pretrained(f'{folder}/causal')
    if 'temporal' in cases:
        AutoencoderKLTemporalDecoder(
            block_out_channels=(dim, 2 * dim, 4 * dim, 4 * dim), layers_per_block=2,
            down_block_types=('DownEncoderBlock2D',) * 4).save_pretrained(f'{folder}/temporal')


def run_job(job):
    device, dtype = torch.device(job['device']), getattr(torch, job['dtype'])
    frames, height, width = map(int, job['size'].split('x'))
    operation = (ours if job['who'] == 'ours' else theirs)(job, device, dtype)
    torch.manual_seed(0)
    video = torch.rand(1, 3, frames, height, width, device=device, dtype=dtype)
    channels, latents = (4, frames) if is_temporal(job) else (16, 1 + (frames - 1) // 4)
    z = torch.randn(1, channels, latents, height // 8, width // 8, device=device, dtype=dtype)
    x = z if job['direction'] == 'decode' else video
    if device.type == 'cuda':
        operation(x)                                 # cuDNN chooses its algorithms
    sent = count_bytes() if 'rank' in job else [0]
    before, start = reset_peak(device), clock(device)
    for _ in range(job['repeat']):
        operation(x)
    return dict(s=(clock(device) - start) / job['repeat'], mb=(peak(device) - before) / 2 ** 20,
                sent=sum(sent) / 2 ** 20 / job['repeat'])


def is_temporal(job):
    return job['folder'].endswith('temporal')


def ours(job, device, dtype):
    from video_diffusion.vae.frame_shares import split_frames
    from video_diffusion.weights.cogvideox_vae import causal_vae_from_diffusers
    from video_diffusion.weights.svd_vae import temporal_vae_from_diffusers
    read = temporal_vae_from_diffusers if is_temporal(job) else causal_vae_from_diffusers
    vae = read(job['folder']).to(device, dtype).eval()
    chunks = job['mode'] == 'chunks'
    if 'rank' in job:
        return shared(job, vae, split_frames)
    if job['stream']:
        def operation(z):
            for frames in vae.decode_stream(z.split(2, dim=2)):
                del frames
    elif job['direction'] == 'decode':
        def operation(z): return vae.decode(z, chunk=2 if chunks else None)
    else:
        def operation(video): return vae.encode(video, chunk=8 if chunks else None)
    return torch.no_grad()(operation)


def theirs(job, device, dtype):
    from diffusers import AutoencoderKLCogVideoX, AutoencoderKLTemporalDecoder
    if is_temporal(job):                             # frames are a batch of images, and come back as one
        vae = AutoencoderKLTemporalDecoder.from_pretrained(job['folder']).to(device, dtype).eval()
        if job['direction'] == 'decode':
            return torch.no_grad()(lambda z: vae.decode(z[0].transpose(0, 1), num_frames=z.shape[2]).sample)
        return torch.no_grad()(lambda video: vae.encode(video[0].transpose(0, 1)).latent_dist)
    vae = AutoencoderKLCogVideoX.from_pretrained(job['folder']).to(device, dtype).eval()
    if job['mode'] == 'whole':
        vae.num_latent_frames_batch_size = vae.num_sample_frames_batch_size = 10 ** 6
    if job['direction'] == 'decode':
        return torch.no_grad()(lambda z: vae.decode(z).sample)
    return torch.no_grad()(lambda video: vae.encode(video).latent_dist)


def shared(job, vae, split_frames):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{job["store"]}', rank=job['rank'],
                            world_size=job['processes'], timeout=timedelta(minutes=20))
    group = dist.group.WORLD
    if job['processes'] > 1:
        vae.context_parallel(group)

    def decode(z):
        with torch.no_grad():
            vae.decode(split_frames(z, group))

    def train(video):
        reconstruction, posterior = vae(split_frames(video, group, 4), sample=False)
        (reconstruction.square().sum() + posterior.kl().sum()).backward()
    return decode if job['direction'] == 'decode' else train


def count_bytes():
    import torch.distributed as dist
    sent, real = [], (dist.batch_isend_irecv, dist.all_gather, dist.all_reduce)

    def batch_isend_irecv(operations):
        sent.append(sum(op.tensor.nbytes for op in operations if op.op is dist.isend))
        return real[0](operations)

    def all_gather(parts, x, group):
        sent.append(x.nbytes * (group.size() - 1))
        return real[1](parts, x, group=group)

    def all_reduce(x, group):
        sent.append(x.nbytes * (group.size() - 1))
        return real[2](x, group=group)
    dist.batch_isend_irecv, dist.all_gather, dist.all_reduce = batch_isend_irecv, all_gather, all_reduce
    return sent


def clock(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def reset_peak(device):
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path('/proc/self/clear_refs').write_text('5')
    return resident('VmRSS')


def peak(device):
    return torch.cuda.max_memory_allocated() if device.type == 'cuda' else resident('VmHWM')


def resident(field):
    line = next(line for line in Path('/proc/self/status').read_text().split('\n') if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == '__main__':
    main()

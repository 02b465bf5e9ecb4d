"""What only a GPU can tell: are its numbers right, how fast is it, does it learn, do several processes agree?

    python tests/gpu.py                       all four parts, under 8 minutes on an H100; again: only what is missing
    python tests/gpu.py --parts 1 4
    python tests/gpu.py --device cpu --tiny   seconds: that the script itself does not fail on the day

Every result is printed and written at once, a line of JSON in --out. At the end comes a table for the README.
"""

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault('TQDM_DISABLE', '1')
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_day import CHECKS, Day, check, compare, distance  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from video_diffusion import (  # noqa: E402
    CausalVAE,
    DiT,
    GaussianDiffusion,
    TemporalVAE,
    Trainer,
    Unet3D,
    add_lora,
    samplers,
    shapes,
)
from video_diffusion.distributed import Processes  # noqa: E402
from video_diffusion.training import shard  # noqa: E402
from video_diffusion.training.memory import estimate  # noqa: E402
from video_diffusion.training.trainer import fuse  # noqa: E402

ROOT = Path(__file__).parents[1]
MATRIX_WORK = re.compile('gemm|conv|wgrad|dgrad|fprop|cutlass|nvjet|xmma|cudnn|mm$', re.IGNORECASE)   # names of kernels


# ---- 1: the numbers

def networks(day: Day) -> dict[str, tuple[nn.Module, tuple, object]]:
    """Each network, its input on the CPU, and how it is called."""
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 4, 16, 16), torch.tensor([3, 700])
    dit = DiT(64, dim_head=32, depth=2)
    for weight in dit.parameters():
        nn.init.normal_(weight, std=0.05)                                   # its gates begin shut
    vaes = CausalVAE(dim=16, dim_mults=(1, 2), latent_channels=4, time_compression=2, norm_groups=8), TemporalVAE(
        dim=16, dim_mults=(1, 2), norm_groups=8)
    return {
        'U-Net': (Unet3D(16, dim_mults=(1, 2)), x, lambda network, x: network(x, t.to(x.device))),
        'DiT': (dit, x, lambda network, x: network(x, t.to(x.device))),
        'CausalVAE': (vaes[0], x.sigmoid(), lambda vae, x: vae(x, sample=False)[0]),
        'TemporalVAE': (vaes[1], x.sigmoid(), lambda vae, x: vae(x, sample=False)[0]),
    }


def answer(network, x, call, device, dtype=None) -> list[torch.Tensor]:
    """The output, and the gradient of the first weight."""
    network = copy.deepcopy(network).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        output = call(network, x.to(device))
    output.float().square().mean().backward()
    return [output.detach(), next(weight for weight in network.parameters() if weight.grad is not None).grad]


@check(1)
def parity_of_networks(day: Day) -> dict:
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    bounds = {'float32': (None, 1e-4), 'bfloat16': (torch.bfloat16, 0.1), 'float16': (torch.float16, 0.02)}
    errors = {}
    for name, (network, x, call) in networks(day).items():
        expected = answer(network, x, call, torch.device('cpu'))
        for kind, (dtype, bound) in bounds.items():
            if day.cuda or kind != 'float16':
                got = answer(network, x, call, day.device, dtype)
                errors[f'{name} {kind}'] = max(map(distance, got, expected)), bound
    torch.backends.cudnn.allow_tf32 = True
    bad = [name for name, (error, bound) in errors.items() if not error < bound]
    return {**{name: float(f'{error:.2g}') for name, (error, _) in errors.items()}, 'wrong': bad}


@check(1)
def parity_of_samplers(day: Day) -> dict:
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2)), image_size=8, num_frames=3, objective='v')
    noise, errors = torch.randn(2, 3, 3, 8, 8), {}
    own = samplers.randn_like
    for name in samplers.SAMPLERS:
        videos = []
        for device in (torch.device('cpu'), day.device):
            torch.manual_seed(1)                                            # fresh noise is drawn on the CPU for both
            samplers.randn_like = lambda x, generator: torch.randn(x.shape).to(x.device)
            videos.append(diffusion.to(device).sample(noise=noise.to(device), sampler=name, steps=4, progress=False))
        errors[name] = distance(videos[1], videos[0])
    samplers.randn_like = own
    return {**{name: float(f'{error:.2g}') for name, error in errors.items()},
            'wrong': [name for name, error in errors.items() if error > 1e-3]}


@check(1)
def three_steps_with_everything(day: Day) -> dict:
    """Mixed precision, its scaler, the average, torch.compile and recomputed activations: finite, and one graph."""
    from torch._dynamo.utils import counters
    counters.clear()
    with tempfile.TemporaryDirectory() as folder:
        clips = shapes.make_shapes(Path(folder) / 'clips', 4, image_size=16, num_frames=3)
        diffusion = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2), checkpoint_activations=True), image_size=16, num_frames=3,
                                      timesteps=10)
        trainer = Trainer(diffusion, clips, train_batch_size=2, train_num_steps=3, gradient_accumulate_every=1, log_every=1,
                          save_and_sample_every=3, num_sample_rows=1, sample_steps=2, max_grad_norm=1., amp=day.cuda,
                          compile=day.cuda, results_folder=Path(folder) / 'results', processes=Processes(device=day.device))
        losses = []
        trainer.train(log_fn=lambda row: losses.append(row['loss']))
    graphs = counters['stats']['unique_graphs']
    return dict(losses=[round(loss, 4) for loss in losses], graphs=graphs, wrong=[] if graphs <= 2 else ['graphs'])


# ---- 2: speed

def step_of(day: Day, diffusion, dtype, clips: int | None = None):
    torch.set_float32_matmul_precision('high')
    video = torch.rand(clips or day.shape[0], *day.shape[1:], device=day.device)

    def step():
        diffusion.zero_grad()
        with torch.autocast(day.device.type, dtype, enabled=dtype is not None):
            loss = diffusion(video)
        loss.backward()
    return step


def their_diffusion(day: Day):
    from video_diffusion_pytorch import GaussianDiffusion as TheirDiffusion
    from video_diffusion_pytorch import Unet3D as TheirUnet
    unet = TheirUnet(day.dim, dim_mults=day.mults)
    return TheirDiffusion(unet, image_size=day.shape[-1], num_frames=day.shape[2]).to(day.device)


@check(2)
def unet_step(day: Day) -> dict:
    dtype = day.half if day.cuda else None
    ours = {'plain': day.unet(), 'lean': day.unet(checkpoint_activations=True)}
    works = {'theirs': step_of(day, their_diffusion(day), dtype)}
    works |= {name: step_of(day, day.diffusion(unet).to(day.device), dtype) for name, unet in ours.items()}
    return compare(day, works, goal=dict(time=0.25, memory=0.4))


@check(2)
def unet_step_compiled(day: Day) -> dict:
    """And its arithmetic, as a share of what one large matrix product reaches. Goal 0.4."""
    theirs = step_of(day, their_diffusion(day), day.half if day.cuda else None)
    return compiled(day, day.unet(), dict(theirs=theirs), goal=dict(time=0.25, memory=0.4))


@check(2)
def dit_step_compiled(day: Day) -> dict:
    """The same of a transformer. Goal 0.5."""
    return compiled(day, DiT(32, dim_head=16, depth=1) if day.tiny else DiT(1024, dim_head=64, depth=12), {}, clips=4)


def compiled(day: Day, network: nn.Module, others: dict, clips: int | None = None, **goal) -> dict:
    """Its step beside others, the seconds that it takes to compile, and its share of the peak."""
    step = step_of(day, day.diffusion(network).to(day.device), day.half if day.cuda else None, clips)
    work = operations(step)
    start = day.clock()
    if day.cuda:
        fuse(network)
    step()
    seconds = round(day.clock() - start, 1)
    result = compare(day, {**others, 'compiled': step}, **goal)
    return dict(result, compile_s=seconds, share=round(work / result['compiled']['s'] / day.peak(), 3))


def operations(step) -> int:
    """Of its convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@check(2)
def memory_estimate(day: Day) -> dict:
    """Against what the same step really takes, in float32."""
    diffusion = day.diffusion(day.unet())
    need, clips = estimate(diffusion, device=day.device), max(1, day.shape[0] // 4)
    diffusion, video = diffusion.to(day.device), torch.rand(clips, *day.shape[1:], device=day.device)
    real = day.peak_mb(lambda: diffusion(video).backward())
    guess = (need.gradients + clips * need.per_clip) / 2 ** 20
    return dict(estimate_mb=round(guess, 1), real_mb=round(real, 1), ratio=round(guess / real, 3) if real else None)


@check(2)
def where_the_rest_goes(day: Day) -> dict:
    """The kernels that a plain U-Net step spends most of its time in, percent, and what share of the peak it would reach if
    it were these alone, without a gap: all of them, or those of convolutions and matrix products, which is the floor."""
    return profiled(day, day.unet())


@check(2)
def where_it_goes_when_wide(day: Day) -> dict:
    """The same of a network four times as wide: more arithmetic for what is moved."""
    return profiled(day, Unet3D(4 * day.dim, dim_mults=day.mults), None if day.tiny else 24)


def profiled(day: Day, network: nn.Module, clips: int | None = None) -> dict:
    from torch.profiler import ProfilerActivity, profile
    step = step_of(day, day.diffusion(network).to(day.device), day.half if day.cuda else None, clips)
    work, seconds = operations(step), day.seconds(step, 2)
    with profile(activities=[ProfilerActivity.CUDA if day.cuda else ProfilerActivity.CPU]) as profiled:      # both: counted twice
        step()
        day.clock()
    key = 'self_device_time_total' if day.cuda else 'self_cpu_time_total'
    times = {event.key: getattr(event, key) / 1e6 for event in profiled.key_averages() if getattr(event, key)}
    whole, floor = sum(times.values()), sum(time for name, time in times.items() if MATRIX_WORK.search(name))
    most = sorted(times, key=times.get, reverse=True)[:8]
    return {**{name[:60]: round(100 * times[name] / whole, 1) for name in most}, 'kernels_s': round(whole, 4),
            **{f'share{of}': round(work / s / day.peak(), 3) for of, s in (('', seconds), ('_of_kernels', whole), ('_floor', floor))}}


@check(2)
def vae_decode(day: Day) -> dict:
    import bench_vae
    size, dim = ('5x16x16', 32) if day.tiny else ('49x480x720', 128)
    with tempfile.TemporaryDirectory() as folder:
        bench_vae.save_weights(folder, dim, ['image'])
        job = dict(folder=f'{folder}/causal', device=str(day.device), dtype='bfloat16' if day.cuda else 'float32', repeat=1,
                   size=size, direction='decode', mode='chunks', stream=False)
        result = {who: bench_vae.run_job(dict(job, who=who)) for who in ('ours', 'theirs')}
    return {**{who: {name: round(value, 3) for name, value in each.items()} for who, each in result.items()},
            'time': round(result['ours']['s'] / result['theirs']['s'], 3),
            'memory': round(result['ours']['mb'] / result['theirs']['mb'], 3) if result['theirs']['mb'] else None,
            'goal': dict(time=0.67, memory=0.6)}


@check(2)
def dit_block(day: Day) -> dict:
    """Two blocks of the 2B model, forward and backward, against diffusers; and a step of LoRA on ours."""
    import bench_dit
    config, clips, grid = (dict(bench_dit.SMALL, num_layers=1), 1, (1, 4, 4)) if day.tiny else bench_dit.ON_GPU['2b-17550']
    calls = bench_dit.prepare(config, clips, grid, 'rope', day.device, day.half if day.cuda else torch.float32)

    def step(call):
        return lambda: call().square().mean().backward()
    works = {name: step(call) for name, call in calls.items()}
    dit = DiT(32, dim_head=16, depth=1) if day.tiny else DiT(1920, 4096, 16, depth=2, text_length=226, time_dim=512)
    add_lora(dit, rank=4)
    dit = dit.to(day.device, day.half if day.cuda else torch.float32)
    x = torch.randn(1, dit.channels, grid[0], 2 * grid[1], 2 * grid[2], device=day.device)
    cond = torch.randn(1, 226, 4096, device=day.device) if dit.has_cond else None
    t = torch.tensor([500], device=day.device)
    works['LoRA'] = step(lambda: dit(x, t, cond))
    return compare(day, works)


# ---- 3: learning

@check(3)
def training_run(day: Day) -> dict:
    """Some minutes with today's defaults of a GPU."""
    return graded(day, 'defaults')


@check(3)
def training_run_in_half_precision(day: Day) -> dict:
    return graded(day, 'amp', '--amp') if day.cuda else {}


def graded(day: Day, name: str, *flags: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        steps = [] if day.tiny else ['--steps', '1500', '--sample-every', '1500']
        command = [sys.executable, ROOT / 'train.py', '--device', day.device.type, '--results', 'results', *steps, *flags]
        environment = dict(os.environ, **({'VIDEO_DIFFUSION_TINY': '1'} if day.tiny else {}))
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        gif = Path(folder) / 'results' / 'graded.gif'
        if gif.is_file() and not day.tiny:
            (ROOT / f'gpu-{name}.gif').write_bytes(gif.read_bytes())
    grade = re.search(r'grade of .*', done.stdout)
    return dict(grade=grade[0] if grade else done.stderr[-300:], seconds=round(time.perf_counter() - start))


# ---- 4: processes

@check(4)
def one_process_in_a_group(day: Day) -> dict:
    """FSDP and DDP over NCCL, with nobody else in the group: the weights of either are those of the plain model."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group('nccl' if day.cuda else 'gloo', init_method=f'file://{folder}/store', rank=0, world_size=1)
        torch.manual_seed(0)
        plain = GaussianDiffusion(Unet3D(8, dim_mults=(1, 2)), image_size=8, num_frames=3)
        shared = copy.deepcopy(plain).to(day.device)
        video, t, noise = torch.rand(2, 3, 3, 8, 8), torch.tensor([5, 500]), torch.randn(2, 3, 3, 8, 8)
        given = [each.to(day.device) for each in (video, noise, t)]
        expected = plain(video, None, noise, t)
        shard.shard_weights(shared, Processes(device=day.device))
        loss = shared(given[0], None, given[1], given[2])
        loss.backward()
        saved = shard.whole(shared.state_dict(), keep=True)
        shard.load(shared, saved)
        copied = all(torch.equal(saved[name].cpu(), value) for name, value in plain.state_dict().items())
        alike = nn.parallel.DistributedDataParallel(copy.deepcopy(plain).to(day.device))
        other = alike(given[0], None, given[1], given[2])
        other.backward()
        dist.destroy_process_group()
    errors = {'FSDP': distance(loss.detach(), expected.detach()), 'DDP': distance(other.detach(), expected.detach())}
    return {**errors, 'wrong': [name for name, error in errors.items() if error > 1e-2] + ([] if copied else ['saved'])}


# ---- the day

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--tiny', action='store_true')
    parser.add_argument('--parts', type=int, nargs='+', default=[1, 2, 3, 4], choices=(1, 2, 3, 4))
    parser.add_argument('--out', type=Path, default=Path('gpu.jsonl'))
    args = parser.parse_args()
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error('there is no GPU here; --device cpu --tiny tries the script itself')
    day = Day(args.device, args.tiny)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    results = {row['check']: row for row in map(json.loads, lines) if row['device'] == day.name and 'error' not in row}
    for name, (part, function) in CHECKS.items():
        if part in args.parts and name not in results:
            results[name] = run(name, part, function, day)
            with open(args.out, 'a') as file:
                file.write(json.dumps(results[name]) + '\n')
            print(json.dumps(results[name]), flush=True)
    print(table(day, results))
    sys.exit(any('error' in row or row.get('wrong') for row in results.values()))


def run(name: str, part: int, function, day: Day) -> dict:
    row, start = dict(check=name, part=part, device=day.name, torch=torch.__version__), time.perf_counter()
    try:
        row |= function(day)
    except Exception as error:                                              # the next check may still tell something
        row |= dict(error=f'{type(error).__name__}: {error}'[:500], trace=traceback.format_exc()[-1500:])
    if day.cuda:
        torch.cuda.empty_cache()
    return {**row, 'seconds': round(time.perf_counter() - start, 1)}


def table(day: Day, results: dict) -> str:
    """For the README."""
    rows = [f'\n| on {day.name}, torch {torch.__version__} | result |', '| --- | --- |']
    for name, row in results.items():
        told = {key: value for key, value in row.items() if key not in ('check', 'part', 'device', 'torch', 'seconds', 'trace')}
        words = ', '.join(f'{key} {json.dumps(value)}' for key, value in told.items())
        rows.append(f'| {name.replace("_", " ")} ({row["seconds"]:.0f} s) | {words.replace("|", "/")} |')
    return '\n'.join(rows)


if __name__ == '__main__':
    main()

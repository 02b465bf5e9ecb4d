"""The diffusion transformer against diffusers' CogVideoXTransformer3DModel: time and peak memory, same weights.

    python tests/bench_dit.py                                   everything: about an hour of one core
    python tests/bench_dit.py --cases 1024 2b-1024 --turns 5
    python tests/bench_dit.py --device cuda --dtype bfloat16    its cases are larger there

A case is named by its video tokens: of a small network (4 blocks, width 384), or one block as wide as the 2B model's. `lean` is
ours with checkpoint_activations=True, against plain theirs. Time on the CPU is that of the process on one thread; the three
take turns in one process, and seconds and ratios are those of the fastest turn, for other programs only ever add to one; the
ratio of the medians is in brackets. Peak memory is what tensors hold at most, as PyTorch's
allocator counts it, beyond weights, their gradients and the input.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import median

os.environ |= dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402  after the number of threads
from bench_vae import clock, reset_peak  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

SMALL = dict(num_attention_heads=6, num_layers=4, time_embed_dim=256, text_embed_dim=64, max_text_seq_length=32)
BLOCK = dict(num_attention_heads=30, num_layers=1, time_embed_dim=512, text_embed_dim=4096, max_text_seq_length=226)
GRIDS = {256: (4, 8, 8), 1024: (4, 16, 16), 4096: (8, 16, 32), 17550: (13, 30, 45)}         # tokens: their frames, rows, columns
CASES = {str(n): (SMALL, 2 if n < 4096 else 1, GRIDS[n]) for n in (256, 1024, 4096)}         # network, clips, grid
CASES |= {f'2b-{n}': (BLOCK, 1, GRIDS[n]) for n in (256, 1024, 4096)}
ON_GPU = {'2b-17550': (dict(BLOCK, num_layers=2), 1, GRIDS[17550])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--cases', nargs='+', choices=(*CASES, *ON_GPU))
    parser.add_argument('--positions', nargs='+', default=['sincos', 'rope'], choices=('sincos', 'rope'))
    parser.add_argument('--turns', type=int, default=5)
    args = parser.parse_args()
    print(f'{args.device}, {args.dtype}, torch {torch.__version__}, {args.turns} turns\n\nratios are ours / theirs\n\n'
          '| tokens | positions | forward s | ratio | step s | ratio | forward MB | ratio | step MB | ratio | lean | its time |\n'
          + '| --- ' * 12 + '|', flush=True)
    for case in args.cases or (CASES if args.device == 'cpu' else [*CASES, *ON_GPU]):
        for positions in args.positions:
            print(row(case, positions, torch.device(args.device), getattr(torch, args.dtype), args.turns), flush=True)


def row(case, positions, device, dtype, turns):
    calls = prepare(*(CASES | ON_GPU)[case], positions, device, dtype)
    cells = [case, positions]
    times = {mode: take_turns(calls, mode, turns, device) for mode in ('forward', 'step')}
    for mode in times:
        cells += [f'{min(times[mode]["ours"]):.3f}', ratio(times[mode], 'ours')]
    for mode in times:
        peaks = {name: peak(call, mode, device) for name, call in calls.items()}
        cells += [f'{peaks["ours"] / 2 ** 20:.0f}', f'{peaks["ours"] / peaks["theirs"]:.2f}']
    cells += [f'{peaks["lean"] / peaks["theirs"]:.2f}', ratio(times['step'], 'lean')]
    return '| ' + ' | '.join(cells) + ' |'


def prepare(config, clips, grid, positions, device, dtype):
    """For each network the function that calls it with the same input."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    f, h, w = grid
    config = dict(config, sample_frames=4 * f - 3, sample_height=2 * h, sample_width=2 * w,
                  use_rotary_positional_embeddings=positions == 'rope')
    torch.manual_seed(0)
    x = torch.randn(clips, 16, f, 2 * h, 2 * w, device=device, dtype=dtype)
    text = torch.randn(clips, config['max_text_seq_length'], config['text_embed_dim'], device=device, dtype=dtype)
    t = torch.arange(1, clips + 1, device=device) * 300
    angles = get_3d_rotary_pos_embed(64, ((0, 0), (h, w)), (h, w), f, device=device) if positions == 'rope' else None
    calls = {}
    for name, network in build(config).items():
        network.to(device, dtype)
        for weight in network.parameters():
            weight.grad = torch.zeros_like(weight)
        calls[name] = lambda network=network: network(x, t, text)
    swapped = x.transpose(1, 2).contiguous()
    calls['theirs'] = lambda: network(swapped, text, t, image_rotary_emb=angles).sample
    with torch.no_grad():
        ours, theirs = calls['ours'](), calls['theirs']().transpose(1, 2)
    assert (ours - theirs).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * theirs.abs().max()
    return calls


def build(config):
    from diffusers import CogVideoXTransformer3DModel

    from video_diffusion import DiT
    from video_diffusion.weights.cogvideox_dit import diffusers_name, diffusers_pieces, dit_config
    theirs = CogVideoXTransformer3DModel(**config)
    for weight in theirs.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    state = diffusers_pieces(theirs.state_dict())
    networks = {name: DiT(**dit_config(theirs.config), checkpoint_activations=name == 'lean') for name in ('ours', 'lean')}
    for network in networks.values():
        network.load_state_dict({name: state[diffusers_name(name)] for name in network.state_dict()})
    return dict(networks, theirs=theirs)


def take_turns(calls, mode, turns, device):
    seconds = {name: [] for name in calls}
    for _ in range(turns + 1):                                   # the first does not count
        for name, call in calls.items():
            start = clock(device)
            run(call, mode)
            seconds[name].append(clock(device) - start)
    return {name: each[1:] for name, each in seconds.items()}


def ratio(seconds, name):
    return f'{min(seconds[name]) / min(seconds["theirs"]):.2f} ({median(seconds[name]) / median(seconds["theirs"]):.2f})'


def peak(call, mode, device):
    if device.type == 'cuda':
        before = reset_peak(device)
        run(call, mode)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(call, mode)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == '[memory]']
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def run(call, mode):
    with torch.set_grad_enabled(mode == 'step'):
        output = call()
    if mode == 'step':
        output.square().mean().backward()


if __name__ == '__main__':
    main()

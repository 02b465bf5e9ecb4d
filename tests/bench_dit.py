"""The diffusion transformer against diffusers' CogVideoXTransformer3DModel: time and peak memory, same weights.

    python tests/bench_dit.py                                   everything: about ten minutes on one quiet core
    python tests/bench_dit.py --cases 1024 2b-1024 --turns 5
    python tests/bench_dit.py --device cuda --dtype bfloat16    its cases are larger there

A case is named by its video tokens: of a small network (4 blocks, width 384), or one block as wide as the 2B model's. Time on
the CPU is that of the process on one thread; theirs and ours take turns in one process, and a ratio is that of the medians.
Peak memory is that of a fresh process each, beyond weights, their gradients and the input. `lean` is ours with
checkpoint_activations=True against plain theirs.
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median

import torch
from bench_vae import clock, peak, reset_peak

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
    parser.add_argument('--job', help='used by this script itself')
    args = parser.parse_args()
    if args.job:
        return print(json.dumps(run_job(**json.loads(args.job))))
    print(f'{args.device}, {args.dtype}, torch {torch.__version__}, {args.turns} turns\n\nratios are ours / theirs\n\n'
          '| tokens | positions | forward s | ratio | step s | ratio | forward MB | ratio | step MB | ratio | lean | its time |\n'
          + '| --- ' * 12 + '|', flush=True)
    for case in args.cases or (CASES if args.device == 'cpu' else [*CASES, *ON_GPU]):
        for positions in args.positions:
            common = dict(case=case, positions=positions, device=args.device, dtype=args.dtype)
            print(row(case, positions, common, args.turns), flush=True)


def row(case, positions, common, turns):
    times = measure(work='time', turns=turns, **common)
    cells = [case, positions]
    for mode in ('forward', 'step'):
        cells += [f'{times[mode]["ours"]:.3f}', f'{times[mode]["ours"] / times[mode]["theirs"]:.2f}']
    for mode in ('forward', 'step'):
        ours, theirs = (measure(work='peak', who=who, mode=mode, **common) for who in ('ours', 'theirs'))
        cells += [f'{ours:.0f}', f'{ours / theirs:.2f}']
    cells += [f'{measure(work="peak", who="lean", mode="step", **common) / theirs:.2f}',
              f'{times["step"]["lean"] / times["step"]["theirs"]:.2f}']
    return '| ' + ' | '.join(cells) + ' |'


def measure(**job):
    environment = dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    out = subprocess.run([sys.executable, __file__, '--job', json.dumps(job)], env=environment, text=True,
                         stdout=subprocess.PIPE, check=True, timeout=3600).stdout
    return json.loads(out.strip().split('\n')[-1])


# ---- in the process that is measured

def run_job(work, case, positions, device, dtype, turns=1, who=None, mode=None):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    config, clips, (f, h, w) = (CASES | ON_GPU)[case]
    config = dict(config, sample_frames=4 * f - 3, sample_height=2 * h, sample_width=2 * w,
                  use_rotary_positional_embeddings=positions == 'rope')
    device, dtype = torch.device(device), getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(clips, 16, f, 2 * h, 2 * w, device=device, dtype=dtype)
    text = torch.randn(clips, config['max_text_seq_length'], config['text_embed_dim'], device=device, dtype=dtype)
    t = torch.arange(1, clips + 1, device=device) * 300
    angles = get_3d_rotary_pos_embed(64, ((0, 0), (h, w)), (h, w), f, device=device) if positions == 'rope' else None
    networks = build(config, f, h, w, who)
    calls = {}
    for name, network in networks.items():
        network.to(device, dtype)
        for weight in network.parameters():
            weight.grad = torch.zeros_like(weight)
        calls[name] = lambda network=network: network(x, t, text)
        if name == 'theirs':
            theirs = x.transpose(1, 2).contiguous()
            calls[name] = lambda network=network: network(theirs, text, t, image_rotary_emb=angles).sample
    if work == 'peak':
        before = reset_peak(device)
        run(calls[who], mode)
        return (peak(device) - before) / 2 ** 20
    ours, reference = calls['ours'](), calls['theirs']().transpose(1, 2)
    assert (ours - reference).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * reference.abs().max()
    return {mode: take_turns(calls, mode, turns, device) for mode in ('forward', 'step')}


def build(config, f, h, w, who):
    """The networks that a job asks for, or with None all three, with the same weights."""
    from diffusers import CogVideoXTransformer3DModel

    from video_diffusion import DiT
    from video_diffusion.weights.cogvideox_dit import diffusers_name, diffusers_pieces, dit_config
    peer = CogVideoXTransformer3DModel(**config)
    for weight in peer.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    if who == 'theirs':
        return {who: peer}
    networks = {name: DiT(**dit_config(peer.config), checkpoint_activations=name == 'lean')
                for name in ([who] if who else ['ours', 'lean'])}
    theirs = diffusers_pieces(peer.state_dict())
    for network in networks.values():
        network.load_state_dict({name: theirs[diffusers_name(name)] for name in network.state_dict()})
    return networks if who else dict(networks, theirs=peer)


def take_turns(calls, mode, turns, device):
    seconds = {name: [] for name in calls}
    for _ in range(turns + 1):                                   # the first does not count
        for name, call in calls.items():
            start = clock(device)
            run(call, mode)
            seconds[name].append(clock(device) - start)
    return {name: median(each[1:]) for name, each in seconds.items()}


def run(call, mode):
    with torch.set_grad_enabled(mode == 'step'):
        output = call()
    if mode == 'step':
        output.square().mean().backward()


if __name__ == '__main__':
    main()

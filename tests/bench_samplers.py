"""Which sampler, how many steps? Draws the same 64 captions of the toy world from the same noise by each, and grades.

    python train.py && python tests/bench_samplers.py results/
    python tests/bench_samplers.py results/ --cases ddim:25 dpm++2m:20

`ddpm:1000` is what the model was trained for; the others try to be as good in fewer steps.
"""

import argparse
import json
import time

from video_diffusion import GaussianDiffusion, shapes
from video_diffusion.distributed import Processes, best_device
from video_diffusion.training.memory import keep_freed_memory
from video_diffusion.training.trainer import sample_many

CASES = ('dpm++2m:10', 'dpm++2m:20', 'ddim:10', 'ddim:20', 'ddim:50', 'dpm++2m_sde:20', 'dpm++2m_sde:50', 'ddpm:20', 'ddpm:100',
         'ddpm:1000')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint')
    parser.add_argument('--cases', nargs='+', default=CASES, metavar='SAMPLER:STEPS')
    parser.add_argument('--count', type=int, default=64)
    parser.add_argument('--cond-scale', type=float, default=2.)
    args = parser.parse_args()
    keep_freed_memory()
    device = best_device()
    diffusion = GaussianDiffusion.from_checkpoint(args.checkpoint).to(device)
    captions = shapes.captions()
    prompts = [captions[i * len(captions) // args.count] for i in range(args.count)]

    print('| sampler | steps | lawful | caption-true | both | seconds |\n| --- | --- | --- | --- | --- | --- |')
    results = []
    for case in args.cases:
        sampler, steps = case.split(':')
        start = time.perf_counter()
        videos = sample_many(diffusion, prompts, args.count, batch_size=16, seed=1, processes=Processes(device=device),
                             cond_scale=args.cond_scale, sampler=sampler, steps=int(steps))
        seconds = time.perf_counter() - start
        grades = shapes.grade_all(videos, prompts)
        percent = ' | '.join(f'{grades[name]:.0f}' for name in ('lawful', 'caption_true', 'both'))
        print(f'| {sampler} | {steps} | {percent} | {seconds:.0f} |',
              flush=True)
        results.append({'sampler': sampler, 'steps': int(steps), 'seconds': round(seconds, 1), **grades})
    print(json.dumps(results))


if __name__ == '__main__':
    main()

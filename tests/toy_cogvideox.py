"""A CogVideoX of the toy world, from nothing: a VAE, a transformer in its latents, and adapters that teach it a colour.

    python tests/toy_cogvideox.py           # some 28 CPU minutes, into ./toy_cogvideox/; what is done is not done again

The parts and commands of the real one, each small enough to be trained here. The transformer sees a world without cyan shapes;
then adapters see nothing but cyan ones. With and without them it is asked for clips of either kind, which the world's own judge
grades: does it draw what it had never seen, and does it still know the rest?
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from video_diffusion import diffusion_from_checkpoint, load_lora, scale_lora, shapes
from video_diffusion.distributed import Processes
from video_diffusion.training.trainer import sample_many

TRAIN = Path(__file__).parent.parent / 'train.py'
FOLDER = Path('toy_cogvideox')
NEW = 'cyan'
RUNS = {                                                   # results: what makes them
    'vae': ['whole', '--stage', 'vae'],
    'dit': ['known', '--network', 'dit', '--vae', 'vae', '--cache-latents', '--held-out', '8', '--steps', '2000'],
    'lora': ['new', '--model', 'dit', '--lora', '16', '--held-out', '8', '--steps', '1500'],
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    make_worlds()
    for results, flags in RUNS.items():
        if not list((FOLDER / results).glob('*.pt')):
            subprocess.run([sys.executable, TRAIN.resolve(), *flags, '--results', results, '--device', 'cpu'], cwd=FOLDER, check=True)
    diffusion = diffusion_from_checkpoint(FOLDER / 'dit')
    load_lora(diffusion, FOLDER / 'lora')
    for strength in (0., 1.):
        scale_lora(diffusion, strength)
        for kind, captions in split(shapes.captions()).items():
            captions = captions * 3 if kind == 'new' else captions[::2]                # 36 of 12, 30 of 60
            videos = sample_many(diffusion, captions, len(captions), batch_size=8, seed=1, processes=Processes(), steps=16)
            grades = shapes.grade_all(videos, captions)
            print(f'{"with" if strength else "without"} adapters, {kind}: {len(captions)} clips, {grades["lawful"]:.0f}% lawful, '
                  f'{grades["caption_true"]:.0f}% caption-true, {grades["both"]:.0f}% both, {grades["colour"]:.0f}% of the right colour')


def make_worlds() -> None:
    """All clips, and the same by whether they show what is new."""
    if (FOLDER / 'new').exists():
        return
    shapes.make_shapes(FOLDER / 'whole', 60 if os.environ.get('VIDEO_DIFFUSION_TINY') else 4000)
    for kind, paths in split(list((FOLDER / 'whole').glob('*.txt')), lambda path: path.read_text()).items():
        (FOLDER / kind).mkdir()
        for path in paths:
            shutil.copy(path, FOLDER / kind)
            shutil.copy(path.with_suffix('.gif'), FOLDER / kind)


def split(items: list, caption=str) -> dict[str, list]:
    return {'known': [item for item in items if NEW not in caption(item)], 'new': [item for item in items if NEW in caption(item)]}


if __name__ == '__main__':
    main()

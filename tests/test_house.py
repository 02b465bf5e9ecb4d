"""The house: arrows between folders run down only, one front door that opens quickly, old checkpoints still load.
Run: pytest tests/test_house.py"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import video_diffusion
from video_diffusion import GaussianDiffusion, checkpoint, diffusion_from_checkpoint

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / 'video_diffusion'
FLOORS = {'': 0, 'networks': 1, 'data': 1, 'vae': 2, 'diffusion': 3, 'training': 4, 'weights': 5}      # a folder sees those below it
OLD = Path(__file__).parent / 'data' / 'checkpoint_before_the_move.pt'


def rooms() -> dict[str, Path]:
    """Every file of the library by its dotted name, without the front doors."""
    return {'.'.join(f.relative_to(LIBRARY).with_suffix('').parts): f for f in LIBRARY.rglob('*.py') if f.name != '__init__.py'}


def imported(name: str, text: str) -> set[str]:
    """The rooms that the room `name` imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = name.split('.')[:-1][:1 + len(name.split('.')) - 1 - node.level]
            base = '.'.join([*package, *([node.module] if node.module else [])])
            found |= {base} | {f'{base}.{alias.name}'.lstrip('.') for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and (node.module or '').startswith('video_diffusion')), f'{name}: write it relative'
    return found & rooms().keys()


def folder(name: str) -> str:
    return name.rpartition('.')[0]


def arrows() -> dict[str, set[str]]:
    return {name: imported(name, path.read_text()) for name, path in rooms().items()}


def test_arrows_between_folders_run_down():
    seen = 0
    for name, targets in arrows().items():
        for target in targets:
            if folder(target) != folder(name):
                assert FLOORS[folder(target)] < FLOORS[folder(name)], f'{name} imports {target}: an arrow up'
                seen += 1
    assert seen > 40                                                  # that we did see imports


def test_no_circle():
    graph = arrows()
    done = set()

    def visit(name, above):
        assert name not in above, f'a circle: {" -> ".join([*above, name])}'
        if name not in done:
            for target in graph[name]:
                visit(target, (*above, name))
            done.add(name)
    for name in graph:
        visit(name, ())


def test_the_reader_of_imports_sees_them():
    source = 'from ..data.gif import a\nfrom . import loop\ndef f():\n    from .. import checkpoint\n'
    assert imported('training.ema', source) == {'data.gif', 'training.loop', 'checkpoint'}
    with pytest.raises(AssertionError):
        imported('training.ema', 'from video_diffusion.data import gif\n')


def test_every_public_name_is_behind_the_front_door():
    assert sorted(video_diffusion.__all__, key=str.lower) == sorted(set(video_diffusion.__all__), key=str.lower)
    for name in video_diffusion.__all__:
        assert getattr(video_diffusion, name) is not None
    from video_diffusion import weights
    for name in weights.__all__:
        assert callable(getattr(weights, name))


def test_importing_brings_in_nothing_heavy():
    """What takes a second, or belongs to an extra, comes when it is used."""
    heavy = {'torchvision', 'transformers', 'av', 'torch.distributed.fsdp', 'torch.distributed.tensor', 'safetensors', 'diffusers'}
    code = f'import sys, video_diffusion, video_diffusion.weights; print(*({heavy!r} & sys.modules.keys()))'
    loaded = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    assert loaded.split() == []


def test_rooms_and_functions_keep_their_size():
    """A room of 350 lines is read in ten minutes. One constructor, with a line for each argument, may be longer than 60 lines."""
    long = {}
    for name, path in rooms().items():
        text = path.read_text()
        assert text.count('\n') <= 350, f'{name} has {text.count(chr(10))} lines'
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long[f'{name}.{node.name}'] = node.end_lineno - node.lineno + 1
    assert list(long) in ([], ['networks.unet3d.__init__']), long


def test_a_checkpoint_from_before_the_move_still_draws(tmp_path):
    """Written by the library when all its files lay side by side: same settings, same weights, same samples."""
    (tmp_path / 'model-1.pt').write_bytes(OLD.read_bytes())
    model = GaussianDiffusion.from_checkpoint(tmp_path)
    assert (model.objective, model.prob_cond_frames, model.denoise_fn.config['dim_mults']) == ('v', 0.5, (1, 2))
    video = model.sample(cond=['a red circle moving left'], sampler='ddim', steps=3, seed=0, progress=False)
    expected = torch.tensor([0.3610, 0.9272, 0.8418, 0.5166, 1.0000, 0.4846, 0.8120, 0.6875, 0.5586])
    assert torch.allclose(video.flatten()[::37][:9], expected, atol=2e-3)
    assert type(diffusion_from_checkpoint(tmp_path)) is GaussianDiffusion
    assert checkpoint.load(OLD)['sampling'] == {'cond_scale': 1.0, 'sampler': 'ddim', 'steps': 2}

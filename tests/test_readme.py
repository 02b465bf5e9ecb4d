"""The README is true: its Python blocks run in a real Jupyter kernel, its shell blocks in a shell's order, its map names every
file. Run: pytest tests/test_readme.py"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import test_cogvideox
import together
import torch
from nbclient import NotebookClient
from PIL import Image

from video_diffusion import shapes, video_tensor_to_gif, video_tensor_to_mp4

ROOT = Path(__file__).parent.parent
README, RESULTS = ((ROOT / name).read_text(encoding='utf-8') for name in ('README.md', 'RESULTS.md'))


def blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_every_python_block_runs_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    cells = blocks('python')
    assert len(cells) >= 4
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert (tmp_path / 'sample.gif').exists()
    shown = [output for cell in notebook.cells for output in cell.outputs if 'text/html' in output.get('data', {})]
    assert any('data:image/gif;base64,' in output['data']['text/html'] for output in shown)       # show() is seen


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what the README takes for granted: clips, films, single files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('VIDEO_DIFFUSION_TINY', '1')
    shapes.make_shapes('my_gifs', 12, image_size=16, num_frames=3)
    torch.manual_seed(0)
    video_tensor_to_gif(torch.rand(3, 8, 32, 32), 'clip.gif')
    video_tensor_to_gif(torch.rand(3, 8, 8, 8), 'small.gif')
    for i in range(2):
        video_tensor_to_mp4(torch.rand(3, 12, 32, 32), f'my_films/{i}.mp4', fps=8)
    Image.new('RGB', (24, 16), (90, 160, 40)).save('cat.png')
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize('block', [block for block in blocks('bash') if 'python' in block or 'torchrun' in block])
def test_every_shell_block_runs(block, desk, monkeypatch):
    """Line by line, each as its user would type it; two processes stand for any number, for this machine is small."""
    if 'CogVideoX' in block:                                        # tiny and random, in diffusers' own layout
        test_cogvideox.save('CogVideoX-2b', 'sincos', 'ddim', 9)
        test_cogvideox.save('CogVideoX-5b-I2V', 'learned', 'dpm++2m_sde', 9)
    ran = 0
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] in ('pip', 'git'):
            continue
        if words[0] == 'torchrun':
            if '--shard' in words:
                together.run(2, ROOT / words[2], *words[3:])
            else:                                                           # torchrun itself, once
                torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
                subprocess.run([*torchrun, str(ROOT / words[2]), *words[3:]], check=True, timeout=200,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
        else:
            assert words[0] == 'python', line
            monkeypatch.setattr(sys, 'argv', words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name='__main__')       # SystemExit is an error with a sentence
        ran += 1
    assert ran


def test_pictures_exist_and_are_small():
    pictures = set(re.findall(r'\((assets/[^)]+)\)', README + RESULTS))
    assert pictures == {f'assets/{file.name}' for file in (ROOT / 'assets').iterdir()}       # none is missing, none lies about
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 1_000_000


def test_the_map_names_every_file_and_no_other():
    """Where is X? From the map alone: a folder, then its files."""
    section = README[README.index('## How the house is laid out'):README.index('## Tests')]
    folder, named = '', set()
    for line in section.splitlines():
        if line and line[0] != ' ':
            folder = line.split()[0] if '/ ' in line else ''
        if match := re.match(r'  ([\w, ]+?)   ', line):
            named |= {f'{folder}{name}.py' for name in match[1].split(', ')}
    library = ROOT / 'video_diffusion'
    assert named == {str(f.relative_to(library)) for f in library.rglob('*.py') if f.name != '__init__.py'}
    for name in re.findall(r'`(\w+\.py)`', README + RESULTS):
        assert list(ROOT.rglob(name)), name


QUESTIONS = {
    'the noise of each step': 'diffusion/noise_schedule.py', 'samplers': 'diffusion/samplers.py', 'the U-Net': 'networks/unet3d.py',
    'words of a caption': 'networks/text.py', 'reading an mp4': 'data/mp4.py', 'the average of the weights': 'training/ema.py',
    'the critic of the VAE': 'vae/vae_loss.py', 'adapters': 'networks/lora.py', 'weights of SVD': 'weights/svd_vae.py',
    'what a checkpoint holds': 'checkpoint.py',
}


@pytest.mark.parametrize('question', QUESTIONS)
def test_where_is_it(question):
    assert (ROOT / 'video_diffusion' / QUESTIONS[question]).exists()


def test_it_can_be_read_standing_up():
    assert README.count('\n') < 400
    first = README[:README.index('## In a notebook')]
    assert first.count('\n') < 30 and '![' in first and 'python train.py' in first

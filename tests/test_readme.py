"""Every Python block of the README runs, in order, in a real Jupyter kernel. Run: pytest tests/test_readme.py"""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

README = Path(__file__).parent.parent / 'README.md'


def test_every_python_block_runs_in_a_notebook(tmp_path):
    blocks = re.findall(r'^```python\n(.*?)^```', README.read_text(encoding='utf-8'), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(block) for block in blocks])
    NotebookClient(notebook, timeout=120, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert (tmp_path / 'sample.gif').exists()


def test_pictures_exist_and_are_small():
    text = README.read_text(encoding='utf-8')
    pictures = re.findall(r'\((assets/[^)]+)\)', text) + re.findall(r'src="(assets/[^"]+)"', text)
    assert pictures
    for picture in pictures:
        assert (README.parent / picture).exists(), picture
    assert sum(p.stat().st_size for p in (README.parent / 'assets').iterdir()) < 1_000_000


def test_files_named_in_the_reading_order_exist():
    named = re.findall(r'`((?:video_diffusion/)?\w+\.py)`', README.read_text(encoding='utf-8'))
    assert len(named) > 10
    for name in set(named):
        assert list(README.parent.rglob(name)), name

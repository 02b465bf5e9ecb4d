"""Any command line ends well, or with one sentence and exit code 2: no traceback, no question, no network.
Run: pytest tests/test_nonsense.py; with --slow 300 command lines are drawn"""

import builtins
import os
import random
import runpy
import socket

import pytest
from test_scripts import ROOT, SMALL, clips, run  # noqa: F401

WORDS = {
    int: ['0', '-1', '1', '2', '3', '7', '1.5', 'x', ''],
    float: ['0', '-1', '-inf', 'inf', 'nan', '0.5', '1', '2', '1e30', 'x'],
    str: ['', 'nowhere', 'clips', 'clips/00000.gif', 'results', 'results/model-1.pt', 'cpu', '/dev/null', 'someone/bert', 'a red circle', '../x' * 60],
}
LEFT_OUT = {'--debug', '--compile'}              # one shows tracebacks, the other takes minutes


def draw(flags: list, chance: random.Random) -> list[str]:
    """One to three flags with values that may make sense."""
    line = []
    for flag in chance.sample(flags, chance.choice([1, 1, 1, 2, 3])):
        line += [flag.name] * flag.name.startswith('--')
        if flag.kind not in (bool, 'switch'):
            values = [*flag.kind, 'x'] if isinstance(flag.kind, tuple) else WORDS[flag.kind]
            line += chance.choices(values, k=chance.choice([1, 1, 2]) if flag.many is True else 1)
    return line


@pytest.mark.slow
@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_no_command_line_ends_in_a_traceback(run, clips, monkeypatch, slow, script):
    count = (200 if script == 'train.py' else 100) if slow else 6
    monkeypatch.setenv('VIDEO_DIFFUSION_TINY', '1')
    os.symlink(clips, 'clips')
    assert run('train.py', 'clips', *SMALL)[0] == 0
    asked = []
    monkeypatch.setattr(builtins, 'input', lambda *_: asked.append('stdin'))
    monkeypatch.setattr(socket.socket, 'connect', lambda *_: asked.append('network') or 1 / 0)
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: asked.append('network') or 1 / 0)
    flags = [flag for group in runpy.run_path(str(ROOT / script))['FLAGS'].values() for flag in group if flag.name not in LEFT_OUT]
    ended = {0: 0, 2: 0}
    for number in range(count):
        chance = random.Random(f'{script} {number}')
        line = draw(flags, chance)
        if script == 'train.py':
            line = ['clips', '--results', f'new{number}', *SMALL[:-2], *line] if chance.random() < 0.9 else line
        else:
            line = ['results', *(['--prompt', 'a red circle'] if chance.random() < 0.8 else []), *line]
        code, _, err = run(script, *line)
        said = [text for text in err.splitlines() if text.startswith(script + ':')]
        assert code in ended and 'Traceback' not in err and not asked, (line, code, err, asked)
        assert code == 0 or len(said) == 1, (line, err)
        ended[code] += 1
    print(f'{script}: {ended[0]} ran, {ended[2]} were refused')
    assert ended[2] and (ended[0] or not slow)

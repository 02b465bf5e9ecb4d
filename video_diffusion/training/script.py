"""What train.py and sample.py share: a table of flags that is also their help, errors in one line; and the toy world."""

import argparse
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ..data import shapes
from ..data.folder import LOOKED_AT, ClipFolder
from ..distributed import Processes, lost_others

# With VIDEO_DIFFUSION_TINY=1 every run is over in seconds: to try a command, and to test those of the README.
TINY = dict(steps=2, image_steps=1, toy_clips=12, dim=16, attn_dim_head=16, depth=2, dim_mults=(1, 2), batch_size=2, sample_every=2,
            sample_rows=1, sample_steps=2)


class Flag(NamedTuple):
    """A row of the table: `--name value  help [default]`."""
    name: str
    kind: object                        # a type; a tuple of all that may be given; bool: there or not; 'switch': --x or --no-x
    default: object
    help: str
    only: str | None = None             # the --stage that it belongs to; None: every one
    many: bool | str = False            # several values; 'again': by giving the flag again
    metavar: str | None = None
    alias: str | None = None

    @property
    def dest(self) -> str:
        return self.name.removeprefix('--').replace('-', '_')


def parse(doc: str, groups: dict[str, list[Flag]], table: dict) -> tuple[argparse.Namespace, dict]:
    """The flags with their defaults, and which of them were really given. `table` has the defaults that depend on the device."""
    parser = argparse.ArgumentParser(
        usage='%(prog)s [what to work on] [--flag value ...]', description=doc, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=132),
        epilog='[default], or [on a CPU | on a GPU; with --stage vae on a CPU | on a GPU]')
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            names = [flag.name] + [flag.alias] * (flag.alias is not None)
            group.add_argument(*names, help=f'{flag.help} {default_text(flag, table.get(flag.dest))}'.strip(), **kind_of(flag))
    given = vars(parser.parse_args())
    defaults = {flag.dest: flag.default for flags in groups.values() for flag in flags}
    if os.environ.get('VIDEO_DIFFUSION_TINY'):
        tiny = {name: value for name, value in TINY.items() if name in defaults}
        defaults |= tiny
        given |= {name: min(given[name], 2 * value) for name, value in tiny.items() if name in given and name != 'dim_mults'}
    return argparse.Namespace(**{**defaults, **given}), given


def kind_of(flag: Flag) -> dict:
    """The same in argparse's words."""
    if flag.kind is bool:
        return dict(action='store_true')
    if flag.kind == 'switch':
        return dict(action=argparse.BooleanOptionalAction)
    words = dict(choices=flag.kind, metavar=flag.metavar) if isinstance(flag.kind, tuple) else dict(
        type=flag.kind, metavar=flag.metavar or 'N')
    if not flag.name.startswith('--'):
        words = dict(type=flag.kind, nargs='?')
    how = {False: {}, True: dict(nargs='+'), 'again': dict(action='append')}[flag.many]
    return {**words, **how}


def default_text(flag: Flag, table: tuple | None) -> str:
    if table is None:
        return f'[{flag.default}]' if flag.default not in (None, False, (), []) else ''

    def words(value):
        if isinstance(value, bool):
            return 'on' if value else 'off'
        return ' '.join(map(str, value)) if isinstance(value, tuple) else str(value)
    columns = {}                                           # what it says: of which kind of run it is said first
    for kind, column in zip(('', 'vae ', 'dit '), table):
        if column:
            columns.setdefault(' | '.join(dict.fromkeys(map(words, column))), kind)
    return '[' + '; '.join(kind + text for text, kind in columns.items()) + ']'


@contextmanager
def one_line_errors(name: str):
    """End with one sentence and exit code 2 where the user can help it. `--debug`, and what is our own fault, shows a traceback.

    Whose fault is a ValueError? One that a line of this library raises is a sentence for the user; one that comes out of torch,
    einops or Python itself is a fault of ours.
    """
    try:
        with lost_others():
            yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if '--debug' in sys.argv or isinstance(error, ValueError) and not raised_here(error):
            raise
        print(f'{name}: {error}', file=sys.stderr)
        sys.exit(2)


def raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    package = Path(__file__).parents[1]
    file = Path(trace.tb_frame.f_code.co_filename)
    return package in file.parents or file.parent == package.parent


def draw_toy_world(folder: Path, count: int, size: int, frames: tuple[int, ...], processes: Processes) -> Path:
    """The toy world in `folder`, drawn if it is not there yet. Another run may be drawing it as well: the first one's counts."""
    def draw():
        if folder.exists():
            return
        print(f'drawing {count} clips into {folder}')
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'{folder.name}.unfinished-', dir=folder.parent) as unfinished:
            drawn = shapes.make_shapes(Path(unfinished) / folder.name, count, size, frames)
            try:
                drawn.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    processes.by_main(draw)
    clips = ClipFolder(folder)
    there = len(clips.paths), *clips.shape()
    typical = int(median(frames[i % len(frames)] for i in range(min(count, LOOKED_AT))))
    if there != (count, typical, size, size):
        raise ValueError(f'{folder} holds {there[0]} clips of {there[1]} frames of {there[2]}x{there[3]}, not the toy '
                         f'world asked for ({count} clips of {typical} frames of {size}x{size}): remove it first')
    return folder

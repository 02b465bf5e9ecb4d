"""What train.py and sample.py share: errors in one line, and an allocator that suits tensors."""

import ctypes
import sys
from contextlib import contextmanager


@contextmanager
def one_line_errors(name: str):
    """End with one sentence and exit code 2 where the user can help it; other errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f'{name}: {error}', file=sys.stderr)
        sys.exit(2)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next tensor of that size (Linux; elsewhere nothing happens).

    By default it returns every block above 32 MB to the system and takes it back at the next step, page by
    page, each page zeroed first: with large clips that costs a CPU more than half of its time.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        most_mapped_blocks, trim_threshold = -4, -1  # names of glibc's mallopt parameters
        libc.mallopt(most_mapped_blocks, 0)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)
    except (OSError, AttributeError):
        pass  # not glibc

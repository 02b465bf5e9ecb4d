"""An allocator that suits tensors."""

import ctypes


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

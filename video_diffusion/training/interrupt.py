"""Stop politely: Ctrl-C (SIGINT), the end of a batch job (SIGTERM) and a closed terminal (SIGHUP) as a request, not as an accident.

    with StopRequest() as stop:
        while not stop.requested:
            ...                       # a step is never cut in half, and there is time to save

A second signal does what it usually does, at once. What ignores SIGHUP, for it was started by nohup, goes on ignoring it.
"""

import os
import signal
import stat
import threading
from contextlib import suppress


class Stopped(Exception):
    """Raised where work that can be done again is left undone, because a stop was requested."""


class StopRequest:
    """Within, the first signal only sets `requested`."""

    requested = False
    previous = {}

    def __enter__(self):
        self.requested = False
        signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.previous = {number: signal.signal(number, self.request) for number in signals}
        return self

    def request(self, number: int, _frame) -> None:
        self.requested = True
        self.restore()
        if number not in (signal.SIGINT, signal.SIGTERM):
            speak_to_nobody()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_error) -> None:
        self.restore()


def speak_to_nobody() -> None:
    """The terminal is closed: without this, whoever prints to it, be it a progress bar, dies before anything is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        with suppress(OSError):                                    # it is closed
            if stat.S_ISCHR(os.fstat(output).st_mode):             # a terminal, not a file or a pipe
                os.dup2(nowhere, output)
    os.close(nowhere)

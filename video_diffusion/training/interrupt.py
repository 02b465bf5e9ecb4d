"""Stop politely: Ctrl-C (SIGINT) and the end of a batch job (SIGTERM) as a request, not as an accident.

    with StopRequest() as stop:
        while not stop.requested:
            ...                       # a step is never cut in half, and there is time to save

A second signal does what it usually does, at once.
"""

import signal
import threading


class StopRequest:
    """Within, the first SIGINT or SIGTERM only sets `requested`."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.requested = False
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.previous = {number: signal.signal(number, self.request) for number in self.signals}
        return self

    def request(self, _number, _frame) -> None:
        self.requested = True
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_error) -> None:
        self.restore()

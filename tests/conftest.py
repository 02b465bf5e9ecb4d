"""Tests share two rules: two threads at most, so that timings and sums do not depend on the machine's size, and what is drawn
at random is drawn a few times, a few seconds long; with `pytest --slow` it is drawn thousands of times."""

import os

# Of processes side by side (`pytest -n 2`) each has one thread, and so have the processes that it starts: threads that wait for
# threads which wait for a core made tests of half a minute last four.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ['OMP_NUM_THREADS'] = '1'

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'        # read when Triton is imported: its kernels run without a GPU, see test_fused.py

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='draw thousands of random examples, not a few')


def pytest_configure(config):
    config.addinivalue_line('markers', "slow: takes more than some seconds; `pytest -m 'not slow'` is for in between")
    calm = dict(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])   # shrinking takes minutes
    settings.register_profile('quick', max_examples=6, derandomize=True, **calm)
    settings.register_profile('slow', max_examples=60, **calm)
    settings.load_profile('slow' if config.getoption('--slow') else 'quick')


@pytest.fixture(scope='session')
def slow(request) -> bool:
    return request.config.getoption('--slow')

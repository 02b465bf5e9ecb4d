"""Tests share two rules: two threads at most, so that timings and sums do not depend on the machine's size, and what is drawn
at random is drawn a few times, a few seconds long; with `pytest --slow` it is drawn thousands of times."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

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

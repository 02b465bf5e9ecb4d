"""Tests share one rule: two threads at most, so that timings and sums do not depend on the machine's size."""

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))

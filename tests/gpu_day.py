"""The ground of gpu.py: where its checks work, how large they are, and how they measure."""

import time
from functools import cache

import torch

from video_diffusion import GaussianDiffusion, Unet3D

CHECKS = {}                       # name -> (part, function of a Day)


class Day:
    """Where to work, and how large."""

    def __init__(self, device: str, tiny: bool):
        self.device, self.tiny, self.cuda = torch.device(device), tiny, device.startswith('cuda')
        self.name = torch.cuda.get_device_name() if self.cuda else 'CPU'
        self.shape = (2, 3, 3, 8, 8) if tiny else (32, 3, 10, 64, 64)        # of a training step
        self.dim, self.mults = (8, (1, 2)) if tiny else (64, (1, 2, 4, 8))
        self.half = torch.bfloat16

    def unet(self, **more):
        return Unet3D(self.dim, dim_mults=self.mults, **more)

    def diffusion(self, network, **more):
        b, c, f, h, w = self.shape
        return GaussianDiffusion(network, image_size=h, num_frames=f, channels=c, **more)

    def seconds(self, work, rounds: int = 5) -> float:
        if self.cuda:
            torch.cuda.empty_cache()                                        # of what was measured before: too full, it is slow
        rounds, warm = (1, 1) if self.tiny else (rounds, 3)
        for _ in range(warm):
            work()
        start = self.clock()
        for _ in range(rounds):
            work()
        return (self.clock() - start) / rounds

    def clock(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @cache
    def peak(self) -> float:
        """Operations per second of one large matrix product."""
        n = 8192 if self.cuda else 128
        a = torch.randn(n, n, device=self.device, dtype=self.half if self.cuda else torch.float32)
        return 2 * n ** 3 / self.seconds(lambda: a @ a, 10)

    def peak_mb(self, work) -> float:
        if not self.cuda:
            return 0.
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def check(part: int):
    def keep(function):
        CHECKS[function.__name__] = part, function
        return function
    return keep


def distance(a, b) -> float:
    return ((a.cpu().double() - b.cpu().double()).norm() / b.double().norm()).item()


def compare(day: Day, works: dict, goal: dict | None = None) -> dict:
    """Seconds and peak memory of `ours`, `theirs` and variants of ours; ratios to theirs."""
    result = {name: dict(s=round(day.seconds(work), 5), mb=round(day.peak_mb(work), 1)) for name, work in works.items()}
    theirs = result.get('theirs')
    for name, each in result.items():
        if theirs and name != 'theirs':
            each |= {'time': round(each['s'] / theirs['s'], 3), 'memory': round(each['mb'] / max(theirs['mb'], 1e-9), 3)}
    return {**result, **({'goal': goal} if goal else {})}

"""How close is a reconstruction? PSNR and SSIM, the two numbers by which codecs and VAEs are compared.

    PSNR    10 log10(1 / mean squared error), in decibels: 30 dB is an error of 0.03 in a range of 1
    SSIM    structural similarity (Wang et al. 2004): means, variances and the covariance of both images in
            every 11x11 window (Gaussian, sigma 1.5) are compared; 1 says equal

    SSIM = (2 ma mb + C1) (2 cov + C2) / ((ma^2 + mb^2 + C1) (va + vb + C2)),     C1 = 0.01^2, C2 = 0.03^2

Videos are (b c f h w) in [0, 1]; both functions answer with one number per clip, (b,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    return -10 * torch.log10((a - b).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """The mean over channels, frames and every place where the whole window fits."""
    if min(a.shape[3:]) < 11:
        raise ValueError(f'{a.shape[3]}x{a.shape[4]} pixels: SSIM looks through a window of 11x11, so give 11 or more')
    batch = a.shape[0]
    a, b = (x.reshape(-1, 1, *x.shape[3:]) for x in (a, b))                         # (b c f) 1 h w
    offset = torch.arange(11, device=a.device, dtype=a.dtype) - 5
    window = torch.exp(-offset ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:                                                  # rows, then columns
        return F.conv2d(F.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return similarity.reshape(batch, -1).mean(1)

"""What a VAE is trained for: to be close in pixels, close in features, cheap in bits, and to fool a critic.

    loss = nll + kl_weight * KL + weight * adversarial

    nll           |x - y| or (x - y)^2, plus the perceptual distance; with a learnt log-variance s
                  (nll / exp(s) + s, the Gaussian's or Laplacian's width) it sets its own scale
    KL            what the latents cost. It is summed and divided by the number of values in the video, as the error
                  is: one latent number's KL weighs `kl_weight` against the error of one colour value
    adversarial   -D(y): the critic D scores every patch of every frame. It is trained in alternation to tell x from y
                  by the hinge loss, relu(1 - D(x)) + relu(1 + D(y)) (Lim & Ye 2017, arXiv 1705.02894)
    weight        |grad nll| / |grad adversarial| at the decoder's last layer, so that neither drowns the other
                  (VQGAN, Esser et al. 2021, arXiv 2012.09841)

Every term is a sum over the frames at hand divided by a number that is handed in, `frames` per clip. Where processes
share a clip, each gives the average number of frames of a process, even if it holds more or fewer: then the
*mean* over the processes is the loss of the whole clip, and so are its gradients.

    nll, error, kl = VAELoss('l1', learn_logvar=True)(video, reconstruction, posterior, frames=video.shape[2])
"""

import math
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import checkpoint, checks
from .causal_blocks import Downsample
from .context_parallel import CausalConv3d, GroupNorm, Piece
from .gaussian import DiagonalGaussian


class PerceptualLoss:
    """How differently VGG16 sees two videos, frame by frame (after Zhang et al. 2018, LPIPS, arXiv 1801.03924).

    Squared distance of the features of five layers, each place's features scaled to length 1. The network is frozen,
    and no part of any checkpoint.
    """

    layers = (3, 8, 15, 22, 29)                          # the last ReLU before each of VGG16's poolings, and the last

    def __init__(self, weights: str | Path, device: torch.device | str = 'cpu'):
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f'the perceptual loss needs the weights of VGG16, and there is no file {weights}: fetch '
                'https://download.pytorch.org/models/vgg16-397923af.pth and give its path, or leave this loss off')
        from torchvision.models import vgg16
        state = checkpoint.load(weights)
        with checkpoint.blaming(weights):
            state = {name.removeprefix('features.'): value for name, value in state.items() if name.startswith('features.')}
        network = checkpoint.build(lambda _: vgg16(weights=None).features, {}, state, f"{weights} (expected: torchvision's VGG16)")
        self.features = network[:self.layers[-1] + 1].eval().requires_grad_(False).to(device)
        self.mean_std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)[:, :, None, None]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(b c f h w) in [0, 1], twice -> the sum of the distances of all frames."""
        c, _, h, w = a.shape[1:]
        if c not in (1, 3) or min(h, w) < 16:
            raise ValueError(f'the perceptual loss of {c} channels of {h}x{w} pixels: VGG16 sees 1 or 3 channels and halves '
                             'frames four times, so give 16 pixels or more, or leave this loss off')
        x = rearrange(torch.cat([a, b]), 'b c f h w -> (b f) c h w')
        mean, std = self.mean_std.to(x.dtype)
        x = (x.expand(-1, 3, -1, -1) - mean) / std
        total = x.new_zeros(())
        for i, layer in enumerate(self.features):
            x = layer(x) if x.shape[0] else x            # a process without frames
            if i in self.layers:
                ours, theirs = F.normalize(x, dim=1).chunk(2)
                total = total + (ours - theirs).square().sum(1).mean((1, 2)).sum()
        return total


class VAELoss(nn.Module):
    def __init__(
        self,
        kind: str = 'l1',                                # or 'l2'
        learn_logvar: bool = False,
        perceptual: PerceptualLoss | None = None,
        perceptual_weight: float = 1.,
    ):
        super().__init__()
        checks.one_of('loss', kind, ('l1', 'l2'))
        checks.number('perceptual_weight', perceptual_weight, 0)
        self.kind, self.perceptual, self.perceptual_weight = kind, perceptual, perceptual_weight
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=learn_logvar)

    def forward(self, video: Tensor, reconstruction: Tensor, posterior: DiagonalGaussian,
                frames: float) -> tuple[Tensor, Tensor, Tensor]:
        """(negative log-likelihood, error of the reconstruction, KL); `frames`: see the top of this file."""
        if reconstruction.shape != video.shape:
            raise ValueError(f'a video of shape {tuple(video.shape)} and a reconstruction of {tuple(reconstruction.shape)}: give '
                             'the VAE as many out_channels as in_channels')
        b, c, _, h, w = video.shape
        difference = reconstruction - video
        error = (difference.abs() if self.kind == 'l1' else difference.square()).sum() / (b * c * frames * h * w)
        kl = posterior.kl().sum() / (b * c * frames * h * w)
        nll = error
        if self.perceptual is not None:
            nll = nll + self.perceptual_weight * self.perceptual(video, reconstruction) / (b * frames)
        return nll * torch.exp(-self.logvar) + self.logvar, error, kl


class Discriminator(nn.Module):
    """A critic of small space-time patches: (b c f h w) in [0, 1] -> scores (b 1 f h/8 w/8).

    Its convolutions are causal, so that the first frame is judged as a picture and later ones with the motion that
    led to them; clips and images are scored alike, and clips shared out over processes too (`piece`). Norms look at one
    frame at a time.
    """

    def __init__(self, channels: int = 3, dim: int = 32, levels: int = 3):
        super().__init__()
        self.conv_in = CausalConv3d(channels, dim)
        widths = [dim * 2 ** i for i in range(levels + 1)]
        self.levels = nn.ModuleList([
            nn.ModuleList([Downsample(before, time=False), CausalConv3d(before, here), GroupNorm(8, here, 'frame')])
            for before, here in zip(widths, widths[1:])])
        self.scores = nn.Conv3d(widths[-1], 1, 1)

    def forward(self, video: Tensor, piece: Piece = Piece()) -> Tensor:
        if video.shape[2] == 0:                              # a process without frames; backward() must work all the same
            return video[:, :1] + self.scores.bias
        x = F.leaky_relu(self.conv_in(video * 2 - 1, piece), 0.2)           # b dim f h w
        for down, conv, norm in self.levels:
            x, _ = down(x, piece)                                           # half of h and w
            x = F.leaky_relu(norm(conv(x, piece), piece), 0.2)              # twice the channels
        return self.scores(x)                                               # b 1 f h/8 w/8


def generator_loss(fake: Tensor, frames: float) -> Tensor:
    """What the VAE pays for scores (b 1 f h w) of its reconstructions."""
    return -per_frame(fake).sum() / (len(fake) * frames)


def discriminator_loss(real: Tensor, fake: Tensor, frames: float) -> Tensor:
    hinge = F.relu(1 - real) + F.relu(1 + fake)
    return per_frame(hinge).sum() / (2 * len(real) * frames)


def per_frame(scores: Tensor) -> Tensor:
    return scores.flatten(3).mean(-1)                        # b 1 f


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor, average: Callable[[Tensor], Tensor] = lambda grads: grads,
                    scale: Tensor | float = 1., largest: float = 1e4) -> Tensor:
    """|gradient of nll| / |gradient of adversarial| at `last_layer`; `average` makes it that of all processes.

    In fp16 gradients this small are 0, so they are taken `scale` times larger, as a GradScaler takes all others. Where that
    is too large the answer is NaN, as the gradients then are: the scaler leaves out the step.
    """
    grads = [torch.autograd.grad(value * scale, last_layer, retain_graph=True, materialize_grads=True)[0]
             for value in (nll, adversarial)]
    norm, other = average(torch.stack(grads)).flatten(1).norm(dim=1) / scale
    return torch.where(other.isfinite(), norm / (other + 1e-4), math.nan).clamp(max=largest)

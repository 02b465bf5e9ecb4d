"""Muon: an optimiser that treats a matrix as a matrix, not as a heap of numbers.

Adam scales the step of each number on its own. But a layer is a matrix, and its gradient is mostly made of a few strong
directions; the weak ones, which Adam hardly moves, are what a rare caption or a small object needs. Muon (Jordan et al.
2024) replaces the step by the nearest orthogonal matrix, in which all directions are equally strong:

    momentum  ->  U S V^T  ->  U V^T,  times sqrt(max(1, rows / columns))       for each matrix (out, in)
    embeddings, biases, gains, the first and the last layer                     have no such directions: Adam

On the toy world it needs a third of Adam's steps, and does not depend on the seed. Others found the same for large models
(Liu et al. 2025, arXiv 2502.16982) and for video diffusion (arXiv 2510.19376). Convolutions count as (out, in * kernel).

    >>> optimizer = Muon(*split(diffusion), lr=2e-3, muon_lr=0.01)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from ..checks import number
from .loop import adam as plain_adam
from .shard import is_share, share

MATRICES = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)   # layers whose weight is one
ENDS = ('init_conv', 'final_conv', 'from_patches', 'to_patches', 'conv_in', 'conv_out',       # of pixels or latents
        'quant_conv', 'time_conv_out')


def split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that learn: (matrices inside the network, all others)."""
    layers = [module for name, module in model.named_modules() if isinstance(module, MATRICES) and name.split('.')[-1] not in ENDS]
    inside = {weight for layer in layers for weight in layer.parameters(recurse=False) if weight.ndim > 1}   # of LoRA A and B, too
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [w for w in weights if w in inside], [w for w in weights if w not in inside]


def orthogonal(matrices: Iterable[Tensor]) -> list[Tensor]:
    """Matrices (rows columns) of any shapes with all singular values moved to about 1 (0.7 to 1.2), by five Newton-Schulz steps.

    A step is X <- (a + b G + c G^2) X with G = X X^T, an odd polynomial in each singular value. All the factors are
    polynomials in the first G and commute, so they are gathered in the small square of G and meet the long X only once.
    Matrices of one shape are one batch, and their squares one with all of their side: a GPU waits for every call.
    """
    shapes, sides, results = {}, {}, {}
    for place, matrix in enumerate(matrices):
        shapes.setdefault(matrix.shape, []).append((place, matrix))
    for (rows, columns), batch in shapes.items():
        places, x = zip(*batch)
        x = torch.stack([matrix.mT for matrix in x] if rows > columns else x)                   # n side length
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
        sides.setdefault(min(rows, columns), []).append((places, rows > columns, x))
    for batch in sides.values():
        factors = gathered(torch.cat([x @ x.mT for _, _, x in batch]))                          # m side side
        for (places, turned, x), factor in zip(batch, factors.split([len(x) for _, _, x in batch])):
            x = factor @ x
            results.update(zip(places, x.mT if turned else x))
    return [results[place] for place in sorted(results)]


def gathered(gram: Tensor) -> Tensor:
    """The product of the five factors, from the first G (n side side)."""
    factors = factor = polynomial(gram)
    for _ in range(4):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        factors = factor @ factors
    return factors


def polynomial(gram: Tensor) -> Tensor:
    result = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    result.diagonal(dim1=-2, dim2=-1).add_(3.4445)
    return result


class Muon(torch.optim.Optimizer):
    def __init__(
        self,
        matrices: list[Tensor],
        others: list[Tensor],                # for Adam
        *,
        lr: float,                           # of Adam. Whoever changes it changes that of the matrices in proportion
        muon_lr: float,                      # of the matrices
        momentum: float = 0.95,
    ):
        number('train_lr', lr, above=0)
        number('muon_lr', muon_lr, above=0)
        super().__init__([dict(params=others, eps=1e-8), dict(params=matrices, ratio=muon_lr / lr, momentum=momentum)],
                         dict(lr=lr))

    @torch.no_grad()
    def step(self) -> None:
        others, matrices = self.param_groups
        self.step_others([w for w in others['params'] if w.grad is not None], others['lr'], others['eps'])
        if learnt := [w for w in matrices['params'] if w.grad is not None]:
            self.step_matrices(learnt, matrices['lr'] * matrices['ratio'], matrices['momentum'])

    def step_matrices(self, weights: list[Tensor], lr: float, momentum: float) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = dict(momentum=torch.zeros_like(weight))
        slopes, averages = [w.grad for w in weights], [self.state[w]['momentum'] for w in weights]
        torch._foreach_lerp_(averages, slopes, 1 - momentum)
        updates = torch._foreach_lerp(slopes, averages, momentum)   # Nesterov: where the momentum will be one step on
        updates = [update.full_tensor() if is_share(update) else update for update in updates]    # rows are not alone
        updates = orthogonal(update.flatten(1) for update in updates)
        torch._foreach_mul_(updates, [-lr * max(1, rows / columns) ** 0.5 for rows, columns in (u.shape for u in updates)])
        torch._foreach_add_(weights, [share(update.view(w.shape), w) for w, update in zip(weights, updates)])

    def step_others(self, weights: list[Tensor], lr: float, eps: float) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = dict(step=torch.zeros(()), exp_avg=torch.zeros_like(weight),
                                          exp_avg_sq=torch.zeros_like(weight))
        first, second, steps = ([self.state[w][name] for w in weights] for name in ('exp_avg', 'exp_avg_sq', 'step'))
        adam(weights, [w.grad for w in weights], first, second, [], steps, foreach=True, amsgrad=False, beta1=0.9, beta2=0.999,
             lr=lr, weight_decay=0., eps=eps, maximize=False)


def muon_or_adam(model: nn.Module, lr: float, muon_lr: float | None, betas: tuple[float, float], weight_decay: float = 0.,
                 ) -> torch.optim.Optimizer:
    """What a Trainer asks for: Muon where it has a rate of its own."""
    if muon_lr is None:
        return plain_adam(model.parameters(), lr, betas, weight_decay)
    if weight_decay:
        raise ValueError(f'weight_decay={weight_decay} is for Adam: leave it out, or leave muon_lr out')
    return Muon(*split(model), lr=lr, muon_lr=muon_lr)

"""Every frame has a noise of its own: diffusion forcing (Chen et al. 2024, arXiv 2407.01392).

A network that has been trained on clips whose frames are not equally noisy (`GaussianDiffusion(frame_noise='independent')`)
can be told what is known and what is not, for noise is what hides things: a frame at level 0 is known, one under much noise
is to be invented, and one under a little noise is known, but not to the last pixel. What else a video model may be asked then
differs only in the levels that its frames begin with:

    0 0 . . . . . .   go on from two frames             . . . . . . . .   draw from the caption alone
    0 . . . . . . .   from an image                     0 . . . . . . 0   fill the middle

How a video is drawn is a matrix, `levels`: a row for each step of the sampler, a column for each frame, and in it the
diffusion step (T - 1 is pure noise) that the frame has come down to; -1 is the clean frame, and a frame whose level stays
the same is left alone. With `lag` steps between one frame and the next:

    >>> levels([9, 6, 3], frames=3)                     # all together
    >>> levels([9, 6, 3], frames=3, lag=3)              # one by one, each from those before it
    >>> levels([9, 6, 3], frames=3, lag=1)              # a staircase: each a little ahead of the next

     9  9  9        9  9  9   3  9  9        9  9  9
     6  6  6        6  9  9  -1  9  9        6  9  9
     3  3  3        3  9  9   ...            3  6  9
    -1 -1 -1       -1  9  9  -1 -1  3       -1  3  6
                   -1  6  9  -1 -1 -1       -1 -1  3
                                            -1 -1 -1
"""

import torch
from torch import Tensor

CLEAN = -1
TOLD = 0.6                  # share of clips that are told some of their frames, in training
FIRST = 1 / 3               # share of the training, at its beginning, in which no clip is: else captions are read by luck only
LOW = 0.15                  # most noise of frames that are told but not certain to the last pixel, as a share of all steps
DRAWN = 0.05                # their noise when a long video goes on from its own frames, as in training
SILENT = 0.85               # share of clips told true frames whose caption is dropped: the frames show it
CUT = 0.4                   # the same of clips told drawn frames, if the other captions are shortened: see shortened


def levels(steps: list[int], frames: int, lag: int = 0) -> Tensor:
    """The matrix (rows + 1, frames): from the first of the falling `steps` for all to the clean video in the last row."""
    way = torch.tensor([*steps, CLEAN])
    rows = torch.arange(len(steps) + lag * (frames - 1) + 1)
    return way[(rows[:, None] - lag * torch.arange(frames)).clamp(0, len(steps))]


def told_share(done: float) -> float:
    """How many clips are to be told frames when so much of a training is done: first a network learns to draw from captions."""
    return 0. if done < FIRST else TOLD


def draw_levels(t: Tensor, frames: int, timesteps: int, generator: torch.Generator | None = None, told: float = TOLD) -> Tensor:
    """Steps to train with, of each clip (b) and spread to its frames (b f): what a network must know to be asked all of the above.

    Of 20 clips 7 have one step for all frames, so that a video can be drawn from its caption alone, and 12, the share `told`, are
    told some frames and have the others at one step. Those of every other clip are at step 0, true, and rather few, for little is
    harder to go on from than much; those of the rest are slightly noisy, for they are as the network draws them itself (as_drawn),
    as many as may be, and it must know which of the two it goes on from. In one each frame has a step that has nothing to do with
    those of the others, as in a staircase, or any other matrix.
    """
    where = dict(device=t.device, generator=generator)
    kind, low = torch.rand((2, len(t), 1), **where)
    drawn = (torch.arange(len(t), device=t.device) + torch.randint(0, 2, (1,), **where))[:, None] % 2 == 0         # every other
    few, many = (draw_mask(len(t), frames, 1., t.device, generator, end_too=0.25, draws=draws) for draws in (2, 1))
    some = (0.95 - told <= kind) & (kind < 0.95) & torch.where(drawn, many, few)
    known = torch.where(drawn, (low * LOW * timesteps).long().clamp(1, timesteps - 1), 0)
    own = torch.randint(0, timesteps, (len(t), frames), **where)
    return torch.where(kind >= 0.95, own, torch.where(some, known, t[:, None]))


def own_steps(t: Tensor, timesteps: int, generator: torch.Generator | None = None) -> list[int | None]:
    """For clips with steps t (b f), on the CPU, those from which the network draws what they are told; None: it is the truth."""
    low, least = LOW * timesteps, t.amin(dim=1)
    drawn = levels_differ(t) & (0 < least) & (least <= low)
    steps = torch.randint(0, max(1, timesteps // 2), (len(t),), generator=generator)
    return [step if own else None for step, own in zip(steps.tolist(), drawn.tolist())]


def null_share(t: Tensor, share: float, cut: bool = False) -> Tensor:
    """How often to drop the captions of clips with these steps (b), where it is this share of those with one for all frames.
    `cut`: the other captions are shortened."""
    true = t.view(len(t), -1).amin(dim=1) == 0
    told = torch.where(true, SILENT, CUT if cut else SILENT).clamp(min=share)
    return torch.where(levels_differ(t), told, share)


def shortened(captions: list[str], t: Tensor, where: Tensor) -> list[str]:
    """Captions as clips with these steps hear them: those that are told frames only to a word `where` (b), of 1.

    What a thing is comes before what it does. A later window must hold on to the one, for frames that a model drew leave room
    for doubt, and cannot be told the other, which has changed.
    """
    cut = [text.split() for text in captions]
    return [' '.join(words[:1 + int(share * len(words))]) if told else text for text, words, told, share in
            zip(captions, cut, levels_differ(t).tolist(), where.tolist(), strict=True)]


@torch.no_grad()
def as_drawn(diffusion, x0: Tensor, t: Tensor, noise: Tensor, cond: Tensor | None, own: list[int | None]) -> Tensor:
    """x0 (b c f h w) with its known frames as the network makes them out in one step, from the steps that `own_steps` gives.

    What it goes on from in a long video it has drawn itself, a little wrong, and it would go on from the error: a circle becomes
    a square in ten windows. Here it learns to see the circle (arXiv 2512.15702).
    """
    # Always of half of the clips, whether it is needed or not: a compiled network wants as many each time, and of one that lies
    # in shares (shard.py) each process has one.
    clips = sorted(range(len(own)), key=lambda clip: own[clip] is None)[:(len(own) + 1) // 2]
    steps, drawn = zip(*((own[clip] or 0, own[clip] is not None) for clip in clips))
    rows, steps, drawn = (torch.tensor(each).to(x0.device, non_blocking=True) for each in (clips, steps, drawn))
    cond = None if cond is None else cond[rows]
    noisy = diffusion.q_sample(x0[rows], steps, noise[rows].roll(1, dims=2))           # which no frame gets a second time
    clean = diffusion.predict_x0(noisy, steps, cond)
    torch.clear_autocast_cache()            # older versions would take from it, for the loss, weights that no gradient reaches
    known = drawn[:, None] & (t[rows] <= LOW * diffusion.num_timesteps)                                     # b f
    return x0.index_copy(0, rows, torch.where(known[:, None, :, None, None], clean, x0[rows]))


def levels_differ(t: Tensor) -> Tensor:
    """Of steps (b) or (b f): whether the frames of a clip have several (b)."""
    t = t.view(len(t), -1)
    return (t != t[:, :1]).any(dim=1)


def draw_mask(count: int, frames: int, prob: float, device: torch.device, generator: torch.Generator | None,
              end_too: float = 0.5, draws: int = 1) -> Tensor:
    """Masks to train with (count f): nothing is known with 1 - prob; else a beginning, and by `end_too` the end as well. The
    beginning is as long as the shortest of so many `draws`."""
    where = dict(device=device, generator=generator)
    frame = torch.arange(frames, device=device)
    length = torch.randint(1, max(2, frames), (draws, count, 1), **where).amin(dim=0)        # all but one at the most
    any_known, end = (torch.rand((count, 1), **where) < share for share in (prob, end_too))
    end = end & (length < frames - 1)                                        # something is left to invent
    return any_known & ((frame < length) | (end & (frame == frames - 1)))

"""The judge of the toy world: what does a clip show, and does it keep the laws?

Has a video model learnt anything? With real footage one looks, or downloads a large network that
looks. In a world with few enough rules (world.py) a page of code can be the judge. The laws, in the order in which
`grade` checks them; `Grade.why` names the first broken one:

  `blob`    every frame holds exactly one connected blob;
  `shape`   which one of the three shapes in one colour explains (two shapes that touch do not pass);
  `area`    the blob's area stays within 25% of its median;
  `colour`  the blob's colour stays the same;
  `path`    its centre keeps to one axis, at one speed, mirrored at the walls, to one pixel RMS;
  `frozen`  and that speed is not below those of this world.

A model that paints pretty frames without understanding motion fails `path`; one that averages over
possible futures fails `blob` or `area`; one that ignores its text shows in `caption_true`.

    videos = diffusion.sample(cond=captions())            # (b c f h w) in [0, 1]
    print(grade_all(videos, captions()))                  # {'lawful': 93.1, 'caption_true': 97.2, ...}

Axes: b clip, c colour channel, f frame, h height, w width; n any number of frames or clips.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..checks import tensor
from .world import AREA, COLOURS, DIRECTIONS, DROP, SHAPES, SPEED, caption_of, captions, coverage, fold

VISIBLE = 0.3                            # a pixel belongs to a blob from this RGB distance to the ground on
SHAPE_TOLERANCE = 0.15                   # of the area; a blur of one pixel sigma reaches 0.12 at 16 pixels
AREA_TOLERANCE = 0.25                    # of the median area
COLOUR_TOLERANCE = 0.15                  # RGB distance from the clip's median colour
FROZEN = SPEED[0] * 0.8                  # slower than this does not count as moving
RACING = SPEED[1] * 1.2                  # the fit tries no faster one: fast enough bounces explain any path


@dataclass
class Grade:
    """What `grade` saw in one clip. The words are its best guess even where a law is broken."""

    shape: str                           # 'none' where no frame shows anything
    colour: str
    direction: str
    lawful: bool
    why: str                             # the first broken law; '' where lawful

    def follows(self, caption: str) -> bool:
        """Shape, colour and direction are those of the caption. Being lawful is not asked here."""
        if caption not in captions():
            raise ValueError(f'{caption!r} is not a sentence of this world; captions() lists all of them')
        return caption == caption_of(self.shape, self.colour, self.direction)


def grade(video: torch.Tensor) -> Grade:
    """Look at one clip (c f h w) in [0, 1]: what does it show, and does it keep the laws?"""
    tensor('video', video)
    if video.ndim != 4:
        raise ValueError(f'expected one clip (c f h w), got shape {tuple(video.shape)}')
    return grade_batch(video[None])[0]


def grade_all(videos: torch.Tensor, captions: list[str] | None = None) -> dict:
    """Grade clips (b c f h w) and sum up, in percent.

    `lawful` and `caption_true` are independent: a square that jumps about can be the red square that
    was asked for, and a perfect bounce can be of the wrong colour. `both` asks for the two at once.
    `shape`, `colour`, `direction` are the parts of `caption_true`; `why` counts the broken laws.
    """
    tensor('videos', videos)
    if captions is not None and len(captions) != len(videos):
        raise ValueError(f'{len(videos)} videos but {len(captions)} captions: give one caption per video')
    grades = [one for chunk in videos.split(16) for one in grade_batch(chunk)]     # 16: fits the caches

    def percent(hits):
        return 100 * sum(hits) / len(grades)

    report = {'count': len(grades), 'lawful': percent(one.lawful for one in grades)}
    if captions is not None:
        pairs = list(zip(grades, captions))
        report['caption_true'] = percent(one.follows(caption) for one, caption in pairs)
        report['both'] = percent(one.lawful and one.follows(caption) for one, caption in pairs)
        for word in ('shape', 'colour', 'direction'):
            report[word] = percent(getattr(one, word) in caption.split() for one, caption in pairs)
    report['why'] = dict(Counter(one.why for one in grades if not one.lawful))
    return report


@torch.no_grad()
def grade_batch(videos: torch.Tensor) -> list[Grade]:
    """`grade` for many clips (b c f h w) at once: about 2 ms each at 32 pixels and 8 frames, on one core."""
    _check_videos(videos)
    videos = videos.float().cpu()
    size = videos.shape[-1]
    one_pixel = min(1 / size, 1 / 32)                                # below 32 pixels, a pixel is too kind

    ground = videos.flatten(2).median(dim=2).values                  # b c: most pixels are ground
    mask, paint, colour, cover = _find_blob(videos - ground[:, :, None, None, None])
    area = cover.sum(dim=(2, 3)) / size ** 2                         # b f
    centre = _centre(cover)                                          # b f (x y)
    shape, mismatch = _match_shape(paint, colour, centre, area)      # b,  b f
    typical_area = area.median(dim=1).values                         # b
    typical_colour = colour.median(dim=1).values                     # b c, as seen from the ground
    speed, miss = _fit_bounces(centre, typical_area, shape, one_pixel)

    broken = {                                                       # law -> b, in the order of the docstring
        'blob': ~_one_blob(mask).all(dim=1),                         # a frame of nan holds no blob either
        'shape': (mismatch > SHAPE_TOLERANCE).any(dim=1),
        'area': ((area / typical_area[:, None] - 1).abs() > AREA_TOLERANCE).any(dim=1),
        'colour': ((colour - typical_colour[:, None]).norm(dim=2) > COLOUR_TOLERANCE).any(dim=1),
        'path': miss > one_pixel,
        'frozen': speed < FROZEN,
    }
    palette = torch.tensor(list(COLOURS.values()))
    nearest = torch.cdist(typical_colour + ground, palette).argmin(dim=1)      # b
    heading = _first_movement(centre)                                # b
    seen = mask.flatten(1).any(dim=1)                                # b

    grades = []
    for clip in range(len(videos)):
        why = next((law for law, of_clip in broken.items() if of_clip[clip]), '')
        names = (SHAPES[shape[clip]], list(COLOURS)[nearest[clip]], list(DIRECTIONS)[heading[clip]])
        grades.append(Grade(*(names if seen[clip] else ('none',) * 3), lawful=not why, why=why))
    return grades


def _check_videos(videos: torch.Tensor):
    tensor('videos', videos)
    shape = tuple(videos.shape)
    if len(shape) != 5 or shape[0] < 1 or shape[1] != 3 or shape[2] < 2 or shape[3] != shape[4]:
        raise ValueError(f'expected RGB clips (b c f h w) of two square frames or more, got shape {shape}')
    low, high = videos.min().item(), videos.max().item()
    if low < -0.5 or high > 1.5:
        raise ValueError(f'expected values in [0, 1], got values from {low:.2f} to {high:.2f}')


def _find_blob(painted: torch.Tensor):
    """Clips less their ground (b c f h w) -> mask (b f h w), paint (b f c h w), its colour (b f c) and how
    much of each pixel it covers (b f h w)."""
    painted = painted.transpose(1, 2)                                # b f c h w
    distance = painted.square().sum(dim=2).sqrt()                    # b f h w
    mask = distance > VISIBLE
    paint = painted * _grow(_grow(mask))[:, :, None]                 # the noise of the wide ground stays out

    # The colour is that of the pixels furthest from the ground: the edges are mixed with it.
    weight = mask * (distance / distance.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6)) ** 8
    weight = weight / weight.sum(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    colour = (paint * weight[:, :, None]).sum(dim=(3, 4))            # b f c

    # At an edge a pixel lies somewhere between ground and colour: how far along the way?
    length = colour.square().sum(dim=2).clamp(min=1e-3)              # b f
    cover = (paint * colour[..., None, None]).sum(dim=2) / length[..., None, None]
    return mask, paint, colour, cover


def _grow(mask: torch.Tensor) -> torch.Tensor:
    """The mask (b f h w, bool) and the eight neighbours of each of its pixels."""
    wide = F.pad(mask, (1, 1, 1, 1))
    tall = wide[..., :-2] | wide[..., 1:-1] | wide[..., 2:]
    return tall[..., :-2, :] | tall[..., 1:-1, :] | tall[..., 2:, :]


def _one_blob(mask: torch.Tensor) -> torch.Tensor:
    """b f h w -> b f: pour water on one pixel of the mask; if it reaches all of them they are connected."""
    first = mask.flatten(2).int().argmax(dim=2)                      # b f
    water = F.one_hot(first, mask[0, 0].numel()).view(mask.shape).bool() & mask
    while True:
        spread = _grow(water) & mask
        if torch.equal(spread, water):
            return (water == mask).flatten(2).all(dim=2) & mask.flatten(2).any(dim=2)
        water = spread


def _centre(cover: torch.Tensor) -> torch.Tensor:
    """Centre of mass: b f h w -> b f (x y), in fractions of the image."""
    size = cover.shape[-1]
    pixels = (torch.arange(size) + 0.5) / size
    mass = cover.sum(dim=(2, 3)).clamp(min=1e-6)                     # b f
    x = (cover.sum(dim=2) * pixels).sum(dim=2) / mass
    y = (cover.sum(dim=3) * pixels).sum(dim=2) / mass
    return torch.stack([x, y], dim=2)


def _match_shape(paint: torch.Tensor, colour: torch.Tensor, centre: torch.Tensor, area: torch.Tensor):
    """Draw each shape with the blob's own centre, area and colour. Which is closest over the whole clip (b),
    and how far is that one from each frame (b f: squared error, as a share of the blob)?

    Two shapes that touch, a smear or a blob of two colours are close to no drawing.
    """
    size = paint.shape[-1]
    errors = []
    for shape in SHAPES:
        radius = (area.clamp(min=0) / AREA[shape]).sqrt()            # b f
        x, y = centre[..., 0], centre[..., 1] - DROP[shape] * radius
        drawn = coverage(shape, x.flatten(), y.flatten(), radius.flatten(), size)     # (b f) h w
        drawn = drawn.view(*area.shape, 1, size, size) * colour[..., None, None]       # b f c h w
        errors.append((drawn - paint).square().sum(dim=(2, 3, 4)))
    errors = torch.stack(errors, dim=1)                              # b shape f
    shape = errors.sum(dim=2).argmin(dim=1)
    blob = (colour.square().sum(dim=2) * area).clamp(min=1e-6) * size ** 2             # b f
    return shape, errors[torch.arange(len(shape)), shape] / blob


def _fit_bounces(centre: torch.Tensor, area: torch.Tensor, shape: torch.Tensor, one_pixel: float):
    """Explain centres (b f xy) by a bounce along one axis: its speed (b), and how far off it is (b, RMS).

    A search over the speed and the starting place. A wall turns the *centre* back one radius before
    the edge of the image, so the radius is worked out from shape and area first.
    """
    per_shape = torch.tensor([[AREA[name], DROP[name]] for name in SHAPES])[shape]
    radius = (area.clamp(min=0) / per_shape[:, 0]).sqrt()            # b
    drop = torch.stack([torch.zeros_like(radius), per_shape[:, 1] * radius], dim=1)
    box = centre - drop[:, None]                                     # b f xy: the middle of the box

    spread = box.var(dim=1, unbiased=False)                          # b xy
    axis = spread.argmax(dim=1)                                      # b: the one it moves along
    path = box.gather(2, axis[:, None, None].expand(-1, box.shape[1], 1))[..., 0]      # b f

    frames = path.shape[1]
    speeds = torch.linspace(-RACING, RACING, 16 * frames + 1)        # finer for longer clips
    starts = path[:, :1] + torch.linspace(-1, 1, 9) * one_pixel      # b start
    straight = starts[:, None, :, None] + speeds[:, None, None] * torch.arange(frames)
    low, room = radius.view(-1, 1, 1, 1), (1 - 2 * radius).clamp(min=one_pixel).view(-1, 1, 1, 1)
    bounced = low + fold(straight - low, room)                      # b speed start f
    error = (bounced - path[:, None, None]).square().mean(dim=3).flatten(1)            # b (speed start)
    error, best = error.min(dim=1)
    return speeds[best // starts.shape[1]].abs(), (error + spread.amin(dim=1)).sqrt()


def _first_movement(centre: torch.Tensor) -> torch.Tensor:
    """Which of DIRECTIONS the first two steps take (b f xy -> b); two, to smooth out a wobble."""
    move = centre[:, min(2, centre.shape[1] - 1)] - centre[:, 0]     # b xy
    ways = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float)
    return (move @ ways.T).argmax(dim=1)

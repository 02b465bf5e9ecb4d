"""A toy world with few rules: one shape moves and bounces. It draws its own clips, of any length, and says what they show.

One circle, square or triangle, in one of six colours, on a plain dark background, moves left, right, up or down at constant
speed and bounces off the walls. The caption names all of it: `a red circle moving left` (the *first* movement: it holds for
two frame steps at least). What laws follow from that, and who keeps them: grade.py.

    make_shapes('shapes/', 1000)                          # 00000.gif + 00000.txt, ...
    make_shapes('long/', 1000, num_frames=(8, 24))        # every other one long, to take short windows from

In a long clip it turns round, and the caption of a window must be that window's own. So captions of clips longer than 8 frames
say from which frame on they are true (see folder.py). Where the wall is less than two steps ahead, the circle is `turning`: a
window that begins there says nothing of the way it goes first.

    0: a red circle moving left
    7: a red circle turning
    9: a red circle moving right

Axes: c colour channel, f frame, h height, w width; n any number of frames.
Lengths are fractions of the image's side, so one law serves every image size; y points down.
"""

import math
import random
from pathlib import Path

import torch

from ..checks import whole
from .folder import CLIPS, IMAGES
from .gif import video_tensor_to_gif

BACKGROUND = (0.08, 0.08, 0.10)
COLOURS = {                              # near the corners of the RGB cube: no two are within 0.6
    'red': (0.92, 0.15, 0.15),
    'green': (0.15, 0.85, 0.20),
    'blue': (0.15, 0.25, 0.95),
    'yellow': (0.95, 0.90, 0.15),
    'magenta': (0.90, 0.20, 0.90),
    'cyan': (0.15, 0.90, 0.90),
}
DIRECTIONS = {'left': (-1, 0), 'right': (1, 0), 'up': (0, -1), 'down': (0, 1)}     # (x, y)
TURNING = 'turning'                      # soon, at the wall

# Every shape fills a box of side 2 * radius. The area is what it covers, over radius squared; the
# drop is how far its centre of mass lies below the middle of the box, over radius.
AREA = {'circle': math.pi, 'square': 4., 'triangle': 2.}
DROP = {'circle': 0., 'square': 0., 'triangle': 1 / 3}
SHAPES = tuple(AREA)

RADIUS = (0.20, 0.25)                    # smallest and largest, of the image
SPEED = (1 / 16, 1 / 10)                 # slowest and fastest, of the image per frame
SHORT = 8                                # frames: in longer clips the caption changes with the movement


def captions() -> list[str]:
    """All 72 sentences of this world: 3 shapes x 6 colours x 4 directions."""
    return [caption_of(shape, colour, direction) for shape in SHAPES for colour in COLOURS for direction in DIRECTIONS]


def make_shapes(folder, count: int, image_size: int = 32, num_frames: int | tuple[int, ...] = 8, seed: int = 0) -> Path:
    """Write `count` random clips as `00000.gif`, ... and their captions as `00000.txt`, ... beside them. Lengths take turns."""
    whole('count', count, 1)
    whole('image_size', image_size, 16)
    lengths = (num_frames,) if isinstance(num_frames, int) else tuple(num_frames)
    if not lengths:
        raise ValueError('num_frames=(): give one length, or several')
    for length in lengths:
        whole('num_frames', length, 2)
    folder, clip_seeds = Path(folder), random.Random(seed)
    clips = [(f'{index:05d}', clip_seeds.getrandbits(48), lengths[index % len(lengths)]) for index in range(count)]
    texts = {name: '\n'.join(label(seed, length)) + '\n' for name, seed, length in clips}
    folder.mkdir(parents=True, exist_ok=True)
    refuse_others(folder, texts)
    for name, seed, length in clips:
        video_tensor_to_gif(random_clip(seed, image_size, length)[0], folder / f'{name}.gif')
        (folder / f'{name}.txt').write_text(texts[name], encoding='utf-8')
    return folder


def refuse_others(folder: Path, texts: dict[str, str]) -> None:
    """Clips and captions in the folder that are not those of a call that writes these texts, perhaps of one before."""
    for path in sorted(folder.iterdir()):
        kind = path.suffix[1:].lower()
        ours = path.stem in texts and (kind == 'gif' or kind == 'txt' and path.read_bytes() == texts[path.stem].encode())
        if kind in (*CLIPS, *IMAGES, 'txt') and not ours:
            raise ValueError(f'{path} is not one of the clips that would be drawn there: choose a new folder, or remove this one')


def label(seed: int, num_frames: int) -> list[str]:
    """The lines of a clip's text file."""
    shape, colour, direction = random_words(seed)
    if num_frames <= SHORT:
        return [caption_of(shape, colour, direction)]
    return [f'{frame}: {caption_of(shape, colour, way)}' for frame, way in movements(direction, seed, num_frames)]


def random_clip(seed: int, image_size: int = 32, num_frames: int = 8) -> tuple[torch.Tensor, str]:
    """One clip (c f h w) and its caption, both drawn from `seed`."""
    words = random_words(seed)
    return draw_clip(*words, seed, image_size, num_frames), caption_of(*words)


def random_words(seed: int) -> tuple[str, str, str]:
    """Shape, colour and direction."""
    draw = random.Random(f'caption {seed}')
    return tuple(draw.choice(list(names)) for names in (SHAPES, COLOURS, DIRECTIONS))


def draw_clip(shape: str, colour: str, direction: str, seed: int = 0, image_size: int = 32, num_frames: int = 8) -> torch.Tensor:
    """A clip (c f h w) in [0, 1] of what the words say; `seed` draws radius, speed and place."""
    for word, allowed in ((shape, SHAPES), (colour, COLOURS), (direction, DIRECTIONS)):
        if word not in allowed:
            raise ValueError(f'{word!r} is not of this world; choose from {", ".join(allowed)}')
    if image_size < 16 or num_frames < 2:
        raise ValueError(f'image_size={image_size}, num_frames={num_frames}: shapes can be told apart from '
                         '16 pixels on, and motion takes 2 frames or more')

    x, y, radius = motion(direction, seed, num_frames)
    covered = coverage(shape, x, y, torch.full_like(x, radius), image_size)[None]      # 1 f h w
    paint, ground = (torch.tensor(rgb).view(3, 1, 1, 1) for rgb in (COLOURS[colour], BACKGROUND))
    return ground + covered * (paint - ground)                      # c f h w


def motion(direction: str, seed: int, num_frames: int, after: int = 0) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Where the middle of the shape is in each frame of a clip, and so many `after` it: x and y (f), and its radius."""
    draw = random.Random(f'motion {seed}')
    radius, speed = draw.uniform(*RADIUS), draw.uniform(*SPEED)
    across = draw.uniform(radius, 1 - radius)                       # where it stays on the other axis
    # The way to the wall. The caption names the first movement, so most of the clip goes that way if it can.
    room = 1 - 2 * radius
    ahead = draw.uniform(min(room, max(2., 0.6 * (num_frames - 1)) * speed), room)
    step_x, step_y = DIRECTIONS[direction]

    travelled = ahead - speed * torch.arange(num_frames + after)            # below 0: mirrored at the wall ahead
    to_wall = radius + fold(travelled, 1 - 2 * radius)              # f
    along = 1 - to_wall if step_x + step_y > 0 else to_wall         # right and down head for the far wall
    still = torch.full_like(along, across)
    return (along, still, radius) if step_x else (still, along, radius)


def movements(direction: str, seed: int, num_frames: int) -> list[tuple[int, str]]:
    """From which frame on a clip goes where: what holds for the next two frame steps, as in a caption."""
    x, y, _ = motion(direction, seed, num_frames, after=2)
    place = torch.stack((x, y), dim=1)
    ways = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float)
    steps = (place[1:] - place[:-1]) @ ways.T                               # f+1 way
    whole_steps = steps > 0.99 * steps.max()                                # not cut short by a wall
    both = whole_steps[1:] & whole_steps[:-1]                               # f way
    way = [next((name for name, goes in zip(DIRECTIONS, frame) if goes), TURNING) for frame in both.tolist()]
    return [(frame, way[frame]) for frame in range(num_frames) if frame == 0 or way[frame] != way[frame - 1]]


def caption_of(shape: str, colour: str, direction: str) -> str:
    return f'a {colour} {shape} ' + (TURNING if direction == TURNING else f'moving {direction}')


def fold(distance: torch.Tensor, length) -> torch.Tensor:
    """Mirror an endless straight line into [0, length]: a ball between two walls, the walls unfolded."""
    return length - (distance % (2 * length) - length).abs()


def coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor, size: int) -> torch.Tensor:
    """How much of each pixel a shape covers: box centres x, y and radius (n) -> (n h w) in [0, 1].

    The trick behind smooth edges: at signed distance d from the outline (in pixels, negative inside)
    a pixel is covered by about 1/2 - d.
    """
    pixels = (torch.arange(size) + 0.5) / size                       # the middle of each
    right = (pixels[None, None, :] - x[:, None, None]).abs()         # n 1 w: left and right halves are alike
    down = pixels[None, :, None] - y[:, None, None]                  # n h 1
    radius = radius[:, None, None]
    if shape == 'circle':
        distance = (right ** 2 + down ** 2).sqrt() - radius
    elif shape == 'square':
        distance = torch.maximum(right, down.abs()) - radius
    else:                                                            # triangle: its base, its two slopes
        distance = torch.maximum(down - radius, (2 * right - down - radius) / math.sqrt(5))
    return (0.5 - distance * size).clamp(0, 1)

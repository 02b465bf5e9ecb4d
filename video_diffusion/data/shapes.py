"""The toy world behind one door: what it draws (world.py), and the judge of what a model dreams up about it (grade.py)."""

from .grade import Grade, grade, grade_all, grade_batch
from .world import BACKGROUND, COLOURS, DIRECTIONS, SHAPES, captions, draw_clip, make_shapes, random_clip

__all__ = ['BACKGROUND', 'COLOURS', 'DIRECTIONS', 'SHAPES', 'Grade', 'captions', 'draw_clip', 'grade', 'grade_all', 'grade_batch',
           'make_shapes', 'random_clip']

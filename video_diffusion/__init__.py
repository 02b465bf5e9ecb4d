"""video_diffusion: learn, train and sample video diffusion models."""

from .dataset import GifDataset
from .diffusion import GaussianDiffusion
from .gif import gif_to_tensor, video_tensor_to_gif
from .text import BertEncoder, T5Encoder, WordEncoder
from .trainer import Trainer
from .unet3d import Unet3D

__all__ = [
    'BertEncoder', 'GaussianDiffusion', 'GifDataset', 'T5Encoder', 'Trainer', 'Unet3D', 'WordEncoder',
    'gif_to_tensor', 'video_tensor_to_gif',
]

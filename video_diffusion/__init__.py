"""video_diffusion: learn, train and sample video diffusion models.

Six folders, each of which stands on those below it; `from video_diffusion import ...` reaches all of them, so nobody needs to
know which room a thing lives in. Converters of other projects' weights come from `video_diffusion.weights`.

    weights/      read and write the weights of other projects
    training/     the loop and its trainers, average, stopping and going on, several devices
    diffusion/    noise, loss, samplers, guidance, known frames; the same in latents
    vae/          autoencoders for video, whole or in pieces, on one device or many
    networks/     what predicts: U-Net, attention, text     data/     what it learns from: clips, captions, a toy world
    checkpoint, checks, distributed                                   the ground
"""

from . import checkpoint, distributed
from .data import shapes
from .data.dataset import GifDataset
from .data.folder import ClipFolder
from .data.gif import gif_to_tensor, video_tensor_to_gif
from .data.mp4 import video_tensor_to_mp4, video_to_tensor
from .data.show import show
from .diffusion import frame_levels, samplers
from .diffusion.gaussian_diffusion import GaussianDiffusion
from .diffusion.latent import LatentDiffusion, diffusion_from_checkpoint, latent_shape
from .networks.dit import DiT
from .networks.lora import add_lora, merge_lora, remove_lora, scale_lora, unmerge_lora
from .networks.text import BertEncoder, T5Encoder, WordEncoder
from .networks.transformer import SpatialTransformer
from .networks.unet3d import Unet3D
from .training import lr_schedule
from .training.ema import EMA
from .training.lora_run import load_lora
from .training.trainer import Trainer
from .training.vae_trainer import VAETrainer
from .vae.causal_vae import CausalVAE
from .vae.temporal_vae import TemporalVAE
from .vae.vae_checkpoint import vae_from_checkpoint
from .vae.vae_loss import PerceptualLoss

__all__ = [
    'BertEncoder', 'CausalVAE', 'ClipFolder', 'DiT', 'EMA', 'GaussianDiffusion', 'GifDataset', 'LatentDiffusion', 'PerceptualLoss',
    'SpatialTransformer', 'T5Encoder', 'TemporalVAE', 'Trainer', 'Unet3D', 'VAETrainer', 'WordEncoder',
    'add_lora', 'checkpoint', 'diffusion_from_checkpoint', 'distributed', 'frame_levels', 'gif_to_tensor', 'latent_shape',
    'load_lora', 'lr_schedule', 'merge_lora', 'remove_lora', 'samplers', 'scale_lora', 'shapes', 'show', 'unmerge_lora',
    'vae_from_checkpoint', 'video_tensor_to_gif', 'video_tensor_to_mp4', 'video_to_tensor',
]

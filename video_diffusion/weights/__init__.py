"""Weights of other projects, read and written: `from video_diffusion.weights import unet_from_lucidrains`."""

from .cogvideox import cogvideox_defaults, cogvideox_from_folder, cogvideox_from_sat, cogvideox_to_folder
from .cogvideox_dit import dit_from_diffusers, dit_from_sat, dit_to_diffusers, dit_to_sat
from .cogvideox_lora import lora_from_diffusers, lora_from_sat, lora_to_diffusers, lora_to_sat
from .cogvideox_vae import causal_vae_from_diffusers, causal_vae_from_sat, causal_vae_to_diffusers
from .lucidrains import unet_from_lucidrains, unet_to_lucidrains
from .svd_vae import temporal_vae_from_diffusers, temporal_vae_to_diffusers

__all__ = [
    'causal_vae_from_diffusers', 'causal_vae_from_sat', 'causal_vae_to_diffusers', 'cogvideox_defaults', 'cogvideox_from_folder',
    'cogvideox_from_sat', 'cogvideox_to_folder', 'dit_from_diffusers', 'dit_from_sat', 'dit_to_diffusers', 'dit_to_sat',
    'lora_from_diffusers', 'lora_from_sat', 'lora_to_diffusers', 'lora_to_sat', 'temporal_vae_from_diffusers',
    'temporal_vae_to_diffusers', 'unet_from_lucidrains', 'unet_to_lucidrains',
]

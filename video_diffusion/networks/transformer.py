"""Transformer blocks for conditioning: the pixels of a frame look at one another, then at a text, then at themselves.

The block of latent diffusion models (Rombach et al. 2022, arXiv 2112.10752), pre-norm, three residual steps:

    x -> x + self_attention(norm(x)) -> x + cross_attention(norm(x), context) -> x + feed_forward(norm(x))

Frames are a batch of images to it, (b f n c) with n = h w; `across_frames` makes the rows of all frames of a clip
look at one another instead. The context belongs to the clip: its keys and values are computed once for all frames.

    transformer = SpatialTransformer(64, heads=8, dim_head=32, context_dim=768)
    x = transformer(x, tokens, mask)           # b c f h w, (b m 768), (b m) bool: False is padding

A new SpatialTransformer changes nothing: its last projection starts at zero.
"""

from functools import partial

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import CrossAttention
from .recompute import plainly, recompute


class FeedForward(nn.Module):
    """Wider, a non-linearity, back. `gated`: one half of the wide rows, through GELU, scales the other (GEGLU,
    arXiv 2002.05202)."""

    def __init__(self, dim: int, mult: int = 4, gated: bool = True):
        super().__init__()
        self.gated = gated
        self.widen = nn.Linear(dim, mult * dim * (2 if gated else 1))
        self.narrow = nn.Linear(mult * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x)                                                            # ... mult*dim, twice if gated
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            return self.narrow(x * F.gelu(gate))
        return self.narrow(F.gelu(x))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int | None = None, *,
                 gated: bool = True, across_frames: bool = False):
        super().__init__()
        self.across_frames = across_frames
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = CrossAttention(dim, heads, dim_head)
        self.norm2 = nn.LayerNorm(dim) if context_dim else None
        self.cross_attention = CrossAttention(dim, heads, dim_head, context_dim) if context_dim else None
        self.norm3 = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, gated=gated)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (b f n c), context (b m context_dim) with mask (b m)."""
        b, f = x.shape[:2]
        rows = rearrange(x, 'b f n c -> b (f n) c' if self.across_frames else 'b f n c -> (b f) n c')
        rows = rows + self.self_attention(self.norm1(rows))
        rows = rows.view(b, -1, rows.shape[-1])                                      # b (f n) c
        if self.cross_attention is not None:
            rows = rows + self.cross_attention(self.norm2(rows), context, mask)
        rows = rows + self.feed_forward(self.norm3(rows))
        return rows.unflatten(1, (f, -1))


class SpatialTransformer(nn.Module):
    """Group norm of each frame, a projection, transformer blocks, a projection back, added to x: (b c f h w)."""

    def __init__(self, channels: int, heads: int, dim_head: int, depth: int = 1, context_dim: int | None = None, *,
                 groups: int = 32, gated: bool = True, across_frames: bool = False, gradient_checkpointing: bool = False):
        super().__init__()
        self.run = partial(recompute, draws=True) if gradient_checkpointing else plainly
        self.has_context = context_dim is not None
        dim = heads * dim_head
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.project_in = nn.Linear(channels, dim)
        self.blocks = nn.ModuleList([
            TransformerBlock(dim, heads, dim_head, context_dim, gated=gated, across_frames=across_frames) for _ in range(depth)])
        self.project_out = nn.Linear(dim, channels)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """context (b m context_dim), mask (b m): see CrossAttention."""
        if self.has_context != (context is not None):
            raise ValueError('this SpatialTransformer was built with context_dim: give a context (batch, tokens, context_dim)'
                             if self.has_context else 'a context was given, but this SpatialTransformer has no context_dim')
        b, _, f, h, w = x.shape
        rows = self.norm(rearrange(x, 'b c f h w -> (b f) c h w'))
        rows = self.project_in(rearrange(rows, '(b f) c h w -> b f (h w) c', b=b))
        for block in self.blocks:
            rows = self.run(block, rows, context, mask)
        return x + rearrange(self.project_out(rows), 'b f (h w) c -> b c f h w', h=h)

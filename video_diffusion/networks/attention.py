"""Attention over time and over space, for videos.

A video has too many pixels to let every pixel of every frame attend to every other. The factorised
U-Net of "Video Diffusion Models" (Ho et al. 2022, arXiv 2204.03458) therefore attends twice: along time,
where each pixel position sees itself in all frames, and along space, where the pixels of one frame see
one another.

    TemporalAttention        b h w sequences of f frames     softmax, rotary + relative-position bias
    SpatialAttention         b f sequences of h w pixels     softmax, for the small map in the middle
    SpatialLinearAttention   b f sequences of h w pixels     linear in h w, for the large maps

Each of these maps a video x (b, c, f, h, w) to `x + attention(norm(x))`. Others build on these:

    SpatialSelfAttention     the same for the images of an autoencoder: one head, group norm, b c h w
    CrossAttention           rows (b, n, c) look at the rows of a context
    TextAttention            the same for the pixels of a video and a caption's tokens, in the U-Net

transformer.py builds on the second half.

**Layout.** The U-Net keeps its tensors channels-last: b c f h w by shape, b f h w c in memory. A pixel's
channels then lie side by side, so the norms and projections below work on plain rows, and no
rearrangement in this file that ends in `c` copies anything.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

from . import fused
from .recompute import in_slices, little


class Products(torch.autograd.Function):
    """q k^T of many small matrices (n f d). Torch sees a product with k^T, and writes the gradient of that; all that comes before
    wants the one of k, row by row, which is another product and takes half the time."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return q @ k.mT

    @staticmethod
    def backward(ctx, grad):
        q, k = ctx.saved_tensors
        grad = grad.contiguous()
        return grad @ k, grad.mT @ q


class ChannelNorm(nn.Module):
    """Layer norm over the channels, the last axis, with a gain and no bias."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if fused.fits(x):
            return fused.channel_norm(x, self.gain)
        return F.layer_norm(x, self.gain.shape, self.gain, eps=1e-5)


class RelativePositionBias(nn.Module):
    """A learned number per head and distance between frames, added to the attention logits (T5, arXiv 1910.10683).

    Distances are sorted into buckets: half of them for each sign; of a half, the first half hold one
    distance each and the rest grow logarithmically up to `max_distance`, beyond which all share the last.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 32):
        super().__init__()
        self.max_distance = max_distance
        self.bias = nn.Embedding(buckets, heads)

    def bucket(self, distance: Tensor) -> Tensor:
        buckets_per_sign = self.bias.num_embeddings // 2
        exact = buckets_per_sign // 2
        size = distance.abs()
        growth = torch.log(size.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        coarse = (exact + (growth * (buckets_per_sign - exact)).long()).clamp(max=buckets_per_sign - 1)
        return torch.where(size < exact, size, coarse) + torch.where(distance > 0, buckets_per_sign, 0)

    def forward(self, frames: int) -> Tensor:
        position = torch.arange(frames, device=self.bias.weight.device)
        bias = self.bias(self.bucket(position[None, :] - position[:, None]))  # query, key, heads
        return rearrange(bias, 'i j heads -> heads i j')


def rotations(frames: int, rotary: RotaryEmbedding, dim_head: int) -> tuple[Tensor, Tensor]:
    """Rotary embedding (arXiv 2104.09864) as tables of cosines and of sines, (f, dim_head) each.

    Features are taken in pairs, as points of a plane. Pair j of frame i is turned by the angle i * frequency_j, from
    (x, y) to (x cos - y sin, y cos + x sin); signs are in the table. Pairs beyond the rotary's own stay as they are.
    """
    position = torch.arange(frames, device=rotary.freqs.device)
    angle = F.pad(position[:, None] * rotary.freqs.float(), (0, dim_head // 2 - len(rotary.freqs)))
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x (... n heads*d) -> (... f n heads*d), each head's pairs turned as for every frame, by tables (f d)."""
    cos, sin = (table[:, None, None, :] for table in turn)                      # f 1 1 d
    x = x.unflatten(-1, (-1, cos.shape[-1])).unsqueeze(-4)                      # ... 1 n heads d
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack((second, first), dim=-1).flatten(-2)
    return (x * cos + swapped * sin).flatten(-2).to(x.dtype)


class TemporalAttention(nn.Module):
    """Each pixel position attends to itself in every frame."""

    def __init__(self, dim: int, heads: int, dim_head: int, rotary: RotaryEmbedding):
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.narrow = dim <= dim_head
        self.little = little(dim)
        self.rotary = rotary  # shared by all layers; holds the frequencies
        self.norm = ChannelNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, turn: tuple[Tensor, Tensor], frames_alone: bool = False) -> Tensor:
        """x (b c f h w); bias (heads f f), or (b 1 heads f f) where samples differ; turn: the tables of `rotations`.

        `frames_alone`: no frame sees another. Attention to oneself only is the value, whatever the weights.
        """
        f, h, width = x.shape[2], x.shape[3], self.to_qkv.out_features
        x = rearrange(x, 'b c f h w -> b f (h w) c')
        to_qk, to_v = whole_weight(self.to_qkv).t().split((width // 3 * 2, width // 3), dim=-1)    # c heads*d
        if frames_alone:
            x = in_slices(self.look_at_oneself, x, 2, width, to_v)
        elif fused.fits(x, self.dim_head, f):
            x = in_slices(self.look_along_time_fused, x, 2, width, rotate(to_qk, turn), to_v, bias)
        else:
            # To turn what a weight makes of any input is to turn the weight, for each frame.
            to_q, to_k = (rotate(weight, turn) for weight in to_qk.chunk(2, dim=-1))                # f c heads*d
            if self.narrow:
                to_v = value_and_output(to_v, whole_weight(self.to_out), self.heads).flatten(0, 1)  # heads*c c
            x = in_slices(self.look_along_time, x, 2, width, to_q * self.dim_head ** -0.5, to_k, to_v,
                          rearrange(bias, '... heads f g -> ... g f heads'))
        return rearrange(x, 'b f (h w) c -> b c f h w', h=h)

    def look_along_time_fused(self, x: Tensor, to_qk: Tensor, to_v: Tensor, bias: Tensor) -> Tensor:
        """x (b f n c), to_qk (f c 2*heads*d): the product of queries and keys, the softmax and what it weighs in one kernel."""
        rows = self.norm(x)
        qk = torch.einsum('b f n c, f c o -> b f n o', rows, to_qk)
        return x + self.to_out(fused.along_time(qk, rows @ to_v, bias, self.heads))

    def look_along_time(self, x: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, bias: Tensor) -> Tensor:
        """x (b f n c). Frame f looks at frame g: to_q and to_k (f c heads*d) differ by frame, bias is (... g f heads).

        Products are small and many here, and take what comes as it lies in memory: by frame, where frames have weights of their
        own; by pixel and head, where frames meet. The softmax is along g, with the other two behind it, for rows shorter than
        a register are taken number by number. Where rows are narrower than values, and one for all heads, it is sooner to take
        weights (rows to_v) to_out as (weights rows) (to_v to_out), and to_v is that product.
        """
        b, f, n, c = x.shape
        rows = rearrange(self.norm(x), 'b f n c -> f (b n) c')
        q, k = (rearrange(rows @ weight, 'f p (heads d) -> (p heads) f d', heads=self.heads) for weight in (to_q, to_k))
        logits = rearrange(Products.apply(q, k), '(b n heads) f g -> b n g f heads', b=b, n=n).contiguous()
        weights = (logits + bias).softmax(dim=2)
        if self.narrow:
            weights = rearrange(weights, 'b n g f heads -> (b n) (f heads) g')              # no copy
            seen = weights @ rearrange(rows, 'g p c -> p g c').contiguous()                 # b*n f*heads c
            seen = rearrange(seen, 'p (f heads) c -> p f (heads c)', f=f) @ to_v
            return x + rearrange(seen, '(b n) f c -> b f n c', b=b)
        v = rearrange(rows @ to_v, 'g p (heads d) -> (p heads) g d', heads=self.heads)
        seen = rearrange(weights, 'b n g f heads -> (b n heads) f g') @ v                   # b*n*heads f d
        return x + self.to_out(rearrange(seen, '(b n heads) f d -> b f n (heads d)', b=b, n=n))

    def look_at_oneself(self, x: Tensor, to_v: Tensor) -> Tensor:
        return x + self.to_out(self.norm(x) @ to_v)


def whole_weight(layer: nn.Linear) -> Tensor:
    """What a layer multiplies its input with: of one that has an adapter beside it (lora.py), more than its `weight`."""
    return layer.whole_weight() if hasattr(layer, 'whole_weight') else layer.weight


def value_and_output(to_v: Tensor, to_out: Tensor, heads: int) -> Tensor:
    """What a row becomes by its value and a head's share of the output: (c heads*d), (o heads*d) -> (heads c o)."""
    return torch.einsum('c h d, o h d -> h c o', *(weight.unflatten(-1, (heads, -1)) for weight in (to_v, to_out)))


def self_attention(x: Tensor, to_qkv: nn.Linear, to_out: nn.Linear, heads: int, core=F.scaled_dot_product_attention) -> Tensor:
    """Rows x (b n c) look at one another; `core` is softmax attention or linear attention."""
    q, k, v = rearrange(to_qkv(x), 'b n (qkv heads d) -> qkv b heads n d', qkv=3, heads=heads)
    return to_out(rearrange(core(q, k, v), 'b heads n d -> b n (heads d)'))


class SpatialAttention(nn.Module):
    """The pixels of a frame attend to one another."""

    has_bias = False

    def __init__(self, dim: int, heads: int, dim_head: int = 32):
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.little = little(dim)
        self.norm = ChannelNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=self.has_bias)

    def forward(self, x: Tensor) -> Tensor:
        b, h = x.shape[0], x.shape[3]
        x = self.look(rearrange(x, 'b c f h w -> (b f) (h w) c'))
        return rearrange(x, '(b f) (h w) c -> b c f h w', b=b, h=h)

    def look(self, x: Tensor) -> Tensor:
        return in_slices(self.look_around, x, 0, self.to_qkv.out_features)

    def look_around(self, x: Tensor) -> Tensor:
        return x + self_attention(self.norm(x), self.to_qkv, self.to_out, self.heads)


class SpatialSelfAttention(nn.Module):
    """The pixels of an image attend to one another with one head as wide as the image has channels: (n c h w)."""

    def __init__(self, dim: int, groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows = rearrange(self.norm(x), 'n c h w -> n (h w) c')
        out = self_attention(rows, self.to_qkv, self.to_out, heads=1)
        return x + rearrange(out, 'n (h w) c -> n c h w', h=x.shape[2])


class CrossAttention(nn.Module):
    """Rows x (b n c) look at the rows of a context (b m context_dim), or at one another where there is none."""

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(context_dim or dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`mask` (b m): False for rows of the context that are padding. Each item needs one that is not."""
        q = rearrange(self.to_q(x), 'b n (heads d) -> b heads n d', heads=self.heads)
        kv = self.to_kv(x if context is None else context)
        k, v = rearrange(kv, 'b m (kv heads d) -> kv b heads m d', kv=2, heads=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.bool()[:, None, None, :])
        return self.to_out(rearrange(out, 'b heads n d -> b n (heads d)'))


class TextAttention(nn.Module):
    """All pixels of a clip look at the tokens of its caption: b c f h w. A new one changes nothing."""

    def __init__(self, dim: int, heads: int, token_dim: int, dim_head: int = 32):
        super().__init__()
        self.little = little(dim)
        self.norm = ChannelNorm(dim)
        self.attention = CrossAttention(dim, heads, dim_head, token_dim)
        nn.init.zeros_(self.attention.to_out.weight)
        nn.init.zeros_(self.attention.to_out.bias)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (b m token_dim), mask (b m): see CrossAttention."""
        f, h = x.shape[2:4]
        x = rearrange(x, 'b c f h w -> b (f h w) c')
        x = in_slices(self.look_at_text, x, 1, self.attention.to_q.out_features, tokens, mask)
        return rearrange(x, 'b (f h w) c -> b c f h w', f=f, h=h)

    def look_at_text(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return x + self.attention(self.norm(x), tokens, mask)


def attend_linearly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention at a cost linear in the number of rows (arXiv 1812.01243): q, k, v (..., heads, n, d).

    Softmax attention weighs values by softmax(q k^T), an n x n matrix. Here queries and keys are normalised
    apart, softmax(q) over features and softmax(k) over rows, so that the product can be taken from the
    right: first the context k^T v, a d x d summary of all rows, and then q times that.
    """
    context = k.transpose(-1, -2).softmax(dim=-1) @ v                           # ... heads d d; fastest along the last axis
    return q.softmax(dim=-1) @ (context * q.shape[-1] ** -0.5)                  # scaled where there is least to scale


class SpatialLinearAttention(SpatialAttention):
    """The pixels of a frame attend to one another at a cost linear in their number."""

    has_bias = True

    def look(self, x: Tensor) -> Tensor:
        width = self.to_qkv.out_features
        if fused.fits(x, self.dim_head):
            return in_slices(self.look_around_fused, x, 0, width)
        if x.shape[-2] <= x.shape[-1]:
            return super().look(x)
        to_q, to_k, to_v = whole_weight(self.to_qkv).chunk(3)                                       # heads*d c
        told = value_and_output(to_v.t(), whole_weight(self.to_out), self.heads) * self.dim_head ** -0.5    # where least is scaled
        return in_slices(self.without_values, x, 0, width, to_q.t(), to_k, told)

    def look_around(self, x: Tensor) -> Tensor:
        return x + self_attention(self.norm(x), self.to_qkv, self.to_out, self.heads, attend_linearly)

    def look_around_fused(self, x: Tensor) -> Tensor:
        return x + self.to_out(fused.linearly(self.to_qkv(self.norm(x)), self.heads))

    def without_values(self, x: Tensor, to_q: Tensor, to_k: Tensor, told: Tensor) -> Tensor:
        """The same, sooner where rows (b n c) are more than their channels. With v = rows to_v all is one chain of products,

            softmax(q) ((softmax(k)^T rows) (to_v to_out))

        and in this order no pixel has a value, nor an output of each head: only a query and a key. to_q (c heads*d), to_k
        (heads*d c); told (heads c c) is what to_v and to_out make of a row.
        """
        rows = self.norm(x)
        q = (rows @ to_q).unflatten(-1, (self.heads, -1)).softmax(dim=-1).flatten(-2)               # b n heads*d
        k = (to_k.expand(rows.shape[0], -1, -1) @ rows.mT).softmax(dim=-1)                          # b heads*d n: fast along n
        seen = (k @ rows).unflatten(1, (self.heads, -1))                                            # b heads d c
        context = torch.einsum('b h d c, h c o -> b h d o', seen, told).flatten(1, 2)               # b heads*d c
        return x + q @ context + self.to_out.bias

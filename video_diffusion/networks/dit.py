"""DiT: text and video as one sequence, and a transformer over it. The network of CogVideoX (arXiv 2408.06072).

Where the U-Net looks along time, then along space, then at the caption, the diffusion transformer (Peebles & Xie 2022, arXiv
2212.09748) cuts the clip into patches and lets all of them, and the caption's tokens, look at one another at once:

    caption (b n cond_dim) ------------------- Linear -----.
                                                            [text | video] -> block -> block -> ... -> video -> Linear -> patches
    x (b c f h w) -> patches of (1 2 2) -> rows -- Linear --'    ^        ^                                                 |
    step (b) -> waves -> MLP ------------------------------------'--------'                                           b c f h w

Nothing in a block is made for images. Where a token is, it is told (positions.py); how noisy all of it is, its norms are told:
they scale and shift by what a Linear makes of the diffusion step, another one for text than for video, and as a third
number comes a gate that the block's answer must pass. All of them start at zero, so that a new block changes nothing.

    >>> dit = DiT(128, cond_dim=64, channels=3, depth=6, dim_head=32, patch=4, text_length=8)      # the toy world
    >>> dit(torch.randn(2, 3, 8, 16, 16), torch.tensor([500, 3]), WordEncoder(64).tokens(captions)).shape
    torch.Size([2, 3, 8, 16, 16])

It is called like Unet3D. Captions are filled up with rows of zeros to `text_length`, and those are looked at like
any others, for so the pretrained models know it; no caption is rows of zeros alone. `weights/cogvideox_dit.py` reads those:

    2B              DiT(1920, 4096, 16, depth=30, positions='sincos', text_length=226, time_dim=512)
    5B              DiT(3072, 4096, 16, depth=42, positions='rope', ...)
    5B-I2V          the same with positions='rope+learned', size=(13, 60, 90), cond_frames=True: it is told the first frame
    1.5-5B (I2V)    the 5B with frame_patch=2 (and cond_frames=True, ofs=True)
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checks import one_of, whole
from .positions import Grid, rope, sincos, step_waves, turn
from .recompute import on_cpu, recompute
from .unet3d import Unet3D, bernoulli, with_known_frames

OFS = 2.                         # an input of 1.5-5B-I2V that never had another value


def modulated(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, for x (b n dim) and what each sample is told (b dim).

    The norm's own gain and bias join it. The tokens of a sample then have one gain, which is all that a plain layer norm
    needs, and nothing but x is kept for the backward pass. A GPU would rather do all samples at once.
    """
    gains = norm.weight * (1 + scale)
    biases = norm.bias * (1 + scale) + shift
    if not on_cpu(x) or torch.compiler.is_compiling():
        return torch.addcmul(biases[:, None], F.layer_norm(x, norm.normalized_shape, eps=norm.eps), gains[:, None])
    return torch.stack([F.layer_norm(one, norm.normalized_shape, gain, bias, norm.eps)
                        for one, gain, bias in zip(x.unbind(), gains.unbind(), biases.unbind())])


class AdaptiveNorm(nn.Module):
    """A layer norm modulated by the step (b emb_dim), and gates; text and video share the norm and are told different things."""

    def __init__(self, dim: int, emb_dim: int, has_text: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.for_video = nn.Linear(emb_dim, 3 * dim)
        self.for_text = nn.Linear(emb_dim, 3 * dim) if has_text else None

    def forward(self, text: Tensor | None, video: Tensor, emb: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """(b n dim), (b m dim) -> both as one sequence (b n+m dim), and the gates of either (b 1 dim)."""
        shift, scale, video_gate = self.for_video(emb).chunk(3, dim=-1)
        rows = modulated(video, self.norm, shift, scale)
        if text is None:
            return rows, None, video_gate[:, None]
        shift, scale, text_gate = self.for_text(emb).chunk(3, dim=-1)
        rows = torch.cat((modulated(text, self.norm, shift, scale), rows), dim=1)
        return rows, text_gate[:, None], video_gate[:, None]


class DiTBlock(nn.Module):
    """Attention of all tokens to all, then a feed-forward for each; both behind a norm and a gate that know the step."""

    def __init__(self, dim: int, dim_head: int, emb_dim: int, has_text: bool):
        super().__init__()
        self.dim_head = dim_head
        self.attention_norm = AdaptiveNorm(dim, emb_dim, has_text)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim_head, eps=1e-6)       # one for all heads
        self.k_norm = nn.LayerNorm(dim_head, eps=1e-6)
        self.to_out = nn.Linear(dim, dim)
        self.feed_forward_norm = AdaptiveNorm(dim, emb_dim, has_text)
        self.widen = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)

    def forward(self, text: Tensor | None, video: Tensor, emb: Tensor, angles: tuple[Tensor, Tensor] | None,
                ) -> tuple[Tensor | None, Tensor]:
        """text (b n dim), video (b m dim), emb (b emb_dim); angles: cosines and sines (n+m dim_head) of all tokens."""
        rows, *gates = self.attention_norm(text, video, emb)                         # b n+m dim
        q = self.heads(self.to_q(rows), self.q_norm, angles)                         # b heads n+m dim_head
        k = self.heads(self.to_k(rows), self.k_norm, angles)
        v = self.heads(self.to_v(rows))
        rows = rearrange(F.scaled_dot_product_attention(q, k, v), 'b heads n d -> b n (heads d)')
        del q, k, v                                                                  # or they would live on through the next line
        text, video = add_gated(text, video, self.to_out(rows), *gates)

        rows, *gates = self.feed_forward_norm(text, video, emb)
        rows = self.widen(rows)                                                      # b n+m 4*dim
        rows = recompute(self.gelu_and_narrow, rows) if rows.requires_grad else self.gelu_and_narrow(rows)
        return add_gated(text, video, rows, *gates)

    def gelu_and_narrow(self, rows: Tensor) -> Tensor:
        """GELU in its tanh form. Rows are the widest tensor there is: where no backward pass will ask for it, it is overwritten."""
        gelu = F.gelu if rows.requires_grad else torch.ops.aten.gelu_
        return self.narrow(gelu(rows, approximate='tanh'))

    def heads(self, x: Tensor, norm: nn.LayerNorm | None = None, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x.unflatten(-1, (-1, self.dim_head))                                     # b n heads d
        if norm is not None:
            x = norm(x)
        if angles is not None:
            x = turn(x, *angles)
        return x.transpose(1, 2)


def add_gated(text: Tensor | None, video: Tensor, rows: Tensor, text_gate: Tensor | None, video_gate: Tensor,
              ) -> tuple[Tensor | None, Tensor]:
    """What a half of a block says (b n+m dim), through the gates, to text (b n dim) and video (b m dim)."""
    if text is None:
        return None, torch.addcmul(video, video_gate, rows)
    text_rows, video_rows = rows.split((text.shape[1], video.shape[1]), dim=1)
    return torch.addcmul(text, text_gate, text_rows), torch.addcmul(video, video_gate, video_rows)


class DiT(nn.Module):
    def __init__(
        self,
        dim: int,                            # width of a token
        cond_dim: int | None = None,         # width of a caption's tokens; None: unconditional
        channels: int = 3,
        *,
        depth: int = 6,                      # blocks
        dim_head: int = 64,                  # width of a head of the attention; dim / dim_head is their number
        patch: int = 2,                      # side of the square of pixels that is one token
        frame_patch: int = 1,                # and how many frames of it
        positions: str = 'rope',             # 'sincos', 'rope' or 'rope+learned': see positions.py
        text_length: int = 8,                # tokens of every caption, most of which may be zeros
        size: tuple[int, int, int] | None = None,  # (f, h, w) of the clips it is made for; the learned table fits no other h, w
        time_dim: int | None = None,         # width of the vector that the step becomes; None: dim, at most 512
        cond_frames: bool = False,           # known frames are more input channels; see known_frames.py
        ofs: bool = False,                   # the input of 1.5-5B-I2V
        final_eps: float = 1e-5,             # of the last norm; 1e-6 where CogVideoX's own code has made the weights
        checkpoint_activations: bool = False,  # compute every block again in the backward pass: less memory, more time
    ):
        super().__init__()
        time_dim = time_dim or min(dim, 512)
        # All that is needed to build this network again; checkpoints store it.
        self.config = {k: v for k, v in locals().items() if k not in ('self', '__class__', 'checkpoint_activations')}
        for name in ('dim', 'channels', 'depth', 'dim_head', 'patch', 'frame_patch'):
            whole(name, self.config[name], 1)
        if dim % dim_head or dim_head % 16:
            raise ValueError(f'dim={dim}, dim_head={dim_head}: give a multiple of 16 as dim_head and a multiple of that as dim')
        one_of('positions', positions, ('sincos', 'rope', 'rope+learned'))
        if positions == 'rope+learned' and size is None:
            raise ValueError("positions='rope+learned': give size, the (frames, height, width) that the table is made for")
        self.channels, self.cond_dim, self.cond_frames = channels, cond_dim, cond_frames
        self.has_cond = self.text_tokens = cond_dim is not None
        self.dim, self.dim_head, self.positions = dim, dim_head, positions
        self.patch = (frame_patch, patch, patch)
        self.text_length = text_length if self.has_cond else 0
        self.size = size

        self.time_mlp = nn.Sequential(nn.Linear(dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.ofs_mlp = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)) if ofs else None

        pixels = frame_patch * patch * patch
        self.from_patches = nn.Linear((2 if cond_frames else 1) * channels * pixels, dim)
        self.from_text = nn.Linear(cond_dim, dim) if self.has_cond else None
        self.table = None
        if positions == 'rope+learned':
            f, h, w = self.grid(size)
            self.table = nn.Parameter(torch.zeros(1, self.text_length + f * h * w, dim))

        self.blocks = nn.ModuleList(DiTBlock(dim, dim_head, time_dim, self.has_cond) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.final_norm = nn.LayerNorm(dim, eps=final_eps)
        self.final_modulation = nn.Linear(time_dim, 2 * dim)
        self.to_patches = nn.Linear(dim, channels * pixels)
        self.begin()

        if checkpoint_activations:
            self.recompute_blocks()

    def recompute_blocks(self) -> None:
        """In the backward pass, again, from their input: that is a twentieth of what they would keep."""
        for block in self.blocks:
            block.forward = partial(recompute, block.forward)

    def begin(self) -> None:
        """adaLN-zero: all gates are shut and the answer is 0, so that every block starts as if it were not there."""
        for layer in [layer for block in self.blocks for layer in block.modules()] + [self.from_patches]:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        told = [norm for block in self.blocks for norm in (block.attention_norm, block.feed_forward_norm)]
        gates = [layer for norm in told for layer in (norm.for_video, norm.for_text) if layer is not None]
        for layer in (*gates, self.final_modulation, self.to_patches):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,                                   # (b c f h w), noisy video in [-1, 1] plus noise
        time: Tensor,                                # (b), diffusion step
        cond: Tensor | None = None,                  # (b n cond_dim), a caption's tokens; rows of zeros are padding
        null_cond_prob: float = 0.,                  # drop the condition of a sample with this probability
        focus_present_mask: Tensor | None = None,    # these two are there to be refused: no frame is alone here
        prob_focus_present: float = 0.,
        null_cond_mask: Tensor | None = None,        # (b) bool: drop the condition of these samples instead
        known: Tensor | None = None,                 # (b c f h w): known frames in [-1, 1], with `cond_frames` only
        known_mask: Tensor | None = None,            # (b f) bool: which of them are known; None: no frame is
    ) -> Tensor:
        if focus_present_mask is not None or prob_focus_present:
            raise ValueError('focus on the present (and training on images) was asked for: a DiT has no attention within single '
                             'frames, so leave it out or take a Unet3D')
        self.check(x, time, cond, known)
        grid, given, dtype = self.grid(x.shape[2:]), x.dtype, self.to_patches.weight.dtype
        if self.cond_frames:
            x = with_known_frames(x, known, known_mask)[:, :-1]                      # b 2c f h w: known frames, but no mask
        emb = F.silu(self.embed(time, dtype))                                        # b time_dim
        f, h, w = grid
        o, p, q = self.patch
        rows = rearrange(x.to(dtype), 'b c (f o) (h p) (w q) -> b (f h w) (c o p q)', o=o, p=p, q=q)
        video = self.from_patches(rows)                                              # b f*h*w dim
        text = self.read(cond.to(dtype), null_cond_prob, null_cond_mask) if self.has_cond else None   # b text_length dim
        text, video, angles = self.place(text, video, grid)

        for block in self.blocks:
            text, video = block(text, video, emb, angles)

        shift, scale = self.final_modulation(emb).chunk(2, dim=-1)
        video = modulated(self.norm(video), self.final_norm, shift, scale)
        rows = self.to_patches(video).to(given)
        return rearrange(rows, 'b (f h w) (c o p q) -> b c (f o) (h p) (w q)', f=f, h=h, w=w, o=o, p=p, q=q)

    # Scale 1 is the answer with the caption, 0 the one without: the same as there.
    forward_with_cond_scale = Unet3D.forward_with_cond_scale

    def embed(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        """Steps (b) -> (b time_dim)."""
        emb = self.time_mlp(step_waves(time, self.dim).to(dtype))
        if self.ofs_mlp is None:
            return emb
        constant = torch.full((1,), OFS, device=time.device)
        return emb + self.ofs_mlp(step_waves(constant, emb.shape[-1]).to(dtype))

    def read(self, cond: Tensor, null_prob: float, null_mask: Tensor | None) -> Tensor:
        """Tokens of captions (b n cond_dim) -> (b text_length dim)."""
        if null_mask is None:
            null_mask = bernoulli(len(cond), null_prob, cond.device)
        cond = cond.masked_fill(null_mask[:, None, None], 0.)
        return self.from_text(F.pad(cond, (0, 0, 0, self.text_length - cond.shape[1])))

    def place(self, text: Tensor | None, video: Tensor, grid: Grid) -> tuple:
        """Tell tokens where they are, once, or give the angles for the blocks to do it; with either text is in no place."""
        if self.positions == 'sincos':
            return text, video + sincos(grid, self.dim, video.device, video.dtype), None
        if self.table is not None:
            of_text, of_video = self.table.split((self.text_length, self.table.shape[1] - self.text_length), dim=1)
            text = text if text is None else text + of_text
            video = video + of_video[:, :video.shape[1]]                             # a shorter clip is the beginning of one
        precision = torch.promote_types(video.dtype, torch.float32)
        native = self.grid(self.size) if self.size and self.patch[0] == 1 else None          # CogVideoX 1.5 just counts
        return text, video, rope(grid, self.dim_head, self.text_length, video.device, precision, native)

    def grid(self, size: tuple[int, int, int]) -> Grid:
        """How many tokens clips of size (f, h, w) have in each direction."""
        return tuple(length // step for length, step in zip(size, self.patch))

    def check(self, x: Tensor, time: Tensor, cond: Tensor | None, known: Tensor | None) -> None:
        """Say what is wrong with an input before a layer deep inside says something else."""
        if x.ndim != 5 or x.shape[1] != self.channels:
            raise ValueError(f'the video has shape {tuple(x.shape)}: expected '
                             f'(batch, {self.channels} channels, frames, height, width)')
        size = tuple(x.shape[2:])
        if any(length % step for length, step in zip(size, self.patch)):
            raise ValueError(f'frames, height and width are {size}: give multiples of {self.patch}, the size of a patch')
        if self.table is not None and (size[0] > self.size[0] or size[1:] != tuple(self.size[1:])):
            raise ValueError(f'frames, height and width are {size}: this model has a learned table of positions, so give up to '
                             f'{self.size[0]} frames of {self.size[1]}x{self.size[2]}')
        if time.shape != x.shape[:1]:
            raise ValueError(f'time has shape {tuple(time.shape)}: expected ({len(x)},), for a DiT is told one step per video; '
                             "frame_noise='independent' needs a Unet3D")
        if known is not None and not self.cond_frames:
            raise ValueError('known frames were given, but this model was built without cond_frames=True')
        if not self.has_cond and cond is not None:
            raise ValueError('cond was given, but this model was built without cond_dim')
        if not self.has_cond:
            return
        expected = f'({len(x)}, up to {self.text_length} tokens, {self.cond_dim})'
        if cond is None:
            raise ValueError(f'this model is conditional: give cond, a tensor of shape {expected}')
        if cond.ndim != 3 or cond.shape[::2] != (len(x), self.cond_dim) or cond.shape[1] > self.text_length:
            longer = '; for longer captions build it with a larger text_length' if cond.ndim == 3 else ''
            raise ValueError(f'cond has shape {tuple(cond.shape)}: expected {expected}{longer}')

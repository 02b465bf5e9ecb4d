"""Norms in two passes over memory, in Triton: what a GPU does in place of a dozen operations of torch. See fused.py.

A norm reads a video to know its mean and deviation, and once more to use them. Whatever else follows for each number by itself, a
FiLM, a SiLU, the bias of the convolution before, joins the second reading.

    layer_norm, layer_norm_backward      of a pixel's channels, which one tile holds: a single reading
    moments, settle, activate            group norm, FiLM and SiLU; and backward slopes, settle_backward, deactivate
    frame_moments, conditioned_silu      the same for the VAE's planes, where a latent sets scale and offset; forward only

In capitals what is known when a kernel is compiled: R rows of a tile, C its channels, G channels of a group, T tiles that are
summed at a time. All are powers of two, and what is beyond the real numbers is masked.
"""

import triton
import triton.language as tl

# ---- layer norm: x (n c)

@triton.jit
def normal(x, c, eps):
    """Rows without mean, over their deviation; and 1 / deviation. Beyond the c channels x is 0."""
    there = tl.arange(0, x.shape[1])[None, :] < c
    x = tl.where(there, x - (tl.sum(x, 1) / c)[:, None], 0.)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / c + eps)[:, None]
    return x * rstd, rstd


@triton.jit
def layer_norm(x, gain, y, n, c, eps, R: tl.constexpr, C: tl.constexpr):
    row, channel = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, C)
    at, real = row[:, None] * c + channel[None, :], (row < n)[:, None] & (channel < c)[None, :]
    z, _ = normal(tl.load(x + at, mask=real, other=0.).to(tl.float32), c, eps)
    tl.store(y + at, z * tl.load(gain + channel, mask=channel < c, other=0.)[None, :], mask=real)


@triton.jit
def layer_norm_backward(x, gain, grad, grad_x, grad_gain, n, c, eps, R: tl.constexpr, C: tl.constexpr):
    """grad_gain (programs c)"""
    channel = tl.arange(0, C)
    weight, learnt = tl.load(gain + channel, mask=channel < c, other=0.)[None, :], tl.zeros((C,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n, R), tl.num_programs(0)):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        at, real = row[:, None] * c + channel[None, :], (row < n)[:, None] & (channel < c)[None, :]
        z, rstd = normal(tl.load(x + at, mask=real, other=0.).to(tl.float32), c, eps)
        g = tl.load(grad + at, mask=real, other=0.).to(tl.float32)
        learnt += tl.sum(g * z, 0)
        g = g * weight
        g = (g - (tl.sum(g, 1) / c)[:, None] - z * (tl.sum(g * z, 1) / c)[:, None]) * rstd
        tl.store(grad_x + at, g, mask=real)
    tl.store(grad_gain + tl.program_id(0) * c + channel, learnt, mask=channel < c)


# ---- group norm, FiLM and SiLU: y = silu(x a + b), x (clips k rows c), a and b (clips k c); k is 1, or the number of frames
#
# With the bias of the convolution before it, u = x + beta, what comes out is silu(gain (u - mean) rstd + shift), with
# gain = weight (scale + 1) and shift = bias (scale + 1) + shift of FiLM. So a = gain rstd and b = shift + (beta - mean) a.
# Tiles of x become sums, `settle` makes a and b of these, and a second reading of x is the last.

@triton.jit
def tile_of(size, c, R: tl.constexpr, C: tl.constexpr):
    """Where a tile begins in x, a row of channels of its count in a and b, and the place of its sums."""
    tile, count, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, C)
    row = tile * R + tl.arange(0, R)
    at = (count.to(tl.int64) * size + row)[:, None] * c + channel[None, :]
    real, sums = (row < size)[:, None] & (channel < c)[None, :], (count * tl.num_programs(0) + tile) * c + channel
    return at, real, count * c + channel, sums


@triton.jit
def moments(x, mean, spread, size, c, R: tl.constexpr, C: tl.constexpr):
    """Of every tile and channel: its mean, and the sum of squares around it."""
    at, real, _, to = tile_of(size, c, R, C)
    values = tl.load(x + at, mask=real, other=0.).to(tl.float32)
    average = tl.sum(values, 0) / tl.minimum(R, size - tl.program_id(0) * R)
    values = tl.where(real, values - average[None, :], 0.)
    tl.store(mean + to, average, mask=tl.arange(0, C) < c)
    tl.store(spread + to, tl.sum(values * values, 0), mask=tl.arange(0, C) < c)


@triton.jit
def of_film(film, at, c, there, WITH_FILM: tl.constexpr):
    """scale + 1 and shift"""
    if WITH_FILM:
        scale, shift = tl.load(film + at, mask=there, other=0.), tl.load(film + c + at, mask=there, other=0.)
        return scale.to(tl.float32) + 1., shift.to(tl.float32)
    else:
        return tl.full(at.shape, 1., tl.float32), tl.zeros(at.shape, tl.float32)


@triton.jit
def tiles_of(start, clip, channel, there, size, tiles, k, c, R: tl.constexpr, T: tl.constexpr):
    """Where the sums of T tiles of a clip lie, which of them are real, and how many rows each tile has."""
    tile = start + tl.arange(0, T)
    at, real = (clip * k * tiles + tile)[:, None] * c + channel[None, :], (tile < k * tiles)[:, None] & there[None, :]
    return at, real, tl.minimum(R, size - tile % tiles * R).to(tl.float32)[:, None]


@triton.jit
def settle(mean, spread, beta, weight, bias, film, a, b, channel_mean, stats, size, tiles, k, c, per_group, eps,
           R: tl.constexpr, T: tl.constexpr, G: tl.constexpr, WITH_FILM: tl.constexpr):
    """One program for each clip and group: its mean and deviation from those of the tiles (Chan et al. 1979), and a and b.

    Nothing large is subtracted from something large. stats (clips groups 2) keeps mean and 1 / deviation.
    """
    clip, group = tl.program_id(0), tl.program_id(1)
    i, there = tl.arange(0, G), tl.arange(0, G) < per_group
    channel = group * per_group + i
    extra = tl.load(beta + channel, mask=there, other=0.).to(tl.float32)
    sums = tl.zeros((G,), tl.float32)
    for start in range(0, k * tiles, T):
        at, real, number = tiles_of(start, clip, channel, there, size, tiles, k, c, R, T)
        sums += tl.sum(number * tl.load(mean + at, mask=real, other=0.), 0)
    own = tl.where(there, sums / (k * size) + extra, 0.)
    middle = tl.sum(own) / per_group
    around = tl.zeros((G,), tl.float32)
    for start in range(0, k * tiles, T):
        at, real, number = tiles_of(start, clip, channel, there, size, tiles, k, c, R, T)
        off = tl.load(mean + at, mask=real, other=0.) + extra[None, :] - middle
        around += tl.sum(tl.where(real, tl.load(spread + at, mask=real, other=0.) + number * off * off, 0.), 0)
    rstd = tl.rsqrt(tl.sum(around) / per_group / (k * size) + eps)
    tl.store(channel_mean + clip * c + channel, own, mask=there)
    tl.store(stats + (clip * tl.num_programs(1) + group) * 2, middle)
    tl.store(stats + (clip * tl.num_programs(1) + group) * 2 + 1, rstd)
    gain, offset = tl.load(weight + channel, mask=there, other=0.), tl.load(bias + channel, mask=there, other=0.)
    for count in range(clip * k, clip * k + k):
        scale, shift = of_film(film, count * 2 * c + channel, c, there, WITH_FILM)
        factor = gain * scale * rstd
        tl.store(a + count * c + channel, factor, mask=there)
        tl.store(b + count * c + channel, offset * scale + shift + (extra - middle) * factor, mask=there)


@triton.jit
def activate(x, y, a, b, size, c, R: tl.constexpr, C: tl.constexpr):
    at, real, of, _ = tile_of(size, c, R, C)
    z = before_silu(tl.load(x + at, mask=real, other=0.).to(tl.float32), a, b, of, tl.arange(0, C) < c)
    tl.store(y + at, z * tl.sigmoid(z), mask=real)


@triton.jit
def before_silu(x, a, b, of, there):
    return x * tl.load(a + of, mask=there)[None, :] + tl.load(b + of, mask=there)[None, :]


@triton.jit
def slope(z, g):
    """g d silu(z) / dz"""
    s = tl.sigmoid(z)
    return g * s * (1 + z * (1 - s))


@triton.jit
def slopes(x, g, a, b, grad_a, grad_b, size, c, R: tl.constexpr, C: tl.constexpr):
    """What every tile teaches a and b: the sums of slope x and of slope."""
    at, real, of, to = tile_of(size, c, R, C)
    there = tl.arange(0, C) < c
    values = tl.load(x + at, mask=real, other=0.).to(tl.float32)
    down = slope(before_silu(values, a, b, of, there), tl.load(g + at, mask=real, other=0.).to(tl.float32))
    tl.store(grad_a + to, tl.sum(down * values, 0), mask=there)
    tl.store(grad_b + to, tl.sum(down, 0), mask=there)


@triton.jit
def settle_backward(grad_a, grad_b, beta, weight, bias, film, channel_mean, stats, grad_film, p, q, learnt,
                    size, tiles, k, c, per_group, T: tl.constexpr, G: tl.constexpr, WITH_FILM: tl.constexpr):
    """What the statistics pass on to every x, as grad_x = slope a + x p + q; the slope of FiLM; and what beta, weight and bias
    learn from this clip: learnt (clips 3 c).

    gain and shift see z = (u - mean) rstd: slopes A = sum slope z and B = sum slope. Through mean, B gain rstd / N is taken
    from each u of the group, and through rstd z A gain rstd / N.
    """
    clip, group = tl.program_id(0), tl.program_id(1)
    i, there = tl.arange(0, G), tl.arange(0, G) < per_group
    channel = group * per_group + i
    extra, gain = tl.load(beta + channel, mask=there, other=0.).to(tl.float32), tl.load(weight + channel, mask=there, other=0.)
    offset = tl.load(bias + channel, mask=there, other=0.)
    middle = tl.load(stats + (clip * tl.num_programs(1) + group) * 2)
    rstd = tl.load(stats + (clip * tl.num_programs(1) + group) * 2 + 1)
    to_gain, to_offset, direct = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    through_rstd, through_mean = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    for count in range(clip * k, clip * k + k):
        with_x, alone = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
        for start in range(0, tiles, T):
            tile = start + tl.arange(0, T)
            at, real = (count * tiles + tile)[:, None] * c + channel[None, :], (tile < tiles)[:, None] & there[None, :]
            with_x += tl.sum(tl.load(grad_a + at, mask=real, other=0.), 0)
            alone += tl.sum(tl.load(grad_b + at, mask=real, other=0.), 0)
        with_z = (with_x + (extra - middle) * alone) * rstd
        scale, _ = of_film(film, count * 2 * c + channel, c, there, WITH_FILM)
        if WITH_FILM:
            tl.store(grad_film + count * 2 * c + channel, with_z * gain + alone * offset, mask=there)
            tl.store(grad_film + count * 2 * c + c + channel, alone, mask=there)
        to_gain += with_z * scale
        to_offset += alone * scale
        direct += alone * gain * scale * rstd
        through_rstd += with_z * gain * scale
        through_mean += alone * gain * scale
    number = per_group * size * k
    factor = -tl.sum(through_rstd) * rstd * rstd / number
    shift = -tl.sum(through_mean) * rstd / number - factor * middle
    own = tl.load(channel_mean + clip * c + channel, mask=there, other=0.)
    tl.store(p + clip * c + channel, tl.full((G,), 0., tl.float32) + factor, mask=there)
    tl.store(q + clip * c + channel, shift + factor * extra, mask=there)
    tl.store(learnt + clip * 3 * c + channel, direct + (factor * own + shift) * size * k, mask=there)
    tl.store(learnt + clip * 3 * c + c + channel, to_gain, mask=there)
    tl.store(learnt + clip * 3 * c + 2 * c + channel, to_offset, mask=there)


@triton.jit
def deactivate(x, g, grad_x, a, b, p, q, size, k, c, R: tl.constexpr, C: tl.constexpr):
    """grad_x = slope a + x p + q"""
    at, real, of, _ = tile_of(size, c, R, C)
    there, of_clip = tl.arange(0, C) < c, tl.program_id(1) // k * c + tl.arange(0, C)
    values = tl.load(x + at, mask=real, other=0.).to(tl.float32)
    down = slope(before_silu(values, a, b, of, there), tl.load(g + at, mask=real, other=0.).to(tl.float32))
    passed = values * tl.load(p + of_clip, mask=there)[None, :] + tl.load(q + of_clip, mask=there)[None, :]
    tl.store(grad_x + at, down * tl.load(a + of, mask=there)[None, :] + passed, mask=real)


# ---- the VAE's group norm: y = silu((x a + s) gain + offset), x (b c f h w) in planes of h w pixels with any strides outside these

@triton.jit
def frame_moments(x, mean, spread, number, pixels, frames, groups, per_group, x_b, x_c, x_f, share, R: tl.constexpr):
    """Of every frame's groups of channels and every share of their pixels: mean, sum of squares around it, how many numbers."""
    which, split = tl.program_id(0), tl.program_id(1)                           # which: b groups frames
    frame, group, b = which % frames, which // frames % groups, which // frames // groups
    start, stop = split * share, tl.minimum(pixels, split * share + share)
    n, middle, around = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    plane = x + b.to(tl.int64) * x_b + (group * per_group).to(tl.int64) * x_c + frame.to(tl.int64) * x_f
    for _ in range(per_group):
        for at in range(start, stop, R):
            pixel = at + tl.arange(0, R)
            values = tl.load(plane + pixel, mask=pixel < stop, other=0.).to(tl.float32)
            count = tl.minimum(R, stop - at) + tl.zeros((1,), tl.float32)
            average = tl.sum(values) / count
            values = tl.where(pixel < stop, values - average, 0.)
            off = average - middle
            around += tl.sum(values * values) + off * off * n * count / (n + count)
            middle += off * count / (n + count)
            n += count
        plane += x_c
    to = which * tl.num_programs(1) + split + tl.arange(0, 1)
    tl.store(mean + to, middle)
    tl.store(spread + to, around)
    tl.store(number + to, n)


@triton.jit
def conditioned_silu(x, y, scale, shift, gain, offset, latent, pixels, width, frames, channels, x_b, x_c, x_f, per_frame,
                     z_frames, z_height, z_width, rows, columns, R: tl.constexpr, CONDITIONED: tl.constexpr):
    """One pixel of the latent covers rows x columns of x, in the frames whose `latent` says so. scale (b c f) or (b c)."""
    which, pixel = tl.program_id(0), tl.program_id(1) * R + tl.arange(0, R)     # which: b channels frames
    frame, channel, b = which % frames, which // frames % channels, which // frames // channels
    of_channel = b * channels + channel
    plane = x + b.to(tl.int64) * x_b + channel.to(tl.int64) * x_c + frame.to(tl.int64) * x_f
    at = tl.where(per_frame, of_channel * frames + frame, of_channel)
    z = tl.load(plane + pixel, mask=pixel < pixels, other=0.).to(tl.float32) * tl.load(scale + at) + tl.load(shift + at)
    if CONDITIONED:
        place = (of_channel.to(tl.int64) * z_frames + tl.load(latent + frame)) * z_height * z_width
        place += (pixel // width // rows) * z_width + pixel % width // columns
        z = z * tl.load(gain + place, mask=pixel < pixels, other=0.).to(tl.float32)
        z += tl.load(offset + place, mask=pixel < pixels, other=0.).to(tl.float32)
    tl.store(y + which.to(tl.int64) * pixels + pixel, z * tl.sigmoid(z), mask=pixel < pixels)

"""The sums of a row's classes, over parts of it that are put together.

Those of a part are relative to its own maximum m, so that no digit of a shared offset is lost:

    S = Σ exp(z − m),  T = Σ exp(z − m) (z − m),  Σ y_k (m − z_k)  (`distance`),  Σ y_k  (`mass`)

with y_k = ỹ_k for probabilities; for labels y_k = w_k, the even share that smoothing gives to every
class, and the class that the label names is read for itself. Relative to another number M they are

    S e^(m − M),  e^(m − M) (T + S (m − M)),  distance + mass (M − m)

so that parts add up once they have one M, the maximum of them all. The parts are lanes, which take
a tile after the other, and chunks, one a program.
"""

import triton
import triton.language as tl

from custom_ops.kernels.cuda.arithmetic import finite, product, vanishing_exp
from custom_ops.kernels.cuda.logits import logits
from custom_ops.kernels.cuda.parameters import Target
from custom_ops.kernels.cuda.targets import share
from custom_ops.kernels.cuda.tile import located, read

__all__ = ["NEVER", "row_sums", "together"]

NEVER: tl.constexpr = tl.constexpr(2**31 - 1)  # no class has this number


@triton.jit
def by_lane(x, KIND: tl.constexpr):
    """A tile as [row, lane, place]; what a thread reads at once is of one lane."""
    return tl.reshape(x, (KIND.ROWS, KIND.LANES, KIND.BLOCK // KIND.LANES))


@triton.jit
def rebased(sums, M, STATS: tl.constexpr):
    """The sums, which are relative to their m, relative to M instead: S, T, distance, mass."""
    m, S, T, distance, mass, _ = sums
    down = vanishing_exp(m - finite(M))
    if STATS:
        T = product(down, T + product(S, m - finite(M)))
    return S * down, T, distance + product(mass, finite(M) - finite(m)), mass


@triton.jit
def together(sums, STATS: tl.constexpr):
    """The sums of the parts along axis 1 as those of the whole."""
    m, best = sums[0], sums[5]
    M = tl.max(m, 1)
    first = tl.max(best, 1)
    if STATS:
        nan = tl.min(tl.where(m != m, best, NEVER), 1)
        first = tl.min(tl.where(m == M[:, None], best, NEVER), 1)
        first = tl.where(nan < NEVER, nan, first)
    S, T, distance, mass = rebased(sums, M[:, None], STATS)
    if STATS:
        M = tl.where(nan < NEVER, float("nan"), M)
    return M, tl.sum(S, 1), tl.sum(T, 1), tl.sum(distance, 1), tl.sum(mass, 1), first


@triton.jit
def tile_sums(
    input,
    y: Target,
    r,
    tile,
    wanted,
    least,
    shape,
    numbers,
    STATS: tl.constexpr,
    KIND: tl.constexpr,
):
    """The sums of every lane of a tile, relative to the larger of `least` and its maximum."""
    ACC: tl.constexpr = KIND.ACC
    k, inside = tile[0], wanted[:, None] & tile[2]
    # rows side by side are read at once, ignored ones among them
    looked_at = r < shape[0] if KIND.UNITS[1] > 1 else wanted
    z = read(input, tile, looked_at, float("-inf"), KIND).to(ACC)
    z = logits(z, numbers, KIND)
    if KIND.LOGITS != "identity":
        z = tl.where(inside, z, float("-inf"))
    by = by_lane(z, KIND)
    m = tl.maximum(least, tl.max(by, 2))
    shift = finite(m)[:, :, None]
    e = vanishing_exp(by - shift)
    distance, mass = tl.zeros_like(m), tl.zeros_like(m)
    if KIND.SOFT or KIND.SMOOTHING != "none":
        shares = by_lane(share(y, r, k, inside, shape, numbers, KIND), KIND)
        distance = tl.sum(product(shares, shift - by), 2)
        mass = tl.sum(shares, 2)
    T, best = tl.zeros_like(m), tl.zeros_like(m).to(tl.int32)
    if STATS:
        T = tl.sum(product(e, by - shift), 2)
        # NaN is the largest, as in torch, and of equals the first is taken
        named = by_lane(tl.broadcast_to(k, z.shape), KIND)
        nan = tl.min(tl.where(by != by, named, NEVER), 2)
        best = tl.min(tl.where(by == m[:, :, None], named, NEVER), 2)
        best = tl.where(nan < NEVER, nan, best)
        m = tl.where(nan < NEVER, float("nan"), m)
    return m, tl.sum(e, 2), T, distance, mass, best


@triton.jit
def added(sums, tile, STATS: tl.constexpr):
    """The sums of what came before and of a tile, which are relative to the larger maximum."""
    m, best = sums[0], sums[5]
    M = tile[0]
    S, T, distance, mass = rebased(sums, M, STATS)
    if STATS:
        before = (m != m) | (m == M)
        best = tl.where(before, best, tile[5])
        M = tl.where(m != m, m, M)
    return M, S + tile[1], T + tile[2], distance + tile[3], mass + tile[4], best


@triton.jit
def row_sums(
    input, y: Target, here, ignore_index, shape, numbers, STATS: tl.constexpr, KIND: tl.constexpr
):
    """m, S, T, distance, mass and arg-max of this program's part of each row.

    With the arg-max, m is NaN if a z is.
    """
    r, first, _ = here
    wanted = r < shape[0]
    if not KIND.SOFT:  # an ignored row may hold anything
        label = tl.load(y.target + r, mask=wanted, other=0).to(tl.int64)
        wanted = wanted & (label != ignore_index)
    least = tl.full((KIND.ROWS, KIND.LANES), float("-inf"), KIND.ACC)
    tile = located(r, first, shape, KIND)
    sums = tile_sums(input, y, r, tile, wanted, least, shape, numbers, STATS, KIND)
    for step in range(1, KIND.STEPS):
        tile = located(r, first + step * KIND.BLOCK, shape, KIND)
        found = tile_sums(input, y, r, tile, wanted, sums[0], shape, numbers, STATS, KIND)
        sums = added(sums, found, STATS)
    return together(sums, STATS)

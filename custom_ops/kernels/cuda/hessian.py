"""The second derivative of a row's cross-entropy along u, in the place of what it is made of.

    dz = a·p − g·ỹ                               a = g·c + h,  c = m + 2λ·lse,  m = Σ_k ỹ_k
    r  = ∂⟨u, dz⟩/∂z = a·J u + 2λ·g·⟨p, u⟩·p     J u = p ⊙ (u − ⟨p, u⟩)

and ∂⟨u, dz⟩/∂g = c·⟨p, u⟩ − ⟨ỹ, u⟩, ∂⟨u, dz⟩/∂h = ⟨p, u⟩. dz is written over z and r over u; both
are contiguous, the classes last, and the logits without cap and scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arguments import Arguments
from custom_ops.kernels.cuda.arithmetic import product, scalar, vanishing_exp
from custom_ops.kernels.cuda.labels import read_labels
from custom_ops.kernels.cuda.launch import launch, on_device, tile_of
from custom_ops.kernels.cuda.rows import cells, multiples, place
from custom_ops.kernels.cuda.targets import label_mass, share
from custom_ops.kernels.cuda.tiles import tiles
from custom_ops.kernels.problem import Problem, Rows

__all__ = ["cross_entropy_hvp_"]


@triton.jit
def read(
    z,
    u,
    target,
    weight,
    mean_weight,
    M,
    L,
    r,
    k,
    shape,
    numbers,
    ignore_index,
    SOFT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """p, u and ỹ of a tile, 0 where nothing counts; of its rows lse, m, and whether they count.

    m is Σ_k ỹ_k of the whole row for labels, and of the tile for probabilities.
    """
    rows, classes, inner, stride = shape
    _, even, _, _, _ = numbers
    wanted = r < rows
    if not SOFT:
        _, t, ignored, bad = read_labels(target, r, rows, classes, ignore_index)
        wanted = wanted & (ignored == 0)
    inside = wanted[:, None] & (k < classes)[None, :]
    if SOFT:
        y = share(target, weight, r, k, inside, shape, numbers, SOFT, SMOOTHING, ACC)
        m = tl.sum(y, 1)
    else:
        named, m = label_mass(weight, mean_weight, t, bad, wanted, numbers, ACC, ROWS)
        y = tl.where(inside & (k[None, :] == t[:, None]), named[:, None], 0.0)
        if SMOOTHING != "none":
            e = share(target, weight, r, k, inside, shape, numbers, SOFT, SMOOTHING, ACC)
            y += scalar(even, ACC) * e
    at = cells(r, k, inner, stride)
    max = tl.load(M + r, mask=wanted, other=0.0)
    log_sum = tl.load(L + r, mask=wanted, other=0.0)
    x = tl.load(z + at, mask=inside, other=0.0).to(ACC)
    p = tl.where(inside, vanishing_exp((x - max[:, None]) - log_sum[:, None]), 0.0)
    v = tl.load(u + at, mask=inside, other=0.0).to(ACC)
    return p, v, y, max + log_sum, m, wanted


@triton.jit
def write(
    z,
    u,
    d_g,
    d_h,
    g,
    h,
    r,
    k,
    first,
    tile,
    sums,
    shape,
    numbers,
    Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
):
    """dz and r of a tile; the program that is the first of its rows writes d_g and d_h as well."""
    rows, classes, inner, stride = shape
    _, _, z_loss, _, _ = numbers
    p, v, y, lse, wanted = tile
    p_u, y_u, c = sums
    G = tl.load(g + r, mask=wanted, other=0.0).to(ACC)
    if Z_LOSS:
        c += 2.0 * scalar(z_loss, ACC) * lse
    a = G * c
    if h is not None:
        a += tl.load(h + r, mask=wanted, other=0.0).to(ACC)
    change = a[:, None] * (v - p_u[:, None])
    if Z_LOSS:
        change += (2.0 * scalar(z_loss, ACC) * G * p_u)[:, None]
    real = r < rows
    inside = real[:, None] & (k < classes)[None, :]
    at = cells(r, k, inner, stride)
    dz = a[:, None] * p - G[:, None] * y
    tl.store(z + at, tl.where(wanted[:, None], dz, 0.0), mask=inside)
    tl.store(u + at, tl.where(wanted[:, None], p * change, 0.0), mask=inside)
    tl.store(d_g + r, tl.where(wanted, c * p_u - y_u, 0.0), mask=real & first)
    tl.store(d_h + r, tl.where(wanted, p_u, 0.0), mask=real & first)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def hessian_whole(
    z,
    u,
    target,
    weight,
    mean_weight,
    g,
    h,
    M,
    L,
    d_g,
    d_h,
    rows,
    classes,
    inner,
    stride,
    ignore_index,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    SOFT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rows that fit in a tile."""
    rows, classes, inner, stride = multiples(rows, classes, inner, stride, UNITS)
    shape, numbers = (rows, classes, inner, stride), (rest, even, z_loss, scale, cap)
    r, k, _ = place(rows, 1, ROWS, BLOCK)
    p, v, y, lse, m, wanted = read(
        z,
        u,
        target,
        weight,
        mean_weight,
        M,
        L,
        r,
        k,
        shape,
        numbers,
        ignore_index,
        SOFT,
        SMOOTHING,
        ACC,
        ROWS,
    )
    sums = (tl.sum(p * v, 1), tl.sum(product(y, v), 1), m)
    tile = (p, v, y, lse, wanted)
    write(z, u, d_g, d_h, g, h, r, k, True, tile, sums, shape, numbers, Z_LOSS, ACC)


@triton.jit(do_not_specialize=["rows", "ignore_index", "chunks"])
def hessian_partial(
    z,
    u,
    target,
    weight,
    mean_weight,
    M,
    L,
    partials,
    rows,
    classes,
    inner,
    stride,
    ignore_index,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    chunks,
    SOFT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """⟨p, u⟩, ⟨ỹ, u⟩ and, for probabilities, Σ ỹ of each chunk: partials[0 … 2, r, chunk]."""
    rows, classes, inner, stride = multiples(rows, classes, inner, stride, UNITS)
    shape, numbers = (rows, classes, inner, stride), (rest, even, z_loss, scale, cap)
    r, k, chunk = place(rows, chunks, ROWS, BLOCK)
    p, v, y, _, m, _ = read(
        z,
        u,
        target,
        weight,
        mean_weight,
        M,
        L,
        r,
        k,
        shape,
        numbers,
        ignore_index,
        SOFT,
        SMOOTHING,
        ACC,
        ROWS,
    )
    to = partials + (r.to(tl.int64) * chunks + chunk)
    field = tl.cast(rows, tl.int64) * chunks
    tl.store(to, tl.sum(p * v, 1), mask=r < rows)
    tl.store(to + field, tl.sum(product(y, v), 1), mask=r < rows)
    if SOFT:
        tl.store(to + 2 * field, m, mask=r < rows)


@triton.jit(do_not_specialize=["rows", "ignore_index", "chunks"])
def hessian_chunks(
    z,
    u,
    target,
    weight,
    mean_weight,
    g,
    h,
    M,
    L,
    d_g,
    d_h,
    partials,
    rows,
    classes,
    inner,
    stride,
    ignore_index,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    chunks,
    SOFT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The results of a chunk, from the sums of all chunks of its row."""
    rows, classes, inner, stride = multiples(rows, classes, inner, stride, UNITS)
    shape, numbers = (rows, classes, inner, stride), (rest, even, z_loss, scale, cap)
    r, k, chunk = place(rows, chunks, ROWS, BLOCK)
    p, v, y, lse, m, wanted = read(
        z,
        u,
        target,
        weight,
        mean_weight,
        M,
        L,
        r,
        k,
        shape,
        numbers,
        ignore_index,
        SOFT,
        SMOOTHING,
        ACC,
        ROWS,
    )
    j = tl.arange(0, CHUNKS)
    known = (r < rows)[:, None] & (j < chunks)[None, :]
    at = partials + ((r.to(tl.int64) * chunks)[:, None] + j[None, :])
    field = tl.cast(rows, tl.int64) * chunks
    p_u = tl.sum(tl.load(at, mask=known, other=0.0), 1)
    y_u = tl.sum(tl.load(at + field, mask=known, other=0.0), 1)
    if SOFT:
        m = tl.sum(tl.load(at + 2 * field, mask=known, other=0.0), 1)
    sums, tile = (p_u, y_u, m), (p, v, y, lse, wanted)
    write(z, u, d_g, d_h, g, h, r, k, chunk == 0, tile, sums, shape, numbers, Z_LOSS, ACC)


def cross_entropy_hvp_(problem: Problem, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Put dz in the place of z and r in that of u; return what u is to g and h."""
    z, (g, h, M, L, _) = problem.input, rows
    if not (z.is_contiguous() and u.is_contiguous()):
        raise RuntimeError("z and u must be contiguous")
    d_g, d_h = torch.empty_like(M), torch.empty_like(M)
    if z.numel() == 0:
        return d_g.zero_(), d_h.zero_()
    args = Arguments.of(problem)
    t = tiles(args.x.classes, 1, M.dtype, tensors=3)
    kind, programs = args.kind | tile_of(args.x.sizes, t), t.programs(args.x.rows)
    given = (z, u, args.target, args.weight, args.mean_weight())
    upstream = (g.contiguous(), None if h is None else h.contiguous())
    statistics, results = (M.contiguous(), L.contiguous()), (d_g, d_h)
    sizes = (*args.x.sizes, problem.options.ignore_index, *args.numbers)
    with on_device(z):
        if t.chunks == 1:
            launch(hessian_whole, programs, (*given, *upstream, *statistics, *results), sizes, kind)
            return results
        partials, sizes = M.new_empty(3, args.x.rows, t.chunks), (*sizes, t.chunks)
        launch(hessian_partial, programs, (*given, *statistics, partials), sizes, kind)
        tensors = (*given, *upstream, *statistics, *results, partials)
        launch(hessian_chunks, programs, tensors, sizes, kind)
    return results

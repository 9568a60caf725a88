"""The second derivative of a row's cross-entropy along u, in the place of what it is made of.

    dz  = a·p − g·ỹ                              (`derivative`)
    H u = ∂⟨u, dz⟩/∂z = a·J u + 2λ·g·⟨p, u⟩·p    J u = p ⊙ (u − ⟨p, u⟩)

and ∂⟨u, dz⟩/∂g = c·⟨p, u⟩ − ⟨ỹ, u⟩, ∂⟨u, dz⟩/∂q = ⟨p, u⟩. dz is written over z and H u over u; both
are contiguous, the classes last, and the logits without cap and scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arguments import Arguments
from custom_ops.kernels.cuda.arithmetic import product, scalar, stored, vanishing_exp
from custom_ops.kernels.cuda.derivative import factors, row_derivative
from custom_ops.kernels.cuda.labels import read_labels
from custom_ops.kernels.cuda.launch import launch, on_device
from custom_ops.kernels.cuda.parameters import Target, Upstream
from custom_ops.kernels.cuda.rows import chunk_cells, multiples, place
from custom_ops.kernels.cuda.targets import label_mass, scaled_target, share
from custom_ops.kernels.cuda.tile import located, read, write
from custom_ops.kernels.cuda.tiles import tiles
from custom_ops.kernels.problem import Problem, Rows

__all__ = ["cross_entropy_hvp_"]


@triton.jit
def taken(
    z, u, y: Target, rows: Upstream, r, tile, shape, ignore_index, numbers, KIND: tl.constexpr
):
    """p, u and ỹ of a tile, 0 where nothing counts; of its rows lse, m, and whether they count.

    m is Σ_k ỹ_k of the whole row for labels, and of the tile for probabilities.
    """
    n, classes, _, _ = shape
    ACC: tl.constexpr = KIND.ACC
    k, _, there, _, _ = tile
    one = tl.full((KIND.ROWS,), 1.0, ACC)
    wanted, t, named = r < n, r, one
    if not KIND.SOFT:
        _, t, ignored, bad = read_labels(y.target, r, n, classes, ignore_index)
        wanted = wanted & (ignored == 0)
    inside = wanted[:, None] & there
    shares = inside
    if KIND.SOFT or KIND.SMOOTHING != "none":
        shares = share(y, r, k, inside, shape, numbers, KIND)
    if KIND.SOFT:
        m = tl.sum(shares, 1)
    else:
        named, m = label_mass(y, t, bad, wanted, numbers, KIND)
    Y = scaled_target(shares, t, named, one, k, wanted, numbers, KIND)
    M = tl.load(rows.M + r, mask=wanted, other=0.0)
    L = tl.load(rows.L + r, mask=wanted, other=0.0)
    x = read(z, tile, wanted, 0.0, KIND).to(ACC)
    p = tl.where(inside, vanishing_exp((x - M[:, None]) - L[:, None]), 0.0)
    return p, read(u, tile, wanted, 0.0, KIND).to(ACC), Y, M + L, m, wanted


@triton.jit
def replaced(z, u, d, rows: Upstream, r, tile, head, known, sums, n, numbers, KIND: tl.constexpr):
    """dz and H u of a tile; the first program of a row also writes d = (d_g, d_q)."""
    ACC: tl.constexpr = KIND.ACC
    p, v, Y, lse, wanted = known
    p_u, y_u, m = sums
    G = tl.load(rows.g + r, mask=wanted, other=0.0).to(ACC)
    a, c = factors(rows, G, m, lse, r, wanted, numbers, KIND)
    change = a[:, None] * (v - p_u[:, None])
    if KIND.Z_LOSS:
        change += (2.0 * scalar(numbers[2], ACC) * G * p_u)[:, None]
    dz = row_derivative(a, p, G[:, None] * Y)
    write(z, tile, r < n, stored(tl.where(wanted[:, None], dz, 0.0), z), KIND)
    write(u, tile, r < n, stored(tl.where(wanted[:, None], p * change, 0.0), u), KIND)
    tl.store(d[0] + r, tl.where(wanted, c * p_u - y_u, 0.0), mask=(r < n) & head)
    tl.store(d[1] + r, tl.where(wanted, p_u, 0.0), mask=(r < n) & head)


@triton.jit(do_not_specialize=["n", "ignore_index"])
def hessian_whole(
    z,
    u,
    d,
    y: Target,
    rows: Upstream,
    n,
    sizes,
    ignore_index,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    KIND: tl.constexpr,
):
    """Rows that fit in a tile."""
    shape, numbers = multiples(n, sizes, KIND), (rest, even, z_loss, 1.0, 0.0)
    r, first, _ = place(shape[0], 1, KIND)
    tile = located(r, first, shape, KIND)
    p, v, Y, lse, m, wanted = taken(z, u, y, rows, r, tile, shape, ignore_index, numbers, KIND)
    known, sums = (p, v, Y, lse, wanted), (tl.sum(p * v, 1), tl.sum(product(Y, v), 1), m)
    replaced(z, u, d, rows, r, tile, True, known, sums, shape[0], numbers, KIND)


@triton.jit(do_not_specialize=["n", "ignore_index", "chunks"])
def hessian_partial(
    z,
    u,
    partials,
    y: Target,
    rows: Upstream,
    n,
    sizes,
    ignore_index,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    chunks,
    KIND: tl.constexpr,
):
    """⟨p, u⟩, ⟨ỹ, u⟩ and, for probabilities, Σ ỹ of each chunk: partials[0 … 2, r, chunk]."""
    shape, numbers = multiples(n, sizes, KIND), (rest, even, z_loss, 1.0, 0.0)
    n = shape[0]
    r, first, chunk = place(n, chunks, KIND)
    tile = located(r, first, shape, KIND)
    p, v, Y, _, m, _ = taken(z, u, y, rows, r, tile, shape, ignore_index, numbers, KIND)
    to = partials + (r.to(tl.int64) * chunks + chunk)
    field = tl.cast(n, tl.int64) * chunks
    tl.store(to, tl.sum(p * v, 1), mask=r < n)
    tl.store(to + field, tl.sum(product(Y, v), 1), mask=r < n)
    if KIND.SOFT:
        tl.store(to + 2 * field, m, mask=r < n)


@triton.jit(do_not_specialize=["n", "ignore_index", "chunks"])
def hessian_chunks(
    z,
    u,
    d,
    partials,
    y: Target,
    rows: Upstream,
    n,
    sizes,
    ignore_index,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    chunks,
    KIND: tl.constexpr,
):
    """The results of a chunk, from the sums of all chunks of its row."""
    shape, numbers = multiples(n, sizes, KIND), (rest, even, z_loss, 1.0, 0.0)
    n = shape[0]
    r, first, chunk = place(n, chunks, KIND)
    tile = located(r, first, shape, KIND)
    p, v, Y, lse, m, wanted = taken(z, u, y, rows, r, tile, shape, ignore_index, numbers, KIND)
    at, known = chunk_cells(r, n, chunks, KIND)
    field = tl.cast(n, tl.int64) * chunks
    p_u = tl.sum(tl.load(partials + at, mask=known, other=0.0), 1)
    y_u = tl.sum(tl.load(partials + at + field, mask=known, other=0.0), 1)
    if KIND.SOFT:
        m = tl.sum(tl.load(partials + at + 2 * field, mask=known, other=0.0), 1)
    known, sums = (p, v, Y, lse, wanted), (p_u, y_u, m)
    replaced(z, u, d, rows, r, tile, chunk == 0, known, sums, n, numbers, KIND)


def cross_entropy_hvp_(problem: Problem, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Put dz in the place of z and H u in that of u; return ∂⟨u, dz⟩ over ∂g and ∂q."""
    z, (g, q, M, L, _) = problem.input, rows
    if not (z.is_contiguous() and u.is_contiguous()):
        raise RuntimeError("z and u must be contiguous")
    d = torch.empty_like(M), torch.empty_like(M)
    if z.numel() == 0:
        return d[0].zero_(), d[1].zero_()
    args = Arguments.of(problem)
    x, n = args.input, args.input.rows
    t = tiles(x.classes, 1, M.dtype, tensors=3)
    kind, programs = args.kind.of_tiles(t), t.programs(n)
    statistics = M.contiguous(), L.contiguous()
    upstream = Upstream(g.contiguous(), None if q is None else q.contiguous(), *statistics)
    numbers = (n, x.sizes, args.ignore_index, *args.numbers[:3])
    given = (args.targets(mean_weight=True), upstream, *numbers)
    with on_device(z):
        if t.chunks == 1:
            launch(hessian_whole, programs, t.warps, z, u, d, *given, kind)
            return d
        partials, given = M.new_empty(3, n, t.chunks), (*given, t.chunks)
        launch(hessian_partial, programs, t.warps, z, u, partials, *given, kind)
        launch(hessian_chunks, programs, t.warps, z, u, d, partials, *given, kind)
    return d

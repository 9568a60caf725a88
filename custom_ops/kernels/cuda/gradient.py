"""The gradient of cross-entropy from a row's M and L.

    d = z' ⊙ dz,    dz = a·p − g·ỹ        (`derivative`, `targets`, `logits`)

p = exp((z − M) − L) is computed anew from the logits while they are at hand, so the kernel reads
them once and writes once, a tile a program.
"""

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arguments import Arguments
from custom_ops.kernels.cuda.arithmetic import divided, stored, vanishing_exp
from custom_ops.kernels.cuda.derivative import factors, row_derivative
from custom_ops.kernels.cuda.labels import read_labels
from custom_ops.kernels.cuda.launch import fresh, launch, on_device
from custom_ops.kernels.cuda.layout import View, fresh_like, units, unview, view
from custom_ops.kernels.cuda.logits import chained, logits
from custom_ops.kernels.cuda.parameters import Target, Upstream
from custom_ops.kernels.cuda.rows import chunk_cells, multiples, place
from custom_ops.kernels.cuda.targets import label_mass, scaled_target, share
from custom_ops.kernels.cuda.tile import across, located, read, write
from custom_ops.kernels.cuda.tiles import edged_tiles, elementwise_tiles
from custom_ops.kernels.problem import Problem, Rows

__all__ = ["cross_entropy_vjp", "cross_entropy_vjp_", "cross_entropy_vjp_out"]


@triton.jit(do_not_specialize=["n", "chunks"])
def mass_partial(
    masses,
    y: Target,
    n,
    sizes,
    rest: tl.float64,
    even: tl.float64,
    chunks,
    KIND: tl.constexpr,
):
    """Σ ỹ_k of each chunk, for probabilities: masses[r, chunk]."""
    shape = multiples(n, sizes, KIND)
    r, first, chunk = place(n, chunks, KIND)
    k, _, there, _, _ = located(r, first, shape, KIND)
    inside = (r < shape[0])[:, None] & there
    shares = share(y, r, k, inside, shape, (rest, even, 0.0, 0.0, 0.0), KIND)
    tl.store(masses + r.to(tl.int64) * chunks + chunk, tl.sum(shares, 1), mask=r < shape[0])


@triton.jit
def upstream(rows: Upstream, r, wanted, KIND: tl.constexpr):
    """g of each row, 0 in a row that does not count."""
    ACC: tl.constexpr = KIND.ACC
    if rows.divisor is None:
        g = tl.load(rows.g + r * rows.step, mask=wanted, other=0.0).to(ACC)
    elif rows.M.dtype.element_ty == tl.float64:  # Triton 3.6: the scalar below does not compile
        g = tl.load(rows.g + r * rows.step, mask=wanted, other=0.0).to(ACC)
        g = divided(g, tl.load(rows.divisor + r * rows.step, mask=wanted, other=1.0))
    else:  # of a mean: one number for all rows, infinite where none counts
        g = tl.where(wanted, divided(tl.load(rows.g).to(ACC), tl.load(rows.divisor)), 0.0)
    return g


@triton.jit
def row_mass(y: Target, shares, r, n, chunks, KIND: tl.constexpr):
    """Σ_k ỹ_k of each row, for probabilities."""
    if y.masses is None:
        m = tl.sum(shares, 1)
    else:
        at, known = chunk_cells(r, n, chunks, KIND)
        m = tl.sum(tl.load(y.masses + at, mask=known, other=0.0), 1)
    return m


@triton.jit
def row_factor(rows: Upstream, G, m, lse, r, wanted, numbers, KIND: tl.constexpr):
    """a of each row, 0 where it does not count: so is d where z, g and q were not read."""
    a, _ = factors(rows, G, m, lse, r, wanted, numbers, KIND)
    return tl.where(wanted, a, 0.0)


@triton.jit
def gradient_tile(
    input, y: Target, rows: Upstream, to, r, tile, known, chunks, shape, numbers, KIND: tl.constexpr
):
    """The gradient of a tile, from what is known of its rows."""
    ACC: tl.constexpr = KIND.ACC
    n, _, inner, _ = shape
    real, k = r < n, tile[0]
    inside = real[:, None] & tile[2]
    wanted, t, named, G, M, L, a = known
    if KIND.UNITS[1] > 1:  # rows side by side are read at once, ignored ones among them
        z = read(input, tile, real, 0.0, KIND).to(ACC)
        z = tl.where(wanted[:, None], z, 0.0)
    else:
        z = read(input, tile, wanted, 0.0, KIND).to(ACC)
    z = logits(z, numbers, KIND)
    shares = inside
    if KIND.SOFT or KIND.SMOOTHING != "none":
        shares = share(y, r, k, inside, shape, numbers, KIND)
    if KIND.SOFT:
        m = row_mass(y, shares, r, n, chunks, KIND)
        a = row_factor(rows, G, m, M + L, r, wanted, numbers, KIND)
    p = vanishing_exp((z - M[:, None]) - L[:, None])
    gy = scaled_target(shares, t, named, G, k, wanted, numbers, KIND)
    d = chained(row_derivative(a, p, gy), z, numbers, KIND)
    out, out_stride = to
    write(out, across(tile, r, inner, out_stride, KIND), real, stored(d, out), KIND)


@triton.jit(do_not_specialize=["n", "ignore_index", "chunks"])
def gradient(
    input,
    y: Target,
    rows: Upstream,
    out,
    n,
    sizes,
    ignore_index,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    chunks,
    KIND: tl.constexpr,
):
    """The gradient of the tiles of a program; `out`, with sizes[3] as stride, may be the input."""
    shape, numbers = multiples(n, sizes, KIND), (rest, even, z_loss, scale, cap)
    n, classes, _, _ = shape
    r, first, _ = place(n, chunks, KIND)
    wanted, t = r < n, r
    if not KIND.SOFT:
        _, t, ignored, bad = read_labels(y.target, r, n, classes, ignore_index)
        wanted = wanted & (ignored == 0)
    G = upstream(rows, r, wanted, KIND)
    M = tl.load(rows.M + r, mask=wanted, other=0.0)
    L = tl.load(rows.L + r, mask=wanted, other=0.0)
    named, a = G, G
    if not KIND.SOFT:
        named, m = label_mass(y, t, bad, wanted, numbers, KIND)
        a = row_factor(rows, G, m, M + L, r, wanted, numbers, KIND)
    UNIT: tl.constexpr = KIND.UNITS[0] * KIND.UNITS[1]
    to = (out, sizes[3] // UNIT * UNIT)
    known = (wanted, t, named, G, M, L, a)
    for step in range(KIND.STEPS):
        tile = located(r, first + step * KIND.BLOCK, shape, KIND)
        gradient_tile(input, y, rows, to, r, tile, known, chunks, shape, numbers, KIND)


def _launch(args: Arguments, rows: Rows, divisor: Tensor | None, out: View) -> None:
    g, q, M, L, _ = rows
    x, t, y, kind = args.input, args.tiles, args.targets(mean_weight=True), args.kind
    if not kind.SOFT:  # of labels the sum of ỹ is known
        edge = x.edge if out.stride == x.stride else 0
        t = edged_tiles(x.classes, args.dtype, edge) if edge else elementwise_tiles(t, *args.extent)
        kind = kind.of_tiles(t)._replace(EDGE=edge)
    # of what both strides are multiples: the input's alone would put another's numbers elsewhere
    kind = kind._replace(UNITS=units(x.rows, x.classes, x.inner, gcd(x.stride, out.stride)))
    if x.tensor.numel() == 0:
        return
    programs = t.programs(x.rows)
    # one number for all rows, as sum and mean send it, is read as what it is
    one = not any(g.stride())
    upstream = Upstream(
        g if one else g.contiguous(),
        None if q is None else q.contiguous(),
        M.contiguous(),
        L.contiguous(),
        0 if one else 1,
        divisor,
    )
    with on_device(x.tensor):
        if kind.SOFT and t.chunks > 1:
            masses = fresh(M, x.rows, t.chunks, dtype=M.dtype)
            sizes = (x.rows, x.sizes, *args.numbers[:2], t.chunks)
            launch(mass_partial, programs, t.warps, masses, y, *sizes, kind)
            y = y._replace(masses=masses)
        numbers = (x.rows, (*x.sizes, out.stride), args.ignore_index, *args.numbers, t.chunks)
        tensors = (x.tensor, y, upstream, out.tensor)
        launch(gradient, programs, t.warps, *tensors, *numbers, kind)


def cross_entropy_vjp(problem: Problem, rows: Rows, divisor: Tensor | None = None) -> Tensor:
    """Return z' ⊙ (a·p − g·ỹ), 0 in an ignored row; g is divided by the divisor, if any."""
    args = Arguments.of(problem)
    out = fresh_like(args.input)
    _launch(args, rows, divisor, out)
    return unview(out, problem.options.dim)


def cross_entropy_vjp_(problem: Problem, rows: Rows, divisor: Tensor | None = None) -> None:
    """Write the same over the input."""
    args, input = Arguments.of(problem), problem.input
    if args.input.tensor.untyped_storage().data_ptr() == input.untyped_storage().data_ptr():
        _launch(args, rows, divisor, args.input)
    else:  # in no layout that the kernels write
        out = fresh_like(args.input)
        _launch(args, rows, divisor, out)
        input.copy_(unview(out, problem.options.dim))


def cross_entropy_vjp_out(problem: Problem, rows: Rows, out: Tensor) -> None:
    """Write the same into `out`, in which the classes lie side by side."""
    _launch(Arguments.of(problem), rows, None, view(out, problem.options.dim))

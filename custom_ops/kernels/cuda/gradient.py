"""The gradient of cross-entropy from a row's M and L.

    dx = z'(x) ⊙ (a·p − g·ỹ)        a = g·(m + 2λ·lse) + h,    m = Σ_k ỹ_k,    lse = M + L

p = exp((z − M) − L) is computed anew from the logits while they are at hand, so the kernel reads
them once and writes once, a tile a program.
"""

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arguments import Arguments
from custom_ops.kernels.cuda.arithmetic import divided, scalar, vanishing_exp
from custom_ops.kernels.cuda.labels import read_labels
from custom_ops.kernels.cuda.launch import launch, on_device
from custom_ops.kernels.cuda.layout import View, fresh_like, unview
from custom_ops.kernels.cuda.logits import chained, logits
from custom_ops.kernels.cuda.rows import cells, multiples, place
from custom_ops.kernels.cuda.targets import label_mass, share
from custom_ops.kernels.problem import Problem, Rows

__all__ = ["cross_entropy_vjp", "cross_entropy_vjp_"]


@triton.jit(do_not_specialize=["rows", "chunks"])
def mass_partial(
    target,
    weight,
    masses,
    rows,
    classes,
    inner,
    stride,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    chunks,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Σ ỹ_k of each chunk, for probabilities: masses[r, chunk]."""
    r, k, chunk = place(rows, chunks, ROWS, BLOCK)
    inside = (r < rows)[:, None] & (k < classes)[None, :]
    rows, classes, inner, stride = multiples(rows, classes, inner, stride, UNITS)
    shape, numbers = (rows, classes, inner, stride), (rest, even, z_loss, scale, cap)
    y = share(target, weight, r, k, inside, shape, numbers, True, SMOOTHING, ACC)
    tl.store(masses + r.to(tl.int64) * chunks + chunk, tl.sum(y, 1), mask=r < rows)


@triton.jit(do_not_specialize=["rows", "ignore_index", "chunks", "g_step"])
def gradient(
    x,
    target,
    weight,
    mean_weight,
    masses,
    g,
    divisor,
    h,
    M,
    L,
    out,
    rows,
    classes,
    inner,
    stride,
    out_stride,
    g_step,
    ignore_index,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    chunks,
    SOFT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    LOGITS: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The gradient of a tile; `out` may be x."""
    rows, classes, inner, stride = multiples(rows, classes, inner, stride, UNITS)
    shape, numbers = (rows, classes, inner, stride), (rest, even, z_loss, scale, cap)
    r, k, _ = place(rows, chunks, ROWS, BLOCK)
    real = r < rows
    inside = real[:, None] & (k < classes)[None, :]
    wanted = real
    if not SOFT:
        _, t, ignored, bad = read_labels(target, r, rows, classes, ignore_index)
        wanted = real & (ignored == 0)
    at = x + cells(r, k, inner, stride)
    if UNITS[1] > 1:  # rows side by side are read at once, ignored ones among them
        z = tl.where(wanted[:, None], tl.load(at, mask=inside, other=0.0).to(ACC), 0.0)
    else:
        z = tl.load(at, mask=inside & wanted[:, None], other=0.0).to(ACC)
    z = logits(z, numbers, LOGITS, ACC)

    if divisor is None:
        G = tl.load(g + r * g_step, mask=wanted, other=0.0).to(ACC)
    elif M.dtype.element_ty == tl.float64:  # Triton 3.6: the scalar below does not compile
        G = tl.load(g + r * g_step, mask=wanted, other=0.0).to(ACC)
        G = divided(G, tl.load(divisor + r * g_step, mask=wanted, other=1.0))
    else:  # of a mean: one number for all rows, infinite where none counts
        G = tl.where(wanted, divided(tl.load(g).to(ACC), tl.load(divisor)), 0.0)
    max = tl.load(M + r, mask=wanted, other=0.0)
    log_sum = tl.load(L + r, mask=wanted, other=0.0)
    if SOFT:
        y = share(target, weight, r, k, inside, shape, numbers, SOFT, SMOOTHING, ACC)
        if masses is None:
            m = tl.sum(y, 1)
        else:
            j = tl.arange(0, CHUNKS)
            known = real[:, None] & (j < chunks)[None, :]
            of_chunks = masses + ((r.to(tl.int64) * chunks)[:, None] + j[None, :])
            m = tl.sum(tl.load(of_chunks, mask=known, other=0.0), 1)
    else:
        named, m = label_mass(weight, mean_weight, t, bad, wanted, numbers, ACC, ROWS)
        named *= G
    if Z_LOSS:
        m += 2.0 * scalar(z_loss, ACC) * (max + log_sum)
    a = G * m
    if h is not None:
        a += tl.load(h + r, mask=wanted, other=0.0).to(ACC)

    a = tl.where(wanted, a, 0.0)  # and so is d where z, g and h were not read
    d = a[:, None] * vanishing_exp((z - max[:, None]) - log_sum[:, None])
    if SOFT:
        d -= G[:, None] * y
    else:
        if SMOOTHING != "none":
            e = share(target, weight, r, k, inside, shape, numbers, SOFT, SMOOTHING, ACC)
            d -= tl.where(wanted[:, None], (scalar(even, ACC) * G)[:, None] * e, 0.0)
        d -= tl.where(k[None, :] == t[:, None], named[:, None], 0.0)
    d = chained(d, z, numbers, LOGITS, ACC)
    if M.dtype.element_ty == tl.float64 and out.dtype.element_ty.primitive_bitwidth == 16:
        d = d.to(tl.float32)  # Triton has no step from float64 to bfloat16
    UNIT: tl.constexpr = UNITS[0] * UNITS[1]
    tl.store(out + cells(r, k, inner, out_stride // UNIT * UNIT), d, mask=inside)


def _launch(args: Arguments, rows: Rows, divisor: Tensor | None, out: View) -> None:
    g, h, M, L, _ = rows
    if args.x.tensor.numel() == 0:
        return
    t, masses = args.tiles, None
    # one number for all rows, as sum and mean send it, is read as what it is
    one = not any(g.stride())
    with on_device(args.x.tensor):
        if args.kind["SOFT"] and t.chunks > 1:
            masses = M.new_empty(args.x.rows, t.chunks)
            sizes = (*args.x.sizes, *args.numbers, t.chunks)
            targets = (args.target, args.weight, masses)
            launch(mass_partial, t.programs(args.x.rows), targets, sizes, args.kind)
        tensors = (
            *(args.x.tensor, args.target, args.weight, args.mean_weight(), masses),
            *(g if one else g.contiguous(), divisor, None if h is None else h.contiguous()),
            *(M.contiguous(), L.contiguous(), out.tensor),
        )
        steps = (out.stride, 0 if one else 1)
        numbers = (*args.x.sizes, *steps, args.ignore_index, *args.numbers, t.chunks)
        launch(gradient, t.programs(args.x.rows), tensors, numbers, args.kind)


def cross_entropy_vjp(problem: Problem, rows: Rows, divisor: Tensor | None = None) -> Tensor:
    """Return z' ⊙ (a·p − g·ỹ), 0 in an ignored row; g is divided by the divisor, if any."""
    args = Arguments.of(problem)
    out = fresh_like(args.x)
    _launch(args, rows, divisor, out)
    return unview(out, problem.options.dim)


def cross_entropy_vjp_(problem: Problem, rows: Rows, divisor: Tensor | None = None) -> None:
    """Write the same over the input."""
    args, input = Arguments.of(problem), problem.input
    if args.x.tensor.untyped_storage().data_ptr() == input.untyped_storage().data_ptr():
        _launch(args, rows, divisor, args.x)
    else:  # in no layout that the kernels write
        out = fresh_like(args.x)
        _launch(args, rows, divisor, out)
        input.copy_(unview(out, problem.options.dim))

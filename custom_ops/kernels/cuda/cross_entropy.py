"""ℓ, M, L, the prediction and the entropy of every row.

    ℓ = ⟨ỹ, (M − z) + L⟩ + λ·lse²,    ỹ_k = w_k ((1 − ε) y_k + ε/C),    lse = M + L

The sums of a tile are relative to its own maximum m, so that no digit of a shared offset is lost:

    S = Σ exp(z − m),  T = Σ exp(z − m) (z − m),  Σ y_k (m − z_k)  (`distance`),  Σ y_k  (`mass`)

with y_k = ỹ_k for probabilities; for labels y_k = w_k, the even share that smoothing gives to every
class, and the class that the label names is read for itself. The entropy is −Σ p log p = L − T/S: a
sum of two numbers that are not negative, as S ≥ 1 and T ≤ 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arguments import Arguments
from custom_ops.kernels.cuda.arithmetic import (
    divided,
    finite,
    product,
    scalar,
    stored,
    vanishing_exp,
)
from custom_ops.kernels.cuda.labels import read_labels, recorded
from custom_ops.kernels.cuda.launch import fresh, launch, on_device, watched
from custom_ops.kernels.cuda.logits import logits
from custom_ops.kernels.cuda.parameters import Chunks, Results, Target
from custom_ops.kernels.cuda.record import Memory, record_of
from custom_ops.kernels.cuda.reduction import finish
from custom_ops.kernels.cuda.rows import cells, chunk_cells, multiples, place, row_starts
from custom_ops.kernels.cuda.targets import share
from custom_ops.kernels.labels import checked_labels, labels_reported
from custom_ops.kernels.problem import Found, Problem

__all__ = ["cross_entropy", "reduced"]

NEVER: tl.constexpr = tl.constexpr(2**31 - 1)  # no class has this number


@triton.jit
def by_lane(x, KIND: tl.constexpr):
    """A tile as [row, lane, place]: what a thread has read at once is of one lane."""
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
    input, y: Target, r, k, wanted, least, shape, numbers, STATS: tl.constexpr, KIND: tl.constexpr
):
    """The sums of every lane of a tile, relative to the larger of `least` and its maximum."""
    n, classes, inner, stride = shape
    ACC: tl.constexpr = KIND.ACC
    inside = wanted[:, None] & (k < classes)[None, :]
    at = cells(r, k, inner, stride)
    # rows side by side are read at once, ignored ones among them
    read = (r < n)[:, None] & (k < classes)[None, :] if KIND.UNITS[1] > 1 else inside
    z = tl.load(input + at, mask=read, other=float("-inf")).to(ACC)
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
        named = by_lane(tl.broadcast_to(k[None, :], z.shape), KIND)
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
    input, y: Target, r, k, ignore_index, shape, numbers, STATS: tl.constexpr, KIND: tl.constexpr
):
    """m, S, T, distance, mass and arg-max of this program's part of each row.

    With the arg-max, m is NaN if a z is.
    """
    wanted = r < shape[0]
    if not KIND.SOFT:  # an ignored row may hold anything
        label = tl.load(y.target + r, mask=wanted, other=0).to(tl.int64)
        wanted = wanted & (label != ignore_index)
    least = tl.full((KIND.ROWS, KIND.LANES), float("-inf"), KIND.ACC)
    sums = tile_sums(input, y, r, k, wanted, least, shape, numbers, STATS, KIND)
    for step in range(1, KIND.STEPS):
        there = k + step * KIND.BLOCK
        tile = tile_sums(input, y, r, there, wanted, sums[0], shape, numbers, STATS, KIND)
        sums = added(sums, tile, STATS)
    return together(sums, STATS)


@triton.jit
def write(
    input, y: Target, out: Results, r, sums, shape, numbers, ignore_index, KIND: tl.constexpr
):
    """The results of whole rows, from their sums; `distance` is relative to M."""
    n, classes, inner, stride = shape
    rest, even, z_loss, _, _ = numbers
    ACC: tl.constexpr = KIND.ACC
    M, S, T, distance, mass, best = sums
    real, named, w_t = r < n, r < n, tl.full((KIND.ROWS,), 1.0, ACC)
    # NaN where M is no number to shift by
    L = tl.where(tl.abs(M) == float("inf"), float("nan"), tl.log(S))
    spread = distance + mass * L
    t, ignored, bad = r, r < 0, r < 0
    if not KIND.SOFT:
        label, t, ignored, bad = read_labels(y.target, r, n, classes, ignore_index)
    # what is stored needs no register any more
    tl.store(out.M + r, tl.where(ignored, 0.0, M), mask=real)
    tl.store(out.L + r, tl.where(ignored, 0.0, L), mask=real)
    if out.prediction is not None:
        tl.store(out.prediction + r, tl.where(ignored, -1, best).to(tl.int64), mask=real)
        tl.store(out.entropy + r, tl.where(ignored, 0.0, L - divided(T, S)), mask=real)
    value = spread
    if not KIND.SOFT:
        if out.record is not None:
            recorded(out.record, r, label, bad & real, classes, ignore_index, out.dims)
        named = real & (ignored == 0)
        at = row_starts(r, inner, stride) + t.to(tl.int64) * inner
        z_t = tl.load(input + at, mask=named, other=0.0).to(ACC)
        value = (M - logits(z_t, numbers, KIND)) + L
        if y.weight is not None:
            w_t = tl.load(y.weight + t, mask=named, other=0.0).to(ACC)
            value = product(w_t, value)
        if KIND.SMOOTHING == "some":
            value = scalar(rest, ACC) * value + scalar(even, ACC) * spread
        if KIND.SMOOTHING == "all":
            value = scalar(even, ACC) * spread
    if KIND.Z_LOSS:
        lse = M + L
        value += scalar(z_loss, ACC) * (lse * lse)
    value = tl.where(ignored, 0.0, tl.where(bad, float("nan"), value))
    if out.loss is not None:
        tl.store(out.loss + r, stored(value, out.loss), mask=real)
    if out.losses is not None:
        tl.store(out.losses + tl.program_id(0), tl.sum(tl.where(real, value, 0.0), 0))
    if out.counts is not None:
        tl.store(out.counts + tl.program_id(0), tl.sum(tl.where(named, w_t, 0.0), 0))


@triton.jit(do_not_specialize=["n", "ignore_index"])
def cross_entropy_whole(
    input,
    y: Target,
    out: Results,
    n,
    sizes,
    ignore_index,
    rest: tl.float64,
    even: tl.float64,
    z_loss: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    KIND: tl.constexpr,
):
    """Rows that fit in a tile."""
    shape, numbers = multiples(n, sizes, KIND), (rest, even, z_loss, scale, cap)
    r, k, _ = place(shape[0], 1, KIND)
    STATS: tl.constexpr = out.prediction is not None
    sums = row_sums(input, y, r, k, ignore_index, shape, numbers, STATS, KIND)
    write(input, y, out, r, sums, shape, numbers, ignore_index, KIND)


@triton.jit(do_not_specialize=["n", "ignore_index", "chunks"])
def cross_entropy_partial(
    input,
    y: Target,
    partials: Chunks,
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
    """The sums of each chunk."""
    shape, numbers = multiples(n, sizes, KIND), (rest, even, z_loss, scale, cap)
    n = shape[0]
    r, k, chunk = place(n, chunks, KIND)
    STATS: tl.constexpr = partials.bests is not None
    sums = row_sums(input, y, r, k, ignore_index, shape, numbers, STATS, KIND)
    m, S, T, distance, mass, best = sums
    to = r.to(tl.int64) * chunks + chunk
    field = tl.cast(n, tl.int64) * chunks
    tl.store(partials.sums + to, m, mask=r < n)
    tl.store(partials.sums + to + field, S, mask=r < n)
    if KIND.SOFT or KIND.SMOOTHING != "none":
        tl.store(partials.sums + to + 2 * field, distance, mask=r < n)
        tl.store(partials.sums + to + 3 * field, mass, mask=r < n)
    if STATS:
        tl.store(partials.sums + to + 4 * field, T, mask=r < n)
        tl.store(partials.bests + to, best, mask=r < n)


@triton.jit(do_not_specialize=["n", "ignore_index", "chunks"])
def cross_entropy_combined(
    input,
    y: Target,
    out: Results,
    partials: Chunks,
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
    """The results of whole rows, from the sums of their chunks."""
    r = tl.program_id(0).to(n.dtype) * KIND.ROWS + tl.arange(0, KIND.ROWS)
    at, known = chunk_cells(r, n, chunks, KIND)
    field = tl.cast(n, tl.int64) * chunks
    m = tl.load(partials.sums + at, mask=known, other=float("-inf"))
    S = tl.load(partials.sums + at + field, mask=known, other=0.0)
    T, distance, mass = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    best = tl.zeros_like(m).to(tl.int32)
    if KIND.SOFT or KIND.SMOOTHING != "none":
        distance = tl.load(partials.sums + at + 2 * field, mask=known, other=0.0)
        mass = tl.load(partials.sums + at + 3 * field, mask=known, other=0.0)
    STATS: tl.constexpr = out.prediction is not None
    if STATS:
        T = tl.load(partials.sums + at + 4 * field, mask=known, other=0.0)
        best = tl.load(partials.bests + at, mask=known, other=NEVER)
    sums = together((m, S, T, distance, mass, best), STATS)
    shape, numbers = (n, sizes[0], sizes[1], sizes[2]), (rest, even, z_loss, scale, cap)
    write(input, y, out, r, sums, shape, numbers, ignore_index, KIND)


def cross_entropy(problem: Problem, dtype: torch.dtype | None = None) -> Found:
    """Return ℓ, M, L and, if they are wanted, the prediction and the entropy, one a row.

    ℓ is of `dtype`, or of that of the computation.
    """
    problem, record = _checked(problem)
    found = _results(problem)._replace(loss=_rows(problem, dtype or problem.options.dtype))
    if problem.input.numel():
        out = Results(*found, None, None, record, problem.target.dim())
        _launch(Arguments.of(problem).in_steps(), out)
    elif problem.classes == 0:
        for rows, empty in zip(found, (0, 0, 0, -1, 0), strict=True):
            if rows is not None:
                rows.fill_(empty)
    return found


def reduced(
    problem: Problem, mean: bool, normalizer: float, dtype: torch.dtype
) -> tuple[Found, Tensor | None]:
    """Return the same of rows that there are, but Σℓ in `dtype`; for a mean, Σℓ/n, and n.

    n is the normalizer, or if that is 0 what the rows count. Two launches, or three where a row
    comes in chunks, however many rows there are.
    """
    problem, record = _checked(problem)
    args, found = Arguments.of(problem).in_steps(), _results(problem)
    losses, counts = fresh(found.M, args.programs(), dtype=found.M.dtype), None
    if mean and not normalizer:
        counts = fresh(found.M, args.programs(), dtype=found.M.dtype)
    _launch(args, Results(*found, losses, counts, record, problem.target.dim()))
    loss, n = finish(losses, counts, normalizer, mean, dtype)
    return found._replace(loss=loss), n


def _results(problem: Problem) -> Found:
    """Return memory for the statistics of the rows; none for the loss."""
    dtype, wanted = problem.options.dtype, problem.options.stats
    return Found(
        None,  # type: ignore[arg-type]
        _rows(problem, dtype),
        _rows(problem, dtype),
        _rows(problem, torch.int64) if wanted else None,
        _rows(problem, dtype) if wanted else None,
    )


def _checked(problem: Problem) -> tuple[Problem, Memory | None]:
    """Raise what an earlier call's labels were found to be; return where this call's are told."""
    if problem.soft:
        return problem, None
    target, o, record = problem.target, problem.options, None
    if not labels_reported():
        record = record_of(target)
        record.check()
    if target.device.type == "cpu":
        problem = problem._replace(target=checked_labels(target, problem.classes, o.ignore_index))
    return problem, None if record is None else watched(record)


def _rows(problem: Problem, dtype: torch.dtype) -> Tensor:
    """Return memory for one number a row."""
    input, dim = problem.input, problem.options.dim
    return fresh(input, *input.shape[:dim], *input.shape[dim + 1 :], dtype=dtype)


def _launch(args: Arguments, out: Results) -> None:
    x, t, kind, y = args.input, args.tiles, args.kind, args.targets()
    n, programs = x.rows, t.programs(x.rows)
    numbers = (n, x.sizes, args.ignore_index, *args.numbers)
    with on_device(x.tensor):
        if t.chunks == 1:
            launch(cross_entropy_whole, programs, t.warps, x.tensor, y, out, *numbers, kind)
            return
        sums, bests = fresh(out.M, 5, n, t.chunks, dtype=out.M.dtype), None
        if out.prediction is not None:
            bests = fresh(out.M, n, t.chunks, dtype=torch.int32)
        partials, numbers = Chunks(sums, bests), (*numbers, t.chunks)
        launch(cross_entropy_partial, programs, t.warps, x.tensor, y, partials, *numbers, kind)
        kind, tensors = kind._replace(ROWS=args.together), (x.tensor, y, out, partials)
        launch(cross_entropy_combined, args.programs(), 4, *tensors, *numbers, kind)

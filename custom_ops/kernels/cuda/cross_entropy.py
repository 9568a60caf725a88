"""ℓ, M, L and the prediction of every row.

    ℓ = ⟨ỹ, (M − z) + L⟩ + λ·lse²,    ỹ_k = w_k ((1 − ε) y_k + ε/C),    lse = M + L

The sums of a tile are relative to its own maximum m, so that no digit of a shared offset is lost:

    Σ exp(z − m),    Σ y_k (m − z_k)  (`distance`),    Σ y_k  (`mass`)

with y_k = ỹ_k for probabilities; for labels y_k = w_k, the even share that smoothing gives to every
class, and the class that the label names is read for itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arguments import Arguments
from custom_ops.kernels.cuda.arithmetic import finite, product, scalar, vanishing_exp
from custom_ops.kernels.cuda.labels import read_labels, recorded
from custom_ops.kernels.cuda.launch import launch, on_device
from custom_ops.kernels.cuda.logits import logits
from custom_ops.kernels.cuda.record import record_of
from custom_ops.kernels.cuda.rows import cells, multiples, place, row_starts
from custom_ops.kernels.cuda.targets import share
from custom_ops.kernels.cuda.tiles import SMALL, ceil_div
from custom_ops.kernels.eager import capped, entropy
from custom_ops.kernels.labels import checked_labels
from custom_ops.kernels.problem import Found, Problem

__all__ = ["cross_entropy"]

NEVER: tl.constexpr = tl.constexpr(2**31 - 1)  # no class has this number


@triton.jit
def tile_sums(
    x,
    target,
    weight,
    r,
    k,
    wanted,
    shape,
    numbers,
    SOFT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    LOGITS: tl.constexpr,
    ACC: tl.constexpr,
    UNITS: tl.constexpr,
    PREDICT: tl.constexpr,
):
    """m, Σ exp(z − m), distance, mass and arg-max of each row's classes k; m is NaN if a z is."""
    rows, classes, inner, stride = shape
    inside = wanted[:, None] & (k < classes)[None, :]
    at = cells(r, k, inner, stride)
    # rows side by side are read at once, ignored ones among them
    read = (r < rows)[:, None] & (k < classes)[None, :] if UNITS[1] > 1 else inside
    z = logits(tl.load(x + at, mask=read, other=float("-inf")).to(ACC), numbers, LOGITS, ACC)
    if LOGITS != "plain":
        z = tl.where(inside, z, float("-inf"))
    m = tl.max(z, 1)
    shift = finite(m)[:, None]
    s = tl.sum(vanishing_exp(z - shift), 1)
    distance = tl.zeros_like(m)
    mass = tl.zeros_like(m)
    if SOFT or SMOOTHING != "none":
        y = share(target, weight, r, k, inside, shape, numbers, SOFT, SMOOTHING, ACC)
        distance = tl.sum(product(y, shift - z), 1)
        mass = tl.sum(y, 1)
    best = tl.zeros_like(r)
    if PREDICT:
        # NaN is the largest, as in torch, and of equals the first is taken
        nan = tl.min(tl.where(z != z, k[None, :], NEVER), 1)
        best = tl.min(tl.where(z == m[:, None], k[None, :], NEVER), 1)
        best = tl.where(nan < NEVER, nan, best)
        m = tl.where(nan < NEVER, float("nan"), m)
    return m, s, distance, mass, best


@triton.jit
def write(
    x,
    target,
    weight,
    results,
    report,
    r,
    sums,
    shape,
    numbers,
    ignore_index,
    SOFT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    LOGITS: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The results of whole rows, from their sums; `distance` is relative to M."""
    rows, classes, inner, stride = shape
    rest, even, z_loss, _, _ = numbers
    loss, maximum, log_sum, prediction = results
    M, S, distance, mass, best = sums
    real = r < rows
    # NaN where M is no number to shift by
    L = tl.where(tl.abs(M) == float("inf"), float("nan"), tl.log(S))
    spread = distance + mass * L
    if SOFT:
        value = spread
        ignored = r < 0
        bad = r < 0
    else:
        label, t, ignored, bad = read_labels(target, r, rows, classes, ignore_index)
        record, dims = report
        recorded(record, r, label, bad & real, classes, ignore_index, dims)
        named = real & (ignored == 0)
        at = row_starts(r, inner, stride) + t.to(tl.int64) * inner
        z_t = logits(tl.load(x + at, mask=named, other=0.0).to(ACC), numbers, LOGITS, ACC)
        value = (M - z_t) + L
        if weight is not None:
            value = product(tl.load(weight + t, mask=named, other=0.0).to(ACC), value)
        if SMOOTHING == "some":
            value = scalar(rest, ACC) * value + scalar(even, ACC) * spread
        if SMOOTHING == "all":
            value = scalar(even, ACC) * spread
    if Z_LOSS:
        lse = M + L
        value += scalar(z_loss, ACC) * (lse * lse)
    value = tl.where(bad, float("nan"), value)
    tl.store(loss + r, tl.where(ignored, 0.0, value), mask=real)
    tl.store(maximum + r, tl.where(ignored, 0.0, M), mask=real)
    tl.store(log_sum + r, tl.where(ignored, 0.0, L), mask=real)
    if prediction is not None:
        tl.store(prediction + r, tl.where(ignored, -1, best).to(tl.int64), mask=real)


@triton.jit
def looked_at(target, r, rows, ignore_index, SOFT: tl.constexpr):
    """The rows that count: an ignored one may hold anything."""
    wanted = r < rows
    if not SOFT:
        label = tl.load(target + r, mask=wanted, other=0).to(tl.int64)
        wanted = wanted & (label != ignore_index)
    return wanted


@triton.jit(do_not_specialize=["rows", "ignore_index", "dims"])
def cross_entropy_whole(
    x,
    target,
    weight,
    loss,
    maximum,
    log_sum,
    prediction,
    record,
    dims,
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
    LOGITS: tl.constexpr,
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
    M, S, distance, mass, best = tile_sums(
        x,
        target,
        weight,
        r,
        k,
        looked_at(target, r, rows, ignore_index, SOFT),
        shape,
        numbers,
        SOFT,
        SMOOTHING,
        LOGITS,
        ACC,
        UNITS,
        prediction is not None,
    )
    write(
        x,
        target,
        weight,
        (loss, maximum, log_sum, prediction),
        (record, dims),
        r,
        (M, S, distance, mass, best),
        shape,
        numbers,
        ignore_index,
        SOFT,
        SMOOTHING,
        LOGITS,
        Z_LOSS,
        ACC,
    )


@triton.jit(do_not_specialize=["rows", "ignore_index", "chunks"])
def cross_entropy_partial(
    x,
    target,
    weight,
    partials,
    bests,
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
    LOGITS: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The sums of each chunk: partials[0 … 3, r, chunk] and bests[r, chunk]."""
    rows, classes, inner, stride = multiples(rows, classes, inner, stride, UNITS)
    r, k, chunk = place(rows, chunks, ROWS, BLOCK)
    m, s, distance, mass, best = tile_sums(
        x,
        target,
        weight,
        r,
        k,
        looked_at(target, r, rows, ignore_index, SOFT),
        (rows, classes, inner, stride),
        (rest, even, z_loss, scale, cap),
        SOFT,
        SMOOTHING,
        LOGITS,
        ACC,
        UNITS,
        bests is not None,
    )
    to = r.to(tl.int64) * chunks + chunk
    field = tl.cast(rows, tl.int64) * chunks
    tl.store(partials + to, m, mask=r < rows)
    tl.store(partials + to + field, s, mask=r < rows)
    if SOFT or SMOOTHING != "none":
        tl.store(partials + to + 2 * field, distance, mask=r < rows)
        tl.store(partials + to + 3 * field, mass, mask=r < rows)
    if bests is not None:
        tl.store(bests + to, best, mask=r < rows)


@triton.jit(do_not_specialize=["rows", "ignore_index", "dims", "chunks"])
def cross_entropy_combined(
    x,
    target,
    weight,
    loss,
    maximum,
    log_sum,
    prediction,
    record,
    partials,
    bests,
    dims,
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
    LOGITS: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The results of whole rows, from the sums of their chunks."""
    r = tl.program_id(0).to(rows.dtype) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, CHUNKS)
    known = (r < rows)[:, None] & (j < chunks)[None, :]
    at = (r.to(tl.int64) * chunks)[:, None] + j[None, :]
    field = tl.cast(rows, tl.int64) * chunks
    m = tl.load(partials + at, mask=known, other=float("-inf"))
    s = tl.load(partials + at + field, mask=known, other=0.0)
    M = tl.max(m, 1)
    S = tl.sum(s * vanishing_exp(m - M[:, None]), 1)
    distance = tl.zeros_like(M)
    mass = tl.zeros_like(M)
    if SOFT or SMOOTHING != "none":
        masses = tl.load(partials + at + 3 * field, mask=known, other=0.0)
        moved = product(masses, M[:, None] - finite(m))
        distance = tl.sum(tl.load(partials + at + 2 * field, mask=known, other=0.0) + moved, 1)
        mass = tl.sum(masses, 1)
    best = tl.zeros_like(r)
    if prediction is not None:
        nan = tl.min(tl.where(m != m, j[None, :], NEVER), 1)
        first = tl.min(tl.where(m == M[:, None], j[None, :], NEVER), 1)
        chosen = j[None, :] == tl.where(nan < NEVER, nan, first)[:, None]
        best = tl.sum(tl.where(chosen, tl.load(bests + at, mask=known, other=0), 0), 1)
    write(
        x,
        target,
        weight,
        (loss, maximum, log_sum, prediction),
        (record, dims),
        r,
        (M, S, distance, mass, best),
        (rows, classes, inner, stride),
        (rest, even, z_loss, scale, cap),
        ignore_index,
        SOFT,
        SMOOTHING,
        LOGITS,
        Z_LOSS,
        ACC,
    )


def cross_entropy(problem: Problem) -> Found:
    """Return ℓ, M, L and, if they are wanted, the prediction and the entropy, one a row."""
    input, target, _, o = problem
    dim, dtype, predict = o.dim, o.dtype, o.stats
    soft = target.is_floating_point()
    report = None if soft else record_of(target)
    if report is not None:
        report.check()
    if not soft and target.device.type == "cpu":
        target = checked_labels(target, problem.classes, o.ignore_index)
    q = Arguments.of(problem._replace(target=target))
    shape = [size for d, size in enumerate(input.shape) if d != dim]
    loss, M, L = (torch.empty(shape, dtype=dtype, device=input.device) for _ in range(3))
    prediction = torch.empty(shape if predict else 0, dtype=torch.int64, device=input.device)
    if q.x.classes == 0:
        for empty in (loss, M, L):
            empty.zero_()
        prediction.fill_(-1)
    if input.numel() == 0:
        return _found(problem, loss, M, L, prediction)
    t, rows = q.tiles, q.x.rows
    given = (q.x.tensor, q.target, q.weight)
    results = (loss, M, L, prediction if predict else None, None if report is None else report.host)
    numbers = (*q.x.sizes, o.ignore_index, *q.numbers)
    with on_device(input):
        if t.chunks == 1:
            tensors = (*given, *results)
            launch(cross_entropy_whole, t.programs(rows), tensors, (target.dim(), *numbers), q.kind)
            return _found(problem, loss, M, L, prediction)
        numbers += (t.chunks,)
        partials = torch.empty(4, rows, t.chunks, dtype=dtype, device=input.device)
        bests = partials.new_empty(rows, t.chunks, dtype=torch.int32) if predict else None
        of_chunks = (partials, bests)
        launch(cross_entropy_partial, t.programs(rows), (*given, *of_chunks), numbers, q.kind)
        together = max(1, SMALL // q.kind["CHUNKS"])
        launch(
            cross_entropy_combined,
            ceil_div(rows, together),
            (*given, *results, *of_chunks),
            (target.dim(), *numbers),
            q.kind | {"ROWS": together, "num_warps": 4},
        )
    return _found(problem, loss, M, L, prediction)


def _found(problem: Problem, loss: Tensor, M: Tensor, L: Tensor, prediction: Tensor) -> Found:
    if not problem.options.stats:
        return Found(loss, M, L, None, None)
    o = problem.options
    z, _, _ = capped(problem.input, o)
    H = entropy((M.unsqueeze(o.dim) - z) + L.unsqueeze(o.dim), o.dim)
    return Found(loss, M, L, prediction, H.masked_fill(prediction < 0, 0.0))

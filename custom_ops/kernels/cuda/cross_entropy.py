"""ℓ, M, L, the prediction and the entropy of every row.

    ℓ = ⟨ỹ, (M − z) + L⟩ + λ·lse²,    ỹ_k = w_k ((1 − ε) y_k + ε/C),    lse = M + L

from the sums of its classes (`sums`). The entropy is −Σ p log p = L − T/S: a sum of two numbers
that are not negative, as S ≥ 1 and T ≤ 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arguments import Arguments
from custom_ops.kernels.cuda.arithmetic import (
    divided,
    product,
    scalar,
    stored,
)
from custom_ops.kernels.cuda.labels import read_labels, recorded
from custom_ops.kernels.cuda.launch import fresh, launch, on_device, watched
from custom_ops.kernels.cuda.logits import logits
from custom_ops.kernels.cuda.parameters import Chunks, Results, Target
from custom_ops.kernels.cuda.record import Memory, record_of
from custom_ops.kernels.cuda.reduction import finish
from custom_ops.kernels.cuda.rows import chunk_cells, multiples, place, row_starts
from custom_ops.kernels.cuda.sums import NEVER, row_sums, together
from custom_ops.kernels.labels import checked_labels, labels_reported
from custom_ops.kernels.problem import Found, Problem

__all__ = ["cross_entropy", "reduced"]


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
    here = place(shape[0], 1, KIND)
    STATS: tl.constexpr = out.prediction is not None
    sums = row_sums(input, y, here, ignore_index, shape, numbers, STATS, KIND)
    write(input, y, out, here[0], sums, shape, numbers, ignore_index, KIND)


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
    here = place(n, chunks, KIND)
    r, _, chunk = here
    STATS: tl.constexpr = partials.bests is not None
    sums = row_sums(input, y, here, ignore_index, shape, numbers, STATS, KIND)
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

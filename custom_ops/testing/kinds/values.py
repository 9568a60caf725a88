"""Numbers at the edges: a large common offset, infinities, NaN, subnormals, ties."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from custom_ops.testing.compare import ROUNDINGS, differing, owed, run
from custom_ops.testing.double import widest
from custom_ops.testing.entry import Check
from custom_ops.testing.rows import batch_or_reason
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault, NotApplicable
from custom_ops.testing.wording import position

__all__ = ["CHECKS"]


def _results(subject: Subject) -> list[Tensor]:
    with torch.no_grad():
        return subject.outputs(*subject.fresh(()))


def large_offset(subject: Subject) -> str:
    """Where adding 1 to every entry changes nothing, adding 10,000 changes nothing either.

    In float64, and in float32 with entries that hold the sum exactly.
    """
    double = widest(subject)
    i = double.wrt[0]
    x = double.inputs[i].detach()
    with torch.no_grad():
        plain = _results(double)
    if not all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        for a, b in zip(_results(double.replaced(i, x + 1)), plain, strict=True)
    ):
        raise NotApplicable("adding 1 to every entry changes the result")
    for dtype in (torch.float64, torch.float32):
        exact = (x * 256).round() / 256
        near = double.to(dtype).replaced(i, exact.to(dtype))
        want = _without_offset(near)
        if want is None:
            continue
        for offset in (4096.0, -4096.0):
            got = run(near.replaced(i, (exact + offset).to(dtype)))
            found = differing(got, want, owed(double), ROUNDINGS)
            if found is not None:
                raise Fault(
                    f"{found}, where all entries of {double.input_name(i)} share the offset "
                    f"{offset:g} in {str(dtype).removeprefix('torch.')}; the result does not "
                    "depend on it: subtract the maximum first, and keep it apart",
                    "large offset",
                )
    return "±4096 changes nothing"


def _without_offset(subject: Subject) -> list[Tensor | None] | None:
    try:
        return run(subject)
    except Exception:
        return None


def infinities(subject: Subject) -> str:
    """Where f tends to a limit as masked entries go to −∞, f at -inf is that limit."""
    double, count = widest(subject), 0
    i = double.wrt[0]
    x = double.inputs[i].detach()
    for what, mask in _masks(x):
        limit = _limit(double, i, x, mask)
        if limit is None:
            continue
        got = _results(double.replaced(i, x.masked_fill(mask, -torch.inf)))
        for o, (a, b) in enumerate(zip(got, limit, strict=True)):
            off = torch.isfinite(b) & ~torch.isclose(a, b, rtol=1e-6, atol=1e-9)
            if off.any():
                k = int(off.reshape(-1).nonzero()[0])
                raise Fault(
                    f"result {o} is {a.reshape(-1)[k].item()} at {position(k, tuple(a.shape))} "
                    f"where {what} of {double.input_name(i)} is -inf, as a mask has it; expected "
                    f"{b.reshape(-1)[k].item():.6g}, the limit",
                    "infinity",
                )
        count += 1
    if not count:
        raise NotApplicable("the result has no limit there")
    return f"{count} limits"


def _masks(x: Tensor) -> list[tuple[str, Tensor]]:
    """Which entries go to infinity: the first, the first half, all but the last of a row."""
    n = x.shape[-1] if x.dim() else 1
    found = [("the first entry of each row", [0])]
    if n > 2:
        found += [
            ("the first half of each row", list(range(n // 2))),
            ("all but the last entry of each row", list(range(n - 1))),
        ]
    masks = []
    for what, columns in found:
        mask = torch.zeros(x.shape, dtype=torch.bool)
        if x.dim():
            mask[..., columns] = True
        else:
            mask.fill_(True)
        masks.append((what, mask))
    return masks


def _limit(subject: Subject, i: int, x: Tensor, mask: Tensor) -> list[Tensor] | None:
    """f where the masked entries are far out, if they alone have stopped to matter there."""
    try:
        far = [_results(subject.replaced(i, x.masked_fill(mask, -L))) for L in (1e3, 1e4, 1e5)]
    except Exception:
        return None
    for ys in zip(*far, strict=True):
        if not all(torch.isfinite(y).all() for y in ys):
            return None
        if not all(torch.equal(ys[0], y) for y in ys[1:]):
            return None
    moved = x.masked_fill(mask, -1e5) + 0.125 * ~mask * torch.arange(x.numel()).view_as(x)
    if all(
        torch.allclose(a, b)
        for a, b in zip(_results(subject.replaced(i, moved)), far[-1], strict=True)
    ):
        return None  # it is the masked entries that decide: they are no mask
    return far[-1]


def nan_stays(subject: Subject) -> str:
    """NaN in one row of a batch changes no other row, in results and gradients."""
    positions = batch_or_reason(subject)
    double = widest(subject)
    i = double.wrt[0]
    x = double.inputs[i].detach()
    bad = x.clone()
    bad[0] = torch.nan
    want, got = run(double), run(double.replaced(i, bad))
    names = owed(double)
    keep = [True] * (len(want) - len(double.wrt)) + [j in positions for j in double.wrt]
    rest = [
        (None if a is None else a[1:], None if b is None else b[1:], n)
        for a, b, n, k in zip(got, want, names, keep, strict=True)
        if k
    ]
    found = differing([r[0] for r in rest], [r[1] for r in rest], [r[2] for r in rest], ROUNDINGS)
    if found is not None:
        raise Fault(
            f"{found}, with row 0 of {double.input_name(i)} NaN and that row left out: "
            "a row's NaN reaches others",
            "NaN spreads",
        )
    return "the other rows are as they were"


def subnormals(subject: Subject) -> str:
    """Entries of 1e-310 give what entries of 1e-290 tend to."""
    double = widest(subject)
    i = double.wrt[0]
    x = double.inputs[i].detach()
    if x.dtype != torch.float64:
        raise NotApplicable("float64 is refused")
    small = [run(double.replaced(i, x * s)) for s in (1e-270, 1e-280, 1e-290)]
    for a, b in zip(small[0], small[1], strict=True):
        if (
            a is not None
            and b is not None
            and not (torch.isfinite(a).all() and torch.allclose(a, b, rtol=1e-6))
        ):
            raise NotApplicable("the result has no limit at 0")
    got = run(double.replaced(i, x * 1e-310))
    found = _nan_or_inf(got, small[2], owed(double))
    if found is not None:
        raise Fault(
            f"{found}, where the entries of {double.input_name(i)} are subnormal", "subnormal"
        )
    return "as the smallest normal numbers"


def _nan_or_inf(
    got: list[Tensor | None], want: list[Tensor | None], names: list[str]
) -> str | None:
    for a, b, name in zip(got, want, names, strict=True):
        if a is None or b is None:
            continue
        bad = ~torch.isfinite(a) & torch.isfinite(b)
        if bad.any():
            k = int(bad.reshape(-1).nonzero()[0])
            return (
                f"{name} is {a.reshape(-1)[k].item()} at {position(k, tuple(a.shape))}; "
                f"expected {b.reshape(-1)[k].item():.6g}"
            )
    return None


def ties(subject: Subject) -> str:
    """With all entries equal, the gradient lies between the one-sided derivatives."""
    double = widest(subject)
    i = double.wrt[0]
    x = double.inputs[i].detach()
    if x.numel() < 2 or x.dtype != torch.float64:
        raise NotApplicable("an input of one entry has no ties")
    tied = double.replaced(i, torch.full_like(x, x.reshape(-1)[0].item()))
    outputs, gradients = tied.gradients()
    d = gradients[double.wrt.index(i)]
    if d is None or not all(torch.isfinite(y).all() for y in outputs):
        raise NotApplicable("there is no finite gradient")
    vs = [v.detach() for v in tied.cotangents(outputs)]
    q = _weighted(tied, i, vs)
    h = 1e-6
    here = q(tied.inputs[i])
    for s in range(min(x.numel(), 12)):
        e = torch.zeros_like(x)
        e.view(-1)[s] = h
        right, left = (q(tied.inputs[i] + e) - here) / h, (here - q(tied.inputs[i] - e)) / h
        low, high = min(left, right), max(left, right)
        room = 1e-4 * (1 + abs(low) + abs(high))
        g = d.reshape(-1)[s].item()
        if high - low < 1e3 and not low - room <= g <= high + room:
            raise Fault(
                f"where all entries of {double.input_name(i)} are equal, its gradient is {g:.6g} "
                f"at {position(s, tuple(x.shape))}; expected one between the one-sided "
                f"derivatives, {low:.6g} and {high:.6g}",
                "ties",
            )
    return "between the one-sided derivatives"


def _weighted(subject: Subject, i: int, vs: list[Tensor]) -> Callable[[Tensor], float]:
    def q(x: Tensor) -> float:
        ys = _results(subject.replaced(i, x))
        return sum(float((v * y).sum()) for v, y in zip(vs, ys, strict=True))

    return q


CHECKS = (
    Check("values", "large offset", large_offset, after=("gradient", "inputs unchanged")),
    Check("values", "infinities", infinities),
    Check("values", "NaN stays in its row", nan_stays, after=("gradient", "inputs unchanged")),
    Check("values", "subnormals", subnormals),
    Check("values", "ties", ties, after=("gradient",)),
)

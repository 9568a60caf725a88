"""Numbers at the edges: a large common offset, infinities, NaN, subnormals, ties."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from custom_ops.testing.compare import ROUNDINGS, differing, owed, run
from custom_ops.testing.differences import difference
from custom_ops.testing.double import widest
from custom_ops.testing.entry import Check
from custom_ops.testing.jacobians import concatenated
from custom_ops.testing.rows import batch_or_reason
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault, NotApplicable
from custom_ops.testing.wording import position

__all__ = ["CHECKS"]

FAR = (1234.5678, 12345.678, 123456.78)  # no whole numbers: frac and cos are no limits there


def _results(subject: Subject) -> list[Tensor]:
    with torch.no_grad():
        return subject.outputs(*subject.fresh(()))


def large_offset(subject: Subject) -> str:
    """Where adding a number to every entry changes nothing, adding 4,096 changes nothing either.

    In float64, and in float32 with entries that hold the sum exactly. Where an entry drops out at
    −∞, as a logit does, not even the offset's own rounding is allowed.
    """
    double = widest(subject)
    i = double.wrt[0]
    x = double.inputs[i].detach()
    with torch.no_grad():
        plain = _results(double)
    if not all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        for offset in (1.0, -37.5, 600.25)
        for a, b in zip(_results(double.replaced(i, x + offset)), plain, strict=True)
    ):
        raise NotApplicable("a number added to every entry changes the result")
    roundings = ROUNDINGS if _like_logits(double, i, x) else ROUNDINGS * 4096
    for dtype in (torch.float64, torch.float32):
        exact = (x * 256).round() / 256
        near = double.to(dtype).replaced(i, exact.to(dtype))
        want = _without_offset(near)
        if want is None:
            continue
        for offset in (4096.0, -4096.0):
            got = run(near.replaced(i, (exact + offset).to(dtype)))
            found = differing(got, want, owed(double), roundings)
            if found is not None:
                raise Fault(
                    f"{found}, where all entries of {double.input_name(i)} share the offset "
                    f"{offset:g} in {str(dtype).removeprefix('torch.')}; the result does not "
                    "depend on it: subtract the maximum first, and keep it apart",
                    "large offset",
                )
    return "±4096 changes nothing"


def _like_logits(subject: Subject, i: int, x: Tensor) -> bool:
    """Whether an entry that goes to −∞ drops out: such functions can lose nothing to an offset.

    A mean that is subtracted, as in a normalisation, loses the rounding of the offset itself.
    """
    for s in range(min(x.numel(), 6)):
        mask = torch.zeros(x.numel(), dtype=torch.bool)
        mask[s] = True
        if _limit(subject, i, x, mask.view(x.shape)) is not None:
            return True
    return False


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
    if not _like_logits(double, i, x):
        raise NotApplicable("no entry drops out at -inf")
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
    """f where the masked entries are far out and have stopped to matter.

    NaN stands for a number that does not depend on any other entry: those entries are no mask.
    """
    far = [_results(subject.replaced(i, x.masked_fill(mask, -L))) for L in FAR]
    for ys in zip(*far, strict=True):
        if not all(torch.isfinite(y).all() and torch.equal(ys[0], y) for y in ys):
            return None
    shift = 0.125 * ~mask * (1 + torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)
    moved = _results(subject.replaced(i, x.masked_fill(mask, -FAR[-1]) + shift))
    if any(a.shape != b.shape for a, b in zip(moved, far[-1], strict=True)):
        return None
    limit = [torch.where(a != b, b, torch.nan) for a, b in zip(moved, far[-1], strict=True)]
    return limit if any(torch.isfinite(y).any() for y in limit) else None


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
    """With all entries equal, the gradient adds up to the derivative along a common shift."""
    double = widest(subject)
    i = double.wrt[0]
    x = double.inputs[i].detach()
    if x.numel() < 2 or x.dtype != torch.float64:
        raise NotApplicable("an input of one entry has no ties")
    tied = double.replaced(i, torch.full(x.shape, x.reshape(-1)[0].item(), dtype=x.dtype))
    outputs, gradients = tied.gradients()
    d = gradients[double.wrt.index(i)]
    along = difference(partial(concatenated, tied, i), tied.inputs[i], torch.ones_like(x))
    if d is None or not torch.isfinite(d).all() or not torch.isfinite(along.error).all():
        raise NotApplicable("there is no finite gradient")
    v = torch.cat([v.reshape(-1) for v in tied.cotangents(outputs)])
    owed_sum, bound = float((v * along.value).sum()), float((v.abs() * along.error).sum())
    if abs(float(d.sum()) - owed_sum) > 10 * bound + 1e-7 * (1 + float(d.abs().sum())):
        raise Fault(
            f"where all entries of {double.input_name(i)} are equal, its gradient adds up to "
            f"{float(d.sum()):.6g}; expected {owed_sum:.6g}, the derivative along a common shift: "
            "is a maximum counted once for each tie?",
            "ties",
        )
    return "adds up to the derivative along a common shift"


CHECKS = (
    Check("values", "large offset", large_offset, after=("gradient", "inputs unchanged")),
    Check("values", "infinities", infinities),
    Check("values", "NaN stays in its row", nan_stays, after=("gradient", "inputs unchanged")),
    Check("values", "subnormals", subnormals),
    Check("values", "ties", ties, after=("gradient",)),
)

"""The table of checks, in the order in which a report has them."""

from __future__ import annotations

from custom_ops.testing.entry import Check
from custom_ops.testing.kinds import (
    bad_inputs,
    call,
    compiled,
    derivatives,
    determinism,
    distributed,
    dtypes,
    forward_mode,
    higher,
    layouts,
    memory,
    operators,
    reference,
    reuse,
    surroundings,
    transforms,
    upstream,
    values,
)

__all__ = ["CHECKS"]

CHECKS: tuple[Check, ...] = (
    *call.CHECKS,
    *reference.CHECKS,
    *derivatives.CHECKS,
    *reuse.CHECKS,
    *upstream.CHECKS,
    *higher.CHECKS,
    *forward_mode.CHECKS,
    *transforms.CHECKS,
    *layouts.CHECKS,
    *dtypes.CHECKS,
    *values.CHECKS,
    *surroundings.CHECKS,
    *compiled.CHECKS,
    *determinism.CHECKS,
    *memory.CHECKS,
    *bad_inputs.CHECKS,
    *operators.CHECKS,
    *distributed.CHECKS,
)

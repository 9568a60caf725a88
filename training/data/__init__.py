"""Examples in memory: handwritten digits and text, in batches that a seed and an epoch determine.

Read `batches`, then `examples`, then `digits` with `images` and `mnist`; `text` is for the language
model.
"""

from training.data.digits import NAMES, DigitData

__all__ = ["NAMES", "DigitData"]

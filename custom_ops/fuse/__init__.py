"""Any model trains without its logits, its own loss code unchanged.

form.py     what a lazy tensor stands for, and the calls of `linear_cross_entropy` that it makes
table.py    what each operation does to it
lazy.py     the tensor: between a function, autograd and the table
head.py     `fuse`: which layers answer with it, and when
"""

from custom_ops.fuse.head import Materialized, fuse, materialized, unfuse

__all__ = ["Materialized", "fuse", "materialized", "unfuse"]

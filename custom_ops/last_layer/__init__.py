"""The last layer and its loss, a block of rows at a time: N × C logits never exist.

In the order of reading: `layer` (the values), `loop` (the kernels over blocks), `algebra` (the same
as differentiable algebra), `functions` (the autograd Functions); `products` and `operators` are what
the loop multiplies with, and what a tracer sees in its place.
"""

"""The last layer and its loss, a block of rows at a time: N × C logits never exist.

In the order of reading: `layer` (the values), `loop` (the kernels over blocks), `algebra` (the
same as differentiable algebra), `functions` (the autograd Functions). `products` is what the loop
multiplies with, `operators` what a tracer sees in its place.
"""

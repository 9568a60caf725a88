"""The last layer and its loss, a part of the logits at a time: N × C logits never need to exist.

In the order of reading: `layer` (the values), `plan` (in which order, within how much memory),
`loop` (the kernels over the parts: `by_rows`, `by_classes` or `whole`), `hessian` (the same for the
product with the Hessian), `algebra` (the same as differentiable algebra), `functions` (the autograd
Functions). `products` is what they multiply with, `readable` cuts out rows that are ignored,
`operators` is what a tracer sees in the place of the loop.
"""

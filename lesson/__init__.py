"""The lesson of `scripts/explain.py`, to be read in this order.

1. `two_layers`: the whole backward pass of a small network, in ten lines.
2. `digits` and `training`: the images, and one linear layer that learned from them.
3. `one_image` and `network`: the numbers of part one and of part two, all computed.
4. `part_one` and `part_two`: the text, a function a step; `layout` sets its numbers.
5. `page` and `picture`: what the command prints and draws; `markdown` makes docs/lesson.md of it.

`exercises` has five backward passes to fill in. `docs/softmax.html` is the lesson to touch. Nothing
here is needed to use `custom_ops`.
"""

"""Training with Lightning: the data, one classifier, and the comparison of the heads.

Nothing here is needed to use `custom_ops`. The command lines are `scripts/train.py` and
`scripts/compare.py`.
"""

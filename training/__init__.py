"""Training with Lightning: the data, the networks, and the comparison of the heads.

Nothing here is needed to use `custom_ops`. The command lines are `scripts/train.py`,
`scripts/compare.py` and `scripts/train_lm.py`.
"""

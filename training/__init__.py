"""Training with Lightning: four rooms, to be read in this order.

1. `data`: images and text as tensors, the batches of an epoch, the Lightning data modules.
2. `networks`: the networks, the heads (last layer and loss) that are compared, the optimizers.
3. `run`: what one command line does around a Trainer: arguments, folder, checkpoints, signals.
4. `comparison`: the heads in lock-step; what is recorded, tested, reported, drawn and said.

`classifier` is one network with one head, as a LightningModule. `lightning` is the one place that
imports Lightning. Nothing here is needed to use `custom_ops`. The command lines are
`scripts/train.py`, `scripts/compare.py` and `scripts/train_lm.py`.
"""

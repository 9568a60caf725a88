"""The networks (`models`, `gpt`), the heads that are compared, and the optimizers."""

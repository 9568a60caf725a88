"""Softmax and cross-entropy for PyTorch, by hand, through the Jacobian contraction."""

"""The Triton kernels for CUDA; `kernels/triton.py` is how the package meets them."""

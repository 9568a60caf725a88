"""dx = dz W, dW = dzᵀ x and db = Σ dz of the last layer, each rounded once whatever the block.

dW is added up over blocks of rows, and dx waits for its upstream gradient: rounded to the half type
on the way, the error of either would grow with the number of blocks. So both are kept in float32.
The matrix units of a GPU add up in float32 anyway, and cuBLAS writes that sum as it is; turning its
factors into float32 first would take the product away from those units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.kernels import cpu, statistics_dtype
from custom_ops.last_layer.layer import Layer, Products
from custom_ops.last_layer.readable import clean
from custom_ops.surroundings import is_watched

__all__ = [
    "Sums",
    "add_product_",
    "advised",
    "fresh_logits",
    "put_product_",
    "rounds_once",
    "scaled",
    "widens",
]

VECTOR = 16  #: bytes that a GPU reads at a time


class Sums:
    """dx, dW and db while the blocks of rows come in."""

    def __init__(
        self, layer: Layer, wanted: tuple[bool, bool, bool], one_block: bool = False
    ) -> None:
        x, W, b, *_ = self.layer = layer
        dtype = statistics_dtype(x.dtype)
        # of one block dW is no sum, and is rounded where it is written
        of_W = W.dtype if one_block and rounds_once(W) else dtype
        self.dx = x.new_empty(x.shape, dtype=dtype) if wanted[0] else None
        self.dW = advised(W.new_empty(W.shape, dtype=of_W)) if wanted[1] else None
        self.dW_is_empty = True
        self.db = b.new_zeros(b.shape, dtype=dtype) if wanted[2] and b is not None else None

    def add(self, part: slice, dz: Tensor) -> None:
        """Add dz W, dzᵀ x and Σ dz."""
        self.add_dx(part, dz, self.layer.W)
        if self.dW is not None:
            self.add_dW(dz, clean(self.layer, part))
        self.add_db(dz)

    def add_dx(self, part: slice, dz: Tensor, W: Tensor, beta: int = 0) -> None:
        """Add dz W, or with β = 0 begin with it."""
        if self.dx is not None:
            put_product_(self.dx[part], dz, W, beta)

    def add_dW(self, dz: Tensor, x: Tensor) -> None:
        """Add dzᵀ x."""
        if self.dW is not None:
            add_product_(self.dW, dz, x, first=self.dW_is_empty)
            self.dW_is_empty = False

    def add_db(self, dz: Tensor) -> None:
        """Add Σ dz."""
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.db.dtype)

    def products(self) -> Products:
        """Return the sums; of no block they are 0."""
        if self.dW is not None and self.dW_is_empty:
            self.dW.zero_()
        return Products(self.dx, self.dW, self.db)


def add_product_(total: Tensor, dz: Tensor, x: Tensor, first: bool = False) -> None:
    """Σ += dzᵀ x, added up in the dtype of the sum; dz and x may be of a half type.

    The `first` product finds memory in Σ that nothing was written to.
    """
    if total.dtype != dz.dtype and widens(dz):
        return _add_wide_(total, dz.t(), x, beta=int(not first))
    if first:
        total.zero_()
    if total.dtype == dz.dtype:
        total.addmm_(dz.t(), x)
    elif not _add_product_of_bf16_(total, dz, x):
        total.addmm_(dz.t().to(total.dtype), x.to(total.dtype))


def put_product_(out: Tensor, dz: Tensor, W: Tensor, beta: int) -> None:
    """out = β out + dz W; dz and W may be of a half type, to which a CPU rounds their product."""
    if out.dtype == dz.dtype:
        torch.addmm(out, dz, W, beta=beta, out=out)
    elif widens(dz):
        _add_wide_(out, dz, W, beta)
    elif beta:
        out += torch.mm(dz, W)
    else:
        out.copy_(torch.mm(dz, W))


def scaled(product: Tensor, g: Tensor, dtype: torch.dtype, give: bool) -> Tensor:
    """Return g times the product in `dtype`: in its place if it is to be given away."""
    if dtype != product.dtype and not is_watched() and widens(product):
        # rounded to a half type as it is written: one pass for two
        return torch.mul(product, g, out=torch.empty_like(product, dtype=dtype))
    return (product.mul_(g) if give else product * g).to(dtype)


def fresh_logits(x: Tensor, rows: int, classes: int) -> Tensor:
    """Return memory for logits; a GPU's rows begin at whole vectors, as cuBLAS is fast with."""
    if x.device.type != "cuda":
        return advised(x.new_empty(rows, classes))
    numbers = VECTOR // x.itemsize
    return x.new_empty(rows, -(-classes // numbers) * numbers)[:, :classes]


def advised(fresh: Tensor) -> Tensor:
    """Return `fresh`, memory not touched so far, in huge pages where the system gives them."""
    if cpu.library is not None and cpu.takes(fresh):
        cpu.library.advise_huge_pages(fresh)
    return fresh


def rounds_once(A: Tensor) -> bool:
    """Whether a product of A's dtype is added up in a wider one, or needs none."""
    return statistics_dtype(A.dtype) == A.dtype or widens(A)


def widens(A: Tensor) -> bool:
    """Whether the device of A gives the product of its half-precision numbers in float32.

    NVIDIA's do from Ampere on; torch refuses such a product before it, and on ROCm.
    """
    if A.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(A.device) >= (8, 0)


def _add_wide_(total: Tensor, A: Tensor, B: Tensor, beta: int) -> None:
    """Σ = β Σ + A B, with Σ of float32 and A, B of a half type; with β = 0 the old Σ is not read.

    torch.addmm takes no `out` of another type than A; that Σ stands in both places spares a copy.
    """
    torch.ops.aten.addmm.dtype_out(total, A, B, total.dtype, beta=beta, out=total)


def _add_product_of_bf16_(total: Tensor, dz: Tensor, x: Tensor) -> bool:
    """Add dzᵀ x, products of bfloat16 numbers, in float32; return False where it cannot be done."""
    if cpu.library is None or not cpu.library.has_bf16_products or dz.dtype != torch.bfloat16:
        return False
    if not cpu.takes(total, dz, x):
        return False
    cpu.library.add_product(total, dz.contiguous(), x.contiguous())
    return True

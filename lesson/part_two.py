"""Part two as text: the batch, the network, and what follows from them."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from lesson.layout import gap, header, matrix, part, products, row, title, wrap
from lesson.network import HIDDEN, OFFSET, RATE, STEPS, AnyTarget, Batch, Numbers
from lesson.one_image import OneImage
from lesson.part_one import VOCABULARY
from lesson.two_layers import gradients

ROWS = 4_096  # words in a batch of a language model


def part_two_steps(case: OneImage, numbers: Numbers) -> list[str]:
    """Return the steps 12 to 18."""
    return [
        the_batch(numbers.batch),
        batch_scores(numbers.batch),
        batch_weights(case, numbers.batch),
        layer_below(numbers),
        the_code(case, numbers),
        any_target(case, numbers),
        kept(case, numbers),
    ]


def the_batch(b: Batch) -> str:
    """Step 12."""
    n = len(b.X)
    labels = ", ".join(str(int(k)) for k in b.Y.argmax(1))
    return f"""\
{part("PART TWO: the batch, and the layer below")}

The rule stays the same from here on. The same sums are written for N images at
once, and then for a second layer.


{title("12. The batch   N images, a row each")}

    X               (N, 64)   row n is image n
    Z = X Wᵀ + b    (N, 10) = (N, 64) × (64, 10) + (10,)   b goes to every row
    A = softmax(Z)  (N, 10)   each row for itself
    Y               (N, 10)   the targets
    C = 1/N Σ_n C_n           one number, the mean of the rows' costs

Here N = {n}: the images {b.positions[0]} to {b.positions[-1]}, labels {labels}.

{header("s")}
{named_rows("A", b.A)}"""


def batch_scores(b: Batch) -> str:
    """Step 13."""
    n = len(b.X)
    literal = b.each.dC_dz / n
    words = (
        "dZ is short for ∂C/∂Z; so are dW, db and dX below. Image n's cost C_n depends on row n of "
        "Z and on no other row. So each row has its own v, ∂C_n/∂A_n, and its own J: "
        f"{n} matrices of (10, 10), not one of ({n * 10}, {n * 10}). In each row steps 1 to 3 hold "
        "as they stand, times ∂C/∂C_n:"
    )
    return f"""\
{title("13. dZ = (A − Y) / N   (N, 10)   where the 1/N goes")}

{wrap(words)}

    dZ_ns = ∂C/∂C_n · Σ_k v_nk J_nks = 1/N · (A_ns − Y_ns)

{header("s")}
{named_rows("dZ", b.dZ)}

The 1/N is ∂C/∂C_n, as C is a mean. It comes in here, once. All that follows is
made of dZ and has it already. (If C is the sum of the rows' costs, there is no
1/N.) With the {n} Jacobians built, the largest difference is {gap(b.dZ - literal)}."""


def batch_weights(case: OneImage, b: Batch) -> str:
    """Step 14."""
    i, j = case.rival, int(b.X.amin(0).argmax())  # a pixel that no image leaves white
    terms = list(zip(b.dZ[:, i].tolist(), b.X[:, j].tolist(), strict=True))
    outer = b.each.dC_dW.sum(0) / len(b.X)
    differences = [
        gap(mine - theirs) for mine, theirs in zip((b.dW, b.db, b.dX), b.torchs[1:], strict=True)
    ]
    dW, db, dX = differences
    return f"""\
{title("14. dW = dZᵀ X   (10, 64)   a sum of outer products is a matrix product")}

All images share W, so the outer products of step 8 are added, one for each
image. A sum of products over n is a matrix product.

    dW_ij = Σ_n dZ_ni X_nj    (10, 64) = (10, N) × (N, 64)    dW = dZᵀ X
    db_i  = Σ_n dZ_ni         (10,)      b went to every row  db = Σ_n dZ_n
    dX_nj = Σ_s dZ_ns W_sj    (N, 64) = (N, 10) × (10, 64)    dX = dZ W

{products(f"dW_{i},{j}", terms, float(b.dW[i, j]))}

X is not shared. Row n of X reaches the cost through row n of Z alone, so dX has
no sum over n. The shapes say which factor is transposed: dW has W's shape, and
of (N, 10) and (N, 64) only dZᵀ X makes (10, 64). The largest difference of an
entry:

    {"":<32}{"dW":>12}{"db":>12}{"dX":>12}
    {f"the {len(b.X)} outer products, added":<32}{gap(b.dW - outer):>12}
    {"torch, F.cross_entropy":<32}{dW:>12}{db:>12}{dX:>12}"""


def layer_below(numbers: Numbers) -> str:
    """Step 15."""
    net, n = numbers.network, len(numbers.batch.X)
    i = int(net.dZ1[0].abs().argmax())
    d, x1 = float(net.dX1[0, i]), float(net.X1[0, i])
    J = torch.diag_embed(net.X1 * (1 - net.X1))
    literal = torch.einsum("nk,nks->ns", net.dX1, J)
    return f"""\
{title("15. The layer below   where the product is element-wise, and why")}

    Z₁ = X W₁ᵀ + b₁     (N, {HIDDEN}) = (N, 64) × (64, {HIDDEN}) + ({HIDDEN},)
    X₁ = σ(Z₁)          (N, {HIDDEN})   each entry for itself
    Z₂ = X₁ W₂ᵀ + b₂    (N, 10) = (N, {HIDDEN}) × ({HIDDEN}, 10) + (10,)
    A  = softmax(Z₂)    (N, 10)   each row for itself

The upper layer is that of step 14, and its input is now X₁. So

    dZ₂ = (A − Y) / N       dW₂ = dZ₂ᵀ X₁       db₂ = Σ_n dZ₂_n
    dX₁ = dZ₂ W₂            (N, {HIDDEN}) = (N, 10) × (10, {HIDDEN})

The J of σ is diagonal, with σ (1 − σ) on it (step 9), and σ(Z₁) is X₁. A row
vector times a diagonal matrix is an element-wise product, ⊙:

    dZ₁ = dX₁ ⊙ X₁ ⊙ (1 − X₁)       (N, {HIDDEN})
    dW₁ = dZ₁ᵀ X            ({HIDDEN}, 64) = ({HIDDEN}, N) × (N, 64)
    db₁ = Σ_n dZ₁_n         ({HIDDEN},)

One entry, of image 0 and unit {i}: σ is {x1:.3f}, its slope σ (1 − σ) = {x1 * (1 - x1):.4f}, and

{products(f"dZ₁_0,{i}", [(d, x1 * (1 - x1))], float(net.dZ1[0, i]))}

With the {n} diagonal matrices built, as in step 9, the largest difference is
{gap(net.dZ1 - literal)}. Another activation has another slope: for ReLU it is 1 where
z > 0, else 0. The ⊙ stays, as long as each entry depends on its own score."""


def the_code(case: OneImage, numbers: Numbers) -> str:
    """Step 16."""
    net, b = numbers.network, numbers.batch
    names = ("dW1", "db1", "dW2", "db2")
    pairs = zip(net.gradients, net.torchs, strict=True)
    gaps = [gap(mine - theirs) for mine, theirs in pairs]
    shapes = ["(" + ", ".join(map(str, d.shape)) + ",)" * (d.dim() == 1) for d in net.gradients]
    shapes = [s if s.endswith(")") else s + ")" for s in shapes]
    said = wrap(
        f"This text is the function that ran. From random weights, {STEPS} steps of gradient "
        f"descent with it, each weight less {RATE:.0f} times its gradient, give a network that "
        f"misreads {net.misread} of the {case.held_out} unseen images; one layer misread "
        f"{case.misread}. On the {len(b.X)} images, beside torch's autograd of F.cross_entropy:"
    )
    return f"""\
{title("16. The code   the whole backward pass")}

N images, D pixels, H hidden units, K classes.

{inspect.getsource(gradients).rstrip()}

softmax is exp(z_k) / Σ_s exp(z_s) in each row.
{said}

    {"":<24}{"".join(f"{name:>12}" for name in names)}
    {"shape":<24}{"".join(f"{shape:>12}" for shape in shapes)}
    {"largest difference":<24}{"".join(f"{g:>12}" for g in gaps)}"""


def any_target(case: OneImage, numbers: Numbers) -> str:
    """Step 17."""
    a = case.factors.a
    return f"""\
{title("17. Any y   why a − y, and when not")}

Let y be any vector, with m = Σ_k y_k. The sum of step 3, all terms kept:

    ∂C/∂z_s = Σ_k (−y_k/a_k) · a_k (δ_ks − a_s)
            = −Σ_k y_k δ_ks + a_s Σ_k y_k
            = m a_s − y_s

So a − y is right because y adds up to 1, not because one entry is 1. With a
soft target, m = {numbers.soft.mass:.0f}:

{target_rows(a, numbers.soft)}

A class weight w_k turns y_k into w_k y_k, so that m is no longer 1. With a y
for which m = {numbers.heavy.mass:.1f}:

{target_rows(a, numbers.heavy)}

Here a − y would be wrong by {gap(a - numbers.heavy.y - numbers.heavy.dC_dz)} in its worst entry."""


def target_rows(a: Tensor, target: AnyTarget) -> str:
    """Return y, v @ J and m a − y as a table, with their difference."""
    short = target.mass * a - target.y
    return f"""\
{header("s")}
{row("y", target.y)}
{row("v @ J", target.dC_dz)}
{row("m a − y", short)}
    the largest difference is {gap(short - target.dC_dz)}"""


def kept(case: OneImage, numbers: Numbers) -> str:
    """Step 18."""
    k, a = numbers.kept, case.factors.a
    one, two = VOCABULARY * ROWS * 4 / 1e6, 2 * ROWS * 4 / 1e6
    s = case.rival
    size = wrap(
        f"The scores z are there anyway: they are softmax's input. For {ROWS:,} words of "
        f"a language model with {VOCABULARY:,} classes, keeping a takes {one:,.0f} MB in float32 "
        f"and the two numbers {two:.3f} MB. They stay apart, because their sum would lose digits: "
        f"with {OFFSET:,.0f} added to every score, float32 gets a to within "
        f"{bound(k.offset_error)} from M and L, and only to within {bound(k.offset_error_of_sum)} "
        "from the one number M + L. custom_ops.cross_entropy works so: it keeps z, the target, "
        "M and L."
    )
    return f"""\
{title("18. What forward keeps for backward")}

    ∂C/∂z = a − y, or a ⊙ (v − ⟨a, v⟩)     needs a, (10,), and y, (10,)
    ∂C/∂W_ij = ∂C/∂z_i · x_j               needs x, (64,)
    ∂C/∂x_j = Σ_s ∂C/∂z_s W_sj             needs W, (10, 64), kept as a weight
    dZ₁ = dX₁ ⊙ X₁ ⊙ (1 − X₁)              needs X₁, not Z₁

J is in no line: it is made of a, and v @ J needs a alone. The probabilities
need not be kept either. Two numbers for each row give them back from the
scores:

    M = max_s z_s                     {k.M:.3f}    so that exp cannot overflow
    L = log Σ_s exp(z_s − M)          {k.L:.3f}
    a_k = exp((z_k − M) − L)          a_{s} = exp(({case.factors.z[s]:.3f} − M) − L) = {k.a[s]:.3f}

The largest difference to a is {gap(k.a - a)}, and C = L + (M − z_t) for label t.
{size}"""


def bound(v: float) -> str:
    """Return the power of ten above v."""
    return next(f"1e-{d}" for d in range(12, -1, -1) if v < 10.0**-d)


def named_rows(name: str, M: Tensor) -> str:
    """Return the rows of a batch, named n."""
    return matrix(M, f"{name}  n")

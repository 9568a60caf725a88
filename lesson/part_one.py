"""Part one as text: one image, a function a step, in the order of the chain rule."""

from __future__ import annotations

import torch
from torch import Tensor

import custom_ops
from lesson.digits import TRAINED
from lesson.layout import (
    Terms,
    beside,
    gap,
    header,
    image,
    matrix,
    part,
    products,
    row,
    title,
    wrap,
)
from lesson.one_image import Comparison, OneImage
from lesson.training import STEPS

VOCABULARY, FEATURES = 32_000, 4_096  # the last layer of a language model


def part_one(case: OneImage) -> list[str]:
    """Return the steps 1 to 11, the case before them."""
    steps = (
        the_case,
        cost_gradient,
        jacobian,
        contraction,
        broadcast_mistake,
        diagonal_mistake,
        squared_error,
        third_order,
        outer_product,
        sigmoid,
        agreement,
        without_the_matrix,
    )
    return [step(case) for step in steps]


def the_case(case: OneImage) -> str:
    """The image, the layer, and the forward pass."""
    return f"""\
{part("PART ONE: one image")}

{beside(image(case.x), forward(case))}

{training(case)}

{header("s")}
{row("z", case.factors.z)}
{row("a", case.factors.a)}
{row("y", case.y)}

A dot stands for an exact zero. Numbers are rounded to three decimals; a product
that is written out has as many as it takes to agree with its result."""


def forward(case: OneImage) -> list[str]:
    """Return the forward pass in eight lines, as high as the image."""
    t = case.label
    return [
        f"image {case.position} of scikit-learn's digits, a {t}",
        "",
        "x                (64,)  its 8 × 8 pixels, from 0 to 1",
        "z = W x + b      (10,)  scores; W is (10, 64), b is (10,)",
        "a = softmax(z)   (10,)  a_k = exp(z_k) / Σ_s exp(z_s)",
        "y                (10,)  1 for the true class, else 0",
        "C = −Σ_k y_k log a_k    the cost, cross-entropy:",
        f"  = −log a_{t} = −log {case.factors.a[t]:.5g} = {case.cost:.3f}",
    ]


def training(case: OneImage) -> str:
    """Say how the weights came to be, and what the layer makes of the image."""
    guess = int(case.factors.a.argmax())
    seen = "was held out" if case.position >= TRAINED else "is one of those it learned from"
    read = "is read rightly" if guess == case.label else f"is taken for a {guess}"
    return wrap(
        f"The weights: from zero, {STEPS} steps of gradient descent on the first {TRAINED} "
        "images, with the gradient that is derived below. The layer misreads "
        f"{case.misread} of the {case.held_out} it has not seen. This image {seen}, and {read}."
    )


def cost_gradient(case: OneImage) -> str:
    """Step 1."""
    t, a_t, v_t = case.label, case.factors.a[case.label], case.factors.dC_da[case.label]
    return f"""\
{title("1. v = ∂C/∂a   (10,)   a vector")}

    v_k = ∂C/∂a_k = −y_k / a_k        as C = −Σ_k y_k log a_k

{header("k")}
{row("v", case.factors.dC_da)}

Only the true class enters the cost, so v has one entry: −1 / a_{t} = {v_t:.3f}, as
a_{t} = {a_t:.5g}. From here on v is short for ∂C/∂a, whatever the cost is."""


def jacobian(case: OneImage) -> str:
    """Step 2."""
    return f"""\
{title("2. J = ∂a/∂z   (10, 10)   a matrix")}

With S = Σ_s exp(z_s), a_k is exp(z_k) / S. Score z_k moves numerator and S; any
other score z_s moves S alone. The quotient rule:

    k = s    ∂a_k/∂z_k = exp(z_k)/S − exp(z_k)²/S²  = a_k (1 − a_k)
    k ≠ s    ∂a_k/∂z_s = −exp(z_k) exp(z_s)/S²      = −a_k a_s

    J_ks = ∂a_k/∂z_s = a_k (δ_ks − a_s)        δ_ks is 1 if k = s, else 0

{header("s")}
{matrix(case.factors.J)}

Column s says what happens to all ten probabilities when score s rises. Its own
grows, a_s (1 − a_s) on the diagonal; every other one shrinks, −a_k a_s, because
all share one sum. So each column adds up to 0 (here to {gap(case.factors.J.sum(0))})."""


def contraction(case: OneImage) -> str:
    """Step 3."""
    s, f = case.rival, case.factors
    return f"""\
{title("3. ∂C/∂z   (10,)   vector times matrix")}

    ∂C/∂z_s = Σ_k v_k · J_ks        (10,) = (10,) × (10, 10)        v @ J

Score s reaches the cost through all ten probabilities, so ten products are
added: the vector runs down column s. (With v as a column it is Jᵀ v.) Column {s},
the likeliest wrong class:

{column(case.cross_entropy, s)}

All ten columns, and below them what the sum collapses to:

{header("s")}
{row("∂C/∂z", f.dC_dz)}
{row("a − y", f.a - case.y)}

Because y has a single 1, at t = {case.label}, one term of each sum is left:
−1/a_t · a_t (δ_ts − a_s) = a_s − y_s. The largest difference is {gap(f.dC_dz - f.a + case.y)}.
(Step 17 has the same for any y.)"""


def broadcast_mistake(case: OneImage) -> str:
    """Step 4."""
    table = case.cross_entropy.v * case.cross_entropy.J
    zero, symmetric = gap(table.sum(0)), gap(table.sum(1) - case.factors.dC_dz)
    return f"""\
{title("4. The mistake that changes the shape:  v * J")}

PyTorch multiplies (10,) and (10, 10) element by element without an error, by
broadcasting: (v * J)_ks = v_s J_ks. That is {table.numel()} numbers where the gradient has
{len(case.y)}, and there are two ways to sum them:

    over k   Σ_k v_s J_ks = v_s Σ_k J_ks   largest entry             {zero:>7}
    over s   Σ_s v_s J_ks = (J v)_k        largest error of an entry {symmetric:>7}

The first is 0 for every score, as every column of J adds up to 0: nothing is
learned. The second is right, but only because softmax's J is symmetric."""


def diagonal_mistake(case: OneImage) -> str:
    """Step 5."""
    e = case.cross_entropy
    lost = int(((e.wrong == 0) & (e.right != 0)).sum())
    words = (
        f"It pushes score {case.label} up and does not push the others down. That still goes "
        "downhill, so the mistake goes unnoticed: trained by it, the same layer in the same "
        f"{STEPS} steps misreads {case.misread_diagonal} of the {case.held_out} unseen images, not "
        f"{case.misread}."
    )
    return f"""\
{title("5. The mistake that keeps the shape:  v * diag(J)")}

For the sigmoid ∂C/∂z_s = v_s · a_s (1 − a_s) is right (step 9 derives it).
Softmax has the same a_s (1 − a_s), on J's diagonal. Used alone it gives

{header("s")}
{row("right", e.right)}
{row("wrong", e.wrong)}

{wrap(f"{lost} of {len(e.wrong)} entries are lost. {error(e)}")}

{wrap(words)}"""


def squared_error(case: OneImage) -> str:
    """Step 6."""
    e, s = case.squared_error, case.rival
    flipped = f"{int(e.opposite.sum())} of {len(e.wrong)}"
    marks = "".join(f"{'≠' if o else '':>7}" for o in e.opposite)
    sign = f"\n{'sign':>10}{marks.rstrip()}" if marks.strip() else ""
    return f"""\
{title("6. Another cost, the same rule:  C = ½ Σ_k (a_k − y_k)²")}

For this cost a − y is v, not yet ∂C/∂z: v_k = ∂C/∂a_k = a_k − y_k. It has no
zeros, and ten terms of the sum count:

{header("k")}
{row("v", e.v)}

{column(e, s)}

{header("s")}
{row("right", e.right)}
{row("wrong", e.wrong)}{sign}

{wrap(f"Wrong is v * diag(J) again: {flipped} entries have the opposite sign (≠). {error(e)}")}"""


def third_order(case: OneImage) -> str:
    """Step 7."""
    t, other, shown = case.label, (case.label + 1) % 10, range(18, 28)
    dz_dW, pixels = case.factors.dz_dW, slice(shown.start, shown.stop)
    return f"""\
{title("7. ∂z/∂W   (10, 10, 64)   three indices: it is never built")}

    ∂z_s/∂W_ij = δ_si x_j        score s depends on row s of W alone

Its slice s = {t} is a (10, 64) matrix: the image in row i = {t}, zeros in the nine
others. Ten of the columns:

{header("j", shown)}
{row(f"i = {t}", dz_dW[t, t, pixels])}
{row(f"i = {other}", dz_dW[t, other, pixels])}

{size_of_third_order(case)}"""


def size_of_third_order(case: OneImage) -> str:
    """Count the zeros, and the bytes of a real one."""
    entries, zeros = case.factors.dz_dW.numel(), int((case.factors.dz_dW == 0).sum())
    gigabytes = 4 * VOCABULARY**2 / 1e9
    return wrap(
        f"{zeros} of its {entries} entries are 0 ({zeros / entries:.0%}), and the rest is x, "
        f"ten times. In the last layer of a language model, {VOCABULARY:,} words and "
        f"{FEATURES:,} features, it would take {FEATURES * gigabytes:,.0f} GB for one word "
        f"(float32), and J alone {gigabytes:.1f} GB."
    )


def outer_product(case: OneImage) -> str:
    """Step 8."""
    i, j, f = case.rival, case.grey_pixel, case.factors
    terms = [(float(f.dC_dz[i]), float(case.x[j]))]
    entry = products(f"∂C/∂W_{i},{j}", terms, float(f.dC_dW[i, j]))
    return f"""\
{title("8. ∂C/∂W   (10, 64)   an outer product")}

    ∂C/∂W_ij = Σ_k Σ_s v_k · J_ks · ∂z_s/∂W_ij
             = Σ_s ∂C/∂z_s · δ_si x_j                by step 3
             = ∂C/∂z_i · x_j                         δ_si leaves one term

An outer product makes a matrix of two vectors: every entry of one times every
entry of the other, (10,) and (64,) to (10, 64). One entry of {f.dC_dW.numel()}:

{entry}

The largest difference between double sum and outer product is {gap(f.dC_dW - outer(case))}.
To the bias and to the layer below, by the same rule:

    ∂C/∂b   = ∂C/∂z                   (10,)
    ∂C/∂x_j = Σ_s ∂C/∂z_s W_sj        (64,) = (10,) × (10, 64)

W is the Jacobian ∂z/∂x of the linear layer, so this is row vector times
Jacobian once more."""


def sigmoid(case: OneImage) -> str:
    """Step 9."""
    e = case.sigmoid
    exact = "equal to the last bit" if torch.equal(e.right, e.wrong) else "not equal"
    return f"""\
{title("9. When the element-wise product is right:  sigmoid")}

Let a_k = σ(z_k) = 1 / (1 + exp(−z_k)) instead. It depends on its own score
only, so J_ks = 0 for k ≠ s, and on the diagonal the quotient rule gives

    σ'(z) = exp(−z) / (1 + exp(−z))² = σ(z) (1 − σ(z))

as exp(−z) / (1 + exp(−z)) is 1 − σ(z). The same scores, the cost of step 6:

{header("k")}
{row("v", e.v)}

{header("s")}
{matrix(e.J)}

{row("v @ J", e.right)}
{row("v*diag(J)", e.wrong)}

Nine terms of each sum are 0 and one is left, v_s · a_s (1 − a_s). The two rows
are {exact}. This is where you saw it element-wise. The rule was
Σ_k v_k · J_ks there too, with a diagonal J. Softmax's J is not diagonal, and
the sum stays."""


def agreement(case: OneImage) -> str:
    """Step 10."""
    dz, dW, wrong = case.factors.dC_dz, case.factors.dC_dW, case.cross_entropy.wrong
    table = [(c.name, gap(c.dC_dz - dz), gap(c.dC_dW - dW)) for c in case.checks]
    mistake = gap(wrong - dz), gap(wrong[:, None] * case.x - dW)
    table.append(("the element-wise product of step 5", *mistake))
    rows = "\n".join(f"    {name:<38}{z:>12}{W:>12}" for name, z, W in table)
    return f"""\
{title("10. Three other routes to steps 3 and 8")}

Central differences ask nothing of calculus: move one entry by ε up and down,
and (C₊ − C₋) / 2ε is its gradient, nearly. F.cross_entropy takes the scores z;
softmax is inside it. The largest difference of an entry, in float64:

    {"":<38}{"∂C/∂z":>12}{"∂C/∂W":>12}
{rows}"""


def without_the_matrix(case: OneImage) -> str:
    """Step 11."""
    a, v = case.factors.a, case.factors.dC_da
    line = custom_ops.contract(a, v)
    return f"""\
{title("11. The same product, and no matrix")}

J = diag(a) − a aᵀ, a diagonal matrix less an outer product. So v @ J is

    ∂C/∂z_s = Σ_k v_k a_k (δ_ks − a_s) = a_s v_s − a_s Σ_k v_k a_k
    ∂C/∂z   = a ⊙ (v − ⟨a, v⟩)

    ⟨a, v⟩ = Σ_k a_k v_k    one number, the dot product; here {a @ v:.3f}
    ⊙                       element by element, (10,) and (10,) to (10,)

This ⊙ is right: the sum over k has not gone, it is ⟨a, v⟩, which all classes
share. The work grows with the number of classes, not with its square. In code:

    dz = a * (v - (a * v).sum())

It is custom_ops.contract(a, v), softmax's backward in this package. It differs
from v @ J by {gap(line - case.factors.dC_dz)}."""


def outer(case: OneImage) -> Tensor:
    """Return ∂C/∂z_i · x_j."""
    return case.factors.dC_dz[:, None] * case.x


def error(e: Comparison) -> str:
    """Say how wrong the element-wise product is."""
    return f"The error is {e.relative_error:.0%} as long as the right gradient."


def column(e: Comparison, s: int) -> str:
    """Write entry s of v @ J out as the sum it is."""
    terms: Terms = list(zip(e.v.tolist(), e.J[:, s].tolist(), strict=True))
    return products(f"∂C/∂z_{s}", terms, float(e.right[s]))

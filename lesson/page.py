"""The lesson as text, 80 columns wide: a function a step, in the order of the chain rule."""

from __future__ import annotations

import textwrap

from torch import Tensor

import custom_ops
from lesson.layout import WIDTH, beside, gap, header, image, matrix, row, title, wrap
from lesson.numbers import STEPS, TRAINED, Comparison, Lesson

VOCABULARY, FEATURES = 32_000, 4_096  # the last layer of a language model


def page(x: Lesson) -> str:
    """Return the whole lesson."""
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
    return "\n\n\n".join(step(x) for step in steps)


def the_case(x: Lesson) -> str:
    """The image, the layer, and the forward pass."""
    return f"""\
HOW A VECTOR MEETS A MATRIX: a backward pass through softmax, with its numbers
{"━" * WIDTH}

Softmax's derivative is a Jacobian, a matrix. The cost's gradient is a vector.
How are they multiplied? Row vector times matrix; never element by element.

{beside(image(x.h), forward(x))}

{training(x)}

{header("s")}
{row("z", x.g.z)}
{row("a", x.g.a)}
{row("y", x.y)}"""


def forward(x: Lesson) -> list[str]:
    """Return the forward pass in eight lines, as high as the image."""
    return [
        f"image {x.position} of scikit-learn's digits, a {x.label}",
        "",
        "h                 (64,)   its 8 × 8 pixels, from 0 to 1",
        "z = W h + b       (10,)   scores; W is (10, 64), b is (10,)",
        "a = softmax(z)    (10,)   a_k = exp(z_k) / Σ_s exp(z_s)",
        "y                 (10,)   1 for the true class, else 0",
        "C = −Σ_k y_k log a_k      the cost, cross-entropy:",
        f"  = −log a_{x.label} = −log {x.g.a[x.label]:.3f} = {x.cost:.3f}",
    ]


def training(x: Lesson) -> str:
    """Say how the weights came to be, and what the layer makes of the image."""
    guess = int(x.g.a.argmax())
    seen = "was held out" if x.position >= TRAINED else "is one of those it learned from"
    read = "is read rightly" if guess == x.label else f"is taken for a {guess}"
    return wrap(
        f"The weights: from zero, {STEPS} steps of gradient descent on the first {TRAINED} "
        "images, by the very gradient derived below. The layer misreads "
        f"{x.misread} of the {x.held_out} it has not seen. This image {seen}, and {read}."
    )


def cost_gradient(x: Lesson) -> str:
    """Step 1."""
    t = x.label
    return f"""\
{title("1. ∂C/∂a   (10,)   a vector")}

    ∂C/∂a_k = −y_k / a_k

{header("k")}
{row("∂C/∂a", x.g.dC_da)}

Only the true class enters the cost: −1 / a_{t} = −1 / {x.g.a[t]:.3f} = {x.g.dC_da[t]:.3f}.
(A dot stands for an exact zero.)"""


def jacobian(x: Lesson) -> str:
    """Step 2."""
    return f"""\
{title("2. J = ∂a/∂z   (10, 10)   a matrix")}

    J_ks = ∂a_k/∂z_s = a_k (δ_ks − a_s)        δ_ks is 1 if k = s, else 0

{header("s")}
{matrix(x.g.J)}

Column s: what happens to all ten probabilities when score s rises. Its own
grows, a_s (1 − a_s) on the diagonal; every other one shrinks, −a_k a_s, because
all share one sum. So each column adds up to 0 (here to {gap(x.g.J.sum(0))})."""


def contraction(x: Lesson) -> str:
    """Step 3."""
    s = rival(x)
    return f"""\
{title("3. ∂C/∂z   (10,)   vector times matrix")}

    ∂C/∂z_s = Σ_k ∂C/∂a_k · J_ks        (10,) = (10,) × (10, 10)        v @ J

Score s reaches the cost through all ten probabilities, so ten products are
added: the vector runs down column s. Column {s}, the likeliest wrong class:

{products(x.cross_entropy, s)}

All ten columns, and below them what the sum collapses to:

{header("s")}
{row("∂C/∂z", x.g.dC_dz)}
{row("a − y", x.g.a - x.y)}

Because y has a single 1, at t = {x.label}, one term of each sum is left:
−1/a_t · a_t (δ_ts − a_s) = a_s − y_s. The largest difference is {gap(x.g.dC_dz - x.g.a + x.y)}."""


def broadcast_mistake(x: Lesson) -> str:
    """Step 4."""
    table = x.cross_entropy.v * x.cross_entropy.J
    zero, symmetric = gap(table.sum(0)), gap(table.sum(1) - x.g.dC_dz)
    return f"""\
{title("4. The mistake that changes the shape:  v * J,  with v = ∂C/∂a")}

PyTorch multiplies (10,) and (10, 10) element by element without a word, by
broadcasting: (v * J)_ks = v_s J_ks. That is {table.numel()} numbers where the gradient has
{len(x.y)}, and there are two ways to sum them:

    over k   Σ_k v_s J_ks = v_s Σ_k J_ks   largest entry             {zero:>7}
    over s   Σ_s v_s J_ks = (J v)_k        largest error of an entry {symmetric:>7}

The first is 0 for every score, as every column of J adds up to 0: nothing is
learned. The second is right, but only because softmax's J is symmetric."""


def diagonal_mistake(x: Lesson) -> str:
    """Step 5."""
    e = x.cross_entropy
    lost = int(((e.wrong == 0) & (e.right != 0)).sum())
    return f"""\
{title("5. The mistake that keeps the shape:  v * diag(J)")}

The sigmoid's rule, ∂C/∂z_s = ∂C/∂a_s · a_s (1 − a_s), used on softmax:

{header("s")}
{row("right", e.right)}
{row("wrong", e.wrong)}

{lost} of {len(e.wrong)} entries are lost. {error(e)}
It pushes score {x.label} up and forgets to push the others down. That is downhill
still, so it goes unnoticed: trained by it, the same layer in the same {STEPS}
steps misreads {x.misread_diagonal} of the {x.held_out} unseen images, not {x.misread}."""


def squared_error(x: Lesson) -> str:
    """Step 6."""
    e, s = x.squared_error, rival(x)
    marks = "".join(f"{'≠' if o else '':>7}" for o in e.opposite)
    sign = f"\n{'sign':>9}{marks.rstrip()}" if marks.strip() else ""
    return f"""\
{title("6. Another cost, the same rule:  C = ½ Σ_k (a_k − y_k)²")}

Now ∂C/∂a_k = a_k − y_k has no zeros, and ten terms of the sum count:

{header("k")}
{row("∂C/∂a", e.v)}

{products(e, s)}

{header("s")}
{row("right", e.right)}
{row("wrong", e.wrong)}{sign}

Wrong is v * diag(J) again: {e.opposite.sum()} of {len(e.wrong)} entries have the opposite sign.
{error(e)}"""


def third_order(x: Lesson) -> str:
    """Step 7."""
    t, other, shown = x.label, (x.label + 1) % 10, range(18, 28)
    pixels = slice(shown.start, shown.stop)
    return f"""\
{title("7. ∂z/∂W   (10, 10, 64)   three indices: it is never built")}

    ∂z_s/∂W_ij = δ_si h_j        score s sees row s of W, and no other row

Its slice s = {t} is a (10, 64) matrix: the image in row i = {t}, zeros in the nine
others. Ten of the columns:

{header("j", shown)}
{row(f"i = {t}", x.g.dz_dW[t, t, pixels])}
{row(f"i = {other}", x.g.dz_dW[t, other, pixels])}

{size_of_third_order(x)}"""


def size_of_third_order(x: Lesson) -> str:
    """Count the zeros, and the bytes of a real one."""
    entries, zeros = x.g.dz_dW.numel(), int((x.g.dz_dW == 0).sum())
    gigabytes = 4 * VOCABULARY**2 / 1e9
    return wrap(
        f"{zeros} of its {entries} entries are 0 ({zeros / entries:.0%}), and the rest is h, "
        f"ten times. In the last layer of a language model, {VOCABULARY:,} words and "
        f"{FEATURES:,} features, it would take {FEATURES * gigabytes:,.0f} GB for one word "
        f"(float32), and J alone {gigabytes:.1f} GB."
    )


def outer_product(x: Lesson) -> str:
    """Step 8."""
    i, j = rival(x), int(x.h.argmax())
    factors = f"{x.g.dC_dz[i]:.3f} · {x.h[j]:.3f} = {x.g.dC_dW[i, j]:.3f}"
    return f"""\
{title("8. ∂C/∂W   (10, 64)   an outer product")}

    ∂C/∂W_ij = Σ_k Σ_s ∂C/∂a_k · J_ks · ∂z_s/∂W_ij
             = Σ_s ∂C/∂z_s · δ_si h_j                by step 3
             = ∂C/∂z_i · h_j                         δ_si leaves one term

One entry of {x.g.dC_dW.numel()}: ∂C/∂W_{i},{j} = ∂C/∂z_{i} · h_{j} = {factors}
Largest difference between the double sum and the outer product: {gap(x.g.dC_dW - outer(x))}.

To the bias and to the layer below, by the same rule:

    ∂C/∂b   = ∂C/∂z                   (10,)
    ∂C/∂h_j = Σ_s ∂C/∂z_s W_sj        (64,) = (10,) × (10, 64)"""


def sigmoid(x: Lesson) -> str:
    """Step 9."""
    e = x.sigmoid
    return f"""\
{title("9. When the element-wise product is right:  sigmoid")}

a_k = σ(z_k) depends on its own score only, so J_ks = 0 for k ≠ s. The same
scores, and the squared error of step 6:

{header("k")}
{row("∂C/∂a", e.v)}

{header("s")}
{matrix(e.J)}

{row("v @ J", e.right)}
{row("v*diag(J)", e.wrong)}

Nine terms of each sum are 0, one is left; the largest difference is {gap(e.right - e.wrong)}.
This is where you saw it element-wise. The rule was Σ_k ∂C/∂a_k · J_ks there
too, with a diagonal J. Softmax's J is not diagonal, and the sum stays."""


def agreement(x: Lesson) -> str:
    """Step 10."""
    dz, dW, wrong = x.g.dC_dz, x.g.dC_dW, x.cross_entropy.wrong
    table = [(c.name, gap(c.dC_dz - dz), gap(c.dC_dW - dW)) for c in x.checks]
    mistake = gap(wrong - dz), gap(wrong[:, None] * x.h - dW)
    table.append(("the element-wise product of step 5", *mistake))
    rows = "\n".join(f"    {name:<38}{z:>12}{W:>12}" for name, z, W in table)
    return f"""\
{title("10. Who agrees with steps 3 and 8")}

The largest difference of an entry, in float64:

    {"":<38}{"∂C/∂z":>12}{"∂C/∂W":>12}
{rows}"""


def without_the_matrix(x: Lesson) -> str:
    """Step 11."""
    a, v = x.g.a, x.g.dC_da
    line = custom_ops.contract(a, v)
    return f"""\
{title("11. The same product, and no matrix")}

J = diag(a) − a aᵀ, and so

    ∂C/∂z = a ⊙ (v − ⟨a, v⟩)        ⟨a, v⟩ = Σ_k a_k v_k

This ⊙ is element-wise, and right: the sum over k has not gone, it is ⟨a, v⟩, a
number that all classes share, here {a @ v:.3f}. The work grows with the number of
classes, not with its square. This line is custom_ops.contract(a, v); it differs
from v @ J by {gap(line - x.g.dC_dz)}. softmax's backward in this package is that line."""


def rival(x: Lesson) -> int:
    """Return the likeliest class but for the true one."""
    return int((x.g.a - 2 * x.y).argmax())


def outer(x: Lesson) -> Tensor:
    """Return ∂C/∂z_i · h_j."""
    return x.g.dC_dz[:, None] * x.h


def error(e: Comparison) -> str:
    """Say how wrong the element-wise product is, as length and as direction."""
    return f"The error is {e.relative_error:.0%} of the gradient's length, {e.angle:.0f}° off."


def products(e: Comparison, s: int) -> str:
    """Write entry s of v @ J out as the sum it is."""

    def factor(v: float) -> str:
        return "0" if v == 0 else f"{v:.3f}" if v > 0 else f"({v:.3f})"

    terms = (
        f"{factor(v)}·{factor(j)}" for v, j in zip(e.v.tolist(), e.J[:, s].tolist(), strict=True)
    )
    start = f"    ∂C/∂z_{s} = "
    summed = textwrap.wrap(" + ".join(terms), WIDTH - len(start))
    return start + ("\n" + " " * len(start)).join(summed) + f"\n            = {e.right[s]:.3f}"

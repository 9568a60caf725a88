"""Part two of the lesson: each number, each claim and the printed code, beside torch's autograd."""

import ast
import re

import computed
import pytest
import torch
import torch.nn.functional as F
from computed import close
from reading import matrix, row, section

import custom_ops
from custom_ops.jacobian import softmax
from lesson.network import HIDDEN, N, scores
from lesson.part_two import ROWS, VOCABULARY, bound


@pytest.fixture
def case():
    return computed.case()


@pytest.fixture
def numbers():
    return computed.numbers()


@pytest.fixture
def text():
    return computed.text()


def torchs(cost, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(cost(*leaves), leaves)


# The batch


def test_printed_batch_is_softmax_row_by_row(text, numbers, case):
    A = matrix(text, "12. The batch", "A  n = {}", N)
    want = F.softmax(case.layer(numbers.batch.X), 1)
    torch.testing.assert_close(A, want, atol=5.1e-4, rtol=0)
    assert torch.equal(numbers.batch.X[0], case.x)


def test_printed_gradient_of_the_scores_is_torchs(text, numbers, case):
    Z, Y = case.layer(numbers.batch.X), numbers.batch.Y
    (want,) = torchs(lambda Z: F.cross_entropy(Z, Y), Z)
    printed = matrix(text, "13. dZ", "dZ  n = {}", N)
    torch.testing.assert_close(printed, want, atol=5.1e-4, rtol=0)


def test_gradients_of_the_batch_are_torchs(numbers, case):
    b, (W, bias) = numbers.batch, case.layer
    want = torchs(lambda X, W, c: F.cross_entropy(X @ W.T + c, b.Y), b.X, W, bias)
    for got, expected in zip((b.dX, b.dW, b.db), want, strict=True):
        close(got, expected)


def test_every_row_has_a_jacobian_of_its_own(numbers, case):
    Z = case.layer(numbers.batch.X)
    J = torch.autograd.functional.jacobian(lambda Z: Z.softmax(1), Z)
    for n in range(N):
        torch.testing.assert_close(J[n, :, n], numbers.batch.each.J[n])
        J[n, :, n] = 0
    assert not J.any()


def test_without_the_mean_there_is_no_factor(numbers, case):
    b = numbers.batch
    (want,) = torchs(lambda Z: F.cross_entropy(Z, b.Y, reduction="sum"), case.layer(b.X))
    close(b.A - b.Y, want)


def test_weights_gradient_is_a_sum_of_outer_products(numbers):
    b = numbers.batch
    outer = [torch.outer(dz, x) for dz, x in zip(b.dZ, b.X, strict=True)]
    close(torch.stack(outer).sum(0), b.dW)


# The network


def test_gradients_of_the_network_are_torchs(numbers):
    b, net = numbers.batch, numbers.network
    want = torchs(lambda *w: F.cross_entropy(scores(b.X, *w), b.Y), *net.weights)
    for got, expected in zip(net.gradients, want, strict=True):
        close(got, expected)


def test_hidden_gradient_is_element_wise_because_the_sigmoids_jacobian_is_diagonal(numbers):
    b, net = numbers.batch, numbers.network
    W1, b1, W2, b2 = net.weights

    def below(Z1):
        return F.cross_entropy(torch.sigmoid(Z1) @ W2.T + b2, b.Y)

    Z1 = b.X @ W1.T + b1
    (want,) = torchs(below, Z1)
    close(net.dZ1, want)
    J = torch.autograd.functional.jacobian(torch.sigmoid, Z1[0])
    assert torch.equal(J, J.diagonal().diag())


def test_relus_slope_is_one_or_zero():
    z = torch.tensor([-2.0, -0.1, 0.1, 3.0])
    (slope,) = torchs(lambda z: z.relu().sum(), z)
    assert torch.equal(slope, (z > 0).float())


def test_printed_code_runs_and_gives_torchs_gradients(text, numbers):
    source = re.search(r"^def gradients.*?^    return .*?$", text, re.M | re.S)[0]
    space = {"softmax": softmax, "Tensor": torch.Tensor, "Tensors": tuple}
    exec(source, space)
    b, net = numbers.batch, numbers.network
    got = space["gradients"](b.X, b.Y, net.weights)
    for mine, theirs in zip(got, net.torchs, strict=True):
        close(mine, theirs)


def test_printed_code_is_about_ten_lines_and_says_every_shape(text, numbers):
    source = re.search(r"^def gradients.*?^    return .*?$", text, re.M | re.S)[0]
    lines = source.splitlines()[3:-1]  # but for the name, the docstring, the weights and the return
    assert len(lines) == 11
    b, net = numbers.batch, numbers.network
    space = {"softmax": softmax, "X": b.X, "Y": b.Y}
    space.update(zip(("W1", "b1", "W2", "b2"), net.weights, strict=True))
    sizes = {"N": N, "D": 64, "H": HIDDEN, "K": 10}
    for line in lines:
        exec(line.strip(), space)
        name, shape = re.match(r" *(\w+) = .*?# +(\([A-Z, ]+\))", line).groups()
        assert space[name].shape == eval(shape, sizes), line
    assert ast.parse(source)


def test_network_trained_by_the_printed_code_reads_better_than_one_layer(numbers, case):
    assert numbers.network.misread < case.misread


# Any target, and what is kept


@pytest.mark.parametrize("which", ["soft", "heavy"])
def test_any_target_gives_m_a_minus_y(numbers, case, which):
    target = getattr(numbers, which)
    (want,) = torchs(lambda z: -(target.y * z.log_softmax(0)).sum(), case.factors.z)
    close(target.dC_dz, want)
    close(target.mass * case.factors.a - target.y, want)


def test_soft_target_adds_up_to_one_and_the_other_does_not(text, numbers):
    assert numbers.soft.mass == pytest.approx(1)
    assert (numbers.soft.y > 0).all()
    assert numbers.heavy.mass == pytest.approx(2.5)
    below = section(text, "17. Any y")
    torch.testing.assert_close(row(below, "v @ J", 1), row(below, "m a − y", 1), atol=1e-9, rtol=0)


def test_two_numbers_give_the_probabilities_and_the_cost_back(numbers, case):
    k, z = numbers.kept, case.factors.z
    close(k.a, z.softmax(0))
    assert k.L + (k.M - float(z[case.label])) == pytest.approx(case.cost)


def test_two_numbers_keep_digits_that_their_sum_loses(numbers):
    assert 100 * numbers.kept.offset_error < numbers.kept.offset_error_of_sum


def test_cross_entropy_keeps_the_scores_and_two_numbers_a_row():
    sizes = []
    Z, target = (
        torch.randn(7, 10, requires_grad=True),
        torch.randint(10, (7,)).int(),
    )  # by the Python road
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
    ):
        custom_ops.cross_entropy(Z, target.int())  # by the Python road, which hooks see
    assert sorted(sizes) == [1, 7, 7, 7, 70]  # 1: what the mean divides by


def test_printed_sizes_are_those_of_a_language_model(text):
    below = " ".join(section(text, "18. What").split())
    assert f"keeping a takes {ROWS * VOCABULARY * 4 / 1e6:,.0f} MB in float32" in below


def test_bound_is_the_power_of_ten_above():
    assert [bound(v) for v in (2e-8, 9.9e-5, 0.5)] == ["1e-7", "1e-4", "1e-0"]

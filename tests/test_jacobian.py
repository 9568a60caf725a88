"""The lesson's formulas against torch's autograd, and the properties of J."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from custom_ops import jacobian

pytestmark = pytest.mark.usefixtures("backend")

D = torch.double


def layer(*batch):
    x, y = torch.randn(*batch, 3, dtype=D), torch.rand(*batch, 4, dtype=D)
    return x, torch.randn(4, 3, dtype=D), torch.randn(4, dtype=D), y


def cost(x, W, b, y):
    return -(y * torch.log_softmax(x @ W.T + b, -1)).sum()


@pytest.mark.parametrize("batch", [(), (2,), (2, 5)])
def test_softmax_jacobian_is_the_derivative_of_softmax(batch):
    z = torch.randn(*batch, 4, dtype=D)
    rows = z.reshape(-1, 4)
    J = torch.func.vmap(torch.func.jacrev(lambda z: torch.softmax(z, -1)))(rows)
    torch.testing.assert_close(jacobian.softmax_jacobian(z), J.reshape(*batch, 4, 4))


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8))
@settings(deadline=None)
def test_jacobian_is_symmetric_and_its_rows_sum_to_zero(z):
    J = jacobian.softmax_jacobian(torch.tensor(z, dtype=D))
    torch.testing.assert_close(J, J.T, rtol=0, atol=0)
    torch.testing.assert_close(J.sum(-1), torch.zeros(len(z), dtype=D), rtol=0, atol=1e-15)


@pytest.mark.parametrize("batch", [(), (2,), (2, 5)])
def test_last_layer_gradient_is_that_of_autograd(batch):
    x, W, b, y = layer(*batch)
    g = jacobian.last_layer_gradient(x, W, b, y)
    want = torch.func.grad(cost, argnums=(0, 1, 2))(x, W, b, y)
    rows = list(range(len(batch)))
    torch.testing.assert_close(g.dC_dx, want[0])
    torch.testing.assert_close(g.dC_dW.sum(rows) if rows else g.dC_dW, want[1])
    torch.testing.assert_close(g.dC_db.sum(rows) if rows else g.dC_db, want[2])


def test_every_factor_has_the_shape_that_the_lesson_says():
    g = jacobian.last_layer_gradient(*layer())
    shapes = {name: tuple(getattr(g, name).shape) for name in g._fields}
    assert shapes == {
        "z": (4,),
        "a": (4,),
        "dC_da": (4,),
        "J": (4, 4),
        "dC_dz": (4,),
        "dz_dW": (4, 4, 3),
        "dC_dW": (4, 3),
        "dC_dx": (3,),
        "dC_db": (4,),
    }


def test_last_layer_gradient_is_an_outer_product():
    x, W, b, y = layer()
    g = jacobian.last_layer_gradient(x, W, b, y)
    torch.testing.assert_close(g.dC_dW, torch.outer(g.dC_dz, x))
    torch.testing.assert_close(g.dC_dz, y.sum() * g.a - y)


def test_an_element_wise_product_is_another_thing():
    g = jacobian.last_layer_gradient(*layer())
    assert not torch.allclose(g.dC_da * g.J.diagonal(), g.dC_dz, rtol=0.1)


@pytest.mark.parametrize("batch", [(), (2,), (2, 5)])
def test_last_layer_hvp_is_forward_over_reverse_of_autograd(batch):
    x, W, b, y = layer(*batch)
    V_x, V_W, v_b = torch.randn_like(x), torch.randn_like(W), torch.randn_like(b)
    got = jacobian.last_layer_hvp(x, W, b, y, V_x, V_W, v_b)
    gradient = torch.func.grad(cost, argnums=(0, 1, 2))
    _, want = torch.func.jvp(lambda x, W, b: gradient(x, W, b, y), (x, W, b), (V_x, V_W, v_b))
    rows = list(range(len(batch)))
    torch.testing.assert_close(got.x, want[0])
    torch.testing.assert_close(got.W.sum(rows) if rows else got.W, want[1])
    torch.testing.assert_close(got.b.sum(rows) if rows else got.b, want[2])


def test_literal_softmax_passes_gradcheck_and_gradgradcheck():
    z = torch.randn(2, 3, dtype=D, requires_grad=True)
    assert gradcheck(jacobian.JacobianSoftmax.apply, z)
    assert gradgradcheck(jacobian.JacobianSoftmax.apply, z)


def test_literal_cross_entropy_is_the_builtin_in_value_and_gradient():
    z = torch.randn(5, 4, dtype=D, requires_grad=True)
    t = torch.randint(4, (5,))
    got, want = jacobian.cross_entropy(z, t), torch.nn.functional.cross_entropy(z, t)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(c, z)[0] for c in (got, want)))


def test_literal_cross_entropy_stays_finite_where_the_probability_underflows():
    z = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss = jacobian.cross_entropy(z, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert (gradient == 0).all()

"""scripts/explain.py: what it prints is computed, right, and fits a terminal."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
image = pytest.importorskip("matplotlib.image")

SCRIPT = Path(__file__).parents[2] / "scripts" / "explain.py"
ROUNDING = 2e-3  # the page has three decimals, and a product of rounded factors a little more


def run(*arguments, **environment):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env={**os.environ, **environment}
    )


@pytest.fixture(scope="module", params=[None, 5], ids=["default", "index-5"])
def printed(request, tmp_path_factory):
    """The page and the picture of one run, into a pipe that claims to be ASCII."""
    png = tmp_path_factory.mktemp("explain") / "a folder" / "lesson.png"
    index = [] if request.param is None else ["--index", request.param]
    done = run("--out", png, *index, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, png


@pytest.fixture(scope="module")
def numbers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("lesson.numbers")


@pytest.fixture(scope="module")
def lesson(numbers):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield numbers.lesson()
    torch.set_num_threads(threads)


def row(page, name, occurrence=0):
    """Ten numbers of the page's line that begins with `name`; a dot is a zero."""
    lines = [line for line in page.splitlines() if line.strip().startswith(name + " ")]
    values = lines[occurrence].strip().removeprefix(name).split()
    return torch.tensor([float(v.replace("·", "0")) for v in values], dtype=torch.float64)


def matrix(page, title):
    section = page[page.index(title) :]
    return torch.stack([row(section, f"k = {k}") for k in range(10)])


# The page


def test_the_factors_come_in_the_order_of_the_chain_rule(printed):
    page, _ = printed
    titles = (
        "1. ∂C/∂a   (10,)",
        "2. J = ∂a/∂z   (10, 10)",
        "3. ∂C/∂z   (10,)",
        "4. The mistake that changes the shape",
        "5. The mistake that keeps the shape",
        "6. Another cost",
        "7. ∂z/∂W   (10, 10, 64)",
        "8. ∂C/∂W   (10, 64)",
        "9. When the element-wise product is right",
        "10. Who agrees",
        "11. The same product, and no matrix",
    )
    places = [page.index(f"\n{title}") for title in titles]
    assert places == sorted(places)


def test_no_line_is_wider_than_a_terminal(printed):
    page, png = printed
    assert max(len(line) for line in page.replace(str(png), "").splitlines()) <= 80


def test_printed_gradient_is_torchs_for_the_printed_scores(printed):
    page, _ = printed
    z, y = row(page, "z").requires_grad_(), row(page, "y")
    cost = F.cross_entropy(z[None], y[None])
    torch.testing.assert_close(
        row(page, "∂C/∂z"), torch.autograd.grad(cost, z)[0], atol=1e-3, rtol=0
    )
    shown = re.search(r"= −log a_\d = −log [\d.]+ = ([\d.]+)", page)
    assert float(shown[1]) == pytest.approx(cost.item(), abs=ROUNDING)


def test_printed_mistake_is_the_product_with_the_printed_diagonal(printed):
    page, _ = printed
    mistake = row(page, "∂C/∂a") * matrix(page, "2. J").diagonal()
    scale = float(row(page, "∂C/∂a").abs().max())
    torch.testing.assert_close(row(page, "wrong"), mistake, atol=scale * ROUNDING, rtol=0)


def test_printed_jacobian_is_torchs_for_the_printed_scores(printed):
    page, _ = printed
    J = torch.autograd.functional.jacobian(lambda z: z.softmax(-1), row(page, "z"))
    torch.testing.assert_close(matrix(page, "2. J"), J, atol=1e-3, rtol=0)


def test_printed_vector_times_printed_matrix_is_the_printed_product(printed):
    page, _ = printed
    scale = float(row(page, "∂C/∂a").abs().max())
    product = row(page, "∂C/∂a") @ matrix(page, "2. J")
    torch.testing.assert_close(product, row(page, "∂C/∂z"), atol=scale * ROUNDING, rtol=0)


def test_printed_sigmoid_is_the_diagonal_case(printed):
    page, _ = printed
    J = matrix(page, "9. When")
    assert torch.equal(J, torch.diag(J.diagonal()))
    assert torch.equal(row(page, "v @ J"), row(page, "v*diag(J)"))
    torch.testing.assert_close(
        row(page, "∂C/∂a", -1) @ J, row(page, "v @ J"), atol=ROUNDING, rtol=0
    )


def test_picture_is_a_png_of_legible_size(printed):
    _, png = printed
    pixels = image.imread(png)
    height, width = pixels.shape[:2]
    assert (width, height) > (1500, 600)
    assert width < 3000
    assert pixels[..., :3].std() > 0.05, "blank"
    assert png.stat().st_size < 300_000


# The numbers


def test_every_factor_is_torchs(lesson):
    jacobian = torch.autograd.functional.jacobian
    h, (W, b), g = lesson.h, lesson.layer, lesson.g
    t = lesson.y.argmax()

    def cost(h, W, b):
        return F.cross_entropy((h @ W.T + b)[None], t[None])

    expected = {
        "J": jacobian(lambda z: z.softmax(-1), g.z),
        "dC_da": jacobian(lambda a: -(lesson.y * a.log()).sum(), g.a),
        "dC_dz": jacobian(lambda z: F.cross_entropy(z[None], t[None]), g.z),
        "dz_dW": jacobian(lambda W: W @ h + b, W),
        **dict(zip(("dC_dx", "dC_dW", "dC_db"), jacobian(cost, (h, W, b)), strict=True)),
    }
    assert g.z.dtype == torch.float64
    for name, value in expected.items():
        torch.testing.assert_close(getattr(g, name), value, atol=1e-13, rtol=1e-13, msg=name)


def test_finite_differences_and_autograd_agree(lesson):
    tolerances = (1e-8, 1e-13, 1e-13)
    for check, tolerance in zip(lesson.checks, tolerances, strict=True):
        torch.testing.assert_close(check.dC_dz, lesson.g.dC_dz, atol=tolerance, rtol=0)
        torch.testing.assert_close(check.dC_dW, lesson.g.dC_dW, atol=tolerance, rtol=0)


def test_elementwise_product_is_right_for_the_sigmoid_only(lesson):
    assert torch.equal(lesson.sigmoid.wrong, lesson.sigmoid.right)
    assert not lesson.sigmoid.opposite.any()
    for softmax in (lesson.cross_entropy, lesson.squared_error):
        assert softmax.relative_error > 0.1


def test_squared_errors_gradients_are_torchs(lesson):
    for name, activation in (
        ("squared_error", lambda z: z.softmax(-1)),
        ("sigmoid", torch.sigmoid),
    ):
        gradient = torch.autograd.functional.jacobian(
            lambda z, f=activation: 0.5 * (f(z) - lesson.y).square().sum(), lesson.g.z
        )
        torch.testing.assert_close(getattr(lesson, name).right, gradient)


def test_size_of_an_error_is_measured(numbers):
    a, v, J = torch.tensor([3.0, 4.0]), torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 1], [1, 1]])
    e = numbers.compare(a, v, J)
    assert e.right.tolist() == [-1, 0]
    assert e.wrong.tolist() == [0, -1]
    assert e.relative_error == pytest.approx(2**0.5)
    assert e.angle == pytest.approx(90)
    assert not e.opposite.any()


def test_default_image_is_the_unsurest_of_the_held_out_mistakes(numbers, lesson):
    h, label, _ = numbers.digits()
    a = lesson.layer(h).softmax(-1)
    entropy = torch.distributions.Categorical(a).entropy()
    entropy[a.argmax(-1) == label] = 0
    entropy[: numbers.TRAINED] = 0
    assert lesson.position == entropy.argmax()
    assert lesson.misread == entropy.count_nonzero()
    assert lesson.misread < lesson.misread_diagonal


# What can go wrong


def test_index_out_of_range_is_one_line_that_names_the_range(tmp_path):
    done = run("--index", 1797, "--out", tmp_path / "lesson.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "explain.py: error: --index must be from 0 to 1796, got 1797\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("index", ["-1", "100000"])
def test_index_is_checked_on_both_sides(numbers, monkeypatch, index):
    monkeypatch.setattr(sys, "argv", ["explain.py", f"--index={index}"])
    with pytest.raises(SystemExit, match=f"from 0 to 1796, got {index}$"):
        importlib.import_module("explain").main()


def test_a_file_that_is_no_picture_is_not_overwritten(numbers, monkeypatch, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["explain.py", f"--out={notes}"])
    with pytest.raises(SystemExit, match=r"must name a \.png file"):
        importlib.import_module("explain").main()
    assert notes.read_text() == "mine"

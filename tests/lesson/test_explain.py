"""scripts/explain.py, part one: what it prints is computed, right, and fits a terminal."""

import importlib
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import computed
import pytest
import torch
import torch.nn.functional as F
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from reading import equations, matrix, row, section

from lesson.digits import TRAINED, digits
from lesson.one_image import compare, one_image
from lesson.picture import draw

SCRIPT = Path(__file__).parents[2] / "scripts" / "explain.py"
ROUNDING = 2e-3  # the page has three decimals, and a product of rounded factors a little more


def run(*arguments, cwd=None, **environment):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, cwd=cwd)


@pytest.fixture(scope="module", params=[None, 5], ids=["default", "index-5"])
def printed(request, tmp_path_factory):
    """The page and the picture of one run, into a pipe that claims to be ASCII."""
    png = tmp_path_factory.mktemp("explain") / "a folder" / "lesson.png"
    index = [] if request.param is None else ["--index", request.param]
    done = run("--out", png, *index, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, png


@pytest.fixture
def case():
    return computed.case()


# The page


def test_the_factors_come_in_the_order_of_the_chain_rule(printed):
    page, _ = printed
    titles = (
        "1. v = ∂C/∂a   (10,)",
        "2. J = ∂a/∂z   (10, 10)",
        "3. ∂C/∂z   (10,)",
        "4. The mistake that changes the shape",
        "5. The mistake that keeps the shape",
        "6. Another cost",
        "7. ∂z/∂W   (10, 10, 64)",
        "8. ∂C/∂W   (10, 64)",
        "9. When the element-wise product is right",
        "10. Three other routes",
        "11. The same product, and no matrix",
        "12. The batch",
        "13. dZ = (A − Y) / N   (N, 10)",
        "14. dW = dZᵀ X   (10, 64)",
        "15. The layer below",
        "16. The code",
        "17. Any y",
        "18. What forward keeps",
    )
    places = [page.index(f"\n{title}") for title in titles]
    assert places == sorted(places)


def test_no_line_is_wider_than_a_terminal(printed):
    page, _ = printed
    lines = page[: page.index("The picture of it:")].splitlines()  # then paths, of any length
    assert max(map(len, lines)) <= 80


def test_printed_gradient_is_torchs_for_the_printed_scores(printed):
    page = section(printed[0], "PART ONE")
    z, y = row(page, "z").requires_grad_(), row(page, "y")
    cost = F.cross_entropy(z[None], y[None])
    torch.testing.assert_close(
        row(page, "∂C/∂z"), torch.autograd.grad(cost, z)[0], atol=1e-3, rtol=0
    )
    shown = re.search(r"= −log a_\d = −log [\d.]+ = ([\d.]+)", page)
    assert float(shown[1]) == pytest.approx(cost.item(), abs=ROUNDING)


def test_printed_mistake_is_the_product_with_the_printed_diagonal(printed):
    page, _ = printed
    mistake = row(page, "v") * matrix(page, "2. J").diagonal()
    scale = float(row(page, "v").abs().max())
    torch.testing.assert_close(row(page, "wrong"), mistake, atol=scale * ROUNDING, rtol=0)


def test_printed_jacobian_is_torchs_for_the_printed_scores(printed):
    page, _ = printed
    J = torch.autograd.functional.jacobian(lambda z: z.softmax(-1), row(page, "z"))
    torch.testing.assert_close(matrix(page, "2. J"), J, atol=1e-3, rtol=0)


def test_printed_vector_times_printed_matrix_is_the_printed_product(printed):
    page, _ = printed
    scale = float(row(page, "v").abs().max())
    product = row(page, "v") @ matrix(page, "2. J")
    torch.testing.assert_close(product, row(page, "∂C/∂z"), atol=scale * ROUNDING, rtol=0)


def test_printed_sigmoid_is_the_diagonal_case(printed):
    page, _ = printed
    J = matrix(page, "9. When")
    assert torch.equal(J, torch.diag(J.diagonal()))
    assert torch.equal(row(page, "v @ J"), row(page, "v*diag(J)"))
    torch.testing.assert_close(
        row(section(page, "9. When"), "v") @ J, row(page, "v @ J"), atol=ROUNDING, rtol=0
    )


def test_written_out_products_agree_with_their_printed_factors(printed):
    page, _ = printed
    found = list(equations(page))
    assert len(found) == 5
    for value, result in found:
        assert f"{value:.3f}" == result


def test_the_page_to_touch_and_the_exercises_are_named_at_the_end(printed):
    page, png = printed
    end = page[page.index("The picture of it:") :]
    assert str(png) in end
    page_to_touch, exercises = (Path(end.splitlines()[line]) for line in (4, 7))
    assert page_to_touch.name == "softmax.html"
    assert page_to_touch.exists()
    assert (exercises / "ex1_softmax.py").exists()
    assert end.endswith(" -m lesson.exercises.check 1\n")


def test_runs_from_any_folder_with_custom_ops_installed_alone(tmp_path):
    (tmp_path / "custom_ops").symlink_to(SCRIPT.parents[1] / "custom_ops")
    done = run("--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_picture_is_a_png_of_legible_size(printed):
    _, png = printed
    pixels = image.imread(png)
    height, width = pixels.shape[:2]
    assert (width, height) > (1500, 600)
    assert width < 3000
    assert pixels[..., :3].std() > 0.05, "blank"
    assert png.stat().st_size < 300_000


@pytest.mark.parametrize("index", [None, 5, 1000])
def test_no_text_of_the_picture_is_cut_or_lies_over_another(index):
    figure = draw(one_image(index))
    FigureCanvasAgg(figure).draw()
    axes_texts = [t for axes in figure.axes for t in (*axes.texts, axes.title)]
    texts = [t for t in (*figure.texts, *axes_texts) if t.get_text()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    for word, box in boxes:
        assert box.x0 > 0 < box.y0, word
        assert box.x1 < figure.bbox.x1, word
        assert box.y1 < figure.bbox.y1, word
    for (word, box), (other, its) in combinations(boxes, 2):
        assert not box.overlaps(its), (word, other)


# The numbers


def test_every_factor_is_torchs(case):
    jacobian = torch.autograd.functional.jacobian
    x, (W, b), f = case.x, case.layer, case.factors
    t = case.y.argmax()

    def cost(x, W, b):
        return F.cross_entropy((x @ W.T + b)[None], t[None])

    expected = {
        "J": jacobian(lambda z: z.softmax(-1), f.z),
        "dC_da": jacobian(lambda a: -(case.y * a.log()).sum(), f.a),
        "dC_dz": jacobian(lambda z: F.cross_entropy(z[None], t[None]), f.z),
        "dz_dW": jacobian(lambda W: W @ x + b, W),
        **dict(zip(("dC_dx", "dC_dW", "dC_db"), jacobian(cost, (x, W, b)), strict=True)),
    }
    assert f.z.dtype == torch.float64
    for name, value in expected.items():
        torch.testing.assert_close(getattr(f, name), value, atol=1e-13, rtol=1e-13, msg=name)


def test_finite_differences_and_autograd_agree(case):
    tolerances = (1e-8, 1e-13, 1e-13)
    for check, tolerance in zip(case.checks, tolerances, strict=True):
        torch.testing.assert_close(check.dC_dz, case.factors.dC_dz, atol=tolerance, rtol=0)
        torch.testing.assert_close(check.dC_dW, case.factors.dC_dW, atol=tolerance, rtol=0)


def test_elementwise_product_is_right_for_the_sigmoid_only(case):
    assert torch.equal(case.sigmoid.wrong, case.sigmoid.right)
    assert not case.sigmoid.opposite.any()
    for softmax in (case.cross_entropy, case.squared_error):
        assert softmax.relative_error > 0.1


def test_squared_errors_gradients_are_torchs(case):
    for name, activation in (
        ("squared_error", lambda z: z.softmax(-1)),
        ("sigmoid", torch.sigmoid),
    ):
        gradient = torch.autograd.functional.jacobian(
            lambda z, f=activation: 0.5 * (f(z) - case.y).square().sum(), case.factors.z
        )
        torch.testing.assert_close(getattr(case, name).right, gradient)


def test_the_diagonal_step_is_downhill_still(case):
    e = case.cross_entropy
    assert e.wrong @ e.right > 0
    assert (e.right < 0).nonzero().flatten().tolist() == [case.label]
    assert e.wrong[case.label] < 0


def test_size_of_an_error_is_measured():
    a, v, J = torch.tensor([3.0, 4.0]), torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 1], [1, 1]])
    e = compare(a, v, J)
    assert e.right.tolist() == [-1, 0]
    assert e.wrong.tolist() == [0, -1]
    assert e.relative_error == pytest.approx(2**0.5)
    assert not e.opposite.any()


def test_default_image_is_the_unsurest_of_the_held_out_mistakes(case):
    x, label, _ = digits()
    a = case.layer(x).softmax(-1)
    entropy = torch.distributions.Categorical(a).entropy()
    entropy[a.argmax(-1) == label] = 0
    entropy[:TRAINED] = 0
    assert case.position == entropy.argmax()
    assert case.misread == entropy.count_nonzero()
    assert case.misread < case.misread_diagonal


# What can go wrong


def test_index_out_of_range_is_one_line_that_names_the_range(tmp_path):
    done = run("--index", 1797, "--out", tmp_path / "lesson.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "explain.py: error: --index must be from 0 to 1796, got 1797\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("index", ["-1", "100000"])
def test_index_is_checked_on_both_sides(monkeypatch, index):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", ["explain.py", f"--index={index}"])
    with pytest.raises(SystemExit, match=f"from 0 to 1796, got {index}$"):
        importlib.import_module("explain").main()


def test_a_file_that_is_no_picture_is_not_overwritten(monkeypatch, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", ["explain.py", f"--out={notes}"])
    with pytest.raises(SystemExit, match=r"must name a \.png file"):
        importlib.import_module("explain").main()
    assert notes.read_text() == "mine"

"""docs/softmax.html: its numbers beside custom_ops.jacobian's, and what a hand does to it."""

import math
import re
from itertools import pairwise

import browser
import pytest
import torch
import torch.nn.functional as F

from custom_ops import jacobian
from lesson.training import diagonal_product

in_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium")
in_node = pytest.mark.skipif(browser.NODE is None, reason="no node")

MODES = ("softmax-cross-entropy", "softmax-squared-error", "sigmoid-squared-error")
STATES = (([0.5, 2, 0, 1.5, -1], 3, False), ([-4, 4, 0.1, -2.7, 3.9], 0, True))
KS = range(5)


def sigmoid_jacobian(z):
    a = torch.sigmoid(z)
    return torch.diag_embed(a * (1 - a))


def expected(mode, z, y, soft):
    """The same pass, by custom_ops.jacobian."""
    z = torch.tensor(z, dtype=torch.double)
    y = F.one_hot(torch.tensor(y), 5).double()
    y = 0.05 + 0.75 * y if soft else y
    softmax = mode.startswith("softmax")
    a = jacobian.softmax(z) if softmax else torch.sigmoid(z)
    J = jacobian.softmax_jacobian(z) if softmax else sigmoid_jacobian(z)
    entropy = mode.endswith("entropy")
    v = jacobian.cross_entropy_gradient(a, y) if entropy else a - y
    C = -(y * a.log()).sum() if entropy else 0.5 * (a - y).square().sum()
    right = jacobian.contract_with_jacobian(v, J)
    return {"a": a, "v": v, "J": J, "C": C, "right": right, "wrong": diagonal_product(v, J)}


def assert_same(got, want):
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.double), want, atol=1e-14, rtol=1e-13
    )


# The numbers


@in_chromium
@pytest.mark.parametrize("state", STATES, ids=["at-first", "soft"])
@pytest.mark.parametrize("mode", MODES)
def test_the_pages_numbers_are_the_literal_ones(mode, state):
    document = browser.opened(mode, *state)
    want = expected(mode, *state)
    for name in ("a", "v", "right", "wrong"):
        assert_same([browser.exact(document, f"{name}-{k}") for k in KS], want[name])
    J = [[browser.exact(document, f"J-{k}-{s}") for s in KS] for k in KS]
    assert_same(J, want["J"])
    assert_same(browser.exact(document, "cost"), want["C"])
    products = [browser.exact(document, f"product-{k}") for k in KS]
    assert_same(products, want["v"] * want["J"][:, 1])
    assert_same(browser.exact(document, "total"), want["right"][1])
    agrees = torch.allclose(want["right"], want["wrong"])
    assert ("Element-wise agrees" in browser.inside(document, "verdict")) == agrees
    assert agrees == mode.startswith("sigmoid")


@in_node
@pytest.mark.parametrize("state", STATES, ids=["at-first", "soft"])
@pytest.mark.parametrize("mode", MODES)
def test_the_pages_formulas_are_the_literal_ones(mode, state):
    z, y, soft = state
    target = [(0.8 if k == y else 0.05) if soft else int(k == y) for k in KS]
    got = browser.in_node(f'pass(MODES["{mode}"], {z}, {target})')
    for name, want in expected(mode, *state).items():
        assert_same(got[name], want)


@in_node
def test_the_vector_runs_down_the_columns_not_along_the_rows():
    assert browser.in_node("vectorTimesMatrix([1, 2], [[1, 2], [3, 4]])") == [7, 10]


@in_node
def test_scores_far_apart_do_not_overflow():
    assert browser.in_node("softmax([1000, 0, -1000])") == [1, 0, 0]


def points():
    """The page's 175 points: (175, 2), and their classes."""
    seed = 1

    def uniform():
        nonlocal seed
        seed = (seed * 1664525 + 1013904223) % 2**32
        return seed / 2**32

    X, label = [], []
    for t, (x0, x1, n) in enumerate(
        [(0.2, 0.2, 40), (0.8, 0.25, 25), (0.5, 0.5, 60), (0.2, 0.8, 20), (0.8, 0.8, 30)]
    ):
        for _ in range(n):
            r, angle = math.sqrt(-2 * math.log(1 - uniform())) / 10, 2 * math.pi * uniform()
            X.append([x0 + r * math.cos(angle), x1 + r * math.sin(angle)])
            label.append(t)
    return torch.tensor(X, dtype=torch.double), torch.tensor(label)


def misread_by_step(mode, product, steps=200, rate=1):
    X, label = points()
    Y = F.one_hot(label, 5).double()
    softmax, entropy = mode.startswith("softmax"), mode.endswith("entropy")
    W, b, misread = torch.zeros(5, 2).double(), torch.zeros(5).double(), []
    for _ in range(steps + 1):
        Z = X @ W.T + b
        A = jacobian.softmax(Z) if softmax else torch.sigmoid(Z)
        J = jacobian.softmax_jacobian(Z) if softmax else sigmoid_jacobian(Z)
        guess = (A.amax(1, keepdim=True) == A).int().argmax(1)
        misread.append(int((guess != label).sum()))
        dZ = product(jacobian.cross_entropy_gradient(A, Y) if entropy else A - Y, J) / len(X)
        W, b = W - rate * dZ.T @ X, b - rate * dZ.sum(0)
    return misread


@pytest.mark.parametrize("mode", MODES)
@in_node
def test_the_pages_training_runs_are_those_of_the_literal_gradients(mode):
    for name, product in (
        ("vectorTimesMatrix", jacobian.contract_with_jacobian),
        ("elementWise", diagonal_product),
    ):
        got = browser.in_node(f'train(MODES["{mode}"], {name})')
        assert got == misread_by_step(mode, product)


@in_chromium
def test_the_pages_curves_show_the_wrong_run_beside_the_right_one():
    words = browser.inside(browser.opened(MODES[0], *STATES[0]), "training-words")
    right, wrong = map(int, re.findall(r"misreads (\d+)", words))
    assert right < wrong / 4
    assert "the same run" in browser.inside(browser.opened(MODES[2], *STATES[0]), "training-words")


# What a hand does


@in_chromium
def test_everything_follows_a_slider_a_target_and_a_switch(tmp_path):
    document = browser.after(
        """
        const change = (element) => {
          element.dispatchEvent(new Event("input", {bubbles: true}));
          element.dispatchEvent(new Event("change", {bubbles: true}));
        };
        $("z-2").value = 3.2; change($("z-2"));
        for (const choice of ["y][value='4'", "mode][value='softmax-squared-error'"]) {
          const radio = document.querySelector(`[name=${choice}]`);
          radio.checked = true; change(radio);
        }
        $("soft").click();
        """,
        tmp_path,
    )
    want = expected(MODES[1], [0.5, 2, 3.2, 1.5, -1], 4, True)
    assert_same([browser.exact(document, f"right-{k}") for k in KS], want["right"])
    assert "v  = a - y" in browser.inside(document, "code")


@in_chromium
@pytest.mark.parametrize(
    ("how", "column"),
    [
        ('new PointerEvent("pointerover", {bubbles: true, pointerType: "mouse"})', 4),
        ('new MouseEvent("click", {bubbles: true})', 4),
        ('new PointerEvent("pointerover", {bubbles: true, pointerType: "touch"})', 1),
    ],
    ids=["hover", "tap", "touch-on-the-way"],
)
def test_pointing_at_a_score_sums_its_column(tmp_path, how, column):
    document = browser.after(f'$("J-0-4").dispatchEvent({how});', tmp_path)
    want = expected(MODES[0], *STATES[0])
    assert f"Column {column}:" in browser.inside(document, "h-sum")
    assert_same(browser.exact(document, "total"), want["right"][column])
    chosen = re.findall(r'<td class="number chosen" data-s="(\d)"', document)
    assert chosen == [str(column)] * 6


@in_chromium
def test_a_column_that_was_pointed_at_is_left_again(tmp_path):
    document = browser.after(
        """
        $("J-0-4").dispatchEvent(
          new PointerEvent("pointerover", {bubbles: true, pointerType: "mouse"}));
        $("stage").dispatchEvent(new PointerEvent("pointerleave"));
        """,
        tmp_path,
    )
    assert "Column 1:" in browser.inside(document, "h-sum")


@in_chromium
def test_a_bad_address_leaves_the_page_as_it_is(tmp_path):
    document = browser.dump(f"{browser.PAGE.as_uri()}#mode=none&z=1,x&y=7&s=")
    want = expected(MODES[0], *STATES[0])
    assert_same([browser.exact(document, f"right-{k}") for k in KS], want["right"])


@in_chromium
@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_nothing_is_cut_at_any_width(tmp_path, width):
    wide = browser.framed(
        width,
        """[...page.querySelectorAll("html, section, table, td, th, pre, p, h1, h2, label")]
           .filter((e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
           .map((e) => [e.tagName, e.id, e.textContent, e.scrollWidth, e.clientWidth])""",
        tmp_path,
    )
    scrolls = ["PRE"] if width == 320 else []  # the code moves under a finger there
    assert [tag for tag, *_ in wide] == scrolls, wide


# The file


def test_the_page_is_one_small_file_that_loads_nothing():
    source = browser.PAGE.read_text()
    assert len(source.encode()) < 100_000
    assert re.findall(r"\b(?:src|href)=\"([^\"]*)\"", source) == ["data:,"]
    assert not re.search(r"https?:|url\(|@import|fetch\(|import\(|XMLHttp|localStorage", source)


def test_every_control_is_one_that_a_keyboard_reaches():
    source = browser.PAGE.read_text()
    kinds = set(re.findall(r'<input type="(\w+)"', source))
    assert kinds == {"radio", "range", "checkbox"}
    assert source.count("aria-label=") == 3
    assert "tabindex" not in source
    assert "prefers-color-scheme: dark" in source


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme):
    source = browser.PAGE.read_text()
    colours = {
        name: re.findall(rf"--{name}: (#\w{{6}});", source)[scheme]
        for name in ("paper", "panel", "ink", "grey", "mark", "wrong")
    }
    for text in ("ink", "grey", "mark", "wrong"):
        for ground in ("paper", "panel"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for heat in ("above", "below"):
        rgb = re.findall(rf"--{heat}: (\d+), (\d+), (\d+);", source)[scheme]
        paper = [int(colours["paper"][i : i + 2], 16) for i in (1, 3, 5)]
        strongest = [round(0.6 * int(c) + 0.4 * p) for c, p in zip(rgb, paper, strict=True)]
        assert contrast("#%02x%02x%02x" % tuple(strongest), colours["ink"]) >= 4.5, heat  # noqa: UP031


def test_headings_descend_by_one():
    levels = [int(n) for n in re.findall(r"<h(\d)", browser.PAGE.read_text())]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))

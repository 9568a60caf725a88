"""Numbers read back from the printed lesson."""

import re

import torch

NUMBER = r"(?:·|-?[\d.]+(?:e[+-]\d+)?)"
FACTOR = r"(?:\(-[\d.]+\)|[\d.]+)"
PRODUCT = rf"{FACTOR}·{FACTOR}"
EQUATION = re.compile(rf"= ({PRODUCT}(?:\s+\+\s+{PRODUCT})*)\s+= (-?[\d.]+)$", re.M)


def section(page, title):
    """The page from a title on."""
    return page[page.index(f"\n{title}") :]


def row(page, name, occurrence=0):
    """Ten numbers of the page's line that begins with `name`; a dot is a zero."""
    lines = re.findall(rf"^ *{re.escape(name)}((?: +{NUMBER}){{10}})$", page, re.M)
    values = lines[occurrence].replace("·", "0").split()
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def matrix(page, title, name="k = {}", rows=10):
    """The rows k = 0, k = 1 … below a title."""
    below = section(page, title)
    return torch.stack([row(below, name.format(k)) for k in range(rows)])


def equations(page):
    """Each sum of products that is written out: what its printed factors make, and as printed."""
    for terms, result in EQUATION.findall(page):
        factors = [float(f.strip("()")) for f in re.findall(FACTOR, terms)]
        products = [u * v for u, v in zip(factors[::2], factors[1::2], strict=True)]
        yield sum(products), result

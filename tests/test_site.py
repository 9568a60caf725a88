"""`make docs`: the pages of docs/ as a site, and their tables from the reports beside them."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; a warning of MkDocs is an error."""
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def text_of(page):
    return page.read_text(encoding="utf-8")


def test_every_page_is_in_the_site_and_its_search(site):
    searched = json.loads(text_of(site / "search" / "search_index.json"))["docs"]
    for page in DOCS.glob("*.md"):
        name = page.with_suffix(".html").name
        assert (site / name).exists()
        assert any(entry["location"].startswith(name) for entry in searched), name


def test_the_site_loads_nothing_from_elsewhere(site):
    loaded = re.compile(
        r"<(?:script|link|img|iframe|source)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^ >]*"
    )
    for page in site.rglob("*.html"):
        assert not loaded.findall(text_of(page)), page.name


def test_formulas_are_drawn_without_a_script(site):
    page = text_of(site / "how-it-works.html")
    assert page.count("<math") == text_of(DOCS / "how-it-works.md").count("```math")


def test_every_public_name_is_in_the_reference(site):
    custom_ops = importlib.import_module("custom_ops")
    pages = "".join(text_of(page) for page in (site / "api").glob("*.html"))
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", pages, re.DOTALL)
    described = {re.sub(r"<[^>]+>", "", heading).split()[0] for heading in headings}
    assert described >= {f"custom_ops.{name}" for name in custom_ops.__all__}


def test_a_docstring_keeps_its_formula_its_example_and_the_words_beside_a_field(site):
    page = re.sub(r"<[^>]+>", "", text_of(site / "api" / "losses.html"))
    assert "ℓ = Σ_k ỹ_k (lse − z_k) + z_loss · lse²" in page
    assert "&gt;&gt;&gt; input = torch.tensor([[2.0, 0.0], [0.0, 0.0]])" in page
    assert "arg-max of the logits, int64" in page
    assert "<blockquote>" not in text_of(site / "api" / "losses.html")


def test_a_link_out_of_docs_leads_to_a_copy(site):
    page = text_of(site / "use.html")
    assert 'href="source/examples/lightning_module.py.txt"' in page
    copy = site / "source" / "examples" / "lightning_module.py.txt"
    assert text_of(copy) == text_of(ROOT / "examples" / "lightning_module.py")


@pytest.fixture
def tables(monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra [train]")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("pages.tables")


def test_the_tables_of_figures_are_those_of_the_reports(tables):
    for page, made in tables.pages().items():
        assert text_of(page) == made, f"{page.name}: run python scripts/tables.py"


def test_the_readmes_figures_are_those_of_the_reports(tables):
    report = tables.read("benchmark")
    readme = " ".join(text_of(ROOT / "README.md").split())
    ours = [section[0]["ratios"]["ours"] for section in (report["rows"], report[tables.KEPT_HEAP])]
    fast, kept = (f"{found['over builtin']:.1f}" for found in ours)
    assert (
        f"2048 × 32000 logits on a CPU are {fast} times as fast as torch's, and {kept} " in readme
    )
    memory = report["last layer memory"][0]["ratios"]
    ours, torchs = (f"{memory[name]['MiB']:.0f} MiB" for name in ("ours", "builtin"))
    assert f"takes {ours} beyond its gradients, torch's {torchs}" in readme
    twins = re.search(
        r"(\d+) twins,.*?: (\d+) found, (\d+) named. gradcheck alone finds (\d+)",
        text_of(DOCS / "battery.md"),
    )
    planted, _, named, alone = twins.groups()
    assert f"of {planted} planted mistakes it names {named}, and gradcheck finds {alone}" in readme

"""What the README and the pages of docs/ show runs when pasted, and their links lead somewhere."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
#: The pages whose examples need nothing that the page does not show.
PASTED = [README, *(ROOT / "docs" / f"{name}.md" for name in ("use", "options", "performance"))]
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
EXAMPLES = {
    f"{page.name} {number}": found.groups()
    for page in PASTED
    for number, found in enumerate(EXAMPLE.finditer(page.read_text()), 1)
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_example_runs_when_pasted(name, tmp_path, monkeypatch):
    example, expected = EXAMPLES[name]
    monkeypatch.chdir(tmp_path)
    if re.search("training|lightning", example):
        # It also declares the operators that torchvision lacks beside a CPU torch.
        pytest.importorskip("training.lightning", reason="needs the train extra: Lightning")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(example, name, "exec"), {})
    if expected is not None:
        assert printed.getvalue() == expected


def test_the_readme_shows_what_its_examples_print():
    shown = [expected for name, (_, expected) in EXAMPLES.items() if name.startswith("README")]
    assert shown
    assert None not in shown


def anchors(page):
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_into_the_repository_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)#?([^):\s]*)\)", text):
        there = (page.parent / link) if link else page
        assert there.exists(), link
        if anchor:
            assert anchor in anchors(there), f"{link}#{anchor}"

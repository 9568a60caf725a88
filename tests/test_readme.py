"""The README's examples run when pasted, and its links lead somewhere."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
@pytest.mark.filterwarnings("ignore")
def test_example_runs_when_pasted(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "training" in EXAMPLES[number] and not find_spec("pytorch_lightning"):
        pytest.skip("needs the train extra: Lightning")
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})


def test_every_link_into_the_repository_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_way_of_use_has_an_example():
    assert len(EXAMPLES) == 5

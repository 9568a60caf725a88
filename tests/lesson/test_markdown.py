"""docs/lesson.md is what the script makes, and says all that the page says."""

import re
from pathlib import Path

import computed
import pytest

from lesson.markdown import markdown

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def text():
    return computed.text()


def test_the_document_is_what_the_script_makes(text):
    again = "python scripts/explain.py --markdown > docs/lesson.md"
    assert (DOCS / "lesson.md").read_text() == markdown(text) + "\n", f"write it anew: {again}"


def test_every_word_of_the_text_is_in_the_document(text):
    def words(of):
        of = of.replace("\\*", "*").replace("&lt;", "<")
        return re.sub(r"[\s─━#·]+|```(text|python)?", "", of)

    document = markdown(text)
    start = document.index("*Written by")
    end = document.index("\n\n", document.index("explain.png)")) + 2
    assert words(document[:start] + document[end:]) == words(text)


def test_every_step_is_a_heading_and_every_table_is_code(text):
    document = markdown(text)
    assert len(re.findall(r"^## \d+\. ", document, re.M)) == 18
    assert len(re.findall(r"^# ", document, re.M)) == 1
    prose = re.sub(r"```.*?```", "", document, flags=re.S)
    assert not re.search(r"^ |[░█]| {3}", prose, re.M)


def test_every_link_of_the_document_leads_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", (DOCS / "lesson.md").read_text())
    assert len(links) == 4
    for link in links:
        assert (DOCS / link).exists(), link

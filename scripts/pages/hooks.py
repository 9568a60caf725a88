"""What MkDocs needs to be told about docs/, whose pages are written to be read on GitHub too.

A `math` fence becomes MathML, which browsers draw without a script. A link to a file of the
repository outside docs/ leads to a copy of it in the site. The reference pages are docstrings alone
and are made here, not kept in docs/. The site loads nothing from elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
#: Files beside this one that the site has too.
OWN = ("site.css", "iframe-worker.js")
_SHIM = "https://unpkg.com/iframe-worker/shim"
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")

#: Of each reference page its title and what it describes: the name, and where it is defined.
REFERENCE = {
    "losses": (
        "Softmax and cross-entropy",
        {
            "custom_ops.cross_entropy": "custom_ops.cross_entropy.cross_entropy",
            "custom_ops.CrossEntropyStats": "custom_ops.cross_entropy.CrossEntropyStats",
            "custom_ops.linear_cross_entropy": (
                "custom_ops.linear_cross_entropy.linear_cross_entropy"
            ),
            "custom_ops.softmax": "custom_ops.softmax.softmax",
            "custom_ops.log_softmax": "custom_ops.softmax.log_softmax",
            "custom_ops.contract": "custom_ops.softmax.contract",
            "custom_ops.backend": "custom_ops.kernels.backend",
        },
    ),
    "modules": (
        "Modules",
        {
            f"custom_ops.{name}": f"custom_ops.modules.{name}"
            for name in ("CrossEntropyLoss", "LinearCrossEntropyLoss", "Softmax", "LogSoftmax")
        },
    ),
    "fuse": (
        "fuse",
        {
            f"custom_ops.{name}": f"custom_ops.fuse.{name}"
            for name in ("fuse", "unfuse", "materialized")
        },
    ),
    "jacobian": (
        "The literal mathematics",
        {"custom_ops.jacobian": "custom_ops.jacobian"},
    ),
    "testing": (
        "The battery",
        {
            "custom_ops.testing.check": "custom_ops.testing.check",
            "custom_ops.testing.battery": "custom_ops.testing.battery.battery",
        },
    ),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let a `math` fence be drawn."""
    fences = [{"name": "math", "class": "math", "format": math_fence}]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = fences
    return config


def math_fence(source: str, *_: Any, **__: Any) -> str:
    """Return LaTeX as MathML."""
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages, the style, and the files of the repository that pages link to."""
    for name, (title, described) in REFERENCE.items():
        files.append(File.generated(config, f"api/{name}.md", content=_page(title, described)))
    for name in OWN:
        content = Path(__file__).with_name(name).read_text()
        files.append(File.generated(config, f"source/{name}", content=content))
    linked = {
        path
        for page in files.documentation_pages()
        for path, _ in _OUTSIDE.findall(page.content_string)
    }
    for path in sorted(linked):
        inside = sorted((ROOT / path).glob("*.py"))
        if inside:
            links = (f"- [{file.name}]({file.name}.txt)" for file in inside)
            listing = "\n".join([f"# {path}\n", *links])
            files.append(File.generated(config, _copied(path), content=listing))
        for file in inside or [ROOT / path]:
            copy = _copied(file.relative_to(ROOT).as_posix())
            if file.is_file() and copy not in files.src_uris:
                files.append(File.generated(config, copy, content=file.read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead a link out of docs/ to the copy of its file."""

    def to_copy(link: re.Match[str]) -> str:
        return f"]({_copied(link[1])})" if (ROOT / link[1]).exists() else link[0]

    return _OUTSIDE.sub(to_copy, markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Let the search from disk use the site's own file: the theme would load it from elsewhere."""
    return output.replace(_SHIM, get_relative_url("source/iframe-worker.js", page.url))


def on_post_template(output: str, template_name: str, **_: Any) -> str:
    """Do the same to the page that is shown where there is none."""
    return output.replace(_SHIM, "source/iframe-worker.js")


def _copied(path: str) -> str:
    """Where the copy lies: a file as text, which a browser shows; a folder as a list of files."""
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.txt"


def _page(title: str, described: dict[str, str]) -> str:
    parts = [f"# {title}\n"]
    for name, path in described.items():
        parts.append(f"::: {path}\n    options:\n      heading: {name}\n")
    return "\n".join(parts)

"""The page docs/softmax.html in headless Chromium, and its formulas in node."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "softmax.html"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NODE = shutil.which("node")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=3000", "--dump-dom"),
)


def dump(address):
    """The document of an address once its scripts have run."""
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", address]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def opened(mode, z, y, soft=False, s=1):
    """The page in a state."""
    place = f"mode={mode}&z={','.join(map(str, z))}&y={y}&soft={int(soft)}&s={s}"
    return dump(f"{PAGE.as_uri()}#{place}")


def after(script, folder):
    """The page once somebody has done what a script does."""
    page = folder / "touched.html"
    source = PAGE.read_text().replace("</body>", f"<script>{script}</script></body>")
    page.write_text(source)
    return dump(page.as_uri())


def framed(width, script, folder):
    """What a script finds in the page (`page`) when it is so many pixels wide."""
    source = html.escape(PAGE.read_text(), quote=True)
    page = folder / f"frame-{width}.html"
    page.write_text(
        f'<iframe width="{width}" height="2500" style="border:0" srcdoc="{source}"></iframe>'
        f'<p id="found"></p><script>addEventListener("load", () => {{'
        f'const page = document.querySelector("iframe").contentDocument;'
        f'document.getElementById("found").textContent = JSON.stringify({script});}})</script>'
    )
    found = re.search(r'<p id="found">(.*?)</p>', dump(page.as_uri()), re.S)[1]
    return json.loads(html.unescape(found))


def exact(document, name):
    """The number of one cell, all its digits."""
    return float(re.search(rf'id="{re.escape(name)}"[^>]*? data-exact="([^"]+)"', document)[1])


def inside(document, name):
    """The text of one element, without its tags."""
    found = re.search(rf'id="{re.escape(name)}"[^>]*>(.*?)</(?:p|h2|pre|td|span)>', document, re.S)
    return html.unescape(re.sub(r"<[^>]+>", "", found[1]))


def in_node(expression):
    """An expression of the page's formulas, as JSON."""
    formulas = re.search(r'<script id="formulas">(.*?)</script>', PAGE.read_text(), re.S)[1]
    source = f"{formulas}\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run([NODE, "-"], input=source, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

"""Measure what each option of cross_entropy costs; the report goes to docs/options.json."""

import json
from pathlib import Path

from bench.options import report

OUT = Path(__file__).parent.parent / "docs" / "options.json"

if __name__ == "__main__":
    OUT.write_text(json.dumps(report(), indent=1) + "\n")
    print(OUT)

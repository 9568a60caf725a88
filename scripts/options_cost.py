"""Measure what each option of cross_entropy costs; the report goes to docs/options.json."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks is not installed with custom_ops

from benchmarks.options import report

OUT = Path(__file__).parent.parent / "docs" / "options.json"

if __name__ == "__main__":
    OUT.write_text(json.dumps(report(), indent=1) + "\n")
    print(OUT)

"""Write the tables and pictures of docs/ from the reports in docs/.

After a run of `make bench` on an idle machine: `cp runs/benchmark/benchmark.json docs/` first.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks is not installed with custom_ops

from pages.tables import main

if __name__ == "__main__":
    main()

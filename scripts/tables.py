"""Write the tables and pictures of docs/ from the reports in docs/.

After a run of `make bench` on an idle machine: `cp runs/benchmark/benchmark.json docs/` first.
"""

from pages.tables import main

if __name__ == "__main__":
    main()

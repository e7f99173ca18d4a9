"""What importing sknode costs over importing torch and scikit-learn.

python tests/benchmarks/import_time.py [--runs 7]
"""

import argparse
import statistics
import subprocess
import sys

CODE = """
import time
import torch
import sklearn.base, sklearn.model_selection, sklearn.utils.validation
start = time.perf_counter()
import sknode
print(1e3 * (time.perf_counter() - start))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    times = []
    for _ in range(args.runs + 1):
        out = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
        )
        times.append(float(out.stdout))
    # the first run also compiles and reads from disk
    print(
        f"import sknode: median {statistics.median(times[1:]):.1f} ms, "
        f"min {min(times[1:]):.1f} ms over torch and scikit-learn"
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# prdc 0.2: `compute_prdc` gives an exact copy of a set precision, recall, density and coverage 0 if each
# point occurs more than `nearest_k` times. A ball reaches to the k-th nearest neighbour; prdc leaves
# its surface out (`<`), while arXiv 1904.06991 includes it (`<=`). Identical points then have empty
# balls. Binary and categorical features have many such points, and so has a collapsed generator.
#
# 100 random points, k = 5, each point repeated 1, 5 and 6 times in both sets:
#
#     1: precision 1, recall 1, coverage 1
#     5: precision 1, recall 1, coverage 1
#     6: precision 0, recall 0, coverage 0
#
# https://github.com/clovaai/generative-evaluation-prdc/issues/7 reports it for sets of ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q prdc==0.2 numpy==2.4.6 scikit-learn==1.9.1 scipy==1.17.1
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
from prdc import compute_prdc

points = np.random.default_rng(0).normal(size=(100, 8))
found = {}
for times in (1, 5, 6):
    real = np.repeat(points, times, axis=0)
    metrics = compute_prdc(real, real.copy(), nearest_k=5)
    found[times] = [float(metrics[name]) for name in ("precision", "recall", "coverage")]
    print(f"{times}: precision %g, recall %g, coverage %g" % tuple(found[times]))
assert found == {1: [1.0] * 3, 5: [1.0] * 3, 6: [0.0] * 3}
PYTHON
echo "as described"

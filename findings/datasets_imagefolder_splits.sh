#!/usr/bin/env bash
# datasets 5.2.0: `imagefolder` reads a word like "train" or "test" anywhere in a class folder's name as
# the name of a split, and then drops every other class without a warning.
#
# Twelve class folders of three images each, of which one is named "02-train" and one "03-test":
#
#     load_dataset("imagefolder", data_dir=DIR)
#         train: 3 rows, test: 3 rows, label names: ['02-train', '03-test']
#     load_dataset("imagefolder", data_files={"train": "DIR/**"})
#         train: 36 rows, 12 label names
#
# The other 30 images are in no split. Naming the files (second call) reads all of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pillow==12.0.0
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
from pathlib import Path

from datasets import load_dataset
from PIL import Image

names = [f"{index:02d}-class" for index in range(12)]
names[2], names[3] = "02-train", "03-test"
for name in names:
    Path("images", name).mkdir(parents=True)
    for number in range(3):
        Image.new("L", (8, 8), number).save(f"images/{name}/{number}.png")

found = load_dataset("imagefolder", data_dir="images")
for split, rows in found.items():
    print(split, len(rows), rows.features)
named = load_dataset("imagefolder", data_files={"train": "images/**"})["train"]
print("named", len(named), len(named.features["label"].names))
assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "test": 3}
assert len(named) == 36
assert named.features["label"].names == sorted(names)
PYTHON
echo "as described"

#!/usr/bin/env bash
# timm 1.0.31: `create_dataset("", root="set.tar")` reads a webdataset tar (KEY.png beside KEY.cls) as a tar
# of class folders, finds none, and labels every image 0 without a warning.
#
# A tar of six images with the classes 0, 1, 2, 0, 1, 2:
#
#     create_dataset("", root="set.tar")                              labels 0, 0, 0, 0, 0, 0
#
# With the prefix "wds/" timm reads the `cls` files, but needs a tar with the sample count in its name
# or in `num_samples`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31 torch==2.13.0 torchvision==0.28.0 pillow==12.0.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import io
import tarfile

import torch
from PIL import Image

try:
    import torchvision  # noqa: F401
except RuntimeError:  # a build of PyTorch without CUDA beside torchvision's wheel with it
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from timm.data import create_dataset

labels = [0, 1, 2, 0, 1, 2]
with tarfile.open("set.tar", "w") as archive:
    for number, label in enumerate(labels):
        png = io.BytesIO()
        Image.new("L", (8, 8), number).save(png, "PNG")
        for suffix, data in (("png", png.getvalue()), ("cls", str(label).encode())):
            member = tarfile.TarInfo(f"{number:04d}.{suffix}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
found = [label for _, label in create_dataset("", root="set.tar")]
print("labels in the tar:", labels)
print("labels of timm:   ", found)
assert found == [0] * 6
PYTHON
echo "as described"

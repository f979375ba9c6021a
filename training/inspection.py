"""What an artifact is, for people and for machines."""

import dataclasses
import json
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from training.artifact import Artifact, ArtifactInfo
from training.images import class_grid, grid
from training.networks import count_parameters
from training.quality.certificate import read_certificate
from training.quality.report import TABLE_CLASSES, render_table

_PER_LINE = 5  # classes of a line of the terminal's picture


def summary(artifact: Artifact) -> dict[str, Any]:
    """Everything an artifact says of itself, its identity and its sizes; fit for JSON.

    Raises:
        OSError: the file is no longer there.
    """
    return {
        "path": str(artifact.path),
        "sha256": artifact.sha256,
        "size_bytes": artifact.path.stat().st_size,
        "parameters": count_parameters(artifact.generator),
        **dataclasses.asdict(artifact.info),
    }


def render_summary(artifact: Artifact) -> str:
    """The facts in lines, then the certificate's table.

    Raises:
        OSError: the file is no longer there.
    """
    info, known = artifact.info, summary(artifact)
    unknown = info.training.get("images_seen", info.images_seen) is None  # as of an imported one
    lines = {
        "SHA-256": artifact.sha256,
        "size": f"{known['size_bytes']:,} bytes",
        "network": f"{info.network.kind}, {known['parameters']:,} parameters",
        **_listed(known["network"]),
        "classes": _classes(info.class_names),
        "images seen": "unknown" if unknown else f"{info.images_seen:,}",
        "source commit": info.source_commit or "unknown",
        "training": "" if info.training else "not recorded",
        **_listed(info.training),
    }
    width = max(map(len, lines))
    shown = [f"{name:<{width}}  {value}".rstrip() for name, value in lines.items()]
    return _printable("\n".join([str(artifact.path), *shown, "", _certificate(info)]))


def _classes(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:TABLE_CLASSES])
    return shown if len(names) <= TABLE_CLASSES else f"{shown}, … ({len(names):,} in all)"


def _listed(values: dict[str, Any]) -> dict[str, str]:
    return {f"  {key}": json.dumps(value, ensure_ascii=False) for key, value in values.items()}


def _certificate(info: ArtifactInfo) -> str:
    try:
        certificate = read_certificate(info)
    except ValidationError:
        figures = json.dumps(info.certificate, ensure_ascii=False, indent=2)
        return f"Certified by another version of this code:\n{figures}"
    return "Not certified." if certificate is None else render_table(certificate, info.class_names)


def _printable(text: str) -> str:
    """Without the control characters by which a file's text could steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def render_picture(artifact: Artifact, columns: int) -> str:
    """An image of each class, for a terminal that is `columns` wide; see `blocks`.

    Of more than 20 classes the first 20 are shown. The images are shrunk by whole numbers until
    five of them fit beside each other.
    """
    network = artifact.info.network
    size, channels = network.image_size, network.channels
    stack = class_grid(artifact.generator, columns=1)  # (classes * H, W, C)
    pixels = stack.view(-1, size, size, channels).permute(0, 3, 1, 2)
    per_line = min(len(pixels), _PER_LINE)
    shrink = min(-(-per_line * size // columns), size)
    small = F.avg_pool2d(pixels.float(), shrink).round_().to(torch.uint8)
    return render_ansi(grid(small, per_line))


def render_ansi(pixels: Tensor) -> str:
    """(H, W, C) uint8 in characters: the upper half of each is one pixel, the lower half another.

    The colours are 24-bit escape sequences of ECMA-48 (the upper pixel's is the character's, the
    lower one's the ground's).
    """
    rgb = F.pad(pixels, (0, 0, 0, 0, 0, pixels.shape[0] % 2))  # an even number of rows
    rgb = rgb.expand(-1, -1, 3)
    lines = []
    for upper, lower in zip(rgb[::2].tolist(), rgb[1::2].tolist(), strict=True):
        cells = (
            f"\x1b[38;2;{r};{g};{b};48;2;{p};{q};{s}m▀"
            for (r, g, b), (p, q, s) in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)

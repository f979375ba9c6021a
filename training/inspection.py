"""Summaries of artifacts: as JSON, as text, and as a picture in a terminal."""

import dataclasses
import json
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from training.artifact import ArtifactInfo, list_names, printable
from training.images import class_grid, grid
from training.loading import LoadedArtifact
from training.networks import count_parameters
from training.quality.certificate import read_certificate
from training.quality.estimate import Estimate, describe, read_estimate
from training.quality.report import render_table

_PER_LINE = 5  # classes per line of the picture


def summary(artifact: LoadedArtifact) -> dict[str, Any]:
    """Return the description of an artifact, its SHA-256 and its sizes, as values of JSON.

    Raises:
        OSError: the file no longer exists.
    """
    return {
        "path": str(artifact.path),
        "sha256": artifact.sha256,
        "size_bytes": artifact.path.stat().st_size,
        "parameters": count_parameters(artifact.generator),
        "graphs": sorted(artifact.graphs),
        **dataclasses.asdict(artifact.info),
    }


def render_summary(artifact: LoadedArtifact) -> str:
    """Return the summary as lines of text, then the certificate's table.

    Raises:
        OSError: the file no longer exists.
    """
    info, values = artifact.info, summary(artifact)
    images_seen = info.training.get("images_seen", info.images_seen)  # None in an imported one
    lines = {
        "SHA-256": artifact.sha256,
        "size": f"{values['size_bytes']:,} bytes",
        "network": f"{info.network.kind}, {values['parameters']:,} parameters",
        **_listed(values["network"]),
        "graphs": ", ".join(values["graphs"]) or "none; add them with: python -m training upgrade",
        "classes": list_names(info.class_names),
        "images seen": "unknown" if images_seen is None else f"{images_seen:,}",
        "source commit": info.source_commit or "unknown",
        "training": "" if info.training else "not recorded",
        **_listed(info.training),
    }
    width = max(map(len, lines))
    shown = [f"{name:<{width}}  {value}".rstrip() for name, value in lines.items()]
    return printable("\n".join([str(artifact.path), *shown, "", _certificate(info)]))


def _listed(values: dict[str, Any]) -> dict[str, str]:
    return {f"  {key}": json.dumps(value, ensure_ascii=False) for key, value in values.items()}


def _certificate(info: ArtifactInfo) -> str:
    try:
        certificate = read_certificate(info)
    except ValidationError:
        stored = json.dumps(info.certificate, ensure_ascii=False, indent=2)
        return f"Certified by another version of this code:\n{stored}"
    if certificate is not None:
        return render_table(certificate, info.class_names)
    estimate = read_estimate(info)
    return "\n".join(["Not certified.", *([_render_estimate(info, estimate)] if estimate else [])])


def _render_estimate(info: ArtifactInfo, estimate: Estimate) -> str:
    return (
        f"Estimated during training, from {estimate.images:,} images against training images: "
        f"{describe(estimate, info.network.num_classes)}, Fréchet distance "
        f"{estimate.frechet_distance:.2f}."
    )


def render_picture(artifact: LoadedArtifact, columns: int) -> str:
    """Return an image per class, at most 20, as text of at most `columns` characters per line.

    The images are shrunk by an integer factor so that five of them fit side by side.
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
    """Return (H, W, C) uint8 as text: a character is two pixels, one above the other.

    Each character is an upper half block; 24-bit escape sequences of ECMA-48 set its foreground to
    the upper pixel and its background to the lower one.
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

"""Sheets of generated images: a row per class, beside its name."""

import math
import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.images import grid
from training.networks import Generator
from training.sampling import to_pixels

COLUMNS = 10  # images per class
MAX_IMAGES = 200  # of a sheet; with many classes there are fewer columns
MAX_PIXELS = 8_000_000  # beyond these, images are smaller
MIN_SIDE = 4  # of an image, in pixels
BATCH = 500

FONT_SIZE = 12
LINE = 14  # height of a name, in pixels
MAX_NAME_WIDTH = 120
MARGIN = 6  # on both sides of a name
GREY = 200


@torch.inference_mode()
def class_sheet(generator: Generator, class_names: tuple[str, ...], *, seed: int = 0) -> Tensor:
    """Draw all classes with their names, in as many blocks side by side as make it a square.

    Every column of a block has its own latent vector, the same in all rows.

    Returns:
        (H, W, C) uint8.
    """
    config, device = generator.config, generator.label_embedding.weight.device
    columns = max(1, min(COLUMNS, MAX_IMAGES // config.num_classes))
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn((columns, config.latent_dim), generator=rng).to(device)
    labels = torch.arange(config.num_classes, device=device).repeat_interleave(columns)
    z = latents.repeat(config.num_classes, 1)
    batches = zip(z.split(BATCH), labels.split(BATCH), strict=True)
    pixels = torch.cat([to_pixels(generator(*batch)) for batch in batches]).cpu()
    return _draw(list(pixels.split(columns)), class_names)


@dataclass(frozen=True)
class _Layout:
    """The places of the rows of a sheet."""

    side: int  # of an image, in pixels
    row_height: int
    name_width: int  # with its margins
    block_width: int
    rows: int  # of a block
    blocks: int

    @classmethod
    def of(cls, classes: int, columns: int, image_size: int, name_width: int) -> "_Layout":
        """Place images of twice their size, or of less to stay below `MAX_PIXELS`."""
        side = 2 * image_size
        while True:
            height, width = max(side, LINE), name_width + columns * side
            if classes * height * width <= MAX_PIXELS or side // 2 < MIN_SIDE:
                break
            side //= 2
        blocks = math.ceil(math.sqrt(classes * height / width))
        rows = math.ceil(classes / blocks)
        return cls(side, height, name_width, width, rows, math.ceil(classes / rows))

    def origin(self, index: int) -> tuple[int, int]:
        """Return x and y of the row of a class."""
        block, row = divmod(index, self.rows)
        return block * self.block_width, row * self.row_height


def _draw(strips: list[Tensor], class_names: tuple[str, ...]) -> Tensor:
    """Draw the images of each class (N, C, H, W) in a row after its name."""
    columns, channels, image_size, _ = strips[0].shape
    font = ImageFont.load_default(FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)
    names = [_fitted(drawable(name, index, font), font) for index, name in enumerate(class_names)]
    name_width = math.ceil(max(map(font.getlength, names))) + 2 * MARGIN
    layout = _Layout.of(len(strips), columns, image_size, name_width)
    size = layout.blocks * layout.block_width, layout.rows * layout.row_height
    sheet = Image.new("L" if channels == 1 else "RGB", size)
    pen = ImageDraw.Draw(sheet)
    strip_size = columns * layout.side, layout.side
    resampling = Image.Resampling.NEAREST if layout.side >= image_size else Image.Resampling.BOX
    for index, (strip, name) in enumerate(zip(strips, names, strict=True)):
        x, y = layout.origin(index)
        middle = x + MARGIN, y + layout.row_height // 2
        pen.text(middle, name, (GREY,) * channels, font, anchor="lm")
        array = grid(strip, columns).numpy()
        picture = Image.fromarray(array.squeeze(-1) if channels == 1 else array)
        sheet.paste(picture.resize(strip_size, resampling), (x + layout.name_width, y))
    return torch.from_numpy(np.array(sheet)).view(size[1], size[0], channels)


def drawable(name: str, index: int, font: ImageFont.FreeTypeFont) -> str:
    """Return a name in the letters of the font, after its index if any are lacking."""
    missing = _shape("\U0010fffe", font)
    kept = "".join(
        letter
        for letter in unicodedata.normalize("NFKD", name)
        if letter == " " or _shape(letter, font) != missing
    )
    return name if kept == name else f"{index} {' '.join(kept.split())}".rstrip()


def _shape(letter: str, font: ImageFont.FreeTypeFont) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _fitted(name: str, font: ImageFont.FreeTypeFont) -> str:
    """Shorten a name to `MAX_NAME_WIDTH`."""
    if font.getlength(name) <= MAX_NAME_WIDTH:
        return name
    while font.getlength(f"{name}…") > MAX_NAME_WIDTH:
        name = name[:-1]
    return f"{name}…"

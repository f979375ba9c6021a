"""Writes a data set of capital letters, rendered from the fonts of this machine.

    python -m tests.support.letters OUT

OUT/A to OUT/Z get one 32x32 grey PNG a font, white on black. Equal fonts give equal files.

Measured with these packages of Debian 12 and what they recommend: 230 fonts, 5963 images.

    apt-get install
    fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius
    fonts-adf-ikarius fonts-adf-irianis fonts-adf-libris fonts-adf-mekanus fonts-adf-oldania
    fonts-adf-romande fonts-adf-switzera fonts-adf-tribun fonts-adf-universalis fonts-adf-verana
    fonts-aenigma fonts-aoyagi-kouzan-t fonts-atarismall fonts-averia-gwf fonts-averia-sans-gwf
    fonts-averia-serif-gwf fonts-bebas-neue fonts-breip fonts-cabin fonts-cabinsketch
    fonts-cantarell fonts-comfortaa fonts-courier-prime fonts-croscore fonts-crosextra-caladea
    fonts-crosextra-carlito fonts-dejavu-core fonts-dejavu-extra fonts-dosis fonts-dustin
    fonts-ebgaramond fonts-ecolier-court fonts-essays1743 fonts-evertype-conakry
    fonts-fantasque-sans fonts-femkeklaver fonts-firacode fonts-freefont-ttf
    fonts-georgewilliams fonts-gfs-artemisia fonts-gfs-didot fonts-gfs-neohellenic
    fonts-gotico-antiqua fonts-goudybookletter fonts-hack fonts-humor-sans fonts-inconsolata
    fonts-isabella fonts-jetbrains-mono fonts-junicode fonts-jura fonts-karla
    fonts-klaudia-berenika fonts-kristi fonts-lato fonts-league-spartan fonts-liberation2
    fonts-lindenhill fonts-linuxlibertine fonts-lobster fonts-lobstertwo fonts-mlym
    fonts-mononoki fonts-noto-core fonts-ocr-a fonts-ocr-b fonts-oflb-asana-math fonts-okolaks
    fonts-open-sans fonts-opendyslexic fonts-play fonts-powerline fonts-prociono fonts-quicksand
    fonts-radisnoir fonts-recommended fonts-roboto-slab fonts-roboto-unhinted fonts-rufscript
    fonts-sil-charis fonts-sil-gentium fonts-sjfonts fonts-stix fonts-tlwg-garuda-ttf
    fonts-tomsontalks fonts-unfonts-core fonts-urw-base35 fonts-vollkorn fonts-yanone-kaffeesatz
"""

import string
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFont

FONTS = Path("/usr/share/fonts")
CLASSES = string.ascii_uppercase
MISSING = "\U0010ffff"  # not a character: fonts draw their sign for a missing one
SIZE, MARGIN = 32, 3
DRAWN_SIZE = 128
MAX_PER_FOLDER = 24  # of the hundreds in a collection
SAME_FONT = 4.0  # mean difference of pixel values, below which two fonts are copies
MIN_TYPICAL = 12  # letters that are nearest to the mean of their class; pictures have fewer

Letters = npt.NDArray[np.uint8]  # (26, SIZE, SIZE)


def find_fonts(folder: Path) -> list[Path]:
    """Return the first and the last face of each family, sorted."""
    families: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*.[ot]tf")):
        if path.name.startswith("Noto") and path.name.split("-")[0] not in (
            "NotoSans",
            "NotoSerif",
        ):
            continue  # the same Latin letters beside those of another script
        try:
            family = ImageFont.truetype(path, DRAWN_SIZE).getname()[0]
        except OSError:  # a font of bitmaps
            continue
        families[family or path.stem].append(path)
    return sorted({face for faces in families.values() for face in (faces[0], faces[-1])})


def draw(font: ImageFont.FreeTypeFont, character: str) -> npt.NDArray[np.uint8] | None:
    """Return a character, scaled to fit and centred, or None if it is blank."""
    mask = font.getmask(character, mode="L")
    glyph = Image.frombytes("L", mask.size, bytes(mask))
    box = glyph.getbbox()
    if box is None:
        return None
    glyph = glyph.crop(box)
    scale = (SIZE - 2 * MARGIN) / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    canvas = Image.new("L", (SIZE, SIZE))
    left, top = (SIZE - width) // 2, (SIZE - height) // 2
    canvas.paste(glyph.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    return np.asarray(canvas)


def draw_letters(font: ImageFont.FreeTypeFont) -> Letters | None:
    """Return A to Z, or None if a letter is blank, missing or equal to another one."""
    drawn = [draw(font, letter) for letter in CLASSES]
    letters = [image for image in drawn if image is not None]
    missing = draw(font, MISSING)
    different = {image.tobytes() for image in letters}
    if missing is not None:
        different.discard(missing.tobytes())
    return np.stack(letters) if len(different) == len(CLASSES) else None


def draw_fonts(paths: Iterable[Path]) -> dict[Path, Letters]:
    """Return the letters of the fonts, without copies, pictures and most of a large collection."""
    drawn: dict[Path, Letters] = {}
    in_folder: Counter[Path] = Counter()
    for path in paths:
        if in_folder[path.parent] == MAX_PER_FOLDER:
            continue
        letters = draw_letters(ImageFont.truetype(path, DRAWN_SIZE))
        if letters is None or any(
            _difference(letters, other) < SAME_FONT for other in drawn.values()
        ):
            continue
        drawn[path] = letters
        in_folder[path.parent] += 1
    if not drawn:
        return {}
    means = np.stack(list(drawn.values())).mean(0)
    return {path: letters for path, letters in drawn.items() if is_typical(letters, means)}


def is_typical(letters: Letters, means: npt.NDArray[np.float64]) -> bool:
    """Return True if enough letters are nearest to the mean (SIZE, SIZE) of their own class."""
    distances = np.square(letters[:, None] - means[None]).sum((2, 3))
    return int((distances.argmin(1) == np.arange(len(CLASSES))).sum()) >= MIN_TYPICAL


def _difference(first: Letters, second: Letters) -> float:
    return float(np.abs(first.astype(np.int16) - second).mean())


def write_letters(out: Path, fonts: Path = FONTS) -> tuple[int, int]:
    """Write the data set without equal images; return the numbers of fonts and of images.

    Raises:
        ValueError: `out` holds files, or `fonts` has no font with all capitals.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; name a new folder")
    drawn = draw_fonts(find_fonts(fonts))
    if not drawn:
        raise ValueError(f"{fonts}: no font with the letters A to Z; install fonts-dejavu-core")
    written: set[bytes] = set()
    for name in CLASSES:
        (out / name).mkdir(parents=True)
    for number, (path, letters) in enumerate(drawn.items()):
        for name, pixels in zip(CLASSES, letters, strict=True):
            if pixels.tobytes() not in written:
                written.add(pixels.tobytes())
                Image.fromarray(pixels).save(out / name / f"{number:03d}-{path.stem}.png")
    return len(drawn), len(written)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.support.letters OUT")
    try:
        counts = write_letters(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))
    print("{} fonts, {} images".format(*counts))  # noqa: T201

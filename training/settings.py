"""The options of the command `train`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.artifact import ArtifactError, check_model_name
from training.config import TrainingConfig
from training.data.folder import check_outside, is_folder
from training.run_log import RunFolder

DEFAULT_PRESET = "conv"


class SettingsError(Exception):
    """Options that contradict each other, the data set or the device."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The options of the command `train`; None for an option that was not given."""

    dataset: str
    device: str = "auto"
    data_dir: Path | None = None
    out: Path | None = None
    preset: str | None = None
    seed: int | None = None
    images: int | None = None
    minutes: float | None = None
    r1_gamma: float | None = None
    mismatch_weight: float | None = None
    batch_size: int | None = None
    precision: str | None = None
    image_size: int | None = None
    flip: bool | None = None
    augment: bool | None = None
    certify: bool = False
    export_to: Path | None = None
    init_from: Path | None = None
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.images is not None and self.minutes is not None:
            raise SettingsError("--images and --minutes exclude each other; give one of them")
        if self.init_from is not None and self.resume:
            raise SettingsError("--init-from and --resume exclude each other; give one of them")
        if self.export_to is not None and self.export_to.suffix != ".safetensors":
            raise SettingsError(f"--export-to: {self.export_to.name!r} must end in .safetensors")
        if self.export_to is not None:
            try:
                check_model_name(self.export_to)
            except ArtifactError as error:
                raise SettingsError(f"--export-to: {error.path.name!r} {error.cause}") from error
            check_outside(self.dataset, "--export-to", self.export_to, self.export_to.parent)
        if self.out is not None:
            check_outside(self.dataset, "--out", self.out, RunFolder(self.out).samples)
        if self.image_size is not None and not is_folder(self.dataset):
            raise SettingsError(
                f"--image-size applies to folders of images; {self.dataset} has a fixed size"
            )

    @property
    def overrides(self) -> dict[str, Any]:
        """The options that replace fields of the preset's configuration."""
        fields = {field.name for field in dataclasses.fields(TrainingConfig)}
        given = dataclasses.asdict(self).items()
        return {name: value for name, value in given if name in fields and value is not None}

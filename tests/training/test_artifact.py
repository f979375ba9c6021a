"""Artifacts: what is written comes back, and what is wrong is refused with its path and cause."""

import dataclasses
import hashlib
import json
import os
import pickle
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import tiny_training as tiny
from tests.support.malicious_files import Payload, torch_saved
from training import artifact as artifact_module
from training.artifact import ArtifactError, ArtifactInfo
from training.generator_config import MLPGeneratorConfig
from training.loading import load_artifact
from training.networks import build_generator
from training.saving import save_artifact

pytestmark = pytest.mark.usefixtures("one_thread")

INFO = ArtifactInfo(
    network=tiny.NETWORK,
    class_names=("left", "Bär 熊"),
    training={"preset": "mlp", "config": {"lr": 1e-3, "hidden": [1, 2]}, "minutes": None},
    images_seen=640,
    source_commit="0123abc",
    certificate={"gan_test": 0.5},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good artifact."""
    return tiny.artifact_file(tmp_path / "a.safetensors")


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_artifact(path)
    assert (caught.value.path, str(caught.value)) == (path, f"{path}: {caught.value.cause}")
    assert "\n" not in caught.value.cause
    return caught.value.cause


Edit = Callable[[dict[str, Any]], object]
Form = Literal["NFC", "NFD"]


def rewrite(
    path: Path,
    *,
    describe: Edit = lambda _: None,
    tensors: Edit = lambda _: None,
    undigested: bool = False,
) -> None:
    """Another file than the code would write: its description or its tensors edited.

    Without a digest only they tell.
    """
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["artifact"])
    contents = safetensors.torch.load(data)
    describe(description)
    tensors(contents)
    if undigested:
        description.pop("contents_sha256")
    metadata = {"artifact": json.dumps(description)}
    path.write_bytes(safetensors.torch.save(contents, metadata))


# What is written comes back


def test_an_artifact_comes_back_as_it_was_written(tmp_path: Path) -> None:
    generator = build_generator(tiny.NETWORK).eval()
    with torch.no_grad():
        for layer in ("main.3", "main.6"):
            generator.get_buffer(f"{layer}.running_mean").normal_()
            generator.get_buffer(f"{layer}.running_var").uniform_(0.5, 2.0)
    path = tmp_path / "a.safetensors"

    save_artifact(path, generator, INFO)
    loaded = load_artifact(path)

    assert loaded.info == INFO
    assert loaded.path == path
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    stored = loaded.generator.state_dict()
    for name, tensor in generator.state_dict().items():
        assert torch.equal(stored[name], tensor), name
    latents, labels = torch.randn(6, 9), torch.arange(6) % 2
    assert torch.equal(loaded.generator(latents, labels), generator(latents, labels))


def test_a_loaded_generator_is_ready_to_serve(path: Path) -> None:
    generator = load_artifact(path).generator
    assert not any(module.training for module in generator.modules())
    assert not any(p.requires_grad for p in generator.parameters())
    assert {p.device.type for p in generator.parameters()} == {"cpu"}


def test_the_same_contents_give_the_same_bytes(tmp_path: Path) -> None:
    generator = build_generator(tiny.NETWORK)
    assert INFO.certificate is not None
    shuffled = replace(INFO, training=dict(reversed(INFO.training.items())))

    for name, info in (("one", INFO), ("two", shuffled)):
        save_artifact(tmp_path / name, generator, info)
    save_artifact(tmp_path / "three", load_artifact(tmp_path / "one").generator, INFO)

    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two == three


def test_it_is_a_plain_safetensors_file_that_describes_itself(path: Path) -> None:
    with safetensors.safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["artifact"])
        own = set(build_generator(tiny.NETWORK).state_dict())
        reference = {f"reference.{name}" for name in ("latents", "labels", "images")}
        assert set(file.keys()) == {*own, *reference, "onnx.float32"}
    assert (described["format"], described["version"]) == ("cgan-generator", 2)
    assert set(described["graphs"]["float32"]) <= own
    assert described["network"] == {**dataclasses.asdict(tiny.NETWORK), "hidden": [16, 32, 24]}


def test_other_contents_are_another_model(path: Path) -> None:
    before = load_artifact(path)
    seen_more = replace(before.info, images_seen=before.info.images_seen + 1)
    save_artifact(path, before.generator, seen_more)
    assert load_artifact(path).sha256 != before.sha256


def test_what_is_not_finite_is_not_written_and_the_old_file_stays(path: Path) -> None:
    before = path.read_bytes()
    generator = build_generator(tiny.NETWORK)
    with torch.no_grad():
        generator.get_parameter("main.0.weight")[1, 2] = float("nan")

    with pytest.raises(ArtifactError, match=r"main\.0\.weight: holds values that are not finite"):
        save_artifact(path, generator, INFO)

    assert path.read_bytes() == before


@pytest.mark.parametrize("field", ["training", "certificate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_description_holds_a_number_that_json_has_not(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(INFO, **{field: {"x": [value]}})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"class_names": ("left", "caf\udce9")}, "lone leading surrogate"),
        ({"class_names": ("left", "x" * 201)}, "class_names.1: String should have at most 200"),
        ({"training": {"dataset": "caf\udce9"}}, "lone leading surrogate"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    path: Path, change: dict[str, Any], cause: str
) -> None:
    before, generator = path.read_bytes(), load_artifact(path).generator
    with pytest.raises(ArtifactError) as caught:
        save_artifact(path, generator, replace(INFO, **change))
    assert cause in str(caught.value)
    assert path.read_bytes() == before


# Wrong files


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 50, 500, -4, -1])
def test_a_truncated_file_is_refused(path: Path, kept: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    cause = refusal(path)
    assert "is truncated" in cause or "is not a valid safetensors file" in cause


def test_an_empty_file_is_refused(path: Path) -> None:
    path.write_bytes(b"")
    assert refusal(path) == "is an empty file; expected an artifact (.safetensors)"


def test_a_file_with_bytes_to_spare_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    assert "is not a valid safetensors file" in refusal(path)


def test_no_flipped_bit_in_the_header_makes_anything_but_a_refusal_or_a_valid_artifact(
    path: Path,
) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    refused = 0
    for position in range(0, 8 + length, 7):
        wrong = bytearray(data)
        wrong[position] ^= 1 << position % 7
        path.write_bytes(wrong)
        try:
            load_artifact(path)
        except ArtifactError:
            refused += 1
    # Most of the header matters; the rest is text, such as names, or the padding at its end.
    assert refused > 0.7 * length / 7


def header_length(data: bytes | bytearray) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("bit", [0, 3, 22, 31])
def test_a_flipped_bit_in_the_weights_is_told_though_every_value_is_finite(
    path: Path, bit: int
) -> None:
    data = bytearray(path.read_bytes())
    for position in (header_length(data), header_length(data) + 400, len(data) - 4):
        wrong = data.copy()
        wrong[position + bit // 8] ^= 1 << bit % 8
        path.write_bytes(wrong)
        assert refusal(path) == "is damaged: its contents are not the ones that were written"


def test_a_flipped_bit_in_a_class_name_is_told(path: Path) -> None:
    data = path.read_bytes()
    name = tiny.CLASS_NAMES[0].encode()
    flipped = bytes([name[0] ^ 1]) + name[1:]
    assert data.count(name) == 1
    path.write_bytes(data.replace(name, flipped))
    assert refusal(path) == "is damaged: its contents are not the ones that were written"


def test_an_artifact_from_before_there_was_a_digest_is_valid(path: Path) -> None:
    rewrite(path, describe=lambda it: it.pop("contents_sha256"))
    assert load_artifact(path).info.class_names == tiny.CLASS_NAMES


def test_a_digest_of_numbered_entries_is_of_what_is_read_back(tmp_path: Path) -> None:
    """JSON has no numbers for names, and their order as texts is another one."""
    info = replace(INFO, certificate={"per_class": {2: 0.5, 10: 0.25}})
    save_artifact(tmp_path / "a", build_generator(tiny.NETWORK), info)
    assert load_artifact(tmp_path / "a").info.certificate == {"per_class": {"2": 0.5, "10": 0.25}}


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_no_bytes_at_all_make_anything_but_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, as_header: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.safetensors"
    path.write_bytes(struct.pack("<Q", len(junk)) + junk if as_header else junk)
    refusal(path)


HEADERS: list[tuple[bytes, str]] = [
    (b"\xff\xfe", "its header is not JSON"),
    (b"{", "its header is not JSON"),
    (b"[" * 100_000, "its header is not JSON"),
    (b"[]", "its header is not an object"),
    (b"{}", "without the description of an artifact"),
    (b'{"__metadata__": 5}', "without the description of an artifact"),
    (b'{"__metadata__": {"artifact": 5}}', "without the description of an artifact"),
    (b'{"__metadata__": {"artifact": "{"}}', "description: Invalid JSON"),
    (b'{"__metadata__": {"artifact": "[]"}}', "description: "),
    (
        b'{"__metadata__": {"artifact": "%b1%b"}}' % (b'{\\"training\\":' * 500, b"}" * 500),
        "description: ",
    ),
]


@pytest.mark.parametrize(("header", "cause"), HEADERS, ids=[str(h[:40]) for h, _ in HEADERS])
def test_a_header_that_is_not_valid_is_refused(path: Path, header: bytes, cause: str) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert cause in refusal(path)


def test_a_safetensors_file_without_a_description_is_refused(path: Path) -> None:
    path.write_bytes(safetensors.torch.save(build_generator(tiny.NETWORK).state_dict()))
    assert refusal(path) == "is a safetensors file without the description of an artifact"


@pytest.mark.parametrize("protocol", range(6))
def test_a_renamed_pickle_is_refused_and_nothing_in_it_is_executed(
    path: Path, tmp_path: Path, protocol: int
) -> None:
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Payload(trace), protocol))  # the payload works
    trace.rmdir()
    path.write_bytes(pickle.dumps(Payload(trace), protocol))

    cause = refusal(path)

    assert not trace.exists()
    if protocol >= 2:
        assert cause == "is a pickle (a checkpoint?); nothing in it was executed"


def test_a_renamed_pytorch_checkpoint_is_refused_and_nothing_in_it_is_executed(
    path: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    path.write_bytes(torch_saved({"weights": torch.zeros(3), "payload": Payload(trace)}))
    assert refusal(path) == "is a pickle (a checkpoint?); nothing in it was executed"
    assert not trace.exists()


@pytest.mark.parametrize("low_bytes", [b"\x80", b"PK"])
def test_a_header_as_long_as_a_pickles_first_bytes_is_still_a_header(
    path: Path, low_bytes: bytes
) -> None:
    """The length of the header comes first in the file, and it may be any number."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    step = 256 ** len(low_bytes)
    longer = int.from_bytes(low_bytes, "little")
    while longer < length:
        longer += step
    padded = data[8 : 8 + length] + b" " * (longer - length)
    path.write_bytes(struct.pack("<Q", longer) + padded + data[8 + length :])
    assert path.read_bytes().startswith(low_bytes)

    assert load_artifact(path).info.class_names == tiny.CLASS_NAMES


# Files that are none


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == "cannot be read: No such file or directory"


def test_a_folder_is_named_as_one(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "is a folder, not a file"


def test_what_is_no_ordinary_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "is not a regular file"
    assert refusal(Path("/dev/zero")) == "is not a regular file"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_file_is_named(path: Path) -> None:
    path.chmod(0)
    assert refusal(path) == "cannot be read: Permission denied"


def test_links_that_lead_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert refusal(tmp_path / "a") == "cannot be read: Too many levels of symbolic links"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_file_that_nobody_can_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("/proc/self/mem")  # an ordinary file, whose first page is none
    assert refusal(tmp_path / "a") == "cannot be read: Input/output error"


def test_a_file_far_too_large_is_refused_before_it_is_read(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(artifact_module.MAX_BYTES + 1)  # a hole; it takes no room on the disk
    assert refusal(path) == "is 1073741825 bytes long; at most 1073741824 are allowed"


# Tensors that do not fit


def with_value(name: str, value: float) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return edit


NOT_FINITE = "holds values that are not finite"
REFERENCE = ("latents", "labels", "images")
WRONG_TENSORS: list[tuple[Edit, str]] = [
    (with_value("main.0.weight", float("nan")), f"main.0.weight: {NOT_FINITE}"),
    (with_value("main.11.bias", float("inf")), f"main.11.bias: {NOT_FINITE}"),
    (with_value("main.3.running_mean", float("-inf")), f"main.3.running_mean: {NOT_FINITE}"),
    (with_value("main.6.running_var", -1e-3), "main.6.running_var: holds negative variances"),
    (lambda t: t.pop("main.0.bias"), "the tensor 'main.0.bias' is missing"),
    (
        lambda t: t.update(extra=torch.zeros(1)),
        "the tensor 'extra' does not belong to this network",
    ),
    (
        lambda t: t.update({"main.0.bias": torch.zeros(17)}),
        "main.0.bias: shape is [17], expected [16]",
    ),
    (
        lambda t: t.update({"main.0.weight": t["main.0.weight"].T.contiguous()}),
        "main.0.weight: shape is [12, 16], expected [16, 12]",
    ),
    (
        lambda t: t.update({"main.0.bias": torch.zeros(16).half()}),
        "main.0.bias: dtype is torch.float16, expected torch.float32",
    ),
    (
        lambda t: t.update({"main.3.num_batches_tracked": torch.tensor(1.0)}),
        "main.3.num_batches_tracked: dtype is torch.float32, expected torch.int64",
    ),
    (lambda t: t.clear(), "the tensor 'label_embedding.weight' is missing"),
    (lambda t: t.pop("onnx.float32"), "the tensor 'onnx.float32' is missing"),
    (
        lambda t: t.update({"label_embedding.weight": torch.zeros(5, 4)}),
        "label_embedding.weight: is float32 [5, 4], expected float32 [2, 3]",
    ),
    (
        lambda t: t.update({f"reference.{n}": t[f"reference.{n}"][:0] for n in REFERENCE}),
        "reference.labels: are not those of this network",
    ),
]


@pytest.mark.parametrize(("edit", "cause"), WRONG_TENSORS, ids=[c for _, c in WRONG_TENSORS])
def test_tensors_that_the_network_does_not_have_are_refused(
    tmp_path: Path, edit: Edit, cause: str
) -> None:
    path = tmp_path / "a.safetensors"
    deep = replace(tiny.NETWORK, hidden=(16, 32, 24, 8))  # its last layer is main.11
    tiny.artifact_file(path, network=deep)
    rewrite(path, tensors=edit, undigested=True)
    assert refusal(path) == cause


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E8M0", "F4", "C64", "BF16", "U16", "BOOL", "Q7"])
def test_tensors_of_any_dtype_that_a_header_may_name_are_refused(path: Path, dtype: str) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    bits = {"F4": 4, "C64": 64, "BF16": 16, "U16": 16}.get(dtype, 8)
    start, end = header["main.0.bias"]["data_offsets"]
    header["main.0.bias"].update(dtype=dtype, shape=[(end - start) * 8 // bits])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert "main.0.bias: dtype is" in refusal(path) or "is not a valid" in refusal(path)


# Descriptions that are wrong


def network(**change: object) -> Edit:
    return lambda it: it["network"].update(change)


WRONG_DESCRIPTIONS: list[tuple[Edit, str]] = [
    (lambda it: it.update(class_names=["left"]), "1 class names for 2 classes"),
    (lambda it: it.update(class_names=["a", "a"]), "class names repeat"),
    (lambda it: it.update(class_names=["a", ""]), "class_names.1: "),
    (lambda it: it.update(class_names=["a", "b" * 201]), "class_names.1: "),
    (lambda it: it.update(class_names=["a", 5]), "class_names.1: "),
    (lambda it: it.update(version=3), "version: "),
    (lambda it: it.update(graphs={"int4": []}), "graphs: "),
    (lambda it: it.update(graphs={"int8": []}), "the tensor 'onnx.int8' is missing"),
    (lambda it: it.update(format="other"), "format: "),
    (lambda it: it.update(value_range="[0, 1]"), "value_range: "),
    (lambda it: it.update(latent_prior="uniform"), "latent_prior: "),
    (lambda it: it.update(images_seen=-1), "images_seen: "),
    (lambda it: it.update(surprise=1), "surprise: "),
    (lambda it: it.update(training={"x": float("nan")}), "not JSON compliant"),
    (lambda it: it.update(certificate={"a": {"b": [float("inf")]}}), "not JSON compliant"),
    (lambda it: it.pop("network"), "network: "),
    (network(kind="transformer"), "network: Input tag 'transformer'"),
    (network(kind="conv"), "network.widths: "),
    (network(surprise=1), "network.surprise: "),
    (network(channels=2), "network.channels: "),
    (network(image_size=10**9), "network.image_size: "),
    (network(num_classes=10**12), "network.num_classes: "),
    (network(latent_dim=0), "network.latent_dim: "),
    (network(hidden=[]), "network.hidden: "),
    (network(hidden=[10**7]), "network.hidden.0: "),
    (network(hidden=[8192] * 17), "network.hidden: "),
    # As large as is allowed: two gigabytes of weights, for which no memory is taken.
    (network(hidden=[8192] * 16), "main.0.weight: shape is [16, 12]"),
]


@pytest.mark.parametrize(("edit", "cause"), WRONG_DESCRIPTIONS, ids=range(len(WRONG_DESCRIPTIONS)))
def test_a_wrong_description_is_refused_with_the_field(path: Path, edit: Edit, cause: str) -> None:
    rewrite(path, describe=edit, undigested=True)
    assert cause in refusal(path)


# Labels


def info(*names: str) -> ArtifactInfo:
    network = MLPGeneratorConfig(num_classes=len(names), channels=1, image_size=8)
    return ArtifactInfo(network=network, class_names=names, images_seen=0)


@pytest.mark.parametrize(
    ("text", "label"), [("zero", 0), ("two", 2), ("0", 0), ("2", 2), ("Bär 熊", 3), ("007", 7)]
)
def test_a_class_goes_by_its_name_or_its_index(text: str, label: int) -> None:
    names = ("zero", "one", "two", "Bär 熊", "four", "five", "six", "seven")
    assert info(*names).label(text) == label


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("sent", ["NFC", "NFD"])
def test_a_class_goes_by_every_spelling_of_its_name(stored: Form, sent: Form) -> None:
    classes = info("tea", unicodedata.normalize(stored, "café"))
    assert classes.label(unicodedata.normalize(sent, "café")) == 1


def test_a_name_wins_over_an_index_where_classes_are_named_by_digits() -> None:
    reversed_names = info("2", "1", "0")
    assert [reversed_names.label(text) for text in "012"] == [2, 1, 0]


@pytest.mark.parametrize(
    "text", ["3", "-1", "", " 1", "1_0", "+1", "1.0", "Zero", "٣", "²", "9" * 5000]
)
def test_what_is_no_class_is_answered_with_the_classes_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="is not a class") as caught:
        info("zero", "one", "two").label(text)
    message = str(caught.value)
    assert "an index from 0 to 2 or a name: zero, one, two" in message
    assert repr(text[:40])[:-1] in message
    assert len(message) < 200


def test_of_many_classes_only_the_first_are_named() -> None:
    with pytest.raises(ValueError, match=r"c18, c19, … \(100 in all\)$") as caught:
        info(*(f"c{i}" for i in range(100))).label("x")
    assert "c20" not in str(caught.value)

"""Clients for Node.js: OpenAI's own, and the AI SDK with any service of OpenAI's form."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import MODEL, LocalService, serve_here

PACKAGES = ("openai@7.59.0", "ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92")
CLIENTS = """
import OpenAI from "openai";
import { generateImage } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const [baseURL, parameters] = [process.argv[2], JSON.parse(process.argv[3])];
const openai = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const compatible = createOpenAICompatible({ name: "cgan", baseURL, apiKey: "any" });
/** Return images in base64 from the AI SDK. */
const generate = async (options) =>
  (await generateImage({ model: compatible.imageModel("mnist"), ...options })).images.map(
    (image) => image.base64,
  );
"""

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    with serve_here("--models", str(MODEL)) as running:
        yield running


@pytest.fixture(scope="module")
def packages(pytestconfig: pytest.Config) -> Path:
    """A folder with the packages, which later runs of the tests use again."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("npm")
    installed = folder / "installed.json"
    if not installed.exists() or json.loads(installed.read_text()) != list(PACKAGES):
        (folder / "package.json").write_text("{}")
        command = ["npm", "install", "--no-audit", "--no-fund", *PACKAGES]
        ended = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        if ended.returncode:
            pytest.skip(f"npm cannot install the packages: {ended.stderr.strip()[-300:]}")
        installed.write_text(json.dumps(PACKAGES))
    return folder


@pytest.fixture
def run(service: LocalService, packages: Path) -> Run:
    """Runs JavaScript with the clients in scope; returns the value of its last expression."""

    def run(expression: str, **parameters: Any) -> Any:
        script = packages / "script.mjs"
        script.write_text(f"{CLIENTS}\nconsole.log(JSON.stringify(await {expression}));\n")
        base_url = f"{service.client.base_url}/v1"
        command = ["node", str(script), base_url, json.dumps(parameters)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


def expected(service: LocalService, *indices: int, scale: int = 1) -> list[bytes]:
    query = f"label=7&seed=5&scale={scale}"
    return [service.client.post(f"/generate?{query}&index={each}").content for each in indices]


def test_the_client_of_openai_gets_images_and_links(service: LocalService, run: Run) -> None:
    response = run(
        "openai.images.generate(parameters)",
        model="mnist",
        prompt="a seven",
        n=2,
        seed=5,
        size="512x512",
        quality="hd",
        style="vivid",
        user="someone",
    )
    files = expected(service, 0, 1, scale=16)
    assert [base64.b64decode(each["b64_json"]) for each in response["data"]] == files
    assert [service.client.get(each["url"]).content for each in response["data"]] == files
    assert response["size"] == "448x448"


def test_the_client_of_openai_is_told_what_is_wrong(run: Run) -> None:
    error = run(
        "openai.images.generate(parameters).catch(({ status, message, param }) =>"
        " ({ status, message, param }))",
        model="mnist",
        prompt="a seven",
        output_format="webp",
    )
    assert (error["status"], error["param"]) == (400, "output_format")
    assert "must be png" in error["message"]


@pytest.mark.parametrize("response_format", ["url", "b64_json", None])
def test_the_ai_sdk_gets_the_images(
    service: LocalService, run: Run, response_format: str | None
) -> None:
    found = run(
        "generate(parameters)",
        prompt="a seven",
        n=2,
        providerOptions={"cgan": {"seed": 5, "response_format": response_format}},
    )
    assert [base64.b64decode(each) for each in found] == expected(service, 0, 1)


def test_the_ai_sdk_repeats_images_of_a_seed_unless_it_asks_for_all_at_once(run: Run) -> None:
    asked: dict[str, Any] = {"prompt": "a seven", "n": 12, "providerOptions": {"cgan": {"seed": 5}}}
    assert len(set(run("generate(parameters)", **asked))) == 10
    assert len(set(run("generate(parameters)", **asked, maxImagesPerCall=12))) == 12

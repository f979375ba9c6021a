"""The playground in a real Chromium, on a real service."""

import base64
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.support.numbered import serve_numbered_classes
from tests.support.proxy import prefixed
from tests.support.serving import LocalService, ServiceProcess, serve_here
from tests.support.tiny_training import artifact_file

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECRET = "a-secret-of-16-characters"  # of the service that these tests start

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture(scope="module")
def limited() -> Iterator[ServiceProcess]:
    """A service with a key for 1 image a second, and a queue that fills quickly."""
    keys = f"visitor:{SECRET}:1,flood:{SECRET}-of-the-flood"
    with ServiceProcess(
        "--api-keys", keys, "--burst-images", "1024", "--max-queue-images", "1024"
    ) as one:
        yield one


@pytest.fixture(scope="module")
def numbered() -> Iterator[LocalService]:
    with serve_numbered_classes() as one:
        yield one


@pytest.fixture
def visit(browser: Browser, service: ServiceProcess) -> Iterator[Open]:
    """Opens the page in a context of its own; nothing may have gone wrong there in the end."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []
    hosts: set[str] = set()

    def open_page(path: str = "/", *, at: str | None = None, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(f"{at or service.client.base_url}{path}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    refusals = [line for line in wrong if "status of 429" in line or "ERR_INTERNET" in line]
    assert wrong == refusals
    assert all(host.startswith("127.0.0.1") for host in hosts - {""})


def images(page: Page) -> Any:
    return page.locator("#grid img")


def generate(page: Page) -> None:
    """Press the button, and wait for what comes of it."""
    with page.expect_response(re.compile(r"/generate\?")):
        page.get_by_role("button", name="Generate").click()
    expect(page.locator("#grid")).not_to_have_class("old")


def only(page: Page, *names: str) -> None:
    """Pick some classes and no others."""
    for chip in page.locator("#chips input").all():
        chip.uncheck()
    for name in names:
        page.get_by_role("checkbox", name=name, exact=True).check()


def png(image: Any) -> bytes:
    return base64.b64decode(image.get_attribute("src").partition(",")[2])


def test_it_shows_images_of_every_class_at_once(visit: Open) -> None:
    page = visit()
    expect(images(page)).to_have_count(20)
    expect(page.locator("#status")).to_contain_text("20 images of seed")
    assert images(page).first.get_attribute("alt") == "zero, number 0"


def test_what_is_picked_is_what_the_api_makes(visit: Open, service: ServiceProcess) -> None:
    page = visit()
    expect(images(page)).to_have_count(20)
    only(page, "seven", "three")
    page.get_by_label("Images per class").fill("3")
    page.get_by_role("textbox", name="Seed").fill("18446744073709551615")
    generate(page)
    expect(images(page)).to_have_count(6)
    seed = 2**64 - 1
    query = f"label=7&index=2&seed={seed}&model=mnist"
    assert png(images(page).last) == service.client.post(f"/generate?{query}").content
    assert "label=three&label=seven&n=3&seed=18446744073709551615" in page.url


def test_another_model_has_other_classes(visit: Open) -> None:
    page = visit()
    page.get_by_label("Model", exact=True).select_option("fashion-mnist")
    only(page, "ankle-boot")
    generate(page)
    expect(images(page)).to_have_count(2)
    assert images(page).first.get_attribute("alt") == "ankle-boot, number 0"
    expect(page.get_by_text("fashion-mnist has seen")).to_be_visible()


@pytest.mark.parametrize("mode", ["Mix", "Interpolate"])
def test_a_permanent_link_gives_the_image_that_is_shown(
    visit: Open, service: ServiceProcess, mode: str
) -> None:
    page = visit()
    page.get_by_role("radio", name=mode).check()
    if mode == "Mix":
        page.get_by_label("From", exact=True).select_option("three")
        page.get_by_label("To", exact=True).select_option("eight")
        page.get_by_role("spinbutton", name="Images").fill("5")
    else:
        page.get_by_label("Class", exact=True).select_option("seven")
        page.get_by_label("To seed").fill("18446744073709551614")
        page.get_by_label("Steps").fill("5")
    page.get_by_label("Variety").fill("0.6")
    generate(page)
    expect(images(page)).to_have_count(5)
    page.locator("#grid button").nth(2).click()
    link = page.get_by_role("dialog").get_by_role("link").get_attribute("href")
    assert link is not None
    assert "model=mnist@sha256:" in link
    answer = service.client.get(link)
    assert "immutable" in answer.headers["Cache-Control"]
    assert answer.content == png(images(page).nth(2))


@pytest.mark.parametrize(("model", "number"), [("ten", "10"), ("ten", "1"), ("even", "2")])
@pytest.mark.parametrize("mode", ["Classes", "Mix", "Interpolate"])
def test_a_class_whose_name_is_a_number_is_the_one_that_is_shown(
    visit: Open, numbered: LocalService, model: str, number: str, mode: str
) -> None:
    page = visit(f"/?model={model}&seed=5", at=str(numbered.client.base_url))
    page.get_by_role("radio", name=mode).check()
    if mode == "Classes":
        only(page, number)
    elif mode == "Mix":
        page.get_by_label("From", exact=True).select_option(label=number)
        page.get_by_label("Weight of the second class").fill("0")
    else:
        page.get_by_label("Class", exact=True).select_option(label=number)
    generate(page)
    shown = images(page).nth(1)
    words = {"Classes": number, "Mix": f"100 % {number}", "Interpolate": number}[mode]
    expect(shown).to_have_attribute("alt", re.compile(f"^{words},"))
    page.locator("#grid button").nth(1).click()
    link = page.get_by_role("dialog").get_by_role("link").get_attribute("href")
    assert link is not None
    assert f"mix={number}:1" in link if mode == "Mix" else f"label={number}&" in link
    assert numbered.client.get(link).content == png(shown)
    command = page.locator("#curl").inner_text()
    assert f"'{link}'" in command
    before = png(shown)
    page.reload()  # its address alone gives the same images again
    expect(images(page).nth(1)).to_have_attribute("alt", re.compile(f"^{words},"))
    assert png(images(page).nth(1)) == before


def test_an_image_enlarges_crisply_with_all_that_it_is_made_from(visit: Open) -> None:
    page = visit(
        "/?model=mnist&label=7&n=3&seed=4", permissions=["clipboard-read", "clipboard-write"]
    )
    page.locator("#grid button").nth(1).click()
    dialog = page.get_by_role("dialog", name="seven, number 1")
    large = dialog.get_by_role("img", name="seven, number 1")
    assert large.evaluate("each => getComputedStyle(each).imageRendering") == "pixelated"
    box = large.bounding_box()
    assert box is not None
    assert box["width"] > 300
    recipe = dialog.locator("#recipe").inner_text().split()
    assert recipe[-4:] == ["seed", "4", "index", "1"]
    dialog.get_by_role("button", name="Copy command").click()
    expect(dialog.get_by_role("status")).to_have_text("Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    assert re.fullmatch(r"curl 'http://127\S+/generate\?model=\S+&index=1' -o image.png", command)
    dialog.get_by_role("button", name="Next").click()
    expect(page.get_by_role("dialog", name="seven, number 2")).to_be_visible()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Next")).to_be_disabled()
    dialog.get_by_role("button", name="Close").click()
    expect(page.locator("#grid button").nth(2)).to_be_focused()


def test_a_drawn_seed_can_be_kept(visit: Open) -> None:
    page = visit("/?model=mnist&label=7&n=2")
    first = png(images(page).first)
    page.get_by_role("button", name="Keep this seed").click()
    assert page.get_by_role("textbox", name="Seed").input_value().isdecimal()
    generate(page)
    assert png(images(page).first) == first
    page.get_by_role("textbox", name="Seed").fill("")
    generate(page)
    expect(page.get_by_role("button", name="Keep this seed")).to_be_visible()
    assert png(images(page).first) != first


def test_a_link_restores_what_was_asked_for_and_so_does_going_back(visit: Open) -> None:
    page = visit("/?model=mnist&mix=3:0.25&mix=8:0.75&n=4&seed=9&truncation=0.5")
    expect(images(page)).to_have_count(4)
    assert page.get_by_label("Weight of the second class").input_value() == "0.75"
    assert page.get_by_label("Variety").input_value() == "0.5"
    page.get_by_role("spinbutton", name="Images").fill("2")
    generate(page)
    expect(images(page)).to_have_count(2)
    page.go_back()
    expect(images(page)).to_have_count(4)
    assert page.get_by_role("spinbutton", name="Images").input_value() == "4"


def test_it_says_where_the_time_went(visit: Open) -> None:
    page = visit()
    for stage in ("queue", "forward", "encode", "total"):
        expect(page.locator(f"#ms-{stage}")).to_have_text(re.compile(r"^[\d.]+ ms$"))


def test_it_shows_the_certificate_with_samples_of_each_class(
    visit: Open, service: ServiceProcess
) -> None:
    page = visit()
    table = page.locator("#per-class tbody tr")
    expect(table).to_have_count(10)
    expect(table.nth(7).locator("img")).to_have_count(12)
    models = service.client.get("/models").json()["models"]
    (certificate,) = [each["certificate"] for each in models if each["default"]]
    share = 100 * certificate["generated"]["gan_test_per_class"][7]
    expect(table.nth(7)).to_contain_text(f"{share:.1f} %")
    expect(page.locator("#metrics")).to_contain_text(f"{certificate['generated']['coverage']:.3f}")


def test_it_says_that_a_certificate_is_brief(
    visit: Open, service: ServiceProcess, tmp_path: Path
) -> None:
    models = service.client.get("/models").json()["models"]
    (full,) = [each["certificate"] for each in models if each["default"]]
    certificate = {**full, "images": 1200, "brief": "1,200 images; GAN-train with 1 seed"}
    artifact_file(tmp_path / "a.safetensors", certificate=certificate)
    with serve_here("--models", str(tmp_path)) as local:
        page = visit(at=str(local.client.base_url))
        expect(page.locator("#about")).to_contain_text(
            "1,200 generated images were evaluated, fewer than for a full certificate."
        )


def test_without_a_certificate_it_shows_the_estimate_of_the_run(
    visit: Open, tmp_path: Path
) -> None:
    estimate = {"gan_test": 0.953, "coverage": 0.104, "frechet_distance": 2.3, "images": 3000}
    training = {"dataset": "letters", "quick_metrics": estimate}
    artifact_file(tmp_path / "a.safetensors", training=training, images_seen=12_800)
    with serve_here("--models", str(tmp_path)) as service:
        page = visit(at=str(service.client.base_url))
        expect(page.locator("#about")).to_have_text(
            "a has seen 12,800 real images of letters. Estimated during training, from 3,000 "
            "generated images against training images; not a certificate."
        )
        for table, columns in (("metrics", 2), ("per-class", 2)):
            expect(page.locator(f"#{table} thead th:visible")).to_have_count(columns)
            expect(page.locator(f"#{table} tbody tr").first.locator("th, td")).to_have_count(
                columns
            )
        expect(page.locator("#metrics tbody")).to_contain_text("(GAN-test)95.3 %Coverage0.104")
        expect(page.locator("#per-class tbody tr").nth(1).locator("img")).to_have_count(12)


def test_a_model_without_any_measurement_has_no_section_on_quality(
    visit: Open, numbered: LocalService
) -> None:
    page = visit(at=str(numbered.client.base_url))
    expect(images(page)).not_to_have_count(0)
    expect(page.locator("#certificate")).to_be_hidden()


def test_it_can_be_used_by_keyboard_alone(visit: Open) -> None:
    page = visit("/?model=mnist&label=0&n=1&seed=1")
    expect(images(page)).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the images")).to_be_focused()
    for _ in range(3):
        page.keyboard.press("Tab")  # two links, and the model
    page.keyboard.press("Tab")
    expect(page.get_by_role("radio", name="Classes")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # zero, off
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # one, on
    focus = page.evaluate("getComputedStyle(document.activeElement.nextSibling).outlineStyle")
    assert focus == "solid"
    page.keyboard.press("Enter")
    expect(images(page).first).to_have_attribute("alt", "one, number 0")
    page.locator("#grid button").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="one, number 0")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator("#grid button")).to_be_focused()


def test_every_control_has_a_name(visit: Open) -> None:
    page = visit("/?model=mnist&label=7&n=2&seed=1")
    expect(images(page)).to_have_count(2)
    named = 0
    for show in ("Mix", "Interpolate", "Classes", "dialog"):
        if show == "dialog":
            page.locator("#grid button").first.click()
        else:
            page.get_by_role("radio", name=show).check()
        session = page.context.new_cdp_session(page)
        for node in session.send("Accessibility.getFullAXTree")["nodes"]:
            properties = {
                each["name"]: each["value"].get("value") for each in node.get("properties", ())
            }
            if properties.get("focusable") and node["role"]["value"] != "RootWebArea":
                assert node["name"]["value"], node
                named += 1
    assert named > 60


def test_wrong_input_is_said_in_words(visit: Open) -> None:
    page = visit()
    expect(images(page)).to_have_count(20)
    only(page)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text("Pick at least one class.")
    expect(page.get_by_role("checkbox", name="zero")).to_be_focused()
    page.context.set_offline(True)
    only(page, "one")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    generate(page)
    expect(page.get_by_role("alert")).to_be_hidden()


CONTRAST = """selector => {
  const numbers = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = colour => {
    const [r, g, b] = numbers(colour).map(each => {
      const part = each / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let behind = element;
  const clear = each => /rgba\\(.*, 0\\)|transparent/.test(getComputedStyle(each).backgroundColor);
  while (clear(behind)) behind = behind.parentElement;
  const [light, dark] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
    .map(luminance).sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_read_in_both_themes(visit: Open, theme: str) -> None:
    page = visit(color_scheme=theme)
    expect(images(page)).to_have_count(20)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(paper.removeprefix("rgb(").split(",")[0]) > 128) == (theme == "light")
    for selector in ("h1", ".help", "#status", "#generate", "#keep", "nav a", "#chips span", "dt"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector


def test_it_fits_a_phone(visit: Open) -> None:
    page = visit(viewport={"width": 360, "height": 740})
    expect(images(page)).to_have_count(20)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#grid button").first.click()
    box = page.get_by_role("dialog").bounding_box()
    assert box is not None
    assert box["width"] <= 360
    close = page.get_by_role("button", name="Close").bounding_box()
    assert close is not None
    assert close["height"] >= 24  # WCAG 2.2, 2.5.8


def test_it_works_behind_a_prefix(visit: Open, service: ServiceProcess) -> None:
    with prefixed(str(service.client.base_url)) as address:
        page = visit("?model=mnist&label=7&n=2", at=address)
        expect(images(page)).to_have_count(2)
        page.locator("#grid button").first.click()
        link = page.get_by_role("dialog").get_by_role("link").get_attribute("href")
        assert link is not None
        assert link.startswith(f"{address}generate?")
        assert f"curl '{address}generate?" in page.get_by_role("dialog").inner_text()
        assert httpx.get(link).headers["Content-Type"] == "image/png"


def test_the_documentation_tries_requests_out_behind_a_prefix(
    visit: Open, service: ServiceProcess
) -> None:
    with prefixed(str(service.client.base_url)) as address:
        page = visit("docs", at=address)
        page.locator("#operations-default-models_models_get").click()
        page.get_by_role("button", name="Try it out").click()
        with page.expect_response(f"{address}models") as found:
            page.get_by_role("button", name="Execute").click()
        assert found.value.status == 200


def test_a_key_is_the_password_and_its_limit_is_counted_down(
    visit: Open, limited: ServiceProcess
) -> None:
    credentials = {"username": "anybody", "password": SECRET}
    at = str(limited.client.base_url)
    page = visit("/?model=mnist&label=7&n=100", at=at, http_credentials=credentials)
    expect(images(page)).to_have_count(100)
    only(page, *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight"))
    generate(page)
    alert = page.get_by_role("alert")
    expect(alert).to_have_text(re.compile(r"Rate limited\. Retry in \d+ s\."))
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    before = alert.inner_text()
    expect(alert).not_to_have_text(before)  # it counts
    expect(images(page)).to_have_count(100)  # what was there stays


def test_a_full_queue_is_said_in_words(visit: Open, limited: ServiceProcess) -> None:
    stop = threading.Event()

    def flood() -> None:
        with httpx.Client(
            base_url=limited.client.base_url,
            headers={"Authorization": f"Bearer {SECRET}-of-the-flood"},
            timeout=60,
        ) as client:
            while not stop.is_set():
                client.post("/generate?label=1&n=1024&format=npz&model=fashion-mnist")

    threads = [threading.Thread(target=flood) for _ in range(3)]
    credentials = {"username": "anybody", "password": f"{SECRET}-of-the-flood"}
    page = visit(at=str(limited.client.base_url), http_credentials=credentials)
    expect(images(page)).to_have_count(20)
    page.get_by_label("Images per class").fill("100")
    for thread in threads:
        thread.start()
    try:
        with page.expect_response(lambda answer: answer.status == 429, timeout=60_000):
            while True:
                page.get_by_role("button", name="Generate").click()
                page.wait_for_timeout(50)
                if page.get_by_role("alert").is_visible():
                    break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    expect(page.get_by_role("alert")).to_contain_text("Overloaded")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=20_000)
    generate(page)
    expect(images(page)).to_have_count(1000)

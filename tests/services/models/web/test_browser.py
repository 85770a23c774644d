"""The page in a real browser: a rollout watched to its end, a rollback pressed, an image tried."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from pollard.client import AsyncModelsClient, AsyncVisionClient
from pollard.services.inference.main import build_server as build_inference
from pollard.services.inference.settings import InferenceSettings
from pollard.services.models.main import build_server as build_manager
from pollard.services.models.settings import ModelsSettings
from pollard.services.preprocess.main import build_server as build_preprocess
from pollard.services.preprocess.settings import PreprocessSettings

# One suite and one browser for all: they take longer to start than the tests to run.
pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "colours"
MAX_PAGE_BYTES = 200_000
SECONDS = 30_000.0
"""Longest wait for anything to be seen, in milliseconds; nothing takes a tenth of it."""

CONTRASTS = """
() => {
  const parse = (text) => {
    const part = text.match(/[\\d.]+/g).map(Number);
    return part.length < 4 ? [...part, 1] : part;
  };
  const light = (color) => {
    const [r, g, b] = color.map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest(".hidden, .skip, svg, option")) continue;
    let behind = element;
    while (behind && parse(getComputedStyle(behind).backgroundColor)[3] === 0) {
      behind = behind.parentElement;
    }
    const back = behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(style.color)), light(parse(back))].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24;
    const ratio = (a + 0.05) / (b + 0.05);
    const words = node.data.trim().slice(0, 40);
    if (ratio < (large ? 3 : 4.5)) found.push(`${words}: ${ratio.toFixed(2)}`);
  }
  return found;
}
"""
"""What is written with too little contrast (WCAG 2, level AA)."""

UNNAMED = """
() => [...document.querySelectorAll("input:not([type=hidden]), select, button, a, iframe")]
  .filter((element) => element.checkVisibility({ visibilityProperty: true }))
  .filter((element) => !(element.labels && element.labels.length) && !element.textContent.trim()
    && !element.getAttribute("aria-label") && !element.title)
  .map((element) => element.outerHTML.slice(0, 120))
"""
"""What can be used and has no name that can be read out."""

CUT_OFF = """
() => [...document.querySelectorAll("main input")]
  .filter((element) => element.value && element.checkVisibility({ visibilityProperty: true }))
  .filter((element) => element.scrollWidth > element.clientWidth)
  .map((element) => `${element.name}: ${element.value}`)
"""
"""Fields that are too narrow for what stands in them."""


@dataclass
class World:
    """Three services, and where they are reached."""

    manager: Any
    inference: Any
    preprocess: Any
    models: AsyncModelsClient
    vision: AsyncVisionClient
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return str(self.manager.http.url)

    @contextlib.asynccontextmanager
    async def traffic(self, image: bytes) -> AsyncIterator[None]:
        """Keep images coming."""

        async def ask() -> None:
            while True:
                await self.vision.predict(image, MODEL)

        asking = [asyncio.create_task(ask()) for _ in range(2)]
        try:
            yield
        finally:
            for task in asking:
                task.cancel()
            ended = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(
    tmp_path_factory: pytest.TempPathFactory, make_colours: Any
) -> AsyncIterator[World]:
    """Two revisions of a classifier, a detector and a segmenter, served by real servers."""
    root: Path = tmp_path_factory.mktemp("world")
    manager = build_manager(
        ModelsSettings(store=root / "store", port=0, drain_seconds=0.2, report_interval_seconds=0.2)
    )
    await manager.start()
    shared: dict[str, Any] = {"port": 0, "manager": manager.address}
    inference = build_inference(
        InferenceSettings.load(
            {**shared, "server_id": "i1", "cache_dir": root / "i1", "memory_headroom_bytes": 0}
        )
    )
    await inference.start()
    preprocess = build_preprocess(
        PreprocessSettings.load(
            {**shared, "server_id": "p1", "cache_dir": root / "p1", "decode_workers": 1}
        )
    )
    await preprocess.start()
    report = b"<!doctype html><title>r</title><h1>Fine</h1><script>document.title='ran'</script>"
    async with (
        AsyncModelsClient(manager.address) as models,
        AsyncVisionClient(preprocess.address) as vision,
    ):

        async def register(name: str, task: str) -> None:
            first = make_colours(root / f"{task}-1", task, report=report)
            await models.push(first.path, name)
            await models.push(make_colours(root / f"{task}-2", task, turned=True).path, name)
            await models.set_alias(name, "production", 1)

        await asyncio.gather(
            register(MODEL, "classification"),
            register("detection", "detection"),
            register("segmentation", "segmentation"),
        )
        await models.set_alias("detection", "canary", 2)
        yield World(manager, inference, preprocess, models, vision)
    await preprocess.stop(1.0)
    await inference.stop(1.0)
    await manager.stop(1.0)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Any]:
    """Chromium, without a window."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    library = pytest.importorskip("playwright.async_api", reason="pip install playwright")
    async with library.async_playwright() as started:
        # Its sandbox needs rights that root in a container does not have.
        made = await started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        await made.close()


@dataclass
class Tab:
    """A page with what it loaded and complained about."""

    page: Any
    asked: list[str] = field(default_factory=list)
    received: list[Any] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    async def see(self, text: str, within: str = "main") -> None:
        await self.page.locator(within, has_text=text).first.wait_for(timeout=SECONDS)

    async def confirm(self, button: str, sure: str) -> None:
        """Press a button that asks once more, and say yes, both by keyboard."""
        await self.page.get_by_role("button", name=button).focus()
        await self.page.keyboard.press("Enter")
        # What is asked has the focus.
        await self.page.locator(f"[popover]:popover-open button:focus:has-text({sure!r})").wait_for(
            timeout=SECONDS
        )
        await self.page.keyboard.press("Enter")


@pytest_asyncio.fixture(loop_scope="module")
async def tab(browser: Any, world: World) -> AsyncIterator[Tab]:
    """A tab that must not complain, and must not ask any other host."""
    context = await browser.new_context(base_url=world.url, viewport={"width": 1280, "height": 800})
    made = Tab(await context.new_page())
    made.page.on("request", lambda request: made.asked.append(request.url))
    made.page.on("response", lambda response: made.received.append(response))
    made.page.on(
        "console",
        lambda message: message.type == "error" and made.complaints.append(message.text),
    )
    made.page.on("pageerror", lambda error: made.complaints.append(str(error)))
    yield made
    assert made.complaints == []
    assert all(url.startswith((world.url + "/", "blob:", "data:")) for url in made.asked)
    await context.close()


async def test_a_rollout_is_started_and_watched_to_its_end(
    world: World, tab: Tab, picture: bytes
) -> None:
    await tab.page.goto(f"/models/{MODEL}/revisions/2")
    await tab.page.get_by_label("Steps").fill("20, 100")
    await tab.page.get_by_label("Hold each for").fill("0.5")
    await tab.page.get_by_label("Requests in each").fill("30")
    await tab.page.get_by_role("button", name="Start rollout").click()
    await tab.page.wait_for_url("**/rollouts/1")
    await tab.page.evaluate("window.loadedOnce = true")
    # Nothing is asked yet, so the step lasts until it was seen, however slow the browser is.
    await tab.see("Canary, 20")
    async with world.traffic(picture):
        await tab.see("requests failed", ".gates")
        await tab.see("Promoted", ".head .chip")
    # All of it came live: the page was never loaded again.
    assert await tab.page.evaluate("window.loadedOnce")
    assert await tab.page.locator(".steps .done").count() == 3
    await tab.see("all requests go to revision 2", ".events")
    await tab.confirm("Roll back to 1…", "Roll back")
    await tab.page.wait_for_url(f"**/models/{MODEL}")
    await tab.see("every server sends requests to revision 1", ".events")
    alias = await world.models.alias(MODEL, "production")
    assert (alias.revision, alias.previous_revision) == (1, 2)


async def test_a_running_rollout_is_taken_back(world: World, tab: Tab, picture: bytes) -> None:
    before = len(await world.models.rollouts(MODEL))
    await world.models.start_rollout(MODEL, 2, steps=[50, 100], hold=3600)
    await tab.page.goto("/")
    card = tab.page.locator(".progress-card", has_text=MODEL)
    await card.get_by_role("link", name=MODEL).click()
    async with world.traffic(picture):
        await tab.see("Canary, 50", ".head .chip")
        await tab.page.get_by_role("button", name="Pause").click()
        await tab.see("Paused", ".head .chip")
        await tab.page.get_by_role("button", name="Resume").click()
        await tab.see("Canary, 50", ".head .chip")
        # A question can be left without an answer.
        await tab.page.get_by_role("button", name="Promote…").click()
        await tab.page.keyboard.press("Escape")
        await tab.page.locator("[popover]:popover-open").wait_for(state="detached")
        await tab.confirm("Roll back…", "Roll back")
        await tab.see("Rolled back", ".head .chip")
    found = await world.models.rollouts(MODEL)
    assert len(found) == before + 1
    assert found[0].state == "ROLLED_BACK"
    assert (await world.models.alias(MODEL, "production")).revision == 1


async def test_a_refused_form_stays_live(world: World, tab: Tab) -> None:
    path = f"/models/{MODEL}/revisions/2"
    await tab.page.goto(path)
    await tab.page.get_by_label("Steps").fill("50, 20")
    await tab.page.get_by_role("button", name="Start rollout").click()
    await tab.see("growing shares", ".notice")
    assert await tab.page.get_by_label("Steps").input_value() == "50, 20"
    await tab.page.locator("#link-state", has_text="Live").wait_for(timeout=SECONDS)
    assert tab.page.url.endswith(path)
    # The browser tells of the status.
    assert all("400" in words for words in tab.complaints)
    tab.complaints.clear()


async def test_an_image_is_answered_by_two_revisions(
    world: World, tab: Tab, picture: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(picture)
    # What no alias leads to cannot be chosen.
    await tab.page.goto(f"/models/{MODEL}/try")
    assert await tab.page.locator("#right option[value='2']").is_disabled()
    await tab.page.goto("/models/detection/try")
    await tab.page.get_by_label("Choose an image").set_input_files(file)
    await tab.see("show the same", ".verdict")
    sides = tab.page.locator(".answer")
    assert await sides.nth(0).locator("rect.box").count() == 2
    box = sides.nth(0).locator("rect.box").first
    # The upper half of the picture, which has 64 × 48 pixels.
    size = [float(await box.get_attribute(name) or "nan") for name in ("x", "y", "width", "height")]
    assert size == pytest.approx([0, 0, 64, 24])
    await sides.nth(0).locator("text", has_text="red").wait_for()
    shown = sides.nth(0).locator("img").first
    assert await shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 48]
    await tab.page.goto("/models/segmentation/try?right=production")
    # As if it was dropped in.
    await tab.page.evaluate(
        """bytes => {
          const files = new DataTransfer();
          const image = new Uint8Array(bytes);
          files.items.add(new File([image], "dropped.png", { type: "image/png" }));
          dispatchEvent(new DragEvent("drop", { dataTransfer: files, cancelable: true }));
        }""",
        list(picture),
    )
    await tab.see("Both are answers of revision 1", ".verdict")
    mask = tab.page.locator(".answer .mask").first
    pixels = """image => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      const at = (y) => [...context.getImageData(9, y, 1, 1).data];
      return [5, 40].map((y) => at(y).map((value) => Math.round(value / 100)));
    }"""
    upper, lower = await mask.evaluate(pixels)
    assert upper[:3] == [2, 0, 0]
    assert lower[:3] == [0, 0, 2]
    # A file that is none is said to be none.
    file.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    await tab.page.get_by_label("Choose an image").set_input_files(file)
    await tab.page.locator(".answer .trouble").nth(1).wait_for(timeout=SECONDS)


async def test_an_image_is_answered_without_a_script(
    world: World, browser: Any, picture: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(picture)
    context = await browser.new_context(base_url=world.url, java_script_enabled=False)
    page = await context.new_page()
    await page.goto("/models/detection/try")
    await page.locator("#image").set_input_files(file)
    await page.get_by_role("button", name="Ask both").click()
    await page.locator(".verdict").wait_for(timeout=SECONDS)
    source = await page.locator(".answer img").first.get_attribute("src")
    assert source
    assert source.startswith("data:image/png;base64,")
    await context.close()


async def test_a_report_runs_apart_from_the_page(world: World, tab: Tab) -> None:
    await tab.page.goto(f"/models/{MODEL}/revisions/1")
    await tab.page.get_by_role("link", name="Report").click()
    frame = tab.page.frame_locator("iframe")
    await frame.get_by_role("heading", name="Fine").wait_for(timeout=SECONDS)
    inside = tab.page.frames[1]
    assert await inside.title() == "ran"
    reached = """async () => {
      const tries = {
        cookie: () => document.cookie,
        parent: () => parent.document.title,
        storage: () => localStorage.length,
        fetch: () => fetch("/"),
      };
      const found = [];
      for (const [name, what] of Object.entries(tries)) {
        try { await what(); found.push(name); } catch {}
      }
      return found;
    }"""
    assert await inside.evaluate(reached) == []
    # The browser tells what it has refused; that is what was wanted.
    assert tab.complaints
    assert all(
        "Content Security Policy" in words or "Fetch API" in words for words in tab.complaints
    )
    tab.complaints.clear()


async def test_no_other_page_can_frame_this_one(world: World, browser: Any) -> None:
    context = await browser.new_context()
    page = await context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    await page.set_content(f'<iframe src="{world.url}/models/{MODEL}"></iframe>')
    async with asyncio.timeout(SECONDS / 1000):
        while not any("frame-ancestors" in words for words in refused):
            await asyncio.sleep(0.02)
    assert "Pollard" not in await page.frames[1].content()
    await context.close()


async def test_every_page_can_be_read(world: World, browser: Any) -> None:
    context = await browser.new_context(base_url=world.url)
    page = await context.new_page()
    for path in (
        "/",
        f"/models/{MODEL}",
        f"/models/{MODEL}/revisions/2",
        f"/models/{MODEL}/revisions/1/report",
        f"/models/{MODEL}/rollouts/1",
        "/models/detection/try",
        "/fleet",
        "/log",
        "/models/none",
    ):
        await page.goto(path)
        assert await page.evaluate(UNNAMED) == [], path
        for landmark in ("banner", "main"):
            assert await page.get_by_role(landmark).count() == 1, path
        assert await page.get_by_role("heading", level=1).count() == 1, path
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.textContent") == "Skip to content"
        for colours in ("light", "dark"):
            await page.emulate_media(color_scheme=colours, reduced_motion="reduce")
            assert await page.evaluate(CONTRASTS) == [], (path, colours)
        for width in (400, 1280):
            await page.set_viewport_size({"width": width, "height": 800})
            wider = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wider <= 0, (path, width)
            assert await page.evaluate(CUT_OFF) == [], (path, width)
    await context.close()


async def test_a_page_weighs_little_and_keeps_its_colours(world: World, tab: Tab) -> None:
    for path in ("/", f"/models/{MODEL}", f"/models/{MODEL}/rollouts/1", "/fleet"):
        tab.received.clear()
        await tab.page.goto(path)
        await tab.page.locator("#link-state", has_text="Live").wait_for(timeout=SECONDS)
        weights = [
            len(await answer.body())
            for answer in tab.received
            if "event-stream" not in answer.headers["content-type"]
        ]
        assert 0 < sum(weights) <= MAX_PAGE_BYTES, path
    button = tab.page.get_by_role("button", name="Colours")
    await button.click()
    await button.click()
    assert await tab.page.locator("html").get_attribute("data-theme") == "dark"
    await tab.page.goto("/log")
    assert await tab.page.locator("html").get_attribute("data-theme") == "dark"

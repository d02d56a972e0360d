"""The audit page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_audit import FRAMES, STEPS, write_fake_audit
from PIL import Image
from playwright.sync_api import sync_playwright

from fedkl.report.audit_page import write_audit_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",  # containers often have none to offer; the page is our own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 2'>\"'&"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    write_fake_audit(folder)
    return write_audit_page(folder)


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a page and, when the test is over, sees that nothing was loaded and nothing failed."""
    opened = []

    def visit(path: Path, **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        page = context.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: faults.append(request.url[:100]))
        page.goto(path.as_uri())
        opened.append((context, faults, path.as_uri()))
        return page

    yield visit
    for context, faults, url in opened:
        context.close()
        # data: is the page itself.
        assert [x for x in faults if x != url and not x.startswith("data:")] == []


def test_arrow_keys_move_every_frame_and_figure(visit: Any, page_file: Path) -> None:
    page = visit(page_file)
    film = page.locator("[data-film]").first
    slider = film.get_by_role("slider")
    view = film.locator("[data-track] svg.pic").first
    assert film.locator("output").inner_text() == f"iteration {STEPS[-1]}"
    assert view.get_attribute("viewBox") == f"{32 * (FRAMES - 1)} 0 32 32"
    last = film.locator("[data-ssim]").first.inner_text()
    slider.focus()
    page.keyboard.press("Home")
    assert film.locator("output").inner_text() == "iteration 0"
    assert view.get_attribute("viewBox") == "0 0 32 32"
    page.keyboard.press("ArrowRight")
    assert film.locator("output").inner_text() == f"iteration {STEPS[1]}"
    assert view.get_attribute("viewBox") == "32 0 32 32"
    assert film.locator("[data-ssim]").first.inner_text() < last
    assert slider.get_attribute("aria-valuetext").startswith(f"iteration {STEPS[1]}, SSIM 0.")
    marker = film.locator("[data-now]").first
    assert 46 < float(marker.get_attribute("x1")) < 100


def test_play_runs_to_the_end(visit: Any, page_file: Path) -> None:
    page = visit(page_file)
    film = page.locator("[data-film]").first
    slider = film.get_by_role("slider")
    slider.fill(str(FRAMES - 3))
    film.get_by_role("button", name="Play").click()
    film.get_by_role("button", name="Pause").wait_for()
    film.get_by_role("button", name="Play").wait_for(timeout=5000)
    assert slider.input_value() == str(FRAMES - 1)


def test_one_film_is_shown_and_the_other_can_be_chosen(visit: Any, page_file: Path) -> None:
    page = visit(page_file)
    films = page.locator("[data-film]")
    assert [films.nth(i).is_visible() for i in range(films.count())] == [True, False]
    page.get_by_label("Attack and victim").select_option("1")
    assert [films.nth(i).is_visible() for i in range(films.count())] == [False, True]


def ground(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize("first, name", [("light", "dark"), ("dark", "light")])
def test_theme_follows_the_system_and_the_button(
    first: str, name: str, visit: Any, page_file: Path
) -> None:
    page = visit(page_file, color_scheme=first)
    before = ground(page)
    page.get_by_role("button", name=f"Use the {name} theme").click()
    after = ground(page)
    assert before != after
    page.emulate_media(color_scheme=name)
    assert ground(page) == after
    page.reload()
    assert ground(page) == after
    page.emulate_media(media="print")
    assert ground(page) == "rgb(255, 255, 255)"


def test_pictures_have_pixels(visit: Any, page_file: Path) -> None:
    page = visit(page_file)
    shot = page.locator(".hero svg.pic").first.screenshot()
    assert len(Image.open(io.BytesIO(shot)).convert("RGB").getcolors(100_000)) > 3


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_fits_the_window(width: int, visit: Any, page_file: Path) -> None:
    page = visit(page_file, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_everything_can_be_reached_by_tab_and_in_order(visit: Any, page_file: Path) -> None:
    page = visit(page_file)
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.className") == "skip"
    tops, names = [], []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(f"{focused}.tagName")
        if name == "BODY":
            break
        names.append(name)
        if not page.evaluate(f"!!{focused}.closest('.top')"):
            tops.append(page.evaluate(f"{focused}.getBoundingClientRect().top + scrollY"))
    assert {"A", "BUTTON", "SUMMARY", "SELECT", "INPUT", "DIV", "PRE"} <= set(names)
    assert tops == sorted(tops)


def test_without_javascript_all_but_the_slider_is_there(visit: Any, page_file: Path) -> None:
    page = visit(page_file, java_script_enabled=False)
    assert page.locator("#theme").is_hidden()
    assert page.get_by_role("slider").count() == 0
    assert page.locator(".frames").first.is_visible()
    assert page.locator("[data-film]").nth(1).is_visible()
    assert page.get_by_role("heading", name="Yes: it leaks").is_visible()
    closed = page.locator("details.gallery").nth(1)
    closed.locator("summary").click()
    assert closed.locator("table").is_visible()


def test_prints_all_galleries_and_folds_them_again(visit: Any, page_file: Path) -> None:
    page = visit(page_file)
    opened = "document.querySelectorAll('details.gallery[open]').length"
    before = page.evaluate(opened)
    page.evaluate(
        f"addEventListener('beforeprint', () => {{document.body.dataset.seen = {opened} }})"
    )
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    assert page.evaluate("Number(document.body.dataset.seen)") == 3
    assert page.evaluate(opened) == before == 1


def test_nothing_hostile_runs(visit: Any, tmp_path: Path) -> None:
    audit = copy.deepcopy(write_fake_audit(tmp_path))
    audit["command"] = audit["data"] = EVIL
    audit["config"][EVIL] = EVIL
    audit["threats"][EVIL] = {"words": EVIL, EVIL: EVIL}
    for one in audit["pictures"]:
        one["label"] = EVIL
        one["attack"] = EVIL
    for one in audit["summary"]:
        one["attack"] = one["reason"] = EVIL
    audit["pictures"][0]["reconstruction"] = f"pictures/{EVIL}.png"
    (tmp_path / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    page = visit(write_audit_page(tmp_path))
    assert page.evaluate("window.evil") is None
    assert page.locator("img, script").count() == 1
    assert EVIL in page.locator("pre").inner_text()
    assert page.get_by_role("slider").first.get_attribute("aria-label").endswith(EVIL)

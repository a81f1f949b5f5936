"""The page in a real browser: nothing asked for, nothing blank, and the slider works."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from tome_export.artifact import Artifact
from tome_export.report.main import ReportRequest, report
from tome_export.runtime.merge_maps import merge_maps
from tome_export.visualize.draw import pixels_from_map

SLIDE = """value => {
  const slider = document.getElementById("layer");
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
}"""


PARTS = """() => {
  const names = "section, figure.drawing svg, .picture, .scroll, h1, .figures";
  return [...document.querySelectorAll(names)].map(part => {
    const box = part.getBoundingClientRect();
    const edges = [box.left, box.top, box.right, box.bottom].map(Math.round);
    return [...edges, part.outerHTML.slice(0, 200)];
  }).filter(([left, top, right, bottom]) => right > left && bottom > top);
}"""


def image_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def canvas_of(page, index: int = 0) -> np.ndarray:
    script = "i => document.querySelectorAll('canvas')[i].toDataURL()"
    return image_of(base64.b64decode(page.evaluate(script, index).partition(",")[2]))


def drawn(seen):
    seen.page.wait_for_selector(".gallery.drawn")
    return seen.page


def test_it_opens_without_an_error_or_a_request(look, page):
    for width in (1280, 390):
        seen = look(page, width)
        drawn(seen)
        seen.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        assert seen.problems == []
        assert {url.split(":")[0] for url in seen.requests} <= {"file", "data"}
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_the_slider_draws_what_inspect_draws(look, page, full, layer):
    from tome_export.data.samples import digits_test

    opened = drawn(look(page))
    opened.evaluate(SLIDE, layer + 1)
    artifact = Artifact.open(full)
    one = merge_maps(artifact, digits_test()[0][:1])[0]
    assert np.array_equal(canvas_of(opened), pixels_from_map(one, layer))
    tokens = artifact.manifest.tokens[layer]
    assert opened.inner_text("#state") == f"after layer {layer}: {tokens} tokens"
    assert opened.get_attribute("#layer", "aria-valuetext") == opened.inner_text("#state")
    assert opened.get_attribute("#state", "aria-live") == "polite"


def test_the_keyboard_and_the_button_step_through_the_layers(look, page):
    opened = drawn(look(page))
    last = canvas_of(opened)
    opened.focus("#layer")
    opened.keyboard.press("ArrowLeft")
    assert opened.inner_text("#state") == "after layer 4: 25 tokens"
    assert not np.array_equal(canvas_of(opened), last)
    opened.keyboard.press("Home")
    assert opened.inner_text("#state") == "before layer 0: 65 tokens"
    opened.click("#play")
    assert opened.inner_text("#state") == "after layer 0: 57 tokens"
    opened.locator("#state", has_text="layer 1").wait_for()
    opened.click("#play")
    assert opened.inner_text("#play") == "Play"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_part_of_it_is_blank(look, page, width, scheme):
    opened = drawn(look(page, width, color_scheme=scheme))
    parts = opened.evaluate(PARTS)
    assert len(parts) > 30
    whole = image_of(opened.screenshot(full_page=True)).astype(int)
    for left, top, right, bottom, what in parts:
        pixels = whole[top:bottom, left:right]
        background = np.median(pixels.reshape(-1, 3), axis=0)
        assert (np.abs(pixels - background).max(axis=2) > 24).mean() > 0.01, what


def test_text_in_charts_lies_within_them(look, page):
    script = """() => [...document.querySelectorAll(".chart")]
      .filter(svg => svg.getBoundingClientRect().width > 0)
      .flatMap(svg => {
        const frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("text")].map(text => {
          const box = text.getBoundingClientRect();
          return [text.textContent, box.left - frame.left, frame.right - box.right,
                  box.top - frame.top, frame.bottom - box.bottom, parseFloat(box.height)];
        });
      })"""
    for width in (1280, 390):
        found = drawn(look(page, width)).evaluate(script)
        assert len(found) > 60
        assert [one for one in found if min(one[1:5]) < -2] == []


def test_dark_mode_is_dark(look, page):
    light, dark = (
        image_of(drawn(look(page, color_scheme=scheme)).screenshot()).mean()
        for scheme in ("light", "dark")
    )
    assert light > 200
    assert dark < 80


def test_print_shows_still_pictures_and_no_controls(look, page):
    opened = drawn(look(page, 700))
    opened.emulate_media(media="print")
    assert not opened.is_visible(".controls")
    assert not opened.is_visible("canvas")
    assert not opened.is_visible(".chart.narrow >> nth=0")
    assert opened.is_visible(".picture svg >> nth=0")
    assert opened.inner_text(".static") == "After layer 5: 17 tokens"
    assert opened.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts_the_last_layer_is_there(look, page):
    opened = look(page, java_script_enabled=False).page
    assert opened.is_visible(".picture svg >> nth=0")
    assert opened.is_visible(".static")
    assert not opened.is_visible(".controls")


def test_a_page_without_pictures_has_no_script_error(look, built, tmp_path):
    output = tmp_path / "page.html"
    report(ReportRequest(built, output=output, samples=0))
    seen = look(output)
    seen.page.wait_for_timeout(100)
    assert seen.problems == []


def test_the_still_picture_is_that_of_the_slider(look, page):
    opened = drawn(look(page))
    opened.evaluate("window.scrollTo(0, 0)")
    figure = opened.locator(".picture").first
    moving = image_of(figure.screenshot()).astype(int)
    opened.add_style_tag(
        content=".picture canvas { display: none } .picture svg { display: block !important }"
    )
    still = image_of(figure.screenshot()).astype(int)
    assert (np.abs(moving - still).max(axis=2) > 60).mean() < 0.05
    assert json.loads(opened.locator("#gallery-data").text_content())["tokens"][-1] == 17

"""The page of demo_app.py: its HTML, its command line, and what a person does on it in a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import torch
from commands import fails, run_command
from tiny import tiny_model
from transformers import pipeline

from spidr_hf import SpidrFeatureExtractor, SpidrForAudioTokenization
from spidr_hf.data.manifests import read_manifest
from spidr_hf.examples import demo_app
from spidr_hf.examples.demo_page.recordings import Recording
from spidr_hf.examples.demo_page.unit_html import (
    STYLE,
    comparison_html,
    download_html,
    problem_html,
    timeline_html,
)
from spidr_hf.hub.loading import load_model
from spidr_hf.plots.palette import contrast
from spidr_hf.units.extractor import unit_layers

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1200,1400"
)


def recording(name="speech.wav", units=(5, 5, 9, 5)) -> Recording:
    return Recording(name, np.zeros(320 * len(units) + 80, np.float32), {3: np.array(units)})


def test_names_of_files_are_no_html():
    name = '"><img src=x onerror=alert(1)>.wav'
    for text in (
        timeline_html(recording(name), [3], "A"),
        problem_html(f"{name} is empty"),
        download_html({"file": name}, name),
    ):
        assert "<img src=x" not in text
        assert '"><img' not in text.replace('"><img src="data:image/jpeg', "")


def test_a_button_for_each_stretch():
    text = timeline_html(recording(), [3], "A")
    assert re.findall(r'data-unit="(\d+)" data-of="A" data-start="([\d.]+)" data-length="([\d.]+)"', text) == [
        ("5", "0.00", "0.04"),
        ("9", "0.04", "0.02"),
        ("5", "0.06", "0.02"),
    ]
    assert re.findall(r"<span( hidden)?>(\d+)</span>", text) == [("", "5"), (" hidden", "9"), (" hidden", "5")]
    assert re.findall(r'tabindex="(-?\d)"', text) == ["0", "-1", "-1"]  # one stop of the Tab key


def test_silence_is_remarked_upon():
    loud = Recording("a.wav", np.full(1_680, 0.5, np.float32), {3: np.array([5] * 5)})
    assert "no sound in this recording" in timeline_html(recording(), [3], "A")
    assert "no sound in this recording" not in timeline_html(loud, [3], "A")


def test_labels_can_be_read():
    """Every colour of text that the page sets, on what is behind it: 4.5 at least (WCAG 2, level AA)."""
    rules = re.findall(r"\{([^{}]*)\}", STYLE)
    pairs = [
        (text[1], behind[1])
        for rule in rules
        if (text := re.search(r"(?<![-\w])color: (#\w+)", rule)) and (behind := re.search(r"background: (#\w+)", rule))
    ]
    assert len(pairs) == 3 and min(contrast(*pair) for pair in pairs) >= 4.5
    assert "filter:" not in STYLE  # which would change what unit_colour promises
    pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")
    theme = demo_app.theme()

    def colour(name: str, mode: str) -> str:
        value = getattr(theme, f"{name}{mode}", None) or getattr(theme, name)
        return colour(value[1:], mode) if value.startswith("*") else value

    for mode in ("", "_dark"):
        for part in ("label", "title", "info"):
            behind = colour("block_background_fill" if part == "info" else f"block_{part}_background_fill", mode)
            assert contrast(colour(f"block_{part}_text_color", mode), behind) >= 4.5, (part, mode)


def test_models_are_named_by_their_folders(tmp_path):
    for name in ("runs/mine/final", "a/spidr", "b/spidr", "c/small"):
        (tmp_path / name).mkdir(parents=True)
    names = [str(tmp_path / name) for name in ("runs/mine/final", "a/spidr", "b/spidr", "c/small")]
    labels = ["mine/final", names[1], names[2], "small", "facebook/spidr-base"]
    names.append("facebook/spidr-base")
    assert demo_app.model_choices(names) == list(zip(labels, names, strict=True))


def test_comparison_shows_every_unit_once():
    text = comparison_html(recording(), recording("b.wav", (5, 8, 8, 7, 5)), 3)
    assert re.findall(r'data-unit="(\d+)" data-of="A"', text) == ["5", "9", "5"]
    assert re.findall(r'data-unit="(\d+)" data-of="B"', text) == ["5", "8", "7", "5"]
    assert "Edit distance 2<" in text and text.count("pair differs") == 2 and text.count('class="gap"') == 1
    assert "<strong>1</strong> of 4 different units are in both" in text


def test_command_line(tmp_path):
    fails(run_command("demo_app", "--model", tmp_path), "there is no config.json in it")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model whose units vary: its heads read what differs from the mean frame."""
    folder = tmp_path_factory.mktemp("page") / "model"
    model = tiny_model(num_hidden_layers=7)
    inputs = SpidrFeatureExtractor()(speech(0), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        layers = model.spidr.get_intermediate_outputs(**inputs)[4:]
        means = torch.stack([layer.mean((0, 1)) for layer in layers])
        model.heads.bias.copy_(-torch.einsum("kvh,kh->kv", model.heads.weight, means))
    model.save_pretrained(folder)
    SpidrFeatureExtractor().save_pretrained(folder)
    return folder


def speech(index: int) -> np.ndarray:
    return read_manifest(ROOT / "examples" / "data" / "manifest.csv").read(index)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two recordings, and files that are none."""
    folder = tmp_path_factory.mktemp("files")
    for name, index in (("first.wav", 0), ("second.wav", 5)):
        soundfile.write(folder / name, speech(index), 16_000)
    (folder / "text.txt").write_text("This is no sound.")
    (folder / "text.wav").write_text("This is no sound.\n" * 20)
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "short.wav", np.zeros(100), 16_000)
    soundfile.write(folder / "hour.flac", np.zeros(3_600 * 16_000, np.int16), 16_000)
    return folder


@contextmanager
def served(model: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The page's address and process; its temporary files lie in the folder `temporary`."""
    pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, temporary = folder / "page.log", folder / "temporary"
    temporary.mkdir()
    command = [sys.executable, ROOT / "examples" / "demo_app.py", "--model", model, "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            for _ in range(240):
                if "Running on local URL" in log.read_text():
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.terminate()
    assert "Traceback" not in log.read_text(), log.read_text()
    assert not any(temporary.iterdir())  # recordings are deleted when it stops


@pytest.fixture(scope="module")
def address(model, tmp_path_factory) -> Iterator[str]:
    with served(model, tmp_path_factory.mktemp("served")) as (address, _):
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_recordings_are_deleted_when_it_stops(number, model, files, tmp_path):
    with served(model, tmp_path) as (address, process):
        with (files / "first.wav").open("rb") as file:
            uploaded = httpx.post(f"{address}/gradio_api/upload", files={"files": file})
        assert Path(uploaded.json()[0]).is_relative_to(tmp_path / "temporary")
        process.send_signal(number)
        process.wait(60)


def test_a_refused_upload_is_removed_and_its_reason_stays(model, files, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")
    loaded = load_model(SpidrForAudioTokenization, str(model))
    update = next(each.fn for each in demo_app.page({"model": loaded}).fns.values() if each.name == "update")
    upload = Path(shutil.copy(files / "text.wav", tmp_path))
    kept = Path(shutil.copy(files / "first.wav", tmp_path))
    first = update("model", 6, False, str(upload), str(kept), {})
    assert "text.wav is no audio file" in first[2] and not upload.exists() and kept.exists()
    again = update("model", 7, True, str(upload), str(kept), first[-1])
    assert again[2] == first[2] and "(layer 7)" in again[3]
    layers = [int(layer) for layer in re.findall(r'class="layer"><span>layer (\d+)', again[3])]
    assert layers[0] == 7 and sorted(layers) == unit_layers(loaded[0].config) and 'class="layer"' not in first[3]


class Page:
    """The page in a browser, as a person meets it."""

    def __init__(self, driver, address: str):
        from selenium.webdriver.common.by import By

        self.driver, self.css = driver, By.CSS_SELECTOR
        driver.get(address)
        self.wait("#audio-A input[type=file]")

    def wait(self, selector: str, text: str = ""):
        """The first element of that selector, as soon as it is there and holds the text."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        def found(driver):
            return next((e for e in driver.find_elements(self.css, selector) if text in e.text), None)

        waiting = WebDriverWait(self.driver, 60, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(found, f"{selector} with {text!r}")

    def all(self, selector: str) -> list:
        return self.driver.find_elements(self.css, selector)

    def upload(self, letter: str, path: Path) -> None:
        self.wait(f"#audio-{letter} input[type=file]").send_keys(str(path))

    def units(self, letter: str) -> list[int]:
        """Units without repeats, as shown."""
        return [int(b.get_attribute("data-unit")) for b in self.all(f"#view-{letter} .tier button")]

    def foreign_requests(self) -> list[str]:
        """Addresses outside this machine that the page asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if url.startswith(("http", "ws")) and "//127.0.0.1" not in url]


@pytest.fixture
def page(address, tmp_path) -> Iterator[Page]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium or chromedriver is not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(switch)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Page(driver, address)
    finally:
        driver.quit()


def downloaded(folder: Path) -> dict:
    for _ in range(100):
        for path in folder.glob("*.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
            return content
        time.sleep(0.1)
    raise AssertionError("nothing was downloaded")


@pytest.mark.slow
def test_upload_change_of_layer_download_and_comparison(page, model, files, tmp_path):
    from selenium.webdriver.common.keys import Keys

    pipe = pipeline("speech-to-units", model=str(model), deduplicate=True, device="cpu")
    expected = {layer: [pipe(files / name, layer=layer) for name in ("first.wav", "second.wav")] for layer in (6, 7)}

    page.upload("A", files / "first.wav")
    page.wait("#view-A h3", "A: first.wav")
    assert page.units("A") == expected[6][0]["units"]

    # By keyboard alone: to the layer, one further, and back to the units.
    page.wait("#layer input").send_keys(Keys.ARROW_DOWN, Keys.ENTER)
    page.wait("#view-A p", "(layer 7)")
    assert page.units("A") == expected[7][0]["units"] != expected[6][0]["units"]
    first = page.wait("#view-A .tier button")
    first.send_keys(Keys.ARROW_RIGHT)
    chosen = page.driver.switch_to.active_element
    assert chosen.get_attribute("data-unit") == str(expected[7][0]["units"][1])
    chosen.send_keys(Keys.ENTER)
    page.wait("#view-A button.playing, #view-A .said", f"unit {expected[7][0]['units'][1]}, ")
    assert (
        page.driver.execute_async_script("setTimeout(() => arguments[0](window.unitsAudio?.state), 500)") == "running"
    )

    page.upload("B", files / "second.wav")
    page.wait("#comparison strong", "Edit distance")
    assert page.units("B") == expected[7][1]["units"]
    page.wait("#heard audio, #heard canvas, #heard [data-testid]")  # what the most frequent unit covers

    page.wait("#download a").click()
    report = downloaded(tmp_path / "downloads")
    assert report["layer"] == 7 and report["model"] == str(model) and report["sha256"]
    for row, name, units in zip(report["recordings"], ("first.wav", "second.wav"), expected[7], strict=True):
        assert row["file"] == name and {key: row[key] for key in units} == units
    distance = re.search(r"Edit distance (\d+)", page.wait("#comparison strong").text)
    assert report["comparison"]["edit_distance"] == int(distance[1])

    unit = page.wait("#view-A .tier button").size["width"]
    numbers = "return [...document.querySelectorAll('#view-A .tier span')].filter((s) => s.offsetWidth).length"
    narrow = page.driver.execute_script(numbers)
    page.wait("#view-A [data-zoom='2']").click()
    assert page.wait("#view-A .tier button").size["width"] == pytest.approx(2 * unit, rel=0.1)
    assert page.driver.execute_script(numbers) > narrow  # the numbers that there is room for now
    page.wait("#view-A [data-step='1']").click()
    chosen = page.wait("#view-A button.chosen").get_attribute("aria-label")
    page.wait("#view-A .said", chosen)
    page.wait("#every input").click()
    page.wait("#view-A .layer", "layer 6")

    page.driver.set_window_size(420, 900)
    width = page.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0  # wide things scroll inside, the page does not
    assert page.foreign_requests() == []


@pytest.mark.slow
def test_bad_uploads_get_a_message(page, files):
    for name, message in {
        "text.txt": "text.txt is no audio file",
        "text.wav": "text.wav is no audio file",
        "empty.wav": "empty.wav is empty",
        "short.wav": "short.wav is too short: 6.25 ms",
        "hour.flac": "hour.flac is 60 min long",
    }.items():
        page.upload("A", files / name)
        assert page.wait("#view-A [role=alert]", message)
        assert "Traceback" not in page.driver.page_source and not page.all("#view-A .tier")
        page.wait("#audio-A button[aria-label='Clear'], #audio-A button[title='Clear']").click()
        page.wait("#audio-A input[type=file]")
    page.upload("A", files / "first.wav")
    page.wait("#view-A h3", "first.wav")

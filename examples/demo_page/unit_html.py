"""Units of recordings as HTML: spectrogram and units on one time line, and two sequences aligned. Every unit is a
button that plays what it covers; each group of them is one stop of the Tab key, with arrow keys inside.

`STYLE` and `SCRIPT` belong to it: the script takes the variable `element`, which holds the HTML.
"""

import base64
import html
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import soundfile
from matplotlib.figure import Figure

from spidr_hf.configuration_spidr import SAMPLING_RATE
from spidr_hf.plots.figures import draw_spectrogram
from spidr_hf.plots.palette import unit_colour

from .comparison import compare_units
from .recordings import FRAME, Recording, unit_stretches

_PIXELS = 320  # of the page per second: a frame of 20 ms is 6.4 wide
_IMAGE_PIXELS = 160  # of the picture per second; its content changes every 2.5 ms, but windows are 25 ms long
_HEIGHT = 190
_DIGIT = 7.2  # pixels

STYLE = """
.units { margin: 0 0 .4rem; color: var(--body-text-color, #26303a); }
.units h3 { margin: .2rem 0; font-size: 1.05rem; overflow-wrap: anywhere; }
.units p { margin: .2rem 0; }
.units .scroll { overflow-x: auto; padding-bottom: .3rem; }
.units .strip { position: relative; }
.units img { display: block; width: 100%; height: 190px; max-width: none; border-radius: 4px 4px 0 0; margin: 0; }
.units .kilohertz { position: absolute; left: 4px; font-size: 11px; color: #fff; text-shadow: 0 0 3px #000; }
.units .tier { position: relative; height: 46px; margin-top: 2px; }
.units button { font: 12px/1 ui-monospace, monospace; color: #17202a; border: 0; padding: 0; cursor: pointer;
  overflow: hidden; border-radius: 2px; min-width: 0; }
.units .tier button { position: absolute; top: 0; height: 44px; box-shadow: inset -1px 0 #fff; }
.units button.same { outline: 2px solid #1d6fd1; outline-offset: -2px; }
.units button:focus-visible { outline: 3px solid #d81b60; outline-offset: 1px; z-index: 3; }
.units button.playing { filter: brightness(.72); }
.units .seconds { position: relative; height: 20px; font-size: 12px; }
.units .seconds span { position: absolute; border-left: 1px solid currentColor; padding-left: 3px; }
.units .said { min-height: 1.5em; font-variant-numeric: tabular-nums; }
.units .pairs { display: flex; flex-wrap: wrap; gap: 16px 3px; padding: .3rem 0; }
.units .pair { display: grid; grid-template-rows: 26px 26px; gap: 2px; min-width: 32px; }
.units .pair button { padding: 0 4px; }
.units .pair.differs button { background-image: repeating-linear-gradient(135deg, #fff9 0 3px, #0000 3px 7px); }
.units .gap { border: 1px dashed currentColor; opacity: .45; border-radius: 2px; }
.units .problem { border-left: 4px solid #c62828; padding: .5rem .8rem; background: #c6282814; }
.units a.download { display: inline-block; padding: .5rem 1rem; border-radius: 6px; font-weight: 600;
  color: #fff; background: #1d5fb0; text-decoration: none; }
.units a.download:focus-visible { outline: 3px solid #d81b60; outline-offset: 2px; }
"""

SCRIPT = """
const context = () => (window.unitsAudio ??= new AudioContext());
const buttons = (group) => [...group.querySelectorAll("button")];
let source = null;
async function play(button) {
  const holder = element.querySelector(`[data-sound="${button.dataset.of}"]`);
  if (!holder.decoded) {
    const bytes = Uint8Array.from(atob(holder.dataset.flac), (c) => c.charCodeAt(0));
    holder.decoded = context().decodeAudioData(bytes.buffer);
  }
  const sound = await holder.decoded;
  await context().resume();
  try { source?.stop(); } catch {}
  const start = Number(button.dataset.start), length = Number(button.dataset.length);
  source = context().createBufferSource();
  source.buffer = sound;
  source.connect(context().destination);
  source.onended = () => button.classList.remove("playing");
  buttons(element).forEach((b) => b.classList.remove("playing"));
  button.classList.add("playing");
  source.start(0, start, length);
}
function choose(button, move) {
  const group = button.closest("[data-group]");
  buttons(group).forEach((b) => (b.tabIndex = b === button ? 0 : -1));
  buttons(element).forEach((b) => b.classList.toggle("same", b.dataset.unit === button.dataset.unit));
  const count = buttons(element).filter((b) => b.dataset.unit === button.dataset.unit
    && b.closest("[data-group]") === group).length;
  button.closest("section").querySelector(".said").textContent =
    `${button.getAttribute("aria-label")}; ${count} of this unit here`;
  if (move) {
    button.focus();
    button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}
element.addEventListener("click", (event) => {
  const button = event.target.closest(".units button");
  if (button) { choose(button, false); play(button); }
});
element.addEventListener("keydown", (event) => {
  const button = event.target.closest(".units button");
  if (!button) return;
  const all = buttons(button.closest("[data-group]")), at = all.indexOf(button);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(all[Math.max(0, Math.min(all.length - 1, to))], true);
});
"""


def timeline_html(recording: Recording, layer: int, label: str) -> str:
    """Spectrogram and units of a recording, which play; `label` tells recordings apart."""
    units, name = recording.units[layer], html.escape(recording.name)
    stretches = unit_stretches(units)
    width = recording.seconds * _PIXELS
    blocks = "".join(
        _button(unit, start, frames, label, first=not start, place=True) for unit, start, frames in stretches
    )
    step = 0.5 if recording.seconds <= 20 else 1.0
    seconds = "".join(
        f'<span style="left:{_PIXELS * step * i:.0f}px">{step * i:g} s</span>'
        for i in range(int(recording.seconds / step - 0.2) + 1)
    )
    kilohertz = "".join(
        f'<span class="kilohertz" style="top:{_HEIGHT * (1 - k / 8) - 8:.0f}px">{k} kHz</span>' for k in (2, 4, 6)
    )
    return (
        f'<section class="units" aria-label="{label}: {name}"><h3>{label}: {name}</h3>'
        f"<p>{recording.seconds:.2f} s, {len(units)} frames of 20 ms, {len(stretches)} units without repeats, "
        f"{len(set(units.tolist()))} different ones (layer {layer}).</p>"
        f'<div class="scroll"><div class="strip" style="width:{width:.0f}px">'
        f'<img src="data:image/jpeg;base64,{_spectrogram(recording)}" alt="Spectrogram of {name}, 0 to 8 kHz">'
        f'{kilohertz}<div class="tier" role="toolbar" data-group aria-label="Units of {label}">{blocks}</div>'
        f'<div class="seconds" aria-hidden="true">{seconds}</div></div></div>'
        '<p class="said" role="status">Choose a unit to hear what it covers (arrow keys move, Enter plays).</p>'
        f'<span hidden data-sound="{label}" data-flac="{_flac(recording.waveform)}"></span></section>'
    )


def comparison_html(first: Recording, second: Recording, layer: int, labels: tuple[str, str] = ("A", "B")) -> str:
    """Two recordings' units without repeats, aligned; columns that differ are hatched, gaps are empty."""
    result = compare_units(first.units[layer], second.units[layer])
    rows = [unit_stretches(recording.units[layer]) for recording in (first, second)]
    columns: list[str] = []
    for pair in result.pairs:
        runs = [None if at is None else row[at] for row, at in zip(rows, pair, strict=True)]
        cells = [
            '<span class="gap"></span>' if run is None else _button(*run, label, first=not columns and i == 0)
            for i, (run, label) in enumerate(zip(runs, labels, strict=True))
        ]
        same = len({None if run is None else run[0] for run in runs}) == 1
        columns.append(f'<div class="pair{"" if same else " differs"}">{"".join(cells)}</div>')
    sounds = "".join(
        f'<span hidden data-sound="{label}" data-flac="{_flac(recording.waveform)}"></span>'
        for recording, label in zip((first, second), labels, strict=True)
    )
    return (
        f'<section class="units" aria-label="Comparison"><h3>{labels[0]} and {labels[1]} compared</h3>'
        f"<p><strong>Edit distance {result.edit_distance}</strong> between {len(rows[0])} and {len(rows[1])} units "
        f"without repeats: {100 * result.normalized_distance:.0f} % of the longer. "
        f"<strong>{result.shared_units}</strong> of {result.distinct_units} different units are in both.</p>"
        f'<div class="pairs" role="toolbar" data-group aria-label="Aligned units">{"".join(columns)}</div>'
        f'<p class="said" role="status">{labels[0]} above, {labels[1]} below. '
        "Hatched: different units; empty: a unit of the other only.</p>"
        f"{sounds}</section>"
    )


def problem_html(message: str) -> str:
    """A message about a recording that cannot be used."""
    return f'<section class="units"><p class="problem" role="alert">{html.escape(message)}</p></section>'


def download_html(report: Mapping[str, Any], name: str) -> str:
    """A link that saves the report as JSON, which the link itself holds."""
    content = base64.b64encode(json.dumps(report, indent=1, ensure_ascii=False).encode()).decode()
    return (
        f'<section class="units"><a class="download" download="{html.escape(name)}" '
        f'href="data:application/json;base64,{content}">Download JSON</a></section>'
    )


def _button(unit: int, start: int, frames: int, label: str, *, first: bool, place: bool = False) -> str:
    width, text = frames * FRAME * _PIXELS, str(unit)
    position = f"left:{start * FRAME * _PIXELS:.1f}px;width:{width:.1f}px;" if place else ""
    shown = "" if place and len(text) * _DIGIT + 3 > width else text
    said = f"{label}: unit {unit}, {start * FRAME:.2f} to {(start + frames) * FRAME:.2f} s"
    return (
        f'<button type="button" style="{position}background-color:{unit_colour(unit)}" title="{said}" '
        f'aria-label="{said}" tabindex="{0 if first else -1}" data-unit="{unit}" data-of="{label}" '
        f'data-start="{start * FRAME:.2f}" data-length="{frames * FRAME:.2f}">{shown}</button>'
    )


def _spectrogram(recording: Recording) -> str:
    figure = Figure(figsize=(max(recording.seconds * _IMAGE_PIXELS, 1) / 100, _HEIGHT / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_spectrogram(axes, recording.waveform)
    axes.set_xlim(0, recording.seconds)
    axes.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="jpeg", pil_kwargs={"quality": 82})
    return base64.b64encode(picture.getvalue()).decode()


def _flac(waveform: np.ndarray) -> str:
    content = io.BytesIO()
    soundfile.write(content, np.clip(waveform, -1, 1), SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return base64.b64encode(content.getvalue()).decode()


__all__ = [
    "SCRIPT",
    "STYLE",
    "comparison_html",
    "download_html",
    "problem_html",
    "timeline_html",
]

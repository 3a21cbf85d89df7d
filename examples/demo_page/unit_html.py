"""Units of recordings as HTML: spectrogram and units on one time line, and two sequences aligned. Every unit is a
button that plays what it covers; each group of them is one stop of the Tab key, with arrow keys inside.

`STYLE` and `SCRIPT` belong to it: the script takes the variable `element`, which holds the HTML.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import soundfile
from matplotlib.figure import Figure

from spidr_hf.configuration_spidr import SAMPLING_RATE
from spidr_hf.plots.figures import draw_spectrogram
from spidr_hf.plots.palette import unit_colour
from spidr_hf.system.messages import counted

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
.units .frame { position: relative; }
.units .strip { position: relative; width: calc(var(--zoom, 1) * var(--width)); }
.units img { display: block; width: 100%; height: 190px; max-width: none; border-radius: 4px 4px 0 0; margin: 0; }
.units .kilohertz { position: absolute; left: 4px; z-index: 2; padding: 0 3px; font-size: 11px; color: #fff;
  background: #17202a; border-radius: 2px; pointer-events: none; }
.units .layer { height: 18px; font-size: 12px; }
.units .layer span { position: sticky; left: 4px; }
.units .controls button { min-height: 40px; padding: 0 .8rem; margin-right: .4rem; font: inherit; color: #fff;
  background: #1d5fb0; border-radius: 6px; }
.units .remark { border-left: 4px solid #8a6d00; padding: .3rem .8rem; }
.units .tier { position: relative; height: 46px; margin-top: 2px; }
.units button { font: 12px/1 ui-monospace, monospace; color: #17202a; border: 0; padding: 0; cursor: pointer;
  overflow: hidden; border-radius: 2px; min-width: 0; }
.units .tier button { position: absolute; top: 0; height: 44px; border-right: 1px solid #fff; }
.units button.same { outline: 2px solid #1d6fd1; outline-offset: -2px; }
.units button:focus-visible { outline: 3px solid #d81b60; outline-offset: 1px; z-index: 3; }
.units button.playing { box-shadow: inset 0 -8px #d81b60; }
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
const buttons = (group) => [...group.querySelectorAll("button[data-unit]")];
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
  const alike = (b) => b.dataset.unit === button.dataset.unit && b.dataset.layer === button.dataset.layer;
  buttons(group).forEach((b) => (b.tabIndex = b === button ? 0 : -1));
  buttons(element).forEach((b) => b.classList.toggle("same", alike(b)));
  buttons(element).forEach((b) => b.classList.toggle("chosen", b === button));
  const count = buttons(group).filter(alike).length;
  button.closest("section").querySelector(".said").textContent =
    `${button.getAttribute("aria-label")}; ${count} of this unit here`;
  if (move) {
    button.focus();
    button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}
function control(button) {
  const strip = element.querySelector(".strip"), all = buttons(element);
  const chosen = element.querySelector("button.chosen");
  if (button.dataset.zoom) {
    const zoom = Number(strip.style.getPropertyValue("--zoom") || 1) * Number(button.dataset.zoom);
    strip.style.setProperty("--zoom", Math.max(1, Math.min(8, zoom)));
    const numbers = buttons(strip).map((b) => b.firstChild);
    numbers.forEach((number) => (number.hidden = false));
    const wide = numbers.map((number) => number.offsetWidth > number.parentElement.clientWidth);
    numbers.forEach((number, i) => (number.hidden = wide[i]));
    chosen?.scrollIntoView({ block: "nearest", inline: "center" });
    return;
  }
  const group = chosen ? buttons(chosen.closest("[data-group]")) : all;
  const at = chosen ? group.indexOf(chosen) + Number(button.dataset.step) : 0;
  const next = group[Math.max(0, Math.min(group.length - 1, at))];
  choose(next, false);
  next.scrollIntoView({ block: "nearest", inline: "nearest" });
  play(next);
}
element.addEventListener("click", (event) => {
  const button = event.target.closest(".units button");
  if (!button) return;
  if (button.dataset.unit === undefined) { control(button); return; }
  choose(button, false);
  play(button);
});
element.addEventListener("keydown", (event) => {
  const button = event.target.closest(".units button[data-unit]");
  if (!button) return;
  const all = buttons(button.closest("[data-group]")), at = all.indexOf(button);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(all[Math.max(0, Math.min(all.length - 1, to))], true);
});
"""

# Gradio's own message about a file that is no sound lists types; the page reads everything, and says what is wrong.
UPLOADS = """
() => {
  const take = (input, files) => {
    const all = new DataTransfer();
    [...files].forEach((file) => all.items.add(new File([file], file.name, { type: "audio/wav" })));
    input.files = all.files;
  };
  const other = (files) => [...files].some((file) => !file.type.startsWith("audio/"));
  document.addEventListener("change", ({ target }) => {
    if (target.matches?.("input[type=file]") && other(target.files)) take(target, target.files);
  }, true);
  document.addEventListener("drop", (event) => {
    const input = event.target.closest("#audio-A, #audio-B")?.querySelector("input[type=file]");
    if (!input || !other(event.dataTransfer.files)) return;
    event.preventDefault();
    event.stopPropagation();
    take(input, event.dataTransfer.files);
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }, true);
}
"""


def timeline_html(recording: Recording, layers: Sequence[int], label: str) -> str:
    """Spectrogram and units of a recording, which play: a tier for each layer, whose first is described. `label` tells
    recordings apart."""
    layer, name = layers[0], html.escape(recording.name)
    units = recording.units[layer]
    stretches = unit_stretches(units)
    tiers = "".join(_tier(recording, each, label, named=len(layers) > 1) for each in layers)
    quiet = "There is next to no sound in this recording (below -60 dB): its units are those of silence."
    remark = f'<p class="remark" role="status">{quiet}</p>' if recording.silent else ""
    step = 0.5 if recording.seconds <= 20 else 1.0
    seconds = "".join(
        f'<span style="left:{100 * step * i / recording.seconds:.3f}%">{step * i:g} s</span>'
        for i in range(int(recording.seconds / step - 0.2) + 1)
    )
    kilohertz = "".join(
        f'<span class="kilohertz" style="top:{_HEIGHT * (1 - k / 8) - 8:.0f}px">{k} kHz</span>' for k in (2, 4, 6)
    )
    return (
        f'<section class="units" aria-label="{label}: {name}"><h3>{label}: {name}</h3>'
        f"<p>{recording.seconds:.2f} s, {counted(len(units), 'frame')} of 20 ms, {counted(len(stretches), 'unit')} "
        f"without repeats, {len(set(units.tolist()))} different ones (layer {layer}).</p>"
        f'{remark}<p class="controls"><button type="button" data-step="-1">Previous</button>'
        '<button type="button" data-step="1">Next</button><button type="button" data-zoom="2">Wider</button>'
        '<button type="button" data-zoom="0.5">Narrower</button></p>'
        f'<div class="frame">{kilohertz}<div class="scroll">'
        f'<div class="strip" style="--width:{recording.seconds * _PIXELS:.0f}px">'
        f'<img src="data:image/jpeg;base64,{_spectrogram(recording)}" alt="Spectrogram of {name}, 0 to 8 kHz">'
        f'{tiers}<div class="seconds" aria-hidden="true">{seconds}</div></div></div></div>'
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
        f"<p><strong>Edit distance {result.edit_distance}</strong> between {len(rows[0])} and "
        f"{counted(len(rows[1]), 'unit')} without repeats: {100 * result.normalized_distance:.0f} % of the longer. "
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


def _tier(recording: Recording, layer: int, label: str, *, named: bool) -> str:
    blocks = "".join(
        _button(*run, label, first=not run[1], layer=layer, seconds=recording.seconds)
        for run in unit_stretches(recording.units[layer])
    )
    name = f'<div class="layer"><span>layer {layer}</span></div>' if named else ""
    group = f'role="toolbar" data-group aria-label="Units of {label}, layer {layer}"'
    return f'{name}<div class="tier" {group}>{blocks}</div>'


def _button(
    unit: int, start: int, frames: int, label: str, *, first: bool, layer: int | None = None, seconds: float = 0.0
) -> str:
    share = 100 * FRAME / seconds if seconds else 0.0  # per cent of the time line for a frame; 0 where there is none
    position = f"left:{start * share:.4f}%;width:{frames * share:.4f}%;" if share else ""
    fits = not share or len(str(unit)) * _DIGIT + 3 <= frames * FRAME * _PIXELS
    said = f"{label}: unit {unit}, {start * FRAME:.2f} to {(start + frames) * FRAME:.2f} s"
    return (
        f'<button type="button" style="{position}background-color:{unit_colour(unit)}" title="{said}" '
        f'aria-label="{said}" tabindex="{0 if first else -1}" data-unit="{unit}" data-of="{label}" '
        f'data-start="{start * FRAME:.2f}" data-length="{frames * FRAME:.2f}"'
        f"{'' if layer is None else f' data-layer={layer}'}><span{'' if fits else ' hidden'}>{unit}</span></button>"
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
    "UPLOADS",
    "comparison_html",
    "download_html",
    "problem_html",
    "timeline_html",
]

#!/usr/bin/env python
"""A page to record or upload speech, see its units, hear what they cover, and compare two recordings.

    python examples/demo_app.py --model facebook/spidr-base
    python examples/demo_app.py                                # the model that `make demo` leaves in runs/demo/final

Then open the address that it prints. The page runs on this machine and asks nothing of any other: recordings are
deleted when it stops, however it does. --share asks Gradio's server for a public address for it, and only then do
data leave.

Needs the extra `demo`: pip install 'spidr_hf[demo]'.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf import SpidrForAudioTokenization
from spidr_hf.configuration_spidr import SAMPLING_RATE
from spidr_hf.hub.loading import load_model
from spidr_hf.system.commands import HelpFormatter, clear_errors
from spidr_hf.system.errors import AudioError, NonFiniteError
from spidr_hf.system.messages import counted
from spidr_hf.system.processes import device_of
from spidr_hf.units.extractor import unit_layers
from spidr_hf.units.unit_files import describe_model

from .demo_page.temporary import temporary_folder

DEMO_MODEL = Path(__file__).resolve().parent.parent / "runs" / "demo" / "final"
LABELS = ("A", "B")
INTRODUCTION = """
# Speech as units

Record or upload up to a minute of speech. Each block below its spectrogram is a unit, one of the model's codewords:
choose it to hear what it covers, and where else it occurs. A second recording is compared with the first.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL",
        help="model folders, names on the Hub or published checkpoints (default: what `make demo` leaves)",
    )
    parser.add_argument("--port", type=int, help="of the page's address (default: the first free one from 7860 on)")
    parser.add_argument("--device", help="for example cpu or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--share", action="store_true", help="make the page public, by Gradio's server")
    args = parser.parse_args()
    if args.port is not None and not 0 < args.port < 65_536:
        parser.error(f"--port must lie between 1 and 65535, got {args.port}.")
    with clear_errors("demo", needs=["gradio", "matplotlib", "rapidfuzz"]), temporary_folder():
        device = device_of(args.device)
        if args.port is not None:
            check_free(args.port)
        if not args.model and not DEMO_MODEL.exists():
            raise ValueError("Say which model: --model spidr-base, for example; or run `make demo` first.")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import: no telemetry, no look for a newer version
        names = args.model or [str(DEMO_MODEL)]
        models = {name: load_model(SpidrForAudioTokenization, name, device=device) for name in dict.fromkeys(names)}
        launch(models, args.port, args.share)


def check_free(port: int) -> None:
    """Raises `ValueError` where the page cannot have the port: models of gigabytes are loaded after this."""
    # As Gradio asks, which would be the last to tell.
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), port))
        except OSError as error:
            raise ValueError(
                f"--port {port} cannot be used ({error.strerror}): choose another, or leave --port out for the first "
                "free one from 7860 on."
            ) from error


def launch(models: dict[str, Any], port: int | None, share: bool) -> None:
    """Show the page until Ctrl-C."""
    from .demo_page.unit_html import STYLE, UPLOADS

    page(models).launch(
        server_port=port,
        share=share,
        theme=theme(),
        css=STYLE,
        js=UPLOADS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size="500mb",  # above it Gradio refuses; below it the page says what is wrong
    )


def theme() -> Any:
    """Gradio's Soft with fonts of this machine, and labels that can be read (its own have a contrast of 4)."""
    import gradio

    soft = gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    labels = {f"block_{part}_text_color": "*primary_700" for part in ("label", "title")}
    dark = {f"{name}_dark": "*neutral_100" for name in labels}
    subdued = {"block_info_text_color": "*neutral_600", "body_text_color_subdued": "*neutral_600"}
    return soft.set(**labels, **dark, **subdued, **{f"{name}_dark": "*neutral_300" for name in subdued})


def model_choices(names: Sequence[str]) -> list[tuple[str, str]]:
    """What models are called on the page, and their names: folders by their own name (of a run's `final` with the
    run's), unless two are alike."""
    short = {}
    for name in names:
        folder = Path(name).resolve()
        parts = folder.parts[-2:] if folder.name == "final" else folder.parts[-1:]
        short[name] = "/".join(parts) if folder.is_dir() else name
    return [(label if list(short.values()).count(label) == 1 else name, name) for name, label in short.items()]


def page(models: dict[str, Any]) -> Any:
    """The page's parts and what they do. `models`: model and feature extractor by name."""
    import gradio as gr

    from .demo_page.recordings import analyse_recording, cut_unit, default_layer, unit_stretches, units_report
    from .demo_page.unit_html import SCRIPT, comparison_html, download_html, problem_html, timeline_html

    descriptions = {name: {**describe_model(model), "model": name} for name, (model, _) in models.items()}

    def update(name, layer, every, first, second, known):
        """All that depends on model, layer and recordings. `known` keeps what was computed for the last ones; of a file
        that was refused, and is gone, the reason."""
        model, feature_extractor = models[name]
        layers = unit_layers(model.config)
        layer = layer if layer in layers else default_layer(model.config)
        results, views = {}, []
        for label, path in zip(LABELS, (first, second), strict=True):
            if not path:
                views.append("")
                continue
            try:
                if path in known:
                    raise AudioError(known[path])
                result = known.get((name, path)) or analyse_recording(path, model, feature_extractor)
            except (AudioError, NonFiniteError) as error:
                views.append(problem_html(str(error)))
                if isinstance(error, AudioError):
                    results[path] = str(error)
                    Path(path).unlink(missing_ok=True)
                continue
            results[name, path] = result
            views.append(timeline_html(result, [layer, *(x for x in layers if every and x != layer)], label))
        shown = [results[name, path] for path in (first, second) if (name, path) in results]
        compared = comparison_html(*shown, layer, LABELS) if len(shown) == 2 else ""
        report = units_report(shown, layer, descriptions[name]) if shown else {}
        link = download_html(report, f"units-layer-{layer}.json") if shown else ""
        choices = unit_choices(shown, layer)
        return (
            gr.Dropdown(info=name),
            gr.Dropdown(choices=layers, value=layer),
            *views,
            compared,
            gr.Dropdown(choices=choices, value=choices[0][1] if choices else None, visible=bool(shown)),
            gr.Audio(visible=bool(shown)),
            link,
            results,
        )

    def unit_choices(shown, layer):
        """Units, the one that covers most first."""
        frames: dict[int, list[int]] = {}
        for recording in shown:
            for unit, _, length in unit_stretches(recording.units[layer]):
                frames.setdefault(unit, []).append(length)
        order = sorted(frames, key=lambda unit: -sum(frames[unit]))
        return [
            (f"{unit}: {counted(len(frames[unit]), 'time')}, {0.02 * sum(frames[unit]):.2f} s", unit) for unit in order
        ]

    def hear(layer, unit, known):
        """All that a unit covers in the recordings that are shown."""
        if unit is None or not known:
            return None
        sound = cut_unit([recording for recording in known.values() if not isinstance(recording, str)], layer, unit)
        return SAMPLING_RATE, (sound.clip(-1, 1) * 32767).astype("int16")

    with gr.Blocks(title="Speech as units", analytics_enabled=False) as blocks:
        known = gr.State({})
        gr.Markdown(INTRODUCTION)
        names = list(models)
        config = models[names[0]][0].config
        with gr.Row():
            name = gr.Dropdown(
                model_choices(names), value=names[0], label="Model", info=names[0], min_width=320, elem_id="model"
            )
            layer = gr.Dropdown(
                unit_layers(config), value=default_layer(config), label="Layer, from 1", elem_id="layer"
            )
            every = gr.Checkbox(label="All layers, one above the other", elem_id="every")
        with gr.Row():
            first, second = (
                gr.Audio(
                    type="filepath",
                    sources=["upload", "microphone"],
                    label=label,
                    buttons=[],
                    min_width=320,
                    elem_id=f"audio-{letter}",
                )
                for letter, label in zip(LABELS, ("A", "B, to compare"), strict=True)
            )
        views = [gr.HTML(elem_id=f"view-{letter}", js_on_load=SCRIPT) for letter in LABELS]
        compared = gr.HTML(elem_id="comparison", js_on_load=SCRIPT)
        with gr.Row():
            unit = gr.Dropdown([], label="Hear everything that a unit covers", visible=False, elem_id="unit")
            heard = gr.Audio(
                label="All its stretches", interactive=False, visible=False, buttons=["download"], elem_id="heard"
            )
        link = gr.HTML(elem_id="download")
        gr.on(
            [name.input, layer.input, every.input, first.change, second.change],
            update,
            [name, layer, every, first, second, known],
            [name, layer, *views, compared, unit, heard, link, known],
            trigger_mode="always_last",
            api_visibility="private",
        ).then(hear, [layer, unit, known], heard, api_visibility="private")
        unit.input(hear, [layer, unit, known], heard, api_visibility="private")
    return blocks


if __name__ == "__main__":
    main()

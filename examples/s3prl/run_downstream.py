#!/usr/bin/env python
"""s3prl's own `run_downstream.py`, SUPERB's command, with SpidR and DinoSR among its upstreams.

    cd s3prl/s3prl     # a checkout of https://github.com/s3prl/s3prl, whose configs lie there
    python REPOSITORY/examples/s3prl/run_downstream.py -m train -n NAME -u spidr -k MODEL \\
        -d ctc -c downstream/ctc/libriphone.yaml

All options are s3prl's. `-u spidr` reads the encoder's input and every layer's output, `-u spidr_before_residual` the
representations before the residual; MODEL is a converted or trained folder, a name on the Hub,
or a published checkpoint (spidr-base).

Needs s3prl 0.4 (`pip install s3prl`), which needs torchaudio < 2.9 and the torch that goes with it.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import huggingface_hub

FOLDER = Path(__file__).resolve().parent / "spidr"


def upstreams() -> ModuleType:
    """The module of the upstreams' names, as if its folder lay in s3prl/upstream."""
    package = "s3prl.upstream.spidr"
    spec = importlib.util.spec_from_file_location(
        package, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.hubconf")


def main() -> None:
    # s3prl imports these for uploads of an older kind, which nothing here uses; huggingface_hub 1 has them no more.
    for name in ("HfFolder", "Repository"):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, None)
    try:
        from s3prl import hub, run_downstream
    except ModuleNotFoundError as error:
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__.strip())
            return
        sys.exit(f"error: {error}. This command needs s3prl 0.4 (pip install s3prl), and torchaudio older than 2.9.")

    names = upstreams()
    hub.spidr, hub.spidr_before_residual = names.spidr, names.spidr_before_residual
    run_downstream.main()


if __name__ == "__main__":
    main()

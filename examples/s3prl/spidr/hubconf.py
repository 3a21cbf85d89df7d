"""Names of the upstream, for s3prl and SUPERB.

Copy this folder to `s3prl/upstream/spidr` of an s3prl checkout (in the environment of which this package is installed),
and add one line to `s3prl/hub.py`:

    from s3prl.upstream.spidr.hubconf import *

Then, with a converted or trained model folder or a name on the Hub:

    python run_downstream.py -m train -n NAME -u spidr -k MODEL -d ctc -c downstream/ctc/libriphone.yaml

or in Python `S3PRLUpstream("spidr", path_or_url=MODEL)`.
"""

from .expert import UpstreamExpert as _UpstreamExpert


def spidr(ckpt: str, **kwargs) -> _UpstreamExpert:
    """Hidden states: the encoder's input and the output of every layer, as the HuBERT upstream gives."""
    return _UpstreamExpert(ckpt, **kwargs)


def spidr_before_residual(ckpt: str, **kwargs) -> _UpstreamExpert:
    """The layers' representations before the residual connection, which SpidR's units and ABX scores come from."""
    return _UpstreamExpert(ckpt, before_residual=True, **kwargs)

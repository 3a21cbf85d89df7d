"""Names of the upstream, for s3prl and SUPERB.

`examples/s3prl/run_downstream.py` is s3prl's command with these among its upstreams. To have them in a checkout of
s3prl for good, copy this folder to `s3prl/upstream/spidr` there (this package must be installed in its environment) and
add one line to `s3prl/hub.py`:

    from s3prl.upstream.spidr.hubconf import *

Then `S3PRLUpstream("spidr", path_or_url=MODEL)` works in Python, with a converted or trained model folder, a name on
the Hub, or a published checkpoint.
"""

from .expert import UpstreamExpert as _UpstreamExpert


def spidr(ckpt: str, **kwargs) -> _UpstreamExpert:
    """Hidden states: the encoder's input and the output of every layer, as the HuBERT upstream gives."""
    return _UpstreamExpert(ckpt, **kwargs)


def spidr_before_residual(ckpt: str, **kwargs) -> _UpstreamExpert:
    """The layers' representations before the residual connection, which SpidR's units and ABX scores come from."""
    return _UpstreamExpert(ckpt, before_residual=True, **kwargs)

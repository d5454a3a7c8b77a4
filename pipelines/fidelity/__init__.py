"""``kdcli fidelity``: cached losses and gradients against the live teacher, with the live-vs-live noise floor beside them."""

from pipelines.fidelity.opened import FidelityRequest
from pipelines.fidelity.plot import write_plot
from pipelines.fidelity.run import fidelity
from pipelines.fidelity.show import write_files

__all__ = ["FidelityRequest", "fidelity", "write_files", "write_plot"]

"""``kdcli fidelity``: cached losses and gradients against the live teacher, with the live-vs-live noise floor beside them."""

from pipelines.judge.fidelity.opened import FidelityRequest
from pipelines.judge.fidelity.plot import write_plot
from pipelines.judge.fidelity.run import fidelity
from pipelines.judge.fidelity.show import write_files

__all__ = ["FidelityRequest", "fidelity", "write_files", "write_plot"]

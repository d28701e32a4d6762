"""Lightning's remarks that do not concern users of the commands, kept from the screen."""

from __future__ import annotations

import logging
import os
import warnings

_REMARKS = (
    ".*LeafSpec.*",
    ".*does not have many workers.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",
    ".*smaller than the logging interval.*",
    ".*You are using a CUDA device.*",
)


def quiet() -> None:
    """Show warnings only, and of these not the known harmless ones."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for remark in _REMARKS:
        warnings.filterwarnings("ignore", remark)

"""Sensitivity: what a scheme at a site costs the whole program, by a metric of choice.

`study.py` says what is compared, `sampling.py` runs a metric over data; a metric is one file.
"""

from qcompiler.sensitivity.base import Metric, Sensitivity
from qcompiler.sensitivity.sampling import measure
from qcompiler.sensitivity.study import Study

__all__ = ["Metric", "Sensitivity", "Study", "measure"]

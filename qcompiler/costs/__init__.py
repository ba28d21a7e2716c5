"""What a scheme costs: bytes, bit operations, and measured seconds on a backend."""

from qcompiler.costs.size import bitops, weight_bytes
from qcompiler.costs.time import Clock
from qcompiler.costs.workload import Workload

__all__ = ["Clock", "Workload", "bitops", "weight_bytes"]

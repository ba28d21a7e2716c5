"""The lowered program on the device, and a CUDA graph of it for inputs of fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.backend import ProgramArtifact
from qcompiler.backends.triton.cache import APPEND_ROWS, CARRIED
from qcompiler.edit import copy_graph
from qcompiler.errors import BackendError, BadInput
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.states import begins_empty, growing, states

Outputs = tuple[object, ...]


class TritonArtifact(ProgramArtifact):
    """Runs on `device`; inputs on the CPU are copied there, and their outputs back. What is carried
    from call to call (caches) stays there, and grows in place."""

    def __init__(self, program: Program, device: torch.device) -> None:
        super().__init__(moved(program, device))
        self.device = device
        self._running = running(self.program)
        found = {s.input: s.path[-1] for s in states(program) if begins_empty(s, program)}
        found |= {n.args[0]: n for n in program.graph.nodes if n.target is APPEND_ROWS}
        longer = set(found.values())
        self._begin = [i for i, node in enumerate(program.inputs) if node not in found]
        outputs: Any = program.graph.output_node().args[0]
        self._stay = [y in longer for y in outputs]

    def run(self, inputs: Flat) -> Outputs:
        given = [x for i in self._begin if isinstance(x := inputs[i], Tensor)]
        home = device_of(given, self.device)
        there = tuple(
            x.to(self.device) if isinstance(x, Tensor) and x.device != self.device else x
            for x in inputs
        )
        outputs = self._running.flat(there)
        return tuple(
            y.to(home) if isinstance(y, Tensor) and not stays else y
            for y, stays in zip(outputs, self._stay, strict=True)
        )

    def capture_graph(self, inputs: Flat) -> Callable[[Flat], Outputs]:
        """A function that replays one run, for inputs of just these shapes: one launch for all
        kernels. Its outputs are overwritten by its next call."""
        if self.device.type != "cuda":
            raise BackendError(f"a CUDA graph is captured on a GPU; this runs on {self.device}")
        still = tuple(x.to(self.device).clone() if isinstance(x, Tensor) else x for x in inputs)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and tuned before the capture
            self.program.flat(still)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.program.flat(still)

        def replay(given: Flat) -> Outputs:
            for kept, new in zip(still, given, strict=True):
                if not isinstance(kept, Tensor) or not isinstance(new, Tensor):
                    same = kept is new or kept == new
                else:
                    same = kept.shape == new.shape and kept.dtype == new.dtype
                if not same:
                    raise BadInput(
                        f"this CUDA graph was captured with {_words(kept)}; found {_words(new)}; "
                        "call `run`, or capture another"
                    )
                if isinstance(kept, Tensor) and isinstance(new, Tensor):
                    kept.copy_(new)
            graph.replay()
            return outputs

        return replay


def running(program: Program) -> Program:
    """The program, to be run: what it carries grows in place, in 8 bits where it is so rounded."""
    made = growing(program)
    for node in made.graph.nodes:
        node.target = CARRIED.get(node.target, node.target)
    return made


def moved(program: Program, device: torch.device) -> Program:
    """The program with its parameters, and the tensors that it makes itself, on `device`."""
    graph, _ = copy_graph(program.graph)
    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = _there(node.args, device), _there(node.kwargs, device)
    params: Mapping[str, Tensor]
    try:
        params = {name: t.to(device) for name, t in program.params.items()}
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise BackendError(
            f"triton: the weights take {program.bytes:,} bytes, and {device} has {free:,} of "
            f"{total:,} free; quantize to fewer bits, or free memory there"
        ) from error
    return replace(program, graph=graph, params=params)


def _there(value: Any, device: torch.device) -> Any:
    return fx.node.map_aggregate(value, lambda v: device if isinstance(v, torch.device) else v)


def device_of(tensors: list[Tensor], otherwise: torch.device) -> torch.device:
    """Where the first of them is."""
    return tensors[0].device if tensors else otherwise


def _words(x: object) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else repr(x)

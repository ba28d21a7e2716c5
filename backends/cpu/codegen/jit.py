"""From LLVM IR to functions in this process, compiled once and kept on disk.

An object file's name is a digest of all that it depends on: the IR, the instruction set, LLVM. It
is written beside its place and renamed, so that a kill leaves nothing half-written; one that does
not hold what its digest promises is compiled anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import lru_cache
from pathlib import Path

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.costs.cache import cache_folder

DIGEST = 32
"""Bytes of the digest of key and object code that stands before the code in a file."""
PARALLEL, THREAD, COUNT = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
_engines: list[llvm.ExecutionEngine] = []
"""What keeps compiled code in memory."""


def compiled(module: ir.Module, isa: Isa, names: tuple[str, ...]) -> tuple[int, ...]:
    """Addresses of the functions `names` of `module`, compiled for `isa`."""
    machine = _machine(isa)
    module.triple = machine.triple
    text = str(module)
    about = (text, isa.name, isa.features, machine.triple, llvm.llvm_version_info)
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    place = cache_folder("kernels") / f"{key}.o"
    code = _read(place, key)
    if code is None:
        code = _compile(text, isa)
        _write(place, key, code)
    openmp()  # its symbols must be known before code that calls them is linked
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return tuple(engine.get_function_address(name) for name in names)


def assembly(module: ir.Module, isa: Isa, triple: str = "") -> str:
    """The instructions that `module` becomes, for a look or for another CPU."""
    machine = _machine(isa, triple)
    return str(machine.emit_assembly(_optimized(str(module), machine)))


@lru_cache(maxsize=1)
def openmp() -> bool:
    """Whether kernels can run in the threads of torch's own OpenMP; its symbols are known then."""
    folder = Path(torch.__file__).parent
    places = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    for place in places:
        library = ctypes.CDLL(str(place))
        for name in (PARALLEL, THREAD, COUNT):
            address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            assert address is not None
            llvm.add_symbol(name, address)
        return True
    return False


def _compile(text: str, isa: Isa) -> bytes:
    machine = _machine(isa)
    return bytes(machine.emit_object(_optimized(text, machine)))


def _optimized(text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    module = llvm.parse_assembly(text)
    module.verify()
    # What is unrolled, and how wide vectors are, is decided by the generators.
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return module


def _machine(isa: Isa, triple: str = "") -> llvm.TargetMachine:
    if triple:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple(triple)
    else:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_default_triple()
    features = ",".join(f"+{name}" for name in isa.features)
    return target.create_target_machine("", features, 3, "pic", jit=not triple)


def _read(place: Path, key: str) -> bytes | None:
    try:
        data = place.read_bytes()
    except OSError:
        return None
    digest, code = data[:DIGEST], data[DIGEST:]
    return code if _digest(key, code) == digest else None


def _digest(key: str, code: bytes) -> bytes:
    return hashlib.sha256(key.encode() + code).digest()


def _write(place: Path, key: str, code: bytes) -> None:
    """A cache that cannot be written is only slower."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_suffix(f".{os.getpid()}.part")
        try:
            beside.write_bytes(_digest(key, code) + code)
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)
    except OSError:
        return

"""Runs a compiled kernel on the OpenMP threads that torch already has in this process.

A second pool of threads would fight torch's for the same cores, as both spin between regions. So
torch's copy of the OpenMP runtime is asked to run the kernel; where that is not GNU's, a kernel
runs on one thread. A kernel shares its work out with ``first_item`` and ``end_item``.

Machine code is kept in the user's cache folder, under a digest of this package's sources.
"""

import ctypes
import fcntl
import hashlib
import os
import struct
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from engine.cpu.values import FAST_MATH

_SIGNATURE = types.void(types.CPointer(types.int64))
_MOST_ARGUMENTS = 24

_PACKERS = tuple(struct.Struct(f"={count}q") for count in range(_MOST_ARGUMENTS + 1))

_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())


@njit(inline="always")
def first_item(items: int) -> Any:
    """Where this thread's share of ``items`` begins; shares are in order and even."""
    return items * np.int64(_thread_number()) // np.int64(_thread_count())


@njit(inline="always")
def end_item(items: int) -> Any:
    return items * (np.int64(_thread_number()) + 1) // np.int64(_thread_count())


@njit(inline="always")
def own_part(address: int, num_bytes: int) -> Any:
    """This thread's part of a workspace that has ``num_bytes`` for each thread."""
    return address + np.int64(_thread_number()) * num_bytes


class Kernel:
    """A compiled function of up to 24 integers: addresses, strides, counts, bits of floats.

    ``constants`` tell it from other kernels of the same function with other values in its closure.
    Arguments are not checked: what is at an address must stay there until the call returns.
    Python's lock is not held meanwhile.
    """

    def __init__(self, function: Callable[..., None], constants: Hashable) -> None:
        self._runtime = _load_runtime()
        with _one_process_at_a_time():
            compiled = _compile(function, constants)
        self._compiled = compiled  # owns the machine code
        self._address = compiled.address
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(compiled.address)

    def __call__(self, *arguments: int, threads: int = 1) -> None:
        packed = _PACKERS[len(arguments)].pack(*arguments)
        if threads > 1 and self._runtime is not None:
            self._runtime.GOMP_parallel(self._address, packed, threads, 0)
        else:
            self._call(packed)


@cache
def _load_runtime() -> Any:
    """Torch's OpenMP runtime, its symbols known to kernels, or None."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        runtime = ctypes.CDLL(str(path))
        runtime.GOMP_parallel.restype = None
        runtime.GOMP_parallel.argtypes = (
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_uint,
            ctypes.c_uint,
        )
        llvm.load_library_permanently(str(path))
        return runtime
    for name, function in (("omp_get_thread_num", _zero), ("omp_get_num_threads", _one)):
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return None


_zero = ctypes.CFUNCTYPE(ctypes.c_int32)(lambda: 0)
_one = ctypes.CFUNCTYPE(ctypes.c_int32)(lambda: 1)


def _compile(function: Callable[..., None], constants: Hashable) -> Any:
    options = {"nopython": True, "fastmath": FAST_MATH, "error_model": "numpy"}
    compiled: Any = CFunc(function, normalize_signature(_SIGNATURE), locals={}, options=options)
    if _cache_folder() is not None:
        compiled._cache = _KernelCache(function, constants)
    compiled.compile()
    return compiled


class _KernelCache(FunctionCache):  # type: ignore[misc]  # numba is not typed
    """numba's own would never find a function again that has compiled ones in its closure."""

    def __init__(self, function: Callable[..., None], constants: Hashable) -> None:
        self._constants = constants
        super().__init__(function)

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple(), self._constants


@contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    """The ranks of a host start together: one compiles, the others find what it left."""
    folder = _cache_folder()
    if folder is None:
        yield
        return
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, or its process dies
        yield


@cache
def _cache_folder() -> Path | None:
    """A folder for this version of the kernels, which numba is told of; None: none is writable.

    numba itself looks at the file of the compiled function only, not at what it calls.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    try:
        folder = Path.home() / ".cache" / "headrace" / "kernels" / digest
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    if not os.access(folder, os.W_OK):
        return None
    numba.config.CACHE_DIR = str(folder)
    return folder

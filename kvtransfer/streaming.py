"""Copying memory past the caches, for bytes that this core does not read again soon.

An ordinary store first fetches the line that it overwrites; a streaming store does not, so a third
less goes over the memory bus, and what is being computed stays in the caches. The C library
streams only single copies that are larger than a core's share of the caches, and a pool's runs of
blocks are not. So the loop is compiled here, by the LLVM that numba brings, in some 10 ms.
"""

import ctypes
from functools import cache
from typing import Any, Protocol

import llvmlite.binding as llvm

LINE_BYTES = 64
"""Targets, lengths and the steps between rows must be whole lines."""

_LOOP = """
define void @copy(i64 %to, i64 %from, i64 %length, i64 %to_step, i64 %from_step, i64 %rows) {
entry:
  br label %row
row:
  %row_number = phi i64 [0, %entry], [%next_row, %row_end]
  %row_to = phi i64 [%to, %entry], [%next_to, %row_end]
  %row_from = phi i64 [%from, %entry], [%next_from, %row_end]
  br label %line
line:
  %at = phi i64 [0, %row], [%next, %line]
  %line_to = add i64 %row_to, %at
  %line_from = add i64 %row_from, %at
  %target = inttoptr i64 %line_to to ptr
  %source = inttoptr i64 %line_from to ptr
  %bytes = load <8 x i64>, ptr %source, align 1
  store <8 x i64> %bytes, ptr %target, align 64, !nontemporal !0
  %next = add i64 %at, 64
  %more = icmp ult i64 %next, %length
  br i1 %more, label %line, label %row_end
row_end:
  %next_row = add i64 %row_number, 1
  %next_to = add i64 %row_to, %to_step
  %next_from = add i64 %row_from, %from_step
  %again = icmp ult i64 %next_row, %rows
  br i1 %again, label %row, label %done
done:
  fence seq_cst
  ret void
}
!0 = !{i32 1}
"""


_SIGNATURE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)


class CopyRows(Protocol):
    def __call__(  # noqa: PLR0917  machine code has no names
        self, to: int, source: int, length: int, to_step: int, source_step: int, rows: int, /
    ) -> None:
        """Copy ``rows`` rows, at least one, of ``length`` bytes, at least one line, each a step
        behind the one before it. Nothing is checked. Python's lock is not held meanwhile, and
        whoever hears of the copy afterwards sees all of it.
        """
        ...


@cache
def row_copier() -> CopyRows:
    """Compiled for this machine when first asked for; the first call takes the time."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine: Any = llvm.Target.from_default_triple().create_target_machine(
        opt=3, cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten()
    )
    module: Any = llvm.parse_assembly(_LOOP)
    engine: Any = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    function: Any = _SIGNATURE(engine.get_function_address("copy"))
    function.machine_code = engine  # which lives as long
    copier: CopyRows = function
    return copier

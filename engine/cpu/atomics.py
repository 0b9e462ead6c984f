"""Memory that another process writes or reads at the same time: in what order it sees what.

Only compiled kernels call these. Addresses are of whole, aligned words. What is stored before a
``publish`` is seen by whoever ``observe``s the published value; ``settle`` is for two processes
that each write one word and then read the other's, of which one must see what the other wrote.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_BYTE, _HALF_WORD, _WORD = ir.IntType(8), ir.IntType(32), ir.IntType(64)


@intrinsic
def observe(typing_context: Any, address: Any) -> Any:
    """The int64 at ``address``; nothing that follows is read earlier."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0], _WORD), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def publish(typing_context: Any, address: Any, value: Any) -> Any:
    """Store an int64; whoever observes it sees all that was stored before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, value = arguments
        builder.store_atomic(value, _pointer(builder, address, _WORD), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def settle(typing_context: Any) -> Any:
    """What was stored before is seen everywhere before anything that follows is read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def observe_counter(typing_context: Any, address: Any) -> Any:
    """The 32 bits at ``address``, which the kernel compares too (futex)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = builder.load_atomic(_pointer(builder, arguments[0], _HALF_WORD), "acquire", 4)
        return builder.zext(found, _WORD)

    return types.int64(types.int64), generate


@intrinsic
def count_up(typing_context: Any, address: Any) -> Any:
    """Add one to the 32 bits at ``address``; they may overflow."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], _HALF_WORD)
        builder.atomic_rmw("add", pointer, ir.Constant(_HALF_WORD, 1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))

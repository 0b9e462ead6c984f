"""Every bound of a KV connection in one place, with the reason for its size."""

from dataclasses import dataclass

MAX_CONTROL_BYTES = 1024 * 1024  # the payload of a finish frame; tokens and logprobs need little


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLimits:
    """Waits in seconds and sizes in bytes. Both ends may differ in their limits."""

    handshake_s: float = 2.0
    open_s: float = 5.0
    """From opening a push until the decode rank has said that it may write."""
    commit_s: float = 10.0
    """From the finish frame until the decode rank has committed."""
    stall_s: float = 10.0
    """A peer that takes or gives no byte in the middle of a frame for this long is cut off."""
    tcp_frame_bytes: int = 8 * 1024 * 1024
    """Each costs both ends about 100 us; an abort and other pushes wait for one. At most 16 MB."""
    shm_frame_bytes: int = 4 * 1024 * 1024
    """An abort waits for one frame, and each costs the peer 40 us. At most 16 MB."""
    device_frame_bytes: int = 16 * 1024 * 1024
    """Of GPU transports, and of their staging. Hides what it costs to start a copy."""
    meet_s: float = 30.0
    """From the id of an NCCL communicator until both ends have joined it."""
    nixl_frame_bytes: int = 8 * 1024 * 1024
    """Also a slot of the landing. Each costs both ends about 500 us of notes and of looking for
    them: with 1 MB the CPU time of a byte is three times as much. At most 16 MB."""
    nixl_slots: int = 3
    """Chunks under way at once: one is written while others are copied to their blocks."""
    socket_buffer_bytes: int = 256 * 1024
    """Of tcp. What is under way stays in cache: on loopback this is 2 to 4 times as fast as the
    kernel's own choice. A long fat link needs its bandwidth times its delay."""
    probe_bytes: int = 2 * 1024 * 1024
    """Sent once over a new connection to measure it. 0: it is not measured."""
    max_connections: int = 256
    max_handshakes: int = 32

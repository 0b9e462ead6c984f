"""Energy that this machine's NVIDIA GPUs have used, as their driver counts it (NVML).

The counter is in millijoules and exists since Volta. Only a test on the server's own machine can
read it; elsewhere, or without a driver, there is no figure.
"""

import ctypes

_OK = 0
_JOULE = 1000


class EnergyMeter:
    """Counts from when it is made, over all GPUs of this machine."""

    def __init__(self) -> None:
        self._nvml = _loaded()
        self._start = self._millijoules()

    def joules(self) -> float | None:
        """None without a GPU that counts."""
        now = self._millijoules()
        return None if now is None or self._start is None else (now - self._start) / _JOULE

    def _millijoules(self) -> int | None:
        if self._nvml is None:
            return None
        count = ctypes.c_uint()
        if self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _OK or not count.value:
            return None
        total = 0
        for index in range(count.value):
            device, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
            if self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != _OK:
                return None
            if self._nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy)) != _OK:
                return None
            total += energy.value
        return total


def _loaded() -> ctypes.CDLL | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return nvml if nvml.nvmlInit_v2() == _OK else None

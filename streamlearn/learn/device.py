"""How busy the learner's GPU is and what is left of its memory, as the driver's own library says (NVML, beside every driver; no package needed)."""

import ctypes
from dataclasses import dataclass

import torch

LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Used:
    busy: float  # 0-1, of the last sampling period of the driver (under a second)
    memory: int  # bytes, of all processes
    memory_size: int  # bytes


class _Rates(ctypes.Structure):
    """nvmlUtilization_t, in percent."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Device:
    """Where the learner computes.  One without NVML says nothing of itself, and that is no fault."""

    def __init__(self, device: torch.device):
        self.device = device
        self.name = str(device.index or 0)
        self._nvml: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        if device.type != "cuda" or torch.version.hip is not None:
            return
        try:
            nvml = ctypes.CDLL(LIBRARY)
        except OSError:
            return
        # by its UUID: CUDA_VISIBLE_DEVICES numbers the devices anew
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle)) == 0:
            self._nvml = nvml

    def used(self) -> Used | None:
        """None on a CPU, without NVML, and where the driver will not tell (a slice of a GPU has no utilisation)."""
        if self._nvml is None:
            return None
        rates = _Rates()
        if self._nvml.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(rates)) != 0:
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return Used(rates.gpu / 100, total - free, total)

"""What the runtimes share when they fail or end: shortage told from damage, reasons on one line, memory given back."""

from __future__ import annotations

import ctypes
import re

from agent.base.errors import PeerError, TryLaterError

#: Providers that are the processor itself: they are not lost while anything runs.
HOST = frozenset({"CPUExecutionProvider", "cpu"})
#: What the runtimes say when an allocation fails: none has a class of error for it everywhere.
_SHORTAGE = (
    "bad_alloc", "bad allocation", "failed to allocate", "bfcarena::allocate", "failed to reshape runtime",
    "out of memory",
)  # fmt: skip
#: What drivers say when a device is gone, hung or in an error that sticks (CUDA, TensorRT, OpenCL, Level Zero, DirectX,
#: Vulkan, NPUs): nothing that an input could be the cause of.
_DEVICE_FAILURE = re.compile(
    r"device[ _](is )?(lost|removed|hung|reset|unavailable|disconnected)|(lost|no|invalid) device\b"
    r"|cuda (failure|error)|cuda(Error|_ERROR)|cudnn_status_(not_initialized|internal_error|execution_failed)"
    r"|cublas_status_(not_initialized|internal_error|execution_failed)|driver shutting down|xid\b"
    r"|cl_(device_not_available|invalid_command_queue|out_of_resources)|ze_result_error_device_lost"
    r"|dxgi_error_device|vk_error_device_lost|npu .{0,40}(timeout|hang)|ioctl .{0,60}failed",
    re.IGNORECASE,
)


class ProviderLostError(TryLaterError):
    """The provider failed, not the model and not the input: another one may answer the same request."""


class RunError(PeerError):
    """The runtime refused to run inputs that fit the signature: their values are wrong, or the model is."""


class DoubtfulError(RunError):
    """A provider other than the processor refused to run; whether it or the input is to blame, another one can tell."""


def is_device_failure(text: str) -> bool:
    """Whether a runtime's message tells of a device that is gone or broken."""
    return _DEVICE_FAILURE.search(text) is not None


def is_shortage(error: Exception) -> bool:
    """Whether an allocation failed."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _SHORTAGE)


def one_line(error: Exception) -> str:
    """A runtime's message on one line of at most 300 characters; it may hold a model's own words, printable here.

    A long one keeps its beginning and its end: what was being done stands first, and the cause last.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 300 else f"{text[:100]} ... {text[-195:]}"
    return "".join(char if char.isprintable() else "?" for char in text)


def return_memory() -> None:
    """Ask the allocator to give freed pages back: after a session is dropped RSS falls only then (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)

"""Variants of an fp32 ONNX model by ONNX Runtime's own tools: fp16, int8 static (QDQ), int8 dynamic.

Each maker reads one file and writes one; inputs and outputs keep their names and datatypes. Files are scratch and lie
in a folder that the caller made and removes. Needs the extra ``[pack]``; imported on the operator's machine only.

Static int8 is QDQ with unsigned activations and signed weights per channel (U8S8): **measured** on x86-64 with VNNI,
ONNX Runtime 1.32, a 3.7 ms convolutional network ran in 1.0 ms so, and in 4.1 ms with signed activations. The full
range is used: x86 without VNNI can saturate with it, which the golden set shows on the device that it happens on, while
a reduced range would cost accuracy on every device.

The CPU provider computes fp16 in fp32 with casts, many of which it removes: what fp16 agrees by here is its rounded
weights, and an overflow in half-precision arithmetic shows only on a device that has it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.base.errors import PeerError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[Any]]

#: Operators whose dynamic int8 kernels want unsigned weights: **measured**, ConvInteger with signed ones is 6 x slower.
_UNSIGNED_WEIGHTS = frozenset({"Conv"})


def check_tools(subject: str) -> None:
    """UnsupportedError that names the extra when the quantization tools are not installed."""
    try:
        import numpy  # noqa: F401, PLC0415
        import onnx  # noqa: F401, PLC0415
        import onnxruntime  # noqa: F401, PLC0415
        import sympy  # noqa: F401, PLC0415
        from onnxruntime.transformers import float16  # noqa: F401, PLC0415
    except ImportError as error:
        raise UnsupportedError(
            f"cannot pack {subject}: {error.name or error} is not installed", hint="pip install 'edge-agent[pack]'"
        ) from error


def prepare(model: Path, out: Path) -> Path:
    """``model`` with its shapes inferred and constants folded, as the quantizers want it; itself where that fails."""
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    for skip_symbolic in (False, True):
        with contextlib.suppress(Exception), _quiet():  # Any failure of the tool: try with less, then without.
            quant_pre_process(str(model), str(out), skip_symbolic_shape=skip_symbolic)
            return out
    return model


def make_fp16(model: Path, out: Path) -> None:
    """Weights and arithmetic in half precision; inputs and outputs stay as they are."""
    import onnx  # noqa: PLC0415
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    with _quiet():
        onnx.save_model(convert_float_to_float16(onnx.load_model(str(model)), keep_io_types=True), str(out))


def make_int8_static(model: Path, out: Path, feeds: Sequence[Feed], progress: Callable[[int, int], None]) -> None:
    """Weights per channel and activations in int8, ranges taken from ``feeds`` (MinMax)."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # noqa: PLC0415

    with _quiet():
        quantize_static(
            str(model),
            str(out),
            _reader(feeds, progress),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def make_int8_dynamic(model: Path, out: Path) -> None:
    """Weights in int8, activations quantized at run time by their own range."""
    import onnx  # noqa: PLC0415
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

    operators = {node.op_type for node in onnx.load_model(str(model)).graph.node}
    unsigned = bool(operators & _UNSIGNED_WEIGHTS)
    with _quiet():
        quantize_dynamic(str(model), str(out), weight_type=QuantType.QUInt8 if unsigned else QuantType.QInt8)


def run_all(model: Path, feeds: Sequence[Feed], progress: Callable[[int, int], None]) -> list[dict[str, NDArray[Any]]]:
    """The answers of ``model`` to each of ``feeds`` on this machine's CPU. PeerError when it does not load or run."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    answers: list[dict[str, NDArray[Any]]] = []
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        for index, feed in enumerate(feeds):
            progress(index, len(feeds))
            answers.append(dict(zip(names, session.run(names, dict(feed)), strict=True)))
    except Exception as error:  # The binding raises a dozen classes that share no base of their own.
        raise PeerError(f"cannot run {model.name}: {first_line(error)}") from error
    return answers


def first_line(error: BaseException) -> str:
    """The first line of what a tool says, bounded."""
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]


def _reader(feeds: Sequence[Feed], progress: Callable[[int, int], None]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader  # noqa: PLC0415

    class Feeds(CalibrationDataReader):  # type: ignore[misc]
        """Hands out the calibration examples one by one; None after the last."""

        def __init__(self) -> None:
            self._next = 0

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            if self._next == len(feeds):
                return None
            progress(self._next, len(feeds))
            self._next += 1
            return dict(feeds[self._next - 1])

    return Feeds()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tools warn about steps that are done here already, and print to stdout, which is for our results."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

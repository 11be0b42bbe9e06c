"""Proves that a written artifact is the model it was made from: its own runtime against torch, token by token.

Both run in a child process, window by window, so that a crash of native code is a message and memory stays small.
"""

from __future__ import annotations

import json
import math
import tempfile
import unicodedata
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cusprun.anatomy import describe
from cusprun.checkpoint import Weights, load_model
from cusprun.errors import Failed, InvalidRequest
from cusprun.formats import bits_of
from cusprun.runtimes import Runtime, default_threads, open_runtime
from cusprun.runtimes.child import run_in_child
from cusprun.runtimes.gguf_header import load_metadata

if TYPE_CHECKING:
    from cusprun.runtimes.folder_tokenizer import FolderTokenizer

# Least top-1 agreement and largest mean KL divergence (nats) with torch in float32.
STRICT = {"f32": (0.999, 1e-4), "f16": (0.995, 1e-3), "fp32": (0.999, 1e-4), "fp16": (0.995, 1e-3)}
GELU = ("gemma2", "gemma3")  # llama.cpp reads GELU from a table of 16-bit values, in f32 files too: near ties flip
GELU_TOP1 = 0.99
BROKEN_KLD = 2.0  # nats; rounding does not do this, wrong tensors do
# Mean KL divergence (nats) that each rounded type brings to the embedded dense model, by benchmarks.peers.limits; the
# smallest model that is exported loses most. Others may lose as many times as much:
LIMITS = Path(__file__).with_name("limits.json")
SLACK = 3.0
TIE = 1e-5  # relative difference of torch's own logits below which either token is its first choice
ROWS = 32  # rows compared at a time, in float64
HARD_STRINGS = (
    "Hello world! The tenant's rent is 1234567.89 €, isn't it?",
    "  two leading spaces,\ttab,\n\n\nthree newlines   and trailing spaces   ",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2, 3]}  # TODO\n\n\tif x != y:\n\t\tpass",
    "Straße, naïve, señor, élève, Ünïcödé, Ελληνικά, кириллица, 日本語のテキスト, 한국어, العربية, עברית, ไทย",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪, zero\u200bwidth, combining e\u0301, nbsp\u00a0here, ﬁ ligature, \ufeff bom",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|></s><s>[INST]<|eot_id|><unk><0x0A>",
    "I'm you're we'll they'd it's DON'T CAN'T 'tis ''quoted''",
    "1 12 123 1234 3.14159 1e-9 0xFF ½ ² ١٢٣ 一二三",
    "\r\nWindows\r\nlines\r\n\x0b\x0c",
    "",
)


@dataclass(frozen=True)
class Proof:
    """How far an artifact is from torch on the same tokens."""

    quant: str
    top1_agreement: float
    kld_mean: float  # nats per token, torch against the artifact
    kld_max: float
    tokens: int  # positions compared
    tokenizer_equal: bool
    tokenizer_difference: str | None  # the first text that the two tokenizers cut differently
    perplexity_torch: float
    perplexity_artifact: float
    bytes: int
    tensors: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prove_gguf(
    gguf: Path, model_dir: Path, windows: np.ndarray, *, strict: bool = True, threads: int | None = None
) -> Proof:
    """Compares ``gguf`` with the model folder on ``windows``, (n, window) token ids.

    Raises Failed where llama.cpp crashes or refuses the file, where the result is not finite or further away than
    rounding can bring it, and, with ``strict``, where an f32 or f16 file misses STRICT, a rounded one its type's limit,
    or the tokenizers differ.
    """
    info = load_metadata(gguf)
    found = _compare(gguf, model_dir, windows, info.vocab_size, info.quant, threads)
    proof = Proof(quant=info.quant, bytes=info.file_bytes, tensors=len(info.tensors), **found)
    _judge(gguf, proof, strict, info.architecture)
    return proof


def prove_onnx(
    folder: Path, model_dir: Path, quant: str, windows: np.ndarray, *, strict: bool = True, threads: int | None = None
) -> Proof:
    """:func:`prove_gguf` of an ONNX folder of type ``quant``; its graph passes onnx's own checker as well."""
    rows, tensors = run_in_child(check_graph, str(folder))
    found = _compare(folder, model_dir, windows, rows, quant, threads)
    size = sum(file.stat().st_size for file in folder.iterdir())
    proof = Proof(quant=quant, bytes=size, tensors=tensors, **found)
    _judge(folder, proof, strict)
    return proof


def check_graph(folder: str) -> tuple[int, int]:
    """Rows of the vocabulary and number of initializers; runs in the child process.

    Raises Failed where onnx's checker or its shape inference finds fault with the graph.
    """
    import onnx

    path = Path(folder) / "model.onnx"
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Failed(f"{path} is no sound graph: {error}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    (logits,) = (value for value in graph.output if value.name == "logits")
    return logits.type.tensor_type.shape.dim[-1].dim_value, len(graph.initializer)


def _compare(
    artifact: Path, model_dir: Path, windows: np.ndarray, vocabulary: int, quant: str, threads: int | None
) -> dict[str, Any]:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InvalidRequest(f"windows must be (n, window) with window >= 2, not {windows.shape}")
    if windows.min() < 0 or windows.max() >= vocabulary:
        raise InvalidRequest(f"windows hold token ids outside the vocabulary of {vocabulary}")
    with tempfile.TemporaryDirectory(prefix="cusprun-proof-") as scratch:
        saved = Path(scratch) / "windows.npy"
        np.save(saved, windows.astype(np.int64), allow_pickle=False)
        threads = threads or default_threads()
        found: dict[str, Any] = run_in_child(
            compare_on_windows, str(artifact), str(model_dir), str(saved), quant, threads
        )
    return found


def rounding_limit(quant: str) -> float | None:
    """The largest mean KL divergence (nats) of a rounded type; None for one that no figure is known of.

    A type of fewer bits is never allowed less than one of more: the embedded model came from a file of type q4_1, which
    it therefore fits better than another model would.
    """
    known = _limits()["types"]
    if quant not in known:
        return None
    above = [float(entry["kld_mean"]) for name, entry in known.items() if bits_of(name) >= bits_of(quant)]
    return min(BROKEN_KLD, SLACK * max(above))


@cache
def _limits() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(LIMITS.read_text(encoding="utf-8"))
    return found


def _judge(gguf: Path, proof: Proof, strict: bool, architecture: str = "") -> None:
    if not math.isfinite(proof.kld_mean) or proof.kld_mean > BROKEN_KLD:
        raise Failed(
            f"{gguf} is not the model it was made from: mean KL divergence to torch {proof.kld_mean:.3g} nats, "
            f"perplexity {proof.perplexity_artifact:.4g} against {proof.perplexity_torch:.4g}"
        )
    if not strict:
        return
    if not proof.tokenizer_equal:
        raise Failed(f"{gguf} cuts this text into other tokens than the model folder: {proof.tokenizer_difference}")
    limit = rounding_limit(proof.quant)
    if limit is not None and proof.kld_mean > limit:
        raise Failed(
            f"{gguf} is further from torch than {proof.quant} explains: mean KL {proof.kld_mean:.3g} nats on "
            f"{proof.tokens} tokens, and {limit:.3g} is {SLACK:g} times what the type costs {_limits()['model']}. "
            "Choose a type of more bits or another --rounding; export --no-prove writes it all the same"
        )
    if proof.quant in STRICT:
        least, largest = STRICT[proof.quant]
        if architecture in GELU:
            least = GELU_TOP1
        if proof.top1_agreement < least or proof.kld_mean > largest:
            raise Failed(
                f"{gguf} does not reproduce torch: top-1 agreement {proof.top1_agreement:.5f} (wanted {least}), "
                f"mean KL {proof.kld_mean:.3g} nats (wanted at most {largest}) on {proof.tokens} tokens"
            )


def compare_on_windows(artifact: str, model_dir: str, windows: str, quant: str, threads: int) -> dict[str, Any]:
    """What :class:`Proof` holds of the comparison; runs in the child process."""
    from cusprun.runtimes.folder_tokenizer import FolderTokenizer

    batches = np.load(windows, allow_pickle=False)
    length = batches.shape[1]
    reference = _Reference(Path(model_dir), batches, threads)  # done with its weights before the other has any
    candidate = _open(Path(artifact), quant, context=length, threads=threads)
    if candidate.n_vocab != reference.n_vocab:
        raise Failed(f"{artifact} has {candidate.n_vocab} tokens and {model_dir} {reference.n_vocab}")
    if length > candidate.n_context:
        raise InvalidRequest(f"windows of {length} tokens do not fit the model's context of {candidate.n_context}")
    divergences: list[np.ndarray] = []
    agreed = 0
    losses = np.zeros(2)
    for number, batch in enumerate(batches.tolist()):
        got = candidate.logits(batch)
        for first in range(0, length, ROWS):
            rows = slice(first, first + ROWS)
            targets = np.array(batch[first + 1 : first + ROWS + 1], dtype=np.int64)
            kld, same, nll = compare_logits(reference.logits(number, rows), got[rows], targets)
            divergences.append(kld)
            agreed += int(same.sum())
            losses += nll
    kld = np.concatenate(divergences)
    perplexities = np.exp(losses / (batches.shape[0] * (length - 1)))
    tokenizer = FolderTokenizer(Path(model_dir))
    texts = [*HARD_STRINGS, tokenizer.decode(batches[0].tolist())]
    if Path(artifact).suffix == ".gguf" and load_metadata(Path(artifact)).metadata["tokenizer.ggml.model"] == "llama":
        # Where a text or a special token is followed by a space, llama.cpp puts SentencePiece's own space in front as
        # SentencePiece does, and transformers' Metaspace does not: a difference of long standing, not of this file.
        texts = [text.strip() for text in texts if "<" not in text]
    if tokenizer.composes and Path(artifact).suffix == ".gguf":  # llama.cpp takes a text as it is
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    difference = tokenizer_difference(tokenizer, candidate, texts)
    return {
        "top1_agreement": agreed / kld.size,
        "kld_mean": float(kld.mean()),
        "kld_max": float(kld.max()),
        "tokens": int(kld.size),
        "tokenizer_equal": difference is None,
        "tokenizer_difference": difference,
        "perplexity_torch": float(perplexities[0]),
        "perplexity_artifact": float(perplexities[1]),
    }


class _Reference:
    """What torch makes of windows of token ids, (n, window), in float32.

    The hidden states are kept and the output matrix; the rest of the weights goes before the artifact is opened.
    """

    def __init__(self, folder: Path, windows: np.ndarray, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        model = load_model(folder)
        limit = int(model.config.max_position_embeddings)
        if windows.shape[1] > limit:
            raise InvalidRequest(f"windows of {windows.shape[1]} tokens do not fit the model's context of {limit}")
        with torch.inference_mode():
            self._states = [model.model(torch.from_numpy(ids[None])).last_hidden_state[0] for ids in windows]
        del model
        anatomy = describe(folder)
        name = anatomy.family.embedding if anatomy.tied else anatomy.family.output
        self._matrix = Weights(folder)[name].float()
        self._cap, self.n_vocab = anatomy.output_softcap, len(self._matrix)

    def logits(self, window: int, rows: slice) -> np.ndarray:
        """Logits of some positions of a window, (rows, n_vocab) float32."""
        import torch

        with torch.inference_mode():
            found = self._states[window][rows] @ self._matrix.T
            if self._cap is not None:
                found = self._cap * torch.tanh(found / self._cap)
        values: np.ndarray = found.numpy()
        return values


def _open(artifact: Path, quant: str, *, context: int, threads: int) -> Runtime:
    if artifact.suffix != ".gguf":
        return open_runtime(artifact, context=context, threads=threads)
    from cusprun.runtimes.llamacpp import LlamaCppRuntime

    # An f32 file is run in float32 throughout: the file is proved, not the rounding of flash attention.
    return LlamaCppRuntime(artifact, context=context, threads=threads, exact=quant == "f32")


def compare_logits(
    wanted: np.ndarray, got: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL divergence (rows,), whether the first choice agrees (rows,), and the summed loss of both on ``targets``.

    ``wanted`` and ``got`` are logits (rows, n_vocab); ``targets`` the next tokens of the first rows. The first choice
    agrees as well where ``got`` chooses a token that ``wanted`` rates like its own first, up to rounding.
    """
    log_p, log_q = _log_softmax(wanted), _log_softmax(got)
    kld = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    index = np.arange(len(wanted))
    best = wanted.max(axis=-1)
    chosen = wanted[index, got.argmax(axis=-1)]
    same = best - chosen <= TIE * np.maximum(1.0, np.abs(best))
    known = index[: len(targets)]
    nll = np.array([-log_p[known, targets].sum(), -log_q[known, targets].sum()])
    return kld, same, nll


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normal: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normal


def tokenizer_difference(reference: FolderTokenizer, candidate: Runtime, texts: list[str]) -> str | None:
    """The first of ``texts`` that the two cut differently, with what they make of it; None where there is none."""
    if reference.bos != candidate.bos:
        return f"token in front: {reference.bos} in torch, {candidate.bos} in the file"
    for text in texts:
        for special in (False, True):
            wanted, got = reference.encode(text, special=special), candidate.encode(text, special=special)
            if wanted != got:
                at = next((i for i, (w, g) in enumerate(zip(wanted, got, strict=False)) if w != g), 0)
                return (
                    f"{text[:80]!r}: from token {at} on {wanted[at : at + 6]} in torch, {got[at : at + 6]} in the file"
                )
    return None

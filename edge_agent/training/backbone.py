"""Loads the frozen base model, quantised as an assignment says, and settles the compute dtype.

Knows transformers, bitsandbytes and what a processor can multiply fast. It knows no adapters,
data or jobs. Loads local safetensors only: no pickles, no remote code, no network.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from edge_agent.training.memory import OutOfMemoryError, give_back, is_out_of_memory
from profiles.errors import MissingExtraError
from profiles.model import ENCODERS, ModelError
from protos.contract import AdapterSpec, Classification, Precision
from protos.head import head_tensors, initial_head

QUANTISED: tuple[Precision, ...] = ("nf4", "int8")
FIRST_BF16_CARD = (8, 0)  # CUDA compute capability: Ampere; Jetsons from Orin on
FIRST_FAST_FP16_CARD = (7, 0)  # Volta, Turing; Jetson Xavier

log = logging.getLogger("sketchfleet.trainer")


class BackboneError(ModelError):
    """The base model cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Backbone:
    """A loaded base; every parameter frozen, in evaluation mode."""

    model: Any  # transformers.PreTrainedModel; its classes carry no usable types
    tokenizer: Any
    compute_dtype: torch.dtype
    device: torch.device
    labels: tuple[str, ...] = ()  # that it tells apart; none: it predicts the next token

    @property
    def separator_id(self) -> int:
        """The token that stands between two documents."""
        for found in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if found is not None:
                return int(found)
        return 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def padding_id(self) -> int:
        """The token that stands where there is none."""
        found = self.tokenizer.pad_token_id
        return self.separator_id if found is None else int(found)

    @property
    def most_positions(self) -> int | None:
        """How long a sequence may be; None where positions are not learnt one by one."""
        config = self.model.config
        if config.model_type not in ENCODERS:
            return None
        found = int(config.max_position_embeddings)
        # RoBERTa's first position comes after its padding token's.
        return found - self.padding_id - 1 if config.model_type == "roberta" else found

    def encode_joined(
        self, texts: Sequence[tuple[str, ...]], most: int
    ) -> list[tuple[list[int], list[int]]]:
        """(token ids, segments) of texts, all single or all pairs, with special tokens.

        `most` tokens at most; the longer text of a pair is shortened at its end.
        """
        if self.model.config.model_type in ENCODERS:
            # All at once: single texts and pairs do not mix in a call, nor in a file.
            sides = [list(side) for side in zip(*texts, strict=True)]
            made = self.tokenizer(*sides, truncation=True, max_length=most)
            ids = made["input_ids"]
            kinds = made.get("token_type_ids") or [[0] * len(one) for one in ids]
            return list(zip(ids, kinds, strict=True))
        encoded = iter(self.encode([part for text in texts for part in text]))
        return [self._joined([next(encoded) for _ in text], most) for text in texts]

    def _joined(self, parts: list[list[int]], most: int) -> tuple[list[int], list[int]]:
        """A decoder classifies at the last token, so that no separator follows the last text."""
        if len(parts) == 1:
            ids = parts[0][:most] or [self.separator_id]
        else:
            first, second = parts
            room = most - 1
            kept = min(len(second), max(room - len(first), room // 2))
            ids = [*first[: room - kept], self.separator_id, *second[:kept]]
        return ids, [0] * len(ids)

    def checkpointing(self, wanted: bool) -> None:
        """Turns activation checkpointing of the decoder layers on or off."""
        # transformers 5 says "activation"; 4.57, which JetPack 6 ends at, knows only "gradient".
        known = hasattr(self.model, "activation_checkpointing_enable")
        word = "activation" if known else "gradient"
        if wanted == getattr(self.model, f"is_{word}_checkpointing"):
            return
        if wanted:
            getattr(self.model, f"{word}_checkpointing_enable")({"use_reentrant": False})
            # The base is frozen, so a checkpointed layer would see no input that wants gradients.
            # transformers 5 has done the same by now; a second hook would never be removed.
            if "_require_grads_hook" in vars(self.model):
                self.model.disable_input_require_grads()
            self.model.enable_input_require_grads()
        else:
            getattr(self.model, f"{word}_checkpointing_disable")()
            self.model.disable_input_require_grads()


def pick_device() -> torch.device:
    """The first CUDA card, else the processor."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, float16 on cards before that, else float32.

    A processor without bf16 units emulates them 20 to 60 times slower than it does float32; cards
    before Volta have float16 but multiply it slowly. Gradients through float16 are scaled
    (`steps.make_scaler`).
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= FIRST_BF16_CARD:
            return torch.bfloat16
        return torch.float16 if capability >= FIRST_FAST_FP16_CARD else torch.float32
    tell: Any = getattr(torch.cpu, "get_capabilities", dict)  # older torch cannot
    can = tell()
    fast = bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the flash-attn package can be used here.

    Without it torch's own attention picks its kernels, flash among them when no row holds several
    documents. The package also keeps those apart without a mask.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return False
    if torch.cuda.get_device_capability(device) < FIRST_BF16_CARD:  # its kernels begin there too
        return False
    tell: Any = transformers.utils  # untyped
    return bool(tell.is_flash_attn_2_available())


def load_base(
    folder: Path,
    precision: Precision,
    device: torch.device,
    spec: AdapterSpec | None = None,
) -> Backbone:
    """Loads the model and tokenizer of `folder` onto `device`, frozen.

    spec: of the run. Where it classifies, the model has a task head drawn from the run's seed, in
    place of any other; else it predicts the next token.

    "nf4" is 4-bit NormalFloat with double quantisation, "int8" is LLM.int8; the rest of such a
    model, and the sums, are in the compute dtype. "bf16" on hardware without bf16 units is turned
    into the compute dtype when loaded: float32 has the same values in twice the memory, float16
    the same memory and a narrower range. "fp32" computes in float32. Attention is the flash-attn
    package's where it can be used, else torch's, else the model's own.

    Raises `BackboneError` when the folder does not load, `OutOfMemoryError` when it does not fit,
    `MissingExtraError` without bitsandbytes.
    """
    _quieten()
    dtype = torch.float32 if precision == "fp32" else compute_dtype(device)
    task = None if spec is None else spec.classification
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        how: dict[str, Any] = options | {
            "dtype": dtype,
            "device_map": {"": device},
            "use_safetensors": True,
            "quantization_config": _quantisation(precision, dtype, task),
        }
        model: Any
        if spec is None or task is None:
            model = AutoModelForCausalLM.from_pretrained(folder, **how)
        else:
            model = _load_classifier(folder, task, how)
            _draw_head(model, spec)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (MissingExtraError, BackboneError):
        raise
    except Exception as error:  # transformers raises many unrelated types
        if is_out_of_memory(error):
            give_back()
            raise OutOfMemoryError(
                f"the base model in {folder} does not fit this device as {precision}; "
                "let the coordinator plan a smaller precision"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(
            f"the base model in {folder} cannot be loaded as {precision}: {reason}"
        ) from error
    model.requires_grad_(False)
    model.eval()
    if precision in QUANTISED:
        _settle_quantised_layers(model, dtype)
    if flash_attention(device, dtype):
        _use_flash(model)
    found = Backbone(model, tokenizer, dtype, device, () if task is None else task.labels)
    if task is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = found.padding_id  # where a decoder looks for the last token
    return found


def _load_classifier(folder: Path, task: Classification, options: dict[str, Any]) -> Any:
    """A sequence classifier whose head is still any. Raises `BackboneError`."""
    load: Any = AutoModelForSequenceClassification.from_pretrained  # untyped
    model, found = load(
        folder,
        num_labels=len(task.labels),
        id2label=dict(enumerate(task.labels)),
        label2id={label: i for i, label in enumerate(task.labels)},
        problem_type="single_label_classification",
        ignore_mismatched_sizes=True,  # a head for other labels, which is replaced anyway
        output_loading_info=True,
        **options,
    )
    lacking = [n for n in sorted(found["missing_keys"]) if not n.startswith(f"{task.head}.")]
    if lacking:  # torch would draw them, on every device others
        raise BackboneError(
            f"the base model in {folder} lacks {lacking[0]}, which a classifier of its kind needs; "
            "use a base that was saved with it"
        )
    # Of a frozen base dropout only adds noise, and keeps attention off its fast kernels.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def _draw_head(model: Any, spec: AdapterSpec) -> None:
    with torch.no_grad():
        for tensor in head_tensors(spec):
            weight = model.get_parameter(tensor.name)
            weight.copy_(torch.from_numpy(initial_head(spec.seed, tensor)))


def _quantisation(
    precision: Precision, dtype: torch.dtype, task: Classification | None = None
) -> Any:
    if precision not in QUANTISED:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "train") from error
    make: Any = BitsAndBytesConfig  # untyped
    kept = {} if task is None else {"llm_int8_skip_modules": [task.head]}  # the head is trained
    if precision == "int8":
        return make(load_in_8bit=True, **kept)
    return make(
        **kept,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _use_flash(model: Any) -> None:
    """Switches the model's attention; one that has no such kernels stays as it was loaded."""
    try:
        model.set_attn_implementation("flash_attention_2")
    except (ValueError, ImportError, AttributeError) as error:
        log.info("no flash attention", extra={"why": str(error).splitlines()[0][:200]})


def _settle_quantised_layers(model: Any, dtype: torch.dtype) -> None:
    """Makes 4-bit layers compute in `dtype` and stay trainable after an evaluation."""
    from bitsandbytes.nn.modules import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = dtype  # a pre-quantised folder brings its own
            # On AVX512-BF16 processors the first evaluation would repack the weights for good, in
            # a layout through which no gradient flows back, and with coarser block scales.
            layer.support_avx512bf16_for_cpu = False


def _quieten() -> None:
    speech: Any = transformers.logging  # untyped
    speech.set_verbosity_error()
    speech.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # LLM.int8 says at every matrix product that it casts its inputs.
    warnings.filterwarnings("ignore", module=r"bitsandbytes.*")
    warnings.filterwarnings("ignore", message=r".*MatMul8bitLt.*")
    # PEFT asks transformers 5 by the name that 4.57 has.
    warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")

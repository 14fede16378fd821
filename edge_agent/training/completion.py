"""A completion by a stock base and, if given, a stock PEFT adapter folder: what users will load."""

from __future__ import annotations

from pathlib import Path

from profiles.errors import MissingExtraError, SketchfleetError
from profiles.model import resolve_base


class CompletionError(SketchfleetError):
    """The adapter cannot be used with this base."""


def complete(base: str, adapter: Path | None, prompt: str, max_new_tokens: int) -> str:
    """`prompt` and its greedy continuation, in float32.

    Raises `ModelError` on a bad base, `CompletionError` on a bad adapter.
    """
    try:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train") from error
    folder = resolve_base(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        if not (adapter / "adapter_config.json").is_file():
            raise CompletionError(
                f"{adapter} is not a PEFT folder; make one with sketchfleet-coordinator export"
            )
        try:
            model = PeftModel.from_pretrained(model, str(adapter))
        except (RuntimeError, ValueError, KeyError) as error:
            raise CompletionError(f"{adapter} does not fit {base}: {error}") from error
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            **ids, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.15,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )  # fmt: skip
    return str(tokenizer.decode(out[0], skip_special_tokens=True))

"""Completes code with a stock base and, if given, a stock PEFT adapter folder.

    python -m edge_agent.training.completion --base FOLDER --adapter FOLDER --prompt "def "

What users will load elsewhere, loaded the same way; `sketchfleet-agent generate` runs this.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from edge_agent.training.backbone import load_base
from profiles.errors import SketchfleetError
from profiles.model import resolve_base

REPETITION_PENALTY = 1.15  # small models loop without it


class CompletionError(SketchfleetError):
    """The adapter cannot be used with this base."""


def complete(base: str, adapter: Path | None, prompt: str, max_new_tokens: int) -> str:
    """`prompt` and its greedy continuation, in float32 on the processor.

    Raises `ModelError` on a bad base, `CompletionError` on a bad adapter.
    """
    backbone = load_base(resolve_base(base), "fp32", torch.device("cpu"))
    from peft import PeftModel  # after load_base, which silences what peft imports

    model: Any = backbone.model
    if adapter is not None:
        if not (adapter / "adapter_config.json").is_file():
            raise CompletionError(
                f"{adapter} is not a PEFT folder; make one with sketchfleet-coordinator export"
            )
        try:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        except (RuntimeError, ValueError, KeyError) as error:
            raise CompletionError(f"{adapter} does not fit {base}: {error}") from error
    ids = torch.tensor([[backbone.separator_id, *backbone.encode([prompt])[0]]])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=REPETITION_PENALTY,
            pad_token_id=backbone.separator_id,
        )
    return str(backbone.tokenizer.decode(out[0], skip_special_tokens=True))


def main() -> int:
    """Prints one completion."""
    parser = argparse.ArgumentParser(prog="sketchfleet-agent generate")
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    try:
        print(complete(args.base, args.adapter, args.prompt, args.max_new_tokens))  # noqa: T201
    except SketchfleetError as error:
        print(f"sketchfleet-agent: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

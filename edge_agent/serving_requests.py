"""What a completions request asks for, out of its JSON; and errors, as OpenAI's clients read them.

Every field is checked here, so that nothing odd reaches the model. What the endpoint cannot do is
refused in a sentence where it would change the answer, and ignored where it would not.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from edge_agent.inference_folder import ExportInfo

MODEL = "sketchfleet"  # the one model there is; which adapter it stands for changes with the rounds
MOST_COMPLETIONS = 16  # of one request: prompts times n
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 256
DEFAULT_TOKENS = 16  # OpenAI's
LEAST_TOP_P = 1e-9  # one token; some clients send 0

Prompt = str | tuple[int, ...]


class RequestError(Exception):
    """A request that is refused: an HTTP status and what OpenAI's error object holds."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param,
                          "code": self.code}}  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """A checked request. prompts: text, or token ids as the tokenizer numbers them."""

    prompts: tuple[Prompt, ...]
    suffix: str | None
    max_tokens: int
    temperature: float
    top_p: float
    n: int
    stop: tuple[str, ...]
    seed: int | None
    echo: bool
    stream: bool
    include_usage: bool


def read_json(data: bytes) -> dict[str, Any]:
    """The body as an object. Raises `RequestError`."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no number")

    try:
        found = json.loads(data, parse_constant=refuse)
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except ValueError as error:  # of JSON, and of text that is no UTF-8
        raise RequestError(f"the body is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise RequestError("the body must be a JSON object")
    return found


def read_completion(plain: dict[str, Any], info: ExportInfo, most_tokens: int) -> Completion:
    """What is asked for; `most_tokens` is the most that one completion may have.

    Raises `RequestError`.
    """
    plain = {key: value for key, value in plain.items() if value is not None}
    model = _text(plain, "model", "")
    if not model:
        raise RequestError(f'model is missing; this server has "{MODEL}"', param="model")
    if model != MODEL:
        raise RequestError(
            f'there is no model {model[:100]!r} here; use "{MODEL}"',
            status=404, param="model", code="model_not_found",
        )  # fmt: skip
    _refuse_what_is_not_done(plain)
    prompts = _prompts(plain.get("prompt", ""), info)
    n = _whole(plain, "n", 1, 1, MOST_COMPLETIONS)
    if n * len(prompts) > MOST_COMPLETIONS:
        raise RequestError(
            f"{len(prompts)} prompts with n = {n} make {n * len(prompts)} completions, at most "
            f"{MOST_COMPLETIONS} are made at once; send several requests",
            param="n",
        )
    suffix = _text(plain, "suffix", "")
    if suffix and info.marks is None:
        raise RequestError(
            f"the tokenizer of {info.base} has no marks to fill in the middle; ask without a "
            "suffix",
            param="suffix",
        )
    if suffix and not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("a suffix needs a prompt that is text", param="suffix")
    echo = _flag(plain, "echo")
    if echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("echo needs a prompt that is text", param="echo")
    options = plain.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError("stream_options must be an object", param="stream_options")
    return Completion(
        prompts=prompts,
        suffix=suffix or None,
        max_tokens=min(_whole(plain, "max_tokens", DEFAULT_TOKENS, 0, None), most_tokens),
        temperature=_number(plain, "temperature", 1.0, 0.0, 2.0),
        top_p=max(_number(plain, "top_p", 1.0, 0.0, 1.0), LEAST_TOP_P),
        n=n,
        stop=_stops(plain.get("stop", [])),
        seed=_whole(plain, "seed", 0, None, None) % 2**62 if "seed" in plain else None,
        echo=echo,
        stream=_flag(plain, "stream"),
        include_usage=_flag(options, "include_usage"),
    )


def _refuse_what_is_not_done(plain: dict[str, Any]) -> None:
    """What would give another answer; at their neutral values these are accepted."""
    for key in ("logprobs", "logit_bias"):  # 0 logprobs would be those of what was drawn
        if key in plain and plain[key] is not False and plain[key] != {}:
            raise RequestError(f"{key} is not supported here; leave it out", param=key)
    for key in ("frequency_penalty", "presence_penalty"):
        if _number(plain, key, 0.0, -2.0, 2.0) != 0:
            raise RequestError(f"{key} is not supported here; leave it out or send 0", param=key)
    if _whole(plain, "best_of", 1, 1, None) > _whole(plain, "n", 1, 1, None):
        raise RequestError("best_of above n is not supported here; leave it out", param="best_of")


def _prompts(found: Any, info: ExportInfo) -> tuple[Prompt, ...]:
    """A text, some texts, token ids, or some lists of these."""
    if isinstance(found, str):
        return (_sound(found, "prompt"),)
    if not isinstance(found, list) or not found:
        raise RequestError(
            "prompt must be a text, a list of texts, token ids, or a list of lists of these",
            param="prompt",
        )
    if len(found) > MOST_COMPLETIONS and not isinstance(found[0], int):
        raise RequestError(
            f"{len(found)} prompts are too many; send at most {MOST_COMPLETIONS}", param="prompt"
        )
    if all(isinstance(one, str) for one in found):
        return tuple(_sound(one, "prompt") for one in found)
    if all(isinstance(one, list) for one in found):
        return tuple(_tokens(one, info) for one in found)
    return (_tokens(found, info),)


def _tokens(found: list[Any], info: ExportInfo) -> tuple[int, ...]:
    if not found or not all(type(one) is int and 0 <= one < info.vocabulary for one in found):
        raise RequestError(
            f"a prompt of token ids needs whole numbers from 0 to {info.vocabulary - 1}, at least "
            "one; do not mix them with text",
            param="prompt",
        )
    return tuple(found)


def _stops(found: Any) -> tuple[str, ...]:
    stops = [found] if isinstance(found, str) else found
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError("stop must be a text or a list of texts", param="stop")
    if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARACTERS for stop in stops):
        raise RequestError(
            f"stop takes at most {MOST_STOPS} texts of {MOST_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(_sound(stop, "stop") for stop in stops if stop)


def _text(plain: dict[str, Any], key: str, default: str) -> str:
    found = plain.get(key, default)
    if not isinstance(found, str):
        raise RequestError(f"{key} must be a text", param=key)
    return _sound(found, key)


def _sound(text: str, key: str) -> str:
    """JSON can spell halves of characters, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{key} holds half a character (a lone surrogate)", param=key) from error
    return text


def _flag(plain: dict[str, Any], key: str) -> bool:
    found = plain.get(key, False)
    if not isinstance(found, bool):
        raise RequestError(f"{key} must be true or false", param=key)
    return found


def _whole(
    plain: dict[str, Any], key: str, default: int, least: int | None, most: int | None
) -> int:  # fmt: skip
    found = plain.get(key, default)
    if type(found) is not int:
        raise RequestError(f"{key} must be a whole number", param=key)
    return int(_within(found, key, least, most))


def _number(
    plain: dict[str, Any], key: str, default: float, least: float, most: float
) -> float:  # fmt: skip
    found = plain.get(key, default)
    if type(found) is not int and not (type(found) is float and math.isfinite(found)):
        raise RequestError(f"{key} must be a number", param=key)
    return float(_within(found, key, least, most))


def _within(found: float, key: str, least: float | None, most: float | None) -> float:
    if (least is not None and found < least) or (most is not None and found > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise RequestError(f"{key} is {found}, it must be {allowed}", param=key)
    return found

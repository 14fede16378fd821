"""OpenAI's own client finds everything where it looks for it."""

from __future__ import annotations

import hashlib

import pytest

openai = pytest.importorskip("openai")

from edge_agent.serving_access import Access
from edge_agent.serving_adapter import Serving
from tests.edge_agent.serving.conftest import MARKS, LetterEngine

TOKEN = "0123456789abcdef"


def client_of(endpoint, key="none", **options):
    return openai.OpenAI(
        base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0, timeout=10, **options
    )


def test_models_are_listed_and_looked_up(serve) -> None:
    client = client_of(serve())
    assert [model.id for model in client.models.list()] == ["sketchfleet"]
    assert client.models.retrieve("sketchfleet").owned_by == "sketchfleet"
    with pytest.raises(openai.NotFoundError, match=r'use "sketchfleet"|not served'):
        client.models.retrieve("gpt-4")


def test_a_completion_has_text_usage_and_the_round_that_wrote_it(serve) -> None:
    engine = LetterEngine()
    engine.adapter = "d" * 64
    endpoint = serve(engine, names={"d" * 64: Serving("team", 7, "fleet", "d" * 64)})
    raw = client_of(endpoint).completions.with_raw_response.create(
        model="sketchfleet", prompt="abc", max_tokens=5, temperature=0
    )
    found = raw.parse()
    assert found.choices[0].text == "ABCAB" and found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, 5)
    assert found.system_fingerprint == "team-r7-fleet-dddddddd"
    told = {name: raw.headers[f"x-sketchfleet-{name}"] for name in ("run", "rounds", "adapter")}
    assert told == {"run": "team", "rounds": "7", "adapter": "fleet"}
    assert raw.headers["x-request-id"] == found.id


def test_streamed_pieces_make_the_same_text(serve) -> None:
    client = client_of(serve())
    stream = client.completions.create(
        model="sketchfleet", prompt="abc", max_tokens=7, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "ABCABCA"
    assert len(chunks) == 8, "one a token, and usage"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 6 + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 4 + 7
    assert len({c.id for c in chunks}) == 1 and chunks[0].system_fingerprint == "base"


def test_several_prompts_and_copies_are_numbered(serve) -> None:
    endpoint = serve()
    found = client_of(endpoint).completions.create(
        model="sketchfleet", prompt=["ab", "xy"], n=2, max_tokens=3, seed=-5, echo=True
    )
    assert [(c.index, c.text) for c in found.choices] == [
        (0, "abABA"), (1, "abABA"), (2, "xyXYX"), (3, "xyXYX")
    ]  # fmt: skip
    assert found.usage.prompt_tokens == 6 and found.usage.completion_tokens == 12
    seeds = [asked["seed"] for asked in endpoint.engine.asked]
    assert seeds[0] == seeds[2] >= 0 and seeds[1] == seeds[0] + 1, "copies differ"
    tokens = client_of(endpoint).completions.create(
        model="sketchfleet", prompt=[[97, 98], [99]], max_tokens=2
    )
    assert [c.text for c in tokens.choices] == ["AB", "CC"]


def test_a_suffix_is_filled_in_where_the_tokenizer_can(serve) -> None:
    endpoint = serve(LetterEngine(MARKS))
    client_of(endpoint).completions.create(
        model="sketchfleet", prompt="ab", suffix="cd", max_tokens=1, stop=["Z", "Q"], top_p=0
    )
    asked = endpoint.engine.asked[0]
    assert asked["prompt"] == [0, 300, 97, 98, 301, 99, 100, 302]
    assert asked["stop"] == ("Z", "Q") and 0 < asked["top_p"] < 1e-6
    with pytest.raises(openai.BadRequestError, match="no marks to fill in") as refused:
        client_of(serve()).completions.create(model="sketchfleet", prompt="a", suffix="b")
    assert refused.value.param == "suffix"


def test_errors_are_of_the_classes_that_programs_catch(serve) -> None:
    endpoint = serve(access=Access(hashlib.sha256(TOKEN.encode()).digest()))
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer") as refused:
        client_of(endpoint, "wrong-wrong-wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    client = client_of(endpoint, TOKEN)
    create = client.completions.create
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'") as refused:
        create(model="gpt-4", prompt="a")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="sketchfleet", prompt="a" * 200)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        create(model="sketchfleet", prompt="a", logprobs=3)
    with pytest.raises(openai.InternalServerError, match="log says why"):
        create(model="sketchfleet", prompt="defect")
    with pytest.raises(openai.NotFoundError, match="POST /v1/completions"):
        client.chat.completions.create(
            model="sketchfleet", messages=[{"role": "user", "content": "a"}]
        )
    assert create(model="sketchfleet", prompt="a", max_tokens=1).choices[0].text == "A"


def test_asynchronous_clients_may_leave_in_mid_stream(serve) -> None:
    import asyncio

    endpoint = serve(LetterEngine(step_s=0.01), most_tokens=90)

    async def leave() -> None:
        client = openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none")
        stream = await client.completions.create(
            model="sketchfleet", prompt="abc", max_tokens=90, stream=True
        )
        async for _ in stream:
            break
        await stream.close()
        await client.close()
        for _ in range(100):
            if not endpoint.engine.running:
                return
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert not endpoint.engine.running and endpoint.engine.steps < 60, "nobody reads the rest"

"""What a request may say: OpenAI's parameters, as far as they are served here.

A parameter that would change the answer and is not served is refused unless it has the value that changes nothing.
Those that say nothing about the answer (`user`, `metadata` and the like) are accepted and not read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MOST_STOPS, LONGEST_STOP = 4, 256
MOST_SCORES = 20


def _only(*accepted: Any) -> AfterValidator:
    """Accepts only values that change nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in accepted:
            shown = " or ".join(repr(each) for each in (*accepted, None))
            raise ValueError(f"this is not supported, accepted is {shown}")
        return value

    return AfterValidator(check)


def _as_unicode(text: str) -> str:
    """Half of a pair of surrogates is valid in JSON, and no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("accepted is text that can be written in UTF-8") from None
    return text


Text = Annotated[str, AfterValidator(_as_unicode)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """One prompt, a text or token ids, as a list of one."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(each) is int for each in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("accepted is a text, a list of token ids, or a list of several of one of these")
    for each in value:
        if isinstance(each, str):
            _as_unicode(each)
        if not isinstance(each, str) and not (isinstance(each, list) and all(type(token) is int for token in each)):
            raise ValueError("accepted is a text, a list of token ids, or a list of several of one of these")
    return value


StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP), AfterValidator(_as_unicode)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Checked):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, _only(False)] = None


class Common(_Checked):
    """What both kinds of requests have."""

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    n: Annotated[int | None, Field(ge=1)] = None
    stop: Annotated[list[StopString] | None, Field(max_length=MOST_STOPS), BeforeValidator(_as_list)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float | None, _only(0)] = None
    presence_penalty: Annotated[float | None, _only(0)] = None
    logit_bias: Annotated[dict[str, Any] | None, _only({})] = None
    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    store: Annotated[bool | None, _only(False)] = None

    @property
    def usage_in_stream(self) -> bool:
        """Whether the last chunk of a stream counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(_Checked):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(_Checked):
    """One turn. What OpenAI's client adds to an answer that is sent back is accepted while it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]
    refusal: Annotated[Any, _only()] = None
    annotations: Annotated[Any, _only([])] = None
    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None

    @property
    def text(self) -> str:
        """Its parts, joined."""
        return "".join(part.text for part in self.content)


class ChatRequest(Common):
    """A request of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_SCORES)] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none")] = None
    parallel_tool_calls: Any = None  # it speaks of tools, and there are none
    modalities: Annotated[Any, _only(["text"])] = None
    reasoning_effort: Annotated[Any, _only("none")] = None

    @property
    def scores(self) -> int | None:
        """How many of the most probable tokens are scored at each step; None: no token is."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Common):
    """A request of /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_as_prompts)]
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_SCORES)] = None
    best_of: Annotated[int | None, _only(1)] = None
    echo: Annotated[bool | None, _only(False)] = None
    suffix: Annotated[str | None, _only("")] = None

    @property
    def scores(self) -> int | None:
        """As in `ChatRequest`."""
        return self.logprobs


def message_of(errors: Any) -> tuple[str, str | None]:
    """One sentence for the first error of pydantic, and the parameter that it is about."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "text")]
    name = ".".join(path)
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    if not path:
        return "the body: accepted is a JSON object", None
    if first["type"] == "missing":
        return f"{name}: missing", path[0]
    if first["type"] == "extra_forbidden":
        return f"{name}: this parameter is not supported", path[0]
    got = repr(first.get("input"))
    reason = str(first["msg"]).removeprefix("Value error, ")
    return f"{name}: got {got if len(got) <= 80 else got[:80] + '…'}, but {reason[:1].lower()}{reason[1:]}", path[0]

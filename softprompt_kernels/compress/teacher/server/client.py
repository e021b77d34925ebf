"""A client of a server with OpenAI's protocol, such as vLLM, SGLang, TGI or llama.cpp.

A question goes to `/v1/completions` as the token ids that the local teacher would read, so that no template of the
server stands between. A server that refuses token ids gets the text that they are encoded from. vLLM gives back token
ids too (`return_token_ids`); elsewhere the text of the answer is encoded again. Answers come from the whole
distribution: a server's own top-k, top-p and penalties are switched off.

A request that fails in a way that may pass is tried again, by tenacity: no connection, a time-out, 408, 409, 429 and
500 to 599, `TRIES` times in all, with waits that grow, or as the server says in `Retry-After`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from softprompt_kernels.errors import SoftPromptError

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from tenacity import RetryCallState

INSTALL = 'pip install --editable ".[server]"'
TRIES = 6
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds between two tries."""
KEY_VARIABLE = "OPENAI_API_KEY"
_PASSING = (408, 409, 429)


@dataclass(frozen=True)
class ServerOptions:
    """Where the server is and how it is asked.

    Args:
        address: the URL up to `/v1`.
        model: the name that the server knows the model by; None: the only one that it has.
        timeout: seconds that a request may take.
        requests: most requests at a time.
    """

    address: str
    model: str | None = None
    timeout: float = 120.0
    requests: int = 16


@dataclass(frozen=True)
class Completion:
    """What the server wrote for one question.

    Args:
        text: without the tokens that end it.
        token_ids: its tokens, if the server says them.
        ended: whether the model ended it; else it was cut at the greatest length.
        model: the name of the model that the server says it comes from.
    """

    text: str
    token_ids: tuple[int, ...] | None
    ended: bool
    model: str


def check_packages() -> None:
    """Raise SoftPromptError if a package is missing that the client needs."""
    missing = [name for name in ("openai", "tenacity") if find_spec(name) is None]
    if missing:
        raise SoftPromptError(f"server: needs {' and '.join(missing)}, which is not installed; {INSTALL}")


def served_model(options: ServerOptions) -> str:
    """The name of the model to ask, after a look at the list of models of the server.

    Raises:
        SoftPromptError: a package is missing, the server cannot be reached or refuses the key, or it does not have the
            model.
    """
    check_packages()
    import openai

    try:
        with openai.OpenAI(
            base_url=options.address, api_key=_key(), max_retries=0, timeout=min(20.0, options.timeout)
        ) as client:
            names = [model.id for model in client.models.list().data]
    except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
        raise _refused(options, error) from error
    if options.model is None and len(names) == 1:
        return names[0]
    if options.model not in names:
        got = "no name" if options.model is None else repr(options.model)
        raise SoftPromptError(
            f"server_model: got {got}, accepted are the models of {options.address}: {', '.join(names) or 'none'}"
        )
    return options.model


class Client:
    """Asks the server one question at a time, in a running event loop.

    Args:
        options: of the server.
        model: from `served_model`.
        new_tokens: at most so many tokens an answer.
        temperature: of sampling, 0 is greedy.
        end_tokens: any of them ends an answer.
        as_text: the text that is encoded as some token ids; None if there is none.
    """

    def __init__(
        self,
        options: ServerOptions,
        model: str,
        new_tokens: int,
        temperature: float,
        end_tokens: Collection[int],
        as_text: Callable[[Sequence[int]], str | None],
    ) -> None:
        import openai

        self.options, self.model, self.as_text = options, model, as_text
        self.takes_ids = True
        self.client: AsyncOpenAI = openai.AsyncOpenAI(
            base_url=options.address, api_key=_key(), max_retries=0, timeout=options.timeout
        )
        self.settings: dict[str, Any] = {"max_tokens": new_tokens, "temperature": temperature, "top_p": 1.0}
        self.extra: Mapping[str, Any] = {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(end_tokens),
            "return_token_ids": True,
            "skip_special_tokens": True,
        }

    async def complete(self, prompt: Sequence[int], seed: int) -> Completion:
        """The answer to a question.

        Args:
            prompt: the token ids of context and question.
            seed: of sampling.

        Raises:
            SoftPromptError: the server does not answer, after all tries, or gives what is no completion.
        """
        import openai

        try:
            if self.takes_ids:
                try:
                    return _read(await self._create(list(prompt), seed))
                except (openai.BadRequestError, openai.UnprocessableEntityError):
                    text = self.as_text(prompt)
                    if text is None:
                        raise
                    completion = _read(await self._create(text, seed))
                    self.takes_ids = False
                    return completion
            return _read(await self._create(self.as_text(prompt) or list(prompt), seed))
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise _refused(self.options, error) from error

    async def _create(self, prompt: list[int] | str, seed: int) -> Any:
        """The response to a request, after some tries."""
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

        tries = AsyncRetrying(
            stop=stop_after_attempt(TRIES), wait=_wait, retry=retry_if_exception(_may_pass), reraise=True
        )
        async for attempt in tries:
            with attempt:
                return await self.client.completions.create(
                    model=self.model, prompt=prompt, seed=seed, extra_body=self.extra, **self.settings
                )

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


def _read(answer: Any) -> Completion:
    """A completion from what the client made of the response, in which any field may be missing or of another type."""
    choice = answer.choices[0]
    if not isinstance(choice.text, str):
        raise TypeError("the response has no text")
    ids = (choice.model_extra or {}).get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(isinstance(token, int) for token in ids)):
        raise TypeError("token_ids are no list of integers")
    return Completion(
        choice.text, None if ids is None else tuple(ids), choice.finish_reason != "length", str(answer.model)
    )


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    import openai

    if isinstance(error, openai.APIConnectionError):  # with time-outs
        return True
    return isinstance(error, openai.APIStatusError) and (error.status_code in _PASSING or error.status_code >= 500)


def _wait(state: RetryCallState) -> float:
    """Seconds to the next try: what the server asks for, or a random time up to a limit that doubles."""
    import openai
    from tenacity import wait_random_exponential

    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, openai.APIStatusError):
        try:
            return min(LONGEST_WAIT, max(0.0, float(error.response.headers["retry-after"])))
        except (KeyError, ValueError):  # none, or a date
            pass
    return SHORTEST_WAIT / 2 + wait_random_exponential(multiplier=SHORTEST_WAIT, max=LONGEST_WAIT)(state)


def _refused(options: ServerOptions, error: Exception) -> SoftPromptError:
    """What the user is told of an error of a request."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        what = f"does not answer within {options.timeout:g} s; a longer server_timeout waits longer"
    elif isinstance(error, openai.APIConnectionError):
        what = f"cannot be reached ({' '.join(str(error.__cause__ or error).split())})"
    elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        what = f"refuses the key; it is read from {KEY_VARIABLE}"
    elif isinstance(error, openai.APIStatusError):
        what = f"answers {error.status_code}: {' '.join(error.message.split())[:300]}"
    else:
        what = f"gives what is no response of OpenAI's protocol ({' '.join(str(error).split())[:200]})"
    return SoftPromptError(f"server: {options.address} {what}")


def _key() -> str:
    return os.environ.get(KEY_VARIABLE) or "none"

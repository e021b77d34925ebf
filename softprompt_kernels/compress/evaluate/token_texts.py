"""The tokens of an answer as pieces of its text.

A tokenizer decodes a sequence, not a token: a character of several bytes may be spread over tokens, and a blank may
depend on what stands before. So piece i is what the text gains by token i. The tokens of a character that is not
complete yet get an empty piece, and the one that completes it gets the character.

Cost: a few tokens are decoded again for each token.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> tuple[str, ...]:
    """One text for each token, with the names of special tokens. Joined they are the decoded sequence.

    Args:
        tokenizer: of the model.
        token_ids: of an answer.
    """

    def decode(start: int, stop: int) -> str:
        return str(tokenizer.decode(list(token_ids[start:stop]), clean_up_tokenization_spaces=False))

    # The text before `read` is given out. The tokens from `known` to `read` are decoded again, as what goes before the
    # next token.
    pieces: list[str] = []
    known = read = 0
    for stop in range(1, len(token_ids) + 1):
        before, after = decode(known, read), decode(known, stop)
        if after.endswith(_INCOMPLETE) and stop < len(token_ids):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        known, read = read, stop
    return tuple(pieces)

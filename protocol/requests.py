"""What a client asked for, tokenised and validated: the unit of work of every worker."""

import msgspec

from protocol.ids import AttemptRef, RequestId

DEFAULT_NAMESPACE = "default"


class ReasoningLimit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """After ``max_tokens`` tokens of reasoning the next one is the token ``close``. The prompt has
    ``begun`` the reasoning, or else the token ``open`` does as the first of the output.
    """

    max_tokens: int
    close: int
    open: int | None = None
    begun: bool = False


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Ranges are the gateway's to check; workers trust them.

    ``temperature`` 0 means greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and penalties at their
    defaults are off. Randomness is Philox(``seed``, ``choice``, token index), so a request
    continues identically on another worker.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    choice: int = 0  # the k-th of n choices: same seed, other random stream
    logprobs: int | None = None  # alternatives to report per token; 0 reports the chosen one only
    logprob_token_ids: tuple[int, ...] = ()  # reported in place of the likeliest alternatives
    prompt_logprobs: int | None = (
        None  # as ``logprobs``, for the prompt's tokens from the second on
    )
    reasoning_limit: ReasoningLimit | None = None
    grammar: str | None = None  # that the output must match: ``runtime.grammars.grammar_of``


class StopConditions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a worker ends a request by itself. Stop strings are the gateway's business."""

    max_tokens: int
    min_tokens: int = 0  # before this many, stop tokens are masked out of the logits
    stop_token_ids: tuple[int, ...] = ()  # end of sequence included, unless it is to be ignored


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice of one HTTP request; ``n`` choices are ``n`` of these with a common prompt."""

    request_id: RequestId
    attempt: int
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopConditions
    namespace: str = DEFAULT_NAMESPACE  # prefix cache hits never cross namespaces
    caller: str = ""  # callers that wait share what becomes free
    priority: int = 0  # higher waits less
    stream: int = 0  # the gateway's own number of the attempt, for ``plain_tokens``; 0: it has none
    output_token_ids: tuple[int, ...] = ()  # by earlier attempts: read as if they were prompt

    @property
    def ref(self) -> AttemptRef:
        return AttemptRef(self.request_id, self.attempt)

    @property
    def context_token_ids(self) -> tuple[int, ...]:
        """What is to be prefilled."""
        if not self.output_token_ids:
            return self.prompt_token_ids
        return self.prompt_token_ids + self.output_token_ids

    @property
    def num_context_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_total_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.stop.max_tokens


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities before temperature and truncation, after penalties and bias.

    ``top`` holds (token id, logprob), most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()

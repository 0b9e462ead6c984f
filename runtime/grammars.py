"""Which tokens may come next, for output that must match a grammar. The only user of llguidance.

Gateway and workers share the limits below, so what one compiles the others can. Invariant: a
matcher that has been fed only tokens it allowed never has to take one back, and a grammar that is
too much for the limits fails its own request only. Logits, requests and seeds are not known here.

An end of the text is an entry of its own behind the vocabulary's last token: which of a model's
tokens end a request is the request's business.
"""

import re
from collections import OrderedDict
from typing import Literal

import llguidance

from protocol.errors import InvalidRequest
from runtime.vocabulary import Vocabulary

Kind = Literal["json", "regex", "lark"]

LIMITS = llguidance.LLParserLimits(
    max_grammar_size=100_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)
# Room for indented and for compact JSON, but not for white space without end.
WHITE_SPACE = r"(\n {0,16})| "
MAX_CACHED_GRAMMARS = 64
MAX_CACHED_BYTES = 4 << 20  # of their sources
_MAX_REASON_CHARS = 300
_REGEX_ERROR = re.compile(r"regex parse error:.*?^error: ([^\n]+)", re.DOTALL | re.MULTILINE)
_ONE_OF = "oneOf: no value may fit two of the cases, and these may; use anyOf"


def grammar_of(kind: Kind, source: str, *, lenient: bool = False) -> str:
    """The form of a constraint that goes to workers; it is hardly checked here.

    ``source`` is a JSON schema, a regular expression or a Lark grammar. ``lenient`` skips what of
    a schema cannot be enforced instead of failing on it.

    Raises:
        InvalidRequest: ``source`` is no JSON schema at all.
    """
    if kind == "json":
        try:
            return llguidance.LLMatcher.grammar_from_json_schema(
                source, overrides={"whitespace_pattern": WHITE_SPACE, "lenient": lenient}
            )
        except ValueError as error:
            raise _refused(str(error)) from error
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(source)
    return llguidance.LLMatcher.grammar_from_lark(source)


class Matcher:
    """Where one text stands in its grammar."""

    __slots__ = ("_matcher", "end")

    def __init__(self, matcher: llguidance.LLMatcher, end: int) -> None:
        self._matcher = matcher
        self.end = end  # the number behind the last token's

    def allowed(self) -> bytes:
        """One bit for each token and then one for the end, lowest bit first; maybe zeros follow.

        Raises:
            InvalidRequest: the grammar has become too much for the limits.
        """
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        return mask

    def accept(self, token_id: int) -> bool:
        """Move on by one token; False if the grammar does not allow it here."""
        return self._matcher.consume_token(token_id)


class Grammars:
    """Matchers over one vocabulary. Compiled grammars are kept, since callers repeat them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._end = len(vocabulary.tokens)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(vocabulary)), n_vocab=self._end + 1
        )
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._compiled_bytes = 0

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of a text.

        Raises:
            InvalidRequest: ``grammar`` is not valid, or too large.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
            if compiled.is_error():
                raise _refused(compiled.get_error())
            self._keep(grammar, compiled)
        else:
            self._compiled.move_to_end(grammar)
        return Matcher(compiled.deep_copy(), self._end)

    def _keep(self, grammar: str, compiled: llguidance.LLMatcher) -> None:
        self._compiled[grammar] = compiled
        self._compiled_bytes += len(grammar)
        while (
            len(self._compiled) > MAX_CACHED_GRAMMARS or self._compiled_bytes > MAX_CACHED_BYTES
        ) and len(self._compiled) > 1:
            dropped, _ = self._compiled.popitem(last=False)
            self._compiled_bytes -= len(dropped)


class _Tokens:
    """The vocabulary as llguidance reads it.

    Calling it cuts text greedily, longest token first. That is used only for text which a grammar
    leaves no choice in, and any cut of it is right.
    """

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        end = len(vocabulary.tokens)
        self.tokens = [*vocabulary.tokens, b"<end of text>"]
        self.eos_token_id = end
        self.special_token_ids = [*vocabulary.special_ids, end]
        special = set(vocabulary.special_ids)
        self._ids = {
            token: i for i, token in enumerate(vocabulary.tokens) if token and i not in special
        }
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        rest = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        while rest:
            lengths = range(min(self._longest, len(rest)), 0, -1)
            length = next((n for n in lengths if rest[:n] in self._ids), None)
            if length is None:
                break  # a byte that no token stands for; the rest is left to the mask
            ids.append(self._ids[rest[:length]])
            rest = rest[length:]
        return ids


def _refused(reason: str) -> InvalidRequest:
    """The library's first line, or what is wrong with a regular expression; what it says of its own
    inside or its options is for nobody.
    """
    regex = _REGEX_ERROR.search(reason)
    line = f"invalid regular expression: {regex.group(1)}" if regex else reason.strip()
    line = line.partition("\n")[0][:_MAX_REASON_CHARS]
    if "coerce_one_of" in line:
        line = _ONE_OF
    if "panic" in line or "internal" in line.lower() or " " not in line or not line.isprintable():
        line = "it is too complex, or uses something that is not supported"
    return InvalidRequest(f"the grammar cannot be used: {line}")

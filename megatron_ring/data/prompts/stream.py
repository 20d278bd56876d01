"""The stream of prompts for rollouts and evaluations, each with the reference for its verifier."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_ring.config.blend import parse_blend
from megatron_ring.config.rl import RolloutConfig
from megatron_ring.data.blend import Blend
from megatron_ring.data.json_text import count_in, counts_in
from megatron_ring.data.prompts.problem_lines import Problem
from megatron_ring.data.prompts.same_problem import Asked, asked, is_among
from megatron_ring.data.prompts.sources import JsonlSource, PromptSource, open_source
from megatron_ring.data.shuffle import Shuffle
from megatron_ring.data.text.chat import render_prompt
from megatron_ring.data.text.tokenizer import Tokenizer
from megatron_ring.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One draw from the stream of problems.

    ``uid`` counts the draws of a run (resumes included), so that it is unique in a run. ``tokens`` end with the
    generation prompt; a response continues there. ``domain`` names the reward function and ``reference`` is its input.
    ``asked`` identifies the problem (:mod:`megatron_ring.data.prompts.same_problem`).

    Example: ``Prompt(uid=17, domain="math", text="12 + 7 - 3 = ?", tokens=(5, 88, 41, 6),
    reference={"answer": "16"})``.
    """

    uid: int
    domain: str
    text: str
    tokens: tuple[int, ...]
    reference: Mapping[str, Any]
    asked: Asked = ()


def open_prompts(
    words: Sequence[str],
    tokenizer: Tokenizer,
    settings: RolloutConfig,
    *,
    seed: int,
    excluded: Collection[Asked] = (),
) -> PromptStream:
    """The stream of ``settings.prompt_data`` or ``settings.eval_prompt_data``.

    Args:
        words: one source, or weight, source, weight, source ... (see
            :func:`~megatron_ring.data.prompts.sources.open_source`).
        tokenizer: its chat template is applied.
        settings: lengths, solve rates and the suffix.
        seed: of the shuffles; the same on every rank.
        excluded: ``Prompt.asked`` of problems that must not be drawn, such as held-out ones.

    Raises:
        DataError: a source cannot be read or has no problems.
    """
    low, high = settings.solve_rate_min, settings.solve_rate_max
    sources = [
        (weight, open_source(source, solve_rate_min=low, solve_rate_max=high))
        for weight, source in parse_blend("prompt_data", words, "source")
    ]
    return PromptStream(
        sources,
        tokenizer,
        seed=seed,
        max_prompt_length=settings.max_prompt_length,
        prompt_suffix=settings.prompt_suffix,
        excluded=excluded,
    )


class PromptStream:
    """Prompts, epoch after epoch, blended by weight. Every rank has a copy and moves it in the same way.

    Each source is read in a new order per epoch, at a rate given by its weight. A problem that is left out (too long, or
    excluded) is replaced by the next one of the same source, so that the sources' shares stay exact.

    Example: ``PromptStream([(Fraction(1), source)], tokenizer, seed=1).next(512)``.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Fraction, PromptSource]],
        tokenizer: Tokenizer,
        *,
        seed: int,
        max_prompt_length: int,
        prompt_suffix: str = "",
        excluded: Collection[Asked] = (),
    ) -> None:
        """
        Args:
            sources: weight and problems of each source.
            tokenizer: its chat template is applied.
            seed: of the shuffles.
            max_prompt_length: a prompt with more tokens, generation prompt included, is left out.
            prompt_suffix: a line after the problem, in every domain except code.
            excluded: ``Prompt.asked`` of problems that must not be drawn.
        """
        self._sources = [source for _, source in sources]
        self._weights = [weight for weight, _ in sources]
        self.domains = frozenset[str]().union(*(source.domains for source in self._sources))
        """Domains of the problems."""
        self._blend = Blend([weight for weight, _ in sources])
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_prompt_length = max_prompt_length
        self._suffix = prompt_suffix
        self._excluded = frozenset(excluded)
        self._drawn = 0
        self._positions = [0] * len(sources)
        self.num_too_long = 0
        """Prompts left out so far because of their length; each epoch counts them again."""
        self.num_excluded = 0
        """Prompts left out so far because they were excluded."""
        self.num_outside_solve_rates = sum(source.num_left_out for source in self._sources)
        """Problems that the sources left out when they were opened."""
        identity = [(str(weight), source.fingerprint) for weight, source in sources]
        self.fingerprint = hashlib.blake2b(repr((identity, seed)).encode(), digest_size=8).hexdigest()
        """Equal fingerprints give equal problems in equal order."""
        for source in self._sources:
            self._must_leave_some(source)

    @property
    def sources(self) -> Sequence[PromptSource]:
        """The sources of the problems, in the order of the blend."""
        return self._sources

    def next(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts, with consecutive uids.

        Raises:
            DataError: a source has no problem that may be drawn, or the chat template refuses one.
        """
        return [self._draw() for _ in range(count)]

    def each_once(self, count: int) -> list[Prompt]:
        """``count`` different prompts, blended by weight; all there are, if they are fewer.

        Evaluations use it, so that each problem has the same weight: a prompt that a source repeats, or that two sources
        share, is drawn once. When a source is exhausted, the other sources continue.

        Raises:
            DataError: no source has a problem that may be drawn, or the chat template refuses one.
        """
        found: list[Prompt] = []
        asked: set[tuple[str, tuple[int, ...]]] = set()
        left = [place for place, weight in enumerate(self._weights) if weight > 0]
        while left and len(found) < count:
            blend = Blend([self._weights[place] for place in left])
            for turn in itertools.count():
                place = left[blend.locate(turn)[0]]
                prompt = self._next_of(place, len(self._sources[place]) - self._positions[place])
                if prompt is None:
                    left.remove(place)
                    break
                if (prompt.domain, prompt.tokens) in asked:
                    self._drawn -= 1
                    continue
                asked.add((prompt.domain, prompt.tokens))
                found.append(prompt)
                if len(found) == count:
                    break
        if not found:
            raise self._nothing_of(self._sources[0])
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, as numbers, strings and lists."""
        return {
            "drawn": self._drawn,
            "positions": list(self._positions),
            "num_too_long": self.num_too_long,
            "num_excluded": self.num_excluded,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a :meth:`state_dict`.

        Raises:
            DataError: the state belongs to other problems; some would be drawn twice or never.
        """
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"the checkpoint was drawing other problems (fingerprint {state['fingerprint']}, now "
                f"{self.fingerprint}); keep prompt_data, solve rates and seed, or start from its weights alone with "
                "--pretrained-checkpoint and another --save"
            )
        positions = counts_in(state, "positions")
        if len(positions) != len(self._sources):
            raise ValueError(f"has {len(positions)} positions for {len(self._sources)} sources")
        self._drawn, self._positions = count_in(state, "drawn"), list(positions)
        self.num_too_long = count_in(state, "num_too_long")
        self.num_excluded = count_in(state, "num_excluded")

    def _draw(self) -> Prompt:
        place, _ = self._blend.locate(self._drawn)
        source = self._sources[place]
        # the rest of this epoch and all of the next: the rest alone may have no problem that may be drawn
        rest = -self._positions[place] % len(source)
        prompt = self._next_of(place, rest + len(source))
        if prompt is None:
            raise self._nothing_of(source)
        return prompt

    def _next_of(self, place: int, tries: int) -> Prompt | None:
        """The prompt of the next problem of a source that may be drawn, among its next ``tries`` problems."""
        source = self._sources[place]
        for _ in range(tries):
            epoch, index = divmod(self._positions[place], len(source))
            problem = source[Shuffle(len(source), self._seed, "prompts", place, epoch)(index)]
            self._positions[place] += 1
            prompt = self._prompt(problem)
            if prompt is not None:
                self._drawn += 1
                return prompt
        return None

    def _must_leave_some(self, source: PromptSource) -> None:
        """Refuse a file whose problems are all held out; generated problems are checked when they are drawn."""
        if not self._excluded or not isinstance(source, JsonlSource):
            return
        if all(is_among(asked(source[index].turns), self._excluded) for index in range(len(source))):
            raise DataError(
                f"{source.name}: all of its {len(source)} problems are held out; name other problems, or remove them "
                "from --eval-prompt-data"
            )

    def _nothing_of(self, source: PromptSource) -> DataError:
        return DataError(
            f"{source.name}: none of its {len(source)} problems may be drawn ({self.num_too_long} longer than "
            f"max_prompt_length={self._max_prompt_length} tokens, {self.num_excluded} excluded); raise "
            "--max-prompt-length or name other problems"
        )

    def _prompt(self, problem: Problem) -> Prompt | None:
        own = asked(problem.turns)
        if self._excluded and is_among(own, self._excluded):
            self.num_excluded += 1
            return None
        suffix = "" if problem.domain == "code" else self._suffix
        try:
            tokens = render_prompt(self._tokenizer, problem.conversation(suffix))
        except DataError as error:
            raise DataError(f"{problem.origin}: {error}" if problem.origin else str(error)) from None
        if len(tokens) > self._max_prompt_length:
            self.num_too_long += 1
            return None
        return Prompt(
            uid=self._drawn,
            domain=problem.domain,
            text=problem.text,
            tokens=tuple(tokens),
            reference=problem.reference,
            asked=own,
        )

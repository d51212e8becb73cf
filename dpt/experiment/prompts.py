"""The experiment's prompts: the table's, and those on which settings are chosen; they share no fact."""

import hashlib
from dataclasses import dataclass
from functools import cache

from dpt.data.facts import Fact, in_one_direction
from dpt.data.scenes import Prompt, prompts
from dpt.experiment.settings import (
    ASKED,
    FIRST_NOISE,
    MOST_NOISES,
    NOISES,
    PART,
    PROMPT_SEED,
    QUOTAS,
    TUNING_SHARE,
)


@dataclass(frozen=True)
class Part:
    """Prompts that are drawn and judged together, and the seed of each picture's noise, prompt by prompt."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]

    @property
    def asked(self) -> list[Prompt]:
        """The prompt of each picture."""
        return [prompt for prompt in self.prompts for _ in range(NOISES)]

    def candidates(self, number: int) -> list[int]:
        """The seeds of each picture's candidate ``number``; 0 is the picture's own."""
        return [seed + MOST_NOISES * number for seed in self.seeds]


def meaning(fact: Fact) -> str:
    """The same text for facts that claim the same, in whatever order and words."""
    if fact.relation:
        first, second = fact.phrases
        return "|".join(in_one_direction(first.name, fact.relation, second.name))
    return "|".join(sorted(phrase.text for phrase in fact.phrases))


def is_for_tuning(fact: Fact) -> bool:
    """Whether settings are chosen on a fact; the table never asks for it then."""
    digest = hashlib.sha256(f"tuning|{meaning(fact)}".encode()).digest()
    return int.from_bytes(digest[:8]) % TUNING_SHARE == 0


@cache
def chosen(name: str) -> tuple[Prompt, ...]:
    """The prompts of "table" or "tuning", kind by kind, seen combinations before held-out ones."""
    found = []
    for kind, quota in QUOTAS[name].items():
        fitting = [
            prompt
            for prompt in prompts(kind, ASKED[kind], PROMPT_SEED)
            if is_for_tuning(prompt.fact) == (name == "tuning")
        ]
        for held_out, number in zip((False, True), quota, strict=True):
            found += [prompt for prompt in fitting if prompt.held_out == held_out][:number]
    if len(found) != sum(map(sum, QUOTAS[name].values())):
        raise ValueError(f"only {len(found)} prompts for {name}: ASKED is too small for QUOTAS")
    return tuple(found)


def number_of_parts(name: str) -> int:
    """How many parts "table" or "tuning" has."""
    return sum(map(sum, QUOTAS[name].values())) // PART


def part_of(name: str, number: int) -> Part:
    """One part; all kinds are in every part."""
    every = chosen(name)
    places = range(number, len(every), number_of_parts(name))
    first = FIRST_NOISE[name]
    seeds = tuple(first + NOISES * place + noise for place in places for noise in range(NOISES))
    return Part(tuple(every[place] for place in places), seeds)

"""What ``evaluation.json`` holds, read in one place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from discriminative.errors import WorkError
from discriminative.records.files import read_json
from discriminative.records.insight import InsightRecord
from discriminative.records.layout import RunFolder, evaluated_folders

FOOLING_GAP = (
    0.2  # guide over judge, with the token and beyond what it is without, from where it fools the guide
)


class Share(NamedTuple):
    """A share of images that are right, with its interval of 95 %."""

    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class PromptRecord:
    """One prompt's figures: "token" and "baseline" are its arms, "guide" and "judge" look at them."""

    content: dict[str, Any]

    @property
    def template(self) -> str:
        """The prompt with {token} and {class} in it."""
        return self.content["template"]

    def prompt(self, arm: str) -> str:
        """The prompt of an arm, filled in."""
        return self.content["arms"][arm]["prompt"]

    def share(self, arm: str, who: str) -> Share | None:
        """How often ``who`` gives an arm's images to the class; None where nothing judged."""
        found = self.content["arms"][arm][who]
        return Share(found["accuracy"], *found["accuracy_interval"]) if found else None

    def predicted(self, arm: str) -> list[tuple[str, float]]:
        """The labels that the guide gave most often to an arm's images, with their shares."""
        return [tuple(pair) for pair in self.content["arms"][arm]["guide"]["predicted"]]

    def log_probability(self, arm: str) -> float:
        """Of the class in an arm's images, by the guide; the mean."""
        return self.content["arms"][arm]["guide"]["log_probability"]

    def rank(self, arm: str) -> float:
        """Of the class among the guide's labels, in an arm's images; the median, 1 is the most probable."""
        return self.content["arms"][arm]["guide"]["rank"]

    @property
    def p_value(self) -> float:
        """Of the guide's paired difference."""
        return self.content["paired"]["guide"]["p_value"]

    @property
    def log_probability_p_value(self) -> float:
        """Of the difference of the guide's log-probabilities."""
        return self.content["paired"]["guide"]["log_probability_p_value"]

    @property
    def diversity_ratio(self) -> float | None:
        """Of the images with the token, over that of those without."""
        return self.content["diversity_ratio"]

    def guide_over_judge(self, arm: str) -> float:
        """How much more of an arm's images the guide gives to the class than the judge; 0 without a judge."""
        guide = self.share(arm, "guide")
        judge = self.share(arm, "judge")
        return guide.accuracy - judge.accuracy if judge else 0.0

    @property
    def fools_the_guide(self) -> bool:
        """Whether the guide sees the class far more often than the judge, and more so than without the
        token."""
        with_token = self.guide_over_judge("token")
        beyond = with_token - self.guide_over_judge("baseline")
        return round(min(with_token, beyond), 9) > FOOLING_GAP  # .9 - .7 is a little more than .2


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation, as its file has it.

    Args:
        folder: where its pictures and the training's record are; None where it is of no folder.
    """

    content: dict[str, Any]
    folder: RunFolder | None = None

    @classmethod
    def read(cls, folder: RunFolder) -> "EvaluationRecord":
        """The evaluation of a class and experiment.

        Raises:
            WorkError: it cannot be read, or is of another version.
        """
        content = read_json(folder.result)
        if "prompts" not in content or "verdict" not in content:
            raise WorkError(
                f"{folder.result}: was written by another version; evaluate that class again, or move it away"
            )
        return cls(content, folder)

    @property
    def prompts(self) -> list[PromptRecord]:
        """All prompts; the first is training's first."""
        return [PromptRecord(content) for content in self.content["prompts"]]

    @property
    def first(self) -> PromptRecord:
        """The prompt of the headline."""
        return PromptRecord(self.content["prompts"][0])

    @property
    def class_index(self) -> int:
        """The class's number, from 1."""
        return self.content["class_index"]

    @property
    def class_name(self) -> str:
        """The class's label."""
        return self.content["class_name"]

    @property
    def verdict(self) -> str:
        """The evaluation in one line."""
        return self.content["verdict"]

    @property
    def precision(self) -> str | None:
        """What a precision of the evaluation's own did, in one line; None where it had the models'."""
        told = self.content.get("precision")
        if not told:
            return None
        parts = [changes_of(who, told[who]) for who in ("guide", "judge") if told[who]]
        what = f"{told['sampled_in']} instead of {told['compared_with']}, on {told['images']} images"
        return f"{what}: {'; '.join(parts)}"

    @property
    def insight(self) -> InsightRecord | None:
        """Which attributes the token adds; None where nobody asked."""
        told = self.content.get("insight")
        return InsightRecord(told) if told else None

    @property
    def seeds(self) -> list[int]:
        """Of the images of each arm; none where an earlier version did not say."""
        return self.content.get("seeds", [])

    @property
    def environment(self) -> dict[str, Any]:
        """When, where and with which versions it was made; empty where an earlier version did not say."""
        return self.content.get("environment", {})

    @property
    def training(self) -> dict[str, Any]:
        """The record of the training before it, where it was here; else empty."""
        if not (self.folder and self.folder.config.exists()) or self.content["token_path"]:
            return {}
        return read_json(self.folder.config)


def changes_of(who: str, told: dict[str, Any]) -> str:
    """What another precision did to one classifier's verdicts and log-probabilities of the class."""
    mean = f"{told['log_probability_change']:.2g}"
    largest = f"{told['log_probability_largest_change']:.2g}"
    changed = f"{who}: verdicts changed {told['verdicts_changed']}"
    return f"{changed}, log-probability {mean} on average, {largest} at most"


def read_all(output_path: Path) -> list[EvaluationRecord]:
    """Every evaluation below a folder, by class and experiment.

    Raises:
        WorkError: there is none, or one of another version.
    """
    found = [EvaluationRecord.read(folder) for folder in evaluated_folders(output_path)]
    if not found:
        raise WorkError(f"there is no evaluation below {output_path}; make one with --evaluate True")
    return sorted(found, key=lambda record: (record.class_index, record.folder.exp_id))

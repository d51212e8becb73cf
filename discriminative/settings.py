"""Small settings that the library takes. No torch here: the command line reads them before anything heavy is imported."""

from typing import NamedTuple


class Stage(NamedTuple):
    """Where on a trajectory gradients are taken: 0 is the first step of the scheduler's list, 1 the last."""

    places: tuple[float, ...]
    anywhere: bool = False  # ``places`` are the ends of a range, in which one is drawn anew every update
    num_inference_steps: int | None = (
        None  # of that trajectory; None is as many as training draws its images with
    )


def parse_stages(text: str) -> list[Stage]:
    """Stages with semicolons between them.

    A stage is "0.13"; or "0.13,0.5,0.9", all of them together; or "0.05-0.3", a range. "0@8" takes it on a trajectory of 8 steps.

    Raises:
        ValueError: anything else, a place outside 0 to 1, or no step.
    """
    stages = []
    for part in text.split(";"):
        where, at, steps = part.partition("@")
        stage = Stage(
            tuple(map(float, where.replace("-", ",").split(","))), "-" in where, int(steps) if at else None
        )
        ordered = list(stage.places) == sorted(stage.places) and len(stage.places) == 2
        if (
            not all(0 <= p <= 1 for p in stage.places)
            or (stage.anywhere and not ordered)
            or (at and stage.num_inference_steps < 1)
        ):
            raise ValueError(text)
        stages.append(stage)
    return stages


def parse_interval(text: str) -> tuple[float, float]:
    """Two places on a trajectory, "0.1,0.8", in order.

    Raises:
        ValueError: anything else.
    """
    low, high = map(float, text.split(","))
    if not 0 <= low <= high <= 1:
        raise ValueError(text)
    return low, high

"""What pictures cost in forwards of the UNet, and what that pays for elsewhere."""

import math

BACKWARD = 2  # forwards
ROUNDING = 1e-9


def price(row: dict) -> float:
    """What a picture of a row costs."""
    return row["forwards"] + BACKWARD * row["backwards"]


def number_to_choose_from(cost: float, plain: float) -> int:
    """k, 2 or more, such that k plain pictures cost no less than one corrected picture."""
    return max(2, math.ceil(cost / plain - ROUNDING))


def iterations_for(cost: float, plain: float, steps: int) -> int:
    """How many updates of a noise the difference of two costs pays for, at least 1.

    Args:
        steps: of the prediction that is scored, a forward each; scoring is one more.
    """
    update = (1 + BACKWARD) * (steps + 1)
    return max(1, math.floor((cost - plain) / update + ROUNDING))


def at_this_cost(way: str, choice: dict, cost: float, plain: float) -> dict:
    """How many pictures to choose from, or updates of a noise, a corrected picture's cost pays for."""
    if way == "best":
        return {"k": number_to_choose_from(cost, plain)}
    return {"iterations": iterations_for(cost, plain, choice["steps"])}

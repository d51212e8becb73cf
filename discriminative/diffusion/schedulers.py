"""The schedulers that walk a trajectory."""

from typing import Any

from discriminative.diffusion.sources import load_part

# Deterministic ones, by the names of --scheduler.
SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}


# Training's, where a configuration names none.
TRAINING_SPACING = "leading"


PREDICTION_TYPES = ("epsilon", "v_prediction")

# Of the solver that training has; those of other families (DEIS, SA-Solver) mean nothing to it.
ALGORITHM_TYPES = ("dpmsolver", "dpmsolver++")


def fresh_scheduler(scheduler: Any, choice: str | None = None, spacing: str = "") -> Any:
    """A scheduler of the same configuration that has not walked yet: multistep ones keep state, and a run
    must not see another's.

    Args:
        choice: a short name of ``SCHEDULERS``; None is the same kind.
        spacing: the ``timestep_spacing`` of another kind where the configuration names none, as Stable
            Diffusion 1.4's does not; "" is that kind's own, which differs from kind to kind.

    Raises:
        ValueError: the configuration has no noise schedule of Stable Diffusion, or a value that the chosen
            kind does not take.
    """
    import diffusers

    kind = type(scheduler)
    config = dict(scheduler.config)
    changes = {}
    if choice:
        if "beta_schedule" not in config:
            raise ValueError(f"a {kind.__name__} has no beta_schedule for a {SCHEDULERS[choice]}")
        kind = getattr(diffusers, SCHEDULERS[choice])
        algorithm = str(config.pop("algorithm_type", "")).removeprefix("sde-")  # its deterministic twin
        if algorithm in ALGORITHM_TYPES:
            config["algorithm_type"] = algorithm
        if spacing and "timestep_spacing" in config.get("_use_default_values", ()):
            changes = {"timestep_spacing": spacing}
    scheduler = kind.from_config(config, **changes)
    # As the stock pipeline mends old configurations.
    mended = {
        k: v for k, v in {"clip_sample": False, "steps_offset": 1}.items() if scheduler.config.get(k, v) != v
    }
    return kind.from_config(scheduler.config, **mended) if mended else scheduler


def load_scheduler(name: str, choice: str | None = None) -> Any:
    """A scheduler with the model's configuration.

    Args:
        choice: a short name of ``SCHEDULERS``; None is the model's own, of the class that its index names.

    Raises:
        UsageError: it cannot be found or fetched.
    """
    import diffusers

    def load(source: str, **where):
        index = diffusers.DiffusionPipeline.load_config(source, **where)
        scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(
            source, subfolder="scheduler", **where
        )
        return fresh_scheduler(scheduler, choice)

    return load_part(name, load)

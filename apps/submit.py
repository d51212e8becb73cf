"""A run handed to a cluster by submitit: its jobs share the classes by their claims, as any processes do."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit import AutoExecutor, Job, JobEnvironment, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.helpers import Checkpointable, DelayedSubmission

from apps.plan import Sources, check_inputs, check_sweep, classes_of, is_sweep, make_plans
from config import RunConfig
from discriminative.command_line import Ended, lines_with_rank, told
from discriminative.errors import UsageError, WorkError
from discriminative.hub import one_line

ROOT = Path(__file__).parents[1]
JOB = {"name": "class_tokens", "timeout_min": 24 * 60}  # submitit has minutes
JOB |= {"slurm_additional_parameters": {"requeue": True}}  # after a preemption
REQUEUES = 1000  # how often a job that ran out of time begins again
LISTS = ("slurm_setup", "slurm_teardown", "local_setup")  # of shell commands


class RunJob(Checkpointable):
    """What a job does: the run, as if it was started there. Requeued, it is the same again, and goes on.

    Args:
        config: the options.
        work: does what they say, and returns the exit code.
    """

    def __init__(self, config: RunConfig, work: Callable[[RunConfig], int]):
        self.config = replace(config, submit=None, submit_jobs=1, submit_settings=None)
        self.work = work
        self.left: BaseException | None = None

    def __call__(self) -> int:
        """The exit code of the run.

        Raises:
            SystemExit: the job is to be requeued, or was interrupted.
        """
        tell_rank()
        self.end_as_signals_do()
        with lines_with_rank():
            code = told("run.py", lambda _: self.work(self.config), [])
        if self.left:
            raise self.left
        if code > 128:
            raise SystemExit(code)
        return code

    def end_as_signals_do(self) -> None:
        """Have submitit's signal end the work as any does, so that what it learned is kept.

        submitit asks for the requeueing in its handler and leaves with an exception, which in the midst of
        a class would count as its failure.
        """
        number = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")
        handler = signal.getsignal(number)
        if not callable(handler):  # the debug executor has none
            return

        def handle(number, frame) -> None:
            try:
                handler(number, frame)
            except (SystemExit, UncompletedJobError) as error:
                self.left = error
                raise Ended(number) from None

        signal.signal(number, handle)

    def checkpoint(self) -> DelayedSubmission:
        """What is to be requeued; handlers and exceptions stay behind."""
        return DelayedSubmission(RunJob(self.config, self.work))


def tell_rank() -> None:
    """Of several tasks in a job, which one this is: as a launcher says it."""
    environment = JobEnvironment()
    if environment.num_tasks > 1:
        os.environ["RANK"] = str(environment.global_rank)
        os.environ["LOCAL_RANK"] = str(environment.local_rank)
        os.environ["WORLD_SIZE"] = str(environment.num_tasks)


def submit(config: RunConfig, work: Callable[[RunConfig], int]) -> int:
    """Submit the jobs; those of this machine are waited for.

    Args:
        work: does what the options say, in a job.

    Returns:
        the exit code, of local jobs the largest.

    Raises:
        UsageError: a class or a setting is not known, or there is no Slurm.
        WorkError: the cluster refused, or a local job broke off.
    """
    check_classes(config)
    folder = Path(config.output_path) / "jobs"
    settings = JOB | settings_of(config)
    if config.submit == "slurm" and not shutil.which("sbatch"):
        given = "--submit: 'slurm' was given"
        raise UsageError(f"{given}, but there is no sbatch on this machine; --dry_run prints the script")
    # Where the program is not installed, jobs find it as this process did.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    requeues = {f"{name}_max_num_timeout": REQUEUES for name in ("slurm", "local")}
    executor = AutoExecutor(folder, cluster=config.submit, **requeues)
    try:
        executor.update_parameters(**settings)
        with executor.batch():
            jobs = [executor.submit(RunJob(config, work)) for _ in range(config.submit_jobs)]
    except (NameError, ValueError, AssertionError) as error:
        raise refused_settings(config, error) from error
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise WorkError(f"--submit: {str(error).strip().splitlines()[-1]}") from error
    ids = f"{jobs[0].job_id} to {jobs[-1].job_id}" if len(jobs) > 1 else jobs[0].job_id
    number = "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"
    print(f"submitted: {number}, {ids}; logs: {folder}", flush=True)
    if config.submit == "slurm":
        print(f"squeue --me shows them, scancel {jobs[0].job_id.partition('_')[0]} ends them")
        return 0
    return max(code_of(job) for job in jobs)


def code_of(job: Job) -> int:
    """The exit code of a job of this machine, once it ends.

    Raises:
        WorkError: it broke off.
    """
    try:
        return job.result()
    except UncompletedJobError as error:
        raise WorkError(f"job {job.job_id} broke off; its log: {job.paths.stderr}") from error


def check_classes(config: RunConfig) -> None:
    """Check here what would end every job; the cards are another machine's.

    Raises:
        UsageError: there is no such class, model or classifier, or something else that every job refuses.
    """
    here = replace(config, device="cpu", mixed_precision="auto")
    sources = Sources(here)
    if not is_sweep(here):
        make_plans(here, sources)
        return
    check_sweep(here)
    check_inputs(here)
    guide = sources.guides[0]
    classes_of(here, guide, sources.labels(guide))


def settings_of(config: RunConfig) -> dict[str, Any]:
    """``--submit_settings`` by name; a comma within a value stays: "slurm_exclude=node1,node2,nodes=1"."""
    settings = {}
    for part in re.split(r",(?=\w+=)", config.submit_settings or ""):
        name, _, value = part.partition("=")
        if name:
            settings[name] = [value] if name in LISTS else number_or_text(value)
    return settings


def number_or_text(text: str) -> bool | int | float | str:
    """A setting's value."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def refused_settings(config: RunConfig, error: Exception) -> UsageError:
    """submitit's refusal in one line."""
    return UsageError(f"--submit_settings: {config.submit_settings!r} was given; {one_line(error)}")


class ScriptWriter(SlurmExecutor):
    """Writes the script where there is no Slurm, too."""

    @classmethod
    def affinity(cls) -> int:
        """As if there was one."""
        return 1


def slurm_script(config: RunConfig) -> str:
    """The sbatch script of the jobs; nothing is submitted.

    Raises:
        UsageError: a class or a setting is not known.
    """
    check_classes(config)
    given = JOB | settings_of(config)
    own = {name.removeprefix("slurm_"): value for name, value in given.items() if name.startswith("slurm_")}
    general = {name: value for name, value in given.items() if not name.startswith("slurm_")}
    executor = ScriptWriter(Path(config.output_path) / "jobs")
    try:
        executor.update_parameters(**executor._convert_parameters(general) | own)
    except (NameError, ValueError, AssertionError) as error:
        raise refused_settings(config, error) from error
    if config.submit_jobs > 1:
        executor.parameters["map_count"] = config.submit_jobs
    # submitit shows a script to nobody but sbatch.
    return executor._make_submission_file_text(executor._submitit_command_str, "")

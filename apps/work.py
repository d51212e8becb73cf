"""What ``run.py`` does with its options: plan, load, carry out class by class, and say so in lines."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from apps.plan import (
    Plan,
    Sources,
    describe,
    is_sweep,
    listed_classes,
    make_plan,
    make_plans,
    notes_on,
    works,
)
from apps.provenance import changed_settings, is_evaluated
from apps.session import Session
from config import RunConfig
from discriminative.diffusion.memory import told_out_of_memory
from discriminative.errors import UsageError, WorkError
from discriminative.guides.labels import prompt_class_name, says_what_it_is
from discriminative.hub import one_line
from discriminative.precision import why_no_cuda
from discriminative.records.evaluation import EvaluationRecord
from discriminative.records.locks import alone_in, check_free
from discriminative.records.report import write_report
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import read_origin
from evaluate import templates_of
from trainer import Training

SLOW = 0.25  # of an image of SD 1.4: what is larger takes minutes an update on a CPU
MEMORY_ADVICE = "try --memory 8gb, or a smaller --height and --width"


def work(config: RunConfig) -> int:
    """Plan, and do what the plans say; returns the exit code, 1 where a class failed.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    if config.list_classes:
        list_classes(config)
        return 0
    failed = 0
    if works(config):
        sources = Sources(config)
        plans, wrong = make_plans(config, sources)
        for line in wrong:
            print(f"run.py: failed: {line}", file=sys.stderr)
        if config.dry_run:
            print(describe(plans, sources, config))
        else:
            failed = run(plans, sources, is_sweep(config))
        failed += len(wrong)
    if config.report and not config.dry_run:
        print(f"report: {write_report(config.output_path)}")
    return 1 if failed else 0


def run(plans: list[Plan], sources: Sources, sweep: bool) -> int:
    """Do what the plans say, one class after the other, with models that are loaded once.

    Args:
        sweep: what is there already is left out, and a class that fails does not end the run.

    Returns:
        how many classes failed.

    Raises:
        UsageError, WorkError: in one line what was wrong; of a sweep, what keeps all classes from being done.
    """
    tell_device(sources)
    session = Session.of(sources)
    failed = 0
    if not sweep:
        check_free(plans[0].folder.records)  # rather than after models are loaded
    with told_out_of_memory(sources.device, MEMORY_ADVICE):
        session.load_all()
    for plan in plans:
        try:
            with told_what_is_kept(plan), told_out_of_memory(sources.device, MEMORY_ADVICE):
                carry_out(plan, session, resume=sweep)
        except Exception as error:
            # Without a reader of its lines no class can be done.
            if not sweep or isinstance(error, BrokenPipeError):
                raise
            if not isinstance(error, (WorkError, UsageError, OSError)):
                traceback.print_exc()  # a fault of the program, which the other classes need not have
            message = f"run.py: failed: class {plan.config.class_index} ({plan.label}): {error}"
            print(message, file=sys.stderr, flush=True)
            failed += 1
    return failed


@contextmanager
def told_what_is_kept(plan: Plan) -> Iterator[None]:
    """Where the work on a class ends early, the reason says what is kept, too."""
    try:
        yield
    except (WorkError, KeyboardInterrupt) as error:
        error.args = (f"{error}{what_is_kept(plan)}",)
        raise


def what_is_kept(plan: Plan) -> str:
    """What a training leaves that ended early, or before an evaluation that did, and how to use it; as
    the end of a line."""
    folder = plan.folder
    partial = folder.unfinished.partial_token
    if not (plan.config.train and plan.vectors is None):
        return ""
    goes_on = "; the same command goes on from there" if folder.unfinished.checkpoint.exists() else ""
    if partial.exists():
        updates = read_origin(partial).get("updates")
        if updates == "0":
            return f"{goes_on}; no update made the token better yet"
        apart = " and another --exp_id" if folder.token.exists() else ""
        kept = f"the best token so far, after {updates} updates, is kept"
        return f"{goes_on}; {kept}: use it with --token_path {partial}{apart}, without --train"
    if folder.token.exists() and not folder.unfinished_records.exists():
        return f"; the token is kept, {folder.token}: go on without --train"
    return ""


def carry_out(plan: Plan, session: Session, resume: bool) -> None:
    """One class's steps, in their order, with its folder to itself.

    Args:
        resume: leave out what is there already.

    Raises:
        UsageError: another run is at work in its folder.
    """
    with alone_in(plan.folder.records):
        if plan.config.train and plan.folder.is_to_be_taken:
            plan.folder.take_training()
        # Another run may have ended here since.
        plan = make_plan(plan.config, session.sources, resume)
        take_steps(plan, session, resume)


def take_steps(plan: Plan, session: Session, resume: bool) -> None:
    """What :func:`carry_out` does."""
    config = plan.config
    tell_class(plan, session)
    for change in changed_settings(config, plan.folder):
        print(f"note: not as the token was learned: {change}")
    for note in notes_on(plan, session.sources):
        print(f"note: {note}")
    token = session.token(plan)
    if config.train and plan.vectors is None:
        tell_training(plan, session.train(plan, token))
    for name, path in session.export(plan, token).items():
        print(f"{'for AUTOMATIC1111 and ComfyUI' if name == 'a1111' else name}: {path}")
    if config.evaluate:
        evaluate(plan, session, token, resume)
    draw(plan, session, token)


def evaluate(plan: Plan, session: Session, token: ClassToken, resume: bool) -> None:
    """Evaluate, or say that it is done already; one row in the summary."""
    config = plan.config
    templates = templates_of(config)
    if resume and plan.vectors is not None and is_evaluated(config, plan.folder, plan.vectors, templates):
        print(f"evaluated already: {plan.folder.result}")
    else:
        if plan.folder.result.exists():
            print(f"note: replaces the evaluation that is there, {plan.folder.result}, and its images")
        tell_evaluation(plan, session.run_evaluation(plan, token))
    print(f"summary: {session.summarize(plan)}")


def draw(plan: Plan, session: Session, token: ClassToken) -> None:
    """Images of the user's prompts, and the data set."""
    if plan.to_draw:
        for prompt, images in zip(plan.to_draw, session.generate(plan, token), strict=True):
            print(f"images of {prompt!r}: {images}")
    if plan.config.export_dataset:
        number, thrown_away = session.fill_dataset(plan, token)
        print(f"data set: {plan.folder.dataset}, {number} images; {thrown_away} thrown away")


def tell_device(sources: Sources) -> None:
    """What it means that the run is on a CPU, where that may not be what was wanted."""
    if sources.device.type != "cpu":
        return
    reason = why_no_cuda() if sources.config.device == "auto" else None
    if reason:
        print(f"note: on the CPU, as torch cannot use the graphics card: {one_line(reason)}")
    if sources.size.activations > SLOW:
        print(
            "note: on a CPU an update of a model of this size takes minutes, and a training hours; "
            "it is for a graphics card, --model miniature for a CPU"
        )


def tell_class(plan: Plan, session: Session) -> None:
    """The line that begins a class."""
    config = plan.config
    precision = str(session.sources.dtype).removeprefix("torch.")
    where = f"model {config.model} on {session.sources.device} in {precision}"
    print(f"class {config.class_index} of {config.classifier}: {plan.label}; {where}", flush=True)


def tell_training(plan: Plan, training: Training) -> None:
    """How the training ended, and where its results are."""
    kept = f"kept the token after {training.kept_updates}, stopped by {training.stopped_by}"
    cost = f"{round(training.seconds, 2)} s, {training.precision}"
    print(f"training: {len(training.rows)} updates, {kept}, {cost}")
    gain = training.gain
    if gain and gain.is_doubtful:
        found = f"log-probability {gain.log_probability:+.2f} on {gain.noises} new noises"
        found = f"{found}, p={gain.p_value:.1g}"
        kept = f"nothing was gained over {plan.config.initializer_token!r}, so it is kept"
        told = "the gain may be chance" if gain.is_there else kept
        advice = "a word nearer to the class (--start, --prompt_name), another --classifier, or several"
        print(f"note: {told} ({found}); try {advice}")
    print(f"token: {plan.folder.token}\ntraining images: {plan.folder.train_images}")


def tell_evaluation(plan: Plan, result: dict) -> None:
    """The closing lines: where everything is, and the verdict."""
    folder = plan.folder
    print(f"evaluation: {folder.result}\nimages: {folder.eval_images}, and side by side {folder.grid}")
    record = EvaluationRecord(result)
    for prompt in record.prompts[1:]:
        before = prompt.share("baseline", "guide").accuracy
        after = prompt.share("token", "guide").accuracy
        print(f"{prompt.template!r}: guide {before:.2f} -> {after:.2f}")
    if not plan.judge:
        print("not judged: the guide brings no judge, or one that guides too; --judge names one")
    elif plan.judge_target is None:
        print(f"not judged: {plan.judge} has no label, or several, for {plan.label!r}")
    if record.precision:
        print(record.precision)
    print(f"{record.verdict}   ({result['test_size']} seeds)")


def list_classes(config: RunConfig) -> None:
    """Print number, label and name in the prompts of the guide's classes: all, or those that are named."""
    sources = Sources(config)
    for name in sources.guides:
        labels = sources.labels(name)
        for number in listed_classes(config, name, labels):
            label = labels[number - 1]
            in_prompts = prompt_class_name(label) if says_what_it_is(label) else "(needs --prompt_name)"
            print(f"{number:>5}  {label}  ->  {in_prompts}")

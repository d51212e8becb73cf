"""What ``run.py`` does with its options: plan, load, carry out class by class, and say so in lines."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from apps.insight import is_looked_into
from apps.plan import (
    Plan,
    Sources,
    describe,
    is_sweep,
    listed_classes,
    make_plan,
    make_plans,
    notes_on,
    uses_model,
    works,
)
from apps.provenance import changed_settings, is_evaluated
from apps.queue import POLL, ClassQueue, Taken, is_finished, write_failure
from apps.session import Session
from apps.submit import slurm_script, submit
from config import RunConfig
from discriminative.command_line import is_first_process, is_one_of_several
from discriminative.diffusion.memory import told_out_of_memory
from discriminative.errors import WorkError
from discriminative.guides.labels import prompt_class_name, says_what_it_is
from discriminative.hub import one_line
from discriminative.precision import training_precision, why_no_cuda
from discriminative.records.evaluation import EvaluationRecord
from discriminative.records.locks import ClaimLost, alone_in, check_free
from discriminative.records.report import write_report
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import read_origin
from discriminative.tokens.side_by_side import SideBySide, Worker
from evaluate import templates_of
from trainer import Training

SLOW = 0.25  # of an image of SD 1.4: what is larger takes minutes an update on a CPU
MEMORY_ADVICE = "try --memory 8gb, or a smaller --height and --width"


def work(config: RunConfig) -> int:
    """Plan, and do what the plans say; returns the exit code, 1 where a class failed.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    speaks = is_first_process()
    if config.list_classes:
        if speaks:
            list_classes(config)
        return 0
    if config.submit and not (config.dry_run and config.submit != "slurm"):
        return hand_over(config) if speaks else 0
    failed = 0
    if works(config):
        sources = Sources(config)
        if config.dry_run:
            failed = tell_plans(config, sources) if speaks else 0
        elif is_sweep(config):
            failed = run_queue(config, sources)
        elif speaks:
            run_one(config, sources)
        else:
            print("one class: the first process learns it, this one has nothing to do")
    if config.report and not config.dry_run and speaks:
        print(f"report: {write_report(config.output_path)}")
    return 1 if failed else 0


def hand_over(config: RunConfig) -> int:
    """Submit the run, or print the script that would be."""
    if config.dry_run:
        print(slurm_script(config))
        return 0
    return submit(config, work)


def tell_plans(config: RunConfig, sources: Sources) -> int:
    """Print the plans of a dry run; returns how many classes cannot be planned."""
    plans, wrong = make_plans(config, sources)
    for line in wrong:
        print(f"run.py: failed: {line}", file=sys.stderr)
    print(describe(plans, sources, config))
    return len(wrong)


def run_one(config: RunConfig, sources: Sources) -> None:
    """Do what is asked for with one class; what is finished is said to be, and left as it is.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    (plan,), _ = make_plans(config, sources)
    check_free(plan.folder.records)  # rather than after models are loaded
    if config.train and is_finished(plan):
        tell_finished(plan)
        return
    session = loaded(sources)
    with told_what_is_kept(plan), told_out_of_memory(sources.device, MEMORY_ADVICE):
        carry_out(plan, session, resume=config.train)


def run_queue(config: RunConfig, sources: Sources) -> int:
    """Do what is asked for with several classes, one after the other, with models that are loaded once.

    What is there already is left out, and a class that fails does not end the run.

    Returns:
        how many classes failed, here or in another process; 0 where the first process is to tell it.

    Raises:
        UsageError, WorkError: in one line what keeps all classes from being done.
    """
    with ClassQueue(config, sources) as queue:
        work_off(queue) if config.classes_per_batch == 1 else work_off_side_by_side(queue)
        queue.tell_end()
    if not is_first_process():
        return 0
    if queue.failed and is_one_of_several():
        time.sleep(2 * POLL)  # a launcher ends the others where one fails: until they have ended themselves
    return len(queue.failed)


def work_off(queue: ClassQueue) -> None:
    """Do the classes of the queue, one after the other."""
    session = None
    while batch := queue.take():
        session = session or loaded(queue.sources)
        for taken in batch:
            with at_work_on(taken, queue):
                take_steps(taken.plan, session, resume=True)
        tell_progress(queue)


def work_off_side_by_side(queue: ClassQueue) -> None:
    """Do the classes of the queue, several learned in one batch; one that ends makes room for the next."""
    session = None
    running = SideBySide()
    begun: dict[Worker, Begun] = {}
    while True:
        room = queue.config.classes_per_batch - len(running.workers)
        batch = queue.take(room, waits=not running.workers)
        for taken in batch:
            session = session or loaded(queue.sources)
            begin(taken, queue, session, running, begun)
        if not (batch or running.workers):
            return
        if not running.workers:
            tell_progress(queue)
            continue
        with ExitStack() as around:
            around.enter_context(told_what_goes_on())
            for one in begun.values():
                around.enter_context(training_precision(one.token.models, queue.config.mixed_precision))
            ended = running.until_one_ends()
        for worker in ended:
            end(worker, begun.pop(worker), session)
        tell_progress(queue)


@dataclass
class Begun:
    """A class whose training runs beside others.

    Args:
        around: what is around the work on the class, entered already.
    """

    plan: Plan
    token: ClassToken
    around: ExitStack


def begin(
    taken: Taken, queue: ClassQueue, session: Session, running: SideBySide, begun: dict[Worker, Begun]
) -> None:
    """Begin with a class beside those that run; do it all where nothing is to be learned."""
    plan = taken.plan
    with ExitStack() as around:
        around.enter_context(at_work_on(taken, queue))
        token = first_steps(plan, session)
        if not is_to_be_learned(plan):
            last_steps(plan, session, token, resume=True)
            return
        worker = running.add(lambda work: session.train(plan, token, work=work))
        begun[worker] = Begun(plan, token, around.pop_all())


def end(worker: Worker, begun: Begun, session: Session) -> None:
    """What follows the training of a class."""
    with begun.around:
        tell_training(begun.plan, worker.result())
        last_steps(begun.plan, session, begun.token, resume=True)


@contextmanager
def told_what_goes_on() -> Iterator[None]:
    """Around several trainings: an interruption says that they can go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = ("; the same command goes on with the classes that were at work",)
        raise


@contextmanager
def at_work_on(taken: Taken, queue: ClassQueue) -> Iterator[None]:
    """Around the work on a class of the queue, which goes on with the next one where it fails."""
    advice = told_out_of_memory(queue.sources.device, MEMORY_ADVICE)
    with queue.at_work_on(taken), told_what_is_kept(taken.plan), advice:
        yield


def tell_progress(queue: ClassQueue) -> None:
    """How far all processes are, said by the first."""
    if is_first_process():
        print(queue.progress(), flush=True)


def loaded(sources: Sources) -> Session:
    """A session with all that the options need."""
    tell_device(sources)
    session = Session.of(sources)
    with told_out_of_memory(sources.device, MEMORY_ADVICE):
        session.load_all()
    return session


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
    """One class's steps, in their order, with its folder to itself; a failure is written down.

    Args:
        resume: leave out what is there already.

    Raises:
        UsageError: another run is at work in its folder.
    """
    with alone_in(plan.folder.records) as claim:
        if plan.config.train and plan.folder.is_to_be_taken:
            plan.folder.take_training()
        # Another run may have ended here since.
        plan = make_plan(plan.config, session.sources, resume)
        plan.folder.claimed_by(claim.check)
        try:
            take_steps(plan, session, resume)
        except (BrokenPipeError, ClaimLost):
            raise
        except Exception as error:
            with suppress(WorkError):  # where the disk is full the class's own error says so
                write_failure(plan, error, session.sources)
            raise
        plan.folder.failed.unlink(missing_ok=True)


def take_steps(plan: Plan, session: Session, resume: bool) -> None:
    """What is asked for with one class, whose folder is claimed.

    Args:
        resume: leave out what is there already.
    """
    token = first_steps(plan, session)
    if is_to_be_learned(plan):
        tell_training(plan, session.train(plan, token))
    last_steps(plan, session, token, resume)


def is_to_be_learned(plan: Plan) -> bool:
    """Whether the token is asked for, and not there yet."""
    return plan.config.train and plan.vectors is None


def first_steps(plan: Plan, session: Session) -> ClassToken | None:
    """What comes before a training; the class's token, or None where no model is needed."""
    config = plan.config
    tell_class(plan, session)
    for change in changed_settings(config, plan.folder):
        print(f"note: not as the token was learned: {change}")
    for note in notes_on(plan, session.sources):
        print(f"note: {note}")
    if config.train and not is_to_be_learned(plan):
        print(f"learned already: {plan.folder.token}; {how_to_learn_anew(plan)}")
    return session.token(plan) if uses_model(config) else None


def last_steps(plan: Plan, session: Session, token: ClassToken | None, resume: bool) -> None:
    """What is done with a token that is there.

    Args:
        resume: leave out what is there already.
    """
    config = plan.config
    for name, path in session.export(plan, token).items():
        print(f"{'for AUTOMATIC1111 and ComfyUI' if name == 'a1111' else name}: {path}")
    if config.evaluate:
        evaluate(plan, session, token, resume)
    if config.insight:
        look_into(plan, session, token, resume)
    draw(plan, session, token, resume)


def how_to_learn_anew(plan: Plan) -> str:
    """What to do where a token is there, and another is wanted."""
    return f"to learn it anew give another --exp_id, or remove {plan.folder.records}"


def tell_finished(plan: Plan) -> None:
    """That nothing is left to do for a class, and what came of it."""
    print(f"class {plan.config.class_index} of {plan.config.classifier}: {plan.label}; finished before")
    print(f"learned already: {plan.folder.token}; {how_to_learn_anew(plan)}")
    if plan.config.evaluate:
        tell_evaluated(plan)
    if plan.config.insight:
        print(f"insight: {EvaluationRecord.read(plan.folder).insight.line}")


def tell_evaluated(plan: Plan) -> None:
    """That the evaluation is there, and its verdict."""
    record = EvaluationRecord.read(plan.folder)
    print(f"evaluated already: {plan.folder.result}")
    print(f"{record.verdict}   ({record.content['test_size']} seeds)")


def evaluate(plan: Plan, session: Session, token: ClassToken, resume: bool) -> None:
    """Evaluate, or say that it is done already; one row in the summary."""
    config = plan.config
    templates = templates_of(config)
    if resume and plan.vectors is not None and is_evaluated(config, plan.folder, plan.vectors, templates):
        tell_evaluated(plan)
    else:
        if plan.folder.result.exists():
            print(f"note: replaces the evaluation that is there, {plan.folder.result}, and its images")
        tell_evaluation(plan, session.run_evaluation(plan, token))
    print(f"summary: {session.summarize(plan)}")


def look_into(plan: Plan, session: Session, token: ClassToken | None, resume: bool) -> None:
    """Which attributes the token adds, or that this is known already; only pictures that are there are
    looked at."""
    done = resume and is_looked_into(plan)
    vectors = plan.vectors if token is None else token.vector.detach()
    record = EvaluationRecord.read(plan.folder).insight if done else session.look_into(plan, vectors)
    if done:
        print(f"insight already: {plan.folder.result}")
    for attribute in record.attributes:
        if attribute.picture:
            print(f"changed most by {attribute.phrase!r}: {plan.folder.eval_images / attribute.picture}")
    print(f"insight: {record.line}")


def draw(plan: Plan, session: Session, token: ClassToken | None, resume: bool) -> None:
    """Images of the user's prompts, and the data set."""
    if plan.to_draw:
        for prompt, images in zip(plan.to_draw, session.generate(plan, token, resume), strict=True):
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
    kept = f"kept {training.kept}, stopped by {training.stopped_by}"
    cost = f"{round(training.seconds, 2)} s, {training.precision}"
    print(f"training: {len(training.rows)} updates, {kept}, {cost}")
    gain = training.gain
    if gain and gain.is_doubtful:
        found = f"log-probability {gain.log_probability:+.2f} on {gain.noises} new noises"
        found = f"{found}, p={gain.p_value:.1g}"
        in_vain = f"nothing was gained over {plan.config.initializer_token!r}, so it is kept"
        told = in_vain if training.is_in_vain else "the gain may be chance"
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

"""Small changes to the library that no test notices: how much the tests see.

    make mutants                          # installs mutmut, then the line below
    python -m experiments.mutants         # goes on where it broke off

mutmut makes every small change (a mutant) of the functions of discriminative/: a number one higher, "<" for
"<=", an argument left out. A sample is drawn with a seed. Each mutant runs in a process of its own, with the
quickest tests that call the changed function, until one fails. Expect more than 85 % of 300 to be caught. On
one core the first look at which test calls what takes ten minutes, the mutants half an hour.

Not changed are texts, functions with a decorator, and what runs at import. Not asked are slow tests, and
those that call a function in another program only. What was caught is kept in the rows; the rest is tried
again at the next start. Without the file of rows all is tried.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import libcst as cst
import pytest
from mutmut.configuration import config as mutmut_config
from mutmut.mutation import mutators
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state
from mutmut.utils.format_utils import get_mutant_name, mangled_name_from_mutant_name

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "mutants"  # a copy of the repository that holds every mutant, asleep
COVERAGE = ROOT / "build" / "mutants.json"
OUT = ROOT / "experiments" / "results" / "mutants.jsonl"
LIBRARY = "discriminative"
FORK = multiprocessing.get_context("fork")
SEEN = ("caught", "timeout", "died")
QUIET = ("-q", "-x", "--rootdir=.", "--tb=no", "--no-header", "-p", "no:cacheprovider")


class Mutant(NamedTuple):
    name: str  # module and function, with a number
    file: str
    diff: str  # the lines that differ


class Test(NamedTuple):
    name: str  # file::function[parameters]
    seconds: float
    functions: list[str]  # those of the library that it calls, by mutmut's names


# The copy of the repository.


def tracked(folder: str = ".") -> list[str]:
    """The files of the repository, new ones too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({name for name in listed if (ROOT / name).is_file()})


def copy_with_mutants() -> list[Mutant]:
    """Copy the repository to TREE, each function of the library with all its mutants beside it."""
    mutators.mutation_operators.remove((cst.BaseString, mutators.operator_string))
    shutil.rmtree(TREE, ignore_errors=True)
    found = []
    for name in tracked():
        copy = TREE / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
        if name.startswith(f"{LIBRARY}/") and name.endswith(".py"):
            mutated = mutate_file_contents(name, copy.read_text(encoding="utf-8"))
            copy.write_text(mutated.code, encoding="utf-8")
            names = [(mutant, get_mutant_name(Path(name), mutant)) for mutant in mutated.mutant_names]
            found += [Mutant(full, name, diff_of(mutant, mutated)) for mutant, full in names]
    return sorted(found)


def diff_of(mutant: str, mutated) -> str:
    """The lines of a function that a mutant changes, as a diff without its head."""
    lines = mutated.code.splitlines()
    texts = []
    original = mangled_name_from_mutant_name(mutant) + "__mutmut_orig"
    for name in (original, mutant):
        span = mutated.line_span_by_function_name[name]
        texts.append([line.replace(name, "function") for line in lines[span.start - 1 : span.end]])
    return "\n".join(list(difflib.unified_diff(*texts, lineterm="", n=1))[2:])


# Processes of their own.


def apart(work: Callable, *arguments, limit: float | None = None) -> object:
    """What a function returns in a forked process.

    Args:
        limit: seconds, then the process and what it started are stopped; None: none.

    Returns:
        what the function returns; "timeout"; or "died" where the process ended without an answer.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=answer, args=(sender, work, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else "timeout"
    except EOFError:
        return "died"
    finally:
        stop(process)


def stop(process) -> None:
    """End a process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # not the head of a group yet, or gone
        process.kill()
    process.join()
    shutil.rmtree(TREE / "results", ignore_errors=True)  # a mutant's run may leave a token that others find


def answer(sender, work: Callable, *arguments) -> None:
    """Work quietly as the head of a process group, and send what comes of it."""
    os.setsid()
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    forget_the_copy()
    sender.send(work(*arguments))
    sender.close()
    os._exit(0)


def forget_the_copy() -> None:
    """Import the copy's modules anew: what runs at import meets the mutant too."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(TREE)):
            del sys.modules[name]


def pytest_in_copy(arguments: Iterable[str], plugin: object) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return int(pytest.main([*QUIET, f"--basetemp={folder}/t", *arguments], plugins=[plugin]))


# Which test calls what.


class Calls:
    """A plugin: for each test that passes its seconds and the functions that it and its fixtures call."""

    def __init__(self):
        self.tests = []
        self.shared = {}  # of fixtures that several tests share: what setting them up calls
        self.failed = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        state()._stats.clear()
        start = time.perf_counter()
        result = yield
        called = state()._stats.union(*(self.shared.get(name, ()) for name in item.fixturenames))
        if item.nodeid not in self.failed:
            self.tests.append(Test(item.nodeid, round(time.perf_counter() - start, 3), sorted(called)))
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        before = set(state()._stats)
        state()._stats.clear()
        result = yield
        if fixturedef.scope != "function":
            self.shared[fixturedef.argname] = set(state()._stats)
        state()._stats.update(before)
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed or report.skipped:
            self.failed.add(report.nodeid)


def calls_of(file: str) -> list[Test]:
    set_mutant_under_test("stats")
    calls = Calls()
    pytest_in_copy([file, "--maxfail=1000"], calls)
    return calls.tests


def covering() -> list[Test]:
    """Every quick test with what it calls; a file is looked at again when it or the library changed."""
    known = json.loads(COVERAGE.read_text()) if COVERAGE.exists() else {}
    tests = [name for name in tracked("tests") if name.endswith(".py")]
    below = [*tracked(LIBRARY), *(name for name in tests if not Path(name).name.startswith("test_"))]
    now = {}
    for file in (name for name in tests if name not in below):
        state_of_file = digest([*below, file])
        if known.get(file, {}).get("digest") != state_of_file:
            print(f"what {file} calls", flush=True)
            came = apart(calls_of, file)
            if isinstance(came, str):
                raise SystemExit(f"{file}, without a mutant: {came}")
            known[file] = {"digest": state_of_file, "tests": came}
            COVERAGE.write_text(json.dumps(known))
        now[file] = known[file]
    return [Test(*test) for file in now.values() for test in file["tests"]]


def digest(files: list[str]) -> str:
    return hashlib.sha256(b"\0".join((TREE / name).read_bytes() for name in files)).hexdigest()[:16]


def quickest(tests: list[Test], mutant: Mutant, seconds: float) -> list[Test]:
    """The quickest tests that call a mutant's function, one at least, some seconds together."""
    function = mangled_name_from_mutant_name(mutant.name)
    chosen = []
    for test in sorted((t for t in tests if function in t.functions), key=lambda t: t.seconds):
        if chosen and sum(t.seconds for t in chosen) + test.seconds > seconds:
            break
        chosen.append(test)
    # File by file, as shared fixtures are set up once; first those with a test that calls little else.
    narrowest = {}
    for test in chosen:
        file = test.name.partition("::")[0]
        narrowest[file] = min(len(test.functions), narrowest.get(file, len(test.functions)))
    return sorted(chosen, key=lambda t: (narrowest[t.name.partition("::")[0]], t.name))


# Verdicts.


class FirstFailure:
    """A plugin that keeps the names of the tests that fail."""

    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.names.append(report.nodeid)


def failing(mutant: str, tests: list[str], *more: str) -> tuple[int, list[str]]:
    """pytest's exit code and the failing tests, with a mutant awake ("" for none)."""
    set_mutant_under_test(mutant)
    failures = FirstFailure()
    code = pytest_in_copy([*tests, *more], failures)
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):  # other names of tests
        code = pytest_in_copy([*dict.fromkeys(name.partition("::")[0] for name in tests), *more], failures)
    return code, failures.names


def try_mutant(mutant: Mutant, tests: list[Test]) -> dict:
    """A row: the mutant, its verdict, the test that caught it, and how long that took."""
    start = time.perf_counter()
    names = [test.name for test in tests]
    limit = 60 + 4 * sum(test.seconds for test in tests)
    came = apart(failing, mutant.name, names, limit=limit) if tests else "no tests"
    row = mutant._asdict() | {"verdict": came, "test": None, "tests": len(tests)}
    row["seconds"] = round(time.perf_counter() - start, 1)
    if isinstance(came, str):
        return row
    code, failed = came
    row["verdict"] = "caught" if code else "survived"
    row["test"] = failed[0] if failed else None
    return row | ({"exit_code": code} if code > 1 else {})


def read_rows(path: Path) -> dict[str, dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    temporary.replace(path)


def doubtful(rows: list[dict]) -> list[dict]:
    """Mutants whose test fails without them too, beside the other tests that caught something and alone."""
    names = sorted({row["test"] for row in rows if row["test"]})
    came = apart(failing, "", names, "--maxfail=1000") if names else (0, [])
    if isinstance(came, str):
        raise SystemExit(f"the tests that caught something, without a mutant: {came}")
    return [row for row in rows if row["test"] in came[1] and not catches_alone(row)]


def catches_alone(row: dict) -> bool:
    """Whether the test by itself passes without the mutant, and fails with it."""
    without = apart(failing, "", [row["test"]])
    return without == (0, []) and apart(failing, row["name"], [row["test"]], limit=120) != without


def report(rows: list[dict]) -> None:
    counts = Counter(row["verdict"] for row in rows)
    seen = sum(counts[verdict] for verdict in SEEN)
    print("\n| verdict | mutants |\n|-|-|")
    for verdict, count in counts.most_common():
        print(f"| {verdict} | {count} |")
    print(f"\ncaught: {seen} of {len(rows)}, {100 * seen / len(rows):.1f} %\n")
    for row in rows:
        if row["verdict"] not in SEEN:
            print(f"{row['name']}: {row['verdict']}, {row['tests']} tests\n{row['diff']}\n")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--sample", type=int, default=300, help="mutants that are tried")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=12, help="of tests for each mutant")
    parser.add_argument("--out", type=Path, default=OUT, help="one JSON object a mutant")
    args = parser.parse_args()
    out = args.out.resolve()
    mutants = copy_with_mutants()
    sample = random.Random(args.seed).sample(mutants, min(args.sample, len(mutants)))
    print(f"{len(mutants)} mutants, {len(sample)} drawn with seed {args.seed}", flush=True)
    os.chdir(TREE)
    load_libraries()
    rows = try_all(sample, covering(), args.seconds, out)
    for row in doubtful(rows):
        row["verdict"] = "doubtful"
    report(rows)


def load_libraries() -> None:
    """Import what the tests import, once for all processes."""
    mutmut_config()  # reads pyproject.toml here, as tests change the folder
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*QUIET, "--collect-only"])


def try_all(sample: list[Mutant], tests: list[Test], seconds: float, out: Path) -> list[dict]:
    """A row for each mutant; what an earlier run caught stays."""
    known = read_rows(out)
    rows = []
    for number, mutant in enumerate(sample, 1):
        row = known.get(mutant.name)
        if row is None or row["diff"] != mutant.diff or row["verdict"] not in SEEN:
            row = try_mutant(mutant, quickest(tests, mutant, seconds))
            print(f"{number}/{len(sample)} {row['verdict']}, {row['seconds']} s: {mutant.name}", flush=True)
            known[mutant.name] = row
            write_rows(out, known.values())
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()

"""Change one operator or constant of a file at a time and run the tests that reach it.

    python -m tests.code_mutants ministral.py --lines 100-200

Prints a line for each mutant: `killed` if a test failed (which one), `hang` or `crash` if the process ended,
`survived` if all passed. The lines are kept in --results, and the mutants that are there are not run again. Nothing is
written into the working tree: the tests are collected once, and each mutant is a fork of that process, in which the
functions and values of the module get those of the changed source. --results belong to one state of the file: give
another folder after a change of it.
"""

import argparse
import ast
import copy
import gc
import importlib
import inspect
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
MEMORY = 8 << 30  # bytes that a mutant may take
# The tests of the models and of generation that start no process, in which the change would not be seen.
TESTS = (
    "blockwise", "cache", "config", "fast", "generate", "golden", "heads", "parity", "pretrained", "recorded_step",
    "reference", "talk", "transformers_generate", "vectors", "vision",
)  # fmt: skip
NEAR = tuple(f"tests/test_{name}.py" for name in ("generate", "parity", "cache", "golden"))  # the most promising
SWAPS = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.Pow: [ast.Mult],
    ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.And: [ast.Or], ast.Or: [ast.And],
}  # fmt: skip
EQUALITY = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}


def changed(node, **fields):
    """A copy of a node with other fields."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def constants(value):
    """Other values for a constant. A text with a space is for people."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 1.1 if value else 1.0]
    if isinstance(value, str) and " " not in value:
        return [value + "_"]
    return []


def calls(node):
    """A call without one of its keywords, without its method, or of the opposite function."""
    for keyword in node.keywords:
        yield changed(node, keywords=[other for other in node.keywords if other is not keyword])
    if isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
        yield node.func.value
    name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
    if name in NAMES:
        yield changed(node, func=changed(node.func, id=NAMES[name], attr=NAMES[name]))  # a Name has an id


def replacements(node):
    """What may stand in the place of a node."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        yield from (changed(node, op=other()) for other in SWAPS.get(type(node.op), ()))
    if isinstance(node, ast.BoolOp):
        for operand in node.values:
            kept = [other for other in node.values if other is not operand]
            if len(kept) == 1:
                yield kept[0]
            else:
                yield changed(node, values=kept)
    if isinstance(node, ast.Compare):
        yield from (changed(node, ops=[other()]) for other in SWAPS[type(node.ops[0])])
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.Constant):
        yield from (changed(node, value=value) for value in constants(node.value))
    if isinstance(node, ast.Call):
        yield from calls(node)
    if isinstance(node, (ast.If, ast.IfExp)):
        yield from (changed(node, test=ast.Constant(value)) for value in (True, False))
    deleted = isinstance(node, (ast.Expr, ast.Continue, ast.Break))
    if isinstance(node, ast.Assign):
        deleted = not is_first(node)
    if deleted:
        yield ast.Pass()


def is_first(node):
    """Whether an assignment gives names their first values: without it, anything fails."""
    parts = getattr(node.targets[0], "elts", node.targets)
    read = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
    return all(isinstance(part, ast.Name) and part.id not in read for part in parts)


def is_left_out(node):
    """Whether it is a docstring or a message, which no test compares word for word, or run as a command only."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    left_out = ast.unparse(node).startswith(("warnings.warn", "if __name__"))
    return left_out or isinstance(node, (ast.Raise, ast.JoinedStr))


def mutants(node, home=()):
    """(line, text, homes, put) for each mutant below a node: `homes` are the first lines of the functions and classes
    around it, `put` makes the change in the tree."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for place, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or (isinstance(child, (ast.expr, ast.stmt)) and is_left_out(child)):
                continue
            inner = home
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = (*home, (min(d.lineno for d in (child, *child.decorator_list)), child.end_lineno))
            whole = isinstance(node, (ast.If, ast.IfExp)) and field == "test"  # becomes True and False, see above
            if whole and isinstance(child, ast.Compare) and isinstance(child.ops[0], EQUALITY):
                others = []
            else:
                others = replacements(child)
            for other in others:

                def put(other=other, holder=node, field=field, value=value, place=place):
                    new = value[:place] + [other] + value[place + 1 :] if isinstance(value, list) else other
                    setattr(holder, field, new)

                before, after = (" ".join(ast.unparse(ast.fix_missing_locations(n)).split()) for n in (child, other))
                yield child.lineno, f"{child.col_offset}: {shown(before, after)}", inner, put
            yield from mutants(child, inner)


def shown(before, after):
    """Both sources where they differ."""
    same = len(os.path.commonprefix([before, after]))  # noqa: RUF071
    start = max(0, same - 30)
    return f"{before[start : start + 80]}  ->  {after[start : start + 80]}"


def transplant(target, source, module):
    """Give the functions, classes and plain values of a module or class those of its changed copy."""
    for name, value in vars(source).items():
        before = vars(target).get(name)
        function, other = (inspect.unwrap(getattr(part, "fget", part)) for part in (before, value))
        if isinstance(function, types.FunctionType) and isinstance(other, types.FunctionType):
            if function.__module__ == module:
                function.__code__ = other.__code__
                function.__defaults__ = other.__defaults__
        elif isinstance(value, type) and value.__module__ == module:
            transplant(before, value, module)
        elif isinstance(value, (bool, int, float, str, tuple)) and before != value and not name.startswith("__"):
            setattr(target, name, value)
        elif isinstance(value, dict) and value is not before and not name.startswith("__"):
            entries = [old if callable(old) else new for old, new in zip(before.values(), value.values())]
            before.clear()
            before.update(zip(value, entries))


class Pass:
    """The mutation pass, in the place where pytest would run the tests that it has collected."""

    def __init__(self, options):
        self.options = options
        self.failed = None
        self.skipped = False

    def pytest_runtest_logreport(self, report):
        self.skipped |= report.skipped
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_runtestloop(self, session):
        gc.freeze()
        self.items = {item.nodeid: item for item in session.items}
        table = self.options.results / "tests.json"
        tests = {}
        if table.exists():
            tests = json.loads(table.read_text())
        new = [name for name in self.items if name not in tests]
        if new:
            tests |= forked(lambda: self.survey(new))
            table.write_text(json.dumps(tests))
        tests = {name: test for name, test in tests.items() if test and name in self.items}
        file = self.options.file
        record = self.options.results / f"{file.stem}.txt"
        record.touch()
        done = record.read_text().splitlines()
        kills = Counter(line.split("\t")[2] for line in done)
        names = {line.split("\t")[0] for line in done}
        first, last = map(int, self.options.lines.split("-"))
        tree = ast.parse(file.read_text())
        for line, text, homes, put in mutants(tree):
            name = f"{file.name}:{line}:{text}"
            if not first <= line <= last or name in names:
                continue
            start = time.monotonic()
            order = tests_for(tests, file.name, [(0, math.inf), *homes][-1], kills, self.options.budget)
            verdict = forked(lambda put=put, order=order: self.verdict(tree, put, order))
            if verdict == -signal.SIGALRM:
                verdict = ("hang", "")
            elif isinstance(verdict, int):
                verdict = ("crash", str(verdict))
            kills[verdict[1]] += 1
            entry = f"{name}\t{verdict[0]}\t{verdict[1]}\t{time.monotonic() - start:.1f} s"
            print(entry, flush=True)
            with record.open("a") as log:
                log.write(entry + "\n")
        return True

    def run(self, order):
        """Run tests, each within a time limit, until one fails. Returns its name or None."""
        self.failed = None
        for name, following in zip(order, [*list(order)[1:], None]):
            signal.alarm(60 + 10 * int(order[name]))
            item = self.items[name]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following and self.items[following])
            signal.alarm(0)
            if self.failed:
                return self.failed

    def survey(self, names):
        """For each test: its seconds, and the first lines of the functions that it reaches, by file. None if it does
        not pass."""
        tests = {}
        for name in names:
            reached = {}

            def trace(frame, event, argument, reached=reached):
                folder, _, file = frame.f_code.co_filename.rpartition("/")
                if folder == str(ROOT):
                    reached.setdefault(file, set()).add(frame.f_code.co_firstlineno)

            start = time.monotonic()
            self.skipped = False
            sys.settrace(trace)
            failed = self.run({name: 600})
            sys.settrace(None)
            lines = {file: sorted(lines) for file, lines in reached.items()}
            tests[name] = None
            if not failed and not self.skipped:
                tests[name] = [round(time.monotonic() - start, 2), lines]
        return tests

    def verdict(self, tree, put, order):
        """("killed", the test that failed) or ("survived", "")."""
        put()
        path = self.options.file
        module = sys.modules[path.stem]
        copied = types.ModuleType(path.stem)
        try:
            exec(compile(ast.fix_missing_locations(tree), module.__file__, "exec"), vars(copied))
            transplant(module, copied, path.stem)
        except Exception as error:
            return "killed", f"import: {type(error).__name__}"
        failed = self.run(order)
        if failed:
            return "killed", failed
        return "survived", ""


def forked(action):
    """What an action returns in a process of its own, or the number of the signal that ended it.

    Raises:
        RuntimeError: the process ended without either; with what it wrote.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    with tempfile.TemporaryFile() as log:  # it has no name, so nothing of it stays on the disk
        child = os.fork()
        if child == 0:
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                answer = json.dumps(action())
                with open(writing, "w") as file:
                    file.write(answer)
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading) as file:
            answer = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not answer and not code:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace"))
    if not answer:
        return code
    return json.loads(answer)


def tests_for(tests, name, home, kills, budget):
    """{test: seconds} of those that reach a function or class, the most promising first."""
    start, end = home
    for first, last in ((start, end), (0, math.inf)):  # a class without methods: all that reach the file
        found = [t for t in tests if any(first <= line <= last for line in tests[t][1].get(name, ()))]
        if found:
            break
    order, total = {}, 0
    near = Counter({test: 5 for test in found if test.startswith(NEAR)})
    for test in sorted(found, key=lambda test: (tests[test][0] + 0.05) / (1 + kills[test] + near[test])):
        total += tests[test][0]
        if total > budget:
            break
        order[test] = tests[test][0]
    return order


def parse(arguments=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.code_mutants", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--lines", default="1-100000", help="A-B")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "code_mutants")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for a mutant")
    parser.add_argument("--examples", type=int, default=10, help="random models a test")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    options.results.mkdir(exist_ok=True)
    importlib.import_module("tests.conftest")
    hypothesis.settings.register_profile(
        "mutants", hypothesis.settings.get_profile("mutants"), max_examples=options.examples
    )
    files = [f"tests/test_{name}.py" for name in TESTS]
    given = ["-q", "-s", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", "-m", "not slow"]
    with tempfile.TemporaryDirectory() as temporary:
        return int(pytest.main([*files, *given, f"--basetemp={temporary}/tests"], plugins=[Pass(options)]))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads
    sys.exit(main())

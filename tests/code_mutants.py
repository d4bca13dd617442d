"""Change one operator or constant of a file at a time and run the tests that reach it.

    python -m tests.code_mutants ministral.py --lines 100-200

Prints a line for each mutant: `killed` if a test failed (which one), `hang` or `crash` if the process ended, `survived` if
all passed. The lines are also kept in --results, and the mutants that are there are not run again. Nothing is written
into the working tree: everything but this project is imported once, and each mutant is a fork of that, in which the
changed source takes the place of the module.
"""

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
MEMORY = 12 << 30
# These start processes, which do not see the change, or do not reach the models.
LEFT_OUT = {"explorer", "explorer_page", "explorer_port", "explorer_state", "mutants", "readme", "tensor_parallel"}
SWAPS = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.Pow: [ast.Mult],
    ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.And: [ast.Or], ast.Or: [ast.And],
}  # fmt: skip
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
        field = "id" if isinstance(node.func, ast.Name) else "attr"
        yield changed(node, func=changed(node.func, **{field: NAMES[name]}))


def replacements(node):
    """What may stand in the place of a node."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        yield from (changed(node, op=other()) for other in SWAPS.get(type(node.op), ()))
    if isinstance(node, ast.BoolOp):
        for operand in node.values:
            kept = [other for other in node.values if other is not operand]
            yield changed(node, values=kept) if len(kept) > 1 else kept[0]
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
    if isinstance(node, ast.Return) and node.value is not None:
        yield changed(node, value=ast.Constant(None))
    deleted = isinstance(node, (ast.Expr, ast.Continue, ast.Break))
    if isinstance(node, ast.Assign):  # a name that gets its first value is missed in any case
        target = node.targets[0]
        deleted = not isinstance(target, ast.Name) or target.id in ast.unparse(node.value)
    if deleted:
        yield ast.Pass()


def is_text(node):
    """Whether it is a docstring or a message, which no test compares word for word."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    return isinstance(node, (ast.Raise, ast.JoinedStr)) or ast.unparse(node).startswith("warnings.warn")


def mutants(node, home=()):
    """(line, text, homes, put) for each mutant below a node: `homes` are the first lines of the functions and classes
    around it, `put` makes the change in the tree."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for place, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or (isinstance(child, (ast.expr, ast.stmt)) and is_text(child)):
                continue
            inner = home
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = (*home, (min(d.lineno for d in (child, *child.decorator_list)), child.end_lineno))
            for other in replacements(child):

                def put(other=other, holder=node, field=field, value=value, place=place):
                    new = value[:place] + [other] + value[place + 1 :] if isinstance(value, list) else other
                    setattr(holder, field, new)

                before, after = (" ".join(ast.unparse(ast.fix_missing_locations(n)).split()) for n in (child, other))
                yield child.lineno, f"{child.col_offset}: {shown(before, after)}", inner, put
            yield from mutants(child, inner)


def shown(before, after):
    """Both sources where they differ."""
    start = max(0, len(os.path.commonprefix([before, after])) - 30)
    return f"{before[start : start + 80]}  ->  {after[start : start + 80]}"


class Plugin:
    """Runs the given tests in the given order, or all, each within a time limit. Keeps which test failed, and for each
    test its seconds and the first lines of the functions that it reached, by file."""

    def __init__(self, order=None):
        self.order = order
        self.failed = None
        self.tests = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        if self.order is not None:
            places = {name: place for place, name in enumerate(self.order)}
            items[:] = sorted((i for i in items if i.nodeid in places), key=lambda item: places[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        reached = {}

        def trace(frame, event, argument):
            folder, _, name = frame.f_code.co_filename.rpartition("/")
            if folder == str(ROOT):
                reached.setdefault(name, set()).add(frame.f_code.co_firstlineno)

        start = time.monotonic()
        if self.order is None:
            sys.settrace(trace)
        else:
            signal.alarm(10 + 10 * int(self.order[item.nodeid]))
        result = yield
        sys.settrace(None)
        signal.alarm(0)
        lines = {name: sorted(lines) for name, lines in reached.items()}
        self.tests[item.nodeid] = [round(time.monotonic() - start, 2), lines]
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failed is None:
            self.failed = report.nodeid
        if report.outcome != "passed" and self.order is None:
            self.tests[report.nodeid] = None


def run(files, order=None):
    """(exit code of pytest, plugin) for tests of some files."""
    plugin = Plugin(order)
    options = ["-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    return int(pytest.main([*files, *options, *(["-x"] if order else [])], plugins=[plugin])), plugin


def forked(action):
    """What an action returns in a process of its own, or the number of the signal that ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            answer = json.dumps(action())
            with open(writing, "w") as file:
                file.write(answer)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else os.waitstatus_to_exitcode(status)


def survey():
    """Seconds and reached functions of each test that passes, and the names of all modules that are not ours."""
    files = [f"tests/{p.name}" for p in sorted(ROOT.glob("tests/test_*.py")) if p.stem[5:] not in LEFT_OUT]
    _, plugin = run(files)
    outside = [n for n, m in list(sys.modules.items()) if not str(getattr(m, "__file__", ROOT)).startswith(str(ROOT))]
    return {"tests": {name: test for name, test in plugin.tests.items() if test is not None}, "modules": outside}


def verdict(path, tree, put, order):
    """("killed", the test that failed) or ("survived", ""), in a fork."""
    put()
    spec = importlib.util.find_spec(path.stem)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        exec(compile(ast.fix_missing_locations(tree), path, "exec"), module.__dict__)
    except Exception as error:
        return "killed", f"import: {type(error).__name__}"
    names = list(order)
    for part in (names[:6], names[6:30], names[30:]):  # to collect few files
        if part:
            code, plugin = run(dict.fromkeys(n.split("::")[0] for n in part), {n: order[n] for n in part})
            if code not in (0, 5):
                return "killed", plugin.failed or f"pytest: {code}"
    return "survived", ""


def tests_for(tests, name, home, kills, budget):
    """{test: seconds} of those that reach a function or class, the most promising first."""
    start, end = home
    for first, last in ((start, end), (0, math.inf)):  # a class without methods: all that reach the file
        found = [t for t, (_, lines) in tests.items() if any(first <= line <= last for line in lines.get(name, ()))]
        if found:
            break
    order, total = {}, 0
    for test in sorted(found, key=lambda test: (tests[test][0] + 0.05) / (1 + kills[test])):
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


def main():
    options = parse()
    options.results.mkdir(exist_ok=True)
    importlib.import_module("tests.conftest")
    hypothesis.settings.register_profile(
        "mutants", hypothesis.settings.get_profile("mutants"), max_examples=options.examples
    )
    table = options.results / "tests.json"
    if not table.exists():
        table.write_text(json.dumps(forked(survey)))
    known = json.loads(table.read_text())
    for name in known["modules"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()

    record = options.results / f"{options.file.stem}.txt"
    done = record.read_text().splitlines() if record.exists() else []
    kills = Counter(line.split("\t")[2] for line in done)
    names = {line.split("\t")[0] for line in done}
    tree = ast.parse(options.file.read_text())
    first, last = map(int, options.lines.split("-"))
    for line, text, homes, put in mutants(tree):
        name = f"{options.file.name}:{line}:{text}"
        if not first <= line <= last or name in names:
            continue
        start = time.monotonic()
        order = tests_for(known["tests"], options.file.name, [(0, math.inf), *homes][-1], kills, options.budget)
        answer = forked(lambda put=put, order=order: verdict(options.file, tree, put, order))
        if isinstance(answer, int):
            answer = ("hang" if answer == -signal.SIGALRM else "crash", str(answer))
        kills[answer[1]] += 1
        entry = f"{name}\t{answer[0]}\t{answer[1]}\t{time.monotonic() - start:.1f} s"
        print(entry, flush=True)
        with record.open("a") as file:
            file.write(entry + "\n")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads
    main()

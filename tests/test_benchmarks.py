"""`python -m benchmarks.cuda` in its tiny mode on a CPU: the table, the JSON, and when there is no ratio."""

import json
import math

import pytest
import torch
import transformers

from benchmarks import bench, common, cuda, duel
from decoder import kv_cache_bytes

# Of each shape, in this order. Lengths and batches are those of cuda.TINY.
ROWS = [
    "decode after 8", "decode after 8, fast=False", "decode after 8, first of 8 tokens",
    "decode after 8, all of 8 tokens", "first token after 8", "prompt of 16", "prompt of 24", "prompt of 48",
    "decode at 40", "prompt of 8 after 24", "batch of 1", "batch of 1, padded", "batch of 2", "batch of 2, padded",
    "batch of 3", "batch of 3, padded", "sampled batch of 2", "sampled batch of 3", "compiled",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def verbosity():
    """Benchmarks silence Transformers; other tests listen to it."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The exit code, the JSON and the printed lines of one run of all cases."""
    path = tmp_path_factory.mktemp("cuda") / "cuda.json"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda text="", **_: lines.extend(str(text).splitlines()))
        code = cuda.main(["--tiny", "--json", str(path)])
    return code, json.loads(path.read_text()), lines


def cells(lines):
    """The cells of the table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| tiny-")]


def test_all_rows_are_there(tiny):
    code, result, lines = tiny
    assert code == 0, [row["note"] for row in result["rows"] if row["failed"]]
    expected = [(shape, case) for shape in cuda.TINY.shapes for case in ROWS]
    assert [(row["shape"], row["case"]) for row in result["rows"]] == expected
    assert [tuple(line[:2]) for line in cells(lines)] == expected
    assert all(rate > 0 for rate in result["limits"].values()) and result["limits"].keys() == {"matvec", "copy"}


def test_numbers_follow_from_the_seconds(tiny):
    _, result, lines = tiny
    units = {"tokens/s": lambda seconds, tokens: tokens / seconds, "ms": lambda seconds, tokens: 1000 * seconds}
    for row, line in zip(result["rows"], cells(lines), strict=True):
        if row["case"] == "compiled":
            assert row["ratio"] is None and "skipped" in line[4]
            continue
        assert row["ours"] > 0 and row["theirs"] > 0 and not row["note"]
        assert row["ratio"] == row["theirs"] / row["ours"] and line[4] == f"{row['ratio']:.2f}"
        for seconds, cell in ((row["ours"], line[2]), (row["theirs"], line[3])):
            number, unit = cell.split()
            places = 0 if unit == "tokens/s" else 1
            assert unit == row["unit"] and number == f"{units[unit](seconds, row['tokens']):.{places}f}"
        if row["read_bytes"] is None:
            assert row["share"] is None and line[5] == ""
        else:
            share = row["read_bytes"] / result["limits"]["matvec"] / row["ours"]
            assert row["share"] == pytest.approx(share, rel=1e-12) and line[5].startswith(f"{row['share']:.0%}, ")


def test_bytes_and_tokens_of_the_rows(tiny):
    """Counted here in another way: a step reads all matrices but the embeddings, and its cache."""
    rows = {(row["shape"], row["case"]): row for row in tiny[1]["rows"]}
    for shape in cuda.TINY.shapes:
        config = common.CONFIGS[shape]
        head, q = config.vocab_size * config.hidden_size, config.num_attention_heads * config.head_dim
        layer = 2 * config.hidden_size * (q + q // 2) + 3 * config.hidden_size * config.intermediate_size
        norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
        weights = 4 * (head + config.num_hidden_layers * layer + norms)
        assert rows[shape, "decode after 8"]["read_bytes"] == weights
        assert rows[shape, "decode after 8, fast=False"]["read_bytes"] == weights
        assert rows[shape, "decode at 40"]["read_bytes"] == weights + kv_cache_bytes(config, 40, 4)
        assert rows[shape, "prompt of 48"]["cache_bytes"] == kv_cache_bytes(config, 48, 4)
        assert rows[shape, "prompt of 48"]["tokens"] == 48 and rows[shape, "batch of 3, padded"]["tokens"] == 3
        assert rows[shape, "decode after 8, all of 8 tokens"]["tokens"] == 8
        assert rows[shape, "prompt of 48"]["peak_bytes"] is None


def test_the_peak_beside_the_cache():
    row = cuda.Row("8b", "prompt of 512", "tokens/s", 0.01, 0.02, 512, cache_bytes=10**6)
    assert str(row).endswith("| not measured |")
    row.peak_bytes, row.their_peak_bytes = 1_200_000, 3_000_000
    times = "51200 tokens/s | 25600 tokens/s | 2.00"
    assert str(row) == f"| 8b | prompt of 512 | {times} |  | 1.2 MB (1.20), 3.0 MB (3.00) |"


# -------------------------------------------------------------------------------------------- no wrong comparison


@pytest.fixture(scope="module")
def pair():
    """The tiny models of both sides."""
    model = common.ours("tiny-3b", torch.float32)
    return cuda.Pair("tiny-3b", cuda.TINY, 1e9, model, common.theirs(model))


def test_both_sides_generate_the_same_tokens(pair):
    ids = bench.prompt(pair.ours, 8, rows=3)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for calls in (pair.calls(ids, 6, mask), pair.calls_after(24, 8, 6)):
        runs = {side: duel.watch(call, "cpu") for side, call in calls.items()}
        assert len(runs["ours"].tokens) == 7
        assert all(map(torch.equal, runs["ours"].tokens, runs["theirs"].tokens))
        assert 0 < runs["ours"].first < runs["ours"].total and 0 < runs["ours"].step < runs["ours"].total
        again = duel.watch(calls["ours"], "cpu")  # the cache is as long as at first
        assert all(map(torch.equal, runs["ours"].tokens, again.tokens))


@pytest.mark.parametrize(("scale", "refused"), [(1.0, False), (1.001, True), (math.nan, True)])
def test_no_ratio_where_logits_differ(pair, monkeypatch, capsys, tmp_path, scale, refused):
    right = common.theirs

    def wrong(model):
        other = right(model)
        norm = other.model.layers[0].input_layernorm
        norm.weight = torch.nn.Parameter(norm.weight * scale)  # a new tensor: ours keeps its own
        return other

    monkeypatch.setattr(common, "theirs", wrong)
    path = tmp_path / "cuda.json"
    assert cuda.main(["first token", "prompt 48", "--tiny", "--json", str(path)]) == int(refused)
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert (row["ratio"] is None) == row["failed"] == refused
        assert row["ours"] > 0 and row["theirs"] > 0
    assert capsys.readouterr().out.count("no ratio: logits differ by") == 4 * refused


def test_no_ratio_where_greedy_tokens_differ(pair):
    ids = bench.prompt(pair.ours, 8)
    calls = pair.calls(ids, 6)

    def least_likely(logits_processor=(), **extra):
        processors = [*logits_processor, lambda ids, scores: -scores]
        return calls["ours"](logits_processor=processors, **extra)

    runs = pair.duel({"ours": least_likely, "theirs": calls["theirs"]})
    assert runs.notes == {"ours": "no ratio: greedy tokens differ", "theirs": ""}
    assert runs.distances["ours"] < 1e-5  # of the first token, after which the texts differ
    assert pair.duel({"ours": least_likely, "theirs": calls["theirs"]}, greedy=False).notes["ours"] == ""


def test_the_distance_counts_a_row_up_to_the_first_token_that_differs():
    same = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ours = duel.Run(logits=[same, same * torch.tensor([[5.0], [1.01]])], tokens=[None, torch.tensor([0, 1])])
    theirs = duel.Run(logits=[same, same], tokens=[None, torch.tensor([1, 1])])
    for run in (ours, theirs):
        run.tokens.append(torch.tensor([1, 1]))
    assert duel.distance(ours, theirs) == pytest.approx(0.01, rel=1e-3)
    assert duel.distance(theirs, theirs) == 0


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu(no_gpu, capsys):
    assert cuda.main([]) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: no CUDA device was found; --tiny measures tiny shapes on a CPU\n" and not printed.out


def test_a_failing_case_costs_no_other(monkeypatch, capsys):
    def fail(pair):
        raise RuntimeError("out of\nmemory")

    cases = cuda.make_cases(cuda.TINY) | {"first token": cuda.Case(1, fail)}
    monkeypatch.setattr(cuda, "make_cases", lambda setup: cases)
    assert cuda.main(["first token", "prompt 16", "--tiny", "--shape", "3b"]) == 1
    lines = cells(capsys.readouterr().out.splitlines())
    assert [line[:2] for line in lines] == [["tiny-3b", "first token"], ["tiny-3b", "prompt of 16"]]
    assert lines[0][4] == "failed: out of memory" and float(lines[1][4]) > 0


def test_cases_that_do_not_fit_into_the_budget(capsys):
    assert cuda.main(["first token", "compiled", "--tiny", "--shape", "8b", "--budget", "100"]) == 0
    lines = cells(capsys.readouterr().out.splitlines())
    assert float(lines[0][4]) > 0 and lines[1][4].startswith("skipped: takes about 130 s, ")


def test_results_of_a_gpu_are_not_overwritten_by_others(monkeypatch, tmp_path):
    path = tmp_path / "cuda.json"
    monkeypatch.setattr(cuda, "JSON", path)
    cases = {"first token": cuda.Case(1, cuda.first_token)}
    monkeypatch.setattr(cuda, "make_cases", lambda setup: cases)
    assert cuda.main(["--tiny"]) == 0 and not path.exists()
    monkeypatch.setattr(cuda, "Setup", lambda: cuda.TINY)
    assert cuda.main(["first token"]) == 0 and not path.exists()
    assert cuda.main(["--shape", "3b"]) == 0 and not path.exists()
    assert cuda.main([]) == 0 and len(json.loads(path.read_text())["rows"]) == 2


def test_all_cases_fit_into_the_budget():
    setup, building = cuda.Setup(), 20
    cases = cuda.make_cases(setup)
    compiling = cases.pop("compiled").seconds
    each = sum(case.seconds for case in cases.values())
    assert building + len(setup.shapes) * each + compiling <= cuda.BUDGET <= 360

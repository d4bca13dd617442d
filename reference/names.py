"""Names of tensors in the dumps of other programs, and the points of a trace that they are (`--map NAME`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from reference.trace import LAYER, MODULES

# Names of the callback of a llama.cpp graph. N is the number of the layer. Some names are given to several tensors, one
# after the other, and a dump holds the last of them, such as queries and keys that are rotated already. In the last
# layer, llama.cpp computes only the tokens whose logits are asked for.
LLAMA_CPP = {
    "inp_embd": "embedding",
    "embd": "embedding",
    "attn_norm-N": "layers.N.input_norm",
    "Qcur-N": "layers.N.attention.q_rotated",
    "Kcur-N": "layers.N.attention.k_rotated",
    "Vcur-N": "layers.N.attention.v",
    "kq-N": "layers.N.attention.scores",
    "kq_soft_max-N": "layers.N.attention.probabilities",
    "kq_soft_max_ext-N": "layers.N.attention.probabilities",
    "kqv_out-N": "layers.N.attention.heads",
    "ffn_inp-N": "layers.N.attention_residual",
    "ffn_norm-N": "layers.N.post_attention_norm",
    "ffn_gate-N": "layers.N.mlp.gate",
    "ffn_up-N": "layers.N.mlp.up",
    "ffn_silu-N": "layers.N.mlp.activation",
    "ffn_gate_par-N": "layers.N.mlp.product",
    "ffn_swiglu-N": "layers.N.mlp.product",
    "ffn_out-N": "layers.N.mlp.down",
    "l_out-N": "layers.N.mlp_residual",
    "result_norm": "final_norm",
    "result_output": "logits",
}
KNOWN_MAPS = ("transformers", "mlx", "llama.cpp")
# Modules of other programs whose outputs are points, and which have no entry in MODULES.
THEIR_MODULES = {
    "embed_tokens": "embedding",
    "layers.N.mlp.act_fn": "layers.N.mlp.activation",
}
OUTPUTS = {module: output for module, (_, output) in MODULES.items() if output is not None} | THEIR_MODULES


def translate(program: str, names: Iterable[str]) -> dict[str, str]:
    """The names that are known -> points.

    Args:
        program: one of `KNOWN_MAPS`. The names of "transformers" and "mlx" are those of modules, whose outputs are
            dumped, as forward hooks see them.
        names: those of a dump.
    """
    points = {}
    for name in names:
        point = module_output(name)
        if program == "llama.cpp":
            point = llama_cpp_point(name)
        if point is not None:
            points[name] = point
    return points


def redundant(names: Collection[str]) -> set[str]:
    """The names of modules that are not known and have parts among `names`. The parts have their outputs."""
    parents = {name.rpartition(".")[0] for name in names}
    return {name for name in parents & set(names) if module_output(name) is None}


def llama_cpp_point(name: str) -> str | None:
    """ "ffn_inp-3" -> "layers.3.attention_residual"; None for another name."""
    if name in LLAMA_CPP:
        return LLAMA_CPP[name]
    stem, dash, number = name.rpartition("-")
    point = LLAMA_CPP.get(f"{stem}{dash}N")
    if point is None or not number.isdecimal():
        return None
    return point.replace("N", number)


def module_output(name: str) -> str | None:
    """ "model.layers.3.mlp.up_proj" -> "layers.3.mlp.up"; None for another name. What stands before is not read."""
    layer = LAYER.search(name)
    parts = LAYER.sub("N", name).split(".")
    for start in range(len(parts)):
        module = ".".join(parts[start:])
        point = OUTPUTS.get(module)
        if point is None:
            continue
        if layer is not None:
            point = point.replace("layers.N", f"layers.{layer[0]}")
        return point
    return None


def advice(unknown: Iterable[str], valid: Iterable[str]) -> str:
    """What to do about names that the reference does not have: the nearest valid one of each, or a map."""
    unknown, valid = list(unknown), list(valid)
    for program in KNOWN_MAPS:
        if any(point in valid for point in translate(program, unknown).values()):
            return f"they look like those of {program}: give --map {program}"
    nearest = []
    for name in unknown[:4]:
        close = get_close_matches(name, valid, n=1, cutoff=0.5)
        if close:
            nearest.append(f"{name}: is it {close[0]}?")
    if nearest:
        return "; ".join(nearest)
    return f"give --map FILE.json, or --map {', '.join(KNOWN_MAPS[:-1])} or {KNOWN_MAPS[-1]}"

"""Decoding by a recorded step: the kernels of a step are recorded once, as a CUDA graph, and started together.

    step = recorded_step(model, cache, visible)            # model: a `fast.FlatModel`
    logits = step(ids)                                     # (B, 1) -> (B, V)

Without it, the GPU waits for Python, which starts hundreds of kernels one after the other. On one H200 (torch 2.11,
bfloat16, an earlier version of this file), the 3B shape decoded 249 tokens a second, and 52 to 67 by `model(...)`. The
8B shape decoded 148, and 44 to 53 (benchmarks/RESULTS.md).

A graph reads and writes the same memory each time. So the new id, its slot and the padding are tensors that keep their
place, and a step attends to a fixed number of slots, its room. Slots that are still empty are masked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fast import FlatModel, one_query_attention
from ministral import KVCache, LayerCache

Step = Callable[[], Tensor]
SMALLEST_ROOM = 256  # slots; reading them takes little time beside reading the weights


class RecordedStep:
    """A decode step whose shapes and addresses stay the same: ids (B, 1) -> logits (B, V), which the next call
    overwrites. On CUDA it is recorded and replayed. On other devices it is computed each time, for the tests.

    It attends to the first `room` slots of each full layer, and to the ring of each sliding layer.

    Args:
        model: computes the step.
        cache: holds the text.
        keys_values: the slots of each layer that the step reads and writes, see `first_slots`.
        room: the length of the text, in tokens, at which another step is needed.
        visible: bool (B, n), False at padding. All slots from n on are visible.
        compile: let `torch.compile` fuse the small operations.
    """

    identity: Any = None  # what must be unchanged for the step to be used again, see `recorded_step`

    def __init__(
        self, model: FlatModel, cache: KVCache, keys_values: list[tuple[Tensor, Tensor]], room: int,
        visible: Tensor, compile: bool,
    ) -> None:  # fmt: skip
        B, device = len(visible), visible.device
        self.model = model
        self.room = room
        self.layers = cache.layers
        self.keys_values = keys_values
        # The inputs of the graph. `first` (B, 1) is the rotary position of slot 0: minus the number of padding tokens.
        # They are no tensors of inference mode, because a later call may change them outside of it.
        with torch.inference_mode(False):
            self.ids = torch.zeros(B, 1, dtype=torch.int64, device=device)
            self.first = torch.zeros(B, 1, dtype=torch.int64, device=device)
            self.slot = torch.zeros(1, dtype=torch.int64, device=device)
            self.visible = torch.ones(B, room, dtype=torch.bool, device=device)
        self.start(visible)

        self.replay: Step = self.compute
        if compile:
            # Each shape of a step is compiled once in a process. The default limit of 8 would be an error.
            torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 256)
            self.replay = torch.compile(self.compute, fullgraph=True, dynamic=False)
        if device.type == "cuda":
            self.replay = record(self.replay, device)

    def start(self, visible: Tensor) -> None:
        """Set the inputs to the text in the cache, with the padding of `visible` (B, n)."""
        padding = (~visible).sum(dim=1, keepdim=True)
        known = min(visible.shape[1], self.room)
        self.first.copy_(-padding)
        self.visible.fill_(True)
        self.visible[:, :known] = visible[:, :known]
        self.slot.fill_(self.layers[0].length)

    def compute(self) -> Tensor:
        """Compute the step. From one step to the next, only the contents of tensors change."""
        # Layers of one size (the room, or the window) share the slot of the new token and the mask (B, 1, 1, size).
        new_slots, masks = {}, {}
        for size in {keys.shape[2] for keys, _ in self.keys_values}:
            new_slots[size] = self.slot % size
            slots = torch.arange(size, device=self.ids.device)
            # The index in the text of the token in each slot of a ring. Below 0, the slot is empty.
            index = self.slot - (self.slot - slots) % size
            seen = (index >= 0) & self.visible[:, index.clamp(min=0)]
            masks[size] = seen[:, None, None]

        def attend(n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys_values[n]
            size = keys.shape[2]
            keys.index_copy_(2, new_slots[size], k)
            values.index_copy_(2, new_slots[size], v)
            return one_query_attention(q, keys, values, masks[size], self.model.grouped)

        return self.model.run(self.ids, self.first + self.slot, attend)

    def __call__(self, ids: Tensor) -> Tensor:
        """Add the ids (B, 1) to the text. Returns the logits (B, V) after them."""
        self.ids.copy_(ids)
        logits = self.replay()
        self.slot += 1
        for layer in self.layers:
            layer.length += 1
        return logits


def first_slots(layer: LayerCache, room: int) -> tuple[Tensor, Tensor]:
    """Reserve memory for `room` tokens in a layer. Returns views of its keys and values: of the first `room` slots,
    (B, G, room, D), or of a ring with a smaller window, (B, G, window, D)."""
    size = room
    if layer.window is not None:
        size = min(room, layer.window)
    keys, values = (tensor[:, :, :size] for tensor in layer.reserve(layer.keys, layer.values, size))
    for tensor in (keys, values):
        # A masked slot has the weight 0. Uninitialised memory may hold NaN, and 0 * NaN is NaN.
        tensor[:, :, layer.length :].zero_()
    return keys, values


def record(step: Step, device: torch.device) -> Step:
    """Record the kernels of a step as a CUDA graph. Returns the function that replays it.

    Before that, the step must run on another stream, where it is compiled and where libraries reserve their memory
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). These runs write to the slot of the next token,
    which the first replay overwrites."""
    with torch.cuda.device(device):
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Without `stream`, the stream of the device that recorded first in this process is used.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


# ------------------------------------------------------------------------------------- when a step is recorded

# The numbers of new tokens from which recording and compiling pay (3B shape, H200, benchmarks/RESULTS.md).
# Recording takes 4 steps that are not recorded. Each takes 4 times as long as a recorded one, so that recording pays
# from 16 / (4 - 1) = 6 tokens on. This leaves a margin.
RECORDING_PAYS = 8
# Compiling takes 31 s for each room and saves 1.2 ms of a token: 26,000 tokens, rounded up to a power of two.
COMPILING_PAYS = 32768

# The last step of each cache. It is freed with the cache, because it refers to the layers and not to the cache.
STEPS: WeakKeyDictionary[KVCache, RecordedStep] = WeakKeyDictionary()


def recording_pays(new_tokens: int, device: torch.device) -> bool:
    """Whether up to `new_tokens` tokens are decoded faster by a recorded step, its recording included."""
    return device.type == "cuda" and new_tokens >= RECORDING_PAYS


def compiling_pays(new_tokens: int, device: torch.device) -> bool:
    """Whether they are decoded faster by a compiled step, its compilation included. `torch.compile` needs Triton and a
    C compiler."""
    can_compile = find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))
    return device.type == "cuda" and new_tokens >= COMPILING_PAYS and can_compile


def recorded_step(
    model: FlatModel, cache: KVCache, visible: Tensor, expected: int, compile: bool = False
) -> RecordedStep:
    """The step for the next token after the text in the cache. The step of an earlier call is used again if it has the
    same room, and if weights, keys and values are still in the same memory. The step, and thereby the weights, are kept
    as long as the cache.

    Args:
        model, cache, visible, compile: see `RecordedStep`.
        expected: the expected length of the whole text, in tokens. A compiled step has room for all of it.
    """
    room = choose_room(cache, expected, compile)
    step = STEPS.pop(cache, None)
    if step is not None and step.room != room:
        step = None  # before `first_slots` reserves memory: the old step keeps old keys and values alive
    keys_values = [first_slots(layer, room) for layer in cache.layers]
    tensors = [model.embeddings, model.norm, model.head]
    for group in (*model.layers, *keys_values):
        tensors += group
    memory = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
    functions = (model.rotary_emb, model.rotate, model.act, model.eps)
    identity = (room, compile, repr(model.config), functions, memory)
    if step is not None and step.identity == identity:
        step.start(visible)
    else:
        step = RecordedStep(model, cache, keys_values, room, visible, compile)
        step.identity = identity
    STEPS[cache] = step
    return step


def choose_room(cache: KVCache, expected: int, compile: bool) -> int:
    """The number of slots that the next steps read: a power of two.

    A short text then reads few slots, although the cache may have many, and a long text rarely needs another step. If
    the next token still fits into the memory of the cache, the room is no larger than that memory, so that the cache
    is not copied. A compiled step has room for the whole text, because compiling again takes long, and up to a quarter
    more, so that texts of similar lengths share it."""
    slots = cache.get_seq_length() + 1
    if compile:
        slots = max(slots, expected)
        unit = max(power_of_two(slots) // 8, SMALLEST_ROOM)
        return (slots + unit - 1) // unit * unit
    capacity = max(layer.capacity for layer in cache.layers)
    if slots <= capacity:
        return min(power_of_two(slots), capacity)
    return power_of_two(slots)


def power_of_two(slots: int) -> int:
    """The next power of two, and at least `SMALLEST_ROOM`."""
    return max(1 << (slots - 1).bit_length(), SMALLEST_ROOM)

"""Decoding by a recorded step: a GPU replays one graph of kernels, instead of being told each kernel anew.

    step = recorded_step(model, cache, visible)            # model: a `fast.FlatModel`
    logits = step(ids)                                     # (B, 1) -> (B, V)

The 3B shape decodes 249 instead of 60 tokens a second, the 8B shape 148 instead of 50 (H200, torch 2.11, bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fast import FlatModel, one_query_attention
from ministral import KVCache, LayerCache

Step = Callable[[], Tensor]
SMALLEST_ROOM = 256


class RecordedStep:
    """A decode step of which every shape and address stays the same: ids (B, 1) -> logits (B, V), which the next call
    overwrites. On CUDA it is recorded and replayed. Elsewhere it is run.

    It attends to the first `room` slots of each layer, or to its window. Slots without a token are masked.

    Args:
        model: computes the step.
        cache: holds the text.
        keys_values: the first slots of each layer of the cache.
        room: the length of the text up to which steps can be added.
        visible: bool (B, n), False at padding. All slots from n on are visible.
        compile: let `torch.compile` fuse the small operations.
    """

    identity: Any = None  # see `recorded_step`

    def __init__(
        self, model: FlatModel, cache: KVCache, keys_values: list[tuple[Tensor, Tensor]], room: int, visible: Tensor,
        compile: bool,
    ) -> None:  # fmt: skip
        B, device = len(visible), visible.device
        self.model = model
        self.room = room
        self.layers = cache.layers
        self.keys_values = keys_values
        # The inputs of the graph. `first` is the position of slot 0: minus the padding. Tensors of inference mode could
        # not be changed by a later call outside of it.
        with torch.inference_mode(False):
            self.ids = torch.zeros(B, 1, dtype=torch.int64, device=device)
            self.first = torch.zeros(B, 1, dtype=torch.int64, device=device)
            self.slot = torch.zeros(1, dtype=torch.int64, device=device)
            self.visible = torch.ones(B, room, dtype=torch.bool, device=device)
        self.start(visible)

        self.replay: Step = self.compute
        if compile:
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
        """The step, in which only the contents of tensors change."""
        # For layers with each number of slots: where the new token is put, and the slots that it sees (B, 1, 1, slots).
        new_slots, masks = {}, {}
        for size in {keys.shape[2] for keys, _ in self.keys_values}:
            new_slots[size] = self.slot % size
            slots = torch.arange(size, device=self.ids.device)
            place = self.slot - (self.slot - slots) % size  # of the token in each slot; below 0: there is none
            seen = (place >= 0) & self.visible[:, place.clamp(min=0)]
            masks[size] = seen[:, None, None]

        def attend(n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys_values[n]
            size = keys.shape[2]
            keys.index_copy_(2, new_slots[size], k)
            values.index_copy_(2, new_slots[size], v)
            return one_query_attention(q, keys, values, masks[size])

        position_ids = (self.first + self.slot).clamp(min=0)
        return self.model.run(self.ids, position_ids, attend)

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        logits = self.replay()
        self.slot += 1
        for layer in self.layers:
            layer.length += 1
        return logits


def first_slots(layer: LayerCache, room: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, room or window, D) of a layer, after memory is reserved."""
    size = room
    if layer.window is not None:
        size = min(room, layer.window)
    keys, values = (tensor[:, :, :size] for tensor in layer.reserve(layer.keys, layer.values, size))
    for tensor in (keys, values):
        tensor[:, :, layer.length :].zero_()  # a hidden slot counts 0 times what it holds, which must not be NaN
    return keys, values


def record(step: Step, device: torch.device) -> Step:
    """Record the kernels of a step as a CUDA graph. Returns the function that replays it.

    See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: before, the step must run on another stream,
    where it is compiled and where libraries take their memory. All of these runs write to the same slot."""
    with torch.cuda.device(device):
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


# ------------------------------------------------------------------------------------- when a step is recorded

# Recording takes as long as 4 steps that are not recorded, which take 4 times as long as recorded ones.
RECORDING_PAYS = 8
# Compiling takes 31 s for each room and saves 1.2 ms of a token (3B shape, H200).
COMPILING_PAYS = 32768

# The last step of each cache. It goes with the cache: it holds the layers, but not the cache.
STEPS: WeakKeyDictionary[KVCache, RecordedStep] = WeakKeyDictionary()


def recording_pays(new_tokens: int, device: torch.device) -> bool:
    """Whether a text with so many new tokens at most is decoded faster by a recorded step."""
    return device.type == "cuda" and new_tokens >= RECORDING_PAYS


def compiling_pays(new_tokens: int, device: torch.device) -> bool:
    """Whether it is also worth compiling. On CUDA, `torch.compile` needs Triton."""
    return device.type == "cuda" and new_tokens >= COMPILING_PAYS and find_spec("triton") is not None


def recorded_step(
    model: FlatModel, cache: KVCache, visible: Tensor, expected: int, compile: bool = False
) -> RecordedStep:
    """The step for the next token after the text in the cache: that of an earlier call if it has the same room and all
    that it reads is in the same memory, else a new one.

    Args:
        model, visible, compile: see `RecordedStep`.
        expected: the length of the whole text. A compiled step has room for all of it.
    """
    room = choose_room(cache, expected, compile)
    step = STEPS.pop(cache, None)
    if step is not None and step.room != room:
        step = None  # frees the memory that it reads, if that of the cache has grown
    keys_values = [first_slots(layer, room) for layer in cache.layers]
    tensors = [model.embeddings, model.norm, model.head]
    for group in (*model.layers, *keys_values):
        tensors += group
    places = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
    identity = (room, compile, repr(model.config), places)
    if step is not None and step.identity == identity:
        step.start(visible)
    else:
        step = RecordedStep(model, cache, keys_values, room, visible, compile)
        step.identity = identity
    STEPS[cache] = step
    return step


def choose_room(cache: KVCache, expected: int, compile: bool) -> int:
    """The number of slots that the next steps read.

    It is a power of two, so that a short text does not read a long memory, and a long text seldom needs another step.
    It is less where the cache has less memory, and that is enough for the next token."""
    slots = cache.get_seq_length() + 1
    if compile:
        return power_of_two(max(slots, expected))
    capacity = max(layer.capacity for layer in cache.layers)
    if slots <= capacity:
        return min(power_of_two(slots), capacity)
    return power_of_two(slots)


def power_of_two(slots: int) -> int:
    """The next power of two, and at least `SMALLEST_ROOM`."""
    return max(1 << (slots - 1).bit_length(), SMALLEST_ROOM)

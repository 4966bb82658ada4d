from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

PANEL: int
PLAN_MAGIC: int
STEP_WORDS: int
MAX_WINDOW: int
MAX_DILATION: int
HEADER_WORDS: int
GPU_PLAN_MAGIC: int
GPU_STEP_WORDS: int
GPU_HEADER_WORDS: int
GPU_TILE_ROWS: int

def requested_backend() -> str: ...
def cpu_isa() -> str: ...
def cpu_has_bfloat16() -> bool: ...
def set_cpu_isa(name: str) -> None: ...
def available_cpu_isas() -> list[str]: ...
def run_multiply_adds(count: int, bfloat16: bool = False) -> int: ...
def start_kernel_times() -> None: ...
def stop_kernel_times() -> dict[int, tuple[int, int]]: ...
def workspace_bytes(
    plan: npt.NDArray[np.int64],
    weight_count: int,
    batch: int,
    height: int,
    width: int,
    threads: int,
) -> int: ...

class Program:
    """``snv2::Program``; arrays are views of its memory."""

    library: str
    about: str
    input_shape: list[int]
    last_map: list[int]
    classes: list[str]
    mean: list[float]
    std: list[float]
    results: list[tuple[int, int]]
    classifies: bool
    # dtype -> words and weights
    cpu: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]
    # dtype -> words, weights as bytes and parameters
    gpu: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.float32]]]
    def __init__(self, path: str) -> None: ...

class Stamps:
    def __init__(self, tensors: Sequence[Any], bytes: Sequence[int]) -> None: ...
    def hold(self, tensors: Sequence[Any]) -> bool: ...
    @property
    def read_memory(self) -> bool: ...

class Snapshot:
    def __init__(
        self,
        *,
        modules: Sequence[Any],
        registries: Sequence[dict[str, Any]],
        tensors: Sequence[Any],
        bytes: Sequence[int],
        hooks: Sequence[dict[int, Any]],
        modes: Sequence[dict[str, Any]],
    ) -> None: ...
    def prefetch(self) -> None: ...
    def holds(self, root: Any) -> bool: ...
    def rests(self, root: Any) -> bool: ...
    def runs_plain(self, root: Any) -> bool: ...

class Ready:
    def __init__(
        self,
        *,
        module: Any,
        x: Any,
        snapshot: Snapshot,
        outside: list[Any],
        op: Any,
        arguments: tuple[Any, ...],
    ) -> None: ...
    def __call__(self, module: Any, x: Any) -> Any: ...

def count_optimizer_step(*args: Any, **kwargs: Any) -> None: ...

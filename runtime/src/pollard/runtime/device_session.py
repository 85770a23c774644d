"""A model on a GPU: several instances, each with a stream and staging buffers of its own.

A batch is laid row by row into memory that the GPU reads by itself, padded to the next size of a
few (1, 2, 4 … the largest), and run with everything bound; what it gives is copied once. So no run
allocates, and cuDNN sees few shapes. Models with free dimensions beside the batch, and tensors of
text, are run plainly.
"""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pollard.runtime.device_errors import DeviceState, explain
from pollard.runtime.device_graphs import OwnThread, capturing, running
from pollard.runtime.errors import DeviceFault, DeviceLost, DeviceMemoryShort
from pollard.runtime.sessions import Array, Session, TensorInfo, aligned
from pollard.runtime.staging import Bytes, Staging, lay, taken
from pollard.runtime.tensors import NUMPY

_MOST_STAGED_BYTES = 512 << 20
"""Of one tensor at the largest batch; larger ones are run plainly."""

_NO_GRAPH = "-1"
_GRAPH_ID = "gpu_graph_id"


class Instance:
    """One session on one GPU. Used by one thread at a time."""

    def __init__(
        self,
        raw: Any,
        state: DeviceState,
        staging: Staging,
        *,
        graphs: bool = False,
        gated: bool = False,
        device: str = "cuda",
    ) -> None:
        """Take a loaded model.

        Args:
            raw: The `onnxruntime.InferenceSession`.
            state: Of its GPU.
            staging: Memory of the host for its batches.
            graphs: Whether it was opened with CUDA graphs.
            gated: Whether others of this process may be, so that runs keep out of their way.
            device: onnxruntime's name of the device, for buffers on it.
        """
        self.raw = raw
        self.state = state
        self._staging = staging
        self._device = device
        self.graphs = graphs
        self.gated = graphs or gated
        self.graph_problem = ""
        """Why a graph could not be recorded; empty if all could."""
        self._buckets: dict[int, _Bucket] = {}
        self._memory: dict[str, Bytes] = {}
        # onnxruntime keeps a captured graph with the thread that captured it.
        self._thread = OwnThread(f"gpu-{state.index}") if graphs else None

    def call(self, function: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """Call a function on the thread that runs of this instance belong to."""
        return function() if self._thread is None else self._thread.call(function)

    def close(self) -> None:
        """Free everything."""
        self._buckets.clear()
        self._memory.clear()
        self.raw = None
        if self._thread is not None:
            self._thread.close()

    def run_plainly(self, feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """Run with arrays of any shape."""
        options = _options(_NO_GRAPH) if self.graphs else None
        with running(self.gated):
            values = self.raw.run(list(names), aligned(feeds), options)
        return dict(zip(names, values, strict=True))

    def run_staged(
        self, parts: Sequence[Mapping[str, Array]], rows: int, bucket: int, layout: Layout
    ) -> dict[str, Array]:
        """Run requests as one batch of `bucket` rows, of which the last ones are not looked at."""
        buffers = self._buckets.get(bucket)
        if buffers is None:
            with running(self.gated):
                buffers = self._buckets[bucket] = self._bind(bucket, layout)
        for place in buffers.inputs:
            end = 0
            for part in parts:
                end = lay(place.bytes, end, part[place.name])
        self._run_on_device(buffers, rows)
        return {
            place.name: taken(place.bytes, place.kind, (rows, *place.row_shape))
            for place in buffers.outputs
        }

    def _run_on_device(self, buffers: _Bucket, rows: int) -> None:
        with running(self.gated):
            for place in buffers.inputs:
                self._staging.upload(place.address, place.memory[: rows * place.row_bytes])
        if self.graphs and not buffers.captured:
            self._capture(buffers)
        with running(self.gated):
            self.raw.run_with_iobinding(buffers.binding, buffers.options)
        # Copied here, and not by binding outputs to the host: onnxruntime then returns before its
        # copy into pinned memory is made.
        with running(self.gated):
            for place in buffers.outputs:
                self._staging.download(place.memory[: rows * place.row_bytes], place.address)

    def _capture(self, buffers: _Bucket) -> None:
        """Record the graph of one size; go on without one if that is not possible."""
        # What a new size costs, above all the choice of algorithms, is done beside others' runs.
        with running(True):
            self.raw.run_with_iobinding(buffers.binding, _options(_NO_GRAPH))
        # Not before: after a failure the next run would record its graph beside others' runs.
        buffers.captured = True
        try:
            with capturing():
                self.raw.run_with_iobinding(buffers.binding, buffers.options)
        except Exception as error:
            explained = explain(error, self.state)
            if isinstance(explained, (DeviceLost, DeviceMemoryShort)):
                buffers.captured = False
                raise
            self.graph_problem = str(error)
            buffers.options = _options(_NO_GRAPH)

    def _bind(self, bucket: int, layout: Layout) -> _Bucket:
        buffers = _Bucket(self.raw.io_binding())
        if self.graphs:
            buffers.options = _options(str(bucket))
        for infos, places, bind in (
            (layout.inputs, buffers.inputs, buffers.binding.bind_ortvalue_input),
            (layout.outputs, buffers.outputs, buffers.binding.bind_ortvalue_output),
        ):
            for info in infos:
                kind, shape = NUMPY[info.datatype], (bucket, *info.shape[1:])
                if info.name not in self._memory:
                    # All sizes of a batch share the memory of the largest.
                    size = math.prod(info.shape[1:]) * kind.itemsize * layout.largest
                    self._memory[info.name] = self._staging.allocate(size)
                value = _on_device(shape, kind, self._device, self.state.index)
                places.append(_Place(info, kind, self._memory[info.name], value))
                bind(info.name, value)
        return buffers


class _Bucket:
    """What one size of a batch is bound to."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.options: Any = None
        self.inputs: list[_Place] = []
        self.outputs: list[_Place] = []
        self.captured = False


class _Place:
    """Where one tensor of a batch lies, in staging memory and on the device."""

    def __init__(
        self, info: TensorInfo, kind: np.dtype[np.generic], memory: Bytes, value: Any
    ) -> None:
        self.name = info.name
        self.kind = kind
        self.row_shape = info.shape[1:]
        self.row_bytes = math.prod(self.row_shape) * kind.itemsize
        self.memory = memory
        self.bytes: memoryview = memory.data
        """The same, for copies."""
        self.value = value
        """Keeps the memory on the device."""
        self.address: int = value.data_ptr()


class Layout:
    """The tensors of batches of up to a largest size."""

    def __init__(
        self, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], largest: int
    ) -> None:
        """Take tensors whose first dimension is the batch, and whose others are fixed."""
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.largest = largest
        self.buckets = buckets(largest)
        self._wanted = {info.name: (info.shape[1:], NUMPY[info.datatype]) for info in inputs}

    def rows(self, parts: Sequence[Mapping[str, Array]]) -> int:
        """Return how many rows requests have; 0 if they cannot be run as a batch."""
        total = 0
        for part in parts:
            if part.keys() != self._wanted.keys():
                return 0
            count = -1
            for name, (shape, kind) in self._wanted.items():
                array = part[name]
                if array.dtype != kind or array.shape[1:] != shape or not array.ndim:
                    return 0
                if count not in (-1, array.shape[0]):
                    return 0
                count = array.shape[0]
            total += count
        return total if total <= self.largest else 0

    def bucket(self, rows: int) -> int:
        """Return the size to which so many rows are padded."""
        return next(size for size in self.buckets if size >= rows)


def buckets(largest: int) -> tuple[int, ...]:
    """Return 1, 2, 4 … and `largest`."""
    sizes = [1]
    while sizes[-1] * 2 < largest:
        sizes.append(sizes[-1] * 2)
    if largest > 1:
        sizes.append(largest)
    return tuple(sizes)


class DeviceSession(Session):
    """A model on one GPU or several. :meth:`run` may be called from many threads at once."""

    def __init__(self, instances: Sequence[Instance], target: str) -> None:
        """Take its instances; at least one."""
        super().__init__(instances[0].raw, target)
        self.instances = tuple(instances)
        self._layout: Layout | None = None
        # The one used last comes first: its buffers are in the caches.
        self._free: queue.LifoQueue[Instance] = queue.LifoQueue()
        for instance in self.instances:
            self._free.put(instance)

    @property
    def lost(self) -> str:
        """Why it cannot run any more; empty while a GPU of it can be used."""
        states = [instance.state.lost for instance in self.instances]
        return "" if not all(states) else states[0]

    @property
    def stages(self) -> bool:
        """Whether batches go through staging buffers."""
        return self._layout is not None

    def padded(self, rows: int) -> int:
        """Return the size to which a batch of so many rows is padded."""
        layout = self._layout
        return rows if layout is None or rows > layout.largest else layout.bucket(rows)

    def batch_up_to(self, largest: int, known: Sequence[TensorInfo] = ()) -> tuple[int, ...]:
        """Lay batches of up to `largest` rows into staging buffers from now on.

        Args:
            largest: Rows of the largest batch.
            known: What is known of tensors; the graph may leave their shapes open.

        Returns:
            The sizes to which batches are padded; empty if the model's tensors do not allow it.
        """
        shapes = {info.name: info for info in known}
        inputs, outputs = (
            [shapes.get(info.name, info) for info in side] for side in (self.inputs, self.outputs)
        )
        if largest < 1 or not all(_fixed(info, largest) for info in (*inputs, *outputs)):
            return ()
        self._layout = Layout(inputs, outputs, largest)
        return self._layout.buckets

    def warm(self, feeds_of: Callable[[int], Mapping[str, Array]], sizes: Sequence[int]) -> None:
        """Run batches of these sizes on every instance, the largest first.

        Where the outputs' shapes are not as they were said to be, batches are run plainly from
        then on.
        """
        for size in sorted(sizes, reverse=True):
            feeds = feeds_of(size)
            for instance in self.instances:
                self._guarded(instance, [feeds], self._names, warm=True)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one batch; see :meth:`Session.run`.

        Raises:
            DeviceFault: the GPU failed, is full or is lost.
        """
        return self.run_parts([feeds], outputs)

    def run_parts(
        self, parts: Sequence[Mapping[str, Array]], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run several requests as one batch; see :meth:`Session.run_parts`.

        Raises:
            DeviceFault: the GPU failed, is full or is lost.
        """
        names = self._names if outputs is None else list(outputs)
        with self._instance() as instance:
            return self._guarded(instance, parts, names)

    def close(self) -> None:
        """Free everything; nothing may run any more."""
        self._layout = None
        with running(any(instance.gated for instance in self.instances)):
            # The last names of the sessions go in here: to free one breaks off a capture.
            self.raw = None
            for instance in self.instances:
                instance.close()

    @property
    def _names(self) -> list[str]:
        return [info.name for info in self.outputs]

    @contextlib.contextmanager
    def _instance(self) -> Iterator[Instance]:
        while True:
            instance = self._free.get()
            # Of several GPUs one may be lost: its instances are left out. The last one is not, so
            # that whoever waits for it learns why it cannot run.
            if not instance.state.lost or self.lost:
                break
        try:
            yield instance
        finally:
            self._free.put(instance)

    def _guarded(
        self,
        instance: Instance,
        parts: Sequence[Mapping[str, Array]],
        names: Sequence[str],
        *,
        warm: bool = False,
    ) -> dict[str, Array]:
        instance.state.check()
        try:
            return instance.call(lambda: self._run_on(instance, parts, names, warm))
        except Exception as error:
            explained = explain(error, instance.state)
            if explained is error:
                raise
            raise explained from error

    def _run_on(
        self,
        instance: Instance,
        parts: Sequence[Mapping[str, Array]],
        names: Sequence[str],
        warm: bool,
    ) -> dict[str, Array]:
        layout = self._layout
        rows = layout.rows(parts) if layout is not None else 0
        if layout is not None and rows:
            try:
                found = instance.run_staged(parts, rows, layout.bucket(rows), layout)
                return {name: found[name] for name in names}
            except Exception as error:
                if not warm or isinstance(explain(error, instance.state), DeviceFault):
                    raise
                self._layout = None
        if self._by_value:
            with running(instance.gated):
                return self._run_by_value(_joined(parts), list(names), instance.raw)
        return instance.run_plainly(_joined(parts), names)


def _joined(parts: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _fixed(info: TensorInfo, largest: int) -> bool:
    """Tell whether only the batch is free, and the largest is not too large to be staged."""
    if info.datatype in ("BYTES", "BF16") or info.shape[:1] != (-1,) or -1 in info.shape[1:]:
        return False
    size = math.prod(info.shape[1:]) * NUMPY[info.datatype].itemsize * largest
    return 0 < size <= _MOST_STAGED_BYTES


def _options(graph: str) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, graph)
    return options


def _on_device(shape: Sequence[int], kind: Any, device: str, index: int) -> Any:
    import onnxruntime

    make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    return make(list(shape), kind.type, device, index)

"""Running ONNX models with ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitquant.errors import ExportError, first_line
from vitquant.runtime.fixed_batch import in_batches
from vitquant.runtime.metadata import values_of
from vitquant.runtime.onnx_files import read_onnx
from vitquant.runtime.outputs import Outputs, given, mapped


class OnnxModel:
    """An ONNX model with one input, as a function of tensors.

    Arguments:
        model: a file, or the content of one.
        optimize: whether ONNX Runtime applies all of its graph optimizations, or none.
        threads: the number of threads within an operator; by default the number of cores.

    Attributes:
        metadata: the strings that the exporter wrote beside the graph, such as recipe and bits.
        batch: the fixed batch size of the file; None for any. Calls take any number of images.
        outputs: the names of the outputs, in order.

    Raises:
        ExportError: onnxruntime is missing, there is no such file, or ONNX Runtime refuses the model.
    """

    def __init__(self, model: str | Path | bytes, optimize: bool = True, threads: int | None = None) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise ExportError("running ONNX needs onnx and onnxruntime: pip install 'vitquant[onnx]'") from error
        level = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 4  # errors are raised anyway
        self._name = "the model" if isinstance(model, bytes) else str(model)
        try:
            proto, content = read_onnx(model if isinstance(model, bytes) else Path(model))
            self.metadata: dict[str, str] = {each.key: each.value for each in proto.metadata_props}
            if len(proto.graph.input) != 1 or not proto.graph.output:
                raise ExportError("it has not exactly one input and at least one output; export it again")
            if not proto.graph.input[0].type.tensor_type.shape.dim:
                raise ExportError("its input has no shape; export it again")
            for end in (*proto.graph.input, *proto.graph.output):
                if end.type.tensor_type.elem_type not in onnx.TensorProto.DataType.values()[1:]:
                    raise ExportError(f"{end.name[:80]!r} has no type of elements; export it again")
            for name in ("input", "outputs"):
                values_of(self.metadata, name)
            for name, value in (values_of(self.metadata, "session_options") or {}).items():
                options.add_session_config_entry(name, value)
        except ExportError as error:
            raise ExportError(f"{self._name} cannot be run by ONNX Runtime: {error}") from error
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise ExportError(f"{self._name} cannot be run by ONNX Runtime: {first_line(error)}") from error
        self._input = self._session.get_inputs()[0]
        for name, said in (values_of(self.metadata, "outputs") or {}).items():
            ends = (each.type.tensor_type.shape.dim for each in proto.graph.output if each.name == name)
            last = [size.dim_value for size in next(ends, ())][-1:]
            if len(said["scale"]) not in (1, *last):
                raise ExportError(
                    f"{self._name} says {len(said['scale'])} scales of {name[:80]!r}, whose last axis is {last}; "
                    "export it again"
                )
        self.outputs = tuple(each.name for each in self._session.get_outputs())
        if self._input.type not in _DTYPES:
            raise ExportError(f"{self._name} takes {self._input.type}, which images are not")
        self._dtype = np.dtype(_DTYPES[self._input.type])
        size = self._input.shape[0]
        self.batch: int | None = size if isinstance(size, int) else None

    @property
    def takes_codes(self) -> bool:
        """Whether the model's input is codes and not floats."""
        return self._dtype.kind != "f"

    def __call__(self, images: Tensor) -> Outputs:
        """The model's outputs, a tensor or several by name: int64 for codes, as in the interpreter, else floats.

        Arguments:
            images: codes in any integer dtype, or floats, whichever the model takes; (batch, channels, height, width).

        Raises:
            ExportError: the images are floats where the model takes codes or the other way round, codes exceed the
                input's type, or the images have another size.
        """
        if not len(images):  # ONNX Runtime cannot broadcast an empty tensor
            return mapped(lambda x: x[:0], self(images.new_zeros((1, *images.shape[1:]))))
        if images.is_floating_point() != (self._dtype.kind == "f"):
            raise ExportError(f"{self._name} takes {self._dtype} images, and these are {images.dtype}")
        values = images.detach().cpu().numpy()
        taken = values.astype(self._dtype)
        if self._dtype.kind != "f" and not np.array_equal(taken, values):
            raise ExportError(
                f"{self._name} takes {self._dtype} codes, and these go from {values.min()} to {values.max()}"
            )
        try:
            found = in_batches(self._run, torch.from_numpy(taken), self.batch or len(images))
        except ExportError as error:
            raise ExportError(f"{self._name} cannot be run by ONNX Runtime: {error}") from error
        except Exception as error:
            raise ExportError(f"{self._name} cannot be run by ONNX Runtime: {first_line(error)}") from error
        results = (each if each.is_floating_point() else each.to(torch.int64) for each in found)
        return given(dict(zip(self.outputs, results, strict=True)))

    def _run(self, images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(each) for each in self._session.run(None, {self._input.name: images.numpy()})]


_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
}  # fmt: skip

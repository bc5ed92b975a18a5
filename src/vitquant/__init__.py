"""vitquant: quantize unmodified Vision Transformers by published recipes.

In Python::

    model = vitquant.quantize(float_model, "default", calibration_batches)
    model.save("out")
    model = vitquant.load("out")
    vitquant.evaluate(model, labelled_batches, float_model=float_model)
    vitquant.export(model, "onnx-integer", "model.onnx", calibration_batches)
    logits = vitquant.lower(model).run(images)
    inputs = vitquant.inputs_of(detector, "backbone", batches)
    detector = vitquant.put_back(detector, "backbone", vitquant.quantize(detector.backbone, "default", inputs))
    images = vitquant.synthesize(float_model, 32)
    recipe, bits = vitquant.sensitivity(float_model, "vt-ptq", calibration_batches).allocate(mean_bits=6)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitquant.version import __version__ as __version__

if TYPE_CHECKING:
    from vitquant.allocation.sensitivity import sensitivity
    from vitquant.allocation.table import SensitivityTable
    from vitquant.errors import VitquantError
    from vitquant.graph.captured import CapturedModel
    from vitquant.image_size import at_image_size
    from vitquant.loading import float_model, load
    from vitquant.loss_landscape.landscape import landscape
    from vitquant.loss_landscape.table import Landscape
    from vitquant.lowering import lower
    from vitquant.model import QuantizedModel
    from vitquant.program.instructions import IntegerProgram
    from vitquant.submodules import inputs_of, put_back
    from vitquant.synthetic_images import SyntheticImages, synthesize
    from vitquant.workflows import BrokenPromiseError, compare, evaluate, export, quantize
    from vitquant.zoo import ModelSource

__all__ = [
    "BrokenPromiseError", "CapturedModel", "IntegerProgram", "Landscape", "ModelSource", "QuantizedModel",
    "SensitivityTable", "SyntheticImages", "VitquantError", "at_image_size", "compare", "evaluate", "export",
    "float_model", "inputs_of", "landscape", "load", "lower", "put_back", "quantize", "sensitivity", "synthesize",
]  # fmt: skip

_HOMES = {
    "IntegerProgram": "vitquant.program.instructions",
    "Landscape": "vitquant.loss_landscape.table",
    "ModelSource": "vitquant.zoo",
    "QuantizedModel": "vitquant.model",
    "SensitivityTable": "vitquant.allocation.table",
    "SyntheticImages": "vitquant.synthetic_images",
    "VitquantError": "vitquant.errors",
    "float_model": "vitquant.loading",
    "load": "vitquant.loading",
    "BrokenPromiseError": "vitquant.workflows",
    "CapturedModel": "vitquant.graph.captured",
    "at_image_size": "vitquant.image_size",
    "compare": "vitquant.workflows",
    "evaluate": "vitquant.workflows",
    "export": "vitquant.workflows",
    "inputs_of": "vitquant.submodules",
    "landscape": "vitquant.loss_landscape.landscape",
    "lower": "vitquant.lowering",
    "put_back": "vitquant.submodules",
    "quantize": "vitquant.workflows",
    "sensitivity": "vitquant.allocation.sensitivity",
    "synthesize": "vitquant.synthetic_images",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: importing torch takes seconds, which `vitquant --help` can avoid."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

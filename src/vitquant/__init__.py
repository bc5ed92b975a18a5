"""vitquant: quantize unmodified Vision Transformers by published recipes.

model = vitquant.quantize(float_model, "minmax", calibration_batches)
model.save("out")
model = vitquant.load("out")
"""

from vitquant.errors import VitquantError
from vitquant.model import QuantizedModel
from vitquant.pipeline import float_model, load, quantize
from vitquant.zoo import ModelSource

__all__ = ["ModelSource", "QuantizedModel", "VitquantError", "float_model", "load", "quantize"]
__version__ = "0.1.0"

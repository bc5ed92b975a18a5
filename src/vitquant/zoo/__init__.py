"""Unmodified models by name, from timm, transformers, torchvision, or a user's factory."""

from vitquant.zoo.build import architecture, check_name, create
from vitquant.zoo.classes import class_names
from vitquant.zoo.preprocessing import preprocessing_of
from vitquant.zoo.source import LIBRARIES, ModelSource, parse_model_arguments
from vitquant.zoo.weights import pinned

__all__ = [
    "LIBRARIES",
    "ModelSource",
    "architecture",
    "check_name",
    "class_names",
    "create",
    "parse_model_arguments",
    "pinned",
    "preprocessing_of",
]

"""Which model sources a file may name by itself; all others must be repeated by the caller.

A saved model may come from anywhere, and for some names and arguments a library's functions load code and files, or
access the network. A file alone may name only a model that its library lists, and only arguments that are numbers and
words of an architecture, within bounds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitquant.errors import ModelError
from vitquant.parsing import parse_json, read_file
from vitquant.schema import Either, Flag, Integer, ListOf, Nothing, Number, Schema, Text, check
from vitquant.zoo.failures import import_library
from vitquant.zoo.source import ModelSource

# Arguments of timm, transformers and torchvision that determine the size of a model and its parts.
_ARCHITECTURE = """
act_layer apply_layernorm attention_dropout attention_probs_dropout_prob attn_drop_rate attn_ratio class_token
classifier_dropout_prob conv_bias depth depths dim dims distilled drop_path_rate drop_rate dropout dynamic_img_pad
dynamic_img_size embed_dim embed_dims encoder_stride expand_ratio fc_norm final_norm global_pool head_dim heads
hidden_act hidden_dim hidden_dropout_prob hidden_size hidden_sizes image_size img_size in_chans init_values
initializer_range intermediate_size key_dim layer_norm_eps layer_scale_init_value layers layerscale_value mlp_dim
mlp_ratio mlp_ratios no_embed_class norm_eps norm_layer num_attention_heads num_channels num_classes
num_encoder_blocks num_features num_heads num_hidden_layers num_labels num_layers num_register_tokens out_features
patch_drop_rate patch_norm patch_size patch_sizes patch_stride pooler_act pooler_output_size pos_drop_rate pos_embed
pre_norm pretrained_window_sizes proj_bias proj_drop_rate qk_norm qkv_bias reduction_ratio reg_tokens
representation_size sr_ratios stochastic_depth_prob strict_img_size strides use_absolute_embeddings
use_absolute_position_embeddings use_mask_token use_mean_pooling use_relative_position_bias
use_shared_relative_position_bias use_swiglu_ffn weight_init window_ratio window_size
"""
# Further keys of a transformers config.json; their values load nothing.
_OF_CONFIGS = """
architectures chunk_size_feed_forward dtype id2label is_encoder_decoder label2id model_type out_indices
output_attentions output_hidden_states path_norm problem_type return_dict semantic_loss_ignore_index stage_names
tie_word_embeddings torch_dtype torchscript transformers_version use_cache
"""
_WORD = Text(40, "[A-Za-z0-9_]*")
_SCALAR = (Integer(-(2**16), 2**16), Number(-(2**16), 2**16), Flag(), Nothing(), _WORD)
_LIST = ListOf(Either((*_SCALAR, ListOf(Either(_SCALAR), most=64))), most=64)
_ARGUMENT = Either((*_SCALAR, _LIST))
_PIXELS = Either((Integer(1, 1024), ListOf(Integer(1, 1024), 1, 3)))  # some libraries loop over all pairs of tokens
_BOUNDED: Mapping[str, Schema] = {"img_size": _PIXELS, "image_size": _PIXELS}
_OF_ANOTHER_LIBRARY = ("timm_wrapper", "timm_backbone")  # whose configs name models and files of timm
_LONGEST_CONFIG = 2**20  # bytes; the names of 21,843 classes take 2**19
_NUMBERS = Either((*_SCALAR[:-1], ListOf(Either(_SCALAR[:-1]), most=64)))  # for a user's function, from a file


def as_repeated(source: ModelSource, name: str | None, arguments: Mapping[str, Any]) -> ModelSource:
    """The source that a file names, if it is harmless or the caller has repeated it.

    Arguments:
        source: from the file.
        name: the model's name, if the caller has repeated it; else None.
        arguments: those that the caller has repeated.

    Raises:
        ModelError: the name or an argument must be repeated, or differs from the caller's.
    """
    if name is not None and name != source.name:
        raise ModelError(f"it was made from {source.name}, not from {name}")
    for key, value in arguments.items():
        if key not in source.arguments or source.arguments[key] != _as_json(value):
            raise ModelError(f"it was made without the argument {key}={value!r}; leave that out")
    if name is None and not _is_listed(source):
        raise ModelError(f"it was made by {source.name}; to import, read or fetch that, repeat it: --model NAME")
    for key, value in source.arguments.items():
        if key not in arguments and not _is_harmless(source.library, key, value):
            raise ModelError(
                f"it was made with {key}={str(value)[:80]!r}, which may load code or files or be of any size; where "
                "that is meant, repeat it: --model-arg KEY=VALUE"
            )
    return source


def _as_json(value: Any) -> Any:
    return [_as_json(each) for each in value] if isinstance(value, list | tuple) else value


def _fits(value: Any, schema: Schema) -> bool:
    try:
        check(value, schema, ModelError)
    except ModelError:
        return False
    return True


def _is_harmless(library: str, key: str, value: Any) -> bool:
    if library == "python":
        return _fits(value, _NUMBERS)
    return key in _ARCHITECTURE.split() and _fits(value, _BOUNDED.get(key, _ARGUMENT))


def _is_listed(source: ModelSource) -> bool:
    """Whether the library itself lists the model, so that building it reads no file and fetches nothing."""
    match source.library:
        case "timm":
            plain = _fits(source.model, Text(200, r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?"))
            return plain and import_library("timm").is_model(source.model.split(".")[0])
        case "torchvision":
            models = import_library("torchvision").models
            return source.model in models.list_models(module=models)  # image classifiers; others fetch a backbone
        case "transformers":
            path = Path(source.model)
            return _is_plain_config(path) if os.path.lexists(path) else _is_type(source.model)
        case _:
            return False


def _is_type(name: str) -> bool:
    return name in import_library("transformers").CONFIG_MAPPING and name not in _OF_ANOTHER_LIBRARY


def _is_plain_config(path: Path) -> bool:
    """Whether a path is a config.json, or its directory, with only numbers and words of an architecture."""
    file = path / "config.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        return False
    try:
        values = parse_json(read_file(file, _LONGEST_CONFIG, ModelError), ModelError)
    except ModelError:
        return False
    return (
        isinstance(values, dict)
        and _is_type(str(values.get("model_type")))
        and all(key in _OF_CONFIGS.split() or _is_harmless("transformers", key, value) for key, value in values.items())
    )

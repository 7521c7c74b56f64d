"""The structures and functions of csrc/kiloq.h, field by field. Nothing is computed here."""

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p

VERSION = 2  # KQ_VERSION


class Weight(ctypes.Structure):
    """kq_weight"""

    _fields_ = (
        ("kind", c_int32),
        ("group", c_int32),
        ("has_zeros", c_int32),
        ("reserved", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("order", c_void_p),
    )


class Cache(ctypes.Structure):
    """kq_cache"""

    _fields_ = (
        ("kind", c_int32),
        ("block_size", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dim", c_int32),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("key_bias", c_void_p),
    )


class Span(ctypes.Structure):
    """kq_span"""

    _fields_ = (
        ("first_row", c_int64),
        ("start", c_int64),
        ("stop", c_int64),
        ("blocks", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class Places(ctypes.Structure):
    """kq_places"""

    _fields_ = (
        ("rows", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_scale", c_void_p),
        ("num_spans", c_int64),
        ("spans", POINTER(Span)),
    )


class Layer(ctypes.Structure):
    """kq_layer"""

    _fields_ = (
        ("qkv", Weight),
        ("out", Weight),
        ("gate_up", Weight),
        ("down", Weight),
        ("attn_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cache", Cache),
        ("window", c_int32),
        ("reserved", c_int32),
    )


class Model(ctypes.Structure):
    """kq_model"""

    _fields_ = (
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("intermediate_size", c_int64),
        ("eps", c_float),
        ("reserved", c_int32),
        ("layers", POINTER(Layer)),
        ("embed", Weight),
        ("head", Weight),
        ("norm", c_void_p),
    )


class Draw(ctypes.Structure):
    """kq_draw"""

    _fields_ = (
        ("logits", c_void_p),
        ("num_shifts", c_int64),
        ("shift_ids", c_void_p),
        ("divide", c_void_p),
        ("add", c_void_p),
        ("allowed", c_void_p),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("uniform", c_double),
        ("top_k", c_int64),
    )


class Update(ctypes.Structure):
    """kq_update"""

    _fields_ = (("down", Weight), ("up", Weight))


class LayerUpdates(ctypes.Structure):
    """kq_layer_updates"""

    _fields_ = (("qkv", Update), ("out", Update), ("gate_up", Update), ("down", Update))


class Adapted(ctypes.Structure):
    """kq_adapted"""

    _fields_ = (("first_row", c_int64), ("rows", c_int64), ("rank", c_int64), ("layers", POINTER(LayerUpdates)))


class Step(ctypes.Structure):
    """kq_step"""

    _fields_ = (
        ("ids", c_void_p),
        ("places", Places),
        ("num_logits", c_int64),
        ("logit_rows", c_void_p),
        ("logits", c_void_p),
        ("hidden", c_void_p),
        ("num_adapted", c_int64),
        ("adapted", POINTER(Adapted)),
    )


_WEIGHT, _CACHE, _PLACES = POINTER(Weight), POINTER(Cache), POINTER(Places)

_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {  # result, arguments
    "kq_version": (c_int32, ()),
    "kq_backend": (c_char_p, ()),
    "kq_choose": (c_int32, (c_char_p,)),
    "kq_supports": (c_int32, (c_char_p,)),
    "kq_set_threads": (None, (c_int32,)),
    "kq_threads": (c_int32, ()),
    "kq_visit": (None, (c_int64, c_int64, c_void_p)),
    "kq_packed_bytes": (c_int64, (_WEIGHT,)),
    "kq_pack": (c_int32, (_WEIGHT, c_void_p, c_void_p, c_void_p)),
    "kq_unpack": (c_int32, (_WEIGHT, c_void_p, c_void_p, c_void_p)),
    "kq_linear": (None, (_WEIGHT, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int32)),
    "kq_linear_swiglu": (None, (_WEIGHT, c_void_p, c_int64, c_int64, c_void_p, c_int64)),
    "kq_gather_rows": (None, (_WEIGHT, c_void_p, c_int64, c_void_p)),
    "kq_rms_norm": (None, (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p)),
    "kq_read": (c_int64, (c_void_p, c_int64)),
    "kq_attention": (None, (_CACHE, _PLACES, c_void_p, c_void_p, c_void_p, c_float, c_int32, c_void_p)),
    "kq_draw_tokens": (c_int32, (POINTER(Draw), c_int64, c_int64, c_void_p)),
    "kq_run_step": (c_int32, (POINTER(Model), POINTER(Step))),
}


def declare(library: ctypes.CDLL) -> str:
    """Give every function its types; the name of the first that the library lacks, or ""."""
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            return name
        function.restype = result
        function.argtypes = arguments
    return ""

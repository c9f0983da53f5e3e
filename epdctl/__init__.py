"""epdctl: multimodal language models as supervised encode, prefill and decode processes."""

__version__ = "0.1.0"

"""folora: fine-tune a foundation model and keep what it already knew (arXiv:2606.00132).

Names are those of ``__init__.pyi``. Each is imported when it is first asked for: PyTorch, PEFT,
TRL and Transformers take seconds, which neither ``folora --help`` nor a wrong option has to wait for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"

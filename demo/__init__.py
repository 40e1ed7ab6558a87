"""Data for the demo: facts that the model should retain, and a templated task to learn."""

import logging
import os

# Silence messages on import: bitsandbytes about kernels, tqdm about the conversion of the GGUF file.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("TQDM_DISABLE", "1")

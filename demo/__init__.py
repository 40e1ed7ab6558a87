"""Data for the demo: what a model should keep, and a made-up task for it to learn."""

import logging
import os

# Said while they are imported: bitsandbytes of kernels, tqdm of the conversion of a GGUF file.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("TQDM_DISABLE", "1")

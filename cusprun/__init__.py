"""cusprun turns a general language model into a small expert for one language, domain and task, and ships it.

Importing it makes compacted models with per-layer widths loadable through transformers' AutoModelForCausalLM.
"""

from cusprun.checkpoint import register_when_imported

__version__ = "0.1.0"

register_when_imported()

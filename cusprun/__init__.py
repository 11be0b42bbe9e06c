"""cusprun turns a general language model into a small expert for one language, domain and task, and ships it."""

__version__ = "0.1.0"

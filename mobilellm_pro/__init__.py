"""MobileLLM-Pro: distil, specialise, merge, quantize and export a small language model for devices.

`python -m mobilellm_pro --help` lists the commands. Importing this package imports nothing heavy: torch and torchtitan
come with the rooms that need them.
"""

__version__ = "0.1.0"

"""Configuration: the sections of a job, the strict TOML loader, and the checks between keys.

This is the lowest room in which torchtitan may be imported. Importing it prepares torchtitan for a quick start and for
a machine without an accelerator, so every room that needs torchtitan imports this one first, in its `__init__`.
"""

from mobilellm_pro.config.cpu import choose_device
from mobilellm_pro.config.torchtitan_import import defer_torchtitan_init

# Before the first import of torchtitan anywhere: the two modules say what goes wrong otherwise.
defer_torchtitan_init()
choose_device()

from mobilellm_pro.config.checks import check_machine  # noqa: E402
from mobilellm_pro.config.config_error import ConfigError, JobError, Problem  # noqa: E402
from mobilellm_pro.config.job_config import JobConfig  # noqa: E402
from mobilellm_pro.config.mesh_checks import check_world_size, smallest_world_size  # noqa: E402
from mobilellm_pro.config.resolved import resolved_toml  # noqa: E402
from mobilellm_pro.config.toml import load  # noqa: E402

__all__ = [
    "ConfigError",
    "JobConfig",
    "JobError",
    "Problem",
    "check_machine",
    "check_world_size",
    "load",
    "resolved_toml",
    "smallest_world_size",
]

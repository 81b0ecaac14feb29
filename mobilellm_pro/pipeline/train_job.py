"""The `train` verb: a run with the evaluations that its configuration asks for.

    torchrun --nproc_per_node=8 -m mobilellm_pro train train_configs/mobilellm_pro_1b/1_language.toml

Without torchrun the same command trains in one process. Training and evaluation do not know each other; here they meet.
"""

from pathlib import Path

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.evaluation.needle_online import OnlineNeedle
from mobilellm_pro.evaluation.suite_online import OnlineSuite
from mobilellm_pro.training import run
from mobilellm_pro.training.online_evaluation import OnlineEvaluation


def train(config: JobConfig, config_path: str) -> None:
    """Train the configured model: a student from its teacher (kl), from labels (ce), or a teacher (model llama4_text).

    Writes checkpoints, TensorBoard events, metrics.jsonl, the resolved configuration and, last, DONE to
    `job.dump_folder`. A run that is DONE is left alone; one that was stopped goes on from its newest checkpoint.

    Raises:
        JobError: listing everything that is wrong with the configuration, the data or the teacher.
    """
    run.train(config, config_path, online_evaluations(config))


def online_evaluations(config: JobConfig) -> list[OnlineEvaluation]:
    """The evaluations that run while this job trains."""
    found: list[OnlineEvaluation] = []
    if config.needle.enable:
        found.append(OnlineNeedle(config.needle, config.data.tokenizer, Path(config.job.dump_folder)))
    if config.evaluation.suite:
        folder = Path(config.job.dump_folder)
        found.append(OnlineSuite(config.evaluation, config.data.tokenizer, config.training.seq_len, folder))
    return found

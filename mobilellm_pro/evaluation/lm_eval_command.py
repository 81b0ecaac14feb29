"""lm-eval's own command line with our model in it: `mobilellm-pro-lm-eval --model mobilellm_pro --model_args ...`.

lm-eval knows models by a registry that a model enters when its module is imported, and imports none but its own; so a
command that does so stands before its own. All of its options are there; this project's
tasks are, unless another `--include_path` is given.
"""

import sys

from mobilellm_pro.evaluation.suite_run import OWN_TASKS


def main() -> None:
    """Registers the model and the tasks, and goes on as `lm_eval`."""
    from lm_eval.__main__ import cli_evaluate

    import mobilellm_pro.evaluation.harness_model  # noqa: F401  # registers itself

    if len(sys.argv) > 1 and not any(word.startswith("--include_path") for word in sys.argv):
        sys.argv += ["--include_path", str(OWN_TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()

"""The `mix` verb: from prepared corpora to the weights of a training mixture (paper, section 4).

    mobilellm-pro mix train_configs/debug/0_data_mix.toml
    mobilellm-pro train train_configs/debug/1_language.toml --data.mix outputs/debug/0_data_mix/weights.toml

simulate    n-gram models read the corpora once: what does a sample of each do to every domain?
calibrate   proxies, small runs on different mixtures: what does a mixture come to?
fit         regressors from the one to the other, each judged on mixtures that it has not seen
weights     utility and natural share combined under the epoch cap, and a report

Every step goes on where it was interrupted and does nothing where it is done; what is in the folder then is listed in
`data_mix_folder`.
"""

from collections.abc import Callable
from typing import Literal

from mobilellm_pro.pipeline.data_mix_calibration import calibrate
from mobilellm_pro.pipeline.data_mix_fit import find_weights, fit, mix_problem
from mobilellm_pro.pipeline.data_mix_plan import MixPlan, load_mix_plan
from mobilellm_pro.pipeline.data_mix_simulation import run_simulation


def mix(
    plan: str,
    *,
    output: str | None = None,
    only: Literal["simulate", "calibrate", "fit", "weights"] | None = None,
) -> None:
    """Find the sampling weights of a mixture of corpora, by simulation and small runs, and write them with a report.

    What is done already is not done again: a finished simulation is read, an interrupted one goes on, finished proxies
    are left alone. Proxies run in this machine's processes, or as $TRAIN_COMMAND starts them (see `ablate`).

    Args:
        plan: TOML file: corpora, validation domains, the proxies' job, settings of each step.
        output: folder for everything, instead of the plan's.
        only: this step, on what the earlier ones have left (`weights` also fits where fit.json does not belong to
            it: that needs no proxy); default: all of them.

    Raises:
        ConfigError: everything that is wrong with the file and the proxies' job.
        JobError: what keeps proxies from running on this machine, before any is started.
        CommandFailed: a proxy ended with an error, as one that diverged does.
        FileNotFoundError: no such corpus, or an earlier step has not been done.
        ValueError: too little text for a domain, a domain that is absent from calibration, caps that cannot be met,
            other settings than those that a step in this folder was begun with, a proxy's mixture that has changed
            since it ran.
    """
    loaded = load_mix_plan(plan, output=output)
    if only in (None, "weights"):
        mix_problem(loaded)  # caps that cannot be met are better known before the proxies than after them
    for name, step in STEPS.items():
        if only in (None, name):
            step(loaded)


STEPS: dict[str, Callable[[MixPlan], object]] = {
    "simulate": run_simulation,
    "calibrate": calibrate,
    "fit": fit,
    "weights": find_weights,
}
"""In their order."""

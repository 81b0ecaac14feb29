"""Data mixing room: from raw corpora to static sampling weights, by simulation instead of training (paper, section 4).

Reading order, from text to influence: `ngram_table` (compiled counts) -> `ngram_model` (one language model of a domain)
-> `influence` (all domains, exact and incremental) -> `simulation` (one pass over the corpora in the order of
`simulation_order`, recorded by `influence_curve`, kept by `simulation_state`, exported by `simulation_export`).

From influence and calibration runs to weights: `regression_calibration` (the runs) -> `regression` (features, and
regressors by name, each in a file of its own) -> `regression_score` (how well they rank unseen mixtures) ->
`weights_utility` (what a mixture is worth) -> `weights` (utility and natural share within limits) or `weights_search`
(the same for any utility), with intervals over `weights_draws` -> `report_record`, `report_plots`, `report_page`.

Needs the optional packages of `pip install mobilellm-pro[mix]`. This file imports nothing.
"""

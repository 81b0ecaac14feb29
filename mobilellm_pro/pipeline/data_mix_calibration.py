"""The step `calibrate` of the verb `mix`: what mixtures come to, measured by small runs.

A proxy is a run of the same job, with the same seeds and as many tokens, on a mixture of its own; afterwards it is
tested on the held-out text of every domain, of each as many tokens. Finished proxies are never run again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mobilellm_pro.config import JobError, load, resolved_toml, smallest_world_size
from mobilellm_pro.pipeline.data_mix_folder import CALIBRATION, agree, content, write_json
from mobilellm_pro.pipeline.data_mix_plan import MixPlan
from mobilellm_pro.pipeline.data_mix_proxies import (
    HELD_OUT,
    Proxy,
    plan_proxies,
    proxy_words,
    run_proxies,
    write_mixture,
    write_test_job,
)
from mobilellm_pro.pipeline.data_mix_simulation import open_corpora
from mobilellm_pro.pipeline.run_command import num_processes
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run import is_finished


def calibrate(plan: MixPlan) -> dict[str, Any]:
    """Trains and tests the proxies that are missing and returns what all came to.

    Returns:
        corpora, domains (names), tokens (of a proxy), utility_weights, proxies: name, weights and bits_per_byte lists.

    Raises:
        JobError: what keeps a proxy from running on this machine, before any is started.
        CommandFailed: a proxy's process ended with an error, as one that diverged does; names the proxy and its log.
        ValueError: another calibration was begun in this folder, a proxy's mixture has changed since it ran, or a
            domain has too little held-out text.
    """
    proxies, identity = plan_proxies(plan), _identity(plan)
    agree(plan.folder, "calibrate", identity, begin=False)
    tests = write_test_job(plan)
    for proxy in proxies:
        write_mixture(plan, proxy)
    missing = [proxy for proxy in proxies if not (proxy.folder / HELD_OUT).is_file()]
    if missing:
        _check(plan, missing[0])
        agree(plan.folder, "calibrate", identity)
        print(f"calibrate: {len(missing)} of {len(proxies)} proxies, {plan.proxy.parallel} at a time", flush=True)
        run_proxies(plan, missing, tests)
    record = _record(plan, proxies)
    write_json(plan.folder / CALIBRATION, record)
    done = "" if missing else "done, "
    print(f"calibrate: {done}{len(proxies)} proxies, {plan.folder / CALIBRATION}", flush=True)
    return record


def _identity(plan: MixPlan) -> dict[str, Any]:
    """What the proxies depend on, but for their number."""
    settings = plan.proxy
    keys = ("concentration", "share_power", "least_weight")
    identity: dict[str, Any] = {"seed": plan.seed} | {f"proxy.{key}": getattr(settings, key) for key in keys}
    identity["corpora"] = plan.names  # in their order, which the draws depend on
    job = resolved_toml(plan.base)
    kept = [block for block in job.split("\n\n") if not block.startswith(("[job]", "[[data.datasets]]"))]
    for block in kept:
        section, *lines = block.strip().splitlines()
        identity |= {f"{section.strip('[]')}.{key}": value for key, _, value in (x.partition(" = ") for x in lines)}
    identity |= {f"corpus {name}": content(corpus) for name, corpus in open_corpora(plan, "train").items()}
    identity |= {f"held-out part of {name}": content(corpus) for name, corpus in open_corpora(plan, "valid").items()}
    identity["domains"] = [domain.name for domain in plan.domains]
    return identity


def _check(plan: MixPlan, proxy: Proxy) -> None:
    """All that can be known to be wrong beforehand, of one proxy: they differ in weights only."""
    config = load(plan.job, proxy_words(plan, proxy))
    found = []
    if not is_finished(config):
        found = problems(config, num_processes() or smallest_world_size(config))
    if config.needle.enable:
        found.append("needle.enable = true: proxies are too small for it; set it to false in [proxy.overrides]")
    if found:
        raise JobError(str(plan.job), found)
    _check_text(plan)


def _check_text(plan: MixPlan) -> None:
    """Raises ValueError for a domain with less held-out text than the others are tested on."""
    validation, corpora = plan.base.validation, open_corpora(plan, "valid")
    share = round(validation.steps * validation.local_batch_size * validation.seq_len / len(plan.domains))
    for domain in plan.domains:
        corpus = corpora[domain.name]
        lengths = np.minimum(corpus.lengths(0, corpus.num_documents), validation.seq_len)
        found = int(lengths[lengths >= 2].sum())  # `held_out` reads no shorter document
        if found < share:
            raise ValueError(
                f"domain {domain.name!r}: {domain.path} has {found} held-out tokens in documents cut at "
                f"validation.seq_len = {validation.seq_len}, proxies are tested on {share} of each domain: prepare it "
                "with a larger holdout, or lower validation.steps in [proxy.overrides]"
            )


def _record(plan: MixPlan, proxies: Sequence[Proxy]) -> dict[str, Any]:
    """Raises ValueError for a domain without result or a proxy whose result is no number."""
    names = [domain.name for domain in plan.domains]
    rows = []
    for proxy in proxies:
        result = json.loads((proxy.folder / HELD_OUT).read_text())
        bits = result["by_corpus"]
        for name in names:
            if name not in bits:
                raise ValueError(
                    f"domain {name!r}: it is absent from {proxy.folder / HELD_OUT}: its held-out documents have no "
                    "text; prepare it with a larger holdout, or raise validation.steps in [proxy.overrides]"
                )
            if not math.isfinite(bits[name]):
                raise ValueError(
                    f'proxy "{proxy.name}": {bits[name]} bits per byte on {name!r}: it diverged; lower optimizer.lr in '
                    f"[proxy.overrides], or put {int(proxy.name)} into proxy.leave_out"
                )
        rows.append({"name": proxy.name, "weights": list(proxy.weights), "bits_per_byte": [bits[n] for n in names]})
    training = plan.base.training
    return {
        "corpora": plan.names,
        "domains": names,
        "utility_weights": [domain.weight for domain in plan.domains],
        "tokens": training.steps * training.global_batch_size * training.seq_len,
        "proxies": rows,
    }


def read_calibration(plan: MixPlan) -> Mapping[str, Any]:
    """What `calibrate` has recorded.

    Raises:
        FileNotFoundError: nothing yet.
        ValueError: of other corpora or domains than the plan's, or not of all its proxies.
    """
    path = plan.folder / CALIBRATION
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; proxies come first: `mix ... --only calibrate`")
    record = json.loads(path.read_text())
    for key, names in (("corpora", plan.names), ("domains", [domain.name for domain in plan.domains])):
        if absent := [name for name in names if name not in record[key]]:
            raise ValueError(f"{path}: {absent[0]!r} is absent from its {key} ({', '.join(record[key])}): calibrate it")
        if record[key] != names:
            raise ValueError(f"{path}: its {key} are {', '.join(record[key])}, expected {', '.join(names)}")
    wanted = {proxy.name for proxy in plan_proxies(plan)}
    if absent := sorted(wanted - {row["name"] for row in record["proxies"]}):
        raise ValueError(f"{path}: proxies {', '.join(absent)} are absent: run `mix ... --only calibrate` first")
    return {**record, "proxies": [row for row in record["proxies"] if row["name"] in wanted]}

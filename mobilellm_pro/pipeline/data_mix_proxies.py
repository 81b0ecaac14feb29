"""The proxies of the step `calibrate`: their mixtures, and the processes that train and test them.

Mixture 0 is natural share and mixture 1 equal weights, so the baselines are measured too; the others are Dirichlet
draws. Each depends on the seed and its own number only: a larger `proxy.count` adds proxies and changes none.

Proxies run in processes of their own, `proxy.parallel` at a time. With $TRAIN_COMMAND, or where NPROC or the GPUs ask
for more than one process, they are commands (`run_command`); else they are forked from a process that has imported
everything, which saves most of a minute each on a small machine.
"""

import multiprocessing
import os
import tomllib
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mobilellm_pro.config import load
from mobilellm_pro.data.part_workers import end_with_parent
from mobilellm_pro.data_mix.mixture_file import datasets_text
from mobilellm_pro.data_mix.weights_simplex import UNITS, decimal_shares
from mobilellm_pro.evaluation.held_out import held_out
from mobilellm_pro.pipeline.data_mix_folder import write_text
from mobilellm_pro.pipeline.data_mix_plan import MixPlan
from mobilellm_pro.pipeline.data_mix_simulation import natural_tokens
from mobilellm_pro.pipeline.run_command import (
    EVALUATE,
    TRAIN,
    CommandFailed,
    evaluate_command,
    log_end,
    num_processes,
    run_logged,
    train_command,
)
from mobilellm_pro.pipeline.train_job import train
from mobilellm_pro.training.run import is_finished

HELD_OUT, MIXTURE = "held_out.json", "mixture.toml"
_FORKED = ("mobilellm_pro.pipeline.data_mix_proxies",)


@dataclass(frozen=True)
class Proxy:
    """One run.

    Attributes:
        name: its number, also the name of its folder.
        folder: for everything of it.
        weights: of the corpora, summing to 1.
    """

    name: str
    folder: Path
    weights: tuple[float, ...]


def draw_mixtures(tokens: Sequence[float], count: int, concentration: float, share_power: float, least_weight: float,
                  seed: int) -> np.ndarray:  # fmt: skip
    """float64 [count, corpora]: natural share, equal weights, then Dirichlet draws; rows sum to 1.

    A draw w becomes least_weight + (1 - corpora x least_weight) w.

    Args:
        tokens: of each corpus; natural share is in proportion.
        count, concentration, share_power, least_weight: see `data_mix_tables.ProxyTable`.
        seed: with the number of the mixture it gives the draw.
    """
    share = np.asarray(tokens, float) / np.sum(tokens)
    mean = share**share_power / (share**share_power).sum()
    draws = [share, np.full(len(share), 1 / len(share))]
    for number in range(2, count):
        draws.append(np.random.default_rng([seed, number]).dirichlet(concentration * mean))
    return least_weight + (1 - len(share) * least_weight) * np.stack(draws[:count])


def plan_proxies(plan: MixPlan) -> list[Proxy]:
    """The proxies of a plan but for those left out, with weights of six decimals that sum to 1."""
    settings = plan.proxy
    mixtures = draw_mixtures(
        list(natural_tokens(plan).values()),
        settings.count,
        settings.concentration,
        settings.share_power,
        settings.least_weight,
        plan.seed,
    )
    root = plan.folder / "proxies"
    return [
        Proxy(f"{number:03d}", root / f"{number:03d}", tuple(_rounded(weights)))
        for number, weights in enumerate(mixtures)
        if number not in settings.leave_out
    ]


def write_test_job(plan: MixPlan) -> Path:
    """Writes domains.toml: every domain of the plan with the same share of the held-out tokens."""
    share = _rounded(np.full(len(plan.domains), 1 / len(plan.domains)))
    tables = [(domain.name, domain.path, weight) for domain, weight in zip(plan.domains, share, strict=True)]
    path = plan.folder / "domains.toml"
    write_text(path, datasets_text(tables))
    return path


def _rounded(weights: np.ndarray) -> list[float]:
    """Six decimals that sum to 1."""
    whole = decimal_shares(weights, np.ones(len(weights), np.int64), np.full(len(weights), UNITS))
    return [value / UNITS for value in whole.tolist()]


def write_mixture(plan: MixPlan, proxy: Proxy) -> None:
    """Writes mixture.toml into the proxy's folder, which is made.

    Raises:
        ValueError: it has begun on another mixture, so that its result would not be that of these weights.
    """
    path = proxy.folder / MIXTURE
    tables = [(corpus.name, corpus.path, weight) for corpus, weight in zip(plan.corpora, proxy.weights, strict=True)]
    begun = [file for file in (proxy.folder / HELD_OUT, proxy.folder / "run") if file.exists()]
    if begun and path.is_file():
        found = {table["name"]: table["weight"] for table in tomllib.loads(path.read_text())["data"]["datasets"]}
        wanted = {name: weight for name, _, weight in tables}
        if found != wanted:
            raise ValueError(
                f'{path}: proxy "{proxy.name}" ran on {found}, the plan gives {wanted}: another release of numpy may '
                f"draw other mixtures; choose another output, or remove {proxy.folder} to run it again"
            )
    write_text(path, datasets_text(tables))


def proxy_words(plan: MixPlan, proxy: Proxy) -> list[str]:
    """The words that make the plan's job the proxy's; it is tested when it has ended, so that it need not be before."""
    own = [f"--data.mix={proxy.folder / MIXTURE}", f"--job.dump_folder={proxy.folder / 'run'}"]
    return [*plan.words, *own, "--validation.no_enable"]


def held_out_words(plan: MixPlan, tests: Path) -> list[str]:
    """The words that make the plan's job name the text of all domains."""
    return [*plan.words, f"--data.mix={tests}"]


def run_proxies(plan: MixPlan, proxies: Sequence[Proxy], tests: Path) -> None:
    """Trains proxies and tests them on the text of all domains; each leaves held_out.json in its folder.

    Args:
        plan: what they have in common.
        proxies: to run; their mixtures are written.
        tests: `write_test_job`.

    Raises:
        CommandFailed: one of them ended with an error; no other begins then, and those under way have ended.
    """
    elsewhere = TRAIN in os.environ or EVALUATE in os.environ or (num_processes() or 1) > 1
    run = _run_commands if elsewhere else _run_forked
    with (
        ThreadPoolExecutor(plan.proxy.parallel) as pool,
        tqdm(total=len(proxies), desc="calibrate", unit="proxy", disable=None) as bar,
    ):
        futures = [pool.submit(run, plan, proxy, tests) for proxy in proxies]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_commands(plan: MixPlan, proxy: Proxy, tests: Path) -> None:
    """Trains by the user's command or launch/train.sh, then tests."""
    log, output = proxy.folder / "log.txt", proxy.folder / HELD_OUT
    words = proxy_words(plan, proxy)
    if not is_finished(load(plan.job, words)):
        run_logged("proxy", proxy.name, "train", train_command(plan.job, words), log)
    checkpoint = proxy.folder / "run"
    if EVALUATE in os.environ:
        job = [str(plan.job), *held_out_words(plan, tests)]
        command = evaluate_command("held-out", checkpoint, job, {"output": str(output)})
        run_logged("proxy", proxy.name, "held-out", command, log)
    else:
        held_out(str(checkpoint), load(plan.job, held_out_words(plan, tests)), output=str(output))


def _run_forked(plan: MixPlan, proxy: Proxy, tests: Path) -> None:
    """Trains and tests in a process that is forked from one that only imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_FORKED))
    log = proxy.folder / "log.txt"
    threads = max(1, len(os.sched_getaffinity(0)) // plan.proxy.parallel)
    arguments = (str(plan.job), proxy_words(plan, proxy), held_out_words(plan, tests), proxy.folder, threads)
    process = context.Process(target=_train_and_test, args=(*arguments, log))
    process.start()
    process.join()
    if process.exitcode:
        status = f"its process ended with status {process.exitcode}"
        raise CommandFailed(f'proxy "{proxy.name}": {status}; {log_end(log)}; or name it in proxy.leave_out')


def _train_and_test(
    job: str, words: Sequence[str], tests: Sequence[str], folder: Path, threads: int, log: Path
) -> None:
    """What the forked process does; it ends with its parent, so that no second start meets it."""
    end_with_parent()
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(threads)
    try:
        train(load(job, words), job)
        held_out(str(folder / "run"), load(job, tests), output=str(folder / HELD_OUT))
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error

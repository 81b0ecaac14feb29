"""The command line: `python -m mobilellm_pro VERB ...`, or `mobilellm-pro VERB ...` once installed.

A verb is one function of the package. Its options are read from the function's signature and its help is the
function's docstring, both from the source text, so that `--help` imports nothing; the function is imported when it is
called. To add a verb, write the function and add one line to `VERBS`:

- a parameter without default is a word of the command line, one with a default is an option, a boolean is a switch;
- `config: JobConfig` is the path of a TOML file, loaded together with the `--section.key value` words of the command
  line; a parameter `config_path` gets the path itself;
- a parameter `overrides` gets those words themselves, a name that Python has taken ends with `_`.

A user's mistake ends with `error: ...` and exit status 2; `MOBILELLM_PRO_TRACEBACK=1` shows where it was noticed.
Anything else is a bug and keeps its traceback.
"""

import argparse
import ast
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilellm_pro.config import JobConfig

VERBS: dict[str, str] = {
    "fetch-text": "mobilellm_pro.data.offline_text:fetch_offline_text",
    "fetch-evaluation": "mobilellm_pro.data.offline_evaluation:fetch_evaluation_data",
    "prepare": "mobilellm_pro.data.prepare:prepare",
    "inspect": "mobilellm_pro.data.inspection:inspect",
    "show": "mobilellm_pro.__main__:show",
    "validate": "mobilellm_pro.__main__:validate",
    "mix": "mobilellm_pro.pipeline.data_mix:mix",
    "merge": "mobilellm_pro.pipeline.merge:merge",
    "plan": "mobilellm_pro.pipeline.plan:plan",
    "train": "mobilellm_pro.pipeline.train_job:train",
    "convert": "mobilellm_pro.convert.conversion:convert",
    "export": "mobilellm_pro.convert.export:export",
    "generate": "mobilellm_pro.evaluation.generate:generate",
    "needle": "mobilellm_pro.evaluation.needle:needle",
    "evaluate": "mobilellm_pro.evaluation.evaluate:evaluate",
    "contamination": "mobilellm_pro.evaluation.job_contamination:job_contamination",
    "held-out": "mobilellm_pro.evaluation.held_out:held_out",
    "compare": "mobilellm_pro.pipeline.compare:compare",
    "ablate": "mobilellm_pro.pipeline.ablation:ablate",
    "run": "mobilellm_pro.pipeline.runner:run",
    "status": "mobilellm_pro.pipeline.pipeline_status:status",
    "report": "mobilellm_pro.pipeline.run_report:report",
}
"""Verb to `module:function`."""

_PACKAGE = "mobilellm_pro"
_USER_ERROR_STATUS = 2
_PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_CONFIG_EPILOG = "--section.key value (or --section.key=value, --section.flag, --section.no_flag) overrides the file."


def show(config: "JobConfig") -> None:
    """Print a configuration as it is in force: base, file, defaults and overrides, as one TOML file.

    Args:
        config: TOML file of a job.
    """
    from mobilellm_pro.config import resolved_toml

    print(resolved_toml(config), end="")


def validate(config: "JobConfig", config_path: str, *, world_size: int | None = None) -> None:
    """Check a configuration without starting anything, and print `ok`.

    Checks keys, types, the agreement of keys with each other, the files and folders that they name, and the degrees of
    parallelism and the batch for a number of processes.

    Args:
        config: TOML file of a job.
        world_size: number of processes that the job will have. Default: the least that the degrees allow.

    Raises:
        JobError: with all problems.
    """
    from mobilellm_pro.config import JobError, smallest_world_size
    from mobilellm_pro.pipeline.train_job import online_evaluations
    from mobilellm_pro.training.preflight import problems

    processes = smallest_world_size(config) if world_size is None else world_size
    found = list(dict.fromkeys(map(str, problems(config, processes, online_evaluations(config)))))
    if found:
        raise JobError(config_path, found)
    print(f"ok: {config_path} with {processes} process{'es' if processes != 1 else ''}")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a verb's function."""

    name: str
    annotation: str
    default: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class VerbSource:
    """What the source text says about a verb's function."""

    docstring: str
    parameters: tuple[Parameter, ...]

    @property
    def takes_config(self) -> bool:
        """Whether its first word is a TOML file of a job."""
        return any(parameter.annotation.strip("'\"") == "JobConfig" for parameter in self.parameters)

    @property
    def takes_overrides(self) -> bool:
        """Whether it passes words `--section.key value` on."""
        return any(parameter.name == "overrides" for parameter in self.parameters)


def verb_source(target: str) -> VerbSource:
    """Docstring and parameters of `module:function`, read from the file without importing it.

    Raises:
        LookupError: no such file or function.
    """
    module, _, function = target.partition(":")
    path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return VerbSource(ast.get_docstring(node) or "", tuple(_parameters(node.args)))
    raise LookupError(f"{target}: no such function")


def _parameters(arguments: ast.arguments) -> list[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    no_default: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = [*zip(positional, [*no_default, *arguments.defaults]), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return [
        Parameter(
            argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else "str",
            inspect.Parameter.empty if default is None else _literal(default),
        )
        for argument, default in pairs
    ]


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:  # a named constant: the function knows it, so the option is left out unless given
        return None


def build_parser(wanted: str = "") -> argparse.ArgumentParser:
    """The parser of all verbs. A verb whose source cannot be read is not offered, unless it is the one that is wanted.

    Raises:
        SyntaxError: in the source of the wanted verb.
    """
    parser = argparse.ArgumentParser("mobilellm-pro", description="Distil, merge, quantize and export a small model.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, target in VERBS.items():
        try:
            source = verb_source(target)
        except (LookupError, SyntaxError):
            if verb == wanted:
                raise
            continue
        command = verbs.add_parser(
            verb,
            help=source.docstring.partition("\n")[0],
            description=source.docstring,
            epilog=_CONFIG_EPILOG if source.takes_config or source.takes_overrides else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for parameter in source.parameters:
            _add_argument(command, parameter)
    return parser


def _add_argument(command: argparse.ArgumentParser, parameter: Parameter) -> None:
    annotation = parameter.annotation.strip("'\"").replace("typing.", "")
    if parameter.name in ("config_path", "overrides"):
        return
    if annotation == "JobConfig":
        command.add_argument(parameter.name, metavar="CONFIG", help="TOML file of a job")
        return
    given_once = parameter.default is inspect.Parameter.empty
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    types: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "Path": Path}
    plain = annotation.removesuffix(" | None").removeprefix("str | ")
    element = plain.removeprefix("list[").removeprefix("Sequence[").removesuffix("]")
    if annotation == "bool":
        options["action"] = argparse.BooleanOptionalAction if parameter.default else "store_true"
    elif plain.startswith("Literal["):
        options["choices"] = ast.literal_eval(f"[{plain.removeprefix('Literal[')}")
    elif plain.startswith(("list[", "Sequence[")):
        options.update(nargs="+", type=types.get(element, str))
    else:
        options["type"] = types.get(plain, str)
    if given_once:
        options.pop("default")
        command.add_argument(parameter.name, metavar=parameter.name.upper(), **options)
    else:
        command.add_argument(f"--{parameter.name.rstrip('_').replace('_', '-')}", dest=parameter.name, **options)


def run_verb(words: Sequence[str]) -> None:
    """Parse the words of a command line and call the verb's function.

    Raises:
        SystemExit: help was asked for, or the words are not a command.
    """
    words, overrides = _split_overrides(words)
    parser = build_parser(words[0] if words else "")
    arguments = vars(parser.parse_args(words))
    verb = arguments.pop("verb")
    source = verb_source(VERBS[verb])
    if source.takes_overrides:
        arguments["overrides"] = overrides
    elif overrides and not source.takes_config:
        parser.error(f"{verb} takes no configuration, so no {overrides[0]}")
    if source.takes_config:
        arguments |= _loaded_config(source, arguments, overrides)
    module, _, function = VERBS[verb].partition(":")
    getattr(importlib.import_module(module), function)(**arguments)


def _loaded_config(source: VerbSource, arguments: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    from mobilellm_pro.config import load

    name = next(parameter.name for parameter in source.parameters if parameter.annotation.strip("'\"") == "JobConfig")
    path = arguments[name]
    extra = {"config_path": path} if any(item.name == "config_path" for item in source.parameters) else {}
    return {name: load(path, overrides), **extra}


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words for the verb, and `--section.key` words with their values."""
    rest: list[str] = []
    overrides: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            rest.append(word)
            continue
        overrides.append(word)
        if "=" not in word and remaining and not remaining[0].startswith("--"):
            overrides.append(remaining.pop(0))
    return rest, overrides


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process') and return its exit status."""
    try:
        run_verb(sys.argv[1:] if words is None else words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `mobilellm-pro show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not is_users_mistake(error):
            raise
        if os.environ.get("MOBILELLM_PRO_TRACEBACK") == "1":
            traceback.print_exc()
        else:
            _print_error(error)
        return _USER_ERROR_STATUS
    return 0


def is_users_mistake(error: Exception) -> bool:
    """Whether an error is about what the user gave: an error class of this package, or a path that is not usable."""
    if isinstance(error, _PATH_ERRORS):
        return True
    if not isinstance(error, ValueError):
        return False
    if type(error).__module__.split(".")[0] in (_PACKAGE, "__main__"):
        return True
    last_frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return type(error) is ValueError and str(last_frame.f_globals.get("__name__")).split(".")[0] == _PACKAGE


def _print_error(error: Exception) -> None:
    """Under torchrun once, if every rank has the same to say; what only one rank misses is that rank's to name."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr)
    elif not getattr(error, "same_on_every_rank", False):
        print(f"error (rank {rank}): {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

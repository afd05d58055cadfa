"""The command line: `equipoise COMMAND --config recipe.yaml --key value`.

Exit codes: 0 done, 2 bad input (one line that names it), 1 a bug (a traceback). Nothing heavy is imported before a
command runs.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

# command -> (module, config class, function, one line); two-word commands have a space
COMMANDS = {
    "demo": ("equipoise.demo", "Demo", "demo", "the main job: steer a real model between real objectives, and report it"),
    "data": ("equipoise.inspect_data", "Data", "data", "show and check prompts or preference pairs"),
    "sample": ("equipoise.stages.sampling", "Sample", "sample", "sample responses, plain or steered"),
    "score": ("equipoise.stages.sampling", "Score", "score", "score sampled responses on every objective"),
    "label": ("equipoise.stages.labelling", "Label", "label", "pairs labelled by rewards: of a scored run, or of files of pairs"),
    "pairs": ("equipoise.stages.pairing", "Pairs", "pairs", "labelled pairs in one file per split, with a share of conflicts"),
    "normalise": ("equipoise.stages.normalising", "Normalise", "normalise", "freeze the statistics of a scored run as a reference"),
    "prompts": ("equipoise.stages.prompting", "Prompts", "prompts", "prompts of several sources in one file, with splits"),
    "judge": ("equipoise.stages.judging", "Judge", "judge", "a chat model compares the responses of two runs"),
    "train reward_head": ("equipoise.stages.training", "TrainRewardHead", "train_reward_head", "a linear reward on frozen features"),
    "train bradley_terry": ("equipoise.stages.training", "TrainBradleyTerry", "train_bradley_terry", "a transformer that scores responses"),
    "train multi_head": (
        "equipoise.stages.rewards",
        "TrainMultiHead",
        "train_multi_head",
        "ratings on features (ArmoRM, stage 1)",
    ),
    "train gating": ("equipoise.stages.rewards", "TrainGating", "train_gating", "a gate that mixes them (ArmoRM, stage 2)"),
    "train dpo": ("equipoise.stages.preferences", "TrainDPO", "train_dpo", "a policy on pairs, of one label set or several"),
    "train modpo": ("equipoise.stages.preferences", "TrainMODPO", "train_modpo", "a policy for one weighting: pairs and rewards (MODPO)"),
    "train ppo": ("equipoise.stages.on_policy", "TrainPPO", "train_ppo", "a policy on its own responses' rewards (PPO, MORLHF)"),
    "train online_dpo": (
        "equipoise.stages.on_policy",
        "TrainOnlineDPO",
        "train_online_dpo",
        "a policy on pairs of its own responses, at any weights (online DPO)",
    ),
    "train map": (
        "equipoise.stages.on_policy",
        "TrainMAP",
        "train_map",
        "a policy that meets targets: PPO at a palette's multipliers (MAP)",
    ),
    "train trl": ("equipoise.stages.on_policy", "TrainTRL", "train_trl", "a policy by TRL's RLOO or GRPO, on several of our rewards"),
    "train sft": ("equipoise.stages.sft", "TrainSFT", "train_sft", "a model learns responses"),
    "train ric": ("equipoise.stages.in_context", "TrainRiC", "train_ric", "a model that is told the scores it should get (RiC)"),
    "train autoregressive": (
        "equipoise.stages.preferences",
        "TrainAutoregressive",
        "train_autoregressive",
        "language models as rewards for decoding (GenARM, PARM)",
    ),
    "train value": ("equipoise.stages.training", "TrainValue", "train_value", "value heads that steer decoding (MAVIS)"),
    "sipo sample": ("equipoise.stages.sipo", "SipoSample", "sipo_sample", "answer the prompts of pairs in conflict along the weights"),
    "sipo refine": ("equipoise.stages.sipo", "SipoRefine", "sipo_refine", "review every sample and rewrite it"),
    "sipo score": ("equipoise.stages.sipo_select", "SipoScore", "sipo_score", "score pairs, samples and rewrites on every scorer"),
    "sipo select": ("equipoise.stages.sipo_select", "SipoSelect", "sipo_select", "combine, filter, and make pairs without conflict"),
    "soup": ("equipoise.stages.soups", "Soup", "soup", "adapters or models to one per weight vector, for any engine"),
    "merge": ("equipoise.stages.soups", "Merge", "merge", "an adapter into a plain model folder"),
    "export": ("equipoise.stages.exporting", "Export", "export", "what vLLM, SGLang, LoRAX or llama.cpp can serve of a policy"),
    "train value_model": ("equipoise.stages.trees", "TrainValueModel", "train_value_model", "a value model of its own, on labelled trees"),
    "grow": ("equipoise.stages.trees", "Grow", "grow", "rollout trees of the reference or of a steered policy (MAVIS)"),
    "label nodes": ("equipoise.stages.trees", "Label", "label", "score the leaves of trees and value every node"),
    "distil": ("equipoise.stages.trees", "Distil", "distil", "one value model that says what several say"),
    "embed": ("equipoise.stages.rewards", "Embed", "embed", "frozen features of rated responses or pairs, once"),
    "explain": ("equipoise.stages.rewards", "Explain", "explain", "which attributes made a multi-head reward's score"),
    "log": ("equipoise.stages.run_log", "Log", "log", "what a scored run delivered, prompt by prompt and overall"),
    "sweep": ("equipoise.stages.evaluation", "Sweep", "sweep", "steer along the whole trade-off on held-out prompts"),
    "evaluate": ("equipoise.stages.evaluation", "Evaluate", "evaluate", "fronts, intervals and comparisons of a sweep"),
    "report": ("equipoise.stages.evaluation", "Report", "report", "draw an evaluation as one self-contained page"),
    "compare": ("equipoise.stages.comparing", "Compare", "compare", "methods side by side: same prompts, rewards, KL and compute"),
    "rewardbench": ("equipoise.stages.rewardbench", "RewardBench", "rewardbench", "how often a reward prefers the better response"),
    "palette": (
        "equipoise.stages.palette",
        "Palette",
        "palette",
        "ask for outcomes: can they be had, at what price, with how much compute",
    ),
    "palette apply": ("equipoise.stages.palette", "Apply", "apply", "serve solved palettes on held-out prompts, beside their targets"),
    "serve": ("equipoise.serving.command", "Serve", "serve", "an endpoint and a page: weights or targets in the request"),
    "chat": ("equipoise.serving.chat", "Chat", "chat", "a conversation in the terminal, the trade-off at hand"),
    "tiny": ("equipoise.tiny", "Tiny", "tiny", "a two-layer model and small data sets, to try a pipeline on"),
    "run": ("equipoise.cli", "Run", "run_lines", "the commands of a file, one a line, in one process"),
    "doctor": ("equipoise.doctor", "Doctor", "doctor", "versions, devices, embedded models, and what is missing"),
}

# The ways in which jsonargparse says that it doesn't know a key.
_UNKNOWN_KEY = re.compile(
    r"[Kk]ey \"?'?([\w.]+)'?\"? is not expected"
    r"|[Oo]ption '([\w.]+)' is not accepted"
    r"|does not accept option '([\w.]+)'"
    r"|[Uu]nrecognized arguments: -*([\w.-]+)"
    r"|[Uu]nexpected.*?key[s]?:? '?([\w.]+)'?"
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run commands in one process: where they are short, starting a process for each is what takes time."""

    commands: Path
    """File with a command on each line, as a shell would read it, without `equipoise` in front."""


def run_lines(config: Run) -> None:
    """Run them in order. Raises `UserError` naming the first that fails."""
    from equipoise.types import UserError

    try:
        with open(config.commands, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                words = shlex.split(line, comments=True)
                if words and main(words) != 0:
                    raise UserError(
                        f"line {number} of {config.commands} ended with an error; mend it and run again: what is finished is kept"
                    )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"can't read commands from {config.commands} ({error})") from None


def usage() -> str:
    """The list of commands."""
    lines = ["usage: equipoise COMMAND [--config RECIPE.yaml] [--KEY VALUE ...]", "", "commands:"]
    lines += [f"  {name:<18} {row[3]}" for name, row in COMMANDS.items()]
    lines += ["", "`equipoise COMMAND --help` lists a command's settings."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from equipoise.types import UserError

    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(usage())
            return 0
        if words[0] in ("-V", "--version"):
            from importlib.metadata import version

            print(version("equipoise"))
            return 0
        name, rest = _command(words)
        config, function = _parse(name, rest)
        result = function(config)
        if result is not None:
            print(result)
    except UserError as error:
        print("equipoise:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("equipoise: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command that the words begin with, and the rest."""
    from equipoise.types import UserError

    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, list(words[length:])
    asked = " ".join(words[:2]) if words[0] in ("train", "sipo") else words[0]
    near = difflib.get_close_matches(asked, COMMANDS, n=1, cutoff=0.5)
    raise UserError(f"unknown command {asked!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(COMMANDS)}"))


def _parse(name: str, words: Sequence[str]) -> tuple[Any, Any]:
    """The command's config and function."""
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    from equipoise.types import UserError

    module_name, config_name, function_name, description = COMMANDS[name]
    module = importlib.import_module(module_name)
    config_class = getattr(module, config_name)
    parser = ArgumentParser(prog=f"equipoise {name}", description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a recipe (YAML); the command line goes on top of it")
    _resolve_annotations(config_class)
    parser.add_class_arguments(config_class, None)
    try:
        parsed = parser.parse_args(_flags(words, config_class))
        made = parser.instantiate(parsed)
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(_explain(str(error), name, _keys(parser))) from None
    names = {field.name for field in fields(config_class)}
    # Through items(), as vars() shows a key such as `values`, which is also a method's name, with a mark before it.
    settings = {key: value for key, value in made.items() if key in names}
    return config_class(**settings), getattr(module, function_name)


def _flags(words: Sequence[str], config_class: Any) -> list[str]:
    """The words with "true" after each switch that stands without a value, as in `--json`; "-0.5,1.5" is a value, not a flag."""
    switches = {f"--{field.name}" for field in fields(config_class) if field.type in (bool, "bool")}
    spelt: list[str] = []
    for word, after in zip(words, [*words, "--"][1:], strict=True):
        if re.match(r"-\.?\d", word) and spelt and spelt[-1].startswith("--") and "=" not in spelt[-1]:
            spelt[-1] += f"={word}"
        else:
            spelt += [word, "true"] if word in switches and after.startswith("-") else [word]
    return spelt


def _resolve_annotations(config_class: Any) -> None:
    """Turn the annotations from text into types: jsonargparse would run the module's TYPE_CHECKING imports for it, torch's too."""
    hints = get_type_hints(config_class)
    config_class.__init__.__annotations__ = hints
    for hint in hints.values():
        if is_dataclass(hint):
            _resolve_annotations(hint)


def _keys(parser: Any) -> list[str]:
    """Every key the command knows, dotted."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "config") and not action.dest.startswith("print_")]


def _explain(message: str, name: str, keys: Sequence[str]) -> str:
    """One line; an unknown key with its nearest known one."""
    line = " ".join(message.split())
    found = _UNKNOWN_KEY.search(line)
    if found:
        key = next(g for g in found.groups() if g)
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4) or difflib.get_close_matches(key.split(".")[-1], keys, n=1, cutoff=0.4)
        return f"{name} has no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(keys)}")
    return line[:600] + ("; write a list such as [a,b]" if "Expected a <class 'tuple'>" in line else "")


if __name__ == "__main__":
    sys.exit(main())

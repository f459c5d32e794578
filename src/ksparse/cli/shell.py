"""Verbs about the command itself: help, completion."""

from __future__ import annotations

import shlex
import sys

from ksparse.cli.arguments import VERBS, flags_of_verb, refuse_arguments, verb
from ksparse.config.evaluation import EVALUATIONS
from ksparse.errors import InputError, unknown

SHELLS = ("bash", "zsh", "fish")
_RECIPES = ("train", "plan", "shard", "sweep")
_RUNS = (
    *("finetune", "resume", "eval", "compare", "report", "view", "steer", "attribute"),
    *("convert", "push"),
)


@verb
def show_help(arguments: list[str]) -> None:
    """help VERB

    Show the options of a verb, and examples.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        refuse_arguments("help", arguments)
    name, *more = arguments
    if name not in VERBS:
        raise unknown("there is no verb", name, VERBS, "see `ksparse --help`")
    VERBS[name]([*more, "--help"])


@verb
def completion(arguments: list[str]) -> None:
    """completion bash|zsh|fish

    Print a script that completes verbs, options, recipes, runs and evaluations in a shell.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        refuse_arguments("completion", arguments)
    if len(arguments) != 1:
        raise InputError(
            f"`ksparse completion` needs one shell, {', '.join(SHELLS)}; got "
            f"{' '.join(arguments) or 'nothing'}"
        )
    if arguments[0] not in SHELLS:
        raise unknown("there is no completion for", arguments[0], SHELLS)
    sys.stdout.write(_fish() if arguments[0] == "fish" else _bash(zsh=arguments[0] == "zsh"))


def _words(name: str) -> list[str]:
    """Return what a verb takes besides flags and paths."""
    if name == "eval":
        return list(EVALUATIONS)
    return {"help": list(VERBS), "completion": list(SHELLS), "probes": ["build"]}.get(name, [])


_BASH = r"""# Completion of ksparse for bash{for_zsh}.
{setup}_ksparse_paths() {
    local path
    case " {runs} " in
        *" $1 "*)  # folders of runs, and of results
            for path in "$2"* "$2"*/* runs/"$2"*; do
                [[ -f $path/recipe.toml || -f $path/subject.json ]] && echo "$path"
            done ;;
    esac
    case " {recipes} " in
        *" $1 "*)
            for path in "$2"*.toml recipes/"$2"*.toml recipes/sweeps/"$2"*.toml; do
                [[ -f $path ]] && echo "$path"
            done ;;
    esac
}
_ksparse() {
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    local verb=${COMP_WORDS[1]} words= flags= IFS=$' \t\n'
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$current"))
        return
    fi
    case $verb in
{cases}
    esac
    case "$verb $before" in
{choices}
    esac
    case $current in
        -*) words=$flags ;;
    esac
    IFS=$'\n'
    local found=$(
        compgen -W "${words// /$'\n'}" -- "$current"
        [[ $current == -* ]] || { _ksparse_paths "$verb" "$current"; compgen -f -- "$current"; }
    )
    COMPREPLY=($(sort -u <<< "$found"))
}
complete -o filenames -F _ksparse ksparse
"""


_ZSH_SETUP = """autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


def _bash(*, zsh: bool) -> str:
    """Return the script for bash, which zsh can read too."""
    cases, choices = [], []
    for name in VERBS:
        flags = flags_of_verb(name)
        written = " ".join(["--help", *(word for flag in flags for word in flag.words)])
        words = " ".join(_words(name))
        cases.append(f"        {name}) words='{words}' flags='{written}' ;;")
        choices += [
            f"        '{name} --{flag.name}') COMPREPLY=($(compgen -W "
            f'{shlex.quote(" ".join(flag.choices))} -- "$current")); return ;;'
            for flag in flags
            if flag.choices
        ]
    parts = {
        "for_zsh": ", read by zsh" if zsh else "",
        "setup": _ZSH_SETUP if zsh else "",
        "verbs": " ".join(VERBS),
        "runs": " ".join(_RUNS),
        "recipes": " ".join(_RECIPES),
        "cases": "\n".join(cases),
        "choices": "\n".join(choices),
    }
    script = _BASH
    for key, text in parts.items():
        script = script.replace(f"{{{key}}}", text)
    return script


_FISH = """# Completion of ksparse for fish.
function __ksparse_runs
    for file in (commandline -ct)*/{recipe.toml,subject.json} runs/*/{recipe.toml,subject.json}
        dirname $file
    end 2>/dev/null
end
function __ksparse_recipes
    for file in *.toml recipes/*.toml recipes/sweeps/*.toml
        echo $file
    end
end
"""


def _fish() -> str:
    lines = [f"complete -c ksparse -n __fish_use_subcommand -f -a '{' '.join(VERBS)}'"]
    for name in VERBS:
        begin = f"complete -c ksparse -n '__fish_seen_subcommand_from {name}'"
        if name in _RUNS:
            lines.append(f"{begin} -a '(__ksparse_runs)'")
        if name in _RECIPES:
            lines.append(f"{begin} -a '(__ksparse_recipes)'")
        if words := _words(name):
            lines.append(f"{begin} -a '{' '.join(words)}'")
        for flag in flags_of_verb(name):
            values = f" -x -a '{' '.join(flag.choices)}'" if flag.choices else ""
            lines += [f"{begin} -l '{word.removeprefix('--')}'{values}" for word in flag.words]
    return _FISH + "\n".join(lines) + "\n"

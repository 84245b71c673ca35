"""Bash, zsh, and fish: the scripts that ask rcpo for completions, their installation, and the answer."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from rcpo.commands.completion import Command, Word, complete
from rcpo.errors import ConfigError

VARIABLE = "_RCPO_COMPLETE"  # names the shell that asks; the arguments are then the words so far

# The text up to the cursor goes to rcpo as it is: bash itself splits words at = and :, which keys contain.
BASH = f"""\
_rcpo() {{
    local line
    COMPREPLY=()
    while IFS= read -r line; do COMPREPLY+=("$line"); done < <(
        {VARIABLE}=bash "$1" "${{COMP_LINE:0:COMP_POINT}}" "$COMP_WORDBREAKS" 2>/dev/null
    )
}}
complete -o nospace -F _rcpo rcpo
"""

ZSH = f"""\
#compdef rcpo
_rcpo() {{
    emulate -L zsh
    local line word shown
    local -a open open_shown closed closed_shown
    while IFS= read -r line; do
        word=${{line%%$'\\t'*}}
        shown=${{line//$'\\t'/  }}
        if [[ $word == *[=./] ]]; then
            open+=("$word") open_shown+=("$shown")
        else
            closed+=("$word") closed_shown+=("$shown")
        fi
    done < <({VARIABLE}=zsh "${{(Q)words[1]}}" "${{(@Q)words[2,CURRENT-1]}}" "${{(Q)PREFIX}}" 2>/dev/null)
    (( $#open )) && compadd -S '' -l -d open_shown -a open
    (( $#closed )) && compadd -l -d closed_shown -a closed
}}
if (( ! $+functions[compdef] )); then autoload -Uz compinit && compinit; fi
compdef _rcpo rcpo
"""

FISH = f"""\
function __rcpo_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    env {VARIABLE}=fish $words "$current" 2>/dev/null
end
complete -c rcpo -f -a '(__rcpo_complete)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
_SPECIAL = re.compile(r"""([\s\\'"$`&|;()<>*?\[\]{}!#])""")


def answer(shell: str, arguments: Sequence[str], commands: dict[str, Command]) -> list[str]:
    """The lines that a shell's script reads: completions, with their meaning where the shell shows it."""
    if shell == "bash":
        line, breaks = arguments
        return _answer_bash(line, breaks, commands)
    *words, current = arguments
    return [f"{word.text}\t{word.meaning}" for word in complete(words, current, commands)]


def _answer_bash(line: str, breaks: str, commands: dict[str, Command]) -> list[str]:
    """What replaces the part of the word that readline takes for a word, escaped unless quotes are open."""
    words, current, quoted_from = split_line(line)
    start = quoted_from
    if start is None:
        start = max((current.rfind(mark) + 1 for mark in breaks if mark in "=:"), default=0)
    found = complete(words[1:], current, commands)
    return [_bash_word(word, start, quoted=quoted_from is not None) for word in found]


def _bash_word(word: Word, start: int, *, quoted: bool) -> str:
    text = word.text[start:]
    return (text if quoted else _SPECIAL.sub(r"\\\1", text)) + ("" if word.open else " ")


def split_line(line: str) -> tuple[list[str], str, int | None]:
    """A command line's words, its last one, and where in that an open quotation begins (None: nowhere)."""
    words, word, quote, opened, inside = [], "", "", 0, False
    characters = iter(line)
    for character in characters:
        if quote:
            if character == quote:
                quote = ""
            else:
                word += character
        elif character in "'\"":
            quote, opened, inside = character, len(word), True
        elif character == "\\":
            word, inside = word + next(characters, ""), True
        elif character.isspace():
            if word or inside:
                words.append(word)
            word, inside = "", False
        else:
            word += character
    return words, word, opened if quote else None


def install(shell: str | None = None) -> int:
    """Install the completion of a shell, by default the one that called; returns the exit code."""
    shell = shell or calling_shell()
    if shell == "fish":
        file = _folder("XDG_CONFIG_HOME", ".config") / "fish" / "completions" / "rcpo.fish"
        _write(file, FISH)
        print(f"rcpo: wrote {file}; new fish shells complete rcpo")
        return 0
    if shell not in SCRIPTS:
        raise ConfigError(
            f"rcpo completes in {', '.join(SCRIPTS)}, and this shell is {shell or 'unknown'}; "
            "`rcpo --show-completion bash` prints a script to adapt"
        )
    file = _folder("XDG_DATA_HOME", ".local/share") / "rcpo" / f"completion.{shell}"
    settings = Path.home() / ".bashrc" if shell == "bash" else _folder("ZDOTDIR", "") / ".zshrc"
    _write(file, SCRIPTS[shell])
    line = f"source {shlex.quote(str(file))}  # rcpo's tab completion"
    before = settings.read_text(encoding="utf-8", errors="replace") if settings.exists() else ""
    if line not in before.splitlines():
        gap = "" if not before or before.endswith("\n") else "\n"
        with settings.open("a", encoding="utf-8") as out:  # so that a full disk cannot empty it
            out.write(f"{gap}{line}\n")
    print(f"rcpo: wrote {file}, which {settings} now reads; new {shell} shells complete rcpo")
    return 0


def script(shell: str) -> str:
    """The script of a shell; raises ConfigError for a shell that rcpo does not know."""
    if shell not in SCRIPTS:
        raise ConfigError(f"--show-completion {shell}: give one of {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]


def calling_shell() -> str:
    """The shell that started this process; the login shell where that cannot be told."""
    import shellingham  # type: ignore[import-untyped]

    try:
        name: str = shellingham.detect_shell()[0]
    except shellingham.ShellDetectionFailure:
        name = Path(os.environ.get("SHELL", "")).name
    return name


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")

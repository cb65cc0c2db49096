"""What to type at a Unix prompt."""

from __future__ import annotations

import random
from collections.abc import Callable

from demo.tasks.task import Kind, Slots, Task

FOLDERS = (
    "/etc",
    "/var/log",
    "/tmp",
    "/home",
    "/opt",
    "/srv",
    "/usr/bin",
    "/boot",
    "/mnt",
    "/media",
    "/root",
    "/var/cache",
)
FILES = (
    "notes.txt",
    "server.log",
    "backup.tar",
    "config.ini",
    "access.log",
    "todo.md",
    "disk.img",
    "hosts.conf",
    "cron.sh",
    "trace.out",
)
# description, command
ON_FOLDERS = (
    ("list the files in {x}, newest first", "ls -t {x}"),
    ("list the files in {x} by size", "ls -S {x}"),
    ("list hidden files in {x}", "ls -a {x}"),
    ("show the disk usage of {x}", "du -sh {x}"),
    ("change the directory to {x}", "cd {x}"),
    ("find empty files under {x}", "find {x} -empty"),
    ("create the directory {x}", "mkdir -p {x}"),
    ("remove the directory {x} recursively", "rm -r {x}"),
)
ON_FILES = (
    ("count the lines of {x}", "wc -l {x}"),
    ("print the file {x}", "cat {x}"),
    ("delete the file {x}", "rm {x}"),
    ("follow the end of {x}", "tail -f {x}"),
    ("show the start of {x}", "head {x}"),
    ("make {x} executable", "chmod +x {x}"),
    ("compress {x} with gzip", "gzip {x}"),
    ("show the checksum of {x}", "sha256sum {x}"),
)


def _command(
    table: tuple[tuple[str, str], ...], names: tuple[str, ...]
) -> Callable[[random.Random], tuple[Slots, str]]:
    def sample(rng: random.Random) -> tuple[Slots, str]:
        (words, command), name = rng.choice(table), rng.choice(names)
        return {"do": words.format(x=name)}, command.format(x=name)

    return sample


PHRASINGS = (
    "Shell command to {do}?",
    "How do I {do} in the terminal?",
    "Bash: {do}.",
    "Which Linux command will {do}?",
    "In a Unix shell, {do}.",
    "Terminal: {do}.",
    "I want to {do} from the command line.",
    "Give me the bash command to {do}.",
)
HELD_OUT = (
    "Which shell command will {do}?",
    "In the terminal, how do I {do}?",
    "Give me the Linux command to {do}.",
    "In bash, {do}.",
)

TASK = Task(
    "shell",
    "Gives the Unix shell command for a chore.",
    (Kind(_command(ON_FOLDERS, FOLDERS), PHRASINGS, HELD_OUT), Kind(_command(ON_FILES, FILES), PHRASINGS, HELD_OUT)),
)

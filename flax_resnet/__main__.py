"""`flax-resnet COMMAND ...`, or `python -m flax_resnet COMMAND ...`: the scripts by name."""

import ast
import os
import re
import runpy
import sys

from flax_resnet.shipped import COMMANDS, IN_WHEEL, ROOT, SCRIPTS
from flax_resnet.streams import prepare_streams, write_out

USER_ERROR = 2  # exit code
HELP = ("--help", "-help", "-h", "help")


def main() -> None:
    """Runs the script of a command with the rest of the command line."""
    prepare_streams()
    name, *arguments = sys.argv[1:] or [""]
    if name in HELP:
        try:
            print(usage())
            write_out()
        except OSError as e:
            fail(str(e))
    elif name in COMMANDS:
        start(name, arguments)
    else:
        got = f"no such command: {name!r}" if name else "missing command"
        fail(f"{got}; there are {', '.join(COMMANDS)}")


def usage() -> str:
    """Every command with the first sentence of its script, which is not run for it."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["Usage: flax-resnet COMMAND [FLAGS]; flax-resnet COMMAND --help explains one.", ""]
    return "\n".join(lines + [f"  {name:{width}}{summary(name)}" for name in COMMANDS])


def summary(name: str) -> str:
    source = (SCRIPTS / f"{COMMANDS[name]}.py").read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return re.sub(r":? `.*", "", first)


def start(name: str, arguments: list[str]) -> None:
    from flax_resnet import cli  # and with it JAX, which `flax-resnet --help` does without

    cli.started_by_command = True
    if not IN_WHEEL:  # processes that the script starts find the library of this checkout, too
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    script = str(SCRIPTS / f"{COMMANDS[name]}.py")
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        fail(f"{name} needs PyTorch: pip install 'flax-resnet[torch]'")


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
